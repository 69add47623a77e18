"""Copies between the host and a GPU that go on while it computes, in both directions.

A stream for each direction, because a GPU has a copy engine for each; and an event for each copy,
so that whoever uses it waits for this one and for none that was begun later. On a CPU nothing is
copied.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from samft.data.dataset import Batch

Movable = TypeVar("Movable", Tensor, Batch)


class Transfers:
    """Begins copies, and has the right side wait for each: the GPU's computation, or the host."""

    def __init__(self, device: torch.device) -> None:
        """Takes the device to copy to and from; two streams are made if it is a GPU."""
        self.device = device
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None
        if device.type == "cuda":
            self._streams = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def to_device(self, item: Movable) -> Callable[[], Movable]:
        """Begins to copy to the device.

        Args:
            item: In page-locked memory; from any other, the host would wait for the copy.

        Returns:
            Gives the copy to the current stream, which waits for it; to be called once.
        """
        if self._streams is None:
            return lambda: item
        stream, _ = self._streams
        with torch.cuda.stream(stream):
            moved = item.to(self.device, non_blocking=True)
        arrived = stream.record_event()

        def receive() -> Movable:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(arrived)
            # The memory is the copying stream's, which may use it again once the copy is deleted:
            # not before the current stream is done with it.
            moved.record_stream(current)
            return moved

        return receive

    def to_host(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Begins to copy what the current stream computes to the host.

        Args:
            tensor: On the device; it must not be changed afterwards.

        Returns:
            Waits until the copy is there, and returns it.
        """
        if self._streams is None:
            return lambda: tensor
        _, stream = self._streams
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            copied = torch.empty_like(tensor, device="cpu", pin_memory=True)
            copied.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)  # the other way round: its memory is the current stream's
        arrived = stream.record_event()

        def receive() -> Tensor:
            arrived.synchronize()
            return copied

        return receive


def send_to(device: torch.device, tensor: Tensor) -> Tensor:
    """A tensor of the host on a device, for the current stream; the host does not wait for it."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
