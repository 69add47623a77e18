"""The images and categories of a COCO file; images are matched with the files on disk.

Imports no torch.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samft.annotations.json_reader import (
    ImageEntry,
    ObjectEntry,
    Raw,
    number_keys,
    read_entries,
    to_id,
    to_key,
    to_size,
)
from samft.annotations.problems import Problems
from samft.images.files import inspect_images
from samft.images.folder import RESPELLED, ImageFolder
from samft.images.orientation import UPRIGHT
from samft.images.pixels import PIXEL_TYPES, PLAIN, PixelFormat

NO_CATEGORY = -1


@dataclass
class Images:
    """The images of a COCO file, one row for each file on disk, N of them.

    Attributes:
        names: [N], file names relative to the image folder, as spelled on disk.
        ids: int64 [N].
        sizes: int32 [N, 2], H, W of the file, px, turned by `orientations`; those of the JSON where
            it cannot be read.
        sizes_json: int32 [N, 2], H, W as the JSON says, px; 0 where it says none.
        exif: uint8 [N], EXIF's orientation of the file, 1..8; 1 is upright.
        orientations: uint8 [N], how images are turned when decoded, as EXIF numbers it; 1: not.
        num_bytes: int64 [N], size of the file; 0 where it cannot be read.
        pixel_types: uint8 [N], positions in `pixels.PIXEL_TYPES`.
        codes: [N], why the file cannot be used: a key of `problems.KINDS`, or ''.
        hints: By name, what a user should know about a file that cannot be used.
        row_of: From every image id to its row; see `json_reader.to_key`.
        keys: From ids that are text to those in `ids`.
    """

    names: list[str]
    ids: NDArray[np.int64]
    sizes: NDArray[np.int32]
    sizes_json: NDArray[np.int32]
    exif: NDArray[np.uint8]
    orientations: NDArray[np.uint8]
    num_bytes: NDArray[np.int64]
    pixel_types: NDArray[np.uint8]
    codes: list[str]
    hints: dict[str, str]
    row_of: dict[int | str, int]
    keys: dict[str, int]

    def view_sizes(self, *, turned: bool) -> NDArray[np.int32]:
        """H, W as EXIF turns the images, or not, int32 [N, 2], px; before they are turned."""
        swaps = turned & (self.exif > 4)
        return np.where(swaps[:, None], self.sizes[:, ::-1], self.sizes)

    def is_odd(self) -> NDArray[np.bool_]:
        """Bool [N], whether EXIF turns an image, or its size is not the JSON's."""
        return np.asarray((self.sizes_json != self.sizes).any(1) | (self.exif != UPRIGHT))

    def report_sizes(self, problems: Problems, *, explained: bool) -> None:
        """Adds what is odd about sizes and orientations of usable images to the problems.

        Args:
            problems: Problems are added to it.
            explained: Whether it is known why sizes differ, so that they are not reported.
        """
        for row in np.flatnonzero(self.is_odd()).tolist():
            if not self.codes[row]:
                self._report_size(row, problems, explained=explained)

    def _report_size(self, row: int, problems: Problems, *, explained: bool) -> None:
        name, size, size_json = (
            self.names[row],
            self.sizes[row].tolist(),
            self.sizes_json[row].tolist(),
        )
        if size_json == [0, 0]:
            problems.add("image-size-missing", name)
        elif size_json != size and not explained:
            is_rotated = self.exif[row] > 4 and size_json == size[::-1]
            reason = ", as if turned by EXIF" if is_rotated else ""
            problems.add(
                "image-size-differs",
                f"{name}: {size_json[1]}x{size_json[0]} is {size[1]}x{size[0]}{reason}",
            )
        if self.exif[row] != self.orientations[row]:
            problems.add("image-exif-rotated", name)


