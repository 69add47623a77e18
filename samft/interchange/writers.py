"""Writes labelled images as a dataset of samft; and a checked COCO file as label images or YOLO."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray

from samft.annotations.entries import CROWD
from samft.annotations.problems import WARNING
from samft.annotations.segmentation import CroppedMask, decode_cropped
from samft.coco.index import CocoIndex
from samft.errors import ConfigError, DataError
from samft.images.files import inspect_image
from samft.images.limits import check_size
from samft.images.orientation import (
    UPRIGHT,
    inverse_orientation,
    turn_back_points,
    turned_size,
)
from samft.interchange.coco_writer import DatasetWriter
from samft.interchange.labelled import LabelledImage
from samft.interchange.outlines import trace_outlines
from samft.runtime.files import write_atomically

ANNOTATIONS = "_annotations.coco.json"
_PART = 0.02  # share of a mask from which on a part counts
_DIGITS = 9  # of YOLO's shares of a side: a millionth of a pixel in any image


@dataclass
class Converted:
    """What was converted, and what was not.

    Attributes:
        images: Number of images by split.
        objects: Number of objects by split, as they are written.
        notes: Sentences about objects that are not, or not wholly, in the result.
    """

    images: Counter[str] = field(default_factory=Counter)
    objects: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


def write_dataset(images: Iterable[LabelledImage], output: Path, *, link: bool) -> Converted:
    """Writes SPLIT/_annotations.coco.json beside the images of each split.

    Args:
        images: The images.
        output: A folder that exists and is empty.
        link: Make hard links of image files, not copies.

    Raises:
        ConfigError: The output cannot be written.
        DataError: Two images of a split have one name, or nothing was given.
    """
    converted, splits = Converted(), dict[str, list[LabelledImage]]()
    for image in images:
        splits.setdefault(image.split, []).append(image)
    names = sorted(
        {one.name for group in splits.values() for image in group for one in image.objects}
    )
    categories = {number: name for number, name in enumerate(names, start=1)}
    for split, group in splits.items():
        folder = output / split
        folder.mkdir()
        _copy_images([image.path for image in group], folder, link=link)
        write = partial(_write_split, group=group, categories=categories, converted=converted)
        write_atomically(folder / ANNOTATIONS, write)
    return converted


def _write_split(
    file: BinaryIO,
    *,
    group: list[LabelledImage],
    categories: dict[int, str],
    converted: Converted,
) -> None:
    writer = DatasetWriter(file, description="converted by samft")
    masks = [one.shape for image in group for one in image.objects]
    in_parts = [_is_in_parts(mask) for mask in masks if isinstance(mask, CroppedMask)]
    if 2 * sum(in_parts) > len(in_parts):
        converted.notes.append(
            f"{sum(in_parts):,} of {len(in_parts):,} masks are in separate parts: where a number "
            "stands for a class, not for an object, give each object a number of its own"
        )
    ids = {name: number for number, name in categories.items()}
    entries = []
    for number, image in enumerate(group, start=1):
        size = {"height": image.size[0], "width": image.size[1]}
        entries.append({"id": number, "file_name": image.path.name, **size})
        for one in image.objects:
            is_mask = isinstance(one.shape, CroppedMask)
            mask = one.shape if is_mask else decode_cropped(one.shape, image.size)
            assert isinstance(mask, CroppedMask)
            before = writer.num_objects
            writer.add(
                mask,
                polygons=None if isinstance(one.shape, CroppedMask) else one.shape,
                size=image.size,
                image_id=number,
                category_id=ids[one.name],
            )
            if writer.num_objects == before:
                converted.notes.append(f"left out, because it covers no pixel: {one.source}")
    split = group[0].split
    converted.images[split], converted.objects[split] = len(group), writer.num_objects
    writer.close(entries, categories)


def _is_in_parts(mask: CroppedMask) -> bool:
    if not mask.mask.size:
        return False
    _, _, measures, _ = cv2.connectedComponentsWithStats(mask.mask.astype(np.uint8))
    areas = measures[1:, cv2.CC_STAT_AREA]
    return bool((areas >= _PART * areas.sum()).sum() > 1)


def _copy_images(paths: list[Path], folder: Path, *, link: bool) -> None:
    counts = Counter(path.name.casefold() for path in paths)
    for path in paths:
        if counts[path.name.casefold()] > 1:
            raise DataError(
                f"two images of {folder.name} are called {path.name}, such as {path}: rename one "
                "of them and its labels."
            )
        try:
            (os.link if link else shutil.copyfile)(path, folder / path.name)
        except OSError as error:
            advice = "take --link away, which needs one file system" if link else "make room"
            raise ConfigError(
                f"{path} cannot be put into {folder} ({error.strerror}): {advice}."
            ) from error


# The reverse.


def _masks_of(index: CocoIndex, row: int) -> list[tuple[int, CroppedMask]]:
    size = (int(index.sizes[row, 0]), int(index.sizes[row, 1]))
    first, last = index.first_object[row : row + 2].tolist()
    return [
        (k, decode_cropped(index.segmentations[k], size))
        for k in range(first, last)
        if not index.flags[k] & CROWD
    ]


def _note_what_is_left_out(index: CocoIndex, converted: Converted) -> None:
    warnings = index.problems.count(WARNING)
    if warnings:
        converted.notes.append(
            f"{warnings:,} objects or images have faults, and what cannot be used is left out: "
            "samft check --annotations FILE --images DIR names them"
        )
    crowds = int(np.count_nonzero(index.flags & CROWD))
    if crowds:
        converted.notes.append(f"left out: {crowds:,} crowds, which are no single objects")


def write_label_images(index: CocoIndex, output: Path) -> Converted:
    """Writes a label image for each image: TIFF, 16 bits, or 32 for more than 65,535 objects.

    Pixel value k is the k-th object of the image in the file; where objects overlap, the smallest
    counts, and what that takes from others is noted.

    Args:
        index: The checked COCO file.
        output: A folder that exists and is empty.
    """
    converted = Converted()
    _note_what_is_left_out(index, converted)
    for row in range(index.num_images):
        height, width = index.sizes[row].tolist()
        check_size(height, width, bytes_per_pixel=4)
        masks = _masks_of(index, row)
        labels = np.zeros((height, width), np.uint16 if len(masks) < 1 << 16 else np.uint32)
        areas = [int(mask.mask.sum()) for _, mask in masks]
        for k in sorted(range(len(masks)), key=lambda k: -areas[k]):
            x0, y0, x1, y1 = masks[k][1].extent
            labels[y0:y1, x0:x1][masks[k][1].mask] = k + 1
        seen = np.bincount(labels.ravel(), minlength=len(masks) + 1)[1:]
        name = index.file_name(row)
        for (k, _), area, visible in zip(masks, areas, seen.tolist(), strict=True):
            if visible < area:
                what = "is hidden" if not visible else f"lost {area - visible:,} of {area:,} px"
                converted.notes.append(
                    f"{name}: object {index.object_ids[k]} {what} under smaller ones"
                )
        path = (output / Path(name).name).with_suffix(".tif")
        if path.exists():
            raise DataError(f"two images are called {path.stem}: rename one of them.")
        tifffile.imwrite(path, labels, compression="zlib")
        converted.images["all"] += 1
        converted.objects["all"] += int(np.count_nonzero(seen))
    return converted


def _yolo_shares(
    index: CocoIndex, row: int, path: Path
) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    # From points of an image's outlines, px, to shares of the sides of the view that EXIF turns,
    # which is what YOLO's readers see, also where outlines are on the stored pixels.
    height, width = index.sizes[row].tolist()
    is_turned = index.orientations[row] != UPRIGHT
    orientation = UPRIGHT if is_turned else inspect_image(path).orientation
    view_height, view_width = turned_size((height, width), orientation)

    def to_shares(points: NDArray[np.float64]) -> NDArray[np.float64]:
        back = inverse_orientation(orientation)  # the stored image, as a view of the view
        return turn_back_points(points, back, size=(height, width)) / [view_width, view_height]

    return to_shares


def write_yolo(index: CocoIndex, output: Path, *, link: bool) -> Converted:
    """Writes data.yaml, images/train and labels/train as YOLO reads them.

    YOLO has one outline for an object: each further part is a line, and so an object, of its own.

    Args:
        index: The checked COCO file.
        output: A folder that exists and is empty.
        link: Make hard links of image files, not copies.
    """
    converted = Converted()
    _note_what_is_left_out(index, converted)
    names = [name for key, name in sorted(index.category_names.items()) if key >= 0]
    keys = sorted(key for key in index.category_names if key >= 0)
    pictures, texts = output / "images" / "train", output / "labels" / "train"
    pictures.mkdir(parents=True)
    texts.mkdir(parents=True)
    paths = [index.image_folder / index.file_name(row) for row in range(index.num_images)]
    _copy_images(paths, pictures, link=link)
    for row, path in enumerate(paths):
        to_view, lines = _yolo_shares(index, row, path), []
        for k, mask in _masks_of(index, row):
            segmentation = index.segmentations[k]
            polygons = segmentation if isinstance(segmentation, list) else trace_outlines(mask)
            if len(polygons) > 1:
                converted.notes.append(
                    f"{path.name}: object {index.object_ids[k]} became {len(polygons)} outlines"
                )
            if int(index.categories[k]) not in keys:
                raise DataError(f"object {index.object_ids[k]} has no class, which YOLO needs.")
            for polygon in polygons:
                shares = to_view(np.asarray(polygon, dtype=float).reshape(-1, 2))
                numbers = " ".join(f"{share:.{_DIGITS}g}" for share in shares.ravel())
                lines.append(f"{keys.index(int(index.categories[k]))} {numbers}\n")
        (texts / f"{path.stem}.txt").write_text("".join(lines))
        converted.images["train"] += 1
        converted.objects["train"] += len(lines)
    listed = "".join(f"  {k}: {json.dumps(name)}\n" for k, name in enumerate(names))
    (output / "data.yaml").write_text(f"train: images/train\nval: images/train\nnames:\n{listed}")
    return converted
