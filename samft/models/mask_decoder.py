"""SAM's mask decoder for all prompts of all images in one call, with the numbers of the stock.

`STOCK` runs the package's own modules; `FAST` computes the same function of the same parameters,
exactly but for the order of additions. Three things make it cheap:

1. A two-way transformer that projects prompt tokens instead of image tokens, and computes once per
   image what depends on the image only: see `two_way_transformer`.

2. Upscale tokens, not pixels. A transposed convolution of kernel 2 and stride 2 makes four tokens
   of one, out[2y + i, 2x + j] = W[:, :, i, j]^T in[y, x] + b: linear maps. Nothing is put in the
   order of pixels until the product with the hypernetworks' outputs has left one number a pixel.

3. Compute only the masks that are wanted: the one of mask token 0, or the three of the others. The
   last attention reads for their tokens, and only their hypernetworks run, and their rows of the
   last layer of the IoU head.

Shapes: M prompts, N images, T tokens, L = h w image tokens, C channels, K masks (1 or 3).

Source: `segment_anything/modeling/mask_decoder.py`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from segment_anything.modeling import MaskDecoder
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from samft.models.prompts import DenseEmbedding, PromptEmbeddings
from samft.models.two_way_transformer import Tensors, prepare_two_way, run_two_way


class DecoderImplementation(NamedTuple):
    """One way to compute the decoder, in two functions.

    Attributes:
        prepare: (decoder, image_embeddings [N, C, h, w], image_pe [1, C, h, w], `DenseEmbedding`)
            to tensors [N, ...] of each image, and tensors that all images share.
        decode: (decoder, those of the image of each prompt [M, ...] or of the one image of all
            [1, ...], the shared ones, `PromptEmbeddings`, multimask=...) to mask logits [M, 4h, 4w]
            and predicted IoU [M], of mask token 0; with multimask [M, 3, 4h, 4w] and [M, 3], of the
            other mask tokens.
    """

    prepare: Callable[[MaskDecoder, Tensor, Tensor, DenseEmbedding], tuple[Tensors, Tensors]]
    decode: Callable[..., tuple[Tensor, Tensor]]


def prepare_stock(
    decoder: MaskDecoder,
    image_embeddings: Tensor,
    image_pe: Tensor,
    dense_embedding: DenseEmbedding,
) -> tuple[Tensors, Tensors]:
    """What `decode_stock` needs of each image, and of all; see `DecoderImplementation`."""
    no_mask, mask_matrix = dense_embedding
    return (image_embeddings + no_mask[:, None, None],), (image_pe, mask_matrix)


def decode_stock(
    decoder: MaskDecoder,
    image: Tensors,
    shared: Tensors,
    prompts: PromptEmbeddings,
    *,
    multimask: bool = False,
) -> tuple[Tensor, Tensor]:
    """Decodes with the package's own modules; see `DecoderImplementation`.

    Source: `segment_anything/modeling/mask_decoder.py`, `predict_masks`.
    """
    (source,), (image_pe, mask_matrix) = image, shared
    source = source.expand(len(prompts.sparse), -1, -1, -1)
    if prompts.mask_features is not None:
        weight, bias = mask_matrix[:, :-1, None, None], mask_matrix[:, -1]
        source = source + F.conv2d(prompts.mask_features, weight, bias)
    tokens = _all_tokens(decoder, prompts.sparse)
    queries, keys = decoder.transformer(source, image_pe.expand_as(source), tokens)
    upscaled = decoder.output_upscaling(keys.transpose(1, 2).reshape(source.shape))
    hyper, iou_predicted = _output_heads(decoder, queries, multimask=multimask)
    return _squeeze(torch.einsum("mkc,mchw->mkhw", hyper, upscaled), iou_predicted, multimask)


def _all_tokens(decoder: MaskDecoder, sparse: Tensor) -> Tensor:
    """The IoU token, the four mask tokens and those of each prompt: float [M, 5 + T, C]."""
    output_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    return torch.cat([output_tokens.expand(len(sparse), -1, -1), sparse], 1)


def _wanted_heads(decoder: MaskDecoder, multimask: bool) -> range:
    """The numbers of the masks that are wanted, of stock's four."""
    return range(1, decoder.num_mask_tokens) if multimask else range(1)


def _output_heads(
    decoder: MaskDecoder, queries: Tensor, *, multimask: bool
) -> tuple[Tensor, Tensor]:
    """The hypernetworks' outputs [M, K, C / 8] and the predicted IoU [M, K] of the wanted masks."""
    *hidden, last = decoder.iou_prediction_head.layers
    row = queries[:, 0]
    for layer in hidden:
        row = F.relu(layer(row))
    # A part of the rows of the last layer. The others belong to masks that are not computed;
    # without a gradient (and without weight decay, see `parameter_groups`) they stay as they were.
    heads = _wanted_heads(decoder, multimask)
    rows = slice(heads.start, heads.stop)
    iou_predicted = F.linear(row, last.weight[rows], last.bias[rows])
    networks = decoder.output_hypernetworks_mlps
    return torch.stack([networks[k](queries[:, 1 + k]) for k in heads], 1), iou_predicted


