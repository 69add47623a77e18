"""RepairedFile copies of COCO files: what is wrong is put right or left out. Imports no torch."""

import codecs
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from samft.coco.entries import CROWD, NO_CATEGORY
from samft.coco.index import CocoIndex, class_names
from samft.coco.json_reader import (
    ImageEntry,
    ObjectEntry,
    Raw,
    load_document,
    read_entries,
    to_id,
    value_of,
)
from samft.coco.layout import ImageFolder
from samft.coco.problems import Problems
from samft.coco.segmentation import count_pixels, decode_cropped, encode_cropped
from samft.errors import ConfigError, DataError
from samft.runtime.files import write_atomically

_LISTS = ("categories", "images", "annotations")


@dataclass(frozen=True)
class RepairedFile:
    """What a mended copy holds."""

    path: Path
    num_images: int
    num_objects: int  # crowds included


def write_repaired(
    index: CocoIndex,
    annotations: Path,
    target: Path,
    *,
    root: Path | None = None,
    without: NDArray[np.int64] | None = None,
) -> RepairedFile:
    """Writes a copy of a COCO file that checks without errors, warnings and notes.

    Every usable object is in it, with the fields that samft knows put right and all others as they
    are. File names stay relative to the original image folder. Entries that point to an image id
    of several files are left out, since nobody can say which file they mean.

    Args:
        index: The checked COCO file.
        annotations: The COCO file.
        target: The copy; its folder is made.
        root: See `index_file`.
        without: Rows of images to leave out, with their objects.

    Raises:
        ConfigError: The target exists.
        DataError: No object would be left.
        OSError: The target cannot be written.
    """
    if target.exists():
        raise ConfigError(f"{target} exists, and nothing is overwritten: choose another folder.")
    others = _other_fields(annotations)
    document = load_document(annotations, Problems())
    images = _Images(document.images, index, ImageFolder(index.image_folder, root=root), without)
    objects = _objects_of(images, index, document.annotations)
    if not (index.flags[objects] & CROWD == 0).any():
        raise DataError(f"{annotations} has no usable object, so there is nothing to mend.")
    categories = _Categories(document.categories, index)

    def write(out: BinaryIO) -> None:
        out.write(b"{\n")
        for key, value in others.items():
            out.write(_encode({key: value})[1:-1] + b",\n")
        entries = _mend_objects(objects, index, document.annotations, images, categories)
        lists: tuple[Iterable[bytes], ...] = (categories.entries, images.entries(), entries)
        for name, lines in zip(_LISTS, lists, strict=True):
            end = b"\n]\n}\n" if name == _LISTS[-1] else b"\n],\n"
            out.write(f'"{name}": ['.encode())
            for number, line in enumerate(lines):
                out.write((b",\n" if number else b"\n") + line)
            out.write(end)

    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, write)
    return RepairedFile(target, len(images.first_entry), len(objects))


def _other_fields(annotations: Path) -> dict[str, Any]:
    # Info, licences and whatever else stands beside the lists.
    content = annotations.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        whole = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
    except ValueError:
        whole = json.loads(content)
    return {key: value_of(raw) for key, raw in whole.items() if key not in _LISTS}


class _Images:
    """Which entry stands for which file, and under which id."""

    def __init__(
        self,
        raw: list[Raw],
        index: CocoIndex,
        folder: ImageFolder,
        without: NDArray[np.int64] | None,
    ) -> None:
        self.raw, self.index = raw, index
        self.ambiguous: set[int] = set()  # image ids that stand for several files
        rows = {name: row for row, name in enumerate(index.file_names())}
        row_of: dict[int, int] = {}
        self.first_entry: dict[int, int] = {}  # row -> position of its entry
        for position, entry in enumerate(read_entries(raw, ImageEntry)):
            image_id = None if entry is None else to_id(entry.id)
            if entry is None or image_id is None or not isinstance(entry.file_name, str):
                continue
            row = rows.get(folder.find(entry.file_name)[0])
            if row is None:
                continue
            if row_of.setdefault(image_id, row) != row:
                self.ambiguous.add(image_id)
            self.first_entry.setdefault(row, position)
        self.ids: dict[int, int] = {}
        for image_id, row in row_of.items():
            if image_id not in self.ambiguous:
                self.ids.setdefault(row, image_id)
        left_out = set(np.flatnonzero(index.bad).tolist())
        left_out |= set(() if without is None else without.tolist())
        for row in left_out | (self.first_entry.keys() - self.ids.keys()):
            self.first_entry.pop(row, None)

    def entries(self) -> Iterator[bytes]:
        """The mended entries, in the order of the file."""
        for row, position in self.first_entry.items():
            height, width = self.index.sizes[row].tolist()
            name = self.index.file_name(row)
            entry = value_of(self.raw[position])
            ours = {"id": self.ids[row], "file_name": name, "height": height, "width": width}
            yield _encode(entry, **ours)


