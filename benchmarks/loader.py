"""Compares samft's training loader with the baseline's, one worker each: speed and masks.

    python -m benchmarks.loader --data_root DIR --split train --image_size 1024 256

The baseline loads as public SAM fine-tuners do: it decodes the whole image, makes one full-size
mask per object with pycocotools, and resizes, normalises and pads image and masks with
segment_anything's own transform. All loaders return the same images with all of their objects.
Every round times each loader in turn, so that other load on the machine affects all alike.
"""

import samft.runtime.torchvision_compat  # noqa: F401  (before torchvision is imported)

# isort: split
import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from benchmarks.baseline import BaselineDataset, BaselineSample
from benchmarks.index import open_pycocotools
from benchmarks.tables import format_speedups, markdown_table
from samft.annotations.segmentation import CroppedMask, uncompressed_rle
from samft.coco.layout import find_split
from samft.coco.subset import read_coco
from samft.data.dataset import Coco2MaskDataset, Sample
from samft.data.loaders import train_loader
from samft.data.samplers import EndlessBatchSampler, TrainingSampler
from samft.data.targets import draw_targets, make_grids
from samft.data.transforms import make_frame

SecondsByLoader: TypeAlias = dict[str, list[float]]  # per image, by round
MaskIous: TypeAlias = tuple[float, float]  # of samft's mask with each of _REFERENCES

_WARM_UP = 4  # batches: the worker starts, and its queue fills
_SAMFT_EPOCHS = 4  # per epoch of the baseline, which is slow enough to be timed on one
_REFERENCES = ("pycocotools' mask, averaged", "the baseline loader's, averaged")
_LOADERS = {
    "samft": "samft",
    "again": "samft, again",
    "flip": "samft, augment flip",
    "uint8": "baseline, uint8 masks",
    "float32": "baseline, float32 masks",
}


def _single_sample(samples: list[BaselineSample]) -> BaselineSample:
    return samples[0]


@dataclass(frozen=True)
class LoaderDatasets:
    """The same images as datasets of samft and of the baseline.

    Attributes:
        samft: Without augmentation.
        samft_flip: With random flips.
        baseline: With uint8 masks.
        baseline_float: With float32 masks.
        mask_ious: Of each compared object in all images of the split.
    """

    name: str
    image_size: int
    samft: Coco2MaskDataset
    samft_flip: Coco2MaskDataset
    baseline: BaselineDataset
    baseline_float: BaselineDataset
    mask_ious: list[MaskIous]

    @property
    def masks_per_image(self) -> float:
        """Mean over the timed images."""
        return statistics.mean(len(object_ids) for _, object_ids in self.baseline.objects)


def open_datasets(
    data_root: Path, split: str, *, image_size: int, num_images: int, cache: Path
) -> LoaderDatasets:
    """Opens a split both ways, compares all masks, and selects evenly spaced images to time."""
    annotations, folder = find_split(data_root, split)
    subset, coco = read_coco(annotations, folder, cache=cache), open_pycocotools(annotations)
    options: dict[str, Any] = {"image_size": image_size, "max_masks_per_image": 0, "training": True}
    drawn, true = (
        Coco2MaskDataset(folder, subset=subset, augment="none", **{**options, "training": training})
        for training in (True, False)
    )
    # samft leaves out unusable objects, so the baseline is given those that samft has.
    objects: list[tuple[int, list[int]]] = []
    mask_ious: list[MaskIous] = []
    baseline = partial(BaselineDataset, coco, folder, image_size=image_size)
    for i in range(len(drawn)):
        sample = drawn[i]
        objects.append((sample.image_id, sample.object_ids.tolist()))
        one_image = baseline(objects=objects[-1:], mask_type=torch.uint8)
        mask_ious += _compare_masks(sample, true[i], one_image[0])
    timed = np.unique(np.linspace(0, len(objects) - 1, num_images).astype(int)).tolist()
    subset, objects = subset.select(timed), [objects[i] for i in timed]
    return LoaderDatasets(
        name=data_root.name,
        image_size=image_size,
        samft=Coco2MaskDataset(folder, subset=subset, augment="none", **options),
        samft_flip=Coco2MaskDataset(folder, subset=subset, augment="flip", **options),
        baseline=baseline(objects=objects, mask_type=torch.uint8),
        baseline_float=baseline(objects=objects, mask_type=torch.float32),
        mask_ious=mask_ious,
    )


def _compare_masks(drawn: Sample, true: Sample, baseline: BaselineSample) -> Iterable[MaskIous]:
    # Of one image, in windows; a cell is in a mask if at least half of it is covered.
    if len(drawn.boxes) == 0:
        return
    size = baseline.masks.shape[-1]
    frame = make_frame((size, size), size, resize_mode="pad")
    for k, target in enumerate(drawn.targets.numpy()):
        whole = CroppedMask(0, 0, baseline.masks[k].numpy())
        grids = make_grids(drawn.boxes[k : k + 1].numpy(), frame, resolution="window")
        grids = replace(grids, windows=drawn.windows[k : k + 1].double().numpy())
        _, others = draw_targets([uncompressed_rle(whole, (size, size))], frame, grids)
        others = others if len(others) else grids.empty_targets()
        yield _iou(target, true.targets[k].numpy()), _iou(target, others[0])