def _squeeze(mask_logits: Tensor, iou_predicted: Tensor, multimask: bool) -> tuple[Tensor, Tensor]:
    """[M, 1, ...] to [M, ...] where one mask is wanted."""
    if multimask:
        return mask_logits, iou_predicted
    return mask_logits.squeeze(1), iou_predicted.squeeze(1)


def prepare_fast(
    decoder: MaskDecoder,
    image_embeddings: Tensor,
    image_pe: Tensor,
    dense_embedding: DenseEmbedding,
) -> tuple[Tensors, Tensors]:
    """What `decode_fast` needs of each image, and of all; see `DecoderImplementation`."""
    return prepare_two_way(decoder.transformer, image_embeddings, image_pe, dense_embedding)


def decode_fast(
    decoder: MaskDecoder,
    image: Tensors,
    shared: Tensors,
    prompts: PromptEmbeddings,
    *,
    multimask: bool = False,
) -> tuple[Tensor, Tensor]:
    """Decodes from what `prepare_fast` returned; see `DecoderImplementation`."""
    tokens = _all_tokens(decoder, prompts.sparse)
    queries, keys = run_two_way(
        decoder.transformer,
        tokens,
        image,
        shared,
        mask_features=prompts.mask_features,
        num_used=1 + _wanted_heads(decoder, multimask).stop,
    )
    hyper, iou_predicted = _output_heads(decoder, queries, multimask=multimask)
    height, width = shared[0].shape[1:3]
    logits = _upscaled_product(decoder.output_upscaling, keys, hyper, grid=(height, width))
    return _squeeze(logits, iou_predicted, multimask)


def _upscaled_product(
    upscaling: nn.Sequential, image: Tensor, hyper: Tensor, *, grid: tuple[int, int]
) -> Tensor:
    """Upscales image tokens by four, and takes their product with K vectors (step 2).

    Args:
        upscaling: `MaskDecoder.output_upscaling`: convolution, norm, GELU, convolution, GELU.
        image: float [M, h * w, C].
        hyper: float [M, K, C / 8].
        grid: h, w.

    Returns:
        float [M, K, 4h, 4w].
    """
    first, norm, activation, second, _ = upscaling
    assert isinstance(first, nn.ConvTranspose2d) and isinstance(second, nn.ConvTranspose2d)
    assert isinstance(norm, LayerNorm2d)
    num, num_masks, (height, width) = len(image), hyper.shape[1], grid
    # [M, L, C] to [M, L, 4 C / 4] to [M, 4 L, C / 4]: in place of each token its four.
    quarters = F.linear(image, *_one_to_four(first)).unflatten(2, (4, -1)).flatten(1, 2)
    # Over the channels of a pixel: with channels last, an ordinary layer norm.
    quarters = F.layer_norm(quarters, (len(norm.weight),), norm.weight, norm.bias, norm.eps)
    pixels = activation(F.linear(activation(quarters), *_one_to_four(second)))
    logits = _PixelProduct.apply(pixels.unflatten(2, (4, -1)).flatten(1, 2), hyper)
    # The first map made (i, j) of (y, x), the second (k, l) of that: pixel
    # (4y + 2i + k, 4x + 2j + l) is at [y, x, i, j, k, l, mask].
    logits = logits.view(num, height, width, 2, 2, 2, 2, num_masks).permute(0, 7, 1, 3, 5, 2, 4, 6)
    return logits.reshape(num, num_masks, 4 * height, 4 * width)


class _PixelProduct(torch.autograd.Function):
    """pixels @ hyper^T, of pixels [M, P, C] and K vectors [M, K, C].

    By hand because both of autograd's products for its gradient are thin, K = 1 deep or wide, and a
    CPU takes as long for them as for all else of the upscaling's last layer.
    """

    @staticmethod
    def forward(ctx: Any, pixels: Tensor, hyper: Tensor) -> Tensor:
        hyper = hyper.to(pixels.dtype)  # half precision, under autocast
        ctx.save_for_backward(pixels, hyper)
        return pixels @ hyper.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        pixels, hyper = ctx.saved_tensors
        of_pixels = gradient * hyper if hyper.shape[1] == 1 else gradient @ hyper
        return of_pixels, gradient.transpose(1, 2) @ pixels


def _one_to_four(convolution: nn.ConvTranspose2d) -> tuple[Tensor, Tensor]:
    """The linear map from a token to its four, row by row: [4 C', C] and [4 C']."""
    weight = convolution.weight.permute(2, 3, 1, 0).flatten(0, 2)  # [C, C', i, j] to [i j C', C]
    assert convolution.bias is not None
    return weight, convolution.bias.repeat(4)


FAST = DecoderImplementation(prepare_fast, decode_fast)
STOCK = DecoderImplementation(prepare_stock, decode_stock)


def choose_decoder(kind: str) -> DecoderImplementation:
    """The implementation that was asked for.

    Args:
        kind: `fast` or `stock`.

    Raises:
        ValueError: There is no such kind.
    """
    implementations = {"fast": FAST, "stock": STOCK}
    if kind not in implementations:
        raise ValueError(f"decoder is {kind!r}; it can be 'fast' or 'stock'.")
    return implementations[kind]
