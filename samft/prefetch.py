"""Batches on the device before they are asked for."""

import contextlib
from collections.abc import Iterable, Iterator

import torch

from samft.batch import Batch
from samft.errors import UserError


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Moves batches over one ahead: a GPU copies the next while it computes with this one.

    The copy is on a stream of its own. It needs page-locked memory to run beside the computation,
    which `data.BatchLoader` gives.

    Args:
        batches: From a loader.
        device: Where to.

    Yields:
        The same batches, on the device.

    Raises:
        UserError: What the loader raised, after the batches before it have been given.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    source, ahead = iter(batches), None
    while True:
        moved, error = None, None
        try:
            if (batch := next(source, None)) is not None:
                with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
                    moved = batch.to(device, non_blocking=True)
        except UserError as caught:
            error = caught
        if ahead is not None:
            if stream is not None:
                current = torch.cuda.current_stream(device)
                current.wait_stream(stream)
                ahead.record_stream(current)
            yield ahead
        if error is not None:
            raise error
        if moved is None:
            return
        ahead = moved
