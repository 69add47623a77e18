"""Benchmark of whole epochs on a dataset, loader included: the baseline and samft."""

import contextlib
import copy
import itertools
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from pycocotools.coco import COCO

from benchmarks.baseline import BaselineDataset, BaselineTrainer, baseline_loader
from benchmarks.measure import (
    AGAIN,
    MeasureOptions,
    PhaseClock,
    now,
)
from benchmarks.step_benchmarks import BenchmarkResult, init_optimizer_state, phase_table
from benchmarks.tables import format_speedups, markdown_table
from benchmarks.variants import BASELINE, BASELINE_AMP, CACHED, SAMFT, Variants, Workload
from samft.coco.layout import find_split
from samft.coco.subset import read_coco
from samft.data.dataset import Coco2MaskDataset
from samft.data.loaders import train_loader
from samft.demo import write_demo
from samft.embeddings.precompute import EncodingPass
from samft.embeddings.split_cache import SplitCache, hash_images
from samft.embeddings.store import EmbeddingStore

# Starts a loader; returns its batches, and the function that takes a step with one.
StartTraining: TypeAlias = Callable[[], tuple[Iterator[Any], Callable[[Any], Any]]]

_PHASE_STEPS = 2  # over which phases are averaged


@dataclass(frozen=True)
class DatasetPair:
    """The same images as datasets of samft and of the baseline."""

    name: str
    samft: Coco2MaskDataset
    baseline: BaselineDataset


def open_datasets(
    data_root: Path,
    split: str,
    *,
    image_size: int,
    num_images: int,
    max_masks: int,
    augment: str,
    cache: Path,
) -> DatasetPair:
    """Opens the first images of a split, with at most `max_masks` random objects of an image."""
    annotations, folder = find_split(data_root, split)
    subset = read_coco(annotations, folder, cache=cache)
    subset = subset.select(range(min(num_images, subset.num_images)))
    objects = [
        (subset.image_id(i), subset.index.object_ids[subset.objects_of(i)].tolist())
        for i in range(subset.num_images)
    ]
    with contextlib.redirect_stdout(
        sys.stderr
    ):  # COCO prints its progress, and stdout is for the tables
        coco = COCO(annotations)
    samft = Coco2MaskDataset(
        folder,
        subset=subset,
        image_size=image_size,
        training=True,
        max_masks_per_image=max_masks,
        augment=augment,
    )
    baseline = BaselineDataset(
        coco, folder, objects=objects, image_size=image_size, max_masks=max_masks
    )
    return DatasetPair(data_root.name, samft, baseline)


def measure_epochs(
    variants: Variants,
    *,
    data_root: Path | None,
    split: str,
    num_images: int,
    epochs: int,
    num_workers: int,
    augment: str,
    names: Sequence[str],
    options: MeasureOptions,
) -> BenchmarkResult:
    """Measures the seconds of each epoch; every round starts new loaders and an empty cache."""
    workload = variants.workload
    with tempfile.TemporaryDirectory() as scratch:
        if data_root is None:
            data_root = Path(scratch, "demo")
            write_demo(data_root, num_train=num_images + 2, num_val=3, size=_demo_size(workload))
        datasets = open_datasets(
            data_root,
            split,
            image_size=workload.image_size,
            num_images=num_images,
            max_masks=workload.boxes,
            augment=augment,
            cache=Path(scratch, "cache"),
        )
        shape = {"epochs": epochs, "steps": _steps_per_epoch(datasets, workload.num_images)}
        runs = _training_runs(
            variants, datasets, num_workers=num_workers, folder=Path(scratch), **shape
        )
        runs = {name: runs[name] for name in names if name in runs}
        for name in runs:
            init_optimizer_state(variants, name)
        again = [AGAIN] if AGAIN in names else []
        seconds: dict[str, list[list[float]]] = {name: [] for name in [*runs, *again]}
        for _ in range(options.rounds):
            for name in seconds:
                run = runs[BASELINE if name == AGAIN else name]
                seconds[name].append(_time_epochs(run, device=workload.device, **shape))
        phases = {name: _time_phases(variants, name, start=run) for name, run in runs.items()}
    images = shape["steps"] * workload.num_images
    mode = "frozen" if workload.frozen else "full"
    head = (
        f"| end to end, {mode}, {datasets.name}, {images} images, {workload.image_size} px "
        "| first epoch, s | later, s | images/s | faster, first | faster, later | in all |"
    )
    rows = [_epoch_row(name, seconds, images=images) for name in seconds]
    text = f"{markdown_table(head, rows)}\n\n{phase_table(phases)}"
    return BenchmarkResult(
        text, {"mode": mode, "seconds": seconds, "phases": phases, "images": images}
    )


