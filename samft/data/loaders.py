"""Batches on the device before they are asked for, and waiting for them.

Batches that any number of processes can share and resume, and workers that load them.
"""

import collections
import contextlib
import functools
import os
import signal
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
from samft.distributed import all_reduce_sum, raise_on_all_ranks
from samft.errors import DataError, UserError
from samft.runtime import heartbeat
from samft.runtime.signals import STOP_SIGNALS, StopInterrupt, die_with_parent

Waiting = Callable[[], contextlib.AbstractContextManager[None]]


def prefetch_to_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
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


def fetch_batches(
    stream: Iterator[Batch], count: int, waiting: Waiting
) -> tuple[list[Batch], UserError | None]:
    """The next batches, or the user's error that came in their place, for other ranks to hear of.

    Args:
        stream: Of a loader.
        count: How many.
        waiting: Entered for the wait; raises `StopInterrupt` to end it, and then there are none.
    """
    try:
        with waiting():
            return list(islice(stream, count)), None
    except StopInterrupt:  # whoever asked for the batches is about to ask whether to stop
        return [], None
    except UserError as error:  # say, a broken image: the other ranks must hear of it
        return [], error


def lockstep(
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
        waiting: See `fetch_batches`.

    Yields:
        The batches of this rank.

    Raises:
        StopInterrupt: Any rank was asked to stop.
        UserError: An image cannot be read, on any rank.
    """
    stream = iter(batches)
    while True:
        fetched, error = fetch_batches(stream, 1, waiting)
        flags = torch.tensor([len(fetched), int(should_stop()), int(error is not None)])
        more, stopped, failed = all_reduce_sum(flags, in_step=True).tolist()
        if failed:
            raise_on_all_ranks(error)
        if stopped:
            raise StopInterrupt
        if not more:
            return
        yield from fetched


class _ErrorReturningDataset(Dataset[Sample | DataError]):
    # A loader makes a traceback's text of what a worker raises; what is returned stays whole.
    def __init__(self, dataset: Coco2MaskDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: int | SampleKey) -> Sample | DataError:
        try:
            return self.dataset[key]
        except DataError as error:
            return error


def _collate_or_error(items: list[Sample | DataError]) -> Batch | DataError:
    errors = [item for item in items if isinstance(item, DataError)]
    return errors[0] if errors else collate([item for item in items if isinstance(item, Sample)])


class _TrackingSampler(Sampler[list[Any]]):
    # Remembers the batches, as lists of keys, that were asked for and have not come back yet.
    def __init__(self, batch_sampler: Sampler[list[Any]]) -> None:
        self.batch_sampler, self.out = batch_sampler, collections.deque[list[Any]]()

    def __iter__(self) -> Iterator[list[Any]]:
        self.out.clear()
        for keys in self.batch_sampler:
            self.out.append(keys)
            yield keys

    def __len__(self) -> int:
        return len(self.batch_sampler)  # type: ignore[arg-type]  # endless ones have no length


class BatchLoader:
    """Iterates over batches; a worker's `DataError` (an image is broken, say) is raised whole."""

    def __init__(
        self,
        dataset: Coco2MaskDataset,
        *,
        batch_sampler: Sampler[list[Any]],
        num_workers: int,
        timeout: float | None = None,
    ) -> None:
        self.dataset, self.num_workers = dataset, num_workers
        self.handed = _TrackingSampler(batch_sampler)
        self.loader = DataLoader(
            _ErrorReturningDataset(dataset),
            batch_sampler=self.handed,
            num_workers=num_workers,
            timeout=timeout if timeout and num_workers else 0,
            collate_fn=_collate_or_error,
            worker_init_fn=init_worker,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(0),  # or it draws from the model's generator
        )

    def __iter__(self) -> Iterator[Batch]:
        batches = iterate_loader(self.loader)
        # Weakly: the heartbeat must not keep a loader, and so its workers, after its last use.
        waiting_for = weakref.WeakMethod(self.waiting_for)
        while True:
            heartbeat.set_loading(lambda: method() if (method := waiting_for()) else [])
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.handed.out.popleft()
            if isinstance(batch, DataError):
                raise batch
            yield batch

    def waiting_for(self) -> list[str]:
        """File names of the images that are being loaded, those of the next batch first."""
        batches = list(self.handed.out)[: max(self.num_workers, 1)]
        keys = [key for batch in batches for key in batch]
        rows = [key.row if isinstance(key, SampleKey) else key for key in keys]
        return [self.dataset.subset.file_name(row) for row in rows]

    def __len__(self) -> int:
        return len(self.loader)


def init_worker(worker: int) -> None:
    """Sets up a loader's worker process: one thread, not in the run's group, gone with the run."""
    die_with_parent()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    # In a group of its own, a signal to the run's group (Ctrl-C, a scheduler's warning) reaches the
    # main process only, which finishes its step with the workers alive and then stops them.
    os.setpgid(0, 0)
    # Some schedulers signal every process of a job. A worker that ended of it would take the run
    # with it before the run has saved; it ends with the run, and is killed if it does not.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


# The worker processes that loaders of samft have started and that have not been joined yet.
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
    return iterator


@functools.cache
def _register_exit_hook(_pid: int) -> None:
    # Once per process: a fork has no workers of its parent, and may start its own. multiprocessing
    # calls its finalizers first of all at exit, before it waits for children, and after PyTorch has
    # asked persistent workers to end.
    Finalize(None, _kill_workers, exitpriority=0)


def _kill_workers() -> None:
    workers = [worker for worker in _WORKERS if worker.is_alive()]
    if not workers:
        return
    # PyTorch's handler of this signal would raise an error for each of them.
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()
    if handler is not None:  # the handler was not installed from Python
        signal.signal(signal.SIGCHLD, handler)


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
) -> BatchLoader:
    """Loads this process' micro-batches, step after step.

    Args:
        dataset: In training mode.
        batch_size: Images per process and micro-batch.
        accumulate_steps: Micro-batches per step.
        start_step: Steps that a run has used the images of already, with as many images per step.
        steps: The step to end before; None: endless.
        num_workers: Processes that load.
        rank: Of this process.
        world_size: Number of processes.
        seed: Of the order, see `TrainingSampler`.
        repeats: [len(dataset)], how many times each image comes in an epoch.
        timeout: Seconds that a worker may take for a batch; None: no limit.
    """
    sampler = TrainingSampler(
        dataset, world_size, rank, seed=seed, batch_size=batch_size, repeats=repeats
    )
    sampler.load_state_dict(
        {"position": start_step * accumulate_steps * batch_size * world_size},
    )
    num_batches = None if steps is None else (steps - start_step) * accumulate_steps
    batches = EndlessBatchSampler(sampler, num_batches=num_batches)
    return BatchLoader(dataset, batch_sampler=batches, num_workers=num_workers, timeout=timeout)


