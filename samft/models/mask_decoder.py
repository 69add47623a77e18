"""SAM's mask decoder for all boxes of all images in one call, with the numbers of the stock module.

`STOCK` runs the package's own modules; `FAST` computes the same function of the same parameters,
exactly but for the order of additions. Four steps make it cheap:

1. Project the few, not the many. The two-way transformer projects L image tokens (4096 at 1024 px)
   of C = 256 channels to keys, values and queries of I = C / 2 channels, to compare them with T = 7
   prompt tokens. Inner products do not care on which side a matrix stands, so the prompt tokens
   absorb it. For each head, with d = I / H channels, matrices W [d, C] and biases b [d], an image
   token x_l at a position p_l:

   Tokens attend to the image (token t has the query q_t, scaled by 1 / sqrt(d)):

       score_tl  = q_t . (W_k (x_l + p_l) + b_k)  =  (W_k^T q_t) . x_l  +  q_t . (W_k p_l + b_k)
       output_t  = sum_l a_tl (W_v x_l + b_v)     =  W_v (sum_l a_tl x_l) + b_v,  as sum_l a_tl = 1

   The image attends to the tokens (key k_t, scaled; value v_t; output matrix W_o [C, d]):

       score_tl  = (W_q (x_l + p_l) + b_q) . k_t  =  (W_q^T k_t) . x_l  +  k_t . (W_q p_l + b_q)
       output_l  = sum over heads and t of  a_tl W_o v_t,  plus b_o

   W p_l + b is the same for all boxes of all images and computed once. A product with all image
   tokens then takes L C (H T) multiplications instead of L C I: 56 against 128 a value.

2. Compute once per image what depends on the image only. In the first layer x_l is the same for all
   boxes of an image: it is projected once, and its boxes compare in d dimensions, cheaper still.

3. Upscale tokens, not pixels. A transposed convolution of kernel 2 and stride 2 makes four tokens
   of one, out[2y + i, 2x + j] = W[:, :, i, j]^T in[y, x] + b: linear maps. Nothing is put in the
   order of pixels until the product with the hypernetwork's output has left one number a pixel.

4. Compute only the mask that box prompts use, of mask token 0: the last attention reads for two
   tokens, and one of four hypernetworks runs, and one row of the last layer of the IoU head.

Shapes: M boxes, N images, H heads, T tokens, d = I / H, L = h w image tokens, C channels.

Source: `segment_anything/modeling/mask_decoder.py` and `transformer.py`.
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

Tensors = tuple[Tensor, ...]
USED_TOKENS = 2  # of the 7: the IoU token and mask token 0 come first


class DecoderImplementation(NamedTuple):
    """One way to compute the decoder, in two functions.

    Attributes:
        prepare: (decoder, image_embeddings [N, C, h, w], image_pe [1, C, h, w], dense_embedding
            [1, C, 1, 1]) to tensors [N, ...] of each image, and tensors that all images share.
        decode: (decoder, those of the image of each box [M, ...] or of the one image of all boxes
            [1, ...], the shared ones, sparse embeddings [M, 2, C]) to mask logits [M, 4h, 4w] and
            predicted IoU [M].
    """

    prepare: Callable[[MaskDecoder, Tensor, Tensor, Tensor], tuple[Tensors, Tensors]]
    decode: Callable[[MaskDecoder, Tensors, Tensors, Tensor], tuple[Tensor, Tensor]]


def prepare_stock(
    decoder: MaskDecoder, image_embeddings: Tensor, image_pe: Tensor, dense_embedding: Tensor
) -> tuple[Tensors, Tensors]:
    """What `decode_stock` needs of each image, and of all; see `DecoderImplementation`."""
    return (image_embeddings + dense_embedding,), (image_pe,)


def decode_stock(
    decoder: MaskDecoder, image: Tensors, shared: Tensors, sparse_embeddings: Tensor
) -> tuple[Tensor, Tensor]:
    """Decodes with the package's own modules; see `DecoderImplementation`.

    Source: `segment_anything/modeling/mask_decoder.py`, `predict_masks`.
    """
    (source,), (image_pe,) = image, shared
    source = source.expand(len(sparse_embeddings), -1, -1, -1)
    tokens = _prompt_tokens(decoder, sparse_embeddings)
    queries, keys = decoder.transformer(source, image_pe.expand_as(source), tokens)
    upscaled = decoder.output_upscaling(keys.transpose(1, 2).reshape(source.shape))
    hyper, iou_predicted = _output_heads(decoder, queries)
    return torch.einsum("mc,mchw->mhw", hyper, upscaled), iou_predicted


def _prompt_tokens(decoder: MaskDecoder, sparse_embeddings: Tensor) -> Tensor:
    """The IoU token, the four mask tokens and the prompt of each box: float [M, 5 + 2, C]."""
    output_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    return torch.cat([output_tokens.expand(len(sparse_embeddings), -1, -1), sparse_embeddings], 1)


def _output_heads(decoder: MaskDecoder, queries: Tensor) -> tuple[Tensor, Tensor]:
    """The hypernetwork's output [M, C / 8] and the predicted IoU [M], of mask token 0."""
    *hidden, last = decoder.iou_prediction_head.layers
    row = queries[:, 0]
    for layer in hidden:
        row = F.relu(layer(row))
    # One row of the last layer. The others belong to masks that are not computed; without a
    # gradient (and without weight decay, see `parameter_groups`) they stay as they were.
    iou_predicted = F.linear(row, last.weight[:1], last.bias[:1])[:, 0]
    return decoder.output_hypernetworks_mlps[0](queries[:, 1]), iou_predicted


