"""What `benchmarks.scale` needs measured: loader, checkpoints, all-reduce, runs on 1 and 2 ranks.

Everything runs on the CPU, with one thread to a process; the ranks talk over gloo on one host.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor, distributed

from benchmarks.measure import Effort, PhaseClock, Span, interleave
from benchmarks.variants import (
    SAMFT,
    Setting,
    Variants,
    random_sam,
    samft_spans,
    samft_trainer,
)
from samft.checkpoints.top_k import save_tensors
from samft.coco.layout import find_split
from samft.coco.subset import read_coco
from samft.data.dataset import Coco2MaskDataset
from samft.data.loaders import train_loader, val_loader
from samft.distributed import get_rank, get_world_size
from samft.models.prompted_sam import PromptedSam
from samft.models.sam import build_sam
from samft.training import engine
from samft.training.engine import train

CPU = torch.device("cpu")
MAX_MASKS = 8  # of an image
_TIMEOUT = timedelta(seconds=300)
_LOOP_SPANS: list[Span] = [
    (engine, "fetch", "data"),
    (engine, "any_rank", "waiting"),
    (engine, "all_reduce_sum", "waiting"),
]


@dataclass(frozen=True)
class Job:
    """A training run: the same global batch on any number of ranks."""

    data_root: str
    cache: str
    model_type: str
    image_size: int
    global_batch: int
    steps: int

    def dataset(self, split: str = "train") -> Coco2MaskDataset:
        """As `samft.train` makes it, but for the number of objects."""
        annotations, folder = find_split(Path(self.data_root), split)
        return Coco2MaskDataset(
            folder,
            subset=read_coco(annotations, folder, cache=Path(self.cache)),
            image_size=self.image_size,
            training=split == "train",
            max_masks_per_image=MAX_MASKS,
        )

    def setting(self, num_images: int, *, frozen: bool = False) -> Setting:
        """A synthetic batch of as many images."""
        return Setting(self.model_type, self.image_size, num_images, MAX_MASKS, frozen, CPU)


@dataclass(frozen=True)
class Report:
    """What one rank saw.

    Attributes:
        losses: Of each step, over all ranks.
        phases: Seconds a step, in a run without anything between the steps.
        core_s: Of those, what this process had a core for.
        launches: Per step, when the last gradients were handed to the all-reduce; monotonic clock.
        arrivals: Per step, when their sum was there.
    """

    losses: list[float]
    phases: dict[str, float]
    core_s: float
    launches: list[float]
    arrivals: list[float]

    @property
    def wall_s(self) -> float:
        """Of a step, on the wall."""
        return sum(self.phases.values())


# Constants.


def loader_seconds(job: Job, *, rounds: int) -> tuple[float, float]:
    """Seconds of one core for a training image, and the mean size of its file in MB."""
    dataset = job.dataset()
    batches = iter(train_loader(dataset, batch_size=1))
    count = len(dataset)
    seconds = _core_seconds(lambda: [next(batches) for _ in range(count)], rounds=rounds)
    num_bytes = [dataset.subset.path(i).stat().st_size for i in range(count)]
    return seconds / count, statistics.mean(num_bytes) / 1e6


def checkpoint_rate(model_type: str, *, rounds: int) -> float:
    """MB/s at which rank 0 writes a checkpoint to where temporary files go, fsync included."""
    state = build_sam(model_type).state_dict()
    size = sum(tensor.nbytes for tensor in state.values()) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.ckpt")
        return size / _seconds(lambda: save_tensors(path, dict(state)), rounds=rounds)


def step_seconds(job: Job, num_images: int, *, rounds: int) -> float:
    """Seconds of one core for a step on so many images that are in memory already."""
    subset = job.dataset().subset
    masks = [min(len(subset.objects_of(i)), MAX_MASKS) for i in range(subset.num_images)]
    setting = replace(job.setting(num_images), boxes=round(statistics.mean(masks)))
    step = Variants(setting).step(SAMFT)
    return _core_seconds(step, rounds=rounds)


def validation_seconds(job: Job, *, rounds: int) -> float:
    """Seconds of one core for loading a validation image, its truth at the original resolution."""
    dataset = job.dataset("val")
    return _core_seconds(lambda: list(val_loader(dataset)), rounds=rounds) / len(dataset)


def _core_seconds(function: Callable[[], Any], *, rounds: int) -> float:
    # Of one core, however many others want it.
    found = []
    for _ in range(rounds + 1):
        start = time.process_time()
        function()
        found.append(time.process_time() - start)
    return statistics.median(found[1:])


def _seconds(function: Callable[[], Any], *, rounds: int) -> float:
    found = interleave({"": function}, effort=Effort(rounds), device=CPU)
    return statistics.median(found[""])


def reduce_rate(megabytes: int, rounds: int) -> float:
    """MB/s of gradients summed over the group; runs on every rank."""
    tensor = torch.ones(megabytes * 250_000)
    return megabytes / _seconds(lambda: distributed.all_reduce(tensor), rounds=rounds)


# Ranks.


def on_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Results of a function on every rank of a fresh gloo group, in the order of the ranks."""
    context = torch.multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        results = context.SimpleQueue()
        torch.multiprocessing.spawn(
            _serve, (world_size, folder, results, function, args), nprocs=world_size
        )
        found = [results.get() for _ in range(world_size)]
    return [value for _, value in sorted(found, key=lambda pair: pair[0])]


