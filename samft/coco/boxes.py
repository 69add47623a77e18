"""Annotated boxes of COCO objects, checked many at a time against their masks. Imports no torch."""

import numpy as np
from numpy.typing import NDArray

BOX_CODES = (
    "",
    "box-missing",
    "box-malformed",
    "box-not-finite",
    "box-empty",
    "box-outside",
    "box-unlike-mask",
)
BOX_MISSING, BOX_MALFORMED, NOT_FINITE, EMPTY, OUTSIDE, UNLIKE_MASK = range(1, len(BOX_CODES))
MAX_ROUNDING = 2  # px; a box that differs less from the mask's extent is the mask's


def judge_boxes(
    boxes_xywh: NDArray[np.float64], sizes: NDArray[np.float64], *, extents: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Decides which boxes of n objects cannot be used.

    Args:
        boxes_xywh: float64 [n, 4], x y width height, as annotated, px, original frame.
        sizes: float64 [n, 2], H, W of the images, px.
        extents: float64 [n, 4], x0 y0 x1 y1 around the masks, px, original frame.

    Returns:
        int64 [n], indices into `BOX_CODES`; 0: usable.
    """
    with np.errstate(all="ignore"):
        boxes = to_corners(boxes_xywh)
        verdicts = np.where(~np.isfinite(boxes).all(1), NOT_FINITE, 0)
        empty = (boxes_xywh[:, 2:] <= 0).any(1)
        verdicts = np.where((verdicts == 0) & empty, EMPTY, verdicts)
        verdicts = np.where((verdicts == 0) & _is_far_outside(boxes, sizes), OUTSIDE, verdicts)
        unlike = _is_unlike_mask(boxes, sizes, extents=extents)
        return np.where((verdicts == 0) & unlike, UNLIKE_MASK, verdicts)


def to_corners(boxes_xywh: NDArray[np.float64]) -> NDArray[np.float64]:
    """Boxes [n, 4] as x0 y0 x1 y1."""
    return np.concatenate([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], axis=1)


def distance_outside(boxes: NDArray[np.float64], sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    """By how many px boxes x0 y0 x1 y1 [n, 4] reach beyond their images; negative inside."""
    outside = np.concatenate([-boxes[:, :2], boxes[:, 2:] - sizes[:, ::-1]], axis=1)
    return np.asarray(outside.max(1))


def _is_far_outside(boxes: NDArray[np.float64], sizes: NDArray[np.float64]) -> NDArray[np.bool_]:
    # True where a box does not touch the image, or leaves it by more than the image's size.
    corner = sizes[:, ::-1]
    low, high = boxes[:, :2], boxes[:, 2:]
    inside = (low >= -corner) & (low < corner) & (high > 0) & (high <= 2 * corner)
    return ~np.asarray(inside.all(1))


def _is_unlike_mask(
    boxes: NDArray[np.float64], sizes: NDArray[np.float64], *, extents: NDArray[np.float64]
) -> NDArray[np.bool_]:
    # True where box and mask extent have IoU < 0.5 and differ by more than 2 px.
    limit = np.tile(sizes[:, ::-1], 2)
    ours, other = np.clip(boxes, 0, limit), np.clip(extents, 0, limit)
    low, high = np.maximum(ours[:, :2], other[:, :2]), np.minimum(ours[:, 2:], other[:, 2:])
    common = np.maximum(high - low, 0).prod(1)
    both = (ours[:, 2:] - ours[:, :2]).prod(1) + (other[:, 2:] - other[:, :2]).prod(1)
    differ = np.abs(ours - other).max(1) > MAX_ROUNDING
    return np.asarray((common < 0.5 * (both - common)) & differ)
