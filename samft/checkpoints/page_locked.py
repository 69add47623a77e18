"""Page-locked host memory for many tensors, with little lost to rounding.

PyTorch rounds each page-locked block up to a power of two, so that a state of `vit_b` with a block
for each tensor takes 1.6 times its size. Here tensors share large blocks. Each has a storage of its
own, because `torch.save` writes whole storages.
Source: `allocate` in `ATen/core/CachingHostAllocator.h` of PyTorch.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

BLOCK_BYTES = 256 << 20
_ALIGNMENT = 64

Key = TypeVar("Key", bound=Hashable)


class Packing(NamedTuple):
    """Where tensors lie in blocks.

    Attributes:
        block_bytes: Size of each block, a power of two.
        places: Of each tensor: the block, and its first byte in there.
    """

    block_bytes: list[int]
    places: list[tuple[int, int]]


def pack(sizes: Sequence[int]) -> Packing:
    """Packs tensors into blocks: the largest first, each into the first block with room for it.

    Args:
        sizes: In bytes, more than 0.
    """
    used: list[int] = []
    places = [(0, 0)] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        size = -(-sizes[i] // _ALIGNMENT) * _ALIGNMENT
        fitting = (k for k, bytes_used in enumerate(used) if bytes_used + size <= BLOCK_BYTES)
        block = next(fitting, len(used))
        if block == len(used):
            used.append(0)
        places[i] = block, used[block]
        used[block] += size
    return Packing([1 << (size - 1).bit_length() for size in used], places)


def empty_page_locked(tensors: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
    """Uninitialised page-locked tensors of the shapes, strides and dtypes of others.

    Args:
        tensors: On a GPU.
    """
    empty = {key: torch.empty_like(tensor, device="meta") for key, tensor in tensors.items()}
    packing = pack([max(like.nbytes, 1) for like in empty.values()])
    # Through NumPy, whose arrays other storages can share.
    blocks = [
        torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
        for size in packing.block_bytes
    ]
    made = {}
    for (key, like), (block, first) in zip(empty.items(), packing.places, strict=True):
        memory = blocks[block][first : first + max(like.nbytes, 1)]
        storage = torch.from_numpy(memory).untyped_storage()
        made[key] = torch.empty(0, dtype=like.dtype).set_(storage, 0, like.size(), like.stride())
    return made
