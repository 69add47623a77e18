"""SAM's mask decoder for all boxes of all images in one call, same numbers as the stock module.

Three things make it cheap, none of them an approximation:

- Image tokens are not projected where prompt tokens can be (`cross_attention` derives it).
- What depends on the image alone is computed once per image and shared by its boxes: the tokens
  themselves, and their keys, values and queries in the first layer.
- A transposed convolution of kernel 2 and stride 2 makes of each token four, each a linear map of
  the one: out[2y + i, 2x + j] = W[:, :, i, j]^T in[y, x] + b. So upscaling is a matter of tokens,
  the norm over channels is a layer norm, and the product with the hypernetwork's output leaves one
  number per token. Only these numbers are put in the order of pixels.

Of the four masks, only the one that box prompts use (token 0) is computed: the last attention
reads for two tokens, one hypernetwork runs, and one row of the last layer of the IoU head.

`Decoder` has two forms, `fast` and `stock`, the second made of the package's own modules.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from segment_anything.modeling import MaskDecoder, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.transformer import TwoWayAttentionBlock
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from samft.models.cross_attention import (
    pays,
    project_columns,
    read_absorbed,
    read_projected,
    write_absorbed,
    write_projected,
)

Tensors = tuple[Tensor, ...]
USED_TOKENS = 2  # of the tokens, the first is the IoU's and the second the mask's


class Decoder(NamedTuple):
    """One way to decode, in two parts.

    Attributes:
        prepare: (decoder, image_embeddings [N, C, h, w], image_pe [1, C, h, w], dense_embedding
            [1, C, 1, 1]) to tensors [N, ...] of each image, and tensors that all share.
        decode: (decoder, those of the image of each box [M, ...], the shared ones, sparse
            embeddings [M, 2, C]) to mask logits [M, 4h, 4w] and predicted IoU [M].
    """

    prepare: Callable[[MaskDecoder, Tensor, Tensor, Tensor], tuple[Tensors, Tensors]]
    decode: Callable[[MaskDecoder, Tensors, Tensors, Tensor], tuple[Tensor, Tensor]]


def prompt_tokens(decoder: MaskDecoder, sparse_embeddings: Tensor) -> Tensor:
    """The IoU token, the mask tokens and the prompt of each box: float [M, 5 + 2, C]."""
    output_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    return torch.cat([output_tokens.expand(len(sparse_embeddings), -1, -1), sparse_embeddings], 1)


def prepare_stock(
    decoder: MaskDecoder, image_embeddings: Tensor, image_pe: Tensor, dense_embedding: Tensor
) -> tuple[Tensors, Tensors]:
    """What `decode_stock` needs of each image, and of all; see `Decoder`."""
    return (image_embeddings + dense_embedding,), (image_pe,)


def decode_stock(
    decoder: MaskDecoder, image: Tensors, shared: Tensors, sparse_embeddings: Tensor
) -> tuple[Tensor, Tensor]:
    """Decodes with the package's own modules; see `Decoder`.

    Source: `segment_anything/modeling/mask_decoder.py`, `predict_masks`.
    """
    (source,), (image_pe,) = image, shared
    tokens = prompt_tokens(decoder, sparse_embeddings)
    queries, keys = decoder.transformer(source, image_pe.expand_as(source), tokens)
    upscaled = decoder.output_upscaling(keys.transpose(1, 2).reshape(source.shape))
    hyper, iou_predicted = _heads(decoder, queries)
    return torch.einsum("mc,mchw->mhw", hyper, upscaled), iou_predicted


def _heads(decoder: MaskDecoder, queries: Tensor) -> tuple[Tensor, Tensor]:
    """The hypernetwork's output [M, C / 8] and the predicted IoU [M], of mask token 0."""
    *hidden, last = decoder.iou_prediction_head.layers
    row = queries[:, 0]
    for layer in hidden:
        row = F.relu(layer(row))
    iou_predicted = F.linear(row, last.weight[:1], last.bias[:1])[:, 0]
    return decoder.output_hypernetworks_mlps[0](queries[:, 1]), iou_predicted


def prepare_fast(
    decoder: MaskDecoder, image_embeddings: Tensor, image_pe: Tensor, dense_embedding: Tensor
) -> tuple[Tensors, Tensors]:
    """What `decode_fast` needs of each image, and of all; see `Decoder`.

    Returns:
        Of each image: tokens [N, L, C]; keys, values and queries of the first layer, each
        [N, H, d, L]. Shared: of each later layer keys and queries of the positions, and the last
        attention's keys, each [H, d, L].
    """
    image = (image_embeddings + dense_embedding).flatten(2)
    positions = image_pe.flatten(2).to(image.dtype)
    with_positions = image + positions
    first, *later = decoder.transformer.layers
    read, write = first.cross_attn_token_to_image, first.cross_attn_image_to_token
    projected = (
        project_columns(with_positions, read.k_proj, read),
        project_columns(image, read.v_proj, read),
        project_columns(with_positions, write.q_proj, write),
    )
    shared = []
    for layer in later:
        read, write = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
        shared += [project_columns(positions, read.k_proj, read)[0]]
        shared += [project_columns(positions, write.q_proj, write)[0]]
    last = decoder.transformer.final_attn_token_to_image
    shared += [project_columns(positions, last.k_proj, last)[0]]
    return (image.transpose(1, 2).contiguous(), *projected), tuple(shared)


def decode_fast(
    decoder: MaskDecoder, image: Tensors, shared: Tensors, sparse_embeddings: Tensor
) -> tuple[Tensor, Tensor]:
    """Decodes from what `prepare_fast` made; see `Decoder`."""
    tokens = prompt_tokens(decoder, sparse_embeddings)
    queries, keys = _two_way(decoder.transformer, tokens, image, shared)
    hyper, iou_predicted = _heads(decoder, queries)
    return upscaled_mask(decoder.output_upscaling, keys, hyper), iou_predicted


