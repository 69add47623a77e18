"""SAM's mask decoder for all boxes of all images in one call, same numbers as the stock module."""

import torch
from torch import Tensor

import samft.torchvision_cure  # noqa: F401  (before all that imports torchvision)

from segment_anything.modeling import MaskDecoder


def decode_boxes(
    decoder: MaskDecoder,
    image_embeddings: Tensor,
    *,
    image_index: Tensor,
    image_pe: Tensor,
    sparse_embeddings: Tensor,
    dense_embedding: Tensor,
) -> tuple[Tensor, Tensor]:
    """Predicts one mask for each box, over many images at once.

    The stock `MaskDecoder.predict_masks` repeats the embedding of a single image for each prompt.
    Here each prompt names its image, and only the mask token that box prompts use (token 0) is
    carried to a mask; its hypernetwork is the only one evaluated.

    Args:
        decoder: The stock module, whose parameters are used as they are.
        image_embeddings: float [N, C, h, w].
        image_index: int64 [M], the image of each box, in 0..N-1.
        image_pe: float [1, C, h, w], the dense positional encoding.
        sparse_embeddings: float [M, 2, C], the embedded corners of each box.
        dense_embedding: float [1, C, 1, 1], the "no mask" embedding.

    Returns:
        Mask logits [M, 4h, 4w] and predicted IoU [M].

    Source: `segment_anything/modeling/mask_decoder.py`, `predict_masks`.
    """
    num_masks = sparse_embeddings.shape[0]
    output_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([output_tokens.expand(num_masks, -1, -1), sparse_embeddings], dim=1)

    source = (image_embeddings + dense_embedding)[image_index]
    queries, keys = decoder.transformer(source, image_pe.expand_as(source), tokens)

    upscaled = decoder.output_upscaling(keys.transpose(1, 2).reshape(source.shape))
    weights = decoder.output_hypernetworks_mlps[0](queries[:, 1])
    mask_logits = torch.einsum("mc,mchw->mhw", weights, upscaled)
    iou_predicted = decoder.iou_prediction_head(queries[:, 0])[:, 0]
    return mask_logits, iou_predicted
