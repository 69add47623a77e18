"""Writes a synthetic dataset of COCO train2017's size and statistics, for benchmarks at full scale.

    python -m benchmarks.coco_like --output_dir DIR

118,287 images, 860,001 objects, a JSON of about 450 MiB in the official layout. The JSON depends
only on the seed. Objects are star-shaped polygons whose sizes, points, parts and numbers per image
follow COCO's; none is smaller than a few pixels. As in the original file, the objects of an image
are spread over the whole list, and crowds come last. There is one JPEG of a single colour per image
size; the other image files are hard links to these, or copies where links are not possible.
"""

import argparse
import itertools
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import cv2
import numpy as np

SPLIT = "train2017"
NUM_IMAGES, NUM_OBJECTS = 118_287, 860_001
# 80 of the ids 1 to 90, as in COCO.
CATEGORY_IDS = np.setdiff1d(np.arange(1, 91), [12, 26, 29, 30, 45, 66, 68, 69, 71, 83])
CROWD_SHARE, EMPTY_SHARE, MULTIPART_SHARE = 0.0122, 0.0086, 0.1

_LARGEST_ID = 581_930
_SIDE = 640  # px, the longest side of any image
_BATCH = 8192  # objects
_FIXED_STREAM, _OBJECT_STREAM, _CROWD_STREAM = 0, 1, 2
_SIZES = np.array(  # W, H
    [(640, 480), (640, 427), (480, 640), (640, 426), (427, 640), (500, 375), (640, 425)]
    + [(640, 428), (426, 640), (375, 500), (640, 360), (612, 612), (640, 640), (500, 333)]
    + [(640, 512), (333, 500), (640, 429), (640, 424), (640, 383), (425, 640), (478, 640)]
    + [(500, 400), (360, 640), (640, 393)]
)
_SIZE_WEIGHTS = np.array([22, 15, 9, 6, 6, 5, 5, 3, 3, 2, 2, 1.5, 1.5, 1.5] + [1] * 10)
_TEXT_OF = [repr(i / 100) for i in range(_SIDE * 100 + 1)]  # JSON of a coordinate in 1/100 px


@dataclass(frozen=True)
class DatasetPlan:
    """N images, and the images that the objects are in."""

    seed: int
    ids: np.ndarray  # [N]
    sizes: np.ndarray  # [N, 2] W, H
    polygon_images: np.ndarray  # row of the image of each polygon object, in file order
    crowd_images: np.ndarray  # row of the image of each crowd


@dataclass(frozen=True)
class Outlines:
    """The polygons of K objects, concatenated, in 1/100 px."""

    points: np.ndarray  # int64 [P, 2]
    first_point: np.ndarray  # [parts + 1]
    first_part: np.ndarray  # [K + 1]

    @property
    def boxes(self) -> np.ndarray:
        """x, y, width, height [K, 4] in 1/100 px."""
        starts = self.first_point[self.first_part[:-1]]
        low = np.minimum.reduceat(self.points, starts)
        return np.concatenate([low, np.maximum.reduceat(self.points, starts) - low], axis=1)

    @property
    def areas(self) -> np.ndarray:
        """Areas [K] in px, summed over parts."""
        following = np.arange(1, len(self.points) + 1)
        following[self.first_point[1:] - 1] = self.first_point[:-1]
        (x, y), (next_x, next_y) = self.points.T, self.points[following].T
        twice = np.abs(np.add.reduceat(x * next_y - next_x * y, self.first_point[:-1]))
        return np.add.reduceat(twice, self.first_part[:-1]) / 20_000


def _generator(*seeds: int) -> np.random.Generator:
    return np.random.default_rng(seeds)


