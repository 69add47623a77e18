"""What to predict on: images, and the objects to predict masks for. Imports no torch.

Images come from the command line or from a COCO file; boxes from the command line, from the objects
of that COCO file, or from a detector's COCO results file; points as `prediction.points` has them.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from samft.annotations.entries import CROWD, NO_ID
from samft.annotations.image_entries import NO_CATEGORY as UNNAMED
from samft.annotations.json_reader import (
    ObjectEntry,
    load_document,
    number_of,
    read_entries,
    to_id,
    to_key,
)
from samft.annotations.problems import WARNING, Problems
from samft.coco.index import CocoIndex
from samft.errors import DataError
from samft.images.pixels import PLAIN, PixelFormat
from samft.interchange.coco_writer import NO_CLASS
from samft.prediction.images import ImageList, list_images, read_coco_images
from samft.prediction.points import (
    MAX_OVERHANG,
    PointedObject,
    PointPrompt,
    overhang,
    read_points,
    repeat_points,
)
from samft.runtime.files import read_file

DEFAULT_CATEGORY = 1  # of objects in images that no COCO file lists
NO_CATEGORY = 0  # of objects without a class, where a COCO file defines classes
_NUM_NAMED = 3  # examples in an error
_LOW_SCORE, _NO_SCORE = "score below --min_score", "a score that is no number"
_NO_AREA = "no usable bbox"
_MAX_COORDINATE = 1e7  # px; far outside of any image


@dataclass(frozen=True)
class PromptedObjects:
    """K objects to predict masks for, grouped by image, each with a box, or points, or both.

    Attributes:
        rows: int64 [K], row of each object's image in `ImageList`, ascending.
        boxes_original: float64 [K, 4], x0 y0 x1 y1, px, original frame; NaN: points alone.
        category_ids: int64 [K].
        annotation_ids: int64 [K]; `NO_ID` for objects that are not of an annotation.
        scores: float64 [K], the detector's; NaN for objects without one.
        left_out: Number of unusable boxes by reason.
        points: float64 [P, 3] of each of the K objects, see `PointPrompt`; None: boxes alone.
    """

    rows: NDArray[np.int64]
    boxes_original: NDArray[np.float64]
    category_ids: NDArray[np.int64]
    annotation_ids: NDArray[np.int64]
    scores: NDArray[np.float64]
    left_out: dict[str, int]
    points: list[NDArray[np.float64]] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def of_image(self, row: int) -> range:
        """Indices of the objects of the image in this row."""
        first, last = np.searchsorted(self.rows, [row, row + 1]).tolist()
        return range(first, last)


@dataclass(frozen=True)
class PredictionTask:
    """Images, and the objects in them to predict masks for.

    Attributes:
        images: All images.
        rows: Those to predict on.
        prompts: None: automatic masks.
        category: Category id of automatic masks.
        category_names: Of the classes that the COCO file defines; without one, of the one class.
    """

    images: ImageList
    rows: list[int]
    prompts: PromptedObjects | None
    category: int
    category_names: Mapping[int, str]

    def boxes_of(self, row: int) -> NDArray[np.float64]:
        """The boxes of an image, float64 [K, 4], x0 y0 x1 y1, px, original frame, or NaN."""
        if self.prompts is None:
            return np.zeros((0, 4))
        indices = self.prompts.of_image(row)
        return self.prompts.boxes_original[indices.start : indices.stop]

    def points_of(self, row: int) -> list[NDArray[np.float64]]:
        """The points of each object of an image, float64 [P, 3]; empty with boxes alone."""
        if self.prompts is None or self.prompts.points is None:
            return []
        return [self.prompts.points[k] for k in self.prompts.of_image(row)]

    def prompts_of(self, row: int) -> NDArray[np.float64] | list[PointPrompt]:
        """What `Predictor.predict` takes: boxes, or where there are points, objects."""
        points, boxes = self.points_of(row), self.boxes_of(row)
        return [PointPrompt(*pair) for pair in zip(points, boxes, strict=True)] if points else boxes

    def result_fields(self, row: int, k: int) -> dict[str, Any]:
        """Fields of a COCO result that do not depend on the mask, for the k-th mask of an image."""
        fields: dict[str, Any] = {"image_id": self.images.id_as_written(row)}
        if self.prompts is None:
            return {**fields, "category_id": self.category}
        box = self.prompts.of_image(row)[k]
        fields["category_id"] = int(self.prompts.category_ids[box])
        if self.prompts.annotation_ids[box] != NO_ID:
            fields["annotation_id"] = int(self.prompts.annotation_ids[box])
        if not np.isnan(self.prompts.scores[box]):
            fields["detector_score"] = float(self.prompts.scores[box])
        return fields


def build_task(
    paths: Sequence[Path],
    *,
    annotations: Path | None = None,
    results: Path | None = None,
    boxes: Sequence[Sequence[float]] | None = None,
    points: Sequence[Sequence[float]] | None = None,
    points_file: Path | None = None,
    automatic: bool = False,
    min_score: float = 0.0,
    allow_links: Sequence[Path] = (),
    pixels: PixelFormat = PLAIN,
) -> PredictionTask:
    """Lists images and objects; with neither annotations nor prompts, masks are automatic.

    Args:
        paths: Image files and folders; with `annotations` one folder.
        annotations: COCO file that lists the images; its boxes are used if no others are given.
        results: A detector's COCO results file, see `detected_boxes`.
        boxes: The same for all images, see `repeat_boxes`; with `points` at most one.
        points: Of one object in all images, see `repeat_points`.
        points_file: See `read_points`.
        automatic: Automatic masks even if `annotations` has boxes.
        min_score: See `detected_boxes`.
        allow_links: Folders that symbolic links in folders of images may lead to.
        pixels: How the values of images become 8 bits.

    Returns:
        The task; its rows include unreadable images.

    Raises:
        DataError: There are no images, or the prompts do not belong to them.
    """
    index, category = None, DEFAULT_CATEGORY
    names: Mapping[int, str] = {DEFAULT_CATEGORY: NO_CLASS}
    if annotations is None:
        images = list_images(paths, allow_links=allow_links, pixels=pixels)
    else:
        images, index = read_coco_images(
            annotations, paths[0], allow_links=allow_links, pixels=pixels
        )
        category = NO_CATEGORY
        names = {key: name for key, name in index.category_names.items() if key != UNNAMED}
    if results is not None:
        keys = index.category_keys if index else {}
        detected = detected_boxes(results, images, min_score=min_score, categories=keys)
        rows = sorted(set(detected.rows.tolist()))
        return PredictionTask(images, rows, detected, category, names)
    if points_file is not None:
        pointed = _group_points(read_points(points_file, images), category)
        return PredictionTask(images, sorted(set(pointed.rows.tolist())), pointed, category, names)
    if annotations is not None and index is not None and not (boxes or points or automatic):
        annotated = annotated_boxes(annotations, index)
        # Unreadable images have no boxes, but are kept so that they are reported.
        lost = {row for row in images.bad if images.names[row] in index.bad_images}
        rows = sorted(lost | set(annotated.rows.tolist()))
        return PredictionTask(images, rows, annotated, category, names)
    repeated = _repeat_prompts(boxes or (), points or (), images, category)
    return PredictionTask(images, list(range(len(images.ids))), repeated, category, names)


def _repeat_prompts(
    boxes: Sequence[Sequence[float]],
    points: Sequence[Sequence[float]],
    images: ImageList,
    category: int,
) -> PromptedObjects | None:
    if points:
        box = boxes[0] if boxes else None
        return _group_points(repeat_points(points, box, images), category)
    return repeat_boxes(boxes, images, category) if boxes else None


def _group_points(objects: Sequence[PointedObject], category: int) -> PromptedObjects:
    return _group_by_image(
        [one.row for one in objects],
        [one.prompt.box for one in objects],
        category,
        annotation_ids=[one.annotation_id for one in objects],
        points=[one.prompt.points for one in objects],
    )


# Boxes of the command line.


def repeat_boxes(
    boxes: Sequence[Sequence[float]], images: ImageList, category: int
) -> PromptedObjects:
    """The same boxes in every readable image.

    Args:
        boxes: x0 y0 x1 y1 each, px, original frame.
        images: All images.
        category: Category id of the boxes.

    Raises:
        DataError: A box reaches out of an image by more than a pixel.
    """
    good = np.array([row for row in range(len(images.ids)) if row not in images.bad], dtype=int)
    for box in boxes:
        overhangs = overhang(np.array([box], dtype=float), images.sizes[good])
        for row in good[overhangs > MAX_OVERHANG].tolist():
            height, width = images.sizes[row].tolist()
            raise DataError(
                f"--box {','.join(f'{side:g}' for side in box)} lies outside of {images.names[row]}"
                f", which is {width} x {height} px, or reaches out of it: give x0,y0,x1,y1 in "
                "pixels of the original image."
            )
    rows = np.repeat(good, len(boxes))
    return _group_by_image(rows, np.tile(np.array(boxes, dtype=float), (len(good), 1)), category)


# Boxes of a COCO file's objects.


class _ImageBox(NamedTuple):
    """A usable box of an annotation or of a detection."""

    row: int  # of its image in `ImageList`
    corners: list[float]  # x0 y0 x1 y1, px, original frame
    category_id: int
    annotation_id: int = NO_ID
    score: float = math.nan


def annotated_boxes(annotations: Path, index: CocoIndex) -> PromptedObjects:
    """The boxes of a COCO file's objects, as training and validation use them, without crowds.

    Objects whose mask is missing or unusable are not in the index; their `bbox` is used.

    Args:
        annotations: The JSON file.
        index: Its index.
    """
    plain = np.flatnonzero((index.flags & CROWD) == 0)
    rows = np.repeat(np.arange(index.num_images), np.diff(index.first_object))[plain]
    boxes, ids = index.boxes[plain], index.object_ids[plain]
    categories = index.categories[plain]
    categories = np.where(categories == UNNAMED, NO_CATEGORY, categories)
    left_out: dict[str, int] = {}
    # The JSON is read a second time only if the index left out an object because of its mask.
    if any(severity == WARNING and _is_mask_problem(code) for code, severity, _ in index.problems):
        bare, left_out = _boxes_without_masks(annotations, index)
        if bare:
            rows = np.append(rows, [box.row for box in bare])
            boxes = np.append(boxes, [box.corners for box in bare], axis=0)
            categories = np.append(categories, [box.category_id for box in bare])
            ids = np.append(ids, [box.annotation_id for box in bare])
    return _group_by_image(rows, boxes, categories, annotation_ids=ids, left_out=left_out)


def _is_mask_problem(code: str) -> bool:
    return code.startswith(("mask-", "polygon-", "rle-"))


def _boxes_without_masks(
    annotations: Path, index: CocoIndex
) -> tuple[list[_ImageBox], dict[str, int]]:
    seen: set[int | str] = set()
    boxes: list[_ImageBox] = []
    num_unusable = 0
    for row, entry in _objects_left_out(annotations, index):
        key = to_key(entry.id)
        if key in seen:
            continue
        corners = _bbox_to_corners(entry.bbox)
        if corners is not None:
            factors, shifts = np.tile(index.box_scales[row].reshape(2, 2), 2)
            corners = (np.array(corners) * factors + shifts).tolist()
        if corners is None or _is_outside(corners, index.sizes[row].tolist()):
            num_unusable += 1
            continue
        seen |= set() if key is None else {key}  # objects without an id are not alike
        category_id = number_of(entry.category_id, index.category_keys) or NO_CATEGORY
        boxes.append(_ImageBox(row, corners, category_id, key if isinstance(key, int) else NO_ID))
    return boxes, {"neither a mask nor a usable bbox": num_unusable} if num_unusable else {}


def _objects_left_out(annotations: Path, index: CocoIndex) -> Iterator[tuple[int, ObjectEntry]]:
    # Image row and entry of objects that are in the JSON but not in the index; no crowds, and none
    # with the id of an object that is.
    indexed = set(index.positions.tolist())
    row_of = {key: row for row, key in enumerate(index.image_ids_as_written())}
    entries = list(read_entries(load_document(annotations, Problems()).annotations, ObjectEntry))
    used = {to_key(entry.id) for k, entry in enumerate(entries) if entry and k in indexed} - {None}
    for position, entry in enumerate(entries):
        if position in indexed or entry is None or to_id(entry.iscrowd):
            continue
        row = row_of.get(to_key(entry.image_id) or "")
        if row is not None and not index.bad[row] and to_key(entry.id) not in used:
            yield row, entry


def _bbox_to_corners(bbox: Any) -> list[float] | None:
    # COCO's x, y, width, height as x0, y0, x1, y1; None where that is not four usable numbers.
    try:
        x, y, width, height = (float(side) for side in list(bbox))
    except (TypeError, ValueError, OverflowError):
        return None
    corners = [x, y, x + width, y + height]
    # False for NaN as well.
    fits = bool(np.abs(corners).max() <= _MAX_COORDINATE) and min(width, height) > 0
    return corners if fits and not isinstance(bbox, str) else None


def _is_outside(corners: Sequence[float], size: Iterable[int]) -> bool:
    height, width = size
    return corners[0] >= width or corners[1] >= height or corners[2] <= 0 or corners[3] <= 0


# Boxes of a detector.


class _Detection(msgspec.Struct):
    image_id: Any
    bbox: tuple[Any, Any, Any, Any]
    category_id: Any = None
    score: Any = None


def detected_boxes(
    results: Path,
    images: ImageList,
    *,
    min_score: float = 0.0,
    categories: Mapping[str, int] = MappingProxyType({}),
) -> PromptedObjects:
    """The boxes of a detector's COCO results file.

    Args:
        results: A list of image_id, category_id, bbox (x y width height, px) and score.
        images: The images that were given to the detector.
        min_score: Boxes that score lower are left out.
        categories: Ids of classes that the file may name, see `CocoIndex.category_keys`.

    Raises:
        DataError: The file cannot be read, or belongs to other images or classes.
    """
    detections = _read_detections(results)
    row_of = {images.id_as_written(row): row for row in range(len(images.ids))}
    unknown = [f"image_id {one.image_id}" for one in detections if _row_of(one, row_of) is None]
    _refuse_foreign_boxes(
        results, unknown, len(detections), "images that the annotation file does not list"
    )
    nameless = [
        f"category_id {one.category_id}"
        for one in detections
        if one.category_id is not None and number_of(one.category_id, categories) is None
    ]
    _refuse_foreign_boxes(
        results, nameless, len(detections), "classes that the annotation file does not name"
    )
    boxes, outside, left_out = _select_detections(
        detections, images, row_of, min_score=min_score, categories=categories
    )
    _refuse_foreign_boxes(results, outside, len(detections), "places outside of their images")
    return _group_by_image(
        [box.row for box in boxes],
        [box.corners for box in boxes],
        [box.category_id for box in boxes],
        scores=[box.score for box in boxes],
        left_out=left_out,
    )


def _row_of(one: _Detection, row_of: Mapping[int | str, int]) -> int | None:
    key = to_key(one.image_id)
    return None if key is None else row_of.get(key)


def _read_detections(results: Path) -> list[_Detection]:
    try:
        content = read_file(results)
        try:
            return msgspec.json.decode(content, type=list[_Detection])
        except msgspec.ValidationError:
            raise
        except (ValueError, RecursionError):  # Python's parser also reads NaN
            return msgspec.convert(json.loads(content), type=list[_Detection])
    except OSError as error:
        raise DataError(
            f"--boxes: {results} cannot be read ({error.strerror}): check the path."
        ) from error
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise DataError(
            f"--boxes: {results} is no COCO results file ({error}): it should be a list of objects "
            "with image_id, category_id, bbox [x, y, width, height] and score."
        ) from error


def _select_detections(
    detections: list[_Detection],
    images: ImageList,
    row_of: dict[int | str, int],
    *,
    min_score: float,
    categories: Mapping[str, int],
) -> tuple[list[_ImageBox], list[str], dict[str, int]]:
    # The usable boxes, those outside of their image as text, and the number left out by reason.
    boxes: list[_ImageBox] = []
    outside: list[str] = []
    counts: Counter[str] = Counter()
    for one in detections:
        row, corners = _row_of(one, row_of), _bbox_to_corners(one.bbox)
        score = math.nan if one.score is None else _to_finite(one.score)
        assert row is not None
        if score is None:
            counts[_NO_SCORE] += 1
        elif score < min_score:
            counts[_LOW_SCORE] += 1
        elif corners is None:
            counts[_NO_AREA] += 1
        elif row not in images.bad and _is_outside(corners, images.sizes[row].tolist()):
            outside.append(f"{list(one.bbox)} in {images.names[row]}")
        else:
            category_id = number_of(one.category_id, categories) or NO_CATEGORY
            boxes.append(_ImageBox(row, corners, category_id, score=score))
    reasons = (_NO_AREA, _LOW_SCORE, _NO_SCORE)
    left_out = {reason: counts[reason] for reason in reasons if counts[reason]}
    return boxes, outside, left_out


def _to_finite(raw: Any) -> float | None:
    try:
        number = float(raw)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _refuse_foreign_boxes(results: Path, foreign: list[str], total: int, where: str) -> None:
    if foreign:
        some = ", ".join(list(dict.fromkeys(foreign))[:_NUM_NAMED])
        raise DataError(
            f"--boxes: of the {total:,} boxes in {results}, {len(foreign):,} are of {where} "
            f"({some}{', ...' if len(foreign) > _NUM_NAMED else ''}): give the results of these "
            "images, with bbox as x, y, width, height in pixels of the original image."
        )


def _group_by_image(
    rows: Any,
    boxes: Any,
    categories: Any,
    *,
    annotation_ids: Any = NO_ID,
    scores: Any = np.nan,
    left_out: dict[str, int] | None = None,
    points: list[NDArray[np.float64]] | None = None,
) -> PromptedObjects:
    rows = np.asarray(rows, dtype=np.int64)
    order = np.argsort(rows, kind="stable")

    def column(values: Any, dtype: type) -> NDArray[Any]:
        return np.broadcast_to(np.asarray(values, dtype=dtype), rows.shape)[order]

    return PromptedObjects(
        rows=rows[order],
        boxes_original=np.asarray(boxes, dtype=np.float64).reshape(-1, 4)[order],
        category_ids=column(categories, np.int64),
        annotation_ids=column(annotation_ids, np.int64),
        scores=column(scores, np.float64),
        left_out=left_out or {},
        points=None if points is None else [points[k] for k in order],
    )
