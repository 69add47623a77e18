"""Writes repaired copies of COCO files: what is wrong is corrected or left out.

Imports no torch.
"""

import codecs
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
from numpy.typing import NDArray

from samft.annotations.entries import CROWD
from samft.annotations.image_entries import NO_CATEGORY
from samft.annotations.json_reader import (
    ImageEntry,
    ObjectEntry,
    Raw,
    load_document,
    number_of,
    read_entries,
    to_key,
    value_of,
)
from samft.annotations.problems import Problems
from samft.annotations.segmentation import CroppedMask, count_pixels, decode_cropped, encode_cropped
from samft.coco.index import CocoIndex
from samft.errors import ConfigError, DataError
from samft.images.folder import ImageFolder
from samft.images.orientation import (
    UPRIGHT,
    inverse_orientation,
    turn_back_points,
    turn_pixels,
    turned_size,
)
from samft.runtime.files import read_file, write_atomically
from samft.runtime.logs import progress_bar

_FRAME = "samft_frame"  # field of a copy: the frame of the original
_LISTS = ("categories", "images", "annotations")


@dataclass(frozen=True)
class RepairedFile:
    """A repaired copy, and how much it holds."""

    path: Path
    num_images: int
    num_objects: int  # crowds included


def write_repaired(
    index: CocoIndex,
    annotations: Path,
    *,
    target: Path,
    root: Path | None = None,
    allow_links: Sequence[Path] = (),
    without: NDArray[np.int64] | None = None,
) -> RepairedFile:
    """Writes a copy of a COCO file in which `samft.check` finds no errors, warnings or notes.

    It holds every usable object, with the fields that samft reads corrected and all others
    unchanged. File names stay relative to the original image folder. Entries whose image id stands
    for several files are left out, since it is unknown which file they mean.

    Args:
        index: The checked COCO file.
        annotations: The COCO file itself.
        target: The copy; its folder is created.
        root: See `index_file`.
        allow_links: See `index_file`.
        without: Rows of images to leave out, with their objects.

    Raises:
        ConfigError: The target exists.
        DataError: No object would be left.
        OSError: The target cannot be written.
    """
    if target.exists():
        raise ConfigError(f"{target} exists, and nothing is overwritten: choose another folder.")
    document = load_document(annotations, Problems())
    folder = ImageFolder(index.image_folder, root=root, allow_links=allow_links)
    images = _RepairedImages(document.images, index, folder, without=without)
    objects = _select_objects(images, index, document.annotations)
    if not (index.flags[objects] & CROWD == 0).any():
        raise DataError(f"{annotations} has no usable object, so there is nothing to repair.")
    categories = _RepairedCategories(document.categories, index)
    lists: dict[str, Iterable[bytes]] = {
        "categories": categories.entries,
        "images": images.entries(),
        "annotations": _repair_objects(objects, index, document.annotations, images, categories),
    }
    others = {key: value for key, value in _other_fields(annotations).items() if key != _FRAME}
    if index.frame:
        others[_FRAME] = {**index.frame, "written": "on the pixels as they are stored"}
    write_document = partial(_write_document, others, lists)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, write_document)
    return RepairedFile(target, len(images.first_entry), len(objects))


def _write_document(
    others: dict[str, Any], lists: dict[str, Iterable[bytes]], out: BinaryIO
) -> None:
    # A JSON object with one line for each field and for each entry of the lists.
    out.write(b"{\n")
    for key, value in others.items():
        out.write(_encode_entry({key: value})[1:-1] + b",\n")
    for name, entries in lists.items():
        out.write(f'"{name}": ['.encode())
        for number, entry in enumerate(entries):
            out.write((b",\n" if number else b"\n") + entry)
        out.write(b"\n]\n}\n" if name == _LISTS[-1] else b"\n],\n")


def _other_fields(annotations: Path) -> dict[str, Any]:
    # The info, the licences and whatever else stands beside the lists.
    content = read_file(annotations).removeprefix(codecs.BOM_UTF8)
    try:
        whole = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
    except ValueError:
        whole = json.loads(content)
    return {key: value_of(raw) for key, raw in whole.items() if key not in _LISTS}