def _serve(
    rank: int, world_size: int, folder: str, results: Any, function: Callable[..., Any], args: Any
) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        rendezvous = Path(folder, "rendezvous").as_uri()
        distributed.init_process_group(
            "gloo", init_method=rendezvous, rank=rank, world_size=world_size, timeout=_TIMEOUT
        )
    try:
        results.put((rank, function(*args)))
    finally:
        if world_size > 1:
            distributed.destroy_process_group()


def run_job(job: Job) -> Report:
    """Trains, once to note the losses and once to time it; runs on every rank."""
    losses: list[float] = []
    _train(job, on_interval=lambda metrics: losses.append(metrics["loss"]))
    clock, marks = PhaseClock(CPU), _Marks()
    core_s = _train(job, on_interval=lambda metrics: None, clock=clock, marks=marks) / job.steps
    phases = {phase: spent / job.steps for phase, spent in clock.seconds.items()}
    return Report(losses, phases, core_s, marks.launches[1:], marks.arrivals[1:])


class _Marks:
    # When the last bucket of each step was handed over, and when it came back.
    def __init__(self) -> None:
        self.launches: list[float] = []
        self.arrivals: list[float] = []

    def hook(self, state: object, bucket: distributed.GradBucket) -> torch.futures.Future[Tensor]:
        gradients = bucket.buffer().div_(distributed.get_world_size())
        last = bucket.is_last()
        if last:
            self.launches.append(time.monotonic())
        future = distributed.all_reduce(gradients, async_op=True).get_future()

        def arrived(done: torch.futures.Future[list[Tensor]]) -> Tensor:
            if last:
                self.arrivals.append(time.monotonic())
            return done.value()[0]

        return future.then(arrived)


def _train(
    job: Job,
    *,
    on_interval: Callable[[dict[str, float]], None],
    clock: PhaseClock | None = None,
    marks: _Marks | None = None,
) -> float:
    rank, world_size = get_rank(), get_world_size()
    sam = random_sam(job.setting(job.global_batch), attention="fast")
    trainer = samft_trainer(PromptedSam(sam))
    if marks is not None and world_size > 1:
        trainer.ddp_model.register_comm_hook(None, marks.hook)  # type: ignore[operator]
    batch_size = job.global_batch // world_size
    loader = train_loader(job.dataset(), batch_size=batch_size, rank=rank, world_size=world_size)
    go = partial(
        train,
        trainer,
        iter(loader),
        accumulate_steps=1,
        should_stop=lambda: False,
        on_step=lambda taken, image_ids: None,
        on_interval=on_interval,
    )
    if clock is None:
        go(steps=job.steps, interval=1)
        return 0.0
    go(steps=1, interval=2)  # starts what only the first step has to start
    start = time.process_time()
    with clock.watch([*samft_spans(trainer), *_LOOP_SPANS]):
        go(steps=job.steps + 1, interval=job.steps + 2)
    return time.process_time() - start
