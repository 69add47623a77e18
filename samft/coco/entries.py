"""The entries of 'images' of a COCO file, matched with the files on disk. Imports no torch.

The entries of 'annotations' of a COCO file, checked many at a time. Imports no torch.
"""

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from samft.coco.images import ImageFacts, inspect_image
from samft.coco.json_reader import UNSET, ImageEntry, ObjectEntry, Raw, read_entries, to_id, to_size
from samft.coco.layout import ImageFolder
from samft.coco.problems import MAX_EXAMPLES, Problems
from samft.coco.segmentation import (
    CheckedMasks,
    RawMasks,
    Segmentations,
    count_pixels,
    decode_cropped,
)

_THREADS = 8  # a network disk answers many questions at once
_PART = 64  # files a thread looks at in one go: handing over a single one costs as much as the look


@dataclass
class Images:
    """The images of a COCO file, one row for each file, N of them.

    Attributes:
        names: Relative to the image folder, as found.
        ids: int64 [N].
        sizes: int32 [N, 2], H, W of the file; what the JSON says where the file cannot be read.
        num_bytes: int64 [N], of the file; 0 where it cannot be read.
        codes: [N] why the file cannot be used, a key of `problems.KINDS`, or ''.
        row_of: From every image id to its row.
    """

    names: list[str]
    ids: NDArray[np.int64]
    sizes: NDArray[np.int32]
    num_bytes: NDArray[np.int64]
    codes: list[str]
    row_of: dict[int, int]


def read_images(entries: list[Raw], folder: ImageFolder, problems: Problems) -> Images:
    """Reads the entries, finds their files and looks at the head and the end of each file.

    Args:
        entries: Of `Document.images`.
        folder: Where the files are.
        problems: What is found is added, but for the images' own codes, which matter only where an
            image has objects.

    Returns:
        The images; entries without an id or a name are left out.
    """
    images = _read_entries(entries, folder, problems)
    rows = [row for row, code in enumerate(images.codes) if not code]
    sizes = images.sizes.tolist()
    paths = [folder.folder / images.names[row] for row in rows]
    for row, facts in zip(rows, inspect_images(paths), strict=True):
        images.codes[row], images.num_bytes[row] = facts.problem or "", facts.num_bytes
        if facts.problem is None:
            _compare(images.names[row], facts, tuple(sizes[row]), problems)
            images.sizes[row] = facts.height, facts.width
    return images


def _read_entries(entries: list[Raw], folder: ImageFolder, problems: Problems) -> Images:
    names: list[str] = []
    codes, ids, sizes = [], [], []
    row_of: dict[int, int] = {}
    row_of_name: dict[str, int] = {}
    for position, entry in enumerate(read_entries(entries, ImageEntry)):
        image_id = None if entry is None else to_id(entry.id)
        name = None if entry is None else entry.file_name
        if entry is None or image_id is None or not isinstance(name, str) or not name.strip():
            problems.add("image-malformed", f"entry {position}")
            continue
        if type(entry.id) is not int:
            problems.add("id-not-integer", f"image {entry.id!r}")
        found, code = folder.find(name)
        row = row_of_name.setdefault(found, len(names))
        known = row_of.setdefault(image_id, row)
        if known != row:
            both = f"image {image_id}: {names[known]!r} and {name!r}"
            problems.add("image-id-ambiguous", both)
        if row < len(names):
            if known == row:
                problems.add("image-listed-twice", found)
            continue
        if code == "image-name-mended":
            problems.add(code, name)
        names.append(found)
        codes.append("" if code == "image-name-mended" else code)
        ids.append(image_id)
        sizes.append(to_size(entry))
    arrays = np.array(ids, dtype=np.int64), np.array(sizes, dtype=np.int32).reshape(-1, 2)
    return Images(names, *arrays, np.zeros(len(ids), dtype=np.int64), codes, row_of)


def inspect_images(paths: list[Path]) -> Iterator[ImageFacts]:
    """Looks at many files at once, see `inspect_image`; what it finds, in the order given."""
    bar = tqdm(total=len(paths), desc="looking at images", unit="image", disable=None, delay=2)
    parts = [paths[first : first + _PART] for first in range(0, len(paths), _PART)]
    with bar, ThreadPoolExecutor(_THREADS) as pool:
        for facts in pool.map(lambda part: [inspect_image(path) for path in part], parts):
            bar.update(len(facts))
            yield from facts