class _RepairedImages:
    """The images of the copy.

    Attributes:
        first_entry: From the row in `index` to the position of its first entry in the file, in the
            order of the file; images that are left out are not in it.
        ids: From the row to the id that the image gets: its first unambiguous one.
        ambiguous: Image ids that stand for several files.
    """

    def __init__(
        self,
        raw: list[Raw],
        index: CocoIndex,
        folder: ImageFolder,
        *,
        without: NDArray[np.int64] | None,
    ) -> None:
        self._raw, self._index = raw, index
        self.ambiguous: set[int | str] = set()
        self.first_entry: dict[int, int] = {}
        rows = {name: row for row, name in enumerate(index.file_names())}
        row_of: dict[int | str, int] = {}  # image id -> row
        decoded = list(read_entries(raw, ImageEntry))
        places = folder.find_all(entry.name for entry in decoded if entry and entry.name)
        for position, entry in enumerate(decoded):
            image_id = None if entry is None else to_key(entry.id)
            if entry is None or image_id is None or entry.name is None:
                continue
            row = rows.get(places[entry.name][0])
            if row is None:
                continue
            if row_of.setdefault(image_id, row) != row:
                self.ambiguous.add(image_id)
            self.first_entry.setdefault(row, position)
        self.ids: dict[int, int] = {}
        for image_id, row in row_of.items():
            if image_id not in self.ambiguous:
                number = index.image_keys[image_id] if isinstance(image_id, str) else image_id
                self.ids.setdefault(row, number)
        left_out = set(np.flatnonzero(index.bad).tolist())
        left_out |= set(() if without is None else without.tolist())
        for row in left_out | (self.first_entry.keys() - self.ids.keys()):
            self.first_entry.pop(row, None)

    def entries(self) -> Iterator[bytes]:
        """The repaired entries, encoded, in the order of the file."""
        for row, position in self.first_entry.items():
            height, width = turned_size(
                tuple(self._index.sizes[row].tolist()), int(self._index.orientations[row])
            )
            name = self._index.file_name(row)
            yield _encode_entry(
                value_of(self._raw[position]),
                id=self.ids[row],
                file_name=name,
                height=height,
                width=width,
            )


def _select_objects(images: _RepairedImages, index: CocoIndex, raw: list[Raw]) -> NDArray[np.int64]:
    # The objects of the images that are kept, in the order of the file.
    row_of = np.repeat(np.arange(index.num_images), np.diff(index.first_object))
    kept = np.isin(row_of, list(images.first_entry))
    objects = np.flatnonzero(kept)
    objects = objects[np.argsort(index.positions[objects])]
    if images.ambiguous:
        entries = read_entries(
            [raw[position] for position in index.positions[objects]], ObjectEntry
        )
        sure = [to_key(entry.image_id) not in images.ambiguous for entry in entries if entry]
        objects = objects[np.array(sure, dtype=bool)]
    return objects


class _RepairedCategories:
    """The categories of the copy, each name once.

    Attributes:
        id_of: From a category id in the index to the id in the copy.
        entries: The entries, encoded.
    """

    def __init__(self, raw: Any, index: CocoIndex) -> None:
        names = index.category_names
        free = max([0, *names]) + 1
        id_of_name: dict[str, int] = {}
        for category_id, name in names.items():
            id_of_name.setdefault(name, free if category_id == NO_CATEGORY else category_id)
        self.id_of = {category_id: id_of_name[name] for category_id, name in names.items()}
        fields: dict[int | None, Any] = {}  # of the entries, by category id
        for entry in raw if isinstance(raw, list) else ():
            if isinstance(entry, dict) and isinstance(entry.get("name"), str):
                fields.setdefault(number_of(entry.get("id"), index.category_keys), entry)
        self.entries = [
            _encode_entry(fields.get(category_id, {}), id=category_id, name=name)
            for name, category_id in id_of_name.items()
        ]


def _repair_objects(
    objects: NDArray[np.int64],
    index: CocoIndex,
    raw: list[Raw],
    images: _RepairedImages,
    categories: _RepairedCategories,
) -> Iterator[bytes]:
    ids = index.object_ids[objects]
    taken = set(index.object_ids.tolist())
    free = (number for number in itertools.count(1) if number not in taken)
    ids[ids == 0] = [next(free) for _ in range(int((ids == 0).sum()))]
    row_of = np.searchsorted(index.first_object, objects, side="right") - 1
    bar = progress_bar(total=len(objects), desc="repairing", unit="object", delay=2)
    with bar:
        for k, row, object_id in zip(objects.tolist(), row_of.tolist(), ids.tolist(), strict=True):
            entry = value_of(raw[index.positions[k]]) or {}
            yield _encode_entry(
                entry,
                id=object_id,
                image_id=images.ids[row],
                category_id=categories.id_of[int(index.categories[k])],
                iscrowd=int(index.flags[k] & CROWD > 0),
                **_repair_geometry(entry, index, k, row=row),
            )
            bar.update()


