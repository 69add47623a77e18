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
"""

from typing import Any

import torch
from segment_anything.modeling.transformer import Attention
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


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
