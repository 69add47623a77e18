"""The image encoder's attention without an N x N tensor, same numbers as the stock module.

SAM adds to the attention logits of a query i and a key j a term for the distance between their
rows and one for that between their columns (decomposed relative positions, MViTv2):

    logit[i, j] = s q_i . k_j  +  q_i . R_h[row(i) - row(j)]  +  q_i . R_w[col(i) - col(j)],

with s = 1/sqrt(d), N = H W tokens, and learned tables R_h, R_w of 2H - 1 and 2W - 1 rows. The stock
module builds all N x N logits to add these. But the second term depends on j only through row(j):
it is one of H numbers of the query, u_i[r] = q_i . R_h[row(i) - r], picked by the row of the key,
and picking is a product with a unit vector: u_i . e_row(j). Likewise w_i[c] = q_i . R_w[col(i) - c]
and e_col(j). So the sum is one inner product of extended vectors of d + H + W components,

    logit[i, j] = (s q_i, u_i, w_i) . (k_j, e_row(j), e_col(j)),

exactly (s stands before the whole product, with u_i / s and w_i / s in it), and plain
`scaled_dot_product_attention` without a mask serves it: its fused kernels keep no logits, neither
forward nor backward, and the gradients of R_h and R_w come through those of u_i and w_i. The fused
kernels want queries, keys and values of one width, a multiple of 8, so all three are filled up with
zeros, which add nothing to any product. (Flash kernels of GPUs go up to a width of 256: 1536 px
with 64 channels a head, 1408 px with the 80 of vit_h. Beyond, PyTorch takes another of its
kernels.)

A CPU pays for each component: at 1024 px, 144 a head of vit_tiny in the place of 16. Where no
gradient is wanted, its fused kernel also takes u_i[row(j)] + w_i[col(j)] as a mask, and of a row or
so of queries at a time the mask is small enough to stay in the cache. So that is what attention
over the whole map does there; in windows, where positions are few, it gains nothing.

In window blocks the stock module pads the normalised tokens with zeros to whole windows, and takes
the padding along through the projections. The padding is part of the softmax: its keys and values
are those of a zero token, which is the bias of the projection. Here the bias itself stands in for
them, and both projections see real tokens only. At 16 x 16 tokens and windows of 14 that leaves 256
of 784 tokens.

Source: `segment_anything/modeling/image_encoder.py`; relative positions from Li et al., "MViTv2",
arXiv:2112.01526, section 4.1.

Activations of the image encoder made again in backward instead of kept: time for memory.

A block keeps some twenty tensors of its input's size for backward. `blocks` keeps its input only,
and runs it once more when its gradient is asked for: one more forward pass, a third of the time of
a step. Then n blocks keep n tensors. `full` keeps the inputs of groups of about sqrt(n) blocks: a
group is run again to have the inputs of its blocks, and each of these to have its activations, so
there are about 2 sqrt(n) tensors at a time, for one more forward pass still.

Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Attention, Block
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# What the rows of q, k and v must be a multiple of for the fused kernels of every device.
_WIDTH_MULTIPLE = 8
# What a mask of positions may hold: it is read while it is still in a CPU's cache.
_MASK_VALUES = 2**17


class FastBlock(Block):
    """The stock transformer block with `attention` in it: same parameters, keys and numbers.

    It also keeps less of its MLP for the backward pass, which is the most that a block holds once
    the attention logits are gone.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Attention and MLP, each with a residual; [B, H, W, C] to the same shape."""
        x = x + attention(self.attn, self.norm1(x), self.window_size)
        hidden = self.mlp.lin1(self.norm2(x))
        if not hidden.requires_grad:
            return x + self._project(hidden)
        # Keeps `hidden` only: the activation, as large, is made again in the backward pass, for a
        # fraction of the time of `lin2`, which is not (the repetition stops where it has enough).
        return x + checkpoint(self._project, hidden, use_reentrant=False, preserve_rng_state=False)

    def _project(self, hidden: Tensor) -> Tensor:
        return self.mlp.lin2(self.mlp.act(hidden))


def use_fast_attention(encoder: ImageEncoderViT) -> None:
    """Makes every block of an image encoder compute its attention as this module does, in place.

    Only the class of the blocks changes: parameters, state dict, copies and pickles stay.

    Args:
        encoder: A stock image encoder.

    Raises:
        ValueError: A block has no relative positions, or no bias in its qkv projection.
    """
    for block in encoder.blocks:
        if not block.attn.use_rel_pos or block.attn.qkv.bias is None:
            raise ValueError(
                "fast attention is for image encoders as SAM builds them: with relative positions "
                "and a bias in qkv."
            )
        block.__class__ = FastBlock


def attention(attn: Attention, x: Tensor, window_size: int) -> Tensor:
    """Multi-head attention with relative positions, inside of windows or over the whole map.

    Args:
        attn: The stock module, whose parameters are used as they are.
        x: float [B, H, W, C], normalised tokens.
        window_size: Side of the square windows in tokens; 0 for attention over the whole map.

    Returns:
        float [B, H, W, C].
    """
    height, width = x.shape[1:3]
    window = (window_size, window_size) if window_size else (height, width)
    q, k, v = _windows(attn, x, window)
    vectors = _by_position(attn.rel_pos_h, window[0]), _by_position(attn.rel_pos_w, window[1])
    if not window_size and _mask_pays(q, vectors):
        y = _attend_by_rows(*(t[:, 0, 0] for t in (q, k, v)), vectors=vectors, scale=attn.scale)
        return attn.proj(y.permute(0, 2, 3, 1, 4).flatten(3))
    # Divided by s, which the kernel multiplies all by: one product less of the size of q.
    vectors = vectors[0] / attn.scale, vectors[1] / attn.scale
    k, v = _extended_keys(k, v)

    # Where most of a map is padding, queries are made of its tokens only, which takes one call for
    # each shape of their part of a window. Otherwise those calls cost more than they save.
    apart = q.shape[1] * q.shape[2] * window[0] * window[1] > 2 * height * width
    bands = []
    for rows, h in _spans(height, window[0], apart=apart):
        pieces = []
        for columns, w in _spans(width, window[1], apart=apart):
            queries, keys = q[:, rows, columns, :, :h, :w], k[:, rows, columns]
            values = v[:, rows, columns]
            y = _attend(queries, keys, values, vectors=vectors, scale=attn.scale)
            pieces.append(y.permute(0, 1, 4, 2, 5, 3, 6).flatten(5).flatten(3, 4).flatten(1, 2))
        bands.append(torch.cat(pieces, dim=2))
    return attn.proj(torch.cat(bands, dim=1)[:, :height, :width].contiguous())


def _spans(size: int, side: int, *, apart: bool) -> list[tuple[slice, int]]:
    """Windows along one side of a map, and how many of their queries there matter.

    With `apart`, whole windows first and then the one that sticks out, where there are such.
    """
    num_whole, rest = divmod(size, side)
    if not apart or not rest:
        return [(slice(None), side)]
    spans = [(slice(0, num_whole), side), (slice(num_whole, None), rest)]
    return spans if num_whole else spans[1:]


def _windows(attn: Attention, x: Tensor, window: tuple[int, int]) -> tuple[Tensor, ...]:
    """q, k and v of tokens [B, H, W, C]: each [B, rows, columns, heads, h, w, d] of windows."""
    qkv = attn.qkv(x)
    for dim, side in ((2, window[1]), (1, window[0])):
        missing = -qkv.shape[dim] % side
        if missing:
            shape = [*qkv.shape]
            shape[dim] = missing
            qkv = torch.cat([qkv, attn.qkv.bias.to(qkv.dtype).expand(shape)], dim)
    qkv = qkv.unflatten(3, (3, attn.num_heads, -1))
    qkv = qkv.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))
    return qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).unbind(0)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, *, vectors: tuple[Tensor, Tensor], scale: float
) -> Tensor:
    """softmax(logits) v over the tokens of each window; see the top for the logits.

    Args:
        q: float [B, rows, columns, heads, h', w', d]: the queries of the first h' rows and w'
            columns of each window.
        k: float [B, rows, columns, heads, h w, d + h + w, and zeros].
        v: As `k`.
        vectors: R_h / s and R_w / s, see `_by_position`.
        scale: s, the factor of q . k.

    Returns:
        As `q`.
    """
    y = F.scaled_dot_product_attention(
        _extended(q, *_to_positions(q, vectors)).flatten(0, 2),
        k.flatten(0, 2),
        v.flatten(0, 2),
        scale=scale,
    )
    return y[..., : q.shape[-1]].reshape(q.shape)


def _mask_pays(q: Tensor, vectors: tuple[Tensor, Tensor]) -> bool:
    """Whether positions are better a mask than components more; see the top."""
    has_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, *vectors))
    height, width, num_channels = q.shape[-3:]
    return q.device.type == "cpu" and not has_gradient and height + width > num_channels


def _attend_by_rows(
    q: Tensor, k: Tensor, v: Tensor, *, vectors: tuple[Tensor, Tensor], scale: float
) -> Tensor:
    """As `_attend` over a whole map, with positions as the mask of a few rows of queries at a time.

    Args:
        q: float [B, heads, H, W, d].
        k: float [B, heads, H, W, d].
        v: float [B, heads, H, W, d].
        vectors: R_h and R_w, see `_by_position`.
        scale: s, the factor of q . k.

    Returns:
        float [B, heads, H, W, d].
    """
    keys, values = k.flatten(2, 3), v.flatten(2, 3)
    rows_at_once = max(_MASK_VALUES // (math.prod(keys.shape[:3]) * q.shape[3]), 1)
    parts = (x.split(rows_at_once, 2) for x in (q, *_to_positions(q, vectors)))
    done = []
    for queries, to_rows, to_columns in zip(*parts, strict=True):
        mask = to_rows[..., :, None] + to_columns[..., None, :]
        y = F.scaled_dot_product_attention(
            queries.flatten(2, 3),
            keys,
            values,
            attn_mask=mask.flatten(4).flatten(2, 3),
            scale=scale,
        )
        done.append(y)
    return torch.cat(done, 2).reshape(q.shape)


def _to_positions(q: Tensor, vectors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The u and w of queries [..., h', w', d]: [..., h', w', h] and [..., h', w', w]."""
    # With the rows in front, both products are batches of matrices that need no other copy.
    q_by_row = q.movedim(-3, 0).contiguous()
    to_rows = torch.einsum("h...wd,hdr->h...wr", q_by_row, vectors[0][: q.shape[-3]])
    to_columns = torch.einsum("h...wd,wdc->h...wc", q_by_row, vectors[1][: q.shape[-2]])
    return to_rows.movedim(0, -3), to_columns.movedim(0, -3)


