"""Attention between a few prompt tokens and thousands of image tokens, projecting only the few.

The two-way transformer projects image tokens x_l (L = 4096 of them at 1024 px, C = 256 wide) to
keys, values and queries of width I = C / 2, for the sake of T = 7 prompt tokens. Dot products do
not care on which side the matrix stands, so it is moved to the few. For each head, with d = I /
heads, matrices W of shape [d, C] and biases b of shape [d]:

Tokens read the image (token t, its query q_t, scaled by 1 / sqrt(d); image position p_l):

    score_tl  = q_t . (W_k (x_l + p_l) + b_k)  =  (W_k^T q_t) . x_l  +  q_t . (W_k p_l + b_k)
    result_t  = sum_l a_tl (W_v x_l + b_v)     =  W_v (sum_l a_tl x_l) + b_v,  as sum_l a_tl = 1

The image reads the tokens (key k_t, scaled; value v_t; output matrix W_o of shape [C, d]):

    score_tl  = (W_q (x_l + p_l) + b_q) . k_t  =  (W_q^T k_t) . x_l  +  k_t . (W_q p_l + b_q)
    result_l  = sum over heads and t of  a_tl W_o v_t,  plus b_o

What depends on positions only, W p_l + b, is the same for all boxes of all images: it is computed
once. (q_t . b_k is the same for all l and drops out of the softmax; it is carried all the same, so
that b_k has the gradient that it has in stock: zero, but for rounding.) Exact up to the order of
additions.

Operations on image tokens fall from L C I to L C (heads x T) a product: it pays where heads x T is
below I (56 against 128). In the first layer x_l is the same for all boxes of an image, and there
it is cheaper still to project once per image, and compare in d dimensions.

Shapes: M boxes, H heads, T tokens, d = I / H, L image tokens, C channels.

Source: `segment_anything/modeling/transformer.py`, `Attention`.

SAM's mask decoder for all boxes of all images in one call, same numbers as the stock module.

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
from segment_anything.modeling.transformer import Attention, TwoWayAttentionBlock
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def pays(attention: Attention, num_tokens: int) -> bool:
    """Whether it is cheaper to move the projections of an attention to the tokens."""
    return attention.num_heads * num_tokens < attention.internal_dim


def split_heads(rows: Tensor, attention: Attention) -> Tensor:
    """[M, T, I] to [M, H, T, d]."""
    return rows.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)


def project_columns(columns: Tensor, linear: nn.Linear, attention: Attention) -> Tensor:
    """Projects image tokens that lie in columns, and splits the heads.

    Args:
        columns: float [N, C, L].
        linear: One of the attention's input projections.
        attention: Says how many heads there are.

    Returns:
        float [N, H, d, L].
    """
    weight, bias = linear.weight.expand(len(columns), -1, -1), linear.bias[:, None]
    projected = torch.baddbmm(bias, weight, columns)
    return projected.unflatten(1, (attention.num_heads, -1))


def scaled_heads(tokens: Tensor, linear: nn.Linear, attention: Attention) -> Tensor:
    """The tokens' side of the scores: projected, split into heads [M, H, T, d], over sqrt(d)."""
    projected = split_heads(linear(tokens), attention)
    return projected * projected.shape[-1] ** -0.5


