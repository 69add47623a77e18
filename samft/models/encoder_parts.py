"""The image encoder in two parts: the first blocks, which are frozen, and what is trained after.

The first part gives the same tokens for an image in every step, so they can be computed once and
kept (`embeddings/`). What is trained begins with the block that these tokens enter.
"""

import torch
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn

from samft.models.image_encoder import CheckpointedEncoder


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
        images: float [N, 3, S, S], preprocessed.
        num_blocks: Blocks that have run.

    Returns:
        float [N, S/16, S/16, C].

    Source: `segment_anything/modeling/image_encoder.py`, `ImageEncoderViT.forward`.
    """
    with torch.no_grad():
        tokens: Tensor = encoder.patch_embed(images)
        if encoder.pos_embed is not None:
            tokens = tokens + encoder.pos_embed
        for block in encoder.blocks[:num_blocks]:
            tokens = block(tokens)
        return tokens


def encode_last_blocks(encoder: ImageEncoderViT, tokens: Tensor, num_blocks: int) -> Tensor:
    """The embedding, from what `encode_first_blocks` returned.

    Args:
        encoder: Of any attention, checkpointed or not.
        tokens: float [N, S/16, S/16, C].
        num_blocks: Blocks that have run.

    Returns:
        float [N, C', S/16, S/16].
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
