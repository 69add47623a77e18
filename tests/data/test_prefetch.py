"""Batches on the device ahead of time, and the wait for them."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from helpers.trainers import val_batches
from samft.data.dataset import Batch
from samft.data.loaders import fetch_batches, prefetch_to_device
from samft.errors import DataError
from samft.runtime.signals import StopInterrupt, call_interruptibly, stop_on_signal

CPU = torch.device("cpu")


def test_all_batches_come_in_their_order() -> None:
    batches = val_batches(4)
    moved = list(prefetch_to_device(batches, CPU))
    assert [batch.image_ids for batch in moved] == [batch.image_ids for batch in batches]
    assert all(torch.equal(a.images, b.images) for a, b in zip(moved, batches, strict=True))
    assert list(prefetch_to_device([], CPU)) == []


def test_the_next_is_fetched_before_this_one_is_used() -> None:
    fetched = []

    def source() -> Iterator[Batch]:
        for batch in val_batches(3):
            fetched.append(batch.image_ids)
            yield batch

    stream = prefetch_to_device(source(), CPU)
    next(stream)
    assert len(fetched) == 2
    next(stream)
    assert len(fetched) == 3


def test_an_error_comes_after_the_batches_before_it() -> None:
    def source() -> Iterator[Batch]:
        yield from val_batches(2)
        raise DataError("a broken image")

    stream = prefetch_to_device(source(), CPU)
    assert len([next(stream), next(stream)]) == 2
    with pytest.raises(DataError, match="a broken image"):
        next(stream)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_a_batch_is_complete_before_it_is_used() -> None:
    device = torch.device("cuda")
    batches = [batch.pin_memory() for batch in val_batches(8)]
    work = torch.randn(4096, 4096, device=device)
    for batch, expected in zip(prefetch_to_device(batches, device), batches, strict=True):
        for _ in range(10):
            work = (work @ work).tanh()
        assert batch.images.is_cuda and torch.equal(batch.images.cpu(), expected.images)


def ids(batches: list[Batch]) -> list[list[int]]:
    return [batch.image_ids for batch in batches]


def test_as_many_are_fetched_as_are_asked_for_and_there_are() -> None:
    batches = val_batches(5)
    stream = iter(batches)
    fetched = [fetch_batches(stream, 2, contextlib.nullcontext) for _ in range(4)]
    assert [ids(some) for some, _ in fetched] == [
        ids(batches[:2]),
        ids(batches[2:4]),
        ids(batches[4:]),
        [],
    ]
    assert [error for _, error in fetched] == [None] * 4


def test_a_users_error_is_handed_back_and_a_bug_is_raised() -> None:
    def source(error: Exception) -> Iterator[Batch]:
        yield from val_batches(1)
        raise error

    broken = DataError("a broken image")
    assert fetch_batches(source(broken), 2, contextlib.nullcontext) == ([], broken)
    with pytest.raises(KeyError):
        fetch_batches(source(KeyError()), 2, contextlib.nullcontext)


def test_a_signal_ends_the_wait_for_batches_and_there_are_none() -> None:
    def source() -> Iterator[Batch]:
        yield from val_batches(1)
        os.kill(os.getpid(), signal.SIGTERM)
        call_interruptibly(lambda: released.wait(30))  # were it not for the signal
        yield from val_batches(1)

    released, start = threading.Event(), time.monotonic()
    with stop_on_signal() as stop:
        assert fetch_batches(source(), 2, stop.waiting) == ([], None)
        assert stop.received == ["SIGTERM"]
        # And no wait is begun after that.
        stream = iter(val_batches(2))
        assert fetch_batches(stream, 2, stop.waiting) == ([], None)
        assert len(list(stream)) == 2
    assert time.monotonic() - start < 15


def test_only_the_wait_is_guarded() -> None:
    states = []

    @contextlib.contextmanager
    def waiting() -> Iterator[None]:
        states.append("in")
        yield
        states.append("out")

    def source() -> Iterator[Batch]:
        for batch in val_batches(2):
            states.append("load")
            yield batch

    fetch_batches(source(), 2, waiting)
    assert states == ["in", "load", "load", "out"]

    @contextlib.contextmanager
    def refusing() -> Iterator[None]:
        raise StopInterrupt
        yield

    assert fetch_batches(source(), 2, refusing) == ([], None)
    assert len(states) == 4
