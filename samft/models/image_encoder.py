"""SAM's image encoder in less memory and time, with the numbers and keys of the stock module.

Attention without an N x N tensor
---------------------------------
SAM adds to the attention logits of a query i and a key j a term for the distance between their
rows and one for that between their columns (decomposed relative positions, MViTv2):

    logit[i, j] = s q_i . k_j  +  q_i . R_h[row(i) - row(j)]  +  q_i . R_w[col(i) - col(j)]

with s = 1 / sqrt(d), N = H W tokens, and learned tables R_h, R_w of 2H - 1 and 2W - 1 rows. The
stock module builds all N x N logits in order to add these terms. But the second term depends on j
only through row(j): it is one of H numbers of the query, u_i[r] = q_i . R_h[row(i) - r], selected
by the row of the key. Selecting is an inner product with a unit vector: u_i . e_row(j). Likewise
w_i[c] = q_i . R_w[col(i) - c] and e_col(j). So the sum is one inner product of extended vectors of
d + H + W components,

    logit[i, j] = s (q_i, u_i / s, w_i / s) . (k_j, e_row(j), e_col(j))

exactly, and plain `scaled_dot_product_attention` without a mask computes it. Its fused kernels keep
no logits, neither forward nor backward, and R_h and R_w get their gradients through u_i and w_i.

Padding
-------
In window blocks the stock module pads the normalised tokens with zeros to whole windows, and
projects the padding, too. The padding takes part in the softmax, with the keys and values of a zero
token, and these are the bias of the projection. Here the bias itself is put in their place, and
both projections see real tokens only: 256 of 784 at 16 x 16 tokens and windows of 14.

Rectangles
----------
An image that is the top left part of the square that the positions are for, H x W tokens of S x S,
has its absolute positions there, and only the distances up to H - 1 and W - 1: the middle of the
tables, which stock would stretch. So tokens meet as in the square, but for the padding.

Activation checkpointing
------------------------
A block keeps some twenty tensors of its input's size for backward. `blocks` keeps its input only
and runs the block again in backward: one more forward pass, a third of the time of a step, and n
blocks keep n tensors. `full` keeps the inputs of groups of about sqrt(n) blocks; a group runs again
for the inputs of its blocks, and then each block for its activations: about 2 sqrt(n) tensors at a
time, for yet another forward pass.

Source: `segment_anything/modeling/image_encoder.py`; relative positions from Li et al., "MViTv2",
arXiv:2112.01526, section 4.1; checkpointing from Chen et al., "Training Deep Nets with Sublinear
Memory Cost", arXiv:1604.06174.
"""

import math
import os
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Attention, Block
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# The width of q, k and v must be a multiple of this for the fused kernels of every device. (Flash
# kernels of GPUs go up to a width of 256: 1536 px with 64 channels a head, 1408 px with the 80 of
# vit_h. Beyond that PyTorch takes another of its kernels.)
_WIDTH_MULTIPLE = 8
# The one pair of unequal widths above 128 that cuDNN has kernels for, and the GPUs where PyTorch
# tries cuDNN first. Source: `check_cudnn_tensor_shapes` and `check_prefer_cudnn_attention` in
# PyTorch's `aten/src/ATen/native/transformers/cuda/sdp_utils.cpp`, 2.10 to 2.13.
_CUDNN_WIDTHS = (192, 128)  # of keys, of values
_CUDNN_FIRST = frozenset({(9, 0), (10, 0), (10, 3)})
_CUDNN_FIRST_VERSION = 91501
_CUDNN_LAST = os.environ.get("TORCH_CUDNN_SDPA_DEPRIORITIZED") == "1"
# Elements of an attention mask that a CPU still has in its cache when the kernel reads it.
_MASK_VALUES = 2**17

TensorPair = tuple[Tensor, Tensor]  # for rows (or heights), and for columns (or widths)

# Nothing in the encoder is random, so there is no generator state to restore in backward.
_checkpoint = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


class PositionVectors(NamedTuple):
    """The relative positions of a block as vectors of pairs, see `_pairwise_vectors`.

    Attributes:
        plain: R_h and R_w.
        divided: R_h / s and R_w / s.
    """

    plain: TensorPair
    divided: TensorPair