def make_plan(seed: int, *, num_images: int, num_objects: int) -> DatasetPlan:
    """Plans the images, and distributes exactly `num_objects` objects over them."""
    rng = _generator(seed, _FIXED_STREAM)
    weights = _SIZE_WEIGHTS / _SIZE_WEIGHTS.sum()
    empty = int(np.ceil(num_images * EMPTY_SHARE)) if num_images > 1 else 0
    used = rng.permutation(num_images)[: min(num_images - empty, num_objects)]
    # A Poisson number with an exponential mean is geometric; COCO's counts nearly are.
    shares = rng.exponential(size=len(used))
    counts = np.zeros(num_images, dtype=np.int64)
    counts[used] = 1 + rng.multinomial(num_objects - len(used), shares / shares.sum())
    # At most one crowd per image, and never as its only object.
    several = np.flatnonzero(counts > 1)
    num_crowds = min(round(num_objects * CROWD_SHARE), len(several))
    crowds = rng.permutation(several)[:num_crowds]
    counts[crowds] -= 1
    return DatasetPlan(
        seed=seed,
        ids=rng.permutation(max(_LARGEST_ID, 2 * num_images))[:num_images] + 1,
        sizes=_SIZES[rng.choice(len(_SIZES), num_images, p=weights)],
        polygon_images=rng.permutation(np.repeat(np.arange(num_images), counts)),
        crowd_images=crowds,
    )


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)])


def draw_outlines(rng: np.random.Generator, sizes: np.ndarray) -> Outlines:
    """One object per image size [K, 2]: star-shaped parts beside each other, inside the image."""
    # 41 % of the areas below 32 x 32 px and 24 % above 96 x 96 px in a photo of 640 x 480.
    side = np.exp(rng.normal(-2.5, 1.17, len(sizes))) * np.sqrt(sizes.prod(axis=1) / 0.5)
    aspect = np.exp(rng.normal(0, 0.4, len(sizes)))
    half = np.stack([side * aspect, side / aspect], axis=1) / 2
    half = np.clip(half, 2.5, 0.48 * sizes)
    centre = half + rng.random(sizes.shape) * (sizes - 2 * half)
    # Thin objects have one part, so a larger share of the others has several.
    in_parts = (half[:, 0] > 8) & (rng.random(len(sizes)) < 1.2 * MULTIPART_SHARE)
    num_parts = np.where(in_parts, rng.integers(2, 5, len(sizes)), 1)
    first_part = _starts(num_parts)
    owner = np.repeat(np.arange(len(sizes)), num_parts)
    place = np.arange(len(owner)) - first_part[owner]  # of a part in its object, from the left
    across = half[owner, 0] / num_parts[owner]
    part_centre, part_half = centre[owner], half[owner]
    part_centre[:, 0] += (2 * place + 1 - num_parts[owner]) * across
    part_half[:, 0] = np.where(num_parts[owner] > 1, 0.9, 1) * across
    # Larger objects have more points; the factor gives COCO's mean.
    scale = 3.15 * np.sqrt(part_half.prod(axis=1)) ** 0.5
    num_points = np.clip(scale * np.exp(rng.normal(0, 0.5, len(owner))), 4, 400).astype(np.int64)
    points = _draw_stars(rng, num_points, centre=part_centre, half=part_half)
    limit = np.repeat(sizes[owner], num_points, axis=0)
    hundredths = np.rint(np.clip(points, 0, limit) * 100).astype(np.int64)
    return Outlines(hundredths, _starts(num_points), first_part)


def _draw_stars(
    rng: np.random.Generator, num_points: np.ndarray, *, centre: np.ndarray, half: np.ndarray
) -> np.ndarray:
    # Points are sorted by angle around the centre, so no outline crosses itself.
    first = _starts(num_points)
    owner = np.repeat(np.arange(len(num_points)), num_points)
    step = np.arange(first[-1]) - first[owner] + 0.8 * rng.random(first[-1])
    angle = 2 * np.pi * step / num_points[owner]
    lobes = rng.integers(2, 4, len(num_points))[owner]
    phase = rng.uniform(0, 2 * np.pi, len(num_points))[owner]
    radius = 0.8 + 0.15 * np.cos(lobes * angle + phase) + 0.05 * rng.uniform(-1, 1, len(owner))
    along = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return np.asarray(centre[owner] + half[owner] * radius[:, None] * along)


