"""What is frozen of an image encoder: run apart from what is trained, and cast once.

The first blocks, where they are frozen, give the same tokens for an image in every step, so these
can be computed once and kept (`embeddings/`). What is trained begins with the block that they
enter.

Autocast casts a weight each time that it is used; it remembers the result, until the end of the
step, only of a weight that wants a gradient. So a frozen encoder is cast anew in each step, and in
each block, vectors of relative positions are made of its tables anew: for vit_b 212 of the 1,702
kernels of a step, and for vit_h 3.8 GB of memory traffic. `CastEncoder` keeps a copy of the encoder
that holds what all this makes, to the same bits. The weights themselves stay float32, for
validation and for checkpoints.
"""

import copy
from typing import Any, NamedTuple

import torch
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn

from samft.models.image_encoder import (
    CheckpointedEncoder,
    FastBlock,
    PositionVectors,
    TensorPair,
    add_positions,
    compile_blocks,
    position_vectors,
)


def cast_frozen_weights(encoder: ImageEncoderViT, dtype: torch.dtype) -> ImageEncoderViT:
    """Copies an image encoder with its frozen weights in the type that autocast would cast them to.

    Parameters that are trained, and those that autocast leaves in float32, are the encoder's own in
    the copy, too: gradients arrive where they belong.

    Args:
        encoder: An image encoder, whatever its attention, or a `CheckpointedEncoder`.
        dtype: The type.

    Returns:
        An encoder that has, under autocast to the type, the outputs and gradients of this one.
    """
    in_copy: dict[int, nn.Parameter] = {id(p): p for p in encoder.parameters()}
    for module in encoder.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):  # autocast casts all that these multiply
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    cast = parameter.detach().to(dtype)
                    in_copy[id(parameter)] = nn.Parameter(cast, requires_grad=False)
    duplicate = copy.deepcopy(encoder, in_copy)
    num_tokens = encoder.img_size // encoder.patch_embed.proj.stride[0]
    for block in duplicate.blocks:
        if isinstance(block, FastBlock) and not _trains_positions(block):
            plain, divided = position_vectors(block, num_tokens)
            block.positions = PositionVectors(_cast(plain, dtype), _cast(divided, dtype))
    if any(block._compiled_call_impl is not None for block in encoder.blocks):
        compile_blocks(duplicate)
    return duplicate


def _trains_positions(block: FastBlock) -> bool:
    return bool(block.attn.rel_pos_h.requires_grad or block.attn.rel_pos_w.requires_grad)


def _cast(pair: TensorPair, dtype: torch.dtype) -> TensorPair:
    return pair[0].to(dtype), pair[1].to(dtype)


class CastEncoder:
    """Keeps the copy of an encoder by `cast_frozen_weights` for as long as its weights stay.

    It takes half as much memory as the frozen weights: for vit_h 1.3 GB.
    """

    def __init__(self) -> None:
        """Starts without a copy."""
        self._kept: _KeptCopy | None = None
        self._known: _KnownWeights | None = None

    def select(self, encoder: ImageEncoderViT, device_type: str) -> ImageEncoderViT:
        """The encoder to run: the copy, under autocast and where something is frozen, or itself."""
        if not torch.is_autocast_enabled(device_type):
            return encoder
        dtype, weights = torch.get_autocast_dtype(device_type), self.weights_of(encoder)
        states = [_state_of(weight) for weight in weights]
        kept = self._kept
        if kept is None or (kept.dtype, kept.states) != (dtype, states) or kept.of is not weights:
            self.drop()
            duplicate = encoder
            if any(state is not None for state in states):
                # Not in inference mode, whose tensors could not be used in training.
                with torch.inference_mode(False):
                    duplicate = cast_frozen_weights(encoder, dtype)
            self._kept = kept = _KeptCopy(duplicate, weights, dtype, states)
        return kept.duplicate

    def weights_of(self, encoder: ImageEncoderViT) -> list[nn.Parameter]:
        """The parameters of an encoder: the same list, until one is another.

        `encoder.parameters()` goes through all modules, a millisecond that steps would wait for.
        """
        known = self._known
        if known is None or known.encoder is not encoder or not known.has_the_same():
            members = [
                (members, name, member)
                for module in encoder.modules()
                for members in (module._parameters, module._modules)
                for name, member in members.items()
            ]
            self._known = known = _KnownWeights(encoder, members, list(encoder.parameters()))
        return known.weights

    def drop(self) -> None:
        """Frees the copy; the next `select` makes another."""
        self._kept = None


