"""Loaders: batches from worker processes, prefetched to the device, in lockstep over the ranks.

In order: the training and the validation loader; the loader class; its worker processes; what the
loops use to wait for batches, move them to the device and keep ranks together; batches for probes.
"""

import collections
import contextlib
import functools
import gc
import os
import signal
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from samft.data.dataset import Batch, Coco2MaskDataset, Sample, collate
from samft.data.samplers import (
    EndlessBatchSampler,
    SampleKey,
    TrainingSampler,
    ValidationSampler,
)
from samft.data.transfers import Transfers
from samft.distributed import all_reduce_sum, raise_on_all_ranks
from samft.errors import DataError, UserError
from samft.runtime import heartbeat
from samft.runtime.device import usable_cores
from samft.runtime.signals import (
    POLL_SECONDS,
    STOP_SIGNALS,
    StopInterrupt,
    call_interruptibly,
    check_wait,
    die_with_parent,
)

# Makes a context for a wait, which raises `StopInterrupt` in it when the process is to stop.
Waiting = Callable[[], contextlib.AbstractContextManager[None]]


def train_loader(
    dataset: Coco2MaskDataset,
    *,
    batch_size: int,
    accumulate_steps: int = 1,
    start_step: int = 0,
    steps: int | None = None,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    repeats: NDArray[np.floating] | None = None,
    timeout: float | None = None,
    pin_memory: bool = False,
) -> "BatchLoader":
    """Loads this process' micro-batches, step after step.

    Args:
        dataset: In training mode.
        batch_size: Images per process and micro-batch.
        accumulate_steps: Micro-batches per step.
        start_step: Steps whose images a run has used already, with as many images per step.
        steps: The step to end before; None: endless.
        num_workers: Worker processes, no more than there are cores; 0 loads in this process.
        rank: Of this process.
        world_size: Number of processes.
        seed: Of the order, see `TrainingSampler`.
        repeats: [len(dataset)], how many times each image comes in an epoch.
        timeout: Seconds that the workers may take for a batch; None: no limit.
        pin_memory: See `BatchLoader`.
    """
    sampler = TrainingSampler(
        dataset, world_size, rank, seed=seed, batch_size=batch_size, repeats=repeats
    )
    images_per_step = world_size * batch_size * accumulate_steps
    sampler.load_state_dict({"position": start_step * images_per_step})
    num_batches = None if steps is None else (steps - start_step) * accumulate_steps
    batches = EndlessBatchSampler(sampler, num_batches=num_batches)
    return BatchLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        timeout=timeout,
        pin_memory=pin_memory,
    )


def val_loader(
    dataset: Coco2MaskDataset,
    *,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    timeout: float | None = None,
    pin_memory: bool = False,
) -> "BatchLoader":
    """Loads this process' share of the images, one per batch; see `ValidationSampler`."""
    sampler = ValidationSampler(dataset, world_size, rank)
    batches = BatchSampler(sampler, batch_size=1, drop_last=False)
    return BatchLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        timeout=timeout,
        pin_memory=pin_memory,
    )