def _polygon_texts(outlines: Outlines) -> Iterator[str]:
    texts = [_TEXT_OF[number] for number in outlines.points.ravel().tolist()]
    bounds = (2 * outlines.first_point).tolist()
    parts = [",".join(texts[i:j]) for i, j in zip(bounds[:-1], bounds[1:], strict=True)]
    first_part = outlines.first_part.tolist()
    for i, j in zip(first_part[:-1], first_part[1:], strict=True):
        yield "],[".join(parts[i:j])


def _polygon_entries(plan: DatasetPlan) -> Iterator[str]:
    # The most frequent class in COCO is person; frequencies fall quickly.
    weights = 1 / np.arange(1, len(CATEGORY_IDS) + 1)
    first_id = 0
    for start in range(0, len(plan.polygon_images), _BATCH):
        rng = _generator(plan.seed, _OBJECT_STREAM, start)
        rows = plan.polygon_images[start : start + _BATCH]
        outlines = draw_outlines(rng, plan.sizes[rows])
        ids = first_id + np.cumsum(rng.integers(1, 4, len(rows)))
        first_id = int(ids[-1])
        categories = rng.choice(CATEGORY_IDS, len(rows), p=weights / weights.sum())
        columns = [ids, plan.ids[rows], categories, outlines.areas, outlines.boxes]
        lists = [column.tolist() for column in columns]
        for text, *fields in zip(_polygon_texts(outlines), *lists, strict=True):
            object_id, image_id, category, area, box = fields
            yield (
                f'{{"segmentation": [[{text}]],"area": {area!r},"iscrowd": 0,'
                f'"image_id": {image_id},"bbox": [{",".join([_TEXT_OF[n] for n in box])}],'
                f'"category_id": {category},"id": {object_id}}}'
            )


def draw_crowd(rng: np.random.Generator, size: tuple[int, int]) -> dict[str, Any]:
    """A band with one run per column, as COCO's `counts`, `size` (H, W), `area` and `bbox`."""
    width, height = size
    across = int(rng.uniform(0.2, 1) * width)
    left = int(rng.integers(0, width - across + 1))
    middle = np.cumsum(rng.normal(0, 2, across)) + rng.uniform(0.3, 0.7) * height
    thick = rng.uniform(0.05, 0.25) * height + rng.uniform(0, 6, across)
    # Not in the first and last row, so that runs of neighbouring columns never join.
    top = np.clip(middle - thick, 1, height - 3).astype(np.int64)
    bottom = np.clip(middle + thick, top + 1, height - 1).astype(np.int64)
    offsets = (left + np.arange(across)) * height
    edges = np.stack([offsets + top, offsets + bottom], axis=1).ravel()
    low, high = int(top.min()), int(bottom.max())
    return {
        "counts": np.diff(edges, prepend=0, append=width * height).tolist(),
        "size": [height, width],
        "area": int((bottom - top).sum()),
        "bbox": [left, low, across, high - low],
    }


def _crowd_entries(plan: DatasetPlan) -> Iterator[str]:
    rng = _generator(plan.seed, _CROWD_STREAM)
    for row in plan.crowd_images.tolist():
        crowd = draw_crowd(rng, (int(plan.sizes[row, 0]), int(plan.sizes[row, 1])))
        image_id, category = int(plan.ids[row]), int(rng.choice(CATEGORY_IDS[:40]))
        counts, box = (",".join(map(str, crowd[key])) for key in ("counts", "bbox"))
        yield (
            f'{{"segmentation": {{"counts": [{counts}],"size": [{crowd["size"][0]},'
            f'{crowd["size"][1]}]}},"area": {crowd["area"]},"iscrowd": 1,"image_id": {image_id},'
            f'"bbox": [{box}],"category_id": {category},'
            f'"id": {900_000_000_000 + category * 100_000_000 + image_id}}}'
        )


def _file_name(image_id: int) -> str:
    return f"{image_id:012d}.jpg"