def _demo_size(workload: Workload) -> int:
    # As large as the model's input, so that decoding and resizing take their usual share.
    return max(64, min(workload.image_size, 1024))


def _steps_per_epoch(datasets: DatasetPair, batch_size: int) -> int:
    return len(datasets.baseline) // batch_size


def _training_runs(
    variants: Variants,
    datasets: DatasetPair,
    *,
    epochs: int,
    steps: int,
    num_workers: int,
    folder: Path,
) -> dict[str, StartTraining]:
    batch_size = variants.workload.num_images

    def baseline(trainer: BaselineTrainer) -> StartTraining:
        return lambda: (
            itertools.chain.from_iterable(
                baseline_loader(datasets.baseline, batch_size=batch_size) for _ in range(epochs)
            ),
            trainer.train_step,
        )

    def samft(dataset: Coco2MaskDataset) -> tuple[Iterator[Any], Callable[[Any], Any]]:
        loader = train_loader(
            dataset,
            batch_size=batch_size,
            steps=epochs * steps,
            num_workers=num_workers,
            pin_memory=variants.workload.device.type == "cuda",
        )
        return iter(loader), lambda batch: variants.samft.train_step([batch])

    def cached() -> tuple[Iterator[Any], Callable[[Any], Any]]:
        cache = Path(tempfile.mkdtemp(dir=folder))
        return samft(with_embeddings(datasets.samft, variants, cache, num_workers=num_workers))

    runs = {BASELINE: baseline(variants.baseline)}
    if variants.workload.device.type == "cuda":
        runs[BASELINE_AMP] = baseline(variants.baseline_amp)
    runs[SAMFT] = lambda: samft(datasets.samft)
    return {**runs, CACHED: cached} if variants.workload.frozen else runs


def with_embeddings(
    dataset: Coco2MaskDataset, variants: Variants, folder: Path, *, num_workers: int
) -> Coco2MaskDataset:
    """Fills an embedding cache as `samft.train` does; returns a dataset that reads from it."""
    model, trainer = variants.samft.model, variants.samft
    sides = ("as it is",) if dataset.augment == "none" else ("as it is", "flipped")
    stores = tuple(
        EmbeddingStore(folder / name, shape=model.embedding_shape, dtype="float16")
        for name in sides
    )
    for store in stores:
        store.create({})
    options: dict[str, Any] = {"on_bad_image": "error", "should_stop": lambda: False}
    files = hash_images(dataset.subset, **options)
    assert files is not None
    split = SplitCache(copy.copy(dataset), trainer.amp_dtype, stores, files)
    split.find_missing()
    EncodingPass(split, model, num_workers=num_workers, **options).run()
    split.attach_to_dataset()
    return split.dataset


def _time_epochs(
    start: StartTraining, *, epochs: int, steps: int, device: torch.device
) -> list[float]:
    times = [now(device)]
    batches, take_step = start()
    for _ in range(epochs):
        for _ in range(steps):
            take_step(next(batches))
        times.append(now(device))
    return [after - before for before, after in itertools.pairwise(times)]


def _time_phases(variants: Variants, name: str, *, start: StartTraining) -> dict[str, float]:
    # On further steps: on a GPU, the synchronization after each phase slows steps down.
    clock = PhaseClock(variants.workload.device)
    batches, take_step = start()
    take_step(next(batches))  # starts the workers
    fetch = clock.wrap_function(next, "data")
    with clock.watch(variants.spans(name)):
        for _ in range(_PHASE_STEPS):
            take_step(fetch(batches))
    return {phase: spent / _PHASE_STEPS for phase, spent in clock.seconds.items()}


def _epoch_row(name: str, seconds: Mapping[str, list[list[float]]], *, images: int) -> str:
    columns, reference = (_epoch_columns(seconds[each]) for each in (name, BASELINE))
    first, later, _ = (statistics.median(column) for column in columns)
    speedups = [
        format_speedups(expected, column)
        for expected, column in zip(reference, columns, strict=True)
    ]
    return f"| {name} | {first:.2f} | {later:.2f} | {images / later:.3g} | {' | '.join(speedups)} |"


def _epoch_columns(rounds: Sequence[Sequence[float]]) -> list[list[float]]:
    # Seconds of the first epoch, of a later one, and of all, each by round.
    return [
        [epochs[0] for epochs in rounds],
        [statistics.mean(epochs[1:]) for epochs in rounds],
        [sum(epochs) for epochs in rounds],
    ]
