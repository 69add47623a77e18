"""Which objects with `iscrowd` 1 are crowds. Imports no torch."""

import cv2
import numpy as np
from numpy.typing import NDArray

from samft.annotations.entries import CROWD, Objects
from samft.annotations.problems import Problems
from samft.annotations.segmentation import decode_cropped

# What crowds look like. Of the 13 crowds among 1,041 objects of COCO 2017, 11 are in several parts,
# 11 have boxes of over 4 times the median of their class, 10 cover boxes of ordinary objects of it.
_LARGE = 4  # times the median area of the boxes of the class's ordinary objects
_PART = 0.02  # share of a mask from which on a part counts; a brush leaves stray pixels
_COVERED = 0.5  # share of a box
_RARE, _SPARSE = 0.05, 0.4  # crowds for each object; share of its box that a mask fills
_MOST_LOOKED_AT = 500  # masks that are decoded to decide on a file


def mark_crowds(
    objects: Objects, sizes: NDArray[np.int32], *, mode: str, problems: Problems
) -> None:
    """Clears `CROWD` in the flags of objects that are no crowds.

    COCO's crowds are regions of many objects that nobody drew one by one: rare, large, in several
    parts, around ordinary objects of their class. CVAT and Datumaro write `iscrowd: 1` to each mask
    that was painted with a brush, because in COCO's own files only crowds are RLE.

    Args:
        objects: Of one file, `CROWD` where its iscrowd is 1.
        sizes: int32 [N, 2], H, W of the images, px.
        mode: `auto` decides by what the masks look like, `leave_out` believes iscrowd, `use` never
            does.
        problems: What is left out and what is used are added to it.
    """
    called = np.flatnonzero(objects.flags & CROWD)
    is_crowd = np.full(len(called), mode == "leave_out")
    if mode == "auto" and len(called):
        is_crowd = _find_crowds(objects, called, sizes)
    objects.flags[called[~is_crowd]] &= ~np.uint8(CROWD)
    problems.add_ids("crowd-used", objects.ids[called[~is_crowd]], noun="object")
    problems.add_ids("crowd", objects.ids[called[is_crowd]], noun="object")


def _find_crowds(
    objects: Objects, called: NDArray[np.int64], sizes: NDArray[np.int32]
) -> NDArray[np.bool_]:
    ordinary = np.flatnonzero(objects.flags & CROWD == 0)
    if not len(ordinary):  # a file of nothing but crowds has nothing that they could be told from
        return np.zeros(len(called), dtype=bool)
    is_rle, boxes = objects.segmentations.are_rle(), objects.boxes[called]
    marks = _is_large(objects, called, ordinary).astype(int)
    marks += _covers_objects(objects, called)
    sample = np.unique(np.linspace(0, len(called) - 1, _MOST_LOOKED_AT).astype(int))
    in_parts = _in_parts(objects, called[sample], sizes)
    # Of one in many objects, as in COCO, gaps within its box are enough.
    has_gaps = objects.areas[called] < _SPARSE * (boxes[:, 2:] - boxes[:, :2]).prod(1)
    has_gaps &= len(called) < _RARE * len(ordinary)
    num_marked = np.count_nonzero(marks[sample] + in_parts + has_gaps[sample])
    # A tool that calls each RLE a crowd calls no polygon so, and writes no RLE of other objects.
    classes = np.unique(objects.categories[called])
    same_class = ordinary[np.isin(objects.categories[ordinary], classes)]
    means_rle = is_rle[called].mean() > 0.5 and is_rle[same_class].sum() < len(called)
    if len(called) <= len(ordinary) and (2 * num_marked >= len(sample) or not means_rle):
        return np.ones(len(called), dtype=bool)
    suspects = np.flatnonzero(marks)
    marks[suspects] += _in_parts(objects, called[suspects], sizes)
    return np.asarray(marks >= 2)


def _is_large(
    objects: Objects, called: NDArray[np.int64], ordinary: NDArray[np.int64]
) -> NDArray[np.bool_]:
    areas = (objects.boxes[:, 2:] - objects.boxes[:, :2]).prod(1)
    large = np.zeros(len(called), dtype=bool)
    for category in np.unique(objects.categories[called]).tolist():
        usual = areas[ordinary[objects.categories[ordinary] == category]]
        if len(usual):
            of_class = objects.categories[called] == category
            large[of_class] = areas[called[of_class]] >= _LARGE * np.median(usual)
    return large


def _covers_objects(objects: Objects, called: NDArray[np.int64]) -> NDArray[np.bool_]:
    # Whether most of the box of an ordinary object of the class lies in the box of each.
    covers = np.zeros(len(called), dtype=bool)
    firsts = np.searchsorted(objects.rows, objects.rows[called])
    lasts = np.searchsorted(objects.rows, objects.rows[called], side="right")
    for number, (k, first, last) in enumerate(zip(called.tolist(), firsts, lasts, strict=True)):
        others = objects.boxes[first:last][
            (objects.categories[first:last] == objects.categories[k])
            & (objects.flags[first:last] & CROWD == 0)
        ]
        low = np.maximum(others[:, :2], objects.boxes[k, :2])
        high = np.minimum(others[:, 2:], objects.boxes[k, 2:])
        common = np.maximum(high - low, 0).prod(1)
        covers[number] = (common >= _COVERED * (others[:, 2:] - others[:, :2]).prod(1)).any()
    return covers


def _in_parts(
    objects: Objects, which: NDArray[np.int64], sizes: NDArray[np.int32]
) -> NDArray[np.bool_]:
    several = np.zeros(len(which), dtype=bool)
    for number, k in enumerate(which.tolist()):
        height, width = sizes[objects.rows[k]].tolist()
        mask = decode_cropped(objects.segmentations[k], (height, width)).mask
        if mask.size:
            _, _, measures, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
            areas = measures[1:, cv2.CC_STAT_AREA]
            several[number] = (areas >= _PART * areas.sum()).sum() > 1
    return several