def read_images(
    entries: list[Raw],
    folder: ImageFolder,
    *,
    problems: Problems,
    pixels: PixelFormat = PLAIN,
    decode: bool = False,
) -> Images:
    """Reads the image entries, finds their files and inspects each file.

    Args:
        entries: `Document.images`.
        folder: Where the files are.
        problems: Problems are added to it, except `Images.codes`, which `read_objects` adds, since
            they matter only for images with objects.
        pixels: Says which bands and page of a file are used.
        decode: See `inspect_image`.

    Returns:
        The images, without entries that lack an id or a name.
    """
    images = _list_images(entries, folder, problems=problems)
    rows = [row for row, code in enumerate(images.codes) if not code]
    paths = [folder.folder / images.names[row] for row in rows]
    inspected = inspect_images(paths, pixels, decode=decode)
    for row, facts in zip(rows, inspected, strict=True):
        images.codes[row], images.num_bytes[row] = facts.problem or "", facts.num_bytes
        if facts.problem is None:
            images.sizes[row], images.exif[row] = (facts.height, facts.width), facts.orientation
            if facts.pixel_type != PIXEL_TYPES[0]:
                images.pixel_types[row] = PIXEL_TYPES.index(facts.pixel_type)
                problems.add("image-pixel-type", f"{images.names[row]}: {facts.pixel_type}")
        elif facts.detail:
            images.hints[images.names[row]] = facts.detail
    return images


def _list_images(entries: list[Raw], folder: ImageFolder, *, problems: Problems) -> Images:
    names: list[str] = []
    codes, ids, sizes = [], [], []
    row_of: dict[int | str, int] = {}
    row_of_name: dict[str, int] = {}
    decoded = list(read_entries(entries, ImageEntry))
    places = folder.find_all(entry.name for entry in decoded if entry and entry.name)
    for position, entry in enumerate(decoded):
        image_id = None if entry is None else to_key(entry.id)
        name = None if entry is None else entry.name
        if entry is None or image_id is None or name is None:
            problems.add("image-malformed", f"entry {position}")
            continue
        if isinstance(image_id, str):
            problems.add("id-renumbered", f"image {image_id!r}")
        elif type(entry.id) is not int:
            problems.add("id-not-integer", f"image {entry.id!r}")
        path, code = places[name]
        row = row_of_name.setdefault(path, len(names))
        known = row_of.setdefault(image_id, row)
        if known != row:
            both = f"image {image_id}: {names[known]!r} and {name!r}"
            problems.add("image-id-ambiguous", both)
        if row < len(names):
            if known == row:
                problems.add("image-listed-twice", path)
            continue
        if code == RESPELLED:
            problems.add(code, name)
        names.append(path)
        codes.append("" if code == RESPELLED else code)
        ids.append(image_id)
        sizes.append(to_size(entry))
    keys = number_keys(row_of)
    numbers = [keys[one] if isinstance(one, str) else one for one in ids]
    sizes_json = np.array(sizes, dtype=np.int32).reshape(-1, 2)
    upright = np.full(len(ids), UPRIGHT, dtype=np.uint8)
    return Images(
        names=names,
        ids=np.array(numbers, dtype=np.int64),
        sizes=sizes_json.copy(),
        sizes_json=sizes_json,
        exif=upright,
        orientations=upright.copy(),
        num_bytes=np.zeros(len(ids), dtype=np.int64),
        pixel_types=np.zeros(len(ids), dtype=np.uint8),
        codes=codes,
        hints=folder.hints,
        row_of=row_of,
        keys=keys,
    )