class FastBlock(nn.Module):
    """A transformer block that computes what the stock block does, with `attention`.

    It also keeps less of its MLP for backward, which is the largest part of what a block keeps once
    the attention logits are gone.

    Attributes:
        positions: The relative positions of the attention, made once for all forward passes; None:
            made of its tables in each.
        part: h, w of a map in tokens that is the top left of the one that the tables are for; None:
            the map is that one, or windows.
    """

    positions: PositionVectors | None = None
    part: tuple[int, int] | None = None

    def __init__(self, block: Block) -> None:
        """Takes over the submodules of a stock block, under the same names: the same keys."""
        super().__init__()
        self.norm1, self.attn = block.norm1, block.attn
        self.norm2, self.mlp = block.norm2, block.mlp
        self.window_size = block.window_size
        self.train(block.training)

    def forward(self, x: Tensor) -> Tensor:
        """Attention and MLP, each with a residual; [B, H, W, C] to the same shape."""
        normalised, is_part = self.norm1(x), self.part is not None
        x = x + attention(
            self.attn, normalised, self.window_size, positions=self.positions, is_part=is_part
        )
        hidden = self.mlp.lin1(self.norm2(x))
        if not hidden.requires_grad:
            return x + self._activate_and_project(hidden)
        # Only `hidden`, 4 C wide, is kept, and not the activation, which is as wide: backward
        # computes it again, for a fraction of the time of `lin2`. `lin2` itself is not repeated:
        # a non-reentrant checkpoint stops as soon as it has the tensors that backward needs.
        return x + _checkpoint(self._activate_and_project, hidden)

    def _activate_and_project(self, hidden: Tensor) -> Tensor:
        return self.mlp.lin2(self.mlp.act(hidden))


def use_fast_attention(encoder: ImageEncoderViT) -> None:
    """Replaces the blocks of an image encoder by `FastBlock`s of the same parameters, in place.

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
    encoder.blocks = nn.ModuleList(FastBlock(block) for block in encoder.blocks)


def add_positions(encoder: "ImageEncoderViT | CheckpointedEncoder", tokens: Tensor) -> Tensor:
    """Tokens [N, h, w, C] with the encoder's absolute positions: of a square, or its top left."""
    if encoder.pos_embed is None:
        return tokens
    height, width = tokens.shape[1:3]
    return tokens + encoder.pos_embed[:, :height, :width]


class CheckpointedEncoder(nn.Module):
    """The stock encoder's computation, with its blocks run again in backward."""

    def __init__(self, encoder: ImageEncoderViT, *, group_size: int) -> None:
        """Takes over the submodules of an encoder, under the same names: the same keys.

        Args:
            encoder: A stock image encoder, whatever its attention.
            group_size: Blocks between two tensors that are kept; 1: the input of every block is.
        """
        super().__init__()
        self.img_size, self.group_size = encoder.img_size, group_size
        self.pos_embed, self.patch_embed = encoder.pos_embed, encoder.patch_embed
        self.blocks, self.neck = encoder.blocks, encoder.neck
        self.train(encoder.training)

    def forward(self, x: Tensor) -> Tensor:
        """Float [N, 3, H, W] to [N, C, H/16, W/16]."""
        x = add_positions(self, self.patch_embed(x))
        return self.neck(self.run_blocks(list(self.blocks), x).permute(0, 3, 1, 2))

    def run_blocks(self, blocks: Sequence[nn.Module], x: Tensor) -> Tensor:
        """Runs some of the blocks, one after the other; [N, h, w, C] to the same shape."""
        for start in range(0, len(blocks), self.group_size):
            group = blocks[start : start + self.group_size]
            # The inner checkpoints act when the outer one runs the group again in backward: there
            # they keep the input of each block, and not all activations of the group at once.
            if len(group) > 1:
                x = _checkpoint(_checkpoint_each, group, x)
            else:
                x = _checkpoint_each(group, x)
        return x


def _checkpoint_each(blocks: Sequence[nn.Module], x: Tensor) -> Tensor:
    for block in blocks:
        x = _checkpoint(block, x)
    return x


def checkpoint_activations(encoder: ImageEncoderViT, how: str) -> nn.Module:
    """An image encoder of the same parameters that keeps less for backward.

    Args:
        encoder: A stock image encoder, whatever its attention.
        how: `none`, `blocks` or `full`, see the top of the file.

    Returns:
        The encoder itself for `none`, else a `CheckpointedEncoder` to be used instead of it.
    """
    if how == "none":
        return encoder
    group_size = 1 if how == "blocks" else round(math.sqrt(len(encoder.blocks)))
    return CheckpointedEncoder(encoder, group_size=group_size)