def _two_way(
    transformer: TwoWayTransformer, tokens: Tensor, image: Tensors, shared: Tensors
) -> tuple[Tensor, Tensor]:
    """`TwoWayTransformer.forward`: the tokens that are used [M, 2, C], image tokens [M, L, C]."""
    keys, image_keys, image_values, image_queries = image
    first, *later = transformer.layers
    read, write = first.cross_attn_token_to_image, first.cross_attn_image_to_token
    queries = first.norm1(first.self_attn(tokens, tokens, tokens))
    found = read_projected(read, queries + tokens, image_keys, image_values)
    queries = _update(first, queries, found)
    keys = write_projected(write, queries + tokens, queries, image=keys, queries=image_queries)
    keys = first.norm4(keys)

    positions = iter(shared)
    for layer in later:
        read, write = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
        with_positions = queries + tokens
        attended = layer.self_attn(with_positions, with_positions, queries)
        queries = layer.norm1(queries + attended)
        found = read_absorbed(read, queries + tokens, keys, next(positions))
        queries = _update(layer, queries, found)
        where = next(positions)
        keys = write_absorbed(write, queries + tokens, queries, image=keys, positions=where)
        keys = layer.norm4(keys)

    queries, tokens = queries[:, :USED_TOKENS], tokens[:, :USED_TOKENS]
    last = transformer.final_attn_token_to_image
    found = read_absorbed(last, queries + tokens, keys, next(positions))
    return transformer.norm_final_attn(queries + found), keys


def _update(layer: TwoWayAttentionBlock, queries: Tensor, read: Tensor) -> Tensor:
    queries = layer.norm2(queries + read)
    return layer.norm3(queries + layer.mlp(queries))


def upscaled_mask(upscaling: nn.Sequential, image: Tensor, hyper: Tensor) -> Tensor:
    """Upscales image tokens by four, and takes their product with a vector.

    Args:
        upscaling: `MaskDecoder.output_upscaling`.
        image: float [M, h * w, C], in rows of a square.
        hyper: float [M, C / 8].

    Returns:
        float [M, 4h, 4w].
    """
    first, norm, activation, second, _ = upscaling
    assert isinstance(first, nn.ConvTranspose2d) and isinstance(second, nn.ConvTranspose2d)
    assert isinstance(norm, LayerNorm2d)
    num, side = len(image), round(image.shape[1] ** 0.5)
    quarters = F.linear(image, *_four_of_one(first)).unflatten(2, (4, -1)).flatten(1, 2)
    quarters = F.layer_norm(quarters, (len(norm.weight),), norm.weight, norm.bias, norm.eps)
    logits = _LastProduct.apply(activation(quarters), *_four_of_one(second), hyper)
    # Pixel (4y + 2i + k, 4x + 2j + l) stands at [k, l, y, x, i, j].
    logits = logits.view(num, 2, 2, side, side, 2, 2).permute(0, 3, 5, 1, 4, 6, 2)
    return logits.reshape(num, 4 * side, 4 * side)


class _LastProduct(torch.autograd.Function):
    """gelu(W x + b), four vectors to a token x, and the product of each with a vector h.

    Channels come before tokens, so that all but the matrix products run along thousands of tokens;
    autograd would lay the gradient of x out the wrong way round for what comes before.
    Shapes: x [M, L, K], W [4 C, K], b [4 C], h [M, C]; the result [M, 4, L].
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, hyper: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias, hyper = (t.to(dtype) for t in (x, weight, bias, hyper))
        weights = weight.expand(len(x), -1, -1)
        inner = torch.baddbmm(bias[:, None], weights, x.transpose(1, 2)).unflatten(1, (4, -1))
        activated = F.gelu(inner)
        ctx.save_for_backward(x, weight, hyper, inner, activated)
        return (hyper[:, None, None] @ activated)[:, :, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, hyper, inner, activated = ctx.saved_tensors
        d_hyper = (activated @ gradient[..., None]).sum(1)[..., 0]
        outer = hyper[:, None, :, None] * gradient[:, :, None, :]
        d_inner = torch.ops.aten.gelu_backward(outer, inner).flatten(1, 2)
        d_weight, d_bias = (d_inner @ x).sum(0), d_inner.sum((0, 2))
        # As a batch: times a single matrix, the transposed would be copied into rows first.
        d_x = d_inner.transpose(1, 2).bmm(weight.expand(len(x), -1, -1))
        return d_x, d_weight, d_bias, d_hyper


def _four_of_one(convolution: nn.ConvTranspose2d) -> tuple[Tensor, Tensor]:
    """The linear map from a token to its four, row by row: [4 C', C] and [4 C']."""
    weight = convolution.weight.permute(2, 3, 1, 0).flatten(0, 2)
    assert convolution.bias is not None
    return weight, convolution.bias.repeat(4)


FAST, STOCK = Decoder(prepare_fast, decode_fast), Decoder(prepare_stock, decode_stock)


def choose_decoder(decoder: MaskDecoder, kind: str, *, num_tokens: int = 7) -> Decoder:
    """The way to decode that was asked for; `fast` only where it pays.

    Args:
        decoder: The stock module, whose parameters are used as they are.
        kind: `fast` or `stock`.
        num_tokens: Prompt tokens of a box, output tokens included.

    Raises:
        ValueError: There is no such kind.
    """
    if kind not in ("fast", "stock"):
        raise ValueError(f"decoder is {kind!r}; it can be 'fast' or 'stock'.")
    attention = decoder.transformer.final_attn_token_to_image
    return FAST if kind == "fast" and pays(attention, num_tokens) else STOCK