def _objects_of(images: _Images, index: CocoIndex, raw: list[Raw]) -> NDArray[np.int64]:
    # The objects of the images that are kept, in the order of the file.
    row_of = np.repeat(np.arange(index.num_images), np.diff(index.first_object))
    kept = np.isin(row_of, list(images.first_entry))
    objects = np.flatnonzero(kept)
    objects = objects[np.argsort(index.positions[objects])]
    if images.ambiguous:
        entries = read_entries(
            [raw[position] for position in index.positions[objects]], ObjectEntry
        )
        sure = [to_id(entry.image_id) not in images.ambiguous for entry in entries if entry]
        objects = objects[np.array(sure, dtype=bool)]
    return objects


class _Categories:
    """The mended list of categories, and the id there of each category id."""

    def __init__(self, raw: Any, index: CocoIndex) -> None:
        names = class_names(index)
        free = max([0, *names]) + 1
        id_of_name: dict[str, int] = {}
        for category_id, name in names.items():
            id_of_name.setdefault(name, free if category_id == NO_CATEGORY else category_id)
        self.id_of = {category_id: id_of_name[name] for category_id, name in names.items()}
        fields: dict[int | None, Any] = {}
        for entry in raw if isinstance(raw, list) else ():
            if isinstance(entry, dict) and isinstance(entry.get("name"), str):
                fields.setdefault(to_id(entry.get("id")), entry)
        self.entries = [
            _encode(fields.get(category_id, {}), id=category_id, name=name)
            for name, category_id in id_of_name.items()
        ]


def _mend_objects(
    objects: NDArray[np.int64],
    index: CocoIndex,
    raw: list[Raw],
    images: _Images,
    categories: _Categories,
) -> Iterator[bytes]:
    ids = index.object_ids[objects]
    taken = set(index.object_ids.tolist())
    free = (number for number in itertools.count(1) if number not in taken)
    ids[ids == 0] = [next(free) for _ in range(int((ids == 0).sum()))]
    row_of = np.searchsorted(index.first_object, objects, side="right") - 1
    bar = tqdm(total=len(objects), desc="mending", unit="object", disable=None, delay=2)
    with bar:
        for k, row, object_id in zip(objects.tolist(), row_of.tolist(), ids.tolist(), strict=True):
            entry = value_of(raw[index.positions[k]]) or {}
            yield _encode(
                entry,
                id=object_id,
                image_id=images.ids[row],
                category_id=categories.id_of[int(index.categories[k])],
                iscrowd=int(index.flags[k] & CROWD > 0),
                **_shape(entry, index, k, row=row),
            )
            bar.update()


def _shape(entry: dict[str, Any], index: CocoIndex, k: int, *, row: int) -> dict[str, Any]:
    # Segmentation, area and box of an object.
    height, width = index.sizes[row].tolist()
    checked = index.segmentations[k]
    if isinstance(checked, dict) and checked["size"] != [height, width]:
        crop = decode_cropped(checked, height, width)
        segmentation = encode_cropped(crop, height=height, width=width)
        box = list(crop.extent)
    else:
        segmentation = _same_segmentation(entry["segmentation"], checked)
        box = np.clip(index.boxes[k], 0, [width, height, width, height]).tolist()
    area = count_pixels(checked, height, width)
    bbox = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
    if _is_nearly(entry.get("bbox"), bbox):
        bbox = entry["bbox"]  # 5.3, not 15.4 - 10.1
    return {"segmentation": segmentation, "area": area, "bbox": bbox}


def _same_segmentation(raw: Any, checked: Any) -> Any:
    # What was checked, in the numbers of the file wherever they can stay.
    if isinstance(checked, dict):
        text = isinstance(raw["counts"], str)
        counts = raw["counts"] if text else checked["counts"].tolist()
        return {"size": checked["size"], "counts": counts}
    if len(raw) == len(checked) and isinstance(raw[0], list):
        return raw
    return [polygon.tolist() for polygon in checked]


def _is_nearly(raw: Any, bbox: Sequence[float]) -> bool:
    if not isinstance(raw, list) or len(raw) != 4:
        return False
    return all(
        isinstance(one, (int, float)) and abs(one - other) < 1e-9
        for one, other in zip(raw, bbox, strict=True)
    )


def _encode(entry: Any, **ours: Any) -> bytes:
    """An entry as a line of standard JSON; NaN and infinity become null."""
    try:
        return msgspec.json.encode({**entry, **ours})
    except (UnicodeEncodeError, OverflowError):
        # A file name that is not UTF-8 stays as it is, for the file could not be found otherwise.
        return json.dumps({**_standard(entry), **ours}).encode()


def _standard(value: Any) -> Any:
    if isinstance(value, dict):
        return {_standard(key): _standard(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_standard(item) for item in value]
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