def _iou(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    masks = one >= 128, other >= 128
    return float((masks[0] & masks[1]).sum() / max((masks[0] | masks[1]).sum(), 1))


def _seconds_per_image(loader: Iterable[Any], *, num_images: int) -> float:
    # The loader is endless, so its queue is as full after the timed batches as before them.
    batches = iter(loader)
    for _ in itertools.islice(batches, _WARM_UP):
        pass
    start = time.perf_counter()
    for _ in itertools.islice(batches, num_images):
        pass
    return (time.perf_counter() - start) / num_images


def _samft_loader(dataset: Coco2MaskDataset) -> Iterable[Any]:
    return train_loader(
        dataset, batch_size=1, num_workers=1, start_step=_start_position(len(dataset))
    )


def _baseline_loader(dataset: BaselineDataset) -> Iterable[Any]:
    sampler = TrainingSampler(dataset)
    sampler.load_state_dict({"position": _start_position(len(dataset))})
    batches = EndlessBatchSampler(sampler)
    return DataLoader(dataset, batch_sampler=batches, num_workers=1, collate_fn=_single_sample)


def _start_position(num_images: int) -> int:
    # After the warm-up, an epoch begins: whole epochs are timed, which have each image once.
    return -_WARM_UP % num_images


def time_loaders(datasets: LoaderDatasets, *, rounds: int) -> SecondsByLoader:
    """Seconds per image of each loader, by round."""
    loaders: dict[str, tuple[Callable[[], Iterable[Any]], int]] = {
        "samft": (lambda: _samft_loader(datasets.samft), _SAMFT_EPOCHS),
        "uint8": (lambda: _baseline_loader(datasets.baseline), 1),
        "again": (lambda: _samft_loader(datasets.samft), _SAMFT_EPOCHS),
        "float32": (lambda: _baseline_loader(datasets.baseline_float), 1),
        "flip": (lambda: _samft_loader(datasets.samft_flip), _SAMFT_EPOCHS),
    }
    seconds: SecondsByLoader = {key: [] for key in loaders}
    for _ in range(rounds):
        for key, (start, epochs) in loaders.items():
            num_images = epochs * len(datasets.baseline)
            seconds[key].append(_seconds_per_image(start(), num_images=num_images))
    return seconds


def speed_rows(datasets: LoaderDatasets, seconds: Mapping[str, Sequence[float]]) -> list[str]:
    """Rows of a Markdown table: median speeds, and how much faster `samft` was."""
    rows, masks = [], datasets.masks_per_image
    for key, label in _LOADERS.items():
        speed = 1 / statistics.median(seconds[key])
        rows.append(
            f"| {datasets.name} | {datasets.image_size} | {label} | {speed:.1f} "
            f"| {speed * masks:.0f} | {format_speedups(seconds[key], seconds['samft'])} |"
        )
    return rows


def mask_iou_row(datasets: LoaderDatasets) -> str:
    """A row of a Markdown table: mean (and lowest) IoU of the masks with each reference."""
    columns = np.array(datasets.mask_ious).reshape(-1, len(_REFERENCES)).T
    cells = [f"{c.mean():.4f} ({c.min():.3f})" if c.size else "-" for c in columns]
    head = f"| {datasets.name} | {datasets.image_size} | {len(datasets.mask_ious)} | "
    return head + " | ".join(cells) + " |"


def main(argv: Sequence[str] | None = None) -> None:
    """Times the loaders, compares the masks, and prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_root", type=Path, required=True)
    parser.add_argument("--split", default="train")
    parser.add_argument("--image_size", type=int, nargs="+", default=[1024])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=40, help="timed in each round")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    args = parser.parse_args(argv)
    speeds: list[str] = []
    ious: list[str] = []
    figures = []
    with tempfile.TemporaryDirectory() as cache:
        for image_size in args.image_size:
            datasets = open_datasets(
                args.data_root,
                args.split,
                image_size=image_size,
                num_images=args.images,
                cache=Path(cache),
            )
            seconds = time_loaders(datasets, rounds=args.rounds)
            speeds += speed_rows(datasets, seconds)
            ious.append(mask_iou_row(datasets))
            run = {"data": datasets.name, "image_size": image_size, "mask_ious": datasets.mask_ious}
            figures.append({**run, "seconds_per_image": seconds})
    speed_head = "| data | image_size | loader | images/s | masks/s | samft is faster by |"
    iou_head = f"| data | image_size | objects | {' | '.join(_REFERENCES)} |"
    print(markdown_table(speed_head, speeds) + "\n\n" + markdown_table(iou_head, ious))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
