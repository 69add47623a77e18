"""Activations of the image encoder made again in backward instead of kept: time for memory.

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

from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