def _repair_geometry(
    entry: dict[str, Any], index: CocoIndex, k: int, *, row: int
) -> dict[str, Any]:
    # Segmentation, area and box of object k, in the numbers of the file wherever they are right.
    height, width = size = tuple(index.sizes[row].tolist())
    checked = index.segmentations[k]
    if index.orientations[row] != UPRIGHT:
        return _turn_geometry_back(index, k, row=row)
    if isinstance(checked, dict) and (index.frame or checked["size"] != [height, width]):
        crop = decode_cropped(checked, size)
        segmentation = encode_cropped(crop, size)
        box = list(crop.extent)
    else:
        raw = entry["segmentation"]
        if "scale_x_y" in index.frame:
            raw = []  # none of its numbers are right
        segmentation = _checked_segmentation(raw, checked)
        box = np.clip(index.boxes[k], 0, [width, height, width, height]).tolist()
    area = count_pixels(checked, size)
    bbox = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
    if _is_nearly(entry.get("bbox"), bbox):
        bbox = entry["bbox"]  # 5.3 instead of 15.4 - 10.1
    return {"segmentation": segmentation, "area": area, "bbox": bbox}


def _turn_geometry_back(index: CocoIndex, k: int, *, row: int) -> dict[str, Any]:
    # Of an object on the view that EXIF turns, for the pixels as they are stored: the copy is right
    # for whoever takes them so, as COCO does.
    size, orientation = tuple(index.sizes[row].tolist()), int(index.orientations[row])
    checked = index.segmentations[k]

    def turn(points: Any) -> NDArray[np.float64]:
        return turn_back_points(np.reshape(points, (-1, 2)), orientation, size=size)

    if isinstance(checked, dict):
        crop = decode_cropped(checked, size)
        left, top = turn(np.array(crop.extent, dtype=np.float64)).min(axis=0).astype(int).tolist()
        mask = turn_pixels(crop.mask.astype(np.uint8), inverse_orientation(orientation)) > 0
        stored = CroppedMask(top, left, mask)
        segmentation: Any = encode_cropped(stored, turned_size(size, orientation))
    else:
        segmentation = [turn(polygon).ravel().tolist() for polygon in checked]
    height, width = size
    corners = turn(np.clip(index.boxes[k], 0, [width, height, width, height]))
    low, high = corners.min(axis=0), corners.max(axis=0)
    return {
        "segmentation": segmentation,
        "area": count_pixels(checked, size),
        "bbox": [*low.tolist(), *(high - low).tolist()],
    }


def _checked_segmentation(raw: Any, checked: Any) -> Any:
    # The usable part of a segmentation, as the file writes it where all of it is usable.
    if isinstance(checked, dict):
        counts = raw.get("counts") if isinstance(raw, dict) else None
        if not isinstance(counts, str) or set(" ,'\"") & set(counts):
            counts = checked["counts"].tolist()
        return {"size": checked["size"], "counts": counts}
    polygons = [polygon.tolist() for polygon in checked]
    return raw if raw == polygons else polygons


def _is_nearly(raw: Any, bbox: Sequence[float]) -> bool:
    if not isinstance(raw, list) or len(raw) != 4:
        return False
    return all(
        isinstance(one, (int, float)) and abs(one - other) < 1e-9
        for one, other in zip(raw, bbox, strict=True)
    )


def _encode_entry(entry: dict[str, Any], **corrected: Any) -> bytes:
    # A line of standard JSON: the entry with corrected fields; NaN and infinity become null.
    try:
        return msgspec.json.encode({**entry, **corrected})
    except (UnicodeEncodeError, OverflowError):
        # Only corrected fields hold file names. One that is not UTF-8 is written with escapes,
        # unchanged, or the file could not be found.
        return json.dumps({**_to_standard_json(entry), **corrected}).encode()


def _to_standard_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {_to_standard_json(key): _to_standard_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_to_standard_json(item) for item in value]
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