class Categories:
    """The categories of a COCO file: those that it lists, and those that only its objects name.

    Attributes:
        listed: Those that the file lists, from `to_key` of the id to the name.
        names: From category id to name, for the categories that are listed or used; complete once
            `number` was called.
        keys: From names, and from ids that are text, to category ids; the same.
    """

    def __init__(self, listed: dict[int | str, str]) -> None:
        """Starts with the categories that are listed: from `to_key` of the id to the name."""
        self.listed = listed
        self._key_of_name = {name: key for key, name in reversed(listed.items())}
        self._used: dict[int | str, int] = {}  # keys, numbered in order of their first object
        self.names: dict[int, str] = {}
        self.keys: dict[str, int] = {}

    def find(self, raw: Any) -> tuple[int, str]:
        """The category of an object.

        Args:
            raw: Its category_id, whatever it is.

        Returns:
            What `number` needs to give the category's id; and what is wrong, a code or ''.
        """
        key, code = to_key(raw), ""
        if key is None:
            return -1, "category-missing"
        if key not in self.listed and isinstance(key, str):
            key, code = self._key_of_name.get(key, key), "category-named"
        if key not in self.listed and self.listed:
            code = "category-unknown"
        return self._used.setdefault(key, len(self._used)), code

    def number(self, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        """Gives each category an id: its own where that is a whole number.

        Args:
            keys: int64 [K], of objects, from `find`.

        Returns:
            int64 [K], category ids, or `NO_CATEGORY`.
        """
        numbers = number_keys([*self.listed, *self._used])

        def id_of(key: int | str) -> int:
            return numbers[key] if isinstance(key, str) else key

        self.names = {id_of(key): name for key, name in self.listed.items()}
        for key in self._used:
            self.names.setdefault(id_of(key), key if isinstance(key, str) else f"category {key}")
        if (keys < 0).any():
            self.names.setdefault(NO_CATEGORY, "unknown")
        self.keys = {name: number for number, name in reversed(self.names.items())} | numbers
        return np.array([*map(id_of, self._used), NO_CATEGORY], dtype=np.int64)[keys]


def read_categories(raw: Any, problems: Problems, *, annotations: list[Raw]) -> Categories:
    """Reads the category entries.

    Args:
        raw: `Document.categories`, whatever it is.
        problems: Problems are added to it.
        annotations: `Document.annotations`, which tell what a plain list of names is numbered from.
    """
    entries = _category_entries(raw, annotations, problems)
    if not entries:
        problems.add("categories-missing", "categories")
    listed: dict[int | str, str] = {}
    for position, entry in enumerate(entries):
        key = to_key(entry.get("id")) if isinstance(entry, dict) else None
        name = entry.get("name") if isinstance(entry, dict) else None
        name = str(name) if isinstance(name, (int, float)) else name
        if key is None or not isinstance(name, str):
            problems.add("category-malformed", f"entry {position}")
            continue
        if isinstance(key, str):
            problems.add("id-renumbered", f"category {key!r}")
        elif type(entry["id"]) is not int:
            problems.add("id-not-integer", f"category {entry['id']!r}")
        if key in listed:
            problems.add("category-id-twice", f"category {key} ({name})")
            continue
        if name in listed.values():
            problems.add("category-name-twice", f"{name} (category {key})")
        listed[key] = name
    return Categories(listed)


def _category_entries(raw: Any, annotations: list[Raw], problems: Problems) -> list[Any]:
    # As COCO lists them, also from a list of names, and from a table of names or ids.
    if isinstance(raw, dict) and not {"id", "name"} <= raw.keys():
        problems.add("categories-table", f"{len(raw)} entries")
        if all(type(value) is int for value in raw.values()):
            return [{"id": value, "name": key} for key, value in raw.items()]
        return [
            {"id": key, **value} if isinstance(value, dict) else {"id": key, "name": value}
            for key, value in raw.items()
        ]
    if isinstance(raw, list) and raw and all(isinstance(name, str) for name in raw):
        used = {to_id(one.category_id) for one in read_entries(annotations, ObjectEntry) if one}
        first = 0 if 0 in used else 1
        problems.add("categories-table", f"{len(raw)} names, numbered from {first}")
        return [{"id": number, "name": name} for number, name in enumerate(raw, first)]
    return raw if isinstance(raw, list) else [raw] * isinstance(raw, dict)


def check_category_ids(
    categories: dict[int | str, str], used: set[int], *, problems: Problems
) -> None:
    """Adds gaps between category ids and an unused id 0 to the problems.

    Args:
        categories: `Categories.listed`.
        used: The category ids of all objects.
        problems: Problems are added to it.
    """
    if 0 in categories and 0 not in used and len(categories) > 1:
        problems.add("category-placeholder", f"0 ({categories[0]})")
    ids = sorted(key for key in categories if isinstance(key, int))
    gaps = [after for before, after in itertools.pairwise(ids) if after != before + 1]
    problems.add(
        "category-ids-not-contiguous", *(f"gap before {category_id}" for category_id in gaps)
    )