def compile_blocks(encoder: ImageEncoderViT) -> None:
    """Compiles each block of an image encoder, in place."""
    torch.compiler.assume_constant_result(_attention_gpu)  # a mark for the compiler
    for block in encoder.blocks:
        block.compile(dynamic=False)


def position_vectors(block: FastBlock, num_tokens: int) -> PositionVectors:
    """The relative positions of a block, without a gradient.

    Args:
        block: The block.
        num_tokens: Along a side of the map.
    """
    size = block.window_size or num_tokens
    with torch.no_grad():
        is_part = block.part is not None
        plain = _position_vectors(block.attn, block.part or (size, size), is_part=is_part)
        return PositionVectors(plain, _divide(plain, block.attn.scale))


def attention(
    attn: Attention,
    x: Tensor,
    window_size: int,
    *,
    positions: PositionVectors | None = None,
    is_part: bool = False,
) -> Tensor:
    """Multi-head attention with relative positions, inside windows or over the whole map.

    Args:
        attn: The stock module, whose parameters are used.
        x: float [B, H, W, C], normalised tokens.
        window_size: Side of the square windows in tokens; 0 for attention over the whole map.
        positions: The module's relative positions for these windows; None: made of its tables.
        is_part: Whether the tables are for a larger map, of which this one is the top left.

    Returns:
        float [B, H, W, C].
    """
    height, width = x.shape[1:3]
    window = (window_size, window_size) if window_size else (height, width)
    q, k, v = _project_windows(attn, x, window)
    rel_pos = positions.plain if positions else _position_vectors(attn, window, is_part=is_part)
    if not window_size and _mask_is_cheaper(q, rel_pos):
        # There is one window, the map itself: its two dimensions of windows are dropped.
        y = _attend_with_mask(*(t[:, 0, 0] for t in (q, k, v)), rel_pos=rel_pos, scale=attn.scale)
        return attn.proj(y.permute(0, 2, 3, 1, 4).flatten(3))
    # The kernel multiplies the whole product by s, but the position terms have no s: u / s and
    # w / s are wanted. Dividing the tables costs less than dividing u and w, of the size of q.
    rel_pos = positions.divided if positions else _divide(rel_pos, attn.scale)
    k, v = _extend_keys_and_values(k, v)

    # Queries in the padding have outputs that nobody uses. Where more than half of the queries are
    # such, they are left out, with one call for each of the up to four shapes that the real part
    # of a window can have (whole, cut at the right, at the bottom, at both). Where fewer are, the
    # additional calls would cost more than the padding.
    drop_padding = q.shape[1] * q.shape[2] * window[0] * window[1] > 2 * height * width
    bands = []
    for rows, h in _window_spans(height, window[0], drop_padding=drop_padding):
        pieces = []
        for columns, w in _window_spans(width, window[1], drop_padding=drop_padding):
            queries, keys = q[:, rows, columns, :, :h, :w], k[:, rows, columns]
            values = v[:, rows, columns]
            y = _attend_extended(queries, keys, values, rel_pos=rel_pos, scale=attn.scale)
            # [B, rows, columns, heads, h, w, d] to [B, rows * h, columns * w, C], a piece of map.
            pieces.append(y.permute(0, 1, 4, 2, 5, 3, 6).flatten(5).flatten(3, 4).flatten(1, 2))
        bands.append(torch.cat(pieces, dim=2))
    return attn.proj(torch.cat(bands, dim=1)[:, :height, :width].contiguous())


def _window_spans(size: int, side: int, *, drop_padding: bool) -> list[tuple[slice, int]]:
    """Windows along one side of a map, and how many rows (columns) of each have real queries.

    With `drop_padding`, the whole windows and the one that the map's end cuts are two spans.
    """
    num_whole, rest = divmod(size, side)
    if not drop_padding or not rest:
        return [(slice(None), side)]
    spans = [(slice(0, num_whole), side), (slice(num_whole, None), rest)]
    return spans if num_whole else spans[1:]


