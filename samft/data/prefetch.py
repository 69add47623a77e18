"""Batches on the device before they are asked for, and waiting for them."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import torch

from samft.data.batch import Batch
from samft.distributed import all_reduce_sum, raise_together
from samft.errors import UserError
from samft.runtime.signals import Interrupted

Waiting = Callable[[], contextlib.AbstractContextManager[None]]


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Moves batches over one ahead: a GPU copies the next while it computes with this one.

    The copy is on a stream of its own. It needs page-locked memory to run beside the computation,
    which `loaders.BatchLoader` gives.

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


def fetch(
    stream: Iterator[Batch], count: int, waiting: Waiting
) -> tuple[list[Batch], UserError | None]:
    """The next batches, or the user's error that came in their place, for other ranks to hear of.

    Args:
        stream: Of a loader.
        count: How many.
        waiting: Entered for the wait; raises `Interrupted` to end it, and then there are none.
    """
    try:
        with waiting():
            return list(islice(stream, count)), None
    except Interrupted:  # whoever asked for the batches is about to ask whether to stop
        return [], None
    except UserError as error:  # say, a broken image: the other ranks must hear of it
        return [], error


def side_by_side(
    batches: Iterable[Batch],
    *,
    should_stop: Callable[[], bool] = lambda: False,
    waiting: Waiting = contextlib.nullcontext,
) -> Iterator[Batch]:
    """This rank's batches, all ranks going on together. Collective: every rank must call.

    Ranks may have different numbers of batches: whoever has none left waits for the others.

    Args:
        batches: Of a loader.
        should_stop: Asked before each batch on every rank; all stop if any says yes.
        waiting: See `fetch`.

    Yields:
        The batches of this rank.

    Raises:
        Interrupted: Any rank was asked to stop.
        UserError: An image cannot be read, on any rank.
    """
    stream = iter(batches)
    while True:
        fetched, error = fetch(stream, 1, waiting)
        flags = torch.tensor([len(fetched), int(should_stop()), int(error is not None)])
        more, stopped, failed = all_reduce_sum(flags, in_step=True).tolist()
        if failed:
            raise_together(error)
        if stopped:
            raise Interrupted
        if not more:
            return
        yield from fetched