def val_loader(
    dataset: Coco2MaskDataset,
    *,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    timeout: float | None = None,
) -> BatchLoader:
    """Loads this process' share of the images, one per batch; see `ValidationSampler`."""
    sampler = ValidationSampler(dataset, world_size, rank)
    batches = BatchSampler(sampler, batch_size=1, drop_last=False)
    return BatchLoader(dataset, batch_sampler=batches, num_workers=num_workers, timeout=timeout)


def masks_per_image(dataset: Coco2MaskDataset) -> NDArray[np.int64]:
    """How many objects each image has that come in one sample."""
    counts = np.diff(dataset.subset.first_object).astype(np.int64)
    most = dataset.max_masks_per_image if dataset.training else 0
    return np.minimum(counts, most) if most else counts


def batch_by_objects(dataset: Coco2MaskDataset, batch_size: int, *, share: float) -> Batch:
    """A batch of images that have more objects than this share of all.

    Args:
        dataset: Of the images.
        batch_size: How many; some come again where there are fewer.
        share: 0.5 is usual, 1 the largest batch.

    Raises:
        DataError: An image cannot be read.
    """
    rows = np.argsort(masks_per_image(dataset), kind="stable")
    first = round(share * max(len(rows) - batch_size, 0))
    chosen = np.resize(rows[first : first + batch_size], batch_size)
    return collate([dataset[0, int(row), copy] for copy, row in enumerate(chosen)])
