"""Whether a stream waits for what another one writes or reads, and memory for its last use.

Streams do their work in no order among each other, unless one waits for an event of the other, or
the host has waited. A tensor's memory belongs to the stream that it was made on: once the tensor
is deleted, that stream may use it again, unless `record_stream` says which others are not done.
Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-streams

Autograd's own threads and captured graphs are left out: PyTorch orders these itself.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from helpers.pretend_cuda.device_rules import Operation
from helpers.pretend_cuda.ledger import LEDGER
from helpers.pretend_cuda.streams import AFTER_WAITS, PENDING, Stream, current_stream

_LOOK_EVERY = 1000  # operations


@dataclass
class _Memory:
    # Of one storage. Operations are numbered over all streams.
    storage: StorageWeakRef
    made_on: int  # stream
    written: tuple[int, int]  # stream, and number of the operation
    is_transferred: bool  # from or to the host; the allocator's rules are held for these only
    read: dict[int, int] = field(default_factory=dict)  # by stream, the last operation
    recorded: set[int] = field(default_factory=set)  # streams
    other_use: str = ""  # the last on a stream that it does not belong to

    def used_elsewhere(self) -> bool:
        """Whether a stream that is neither its own nor recorded has used it."""
        return bool(set(self.read) - self.recorded - {self.made_on})


class StreamOrder:
    """Follows the memory on the device, by storage."""

    def __init__(self) -> None:
        self._memories: dict[int, _Memory] = {}
        self._next_look = _LOOK_EVERY

    def check(self, operation: Operation) -> None:
        """Looks, before an operation begins, whether its stream has waited for what it uses."""
        if operation.func.is_view or _is_left_out():
            return
        for memory, is_written in self._used_by(operation):
            others = [memory.written, *(memory.read.items() if is_written else ())]
            if not all(_is_over(*other) for other in others):
                LEDGER.fault(f"{operation.name} does not wait for another stream's use of a tensor")

    def note(self, operation: Operation, result: Any, *, is_transfer: bool) -> None:
        """Notes what an operation has used, and what it has made."""
        if operation.func.is_view or _is_left_out():
            return
        stream = current_stream()
        number = PENDING.advance(stream)
        for memory, is_written in self._used_by(operation):
            memory.read[stream.number] = number
            memory.is_transferred |= is_transfer
            if is_written:
                memory.written = stream.number, number
            if stream.number != memory.made_on:
                memory.other_use = f"{operation.name} at {LEDGER.find_place()}"
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_cuda and self._memory_of(tensor) is None:
                weak = StorageWeakRef(tensor.values.untyped_storage())
                memory = _Memory(weak, stream.number, (stream.number, number), is_transfer)
                self._memories[weak.cdata] = memory
        if number >= self._next_look:
            self.look_for_early_reuse()

    def record(self, tensor: Tensor, stream: Stream) -> None:
        """`tensor.record_stream(stream)`."""
        if (memory := self._memory_of(tensor)) is not None:
            memory.recorded.add(stream.number)

    def forget_finished(self, stream: Stream) -> None:
        """Uses elsewhere of memory of this stream that it has waited for cannot come too late."""
        for memory in self._memories.values():
            if memory.made_on == stream.number and not memory.storage.expired():
                uses = memory.read.items()
                memory.read = {s: n for s, n in uses if n > stream.reached.get(s, 0)}

    def look_for_early_reuse(self) -> None:
        """Looks whether memory was given back while a stream that is not its own used it."""
        self._next_look = PENDING.advance(current_stream()) + _LOOK_EVERY
        for key, memory in list(self._memories.items()):
            if memory.storage.expired():
                if memory.is_transferred and memory.used_elsewhere():
                    LEDGER.fault(f"no record_stream before the end of a tensor: {memory.other_use}")
                del self._memories[key]

    def _used_by(self, operation: Operation) -> Iterator[tuple[_Memory, bool]]:
        # Each with whether it is written.
        for position, tensor in enumerate(operation.tensors):
            if tensor.is_cuda and (memory := self._memory_of(tensor)) is not None:
                yield memory, position == 0 and operation.name.endswith("_")

    def _memory_of(self, tensor: Tensor) -> _Memory | None:
        memory = self._memories.get(tensor.values.untyped_storage()._cdata)
        return None if memory is None or memory.storage.expired() else memory


def _is_left_out() -> bool:
    in_autograd = isinstance(threading.current_thread(), threading._DummyThread)
    return in_autograd or LEDGER.is_capturing


def _is_over(stream: int, number: int) -> bool:
    current = current_stream()
    waited_for = max(current.reached.get(stream, 0), PENDING.seen_by_host(stream))
    return stream == current.number or number <= waited_for


ORDER = StreamOrder()
AFTER_WAITS.append(ORDER.forget_finished)
