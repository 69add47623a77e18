"""SAM's two-way transformer between prompt tokens and image tokens, with the numbers of the stock.

The function and the parameters are those of `TwoWayTransformer`; only the order of additions
differs. Two steps make it cheap:

1. Project the few, not the many. Stock projects L image tokens (4096 at 1024 px) of C = 256
   channels to keys, values and queries of I = C / 2 channels, to compare them with T prompt tokens
   (7 with a box). Inner products do not care on which side a matrix stands, so the prompt tokens
   absorb it. For each head, with d = I / H channels, matrices W [d, C] and biases b [d], an image
   token x_l at a position p_l:

   Tokens attend to the image (token t has the query q_t, scaled by 1 / sqrt(d)):

       score_tl  = q_t . (W_k (x_l + p_l) + b_k)  =  (W_k^T q_t) . x_l  +  q_t . (W_k p_l + b_k)
       output_t  = sum_l a_tl (W_v x_l + b_v)     =  W_v (sum_l a_tl x_l) + b_v,  as sum_l a_tl = 1

   The image attends to the tokens (key k_t, scaled; value v_t; output matrix W_o [C, d]):

       score_tl  = (W_q (x_l + p_l) + b_q) . k_t  =  (W_q^T k_t) . x_l  +  k_t . (W_q p_l + b_q)
       output_l  = sum over heads and t of  a_tl W_o v_t,  plus b_o

   W p_l + b is the same for all prompts of all images and computed once. A product with all image
   tokens then takes L C (H T) multiplications instead of L C I: 56 against 128 a value. With many
   tokens (see `MOST_TO_ABSORB`) it would take more, and stock's layers run.

2. Compute once per image what depends on the image only. In the first layer, image tokens of a
   prompt are those of its image, with what SAM adds where there is no mask: y_l, which is projected
   to d dimensions once. A mask adds few channels more, x_l = y_l + U m_l, with U [C, F + 1] the
   same for all prompts and the mask's features m_l (`DenseEmbedding`), so each sum gets a small
   term more:

       score_tl  = (W_k (y_l + p_l) + b_k) . q_t  +  m_l . (U^T W_k^T q_t)
       output_t  = sum_l a_tl (W_v y_l + b_v)     +  W_v U (sum_l a_tl m_l)

   and so the other way round, where output_l also has the residual's U m_l.

Shapes: M prompts, N images, H heads, T tokens, d = I / H, L = h w image tokens, C channels, F
features of masks.

Source: `segment_anything/modeling/transformer.py`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from segment_anything.modeling import TwoWayTransformer
from segment_anything.modeling.transformer import Attention, TwoWayAttentionBlock
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from samft.models.prompts import DenseEmbedding

Tensors = tuple[Tensor, ...]

# H T / I up to which prompt tokens absorb projections: 16 tokens with vit_tiny, 32 with vit_b.
# Measured on a CPU, where forward and backward of both ways take as long there. By multiplications
# alone it would be 1, but stock also has more to write and to read.
MOST_TO_ABSORB = 2


def prepare_two_way(
    transformer: TwoWayTransformer,
    image_embeddings: Tensor,
    image_pe: Tensor,
    dense_embedding: DenseEmbedding,
) -> tuple[Tensors, Tensors]:
    """What `run_two_way` needs of each image, and of all.

    Args:
        transformer: The stock module, whose parameters are used.
        image_embeddings: float [N, C, h, w].
        image_pe: float [1, C, h, w].
        dense_embedding: With what prompts add to image embeddings.

    Returns:
        Of each image, with the embedding of no mask: tokens [N, L, C]; keys, values and queries of
        the first layer, each [N, H, d, L]. Shared: positions [1, h, w, C]; `mask_matrix`; of each
        later layer keys and queries of the positions, and the last attention's keys, each
        [H, d, L].
    """
    first, *later = transformer.layers
    no_mask, mask_matrix = dense_embedding
    image = (image_embeddings + no_mask[:, None, None]).flatten(2)  # [N, C, L]: tokens are columns
    positions = image_pe.flatten(2).to(image.dtype)
    # Step 2: in the first layer, W (x_l + p_l) + b is computed as it stands, once per image.
    projected = _project_image(first, image, positions)
    # Step 1: of later layers, where x_l differs from prompt to prompt, only W p_l + b.
    shared = [positions.transpose(1, 2).unflatten(1, image_pe.shape[2:]), mask_matrix]
    for layer in later:
        to_image, to_token = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
        shared += [_project_columns(positions, to_image.k_proj, to_image)[0]]
        shared += [_project_columns(positions, to_token.q_proj, to_token)[0]]
    last = transformer.final_attn_token_to_image
    shared += [_project_columns(positions, last.k_proj, last)[0]]
    return (image.transpose(1, 2).contiguous(), *projected), tuple(shared)


def run_two_way(
    transformer: TwoWayTransformer,
    tokens: Tensor,
    image: Tensors,
    shared: Tensors,
    *,
    mask_features: Tensor | None,
    num_used: int,
) -> tuple[Tensor, Tensor]:
    """`TwoWayTransformer.forward`, with its names: `queries` are tokens, `keys` image tokens.

    Args:
        transformer: The stock module, whose parameters are used.
        tokens: float [M, T, C]; also added to queries as their "positions", as in stock.
        image: Of the image of each prompt, see `prepare_two_way`.
        shared: See `prepare_two_way`.
        mask_features: float [M, F, h, w], see `DenseEmbedding`; None where prompts have no masks.
        num_used: How many of the tokens, from the first on, are wanted.

    Returns:
        The tokens that are used, float [M, num_used, C], and the image tokens, float [M, L, C].
    """
    positions, mask_matrix, *position_terms, last_term = shared
    masks = None
    if mask_features is not None:
        masks = _Masks.of(mask_features, mask_matrix)
        # Of the only image, too: no prompt has the image tokens of another.
        image = tuple(tensor.expand(len(tokens), *tensor.shape[1:]) for tensor in image)
    if _is_absorbing_cheaper(transformer, tokens):
        queries, keys = _run_layers(transformer, tokens, image, position_terms, masks=masks)
    else:
        keys = image[0] if masks is None else masks.add_to(image[0])
        queries, positions = tokens, positions.flatten(1, 2)
        for layer in transformer.layers:
            queries, keys = layer(queries, keys, query_pe=tokens, key_pe=positions)

    # The last attention mixes no tokens with each other: those that are not used can go before it.
    queries, tokens = queries[:, :num_used], tokens[:, :num_used]
    last = transformer.final_attn_token_to_image
    attended = _token_to_image_absorbed(last, queries + tokens, keys, last_term)
    return transformer.norm_final_attn(queries + attended), keys


class _Masks(NamedTuple):
    """What the masks of M prompts add to their image tokens: U m_l (step 2).

    Attributes:
        features: float [M, F + 1, L], m_l, of which the last is one.
        matrix: float [C, F + 1], U.
    """

    features: Tensor
    matrix: Tensor

    @classmethod
    def of(cls, mask_features: Tensor, mask_matrix: Tensor) -> "_Masks":
        """Of `run_two_way`'s arguments."""
        return cls(F.pad(mask_features.flatten(2), (0, 0, 0, 1), value=1.0), mask_matrix)

    def add_to(self, image: Tensor) -> Tensor:
        """Image tokens y_l, [M, L, C], to x_l."""
        return image + self.features.transpose(1, 2) @ self.matrix.T

    def scores(self, heads: Tensor, linear: nn.Linear) -> Tensor:
        """m_l . (U^T W^T q_t), of a projection W: heads [M, H, T, d] to [M, H, T, L]."""
        absorbed = torch.einsum("mhtd,hdf->mhtf", heads, self._project(linear, heads.shape[1]))
        return (absorbed.flatten(1, 2) @ self.features).unflatten(1, heads.shape[1:3])

    def means(self, weights: Tensor, linear: nn.Linear) -> Tensor:
        """W U (sum_l a_tl m_l), of a projection W: weights [M, H, T, L] to [M, H, T, d]."""
        means = weights.flatten(1, 2) @ self.features.transpose(1, 2)
        by_head = means.unflatten(1, weights.shape[1:3])
        return torch.einsum("mhtf,hdf->mhtd", by_head, self._project(linear, weights.shape[1]))

    def _project(self, linear: nn.Linear, num_heads: int) -> Tensor:
        """W U by heads, [H, d, F + 1]."""
        return (linear.weight @ self.matrix).unflatten(0, (num_heads, -1))


