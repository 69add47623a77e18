"""Streams and events, and copies to the host that arrive no sooner than something waits for them.

A copy to the host that is not blocking has only been begun when PyTorch returns: until the host
waits for its stream, the memory holds whatever was there before. Here it holds garbage (NaN, or the
largest integer) until then. Each stream counts its copies; an event holds how far its stream was,
and what that stream had waited for. Source: the CUDA programming guide on streams and events.
"""

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from helpers.pretend_cuda.ledger import LEDGER

_ALL = -1  # in place of a stream


@dataclass(eq=False)
class _Copy:
    target: torch.Tensor  # on the host
    values: torch.Tensor  # that it will hold
    stream: int
    number: int


class PendingCopies:
    """Copies to the host that nothing has waited for."""

    def __init__(self) -> None:
        self._copies: list[_Copy] = []
        self._seen: dict[int, int] = {}  # by stream, what the host has waited for
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()

    def advance(self, stream: "Stream") -> int:
        """The number of one more piece of work on a stream; numbers grow over all streams."""
        with self._lock:
            stream.reached[stream.number] = number = next(self._numbers)
        return number

    def seen_by_host(self, stream: int) -> int:
        """The last piece of work of a stream that the host has waited for."""
        return self._seen.get(stream, self._seen.get(_ALL, 0))

    def begin(self, target: torch.Tensor, values: torch.Tensor) -> None:
        """Begins to copy values into a tensor on the host, which holds garbage meanwhile."""
        stream = current_stream()
        number = self.advance(stream)
        with self._lock:
            self._copies.append(_Copy(target, values.detach().clone(), stream.number, number))
        with torch.no_grad():
            target.fill_(_garbage(target.dtype))

    def land(self, reached: dict[int, int] | None = None) -> None:
        """The copies of some streams up to some number have arrived; None: all copies have."""
        with self._lock:
            landed = [
                copy
                for copy in self._copies
                if reached is None or copy.number <= reached.get(copy.stream, 0)
            ]
            self._copies = [copy for copy in self._copies if copy not in landed]
            if reached is None:
                self._seen = {_ALL: next(self._numbers)}
            else:
                merged = {
                    key: max(number, self.seen_by_host(key)) for key, number in reached.items()
                }
                self._seen.update(merged)
        with torch.no_grad():
            for copy in landed:
                copy.target.copy_(copy.values)


def _garbage(dtype: torch.dtype) -> Any:
    if dtype == torch.bool:
        return True
    return float("nan") if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype).max


# Called with each stream that has come to wait for another.
AFTER_WAITS: list[Callable[["Stream"], None]] = []


class Stream:
    """A queue of work, as `torch.cuda.Stream`.

    Attributes:
        reached: By stream, the last copy that work queued here from now on comes after.
    """

    _numbers = itertools.count()

    def __init__(self, device: Any = None, priority: int = 0, **options: Any) -> None:
        self.device = torch.device(device if device is not None else "cuda")
        self.number = next(self._numbers)
        self.cuda_stream = self.stream_id = self.number
        self.reached: dict[int, int] = {}

    def record_event(self, event: "Event | None" = None) -> "Event":
        """Marks how far this stream is."""
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: "Event") -> None:
        """Later work here comes after what the event marks. The host does not wait."""
        for stream, number in event.reached.items():
            self.reached[stream] = max(number, self.reached.get(stream, 0))
        for has_waited in AFTER_WAITS:
            has_waited(self)

    def wait_stream(self, other: "Stream") -> None:
        """Later work here comes after all that was queued there."""
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        """The host waits until the stream is done."""
        LEDGER.wait("stream.synchronize")
        PENDING.land(self.reached)

    def query(self) -> bool:
        """Whether the stream is done: here it is, whenever one looks."""
        PENDING.land(self.reached)
        return True


class Event:
    """A mark in a stream, as `torch.cuda.Event`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.reached: dict[int, int] = {}

    def record(self, stream: Stream | None = None) -> None:
        """Marks how far a stream is: the current one if none is given."""
        self.reached = dict((stream or current_stream()).reached)

    def wait(self, stream: Stream | None = None) -> None:
        """Later work of a stream comes after the mark. The host does not wait."""
        (stream or current_stream()).wait_event(self)

    def synchronize(self) -> None:
        """The host waits until the mark is reached."""
        LEDGER.wait("event.synchronize")
        PENDING.land(self.reached)

    def query(self) -> bool:
        """Whether the mark is reached: here it is, whenever one looks."""
        PENDING.land(self.reached)
        return True

    def elapsed_time(self, other: "Event") -> float:
        """Milliseconds between two marks; time means nothing here."""
        return 1.0


PENDING = PendingCopies()
_default_stream = Stream()
_of_thread = threading.local()


def current_stream(device: Any = None) -> Stream:
    """The stream that this thread queues work on."""
    stream: Stream = getattr(_of_thread, "stream", _default_stream)
    return stream


def default_stream(device: Any = None) -> Stream:
    """The stream of threads that chose none."""
    return _default_stream


@contextlib.contextmanager
def use_stream(stream: Stream | None) -> Iterator[None]:
    """Queues work of this thread on a stream, as `torch.cuda.stream`; None changes nothing."""
    before = current_stream()
    _of_thread.stream = stream or before
    try:
        yield
    finally:
        _of_thread.stream = before


def wait_for_device(kind: str, *, only_current_stream: bool = False) -> None:
    """The host waits for all of the device, or for the current stream, as a blocking copy does."""
    LEDGER.wait(kind)
    PENDING.land(current_stream().reached if only_current_stream else None)