def prepare_fast(
    decoder: MaskDecoder, image_embeddings: Tensor, image_pe: Tensor, dense_embedding: Tensor
) -> tuple[Tensors, Tensors]:
    """What `decode_fast` needs of each image, and of all; see `DecoderImplementation`.

    Returns:
        Of each image: tokens [N, L, C]; keys, values and queries of the first layer, each
        [N, H, d, L]. Shared: of each later layer keys and queries of the positions, and the last
        attention's keys, each [H, d, L].
    """
    image = (image_embeddings + dense_embedding).flatten(2)  # [N, C, L]: tokens are columns
    positions = image_pe.flatten(2).to(image.dtype)
    with_positions = image + positions
    first, *later = decoder.transformer.layers
    # Step 2: in the first layer, W (x_l + p_l) + b is computed as it stands, once per image. As in
    # stock, keys and queries have positions in them, values have not.
    to_image, to_token = first.cross_attn_token_to_image, first.cross_attn_image_to_token
    projected = (
        _project_columns(with_positions, to_image.k_proj, to_image),
        _project_columns(image, to_image.v_proj, to_image),
        _project_columns(with_positions, to_token.q_proj, to_token),
    )
    # Step 1: of later layers, where x_l differs from box to box, only W p_l + b.
    shared = []
    for layer in later:
        to_image, to_token = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
        shared += [_project_columns(positions, to_image.k_proj, to_image)[0]]
        shared += [_project_columns(positions, to_token.q_proj, to_token)[0]]
    last = decoder.transformer.final_attn_token_to_image
    shared += [_project_columns(positions, last.k_proj, last)[0]]
    return (image.transpose(1, 2).contiguous(), *projected), tuple(shared)


def decode_fast(
    decoder: MaskDecoder, image: Tensors, shared: Tensors, sparse_embeddings: Tensor
) -> tuple[Tensor, Tensor]:
    """Decodes from what `prepare_fast` returned; see `DecoderImplementation`."""
    tokens = _prompt_tokens(decoder, sparse_embeddings)
    queries, keys = _two_way_transformer(decoder.transformer, tokens, image, shared)
    hyper, iou_predicted = _output_heads(decoder, queries)
    return _upscaled_product(decoder.output_upscaling, keys, hyper), iou_predicted