def _compare(name: str, facts: ImageFacts, size_json: tuple[int, int], problems: Problems) -> None:
    size = facts.height, facts.width
    if size_json == (0, 0):
        problems.add("image-size-missing", name)
    elif size_json != size:
        words = f"{name}: {size_json[1]}x{size_json[0]} is {size[1]}x{size[0]}"
        turned = facts.orientation > 4 and size_json == size[::-1]
        problems.add("image-size-differs", words + (", as if turned by EXIF" if turned else ""))
    if facts.orientation != 1:
        problems.add("image-exif-rotated", name)


CROWD = 1  # a bit of `Objects.flags`
NO_CATEGORY = -1
NO_ID = -(2**63)
_MASKS = "segmentations"
_TINY = 16  # px
_NONE = [float("nan")] * 4
_BOX_CODES = (
    "",
    "box-missing",
    "box-malformed",
    "box-not-finite",
    "box-empty",
    "box-outside",
    "box-unlike-mask",
)


@dataclass
class Objects:
    """The usable objects of a COCO file, crowds included, grouped by image, K of them.

    Attributes:
        rows: int64 [K], the row in `Images` of each.
        positions: int64 [K], the place in the list 'annotations'.
        ids: int64 [K], each one different.
        categories: int64 [K], the category's id, or `NO_CATEGORY`.
        flags: uint8 [K], bits: `CROWD`.
        boxes: float64 [K, 4], x0 y0 x1 y1, px, original frame.
        areas: float64 [K], of the mask, px; exact below 40 px, else of the polygons.
        segmentations: [K].
    """

    rows: NDArray[np.int64]
    positions: NDArray[np.int64]
    ids: NDArray[np.int64]
    categories: NDArray[np.int64]
    flags: NDArray[np.uint8]
    boxes: NDArray[np.float64]
    areas: NDArray[np.float64]
    segmentations: Segmentations

    def take(self, which: NDArray[np.int64]) -> "Objects":
        """Some of the objects, in the order given."""
        arrays = {name: value[which] for name, value in vars(self).items() if name != _MASKS}
        return Objects(segmentations=self.segmentations.take(which), **arrays)


@dataclass(frozen=True)
class _Numbers:
    masks: CheckedMasks
    sizes: NDArray[np.float64]  # [n, 2] H, W of the image of each object
    boxes: NDArray[np.float64]  # [n, 4] x y w h, as annotated
    good: NDArray[np.bool_]  # [n] whether the mask can be used