def read_projected(attention: Attention, tokens: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """What the tokens read off image tokens that are projected.

    Args:
        attention: From tokens to image.
        tokens: float [M, T, C], with positions.
        keys: float [M, H, d, L].
        values: float [M, H, d, L].

    Returns:
        float [M, T, C].
    """
    weights = (scaled_heads(tokens, attention.q_proj, attention) @ keys).softmax(-1)
    read = weights.to(values.dtype) @ values.transpose(2, 3)
    return attention.out_proj(read.transpose(1, 2).flatten(2))


def read_absorbed(attention: Attention, tokens: Tensor, image: Tensor, positions: Tensor) -> Tensor:
    """What the tokens read off image tokens that are not projected.

    Args:
        attention: From tokens to image.
        tokens: float [M, T, C], with positions.
        image: float [M, L, C], without positions.
        positions: float [H, d, L], the positions' keys, bias included.

    Returns:
        float [M, T, C].
    """
    heads = scaled_heads(tokens, attention.q_proj, attention)
    absorbed, offsets = _absorb(heads, attention.k_proj, positions)
    mean = _Read.apply(image, absorbed, offsets).unflatten(1, heads.shape[1:3])
    matrices = attention.v_proj.weight.unflatten(0, (attention.num_heads, -1))
    read = torch.einsum("mhtc,hdc->mthd", mean, matrices).flatten(2) + attention.v_proj.bias
    return attention.out_proj(read)


def write_projected(
    attention: Attention, tokens: Tensor, values: Tensor, *, image: Tensor, queries: Tensor
) -> Tensor:
    """The image tokens, and added to them what they read off the prompt tokens.

    Args:
        attention: From image to tokens.
        tokens: float [M, T, C], with positions.
        values: float [M, T, C], the tokens without positions.
        image: float [M, L, C].
        queries: float [M, H, d, L], those of the image tokens.

    Returns:
        float [M, L, C].
    """
    scores = scaled_heads(tokens, attention.k_proj, attention) @ queries
    weights = scores.softmax(2).flatten(1, 2)
    return _add_product(image, weights.transpose(1, 2), _outputs(attention, values))


def write_absorbed(
    attention: Attention, tokens: Tensor, values: Tensor, *, image: Tensor, positions: Tensor
) -> Tensor:
    """As `write_projected`, with queries of positions only: float [H, d, L], bias included."""
    heads = scaled_heads(tokens, attention.k_proj, attention)
    absorbed, offsets = _absorb(heads, attention.q_proj, positions)
    outputs = _outputs(attention, values)
    return _Write.apply(image, absorbed, offsets, outputs, attention.num_heads)


def _absorb(heads: Tensor, linear: nn.Linear, positions: Tensor) -> tuple[Tensor, Tensor]:
    """W^T times the tokens' side [M, H T, C]; the positions' share of the scores [M, H T, L]."""
    matrices = linear.weight.unflatten(0, (heads.shape[1], -1))
    absorbed = torch.einsum("mhtd,hdc->mhtc", heads, matrices)
    return absorbed.flatten(1, 2), torch.einsum("mhtd,hdl->mhtl", heads, positions).flatten(1, 2)


def _outputs(attention: Attention, tokens: Tensor) -> Tensor:
    """The tokens' values through each head's part of the output matrix: [M, H T, C]."""
    num_heads = attention.num_heads
    values = split_heads(attention.v_proj(tokens), attention)
    matrices = attention.out_proj.weight.unflatten(1, (num_heads, -1))
    outputs = torch.einsum("mhtd,chd->mhtc", values, matrices)
    # The weights of a head add up to one: given to every value of one head, b_o comes out once.
    first_head = torch.arange(num_heads, device=outputs.device) == 0
    return (outputs + first_head[:, None, None] * attention.out_proj.bias).flatten(1, 2)


def _add_product(image: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Adds left @ right to the image, which keeps its precision where the product is a half."""
    autocast = torch.is_autocast_enabled(image.device.type)
    if left.dtype == right.dtype == image.dtype and not autocast:
        return torch.baddbmm(image, left, right)
    return image + left.to(right.dtype) @ right


class _Read(torch.autograd.Function):
    """softmax(absorbed @ image^T + offsets) @ image; the image's gradient is a single product.

    With weights A, scores S and result R: dA = dR image^T, dS by the softmax, and
    d image = dS^T absorbed + A^T dR = [dS; A]^T [absorbed; dR].
    """

    @staticmethod
    def forward(ctx: Any, image: Tensor, absorbed: Tensor, offsets: Tensor) -> Tensor:
        image = image.to(absorbed.dtype)  # half precision, under autocast
        scores = torch.baddbmm(offsets.to(absorbed.dtype), absorbed, image.transpose(1, 2))
        weights = scores.softmax(-1, dtype=_wide(scores)).to(absorbed.dtype)
        ctx.save_for_backward(image, absorbed, weights)
        return weights @ image

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        image, absorbed, weights = ctx.saved_tensors
        d_scores = _softmax_backward(gradient @ image.transpose(1, 2), weights, dim=-1)
        left, right = torch.cat([d_scores, weights], 1), torch.cat([absorbed, gradient], 1)
        return left.transpose(1, 2) @ right, d_scores @ image, d_scores


class _Write(torch.autograd.Function):
    """image + A^T @ outputs, A the softmax over tokens of absorbed @ image^T + offsets.

    For a gradient G: dA = outputs G^T, d outputs = A G, and d image = G + dS^T absorbed.
    """

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, absorbed: Tensor, offsets: Tensor, outputs: Tensor, heads: int
    ) -> Tensor:
        half, ctx.heads = image.to(absorbed.dtype), heads
        scores = torch.baddbmm(offsets.to(absorbed.dtype), absorbed, half.transpose(1, 2))
        by_head = scores.unflatten(1, (heads, -1)).softmax(2, dtype=_wide(scores))
        weights = by_head.flatten(1, 2).to(absorbed.dtype)
        outputs = outputs.to(absorbed.dtype)
        ctx.save_for_backward(half, absorbed, weights, outputs)
        return _add_product(image, weights.transpose(1, 2), outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        image, absorbed, weights, outputs = ctx.saved_tensors
        half, by_head = gradient.to(image.dtype), (ctx.heads, -1)
        d_weights = (outputs @ half.transpose(1, 2)).unflatten(1, by_head)
        d_scores = _softmax_backward(d_weights, weights.unflatten(1, by_head), dim=2).flatten(1, 2)
        d_image = _add_product(gradient, d_scores.transpose(1, 2), absorbed)
        return d_image, d_scores @ image, d_scores, weights @ half, None


def _wide(scores: Tensor) -> torch.dtype:
    """float32 for halves: what a softmax is taken in."""
    return torch.promote_types(scores.dtype, torch.float32)


def _softmax_backward(gradient: Tensor, weights: Tensor, *, dim: int) -> Tensor:
    """The gradient of scores, for A = softmax(S): dS = A (dA - sum A dA)."""
    products = gradient.to(_wide(gradient)) * weights
    found = products.addcmul_(products.sum(dim, keepdim=True), weights, value=-1)
    return found.to(weights.dtype)


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
