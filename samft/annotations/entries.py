"""The objects of a COCO file, checked in bulk, and which of them are crowds. Imports no torch.

Of objects, first the fields are read one by one, then all numbers of many objects at once.
"""

import hashlib
import itertools
from array import array
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from samft.annotations.boxes import (
    BOX_CODES,
    BOX_MALFORMED,
    BOX_MISSING,
    MAX_ROUNDING,
    UNLIKE_MASK,
    Evidence,
    distance_outside,
    judge_boxes,
    to_corners,
)
from samft.annotations.frame import OutlineFrame
from samft.annotations.image_entries import Categories, Images
from samft.annotations.json_reader import (
    UNSET,
    ObjectEntry,
    Raw,
    read_entries,
    to_id,
    to_key,
    value_of,
)
from samft.annotations.mask_checks import CheckedMasks, RawMasks
from samft.annotations.problems import MAX_EXAMPLES, Problems
from samft.annotations.segmentation import Segmentations, decode_cropped
from samft.runtime.logs import progress_bar

CROWD = 1  # a bit of `Objects.flags`; as read, of objects with iscrowd 1, see `crowds.mark_crowds`
NO_ID = -(2**63)
_CHUNK = 20_000  # objects that are decoded and checked at a time
_TINY = 16  # px; masks below it are reported
_NO_BOX = [float("nan")] * 4