class ObjectChunk:
    """Some entries: their fields, type by type, then all their numbers at once."""

    def __init__(self, images: Images, categories: set[int], lost: Counter[int]) -> None:
        """Begins with none.

        Args:
            images: Of the same file.
            categories: The known category ids.
            lost: Counts, by row, objects of images that cannot be used.
        """
        self.images, self.known_categories, self.lost = images, categories, lost
        self.labels: list[str] = []
        self.rows: list[int] = []
        self.positions: list[int] = []
        self.ids: list[int] = []
        self.categories: list[int] = []
        self.crowd: list[bool] = []
        self.areas_json: list[float] = []
        self.boxes = array("d")  # x y w h
        self.box_codes: list[int] = []
        self.masks = RawMasks()
        self.noted: defaultdict[str, list[str]] = defaultdict(list)

    def take(self, position: int, entry: ObjectEntry | None) -> None:
        """Takes the next entry, unless it is none or has no image."""
        if entry is None:
            self.noted["annotation-malformed"].append(f"entry {position}")
            return
        object_id = to_id(entry.id)
        label = f"entry {position}" if object_id is None else f"object {object_id}"
        image_id = to_id(entry.image_id)
        row = None if image_id is None else self.images.row_of.get(image_id)
        if row is None:
            known = "annotation-image-missing" if image_id is None else "annotation-orphan"
            self.noted[known].append(label if image_id is None else f"{label}: image {image_id}")
        elif self.images.codes[row]:
            self.lost[row] += 1
        else:
            self.labels.append(label)
            self.rows.append(row)
            self.positions.append(position)
            self._take_ids(entry, object_id, label)
            self._take_crowd(entry.iscrowd, label)
            self._take_box(entry.bbox)
            self.areas_json.append(
                entry.area if isinstance(entry.area, float) else to_id(entry.area) or -1
            )
            self.masks.add(None if entry.segmentation is UNSET else entry.segmentation)

    def _take_ids(self, entry: ObjectEntry, object_id: int | None, label: str) -> None:
        category = to_id(entry.category_id)
        if category is None:
            self.noted["category-missing"].append(label)
        elif self.known_categories and category not in self.known_categories:
            self.noted["category-unknown"].append(f"{label}: category {category}")
        self.categories.append(NO_CATEGORY if category is None else category)
        if object_id is None:
            self.noted["annotation-id-missing"].append(label)
        elif object_id == 0:
            self.noted["annotation-id-zero"].append(label)
        self.ids.append(NO_ID if object_id is None else object_id)
        for raw in (entry.id, entry.image_id, entry.category_id):
            if type(raw) is not int and to_id(raw) is not None:
                self.noted["id-not-integer"].append(f"{label}: {raw!r}")
                break

    def _take_crowd(self, raw: Any, label: str) -> None:
        if raw is UNSET:
            self.noted["iscrowd-missing"].append(label)
        elif type(raw) is not int or raw not in (0, 1):
            self.noted["iscrowd-malformed"].append(f"{label}: {str(raw)[:20]}")
        self.crowd.append(raw is not UNSET and bool(to_id(raw)))

    def _take_box(self, raw: Any) -> None:
        code = 1 if raw is UNSET or raw is None else 0
        if not code:
            try:
                if len(raw) != 4:
                    raise TypeError
                self.boxes.fromlist(raw)
            except (TypeError, OverflowError):
                code = 2
        if code:
            self.boxes.fromlist(_NONE)
        self.box_codes.append(code)

    def finish(self, problems: Problems) -> Objects:
        """Checks the numbers of all entries that were taken, and keeps what can be used."""
        for code, labels in self.noted.items():
            problems.add(code, *labels[:MAX_EXAMPLES], count=len(labels))
        masks = self.masks.check()
        rows = np.array(self.rows, dtype=np.int64)
        sizes = self.images.sizes[rows].astype(np.float64)
        self._find_empty(masks, sizes)
        raw_boxes = np.frombuffer(self.boxes).reshape(-1, 4) if self.boxes else np.zeros((0, 4))
        good = np.asarray(masks.codes == "", dtype=bool)
        found = _Numbers(masks, sizes, raw_boxes, good)
        boxes = self._check_boxes(found, problems)
        self._note_masks(found, problems)
        kept = np.flatnonzero(good)
        return Objects(
            rows=rows[kept],
            positions=np.array(self.positions, dtype=np.int64)[kept],
            ids=np.array(self.ids, dtype=np.int64)[kept],
            categories=np.array(self.categories, dtype=np.int64)[kept],
            flags=np.where(np.array(self.crowd, dtype=bool), CROWD, 0).astype(np.uint8)[kept],
            boxes=boxes[kept],
            areas=masks.areas[kept],
            segmentations=masks.segmentations.take(kept),
        )

    def _find_empty(self, masks: CheckedMasks, sizes: NDArray[np.float64]) -> None:
        # A polygon inside of the image that is thicker than a few pixels covers some: no need to
        # draw it. Nosarzewska's bound asks for half the perimeter.
        corner = sizes[:, ::-1]
        inside = (masks.extents[:, :2] >= 0).all(1) & (masks.extents[:, 2:] <= corner).all(1)
        good = np.asarray(masks.codes == "", dtype=bool)
        sure = inside & (masks.areas > 2 * masks.perimeters)
        low, high = masks.extents[:, :2], masks.extents[:, 2:]
        outside = np.asarray(((high <= 0) | (low >= corner)).any(1))
        for k in np.flatnonzero(good & ~sure).tolist():
            height, width = sizes[k].astype(int).tolist()
            masks.areas[k] = 0
            if not outside[k]:
                masks.areas[k] = count_pixels(masks.segmentations[k], height, width)
            if masks.areas[k] == 0:
                masks.codes[k] = "mask-outside" if outside[k] else "mask-without-pixels"

    def _check_boxes(self, found: "_Numbers", problems: Problems) -> NDArray[np.float64]:
        masks, sizes, raw, good = found.masks, found.sizes, found.boxes, found.good
        with np.errstate(all="ignore"):
            boxes = np.concatenate([raw[:, :2], raw[:, :2] + raw[:, 2:]], axis=1)
            codes = np.where(~np.isfinite(boxes).all(1), 3, 0)
            codes = np.where((codes == 0) & (raw[:, 2:] <= 0).any(1), 4, codes)
            codes = np.where((codes == 0) & ~_fits(boxes, sizes), 5, codes)
            codes = np.where((codes == 0) & _unlike(boxes, masks.extents, sizes), 6, codes)
        missing = np.array(self.box_codes, dtype=np.int64)
        codes = np.where(missing > 0, missing, codes)
        for k in np.flatnonzero(good & (codes > 0)).tolist():
            height, width = sizes[k].astype(int).tolist()
            drawn = decode_cropped(masks.segmentations[k], height, width).extent
            # An outline that runs back on itself reaches further than what is drawn of it.
            if _BOX_CODES[codes[k]] == "box-unlike-mask" and np.abs(boxes[k] - drawn).max() <= 2:
                codes[k] = 0
                continue
            problems.add(_BOX_CODES[codes[k]], self.labels[k])
            boxes[k] = drawn
        leaving = _furthest_outside(boxes, sizes) > 0.01
        self._note(problems, "box-leaves-image", good & leaving)
        self._note(problems, "box-thin", good & (codes == 0) & (raw[:, 2:] < 2).any(1))
        return boxes

    def _note_masks(self, found: "_Numbers", problems: Problems) -> None:
        masks, sizes, good = found.masks, found.sizes, found.good
        for code in sorted(set(masks.codes.tolist()) - {""}):
            self._note(problems, code, np.asarray(masks.codes == code, dtype=bool))
        flat = np.zeros(len(good), dtype=bool)
        flat[self.masks.flat] = True
        other = np.zeros(len(good), dtype=bool)
        for k, size in masks.rle_sizes.items():
            other[k] = size != tuple(sizes[k].astype(int).tolist())
        box_areas = found.boxes[:, 2] * found.boxes[:, 3]
        areas_json = np.array(self.areas_json, dtype=np.float64)
        is_box = np.abs(areas_json - box_areas) <= 1e-3 * np.maximum(box_areas, 1)
        self._note(problems, "polygon-part-left-out", good & masks.part_left_out)
        self._note(problems, "polygon-flat", good & flat)
        self._note(problems, "polygon-parts", good & (masks.num_parts > 1))
        self._note(problems, "rle-size-differs", good & other)
        is_rle = np.zeros(len(good), dtype=bool)
        is_rle[list(masks.rle_sizes)] = True
        leaving = _furthest_outside(masks.extents, sizes) > 1
        self._note(problems, "polygon-leaves-image", good & ~is_rle & leaving)
        self._note(problems, "mask-tiny", good & (masks.areas < _TINY))
        self._note(problems, "area-is-box", good & is_box & (masks.areas < 0.95 * box_areas))

    def _note(self, problems: Problems, code: str, which: NDArray[np.bool_]) -> None:
        found = np.flatnonzero(which)
        examples = [self.labels[k] for k in found[:MAX_EXAMPLES]]
        problems.add(code, *examples, count=len(found))