def _two_way_transformer(
    transformer: TwoWayTransformer, tokens: Tensor, image: Tensors, shared: Tensors
) -> tuple[Tensor, Tensor]:
    """`TwoWayTransformer.forward`, with its names: `queries` are tokens, `keys` image tokens.

    Args:
        transformer: The stock module, whose parameters are used.
        tokens: float [M, T, C]; also added to queries as their "positions", as in stock.
        image: Of the image of each box, see `prepare_fast`.
        shared: See `prepare_fast`.

    Returns:
        The tokens that are used, float [M, 2, C], and the image tokens, float [M, L, C].
    """
    keys, image_keys, image_values, image_queries = image
    first, *later = transformer.layers
    to_image, to_token = first.cross_attn_token_to_image, first.cross_attn_image_to_token
    # Stock's first layer has `skip_first_layer_pe`: no positions, and no residual either.
    queries = first.norm1(first.self_attn(tokens, tokens, tokens))
    attended = _token_to_image_projected(to_image, queries + tokens, image_keys, image_values)
    queries = _update_tokens(first, queries, attended)
    keys = _image_to_token_projected(
        to_token, queries + tokens, queries, image=keys, queries=image_queries
    )
    keys = first.norm4(keys)

    # From here on image tokens are those of a box, not of an image: project the prompt tokens.
    position_terms = iter(shared)
    for layer in later:
        to_image, to_token = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
        with_positions = queries + tokens
        attended = layer.self_attn(with_positions, with_positions, queries)
        queries = layer.norm1(queries + attended)
        attended = _token_to_image_absorbed(to_image, queries + tokens, keys, next(position_terms))
        queries = _update_tokens(layer, queries, attended)
        keys = _image_to_token_absorbed(
            to_token, queries + tokens, queries, image=keys, positions=next(position_terms)
        )
        keys = layer.norm4(keys)

    # The last attention mixes no tokens with each other: those that are not used can go before it.
    queries, tokens = queries[:, :USED_TOKENS], tokens[:, :USED_TOKENS]
    last = transformer.final_attn_token_to_image
    attended = _token_to_image_absorbed(last, queries + tokens, keys, next(position_terms))
    return transformer.norm_final_attn(queries + attended), keys


def _update_tokens(layer: TwoWayAttentionBlock, queries: Tensor, attended: Tensor) -> Tensor:
    queries = layer.norm2(queries + attended)
    return layer.norm3(queries + layer.mlp(queries))


def _split_heads(rows: Tensor, attention: Attention) -> Tensor:
    """[M, T, I] to [M, H, T, d]."""
    return rows.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)


def _project_columns(columns: Tensor, linear: nn.Linear, attention: Attention) -> Tensor:
    """Projects image tokens that are columns [N, C, L], and splits the heads: [N, H, d, L]."""
    weight, bias = linear.weight.expand(len(columns), -1, -1), linear.bias[:, None]
    projected = torch.baddbmm(bias, weight, columns)
    return projected.unflatten(1, (attention.num_heads, -1))


def _scaled_heads(tokens: Tensor, linear: nn.Linear, attention: Attention) -> Tensor:
    """The tokens' side of the scores, q_t or k_t: [M, H, T, d], scaled by 1 / sqrt(d)."""
    projected = _split_heads(linear(tokens), attention)
    # Stock divides the scores, [M, H, T, L]; here the factor is on the side of the few.
    return projected * projected.shape[-1] ** -0.5


def _join_boxes(tokens: Tensor, image: Tensor) -> Tensor:
    """[M, T, C] to [1, M T, C] where `image` has one row: read once, not copied for each box."""
    return tokens.flatten(0, 1)[None] if len(image) == 1 else tokens


