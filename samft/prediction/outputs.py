"""What a prediction writes: results, images, a COCO dataset, pictures. Imports no torch."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

from samft.annotations.segmentation import (
    CroppedMask,
    decode_cropped,
    decode_encoded,
    encode_cropped,
    resample,
    uncompressed_rle,
)
from samft.interchange.coco_writer import (
    NO_CLASS,
    DatasetWriter,
    category_without_class,
    dataset_head,
)
from samft.prediction.images import ImageList
from samft.prediction.inputs import DEFAULT_CATEGORY, NO_CATEGORY, PredictionTask
from samft.reports import drawing
from samft.reports.overlays import draw_overlay
from samft.runtime.files import read_json, write_atomically, write_json
from samft.runtime.own_files import is_marked_picture, is_part_of, mark_picture
from samft.views.regions import ImageSource

RESULTS, IMAGES, DATASET = "results.json", "images.json", "dataset.json"
MASKS, OVERLAYS = "masks", "overlays"
_CATEGORIES = [{"id": DEFAULT_CATEGORY, "name": NO_CLASS}]
_DESCRIPTION = "masks predicted by samft"
LONGEST_OVERLAY = 8192  # px; a longer image is scaled down by a whole number
_ROWS_AT_ONCE = 64  # of the overlay
_DIGITS = 6  # of bbox: hides the rounding of x + width - x


def result_row(
    mask: CroppedMask,
    *,
    box_original: Sequence[float],
    size: tuple[int, int],
    score: float,
    fields: dict[str, Any],
) -> dict[str, Any]:
    """One mask as an entry of a COCO results file.

    Args:
        mask: At the original resolution.
        box_original: The box that the mask was predicted for, or that of the mask, x0 y0 x1 y1, px,
            original frame.
        size: H, W of the image, px.
        score: The predicted IoU.
        fields: `image_id`, `category_id` and any further fields.

    Returns:
        `fields`, `bbox` (x y width height, px), `segmentation` (compressed RLE) and `score`.
    """
    x0, y0, x1, y1 = box_original
    return {
        **fields,
        "bbox": [round(float(side), _DIGITS) for side in (x0, y0, x1 - x0, y1 - y0)],
        "score": score,
        "segmentation": encode_cropped(mask, size),
    }


class ResultsWriter:
    """Writes a JSON list, one entry per line, and holds only one entry in memory."""

    def __init__(self, file: BinaryIO) -> None:
        """Takes an open file, which `close` leaves open."""
        self.file, self.num_rows = file, 0
        self._encode = msgspec.json.Encoder().encode

    def add(self, row: dict[str, Any]) -> None:
        """Appends an entry.

        Raises:
            OSError: The file cannot be written, for example because the disk is full.
        """
        self.file.write(b",\n" if self.num_rows else b"[\n")
        self.file.write(self._encode(row))
        self.num_rows += 1

    def close(self) -> None:
        """Ends the list; the file stays open."""
        self.file.write(b"\n]\n" if self.num_rows else b"[]\n")


def write_images_json(path: Path, images: ImageList, rows: Sequence[int]) -> None:
    """Writes a COCO file without objects, which says which image each `image_id` is.

    Args:
        path: The file.
        images: All images.
        rows: Those to list.

    Raises:
        OSError: It cannot be written.
    """
    entries = _image_entries(images, rows)
    document = {"info": {}, "images": entries, "annotations": [], "categories": _CATEGORIES}
    write_json(path, document)


def _image_entries(images: ImageList, rows: Sequence[int]) -> list[dict[str, Any]]:
    return [
        {
            "id": int(images.ids[row]),
            "file_name": images.names[row],
            "height": int(images.sizes[row, 0]),
            "width": int(images.sizes[row, 1]),
        }
        for row in rows
    ]


class PredictedDataset:
    """Writes the masks as a COCO dataset: with its images and classes, and boxes around masks.

    Attributes:
        writer: Counts objects and empty masks.
    """

    def __init__(self, file: BinaryIO, task: PredictionTask, *, segmentation: str) -> None:
        """Begins the dataset in an open file; see `DatasetWriter`."""
        self.writer = DatasetWriter(file, description=_DESCRIPTION, segmentation=segmentation)
        self._task, self._categories = task, dict(task.category_names)

    def add(self, row: int, result: Mapping[str, Any]) -> None:
        """Appends a mask.

        Args:
            row: Of its image.
            result: Its `result_row`.

        Raises:
            OSError: The file cannot be written.
        """
        category = result["category_id"]
        if category == NO_CATEGORY and NO_CATEGORY not in self._task.category_names:
            category = category_without_class(self._task.category_names)
        self._categories.setdefault(category, NO_CLASS)
        kept = {
            name: result[name]
            for name in ("score", "detector_score", "stability_score", "annotation_id")
            if name in result
        }
        height, width = self._task.images.sizes[row].tolist()
        self.writer.add(
            decode_encoded(result["segmentation"]),
            size=(height, width),
            image_id=int(self._task.images.ids[row]),
            category_id=category,
            fields=kept,
        )

    def close(self, rows: Sequence[int]) -> None:
        """Ends the dataset with the images in these rows."""
        self.writer.close(_image_entries(self._task.images, rows), self._categories)


def picture_names(names: Sequence[str], ids: NDArray[np.int64]) -> list[str]:
    """A unique file name without a suffix for the pictures of each image.

    Args:
        names: File names of the images, with or without folders.
        ids: int64 [N], appended to names that would be equal.

    Returns:
        Relative paths that do not lead out of the folder that they are written to.
    """
    stems = []
    for name in names:
        path = PurePath(name).with_suffix("")
        outside = path.is_absolute() or ".." in path.parts
        stems.append(path.name if outside else path.as_posix())
    # Some file systems ignore case, so "a" and "A" would be one file.
    counts = Counter(stem.casefold() for stem in stems)
    taken = {stem for stem, count in counts.items() if count == 1}
    unique = []
    for stem, image_id in zip(stems, ids.tolist(), strict=True):
        if counts[stem.casefold()] > 1:
            stem = f"{stem}-{image_id}"
            while stem.casefold() in taken:
                stem += "_"
            taken.add(stem.casefold())
        unique.append(re.sub(r"[\x00-\x1f]", "_", stem))
    return unique


def overlay_labels(
    results: Sequence[Mapping[str, Any]], names: Mapping[int, str]
) -> list[list[str]]:
    """What an overlay writes beside the masks of an image: class, id and score, or less of it.

    Args:
        results: The `result_row` of each mask. Its id is that of its annotation, or else its number
            in the image, counted from 1, as in its label image.
        names: Of the classes.
    """
    labels = []
    for number, result in enumerate(results, start=1):
        one = f"{result.get('annotation_id', number)}"
        name = names.get(result["category_id"], NO_CLASS)
        score = f"{result['score']:.2f}"
        labels.append([f"{name} {one}  {score}", f"{one}  {score}", one])
    return labels


@dataclass(frozen=True)
class PictureWriter:
    """Writes pictures of the masks beside the results; none by default.

    Attributes:
        folder: The pictures go to `masks/` and `overlays/` in it.
        masks: Whether to write label images, see `drawing.label_image`.
        overlays: Whether to write images with masks and boxes drawn over them.
    """

    folder: Path
    masks: bool = False
    overlays: bool = False

    def __bool__(self) -> bool:
        return self.masks or self.overlays

    def write(
        self,
        name: str,
        source: ImageSource,
        masks: Sequence[CroppedMask],
        *,
        boxes: NDArray[np.float64],
        points: Sequence[NDArray[np.float64]] = (),
        labels: Sequence[Sequence[str]] = (),
    ) -> None:
        """Writes the pictures of one image.

        Args:
            name: One of `picture_names`.
            source: The image. Its overlay is at most `LONGEST_OVERLAY` high and wide.
            masks: All masks of the image.
            boxes: To be drawn, see `draw_overlay`.
            points: The same.
            labels: What to write beside each mask, see `draw_overlay`.

        Raises:
            OSError: They cannot be written.
        """
        if self.masks:
            numbers = drawing.label_image(masks, source.size)
            _write_picture(self.folder / MASKS / f"{name}.png", drawing.encode_label_png(numbers))
        if self.overlays:
            factor = -(-max(source.size) // LONGEST_OVERLAY)
            scale = np.array([factor, factor, 1])
            drawn = draw_overlay(
                _reduce_image(source, factor),
                [_reduce_mask(mask, source.size, factor) for mask in masks],
                boxes=boxes / factor,
                points=[own / scale for own in points],
                labels=labels,
            )
            _write_picture(self.folder / OVERLAYS / f"{name}.jpg", drawing.encode_jpeg(drawn))

    def paths(self, name: str) -> list[Path]:
        """The files that `write` would write.

        Args:
            name: One of `picture_names`.
        """
        masks = [self.folder / MASKS / f"{name}.png"] * self.masks
        return masks + [self.folder / OVERLAYS / f"{name}.jpg"] * self.overlays


def _reduced_size(size: tuple[int, int], factor: int) -> tuple[int, int]:
    return -(-size[0] // factor), -(-size[1] // factor)


def _reduce_image(source: ImageSource, factor: int) -> NDArray[np.uint8]:
    # In strips, as all of it may not fit in memory.
    height, width = source.size
    if factor == 1:
        return source.read(np.array([0, 0, width, height]))
    small = np.zeros((*_reduced_size(source.size, factor), 3), dtype=np.uint8)
    rows = _ROWS_AT_ONCE * factor
    for top in range(0, height, rows):
        strip = source.read(np.array([0, top, width, min(top + rows, height)]))
        shape = _reduced_size(strip.shape[:2], factor)
        reduced = cv2.resize(strip, shape[::-1], interpolation=cv2.INTER_AREA)
        small[top // factor : top // factor + shape[0]] = reduced
    return small


def _reduce_mask(mask: CroppedMask, size: tuple[int, int], factor: int) -> CroppedMask:
    if factor == 1:
        return mask
    small = _reduced_size(size, factor)
    scale = (1 / factor, 1 / factor, 0, 0)
    return decode_cropped(resample(uncompressed_rle(mask, size), small, scale), small)


def _write_picture(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    marked = mark_picture(content)
    write_atomically(path, lambda file: file.write(marked))


def is_part_of_prediction(name: str) -> bool:
    """Whether this is a temporary file that a killed prediction may leave.

    Args:
        name: Relative to the output folder.
    """
    pictures = rf"{MASKS}/.+\.png", rf"{OVERLAYS}/.+\.jpg"
    return is_part_of(name, *map(re.escape, (RESULTS, IMAGES, DATASET)), *pictures)


def is_own_output(path: Path) -> bool:
    """Whether an existing output of a prediction was written by one, told from its content."""
    if not path.is_file():
        return False
    if path.name == RESULTS:
        with path.open("rb") as file:
            head = file.read(1 << 16)
        return head == b"[]\n" or (head.startswith(b"[\n{") and b'"segmentation":{' in head)
    if path.name == DATASET:
        head = dataset_head(_DESCRIPTION)
        with path.open("rb") as file:
            return file.read(len(head)) == head
    if path.name == IMAGES:
        try:
            document = read_json(path)
        except ValueError:
            return False
        empty = {"info": {}, "annotations": [], "categories": _CATEGORIES}
        return isinstance(document, dict) and empty.items() <= document.items()
    return is_marked_picture(path)
