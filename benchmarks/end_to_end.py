"""Epochs on a dataset, loader included: the plain recipe beside samft."""

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

from benchmarks.baseline import PlainDataset, PlainTrainer, plain_loader
from benchmarks.measure import AGAIN, Effort, PhaseClock, now, ratios, table
from benchmarks.scopes import Result, make_ready, phase_table
from benchmarks.variants import CACHED, PLAIN, PLAIN_AMP, SAMFT, Variants
from samft.coco.layout import find_split
from samft.coco.subset import read_coco
from samft.data.dataset import Coco2MaskDataset
from samft.data.loaders import train_loader
from samft.demo import write_demo
from samft.embeddings.precompute import Precompute
from samft.embeddings.split_cache import SplitCache, read_digests
from samft.embeddings.store import Store

# Starts a loader; the batches, and what takes a step with one.
Run: TypeAlias = Callable[[], tuple[Iterator[Any], Callable[[Any], Any]]]

_PHASE_STEPS = 2


@dataclass(frozen=True)
class Material:
    """A dataset as both kinds of loaders see it."""

    name: str
    own: Coco2MaskDataset
    plain: PlainDataset


def open_material(
    data_root: Path,
    split: str,
    *,
    image_size: int,
    num_images: int,
    max_masks: int,
    augment: str,
    cache: Path,
) -> Material:
    """The first images of a split; each loader draws at most `max_masks` objects of an image."""
    annotations, folder = find_split(data_root, split)
    subset = read_coco(annotations, folder, cache=cache)
    subset = subset.select(range(min(num_images, subset.num_images)))
    objects = [
        (subset.image_id(i), subset.index.object_ids[subset.objects_of(i)].tolist())
        for i in range(subset.num_images)
    ]
    with contextlib.redirect_stdout(sys.stderr):  # its chatter would spoil the tables
        coco = COCO(annotations)
    own = Coco2MaskDataset(
        folder,
        subset=subset,
        image_size=image_size,
        training=True,
        max_masks_per_image=max_masks,
        augment=augment,
    )
    plain = PlainDataset(coco, folder, objects=objects, image_size=image_size, max_masks=max_masks)
    return Material(data_root.name, own, plain)


def measure_epochs(
    wardrobe: Variants,
    *,
    data_root: Path | None,
    split: str,
    num_images: int,
    epochs: int,
    num_workers: int,
    augment: str,
    names: Sequence[str],
    effort: Effort,
) -> Result:
    """Seconds of each epoch; every round starts the loaders, and the cache, afresh."""
    setting = wardrobe.setting
    with tempfile.TemporaryDirectory() as scratch:
        if data_root is None:
            data_root = Path(scratch, "demo")
            write_demo(data_root, num_train=num_images + 2, num_val=3, size=_demo_size(wardrobe))
        material = open_material(
            data_root,
            split,
            image_size=setting.image_size,
            num_images=num_images,
            max_masks=setting.boxes,
            augment=augment,
            cache=Path(scratch, "cache"),
        )
        shape = {"epochs": epochs, "steps": _steps_in_epoch(material, setting.num_images)}
        runs = _runs(wardrobe, material, num_workers=num_workers, folder=Path(scratch), **shape)
        runs = {name: runs[name] for name in names if name in runs}
        for name in runs:
            make_ready(wardrobe, name)
        again = [AGAIN] if AGAIN in names else []
        seconds: dict[str, list[list[float]]] = {name: [] for name in [*runs, *again]}
        for _ in range(effort.rounds):
            for name in seconds:
                run = runs[PLAIN if name == AGAIN else name]
                seconds[name].append(_time_epochs(run, device=setting.device, **shape))
        phases = {name: _time_phases(wardrobe, name, run=run) for name, run in runs.items()}
    images = _steps_in_epoch(material, setting.num_images) * setting.num_images
    mode = "frozen" if setting.frozen else "full"
    head = (
        f"| end to end, {mode}, {material.name}, {images} images, {setting.image_size} px "
        "| first epoch, s | later, s | images/s | faster, first | faster, later | in all |"
    )
    rows = [_row(name, seconds, images=images) for name in seconds]
    text = f"{table(head, rows)}\n\n{phase_table(phases)}"
    return Result(text, {"mode": mode, "seconds": seconds, "phases": phases, "images": images})