def _fits(boxes: NDArray[np.float64], sizes: NDArray[np.float64]) -> NDArray[np.bool_]:
    # A box may leave the image, but not by more than the image's size.
    corner = sizes[:, ::-1]
    low, high = boxes[:, :2], boxes[:, 2:]
    good = (low >= -corner) & (low < corner) & (high > 0) & (high <= 2 * corner)
    return np.asarray(good.all(1))


def _unlike(
    boxes: NDArray[np.float64], extents: NDArray[np.float64], sizes: NDArray[np.float64]
) -> NDArray[np.bool_]:
    # Less than half in common, and that not by a pixel or two of rounding.
    limit = np.tile(sizes[:, ::-1], 2)
    ours, other = np.clip(boxes, 0, limit), np.clip(extents, 0, limit)
    low, high = np.maximum(ours[:, :2], other[:, :2]), np.minimum(ours[:, 2:], other[:, 2:])
    common = np.maximum(high - low, 0).prod(1)
    both = (ours[:, 2:] - ours[:, :2]).prod(1) + (other[:, 2:] - other[:, :2]).prod(1)
    return np.asarray((common < 0.5 * (both - common)) & (np.abs(ours - other).max(1) > 2))


def _furthest_outside(
    boxes: NDArray[np.float64], sizes: NDArray[np.float64]
) -> NDArray[np.float64]:
    outside = np.concatenate([-boxes[:, :2], boxes[:, 2:] - sizes[:, ::-1]], axis=1)
    return np.asarray(outside.max(1))