class _KeptCopy(NamedTuple):
    # A copy, or the encoder itself if nothing is frozen, and the weights that it is made of.
    duplicate: ImageEncoderViT
    of: list[nn.Parameter]
    dtype: torch.dtype
    states: list[tuple[int, int] | None]


class _KnownWeights(NamedTuple):
    # An encoder, what its modules consist of, and their parameters.
    encoder: ImageEncoderViT
    members: list[tuple[dict[str, Any], str, Any]]
    weights: list[nn.Parameter]

    def has_the_same(self) -> bool:
        return all(members.get(name) is member for members, name, member in self.members)


def _state_of(weight: nn.Parameter) -> tuple[int, int] | None:
    # Changes when a frozen weight moves, or is changed in place; None for one that is trained,
    # which the copy shares.
    return None if weight.requires_grad else (weight.data_ptr(), version_of(weight))


def version_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place; 0 for one of inference mode: it has no count."""
    return 0 if tensor.is_inference() else tensor._version


def count_frozen_blocks(encoder: ImageEncoderViT) -> int | None:
    """The blocks at the start of an encoder that training does not change.

    Args:
        encoder: With its frozen parameters frozen, whatever its attention.

    Returns:
        Their number, 0 to all; None where what comes before the blocks is trained.
    """
    stem = list(encoder.patch_embed.parameters())
    if encoder.pos_embed is not None:
        stem.append(encoder.pos_embed)
    if any(parameter.requires_grad for parameter in stem):
        return None
    trained = [any(p.requires_grad for p in block.parameters()) for block in encoder.blocks]
    return [*trained, True].index(True)


def encode_first_blocks(encoder: ImageEncoderViT, images: Tensor, num_blocks: int) -> Tensor:
    """The tokens that enter block `num_blocks`, without a gradient.

    Args:
        encoder: Of any attention. Its first blocks are not checkpointed: nothing of them is kept.
        images: float [N, 3, H, W], preprocessed.
        num_blocks: Blocks that have run.

    Returns:
        float [N, H/16, W/16, C].

    Source: `segment_anything/modeling/image_encoder.py`, `ImageEncoderViT.forward`.
    """
    with torch.no_grad():
        tokens = add_positions(encoder, encoder.patch_embed(images))
        for block in encoder.blocks[:num_blocks]:
            tokens = block(tokens)
        return tokens


def encode_last_blocks(encoder: ImageEncoderViT, tokens: Tensor, num_blocks: int) -> Tensor:
    """The embedding, from what `encode_first_blocks` returned.

    Args:
        encoder: Of any attention, checkpointed or not.
        tokens: float [N, H/16, W/16, C].
        num_blocks: Blocks that have run.

    Returns:
        float [N, C', H/16, W/16].
    """
    blocks = list(encoder.blocks)[num_blocks:]
    if isinstance(encoder, CheckpointedEncoder):
        tokens = encoder.run_blocks(blocks, tokens)
    else:
        for block in blocks:
            tokens = block(tokens)
    embedding: Tensor = encoder.neck(tokens.permute(0, 3, 1, 2))
    return embedding


def move_first_blocks(encoder: ImageEncoderViT, num_blocks: int, device: torch.device) -> None:
    """Moves the first blocks, and what comes before them, to a device, in place."""
    first: list[nn.Module] = [encoder.patch_embed, *encoder.blocks[:num_blocks]]
    for module in first:
        module.to(device)
    if encoder.pos_embed is not None:
        moved = encoder.pos_embed.detach().to(device)
        encoder.pos_embed = nn.Parameter(moved, requires_grad=False)