class BatchLoader:
    """A `DataLoader` that raises a `DataError` of a worker whole, and knows what it waits for."""

    def __init__(
        self,
        dataset: Coco2MaskDataset,
        *,
        batch_sampler: Sampler[list[Any]],
        num_workers: int,
        timeout: float | None = None,
        pin_memory: bool = False,
    ) -> None:
        """Prepares loading; workers start with the first iteration or before it, and persist.

        Args:
            dataset: Of the samples.
            batch_sampler: Gives, for each batch, the list of keys of its samples.
            num_workers: Worker processes, no more than there are cores; 0 loads in this process.
            timeout: Seconds that the workers may take for a batch; None: no limit.
            pin_memory: Whether batches lie in page-locked memory, from which a GPU copies without
                being waited for. Allocating it makes a CUDA context, so not for a CPU.
        """
        num_workers = min(num_workers, usable_cores())
        self.dataset, self.num_workers = dataset, num_workers
        self._started: Iterator[Any] | None = None
        self.requested = _TrackingSampler(batch_sampler)
        self.loader = DataLoader(
            _ErrorReturningDataset(dataset),
            batch_sampler=self.requested,
            num_workers=num_workers,
            timeout=timeout if timeout and num_workers else 0,
            collate_fn=_collate_or_return_error,
            worker_init_fn=init_worker,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
            # Otherwise the loader draws a seed from the global generator, that of the model.
            generator=torch.Generator().manual_seed(0),
        )

    def start_workers(self) -> None:
        """Starts the workers now, which load the first batches of the next iteration."""
        if self.num_workers and self._started is None:
            self._started = iterate_loader(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        batches, self._started = self._started, None
        if batches is None:
            batches = iterate_loader(self.loader)
        # A weak reference: the heartbeat is global, and must not keep a loader and its workers
        # alive after their last use.
        waiting_for = weakref.WeakMethod(self.waiting_for)
        while True:
            heartbeat.set_loading(lambda: method() if (method := waiting_for()) else [])
            batch = next_item(batches)
            if batch is END:
                return
            self.requested.pending.popleft()
            if isinstance(batch, DataError):
                raise batch
            yield batch

    def waiting_for(self) -> list[str]:
        """File names of the images that are being loaded, those of the next batch first."""
        batches = list(self.requested.pending)[: max(self.num_workers, 1)]
        keys = [key for batch in batches for key in batch]
        rows = [key.row if isinstance(key, SampleKey) else key for key in keys]
        return [self.dataset.subset.file_name(row) for row in rows]

    def __len__(self) -> int:
        return len(self.loader)


class _TrackingSampler(Sampler[list[Any]]):
    # A batch sampler that remembers the batches that were requested and have not arrived yet.
    # Batches arrive in the order of their requests.
    def __init__(self, batch_sampler: Sampler[list[Any]]) -> None:
        self.batch_sampler, self.pending = batch_sampler, collections.deque[list[Any]]()

    def __iter__(self) -> Iterator[list[Any]]:
        self.pending.clear()
        for keys in self.batch_sampler:
            self.pending.append(keys)
            yield keys

    def __len__(self) -> int:
        return len(self.batch_sampler)  # type: ignore[arg-type]  # endless ones have no length


class _ErrorReturningDataset(Dataset[Sample | DataError]):
    # What a worker raises, DataLoader turns into the text of a traceback; what it returns arrives
    # unchanged.
    def __init__(self, dataset: Coco2MaskDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: int | SampleKey) -> Sample | DataError:
        try:
            return self.dataset[key]
        except DataError as error:
            return error


def _collate_or_return_error(items: list[Sample | DataError]) -> Batch | DataError:
    errors = [item for item in items if isinstance(item, DataError)]
    return errors[0] if errors else collate([item for item in items if isinstance(item, Sample)])


def init_worker(worker: int) -> None:
    """Sets up a worker process, as a `worker_init_fn`: one thread, and no end by signals."""
    die_with_parent()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    # In a process group of its own, so that a signal to the group of the run (Ctrl-C, a scheduler's
    # warning) reaches the main process only, which finishes its step with the workers alive.
    os.setpgid(0, 0)
    # Some schedulers signal every process of a job. A worker that ended then would end the run
    # before it has saved. The workers end with the main process, or are killed by it.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


# The worker processes that samft's loaders have started, until multiprocessing has joined them.
_WORKERS: weakref.WeakSet[BaseProcess] = weakref.WeakSet()


def iterate_loader(loader: DataLoader[Any]) -> Iterator[Any]:
    """`iter(loader)`, for loaders whose workers are set up by `init_worker`.

    Such workers ignore SIGTERM, so at the exit of the interpreter multiprocessing would wait for
    them for ever. Those that are alive then, and no other children of the process, are killed.
    """
    iterator = iter(loader)
    if workers := getattr(iterator, "_workers", None):
        _WORKERS.update(workers)
        _register_exit_hook(os.getpid())
        # Weak: the loader ends its workers when the last reference to the iterator is gone.
        wait = functools.partial(_wait_for_data, weakref.ref(iterator))
        iterator._try_get_data = wait  # type: ignore[attr-defined]
    return iterator


def _wait_for_data(iterator: "weakref.ref[Any]", timeout: float = POLL_SECONDS) -> tuple[bool, Any]:
    # In place of a method of PyTorch's iterator that waits without a look for signals.
    deadline = time.monotonic() + timeout
    while True:
        check_wait()
        left = deadline - time.monotonic()
        owner = iterator()
        assert owner is not None
        arrived, data = type(owner)._try_get_data(owner, max(0.0, min(left, POLL_SECONDS)))
        if arrived or left <= POLL_SECONDS:
            return arrived, data


END = object()


def next_item(iterator: Iterator[Any]) -> Any:
    """The next item from `iterate_loader`; `END` after the last.

    Raises:
        StopInterrupt: In an `interruptible` block, if the process is to stop.
    """
    if getattr(iterator, "_workers", None):
        return next(iterator, END)
    return call_interruptibly(lambda: next(iterator, END))


@functools.cache
def _register_exit_hook(_pid: int) -> None:
    # Once per process: a fork does not inherit the workers, and may start its own. At exit,
    # multiprocessing calls its finalizers before it waits for children, and after PyTorch has asked
    # persistent workers to end.
    Finalize(None, _kill_workers, exitpriority=0)


@contextlib.contextmanager
def ending_workers() -> Iterator[None]:
    """Leaves no worker of a loader that was iterated within, also after an error."""
    before = set(_WORKERS)
    try:
        yield
    finally:
        gc.collect()  # PyTorch ends those of loaders that nothing refers to any more
        _kill_workers([worker for worker in _WORKERS if worker not in before])


def _kill_workers(started: Iterable[BaseProcess] = _WORKERS) -> None:
    workers = [worker for worker in started if worker.is_alive()]
    if not workers:
        return
    # PyTorch's handler of this signal would raise an error for each of them.
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()
    if handler is not None:  # None: the handler was not installed from Python
        signal.signal(signal.SIGCHLD, handler)


def prefetch_to_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Moves batches to a device, one ahead: a GPU copies the next one while it computes.

    The copy is asynchronous only from page-locked memory, as `BatchLoader` gives it.

    Args:
        batches: From a loader.
        device: The device to move them to.

    Yields:
        The same batches, on the device.

    Raises:
        UserError: Raised by the loader, after the batches before it have been yielded.
    """
    transfers, source = Transfers(device), iter(batches)
    receive: Callable[[], Batch] | None = None
    while True:
        receive_next, error = None, None
        try:
            if (batch := next(source, None)) is not None:
                receive_next = transfers.to_device(batch)
        except UserError as caught:
            error = caught
        if receive is not None:
            yield receive()
        if error is not None:
            raise error
        if receive_next is None:
            return
        receive = receive_next


def fetch_batches(
    stream: Iterator[Batch], count: int, waiting: Waiting
) -> tuple[list[Batch], UserError | None]:
    """The next batches. A user's error is returned instead of raised, for all ranks to agree on.

    Args:
        stream: Of a loader.
        count: How many.
        waiting: Entered for the wait. If it raises `StopInterrupt`, no batches are returned.
    """
    try:
        with waiting():
            return list(islice(stream, count)), None
    except StopInterrupt:  # the caller agrees with the other ranks on stopping
        return [], None
    except UserError as error:  # a broken image, for example, which the other ranks do not know of
        return [], error


def lockstep(
    batches: Iterable[Batch],
    *,
    should_stop: Callable[[], bool] = lambda: False,
    waiting: Waiting = contextlib.nullcontext,
) -> Iterator[Batch]:
    """This rank's batches, one at a time on all ranks together. Collective: every rank must call.

    Ranks may have different numbers of batches: one that has none left waits for the others.

    Args:
        batches: Of a loader.
        should_stop: Called before each batch on every rank; all stop if it is true on any.
        waiting: See `fetch_batches`.

    Yields:
        The batches of this rank.

    Raises:
        StopInterrupt: A rank was asked to stop.
        UserError: An image cannot be read, on any rank.
    """
    stream = iter(batches)
    while True:
        fetched, error = fetch_batches(stream, 1, waiting)
        flags = torch.tensor([len(fetched), int(should_stop()), int(error is not None)])
        num_fetched, num_stopped, num_failed = all_reduce_sum(flags, in_step=True).tolist()
        if num_failed:
            raise_on_all_ranks(error)
        if num_stopped:
            raise StopInterrupt
        if not num_fetched:
            return
        yield from fetched


def masks_per_image(dataset: Coco2MaskDataset) -> NDArray[np.int64]:
    """Number of objects in a sample of each image; in training, at most `max_masks_per_image`."""
    counts = np.diff(dataset.subset.first_object).astype(np.int64)
    most = dataset.max_masks_per_image if dataset.training else 0
    return np.minimum(counts, most) if most else counts


def batch_by_objects(dataset: Coco2MaskDataset, batch_size: int, *, share: float) -> Batch:
    """A batch of images at a quantile of the number of objects per image.

    Args:
        dataset: Of the images.
        batch_size: Number of images; with fewer in the dataset, some are repeated.
        share: The share of images with fewer objects: 0.5 gives a usual batch, 1 the largest.

    Raises:
        DataError: An image cannot be read.
    """
    rows = np.argsort(masks_per_image(dataset), kind="stable")
    first = round(share * max(len(rows) - batch_size, 0))
    chosen = np.resize(rows[first : first + batch_size], batch_size)
    return collate([dataset[0, int(row), copy] for copy, row in enumerate(chosen)])
