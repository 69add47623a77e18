"""Measures samft's training loader beside a plain one, with one worker each, and compares masks.

    python -m benchmarks.loader --data_root DIR --split train --image_size 1024 256

The plain loader is written after the recipe of the public SAM fine-tuners: the whole image decoded,
one full-size mask per object from pycocotools, image and every mask brought to the model's input by
segment_anything's own transform, normalised and padded. All loaders give the same images with all
of their objects. They take turns in every round, so that what else the machine does hits all.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from segment_anything.utils.transforms import ResizeLongestSide
from torch.utils.data import DataLoader

from benchmarks.baseline import PlainDataset, PlainSample
from benchmarks.index import open_pycocotools
from samft.coco.layout import find_split
from samft.coco.subset import read_coco
from samft.data.dataset import Coco2MaskDataset
from samft.data.loaders import train_loader
from samft.data.samplers import EndlessBatchSampler, TrainingSampler

Rounds: TypeAlias = dict[str, list[float]]  # seconds for each image, by loader
Agreement: TypeAlias = tuple[float, float, float]  # IoU of samft's mask with each of _REFERENCES

_WARM_UP = 4  # batches: the worker starts, and its queue fills
_SAMFT_EPOCHS = 4  # of the timed images, to one of the plain loaders, which take long enough
_SMALLEST = 32  # px at the loss resolution, longest side of the box
# Masks in whole pixels of the input leave many cells that belong to exactly one half. Wherever they
# are counted, all outlines move by an eighth of a cell, hence the third.
_REFERENCES = ("pycocotools' mask, averaged", "the plain loader's", "the same, halved cells aside")
_LOADERS = {
    "samft": "samft",
    "again": "samft, once more",
    "flip": "samft, augment flip",
    "uint8": "plain, uint8 masks",
    "float32": "plain, float32 masks",
}


def _only(samples: list[PlainSample]) -> PlainSample:
    return samples[0]


@dataclass(frozen=True)
class Subject:
    """A dataset at an image size: images to time, as both kinds of loaders see them."""

    name: str
    image_size: int
    still: Coco2MaskDataset
    flipping: Coco2MaskDataset
    plain: PlainDataset
    plain_float: PlainDataset
    agreement: list[Agreement]  # of each object that is compared, in all images

    @property
    def masks_per_image(self) -> float:
        """Mean over the images that are timed."""
        return statistics.mean(len(object_ids) for _, object_ids in self.plain.objects)


def make_subject(
    data_root: Path, split: str, *, image_size: int, num_images: int, cache: Path
) -> Subject:
    """Opens a dataset both ways, compares all masks, and picks images evenly to be timed."""
    annotations, folder = find_split(data_root, split)
    subset, coco = read_coco(annotations, folder, cache=cache), open_pycocotools(annotations)
    options: dict[str, Any] = {"image_size": image_size, "max_masks_per_image": 0, "training": True}
    everything = Coco2MaskDataset(folder, subset=subset, augment="none", **options)
    # What samft gives decides, so that both have the same objects.
    targets, objects = [], []
    for i in range(len(everything)):
        sample = everything[i]
        targets.append(np.packbits(sample.targets.numpy() >= 128, axis=-1))
        objects.append((sample.image_id, sample.object_ids.tolist()))
    plain = partial(PlainDataset, coco, folder, image_size=image_size)
    agreement: list[Agreement] = []
    for i, packed in enumerate(targets):
        own = plain(objects=objects[i : i + 1], mask_type=torch.uint8)
        agreement += _compare(own, np.unpackbits(packed, axis=-1).astype(bool))
    timed = np.unique(np.linspace(0, len(objects) - 1, num_images).astype(int)).tolist()
    subset, objects = subset.select(timed), [objects[i] for i in timed]
    return Subject(
        name=data_root.name,
        image_size=image_size,
        still=Coco2MaskDataset(folder, subset=subset, augment="none", **options),
        flipping=Coco2MaskDataset(folder, subset=subset, augment="flip", **options),
        plain=plain(objects=objects, mask_type=torch.uint8),
        plain_float=plain(objects=objects, mask_type=torch.float32),
        agreement=agreement,
    )


def _compare(plain: PlainDataset, targets: NDArray[np.bool_]) -> Iterable[Agreement]:
    # One image, at the loss resolution, where a mask is the cells that it has at least half of.
    image_id, object_ids = plain.objects[0]
    entries, image = plain.coco.loadAnns(object_ids), plain.coco.loadImgs(image_id)[0]
    side = plain.image_size // 4
    scale = side / max(image["height"], image["width"])
    compared = [k for k, e in enumerate(entries) if max(e["bbox"][2:]) * scale >= _SMALLEST]
    masks = plain[0].masks.numpy() if compared else np.zeros(0)
    for k in compared:
        averaged = _average(plain.coco.annToMask(entries[k]), side)
        cells = masks[k].reshape(side, 4, side, 4).sum(axis=(1, 3))
        yield (
            _iou(averaged >= 0.5 - 1e-9, targets[k]),
            _iou(cells >= 8, targets[k]),
            _iou((cells > 8)[cells != 8], targets[k][cells != 8]),
        )


def _iou(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    return float((one & other).sum() / max((one | other).sum(), 1))


def _average(mask: NDArray[np.uint8], side: int) -> NDArray[np.float64]:
    # Which share of each cell a mask of the whole image covers, to the last digit.
    frame = ResizeLongestSide.get_preprocess_shape(*mask.shape, 4 * side)
    rows, columns = (
        _overlaps(length, 4 * length / scaled, side=side)
        for length, scaled in zip(mask.shape, frame, strict=True)
    )
    return np.asarray(rows @ mask @ columns.T)


def _overlaps(length: int, cell: float, *, side: int) -> NDArray[np.float64]:
    # [side, length]: the share of each cell, `cell` pixels long, that each pixel makes up.
    edges, pixels = np.arange(side + 1)[:, None] * cell, np.arange(length)
    shared = np.minimum(edges[1:], pixels + 1) - np.maximum(edges[:-1], pixels)
    return np.asarray(np.clip(shared, 0, None) / cell)


def _seconds_per_image(loader: Iterable[Any], *, num_images: int) -> float:
    # The loader goes on for ever, so its queue is as full at the end as it was at the start.
    batches = iter(loader)
    for _ in itertools.islice(batches, _WARM_UP):
        pass
    start = time.perf_counter()
    for _ in itertools.islice(batches, num_images):
        pass
    return (time.perf_counter() - start) / num_images


def _samft_loader(dataset: Coco2MaskDataset) -> Iterable[Any]:
    return train_loader(dataset, batch_size=1, num_workers=1, start_step=_first(len(dataset)))


def _plain_loader(dataset: PlainDataset) -> Iterable[Any]:
    sampler = TrainingSampler(dataset)
    sampler.load_state_dict({"position": _first(len(dataset))})
    batches = EndlessBatchSampler(sampler)
    return DataLoader(dataset, batch_sampler=batches, num_workers=1, collate_fn=_only)


def _first(num_images: int) -> int:
    # So that what is timed are whole epochs, which hold each image once.
    return -_WARM_UP % num_images


def measure(subject: Subject, *, rounds: int) -> Rounds:
    """Seconds for an image with each loader, in every round."""
    loaders: dict[str, tuple[Callable[[], Iterable[Any]], int]] = {
        "samft": (lambda: _samft_loader(subject.still), _SAMFT_EPOCHS),
        "uint8": (lambda: _plain_loader(subject.plain), 1),
        "again": (lambda: _samft_loader(subject.still), _SAMFT_EPOCHS),
        "float32": (lambda: _plain_loader(subject.plain_float), 1),
        "flip": (lambda: _samft_loader(subject.flipping), _SAMFT_EPOCHS),
    }
    seconds: Rounds = {key: [] for key in loaders}
    for _ in range(rounds):
        for key, (start, epochs) in loaders.items():
            num_images = epochs * len(subject.plain)
            seconds[key].append(_seconds_per_image(start(), num_images=num_images))
    return seconds


def speed_rows(subject: Subject, seconds: Mapping[str, Sequence[float]]) -> list[str]:
    """Rows of a Markdown table: medians, and how much faster `samft` was round by round."""
    rows, masks = [], subject.masks_per_image
    for key, label in _LOADERS.items():
        own = seconds[key]
        speed = 1 / statistics.median(own)
        ratios = [other / one for one, other in zip(seconds["samft"], own, strict=True)]
        rows.append(
            f"| {subject.name} | {subject.image_size} | {label} | {speed:.1f} "
            f"| {speed * masks:.0f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) |"
        )
    return rows


def agreement_row(subject: Subject) -> str:
    """A row of a Markdown table: how far the masks agree, mean and lowest IoU."""
    columns = np.array(subject.agreement).reshape(-1, len(_REFERENCES)).T
    cells = [f"{c.mean():.4f} ({c.min():.3f})" if c.size else "-" for c in columns]
    head = f"| {subject.name} | {subject.image_size} | {len(subject.agreement)} | "
    return head + " | ".join(cells) + " |"


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_root", type=Path, required=True)
    parser.add_argument("--split", default="train")
    parser.add_argument("--image_size", type=int, nargs="+", default=[1024])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=40, help="timed in every round")
    parser.add_argument("--json", type=Path, help="writes all figures into this file")
    args = parser.parse_args(argv)
    speeds = ["| data | image_size | loader | images/s | masks/s | samft is faster by |"]
    masks = [f"| data | image_size | objects | {' | '.join(_REFERENCES)} |"]
    tables, figures = (speeds, masks), []
    for table in tables:
        table.append("|---" * (table[0].count("|") - 1) + "|")
    with tempfile.TemporaryDirectory() as cache:
        for image_size in args.image_size:
            subject = make_subject(
                args.data_root,
                args.split,
                image_size=image_size,
                num_images=args.images,
                cache=Path(cache),
            )
            seconds = measure(subject, rounds=args.rounds)
            speeds += speed_rows(subject, seconds)
            masks.append(agreement_row(subject))
            run = {"data": subject.name, "image_size": image_size, "agreement": subject.agreement}
            figures.append({**run, "seconds_per_image": seconds})
    print("\n\n".join("\n".join(table) for table in tables))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