@dataclass
class Objects:
    """The usable objects of a COCO file, crowds included, grouped by image, K of them.

    Attributes:
        rows: int64 [K], rows of their images in `Images`.
        positions: int64 [K], positions in the list 'annotations'.
        ids: int64 [K], unique.
        categories: int64 [K], category ids, or `NO_CATEGORY`.
        flags: uint8 [K], bits: `CROWD`.
        boxes: float64 [K, 4], x0 y0 x1 y1, px, original frame.
        areas: float64 [K], of the masks, px; exact below 40 px, else of the polygons.
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
        arrays = {name: getattr(self, name)[which] for name in _OBJECT_ARRAYS}
        return Objects(segmentations=self.segmentations.take(which), **arrays)

    @classmethod
    def concatenate(cls, chunks: list["Objects"]) -> "Objects":
        """The objects of all chunks, grouped by image, in the order of the file within each."""
        arrays = {
            name: np.concatenate([getattr(chunk, name) for chunk in chunks])
            for name in _OBJECT_ARRAYS
        }
        buffers = [chunk.segmentations.buffer for chunk in chunks]
        ends = np.cumsum([0, *(len(buffer) for buffer in buffers)])
        starts = np.concatenate(
            [chunk.segmentations.starts + end for chunk, end in zip(chunks, ends, strict=False)]
        )
        segmentations = Segmentations(np.concatenate(buffers), starts)
        whole = cls(segmentations=segmentations, **arrays)
        return whole.take(np.argsort(whole.rows, kind="stable"))


_OBJECT_ARRAYS = ("rows", "positions", "ids", "categories", "flags", "boxes", "areas")


def read_objects(
    entries: list[Raw],
    images: Images,
    *,
    categories: Categories,
    problems: Problems,
    frame: OutlineFrame,
    evidence: Evidence,
) -> Objects:
    """Reads and checks the object entries.

    Args:
        entries: `Document.annotations`.
        images: Of the same file. `codes` becomes `image-unused-bad` for bad images without objects.
        categories: Of the same file; becomes complete.
        problems: Problems are added to it, also those of bad images.
        frame: How outlines become outlines on the pixels.
        evidence: Collects the numbers of the objects, for the choice of the frame.

    Returns:
        The objects that can be used; an unusable box is replaced by the mask's extent.
    """
    chunks = []
    lost: Counter[int] = Counter()
    keys: dict[str, int] = {}
    bar = progress_bar(total=len(entries), desc="checking objects", unit="object", delay=2)
    with bar:
        for first in range(0, max(len(entries), 1), _CHUNK):
            part = entries[first : first + _CHUNK]
            chunk = ObjectChunk(images, categories=categories, keys=keys, lost=lost)
            for position, entry in enumerate(read_entries(part, ObjectEntry), first):
                chunk.add(position, entry)
            chunks.append(chunk.finish(problems, frame, evidence))
            bar.update(len(part))
    _add_bad_images(images, lost, problems)
    objects = Objects.concatenate(chunks)
    objects.categories = categories.number(objects.categories)
    objects = _make_ids_unique(objects, entries, problems, keys=keys)
    _note_copies(objects, problems)
    return objects


def _note_copies(objects: Objects, problems: Problems) -> None:
    # Of other ids, but equal in all else: of two exports that were joined, say.
    numbers = np.column_stack(
        [objects.rows, objects.areas, objects.boxes, objects.categories, objects.flags]
    )
    keys = (objects.categories, objects.boxes[:, 0], objects.areas, objects.rows)
    order = np.lexsort(keys)  # keeps the order of the file
    alike = np.flatnonzero((numbers[order[1:]] == numbers[order[:-1]]).all(1))
    for first, k in zip(order[alike].tolist(), order[alike + 1].tolist(), strict=True):
        if objects.segmentations.are_equal(first, k):
            problems.add("object-twice", f"objects {objects.ids[first]} and {objects.ids[k]}")


def _add_bad_images(images: Images, lost: Counter[int], problems: Problems) -> None:
    for row, code in enumerate(images.codes):
        if code and lost[row]:
            name, plural = images.names[row], "s" * (lost[row] > 1)
            hint = f"; {images.hints[name]}" if name in images.hints else ""
            problems.add(code, f"{name} ({lost[row]} object{plural}{hint})")
        elif code:
            images.codes[row] = "image-unused-bad"
            problems.add("image-unused-bad", images.names[row])


def _make_ids_unique(
    objects: Objects, entries: list[Raw], problems: Problems, *, keys: dict[str, int]
) -> Objects:
    # A repeated entry is left out; another object with a used id, or with none, gets a free one.
    # By id, and by position within it: of equal ids, the first in the file keeps it.
    order = np.lexsort([objects.positions, objects.ids])
    ids = objects.ids[order]
    again = np.flatnonzero((ids[1:] == ids[:-1]) & (ids[1:] != NO_ID)) + 1
    firsts = np.searchsorted(ids, ids[again])
    kept = np.ones(len(ids), dtype=bool)
    renewed = objects.ids <= NO_ID + len(keys)
    labels = {number: key for key, number in keys.items()}
    seen: dict[int, set[bytes]] = {}  # id -> hashes of its entries, so that none is compared twice
    for k, first in zip(order[again].tolist(), order[firsts].tolist(), strict=True):
        object_id = int(objects.ids[k])
        if object_id not in seen:
            seen[object_id] = {_hash_entry(entries[objects.positions[first]])}
        hashed = _hash_entry(entries[objects.positions[k]])
        kept[k] = hashed not in seen[object_id]
        code = "annotation-id-twice" if kept[k] else "annotation-duplicate"
        problems.add(code, f"object {labels.get(object_id, object_id)}")
        seen[object_id].add(hashed)
        renewed[k] = True
    renewed &= kept
    if renewed.any():
        taken = set(objects.ids.tolist())
        free = (number for number in itertools.count(1) if number not in taken)
        for k in sorted(np.flatnonzero(renewed).tolist(), key=objects.positions.__getitem__):
            objects.ids[k] = next(free)
    return objects if kept.all() else objects.take(np.flatnonzero(kept))


def _hash_entry(entry: Raw) -> bytes:
    # Equal for entries of equal fields, in whatever order.
    try:
        text = msgspec.json.encode(value_of(entry), order="sorted")
    except (ValueError, OverflowError, RecursionError):  # lone surrogates, numbers over 64 bits
        text = repr(entry).encode(errors="surrogatepass")
    return hashlib.sha256(text).digest()


class ObjectChunk:
    """Object entries that are checked together: first their fields, then all their numbers."""

    def __init__(
        self, images: Images, *, categories: Categories, keys: dict[str, int], lost: Counter[int]
    ) -> None:
        """Starts with no entry.

        Args:
            images: Of the same file.
            categories: Of the same file.
            keys: From ids that are text to numbers from `NO_ID` + 1 on, which stand for them until
                all ids are known; what is missing is added.
            lost: Counts objects of bad images, by the image's row.
        """
        self.images, self.known_categories = images, categories
        self.keys, self.lost = keys, lost
        self.labels: list[str] = []
        self.rows: list[int] = []
        self.positions: list[int] = []
        self.ids: list[int] = []
        self.categories: list[int] = []
        self.crowd: list[bool] = []
        self.areas_json: list[float] = []
        self.boxes = array("d")  # x y w h
        self.box_verdicts: list[int] = []  # indices into BOX_CODES; 0: four numbers
        self.masks = RawMasks()
        self.labels_by_code: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, position: int, entry: ObjectEntry | None) -> None:
        """Adds the next entry, unless it is malformed or has no usable image.

        Args:
            position: In the list 'annotations'.
            entry: None for one that is not a JSON object.
        """
        if entry is None:
            self.labels_by_code["annotation-malformed"].append(f"entry {position}")
            return
        object_id = to_key(entry.id)
        label = f"entry {position}" if object_id is None else f"object {object_id}"
        image_id = to_key(entry.image_id)
        row = None if image_id is None else self.images.row_of.get(image_id)
        if row is None:
            if image_id is None:
                self.labels_by_code["annotation-image-missing"].append(label)
            else:
                self.labels_by_code["annotation-orphan"].append(f"{label}: image {image_id}")
        elif self.images.codes[row]:
            self.lost[row] += 1
        else:
            self.labels.append(label)
            self.rows.append(row)
            self.positions.append(position)
            self._add_ids(entry, object_id, label)
            self._add_crowd(entry.iscrowd, label)
            self._add_box(entry.bbox)
            area = entry.area if isinstance(entry.area, float) else to_id(entry.area)
            self.areas_json.append(area or -1)
            self.masks.add(None if entry.segmentation is UNSET else entry.segmentation)

    def _add_ids(self, entry: ObjectEntry, object_id: int | str | None, label: str) -> None:
        category, code = self.known_categories.find(entry.category_id)
        self.categories.append(category)
        if code:
            which = f": category {entry.category_id}" if category >= 0 else ""
            self.labels_by_code[code].append(label + which)
        if isinstance(object_id, str):
            self.labels_by_code["id-renumbered"].append(label)
            object_id = self.keys.setdefault(object_id, NO_ID + 1 + len(self.keys))
        elif object_id is None:
            self.labels_by_code["annotation-id-missing"].append(label)
        elif object_id == 0:
            self.labels_by_code["annotation-id-zero"].append(label)
        self.ids.append(NO_ID if object_id is None else object_id)
        for raw in (entry.id, entry.image_id, entry.category_id):
            if type(raw) is not int and to_id(raw) is not None:
                self.labels_by_code["id-not-integer"].append(f"{label}: {raw!r}")
                break

    def _add_crowd(self, raw: Any, label: str) -> None:
        if raw is UNSET:
            self.labels_by_code["iscrowd-missing"].append(label)
        elif type(raw) is not int or raw not in (0, 1):
            self.labels_by_code["iscrowd-malformed"].append(f"{label}: {str(raw)[:20]}")
        self.crowd.append(raw is not UNSET and bool(to_id(raw)))

    def _add_box(self, raw: Any) -> None:
        verdict = BOX_MISSING if raw is UNSET or raw is None else 0
        if not verdict:
            try:
                if len(raw) != 4:
                    raise TypeError
                self.boxes.fromlist(raw)  # all four or none
            except (TypeError, OverflowError):
                verdict = BOX_MALFORMED
        if verdict:
            self.boxes.fromlist(_NO_BOX)
        self.box_verdicts.append(verdict)

    def finish(self, problems: Problems, frame: OutlineFrame, evidence: Evidence) -> Objects:
        """Checks the numbers of all entries that were added.

        Args:
            problems: Problems are added to it.
            frame: How outlines become outlines on the pixels.
            evidence: The numbers are added to it.

        Returns:
            The objects that can be used.
        """
        for code, labels in self.labels_by_code.items():
            problems.add(code, *labels[:MAX_EXAMPLES], count=len(labels))
        rows = np.array(self.rows, dtype=np.int64)
        positions = np.array(self.positions, dtype=np.int64)
        boxes_xywh = np.frombuffer(self.boxes).reshape(-1, 4) if self.boxes else np.zeros((0, 4))
        frame.move_outlines(self.masks, boxes_xywh, rows=rows, sizes=self.images.sizes)
        masks = self.masks.check()
        sizes = self.images.sizes[rows].astype(np.float64)
        masks.refuse_foreign(sizes)
        evidence.add(rows, positions, masks=masks, boxes_xywh=boxes_xywh)
        masks.cut_holes(np.array(self.areas_json, dtype=np.float64), sizes)
        masks.find_empty(sizes)
        boxes = self._correct_boxes(boxes_xywh, masks, sizes, problems)
        self._add_mask_problems(boxes_xywh, masks, sizes, problems)
        kept = np.flatnonzero(masks.codes == "")
        return Objects(
            rows=rows[kept],
            positions=positions[kept],
            ids=np.array(self.ids, dtype=np.int64)[kept],
            categories=np.array(self.categories, dtype=np.int64)[kept],
            flags=np.where(np.array(self.crowd, dtype=bool), CROWD, 0).astype(np.uint8)[kept],
            boxes=boxes[kept],
            areas=masks.areas[kept],
            segmentations=masks.segmentations.take(kept),
        )

    def _correct_boxes(
        self,
        boxes_xywh: NDArray[np.float64],
        masks: CheckedMasks,
        sizes: NDArray[np.float64],
        problems: Problems,
    ) -> NDArray[np.float64]:
        # x0 y0 x1 y1, with the mask's extent instead of unusable boxes.
        usable = np.asarray(masks.codes == "", dtype=bool)
        verdicts = np.array(self.box_verdicts, dtype=np.int64)
        verdicts = np.where(
            verdicts > 0, verdicts, judge_boxes(boxes_xywh, sizes, extents=masks.extents)
        )
        with np.errstate(all="ignore"):
            boxes = to_corners(boxes_xywh)
        for k in np.flatnonzero(usable & (verdicts > 0)).tolist():
            size = tuple(sizes[k].astype(int).tolist())
            drawn = decode_cropped(masks.segmentations[k], size).extent
            # An outline that runs back on itself reaches further than the mask that is drawn of it.
            if verdicts[k] == UNLIKE_MASK and np.abs(boxes[k] - drawn).max() <= MAX_ROUNDING:
                verdicts[k] = 0
                continue
            problems.add(BOX_CODES[verdicts[k]], self.labels[k])
            boxes[k] = drawn
        thin = (verdicts == 0) & (boxes_xywh[:, 2:] < 2).any(1)
        leaving = distance_outside(boxes, sizes) > 0.01
        self._add_problem(problems, "box-leaves-image", usable & leaving)
        self._add_problem(problems, "box-thin", usable & thin)
        return boxes

    def _add_mask_problems(
        self,
        boxes_xywh: NDArray[np.float64],
        masks: CheckedMasks,
        sizes: NDArray[np.float64],
        problems: Problems,
    ) -> None:
        for code in sorted(set(masks.codes.tolist()) - {""}):
            self._add_problem(problems, code, np.asarray(masks.codes == code, dtype=bool))
        flat, respelled, is_rle, other_size = np.zeros((4, len(masks.codes)), dtype=bool)
        flat[self.masks.flat] = respelled[self.masks.respelled] = True
        is_rle[list(masks.rle_sizes)] = True
        for k, size in masks.rle_sizes.items():
            other_size[k] = size != tuple(sizes[k].astype(int).tolist())
        box_areas = boxes_xywh[:, 2] * boxes_xywh[:, 3]
        areas_json = np.array(self.areas_json, dtype=np.float64)
        is_box_area = np.abs(areas_json - box_areas) <= 1e-3 * np.maximum(box_areas, 1)
        kinds = {
            "polygon-part-left-out": masks.part_left_out,
            "polygon-flat": flat,
            "mask-notation": respelled,
            "polygon-parts": (masks.num_parts > 1) & ~masks.has_holes,
            "polygon-holes": masks.has_holes,
            "rle-size-differs": other_size,
            "polygon-leaves-image": ~is_rle & (distance_outside(masks.extents, sizes) > 1),
            "mask-tiny": masks.areas < _TINY,
            "area-is-box": is_box_area & (masks.areas < 0.95 * box_areas),
        }
        usable = np.asarray(masks.codes == "", dtype=bool)
        for code, which in kinds.items():
            self._add_problem(problems, code, usable & which)

    def _add_problem(self, problems: Problems, code: str, which: NDArray[np.bool_]) -> None:
        objects = np.flatnonzero(which)
        examples = [self.labels[k] for k in objects[:MAX_EXAMPLES]]
        problems.add(code, *examples, count=len(objects))


# Crowds.
