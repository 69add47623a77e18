"""Packing of tensors into blocks of page-locked memory."""

import itertools

import pytest
import torch

from samft.checkpoints.page_locked import BLOCK_BYTES, pack
from samft.models.sam import build_sam

MIB = 2**20


def rounded_up(size: int) -> int:
    """The power of two that PyTorch allocates for a block."""
    return 1 << (size - 1).bit_length()


@pytest.mark.parametrize(
    ("sizes", "blocks"),
    [
        ([], []),
        ([1], [64]),
        ([64, 65], [256]),
        ([9 * MIB] * 3, [32 * MIB]),
        ([BLOCK_BYTES, 5], [BLOCK_BYTES, 64]),
        ([BLOCK_BYTES - 64, 64, 1], [BLOCK_BYTES, 64]),
        ([BLOCK_BYTES + 1], [2 * BLOCK_BYTES]),
    ],
)
def test_blocks_are_as_few_and_small_as_the_tensors_allow(
    sizes: list[int], blocks: list[int]
) -> None:
    assert pack(sizes).block_bytes == blocks


def test_places_are_aligned_and_nowhere_shared() -> None:
    sizes = [7, 100 * MIB, 64, 200 * MIB + 3, 1, 129]
    packing = pack(sizes)
    by_block = sorted(zip(packing.places, sizes, strict=True))
    for ((block, first), size), ((other, following), _) in itertools.pairwise(by_block):
        assert block != other or first + size <= following
    for (block, first), size in by_block:
        assert first % 64 == 0 and first + size <= packing.block_bytes[block]


@pytest.mark.parametrize(
    ("model_type", "alone", "packed"), [("vit_b", 1.55, 1.02), ("vit_h", 1.35, 1.02)]
)
def test_a_state_takes_little_more_than_its_size(
    model_type: str, alone: float, packed: float
) -> None:
    with torch.device("meta"):
        weights = build_sam(model_type, 1024).state_dict().values()
    sizes = [tensor.nbytes for tensor in weights] * 3  # weights, and the optimizer's two moments
    assert sum(map(rounded_up, sizes)) > alone * sum(sizes)
    assert sum(pack(sizes).block_bytes) < packed * sum(sizes)
