"""The bytes of tensors that autograd saves for backward, and their peak."""

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class SavedTensor:
    """A tensor saved for backward."""

    tensor: Tensor


class SavedBytes:
    """The bytes of tensors saved for backward: those alive now, and the peak."""

    def __init__(self, beside: Iterable[Tensor] = ()) -> None:
        """Counts no tensor that shares its memory with those `beside`, such as parameters."""
        self.alive: dict[int, tuple[int, int]] = {}  # storage address: tensors that use it, bytes
        self.peak = 0
        self._beside = {tensor.untyped_storage().data_ptr() for tensor in beside}

    @contextlib.contextmanager
    def watch(self) -> Iterator["SavedBytes"]:
        """Counts what is saved in a block."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            yield self

    def _pack(self, tensor: Tensor) -> Tensor | SavedTensor:
        address, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        if address in self._beside:
            return tensor
        count, _ = self.alive.get(address, (0, 0))
        self.alive[address] = (count + 1, size)
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        saved = SavedTensor(tensor)
        weakref.finalize(saved, self._remove, address)
        return saved

    def _remove(self, address: int) -> None:
        count, size = self.alive.pop(address)
        if count > 1:
            self.alive[address] = (count - 1, size)


def _unpack(saved: Tensor | SavedTensor) -> Tensor:
    return saved.tensor if isinstance(saved, SavedTensor) else saved