def _image_entries(plan: DatasetPlan) -> Iterator[str]:
    rng = _generator(plan.seed, _FIXED_STREAM, 1)
    for image_id, (width, height) in zip(plan.ids.tolist(), plan.sizes.tolist(), strict=True):
        name, number = _file_name(image_id), int(rng.integers(1 << 62))
        day, second = number % 28 + 1, number % 60
        yield (
            f'{{"license": {number % 8 + 1},"file_name": "{name}",'
            f'"coco_url": "http://images.example.org/{SPLIT}/{name}","height": {height},'
            f'"width": {width},"date_captured": "2013-11-{day:02d} 17:02:{second:02d}",'
            f'"flickr_url": "http://farm{number % 9 + 1}.photos.example.org/{number % 9000 + 1000}/'
            f'{number % 10**10:010d}_{number % 2**40:010x}_z.jpg","id": {image_id}}}'
        )


def _category_entries() -> Iterator[str]:
    for category in CATEGORY_IDS.tolist():
        group = f"group {category // 10}"
        yield f'{{"supercategory": "{group}","id": {category},"name": "thing {category}"}}'


def _license_entries() -> Iterator[str]:
    for number in range(1, 9):
        yield f'{{"url": "http://example.org/licenses/{number}","id": {number},"name": "none"}}'


def _write_json_list(file: TextIO, key: str, entries: Iterator[str]) -> None:
    file.write(f',"{key}": [')
    for position, entry in enumerate(entries):
        file.write("," + entry if position else entry)
    file.write("]")


def write_json(path: Path, plan: DatasetPlan) -> None:
    """Writes the annotation file entry by entry; at most a batch of objects is in memory."""
    with path.open("w", encoding="ascii", buffering=1 << 20) as file:
        file.write('{"info": {"description": "drawn, of the size of COCO 2017","year": 2017}')
        _write_json_list(file, "licenses", _license_entries())
        _write_json_list(file, "images", _image_entries(plan))
        objects = itertools.chain(_polygon_entries(plan), _crowd_entries(plan))
        _write_json_list(file, "annotations", objects)
        _write_json_list(file, "categories", _category_entries())
        file.write("}")


def write_images(folder: Path, plan: DatasetPlan) -> None:
    """Writes an image file of the planned size for every image."""
    base_of: dict[tuple[int, int], Path] = {}
    for image_id, (width, height) in zip(plan.ids.tolist(), plan.sizes.tolist(), strict=True):
        path = folder / _file_name(image_id)
        path.unlink(
            missing_ok=True
        )  # of an earlier run: writing to one of several hard links changes all
        base = base_of.get((width, height))
        if base is None:
            colour = (90 + width % 97, 90 + height % 89, 120)
            cv2.imwrite(str(path), np.full((height, width, 3), colour, dtype=np.uint8))
            base_of[width, height] = path
        else:
            try:
                os.link(base, path)
            except OSError:  # no hard links here, or this file has the most possible
                shutil.copyfile(base, path)
                base_of[width, height] = path


def write_dataset(
    output_dir: Path, *, num_images: int, num_objects: int, seed: int = 0
) -> tuple[Path, Path]:
    """Writes the dataset in the official layout; returns the JSON file and the image folder."""
    if num_images < 1 or num_objects < 1:
        raise ValueError("A dataset needs at least one image and one object.")
    annotations = output_dir / "annotations" / f"instances_{SPLIT}.json"
    folder = output_dir / SPLIT
    for directory in (annotations.parent, folder):
        directory.mkdir(parents=True, exist_ok=True)
    plan = make_plan(seed, num_images=num_images, num_objects=num_objects)
    write_json(annotations, plan)
    write_images(folder, plan)
    return annotations, folder


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the dataset and prints its size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--images", type=int, default=NUM_IMAGES)
    parser.add_argument("--objects", type=int, default=NUM_OBJECTS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    start = time.perf_counter()
    annotations, _ = write_dataset(
        args.output_dir, num_images=args.images, num_objects=args.objects, seed=args.seed
    )
    size, seconds = annotations.stat().st_size / 2**20, time.perf_counter() - start
    print(f"{annotations}: {args.images} images, {args.objects} objects, ", end="")
    print(f"{size:.1f} MiB, written in {seconds:.0f} s")


if __name__ == "__main__":
    main()