def _token_to_image_projected(
    attention: Attention, tokens: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Tokens attend to image tokens that are projected.

    Args:
        attention: From tokens to image.
        tokens: float [M, T, C], with positions.
        keys: float [M, H, d, L], or [1, H, d, L].
        values: As the keys.

    Returns:
        float [M, T, C].
    """
    rows = _join_boxes(tokens, keys)
    weights = (_scaled_heads(rows, attention.q_proj, attention) @ keys).softmax(-1)
    attended = weights.to(values.dtype) @ values.transpose(2, 3)
    return attention.out_proj(attended.transpose(1, 2).flatten(2)).reshape(tokens.shape)


def _token_to_image_absorbed(
    attention: Attention, tokens: Tensor, image: Tensor, positions: Tensor
) -> Tensor:
    """Tokens attend to image tokens that are not projected (step 1).

    Args:
        attention: From tokens to image.
        tokens: float [M, T, C], with positions.
        image: float [M, L, C], without positions.
        positions: float [H, d, L], W_k p_l + b_k.

    Returns:
        float [M, T, C].
    """
    heads = _scaled_heads(tokens, attention.q_proj, attention)
    absorbed, offsets = _absorb_projection(heads, attention.k_proj, positions)
    mean = _TokenToImage.apply(image, absorbed, offsets)  # sum_l a_tl x_l, [M, H T, C]
    mean = mean.unflatten(1, heads.shape[1:3])
    # W_v of each head only now, on T means instead of L image tokens; weights sum to 1, hence b_v.
    matrices = attention.v_proj.weight.unflatten(0, (attention.num_heads, -1))
    attended = torch.einsum("mhtc,hdc->mthd", mean, matrices).flatten(2) + attention.v_proj.bias
    return attention.out_proj(attended)


def _image_to_token_projected(
    attention: Attention, tokens: Tensor, values: Tensor, *, image: Tensor, queries: Tensor
) -> Tensor:
    """Image tokens attend to tokens, from projected queries; with the residual.

    Args:
        attention: From image to tokens.
        tokens: float [M, T, C], with positions.
        values: float [M, T, C], the tokens without positions.
        image: float [M, L, C], or [1, L, C], what the result is added to.
        queries: float [M, H, d, L], or [1, H, d, L], those of the image tokens.

    Returns:
        float [M, L, C].
    """
    rows = _join_boxes(tokens, queries)
    scores = _scaled_heads(rows, attention.k_proj, attention) @ queries
    by_box = scores.unflatten(2, (-1, tokens.shape[1])).transpose(1, 2).flatten(0, 1)
    weights = by_box.softmax(2).flatten(1, 2)  # over the tokens of each head
    return _add_product(image, weights.transpose(1, 2), _project_values(attention, values))


def _image_to_token_absorbed(
    attention: Attention, tokens: Tensor, values: Tensor, *, image: Tensor, positions: Tensor
) -> Tensor:
    """As `_image_to_token_projected`, from queries of positions only: W_q p_l + b_q, [H, d, L]."""
    heads = _scaled_heads(tokens, attention.k_proj, attention)
    absorbed, offsets = _absorb_projection(heads, attention.q_proj, positions)
    outputs = _project_values(attention, values)
    return _ImageToToken.apply(image, absorbed, offsets, outputs, attention.num_heads)


def _absorb_projection(
    heads: Tensor, linear: nn.Linear, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """The two terms of a score: W^T q_t, float [M, H T, C], and q_t . (W p_l + b), [M, H T, L].

    q_t . b_k is the same for all l and has no effect on a softmax over l. It is kept all the same:
    so b_k has the gradient that it has in stock, zero but for rounding.
    """
    matrices = linear.weight.unflatten(0, (heads.shape[1], -1))
    absorbed = torch.einsum("mhtd,hdc->mhtc", heads, matrices)
    return absorbed.flatten(1, 2), torch.einsum("mhtd,hdl->mhtl", heads, positions).flatten(1, 2)


def _project_values(attention: Attention, tokens: Tensor) -> Tensor:
    """W_o v_t of each head, with b_o in the first head's: float [M, H T, C]."""
    num_heads = attention.num_heads
    values = _split_heads(attention.v_proj(tokens), attention)
    matrices = attention.out_proj.weight.unflatten(1, (num_heads, -1))
    outputs = torch.einsum("mhtd,chd->mhtc", values, matrices)
    # The weights of a head sum to 1: added to all values of one head, b_o comes out exactly once.
    first_head = torch.arange(num_heads, device=outputs.device) == 0
    return (outputs + first_head[:, None, None] * attention.out_proj.bias).flatten(1, 2)


def _add_product(image: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Adds left @ right to the image, which keeps its precision where the product is in half."""
    autocast = torch.is_autocast_enabled(image.device.type)
    if left.dtype == right.dtype == image.dtype and not autocast:
        return torch.baddbmm(image, left, right)
    return image + left.to(right.dtype) @ right


class _TokenToImage(torch.autograd.Function):
    """softmax(absorbed @ image^T + offsets) @ image.

    Written by hand because the image occurs twice: autograd would add up two gradients of its size,
    [M, L, C], from two products. With weights A, scores S, result R and dR its gradient,

        dA = dR image^T,  dS = softmax_backward(dA),
        d image = dS^T absorbed + A^T dR = [dS; A]^T [absorbed; dR]

    is a single product of stacked matrices, 2 H T deep.
    """

    @staticmethod
    def forward(ctx: Any, image: Tensor, absorbed: Tensor, offsets: Tensor) -> Tensor:
        image = image.to(absorbed.dtype)  # half precision, under autocast
        scores = torch.baddbmm(offsets.to(absorbed.dtype), absorbed, image.transpose(1, 2))
        weights = scores.softmax(-1, dtype=_at_least_float32(scores)).to(absorbed.dtype)
        ctx.save_for_backward(image, absorbed, weights)
        return weights @ image

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        image, absorbed, weights = ctx.saved_tensors
        d_scores = _softmax_backward(gradient @ image.transpose(1, 2), weights, dim=-1)
        left, right = torch.cat([d_scores, weights], 1), torch.cat([absorbed, gradient], 1)
        return left.transpose(1, 2) @ right, d_scores @ image, d_scores


class _ImageToToken(torch.autograd.Function):
    """image + A^T @ outputs, with A the softmax over each head's tokens of the scores.

    The scores are absorbed @ image^T + offsets. By hand because the image occurs twice, in scores
    and residual: the second gradient is added by the matrix product that computes the first. For a
    gradient G: dA = outputs G^T, d outputs = A G, d image = G + dS^T absorbed.
    """

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, absorbed: Tensor, offsets: Tensor, outputs: Tensor, heads: int
    ) -> Tensor:
        half, ctx.heads = image.to(absorbed.dtype), heads  # half precision, under autocast
        scores = torch.baddbmm(offsets.to(absorbed.dtype), absorbed, half.transpose(1, 2))
        by_head = scores.unflatten(1, (heads, -1)).softmax(2, dtype=_at_least_float32(scores))
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


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    """The type that a softmax is computed in: float32 for halves, too."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _softmax_backward(gradient: Tensor, weights: Tensor, *, dim: int) -> Tensor:
    """The gradient of scores, for A = softmax(S): dS = A (dA - sum A dA)."""
    products = gradient.to(_at_least_float32(gradient)) * weights  # A dA
    # In place, so `products` ends as dS: A dA - A sum(A dA).
    d_scores = products.addcmul_(products.sum(dim, keepdim=True), weights, value=-1)
    return d_scores.to(weights.dtype)


def _upscaled_product(upscaling: nn.Sequential, image: Tensor, hyper: Tensor) -> Tensor:
    """Upscales image tokens by four, and takes their product with a vector (step 3).

    Args:
        upscaling: `MaskDecoder.output_upscaling`: convolution, norm, GELU, convolution, GELU.
        image: float [M, h * w, C], in rows of a square.
        hyper: float [M, C / 8].

    Returns:
        float [M, 4h, 4w].
    """
    first, norm, activation, second, _ = upscaling  # the last GELU is part of `_GeluProduct`
    assert isinstance(first, nn.ConvTranspose2d) and isinstance(second, nn.ConvTranspose2d)
    assert isinstance(norm, LayerNorm2d)
    num, side = len(image), round(image.shape[1] ** 0.5)
    # [M, L, C] to [M, L, 4 C / 4] to [M, 4 L, C / 4]: in place of each token its four.
    quarters = F.linear(image, *_one_to_four(first)).unflatten(2, (4, -1)).flatten(1, 2)
    # Over the channels of a pixel: with channels last, an ordinary layer norm.
    quarters = F.layer_norm(quarters, (len(norm.weight),), norm.weight, norm.bias, norm.eps)
    logits = _GeluProduct.apply(activation(quarters), *_one_to_four(second), hyper)  # [M, 4, 4 L]
    # The first map made (i, j) of (y, x), the second (k, l) of that: pixel
    # (4y + 2i + k, 4x + 2j + l) is at [k, l, y, x, i, j].
    logits = logits.view(num, 2, 2, side, side, 2, 2).permute(0, 3, 5, 1, 4, 6, 2)
    return logits.reshape(num, 4 * side, 4 * side)


def _one_to_four(convolution: nn.ConvTranspose2d) -> tuple[Tensor, Tensor]:
    """The linear map from a token to its four, row by row: [4 C', C] and [4 C']."""
    weight = convolution.weight.permute(2, 3, 1, 0).flatten(0, 2)  # [C, C', i, j] to [i j C', C]
    assert convolution.bias is not None
    return weight, convolution.bias.repeat(4)


class _GeluProduct(torch.autograd.Function):
    """gelu(W x + b), four vectors for a token x, and the inner product of each with a vector h.

    Channels come before tokens, so that all but the matrix products run along thousands of tokens.
    Written by hand because autograd would lay out the gradient of x with channels first, and what
    comes before would have to copy it. Shapes: x [M, L, K], W [4 C, K], b [4 C], h [M, C]; the
    result [M, 4, L].
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, hyper: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias, hyper = (t.to(dtype) for t in (x, weight, bias, hyper))
        weights = weight.expand(len(x), -1, -1)
        inner = torch.baddbmm(bias[:, None], weights, x.transpose(1, 2)).unflatten(1, (4, -1))
        activated = F.gelu(inner)  # [M, 4, C, L]
        ctx.save_for_backward(x, weight, hyper, inner, activated)
        return (hyper[:, None, None] @ activated)[:, :, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, hyper, inner, activated = ctx.saved_tensors
        d_hyper = (activated @ gradient[..., None]).sum(1)[..., 0]
        d_activated = hyper[:, None, :, None] * gradient[:, :, None, :]  # an outer product
        d_inner = torch.ops.aten.gelu_backward(d_activated, inner).flatten(1, 2)
        d_weight, d_bias = (d_inner @ x).sum(0), d_inner.sum((0, 2))
        # As a batch: times a single matrix, the transposed would be copied into rows first.
        d_x = d_inner.transpose(1, 2).bmm(weight.expand(len(x), -1, -1))
        return d_x, d_weight, d_bias, d_hyper


FAST = DecoderImplementation(prepare_fast, decode_fast)
STOCK = DecoderImplementation(prepare_stock, decode_stock)


def choose_decoder(
    decoder: MaskDecoder, kind: str, *, num_tokens: int = 7
) -> DecoderImplementation:
    """The implementation that was asked for; `fast` only where it is faster.

    Args:
        decoder: The stock module, whose parameters are used.
        kind: `fast` or `stock`.
        num_tokens: Prompt tokens of a box, output tokens included.

    Raises:
        ValueError: There is no such kind.
    """
    if kind not in ("fast", "stock"):
        raise ValueError(f"decoder is {kind!r}; it can be 'fast' or 'stock'.")
    attention = decoder.transformer.final_attn_token_to_image
    # H T < I, see the top: absorbed, a product is H T deep, projected, I.
    absorbed_is_cheaper = attention.num_heads * num_tokens < attention.internal_dim
    return FAST if kind == "fast" and absorbed_is_cheaper else STOCK