def _demo_size(wardrobe: Variants) -> int:
    # As large as the model's input, so that decoding and resizing have their usual share.
    return max(64, min(wardrobe.setting.image_size, 1024))


def _steps_in_epoch(material: Material, batch_size: int) -> int:
    return len(material.plain) // batch_size


def _runs(
    wardrobe: Variants,
    material: Material,
    *,
    epochs: int,
    steps: int,
    num_workers: int,
    folder: Path,
) -> dict[str, Run]:
    batch_size = wardrobe.setting.num_images

    def plain(trainer: PlainTrainer) -> Run:
        return lambda: (
            itertools.chain.from_iterable(
                plain_loader(material.plain, batch_size=batch_size) for _ in range(epochs)
            ),
            trainer.train_step,
        )

    def own(dataset: Coco2MaskDataset) -> tuple[Iterator[Any], Callable[[Any], Any]]:
        loader = train_loader(
            dataset, batch_size=batch_size, steps=epochs * steps, num_workers=num_workers
        )
        return iter(loader), lambda batch: wardrobe.samft.train_step([batch])

    def cached() -> tuple[Iterator[Any], Callable[[Any], Any]]:
        fresh = Path(tempfile.mkdtemp(dir=folder))
        return own(with_embeddings(material.own, wardrobe, fresh, num_workers=num_workers))

    runs = {PLAIN: plain(wardrobe.plain)}
    if wardrobe.setting.device.type == "cuda":
        runs[PLAIN_AMP] = plain(wardrobe.plain_amp)
    runs[SAMFT] = lambda: own(material.own)
    return {**runs, CACHED: cached} if wardrobe.setting.frozen else runs


def with_embeddings(
    dataset: Coco2MaskDataset, wardrobe: Variants, folder: Path, *, num_workers: int
) -> Coco2MaskDataset:
    """A copy of the dataset that reads embeddings, which are encoded now, as `samft.train` does."""
    model, trainer = wardrobe.samft.model, wardrobe.samft
    sides = ("as it is",) if dataset.augment == "none" else ("as it is", "flipped")
    stores = tuple(
        Store(folder / name, shape=model.embedding_shape, dtype="float16") for name in sides
    )
    for store in stores:
        store.create({})
    options: dict[str, Any] = {"on_bad_image": "error", "should_stop": lambda: False}
    files = read_digests(dataset.subset, **options)
    assert files is not None
    split = SplitCache(copy.copy(dataset), trainer.amp_dtype, stores, files)
    split.look_up()
    Precompute(split, model, num_workers=num_workers, **options).run()
    split.attach()
    return split.dataset


def _time_epochs(run: Run, *, epochs: int, steps: int, device: torch.device) -> list[float]:
    times = [now(device)]
    batches, take = run()
    for _ in range(epochs):
        for _ in range(steps):
            take(next(batches))
        times.append(now(device))
    return [after - before for before, after in itertools.pairwise(times)]


def _time_phases(wardrobe: Variants, name: str, *, run: Run) -> dict[str, float]:
    # Of a few steps more: on a GPU, waiting after each phase would have slowed those above.
    clock = PhaseClock(wardrobe.setting.device)
    batches, take = run()
    take(next(batches))  # starts the workers
    fetch = clock.wrap(next, "data")
    with clock.watch(wardrobe.spans(name)):
        for _ in range(_PHASE_STEPS):
            take(fetch(batches))
    return {phase: spent / _PHASE_STEPS for phase, spent in clock.seconds.items()}


def _row(name: str, seconds: Mapping[str, list[list[float]]], *, images: int) -> str:
    own, plain = (
        [(e[0], statistics.mean(e[1:]), sum(e)) for e in seconds[n]] for n in (name, PLAIN)
    )
    first, later, _ = (statistics.median(column) for column in zip(*own, strict=True))
    faster = [
        ratios(reference, column)
        for reference, column in zip(zip(*plain, strict=True), zip(*own, strict=True), strict=True)
    ]
    return f"| {name} | {first:.2f} | {later:.2f} | {images / later:.3g} | {' | '.join(faster)} |"