def _is_absorbing_cheaper(transformer: TwoWayTransformer, tokens: Tensor) -> bool:
    attention = transformer.final_attn_token_to_image
    return attention.num_heads * tokens.shape[1] <= MOST_TO_ABSORB * attention.internal_dim


def _run_layers(
    transformer: TwoWayTransformer,
    tokens: Tensor,
    image: Tensors,
    position_terms: Sequence[Tensor],
    *,
    masks: _Masks | None,
) -> tuple[Tensor, Tensor]:
    """All layers, with projections that the prompt tokens absorb."""
    first, *later = transformer.layers
    terms = zip(position_terms[::2], position_terms[1::2], strict=True)
    # Stock's first layer has `skip_first_layer_pe`: no positions, and no residual either.
    queries = first.norm1(first.self_attn(tokens, tokens, tokens))
    queries, keys = _attend_to_images(first, queries, tokens, image, masks=masks)

    # From here on image tokens are those of a prompt, not of an image: project the prompt tokens.
    for layer in later:
        with_positions = queries + tokens
        attended = layer.self_attn(with_positions, with_positions, queries)
        queries = layer.norm1(queries + attended)
        queries, keys = _attend_both_ways(layer, queries, tokens, keys, next(terms))
    return queries, keys


def _project_image(layer: TwoWayAttentionBlock, image: Tensor, positions: Tensor) -> Tensors:
    """Keys, values and queries of image tokens, each [N, H, d, L]."""
    # As in stock, keys and queries have positions in them, values have not.
    with_positions = image + positions
    to_image, to_token = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
    return (
        _project_columns(with_positions, to_image.k_proj, to_image),
        _project_columns(image, to_image.v_proj, to_image),
        _project_columns(with_positions, to_token.q_proj, to_token),
    )