def _project_windows(attn: Attention, x: Tensor, window: tuple[int, int]) -> tuple[Tensor, ...]:
    """q, k and v of tokens [B, H, W, C]: each [B, rows, columns, heads, h, w, d] of windows."""
    qkv = attn.qkv(x)
    for dim, side in ((2, window[1]), (1, window[0])):
        missing = -qkv.shape[dim] % side
        if missing:
            shape = [*qkv.shape]
            shape[dim] = missing
            # W 0 + b: what stock gets for the zeros that it pads with before the projection.
            qkv = torch.cat([qkv, attn.qkv.bias.to(qkv.dtype).expand(shape)], dim)
    qkv = qkv.unflatten(3, (3, attn.num_heads, -1))
    qkv = qkv.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))
    # [B, rows, h, columns, w, 3, heads, d] to [3, B, rows, columns, heads, h, w, d].
    return qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).unbind(0)


def _attend_extended(
    q: Tensor, k: Tensor, v: Tensor, *, rel_pos: TensorPair, scale: float
) -> Tensor:
    """softmax(logits) v over the tokens of each window, with extended vectors.

    Args:
        q: float [B, rows, columns, heads, h', w', d]: the queries of the first h' rows and w'
            columns of each window.
        k: float [B, rows, columns, heads, h w, d + h + w, and zeros].
        v: As `k`.
        rel_pos: R_h / s and R_w / s, see `_pairwise_vectors`.
        scale: s, the factor of q . k.

    Returns:
        As `q`.
    """
    y = F.scaled_dot_product_attention(
        _extend_vectors(q, *_position_terms(q, rel_pos)).flatten(0, 2),  # (q, u / s, w / s)
        k.flatten(0, 2),  # (k, e_row, e_col)
        v.flatten(0, 2),  # (v, zeros)
        scale=scale,
    )
    return y[..., : q.shape[-1]].reshape(q.shape)


def _mask_is_cheaper(q: Tensor, rel_pos: TensorPair) -> bool:
    """Whether position terms are better passed as `attn_mask` than as components of q and k.

    A CPU pays for every component: 16 + 64 + 64 a head of vit_tiny at 1024 px instead of 16. Its
    fused kernel takes a mask, but has no gradient for it. In windows positions are few.
    """
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, *rel_pos))
    height, width, num_channels = q.shape[-3:]
    return q.device.type == "cpu" and not needs_gradient and height + width > num_channels