def _extended_keys(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys with the unit vectors of their row and column, values with as many zeros."""
    height, width = k.shape[-3:-1]
    rows = torch.eye(height, dtype=k.dtype, device=k.device)[:, None].expand(-1, width, -1)
    columns = torch.eye(width, dtype=k.dtype, device=k.device).expand(height, -1, -1)
    zeros = v.new_zeros(height + width)
    return _extended(k, rows, columns), _extended(v, zeros)


def _extended(x: Tensor, *more: Tensor) -> Tensor:
    """[..., h, w, d] with more components, then zeros, as [..., h w, d + ...]."""
    num_components = x.shape[-1] + sum(part.shape[-1] for part in more)
    zeros = x.new_zeros(-num_components % _WIDTH_MULTIPLE)
    parts = [part.expand(*x.shape[:-1], -1) for part in (*more, zeros)]
    return torch.cat([x, *parts], -1).flatten(-3, -2)


def _by_position(table: Tensor, size: int) -> Tensor:
    """Vectors of distances as those of pairs of positions: [., d] -> [size, d, size], query first.

    The distance i - j has row i - j + size - 1 of the table, so from the table upside down, the
    vectors for one i are `size` rows in a piece: sliding windows, and no table of indices. A table
    made for another size is resampled, as the stock module does.
    """
    if table.shape[0] != 2 * size - 1:
        table = F.interpolate(table.T[None], size=2 * size - 1, mode="linear")[0].T
    return table.flip(0).unfold(0, size, 1).flip(0)


# Nothing in the encoder is random, so there is no state of a generator to be kept.
_again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


class CheckpointedEncoder(ImageEncoderViT):
    """The stock encoder, its blocks run again in backward; same parameters, keys and numbers."""

    group_size: int

    def forward(self, x: Tensor) -> Tensor:
        """Float [N, 3, S, S] to [N, C, S/16, S/16]."""
        x = self.patch_embed(x)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        blocks = list(self.blocks)
        for start in range(0, len(blocks), self.group_size):
            group = blocks[start : start + self.group_size]
            x = _again(_each_again, group, x) if len(group) > 1 else _each_again(group, x)
        return self.neck(x.permute(0, 3, 1, 2))


def _each_again(blocks: Sequence[nn.Module], x: Tensor) -> Tensor:
    for block in blocks:
        x = _again(block, x)
    return x


def checkpoint_activations(encoder: ImageEncoderViT, how: str) -> None:
    """Makes an image encoder keep less for backward, in place.

    Only the class of the encoder changes: parameters, state dict, copies and pickles stay.

    Args:
        encoder: A stock image encoder, whatever its attention.
        how: `none`, `blocks` or `full`, see the top.
    """
    if how == "none":
        return
    encoder.__class__ = CheckpointedEncoder
    encoder.group_size = 1 if how == "blocks" else round(math.sqrt(len(encoder.blocks)))