def _attend_to_images(
    layer: TwoWayAttentionBlock,
    queries: Tensor,
    tokens: Tensor,
    image: Tensors,
    *,
    masks: _Masks | None,
) -> tuple[Tensor, Tensor]:
    """The rest of a layer after its self-attention, with image tokens that are projected."""
    image_tokens, *keys_and_values, image_queries = image
    to_image, to_token = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
    attended = _token_to_image_projected(to_image, queries + tokens, *keys_and_values, masks=masks)
    queries = _update_tokens(layer, queries, attended)
    keys = _image_to_token_projected(
        to_token, queries + tokens, queries, image=image_tokens, queries=image_queries, masks=masks
    )
    return queries, layer.norm4(keys)


def _attend_both_ways(
    layer: TwoWayAttentionBlock,
    queries: Tensor,
    tokens: Tensor,
    keys: Tensor,
    position_terms: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """The rest of a layer after its self-attention, with the image tokens of each prompt."""
    of_keys, of_queries = position_terms
    to_image, to_token = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
    attended = _token_to_image_absorbed(to_image, queries + tokens, keys, of_keys)
    queries = _update_tokens(layer, queries, attended)
    keys = _image_to_token_absorbed(
        to_token, queries + tokens, queries, image=keys, positions=of_queries
    )
    return queries, layer.norm4(keys)


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
    attention: Attention, tokens: Tensor, keys: Tensor, values: Tensor, *, masks: _Masks | None
) -> Tensor:
    """Tokens attend to image tokens that are projected.

    Args:
        attention: From tokens to image.
        tokens: float [M, T, C], with positions.
        keys: float [M, H, d, L], or [1, H, d, L].
        values: As the keys.
        masks: Of the prompts, if they have any.

    Returns:
        float [M, T, C].
    """
    rows = _join_boxes(tokens, keys)
    heads = _scaled_heads(rows, attention.q_proj, attention)
    scores = heads @ keys
    if masks is not None:
        scores = scores + masks.scores(heads, attention.k_proj)
    weights = scores.softmax(-1).to(values.dtype)
    attended = weights @ values.transpose(2, 3)
    if masks is not None:
        attended = attended + masks.means(weights, attention.v_proj)
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
    attention: Attention,
    tokens: Tensor,
    values: Tensor,
    *,
    image: Tensor,
    queries: Tensor,
    masks: _Masks | None,
) -> Tensor:
    """Image tokens attend to tokens, from projected queries; with the residual.

    Args:
        attention: From image to tokens.
        tokens: float [M, T, C], with positions.
        values: float [M, T, C], the tokens without positions.
        image: float [M, L, C], or [1, L, C], what the result is added to.
        queries: float [M, H, d, L], or [1, H, d, L], those of the image tokens.
        masks: Of the prompts, if they have any.

    Returns:
        float [M, L, C].
    """
    rows = _join_boxes(tokens, queries)
    heads = _scaled_heads(rows, attention.k_proj, attention)
    scores = heads @ queries
    by_box = scores.unflatten(2, (-1, tokens.shape[1])).transpose(1, 2).flatten(0, 1)
    if masks is not None:
        by_box = by_box + masks.scores(heads, attention.q_proj)
    weights = by_box.softmax(2).flatten(1, 2)  # over the tokens of each head
    outputs = _project_values(attention, values)
    if masks is not None:  # the residual's part of them, by the same product
        weights = torch.cat([weights, masks.features], 1)
        outputs = torch.cat([outputs, masks.matrix.T.expand(len(outputs), -1, -1)], 1)
    return _add_product(image, weights.transpose(1, 2), outputs)


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
