"""The measurements of `benchmarks.scale`: loader, checkpoints, all-reduce, runs on 1 and 2 ranks.

Everything runs on the CPU with one thread per process; ranks use gloo on one host.
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

from benchmarks.measure import MeasureOptions, PhaseClock, PhaseSpan, time_interleaved
from benchmarks.variants import (
    SAMFT,
    Variants,
    Workload,
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
MAX_MASKS = 8  # per image
_TIMEOUT = timedelta(seconds=300)
_LOOP_SPANS: list[PhaseSpan] = [
    (engine, "fetch_batches", "data"),
    (engine, "any_rank", "waiting"),
    (engine, "all_reduce_sum", "waiting"),
]


@dataclass(frozen=True)
class TrainingJob:
    """A short training with the same global batch on any number of ranks."""

    data_root: str
    cache: str
    model_type: str
    image_size: int
    global_batch: int
    steps: int

    def dataset(self, split: str = "train") -> Coco2MaskDataset:
        """The dataset of `samft.train`, except for the number of objects."""
        annotations, folder = find_split(Path(self.data_root), split)
        return Coco2MaskDataset(
            folder,
            subset=read_coco(annotations, folder, cache=Path(self.cache)),
            image_size=self.image_size,
            training=split == "train",
            max_masks_per_image=MAX_MASKS,
        )

    def workload(self, num_images: int) -> Workload:
        """A synthetic batch of the same model with this number of images."""
        return Workload(self.model_type, self.image_size, num_images, MAX_MASKS, False, CPU)


@dataclass(frozen=True)
class RankReport:
    """The measurements of one rank.

    Attributes:
        losses: Loss of each step, over all ranks.
        phases: Wall-clock seconds per step by phase.
        core_s: CPU seconds per step.
        launches: By step, when the all-reduce of the last gradients started; monotonic clock.
        arrivals: By step, when that all-reduce was complete.
    """

    losses: list[float]
    phases: dict[str, float]
    core_s: float
    launches: list[float]
    arrivals: list[float]

    @property
    def wall_s(self) -> float:
        """Wall-clock seconds per step."""
        return sum(self.phases.values())


# Constants.


def loader_seconds(job: TrainingJob, *, rounds: int) -> tuple[float, float]:
    """CPU seconds to load a training image, and the mean size of its file in MB."""
    dataset = job.dataset()
    batches = iter(train_loader(dataset, batch_size=1))
    count = len(dataset)
    seconds = _core_seconds(lambda: [next(batches) for _ in range(count)], rounds=rounds)
    num_bytes = [dataset.subset.path(i).stat().st_size for i in range(count)]
    return seconds / count, statistics.mean(num_bytes) / 1e6


def checkpoint_rate(model_type: str, *, rounds: int) -> float:
    """MB/s of writing a checkpoint to the temporary folder, fsync included."""
    state = build_sam(model_type).state_dict()
    size = sum(tensor.nbytes for tensor in state.values()) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.ckpt")
        return size / _wall_seconds(lambda: save_tensors(path, dict(state)), rounds=rounds)


def step_seconds(job: TrainingJob, num_images: int, *, rounds: int) -> float:
    """CPU seconds of a step on this number of images that are in memory already."""
    subset = job.dataset().subset
    masks = [min(len(subset.objects_of(i)), MAX_MASKS) for i in range(subset.num_images)]
    workload = replace(job.workload(num_images), boxes=round(statistics.mean(masks)))
    step = Variants(workload).step(SAMFT)
    return _core_seconds(step, rounds=rounds)


def validation_seconds(job: TrainingJob, *, rounds: int) -> float:
    """CPU seconds to load a validation image, with ground truth at the original resolution."""
    dataset = job.dataset("val")
    return _core_seconds(lambda: list(val_loader(dataset)), rounds=rounds) / len(dataset)


def _core_seconds(function: Callable[[], Any], *, rounds: int) -> float:
    # CPU seconds do not depend on other load; the first round warms up.
    seconds = []
    for _ in range(rounds + 1):
        start = time.process_time()
        function()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds[1:])


def _wall_seconds(function: Callable[[], Any], *, rounds: int) -> float:
    seconds = time_interleaved({"": function}, options=MeasureOptions(rounds), device=CPU)
    return statistics.median(seconds[""])


def reduce_rate(megabytes: int, rounds: int) -> float:
    """MB/s of an all-reduce over the group. Collective: every rank must call."""
    tensor = torch.ones(megabytes * 250_000)
    return megabytes / _wall_seconds(lambda: distributed.all_reduce(tensor), rounds=rounds)


# Ranks.


def run_on_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Runs a function on every rank of a new gloo group; returns its results by rank."""
    context = torch.multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        results = context.SimpleQueue()
        torch.multiprocessing.spawn(
            _run_rank, (world_size, folder, results, function, args), nprocs=world_size
        )
        pairs = [results.get() for _ in range(world_size)]
    return [value for _, value in sorted(pairs, key=lambda pair: pair[0])]


def _run_rank(
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


def run_job(job: TrainingJob) -> RankReport:
    """Trains twice, to record losses and to time steps. Collective: every rank must call."""
    losses: list[float] = []
    _train_job(job, on_interval=lambda metrics: losses.append(metrics["loss"]))
    clock, times = PhaseClock(CPU), _AllReduceTimes()
    core_s = _train_job(job, on_interval=lambda metrics: None, clock=clock, times=times) / job.steps
    phases = {phase: spent / job.steps for phase, spent in clock.seconds.items()}
    return RankReport(losses, phases, core_s, times.launches[1:], times.arrivals[1:])


class _AllReduceTimes:
    # By step, when the all-reduce of the last gradient bucket started and ended.
    def __init__(self) -> None:
        self.launches: list[float] = []
        self.arrivals: list[float] = []

    def communication_hook(
        self, state: object, bucket: distributed.GradBucket
    ) -> torch.futures.Future[Tensor]:
        gradients = bucket.buffer().div_(distributed.get_world_size())
        last = bucket.is_last()
        if last:
            self.launches.append(time.monotonic())
        future = distributed.all_reduce(gradients, async_op=True).get_future()

        def record_arrival(done: torch.futures.Future[list[Tensor]]) -> Tensor:
            if last:
                self.arrivals.append(time.monotonic())
            return done.value()[0]

        return future.then(record_arrival)


def _train_job(
    job: TrainingJob,
    *,
    on_interval: Callable[[dict[str, float]], None],
    clock: PhaseClock | None = None,
    times: _AllReduceTimes | None = None,
) -> float:
    rank, world_size = get_rank(), get_world_size()
    sam = random_sam(job.workload(job.global_batch), attention="fast")
    trainer = samft_trainer(PromptedSam(sam))
    if times is not None and world_size > 1:
        trainer.ddp_model.register_comm_hook(None, times.communication_hook)  # type: ignore[operator]
    batch_size = job.global_batch // world_size
    loader = train_loader(job.dataset(), batch_size=batch_size, rank=rank, world_size=world_size)
    train_steps = partial(
        train,
        trainer,
        iter(loader),
        accumulate_steps=1,
        should_stop=lambda: False,
        on_step=lambda taken, image_ids: None,
        on_interval=on_interval,
    )
    if clock is None:
        train_steps(steps=job.steps, interval=1)
        return 0.0
    train_steps(steps=1, interval=2)  # allocations and worker starts of the first step
    start = time.process_time()
    with clock.watch([*samft_spans(trainer), *_LOOP_SPANS]):
        train_steps(steps=job.steps + 1, interval=job.steps + 2)
    return time.process_time() - start