def _attend_with_mask(
    q: Tensor, k: Tensor, v: Tensor, *, rel_pos: TensorPair, scale: float
) -> Tensor:
    """As `_attend_extended` over a whole map, with position terms as `attn_mask`.

    A few rows of queries at a time, so that their mask is still in the cache when it is read.

    Args:
        q: float [B, heads, H, W, d].
        k: float [B, heads, H, W, d].
        v: float [B, heads, H, W, d].
        rel_pos: R_h and R_w, see `_pairwise_vectors`.
        scale: s, the factor of q . k.

    Returns:
        float [B, heads, H, W, d].
    """
    keys, values = k.flatten(2, 3), v.flatten(2, 3)
    mask_values_of_a_row = math.prod(keys.shape[:3]) * q.shape[3]
    rows_at_once = max(_MASK_VALUES // mask_values_of_a_row, 1)
    chunks = (x.split(rows_at_once, 2) for x in (q, *_position_terms(q, rel_pos)))
    outputs = []
    for queries, u, w in zip(*chunks, strict=True):
        mask = u[..., :, None] + w[..., None, :]  # u_i[row(j)] + w_i[col(j)], for j by row, column
        y = F.scaled_dot_product_attention(
            queries.flatten(2, 3),
            keys,
            values,
            attn_mask=mask.flatten(4).flatten(2, 3),
            scale=scale,
        )
        outputs.append(y)
    return torch.cat(outputs, 2).reshape(q.shape)


def _position_terms(q: Tensor, rel_pos: TensorPair) -> TensorPair:
    """The u and w of queries [..., h', w', d]: [..., h', w', h] and [..., h', w', w]."""
    # With rows in front, both products are batches of matrices that need no copy but this one.
    q_by_row = q.movedim(-3, 0).contiguous()
    u = torch.einsum("h...wd,hdr->h...wr", q_by_row, rel_pos[0][: q.shape[-3]])
    w = torch.einsum("h...wd,wdc->h...wc", q_by_row, rel_pos[1][: q.shape[-2]])
    return u.movedim(0, -3), w.movedim(0, -3)


def _extend_keys_and_values(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys with the unit vectors of their row and column, values with as many zeros.

    The zeros of v give outputs that are cut off: see `value_width`.
    """
    height, width, num_channels = k.shape[-3:]
    rows = torch.eye(height, dtype=k.dtype, device=k.device)[:, None].expand(-1, width, -1)
    columns = torch.eye(width, dtype=k.dtype, device=k.device).expand(height, -1, -1)
    keys = _extend_vectors(k, rows, columns)
    wide = value_width(keys.shape[-1], num_channels, dtype=v.dtype, gpu=_attention_gpu(v.device))
    return keys, _extend_vectors(v, v.new_zeros(wide - num_channels))


class AttentionGpu(NamedTuple):
    """What decides which kernel `scaled_dot_product_attention` takes on a GPU.

    Attributes:
        capability: Of the GPU, such as (9, 0) of an H100.
        cudnn_version: Such as 91501 for 9.15.1; None where cuDNN may not be used for attention.
    """

    capability: tuple[int, int]
    cudnn_version: int | None


def value_width(
    key_width: int, num_channels: int, *, dtype: torch.dtype, gpu: AttentionGpu | None
) -> int:
    """The width of the values that a fused kernel takes beside keys of a width.

    All kernels take values as wide as keys, and flash kernels no others. For keys of 192 (1024 px
    with 64 channels a head), cuDNN has one for values of 128 as well, with half of the zeros.

    Args:
        key_width: Components of queries and keys.
        num_channels: Of a value, without zeros.
        dtype: Of queries, keys and values.
        gpu: None: another device.
    """
    keys, values = _CUDNN_WIDTHS
    is_taken = (
        gpu is not None
        and gpu.capability in _CUDNN_FIRST
        and (gpu.cudnn_version or 0) >= _CUDNN_FIRST_VERSION
        and dtype in (torch.float16, torch.bfloat16)
        and key_width == keys
        and num_channels <= values
    )
    return values if is_taken else key_width


def _attention_gpu(device: torch.device) -> AttentionGpu | None:
    if device.type != "cuda":
        return None
    # A program may have switched it off, and PyTorch does not call it deterministic.
    is_off = not torch.backends.cuda.cudnn_sdp_enabled() or _CUDNN_LAST
    if is_off or torch.are_deterministic_algorithms_enabled() or torch.version.hip is not None:
        version = None
    else:
        version = torch.backends.cudnn.version()
    return AttentionGpu(torch.cuda.get_device_capability(device), version)


def _extend_vectors(x: Tensor, *more: Tensor) -> Tensor:
    """[..., h, w, d] with more components, and zeros to the width multiple: [..., h w, d + ...]."""
    num_components = x.shape[-1] + sum(part.shape[-1] for part in more)
    zeros = x.new_zeros(-num_components % _WIDTH_MULTIPLE)
    parts = [part.expand(*x.shape[:-1], -1) for part in (*more, zeros)]
    return torch.cat([x, *parts], -1).flatten(-3, -2)


def _position_vectors(
    attn: Attention, window: tuple[int, int], *, is_part: bool = False
) -> TensorPair:
    tables = [attn.rel_pos_h, attn.rel_pos_w]
    if is_part:
        tables = [_middle(t, 2 * n - 1) for t, n in zip(tables, window, strict=True)]
    height, width = (_pairwise_vectors(t, n) for t, n in zip(tables, window, strict=True))
    return height, width


def _middle(table: Tensor, length: int) -> Tensor:
    start = (len(table) - length) // 2
    return table[start : start + length]


def _divide(pair: TensorPair, scale: float) -> TensorPair:
    return pair[0] / scale, pair[1] / scale


def _pairwise_vectors(table: Tensor, size: int) -> Tensor:
    """A table of distances as vectors of pairs of positions: [2 size - 1, d] to [size, d, size].

    `result[i, :, j] = table[i - j + size - 1]`, query first. In the table upside down, the vectors
    of one i are `size` rows in a piece, j upwards, and those of i + 1 begin one row earlier: a
    sliding window over it in reverse, without a table of indices. A table made for another size is
    resampled, as the stock module does.
    """
    if table.shape[0] != 2 * size - 1:
        table = F.interpolate(table.T[None], size=2 * size - 1, mode="linear")[0].T
    return table.flip(0).unfold(0, size, 1).flip(0)
