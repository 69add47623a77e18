"""Masks as polygons whose pixels are exactly the mask's, along the edges of pixels."""

import cv2
import numpy as np
from numpy.typing import NDArray

from samft.annotations.segmentation import CroppedMask


def trace_outlines(crop: CroppedMask) -> list[list[float]]:
    """The outlines of a mask as COCO polygons, which pycocotools draws as exactly that mask.

    COCO adds the polygons of an object up, so none of them can be a hole: a mask with a hole is cut
    in two through it, and the parts share the cut as an edge.

    Args:
        crop: The mask.

    Returns:
        Polygons [x0, y0, x1, y1, ...], px, original frame, of whole numbers; none for a mask
        without a pixel.
    """
    polygons: list[NDArray[np.int32]] = []
    parts = [(crop.top, crop.left, crop.mask)]
    while parts:
        top, left, mask = parts.pop()
        contours, cut = _trace_contours(mask)
        if cut is None:
            polygons += [_to_corners(contour) + (left, top) for contour in contours]
        else:
            parts += [(top, left + cut, mask[:, cut:]), (top, left, mask[:, :cut])]
    return [points.astype(float).ravel().tolist() for points in polygons]


def _trace_contours(mask: NDArray[np.bool_]) -> tuple[list[NDArray[np.int32]], int | None]:
    # Contours in a picture of twice the size, and a column to cut at if the mask has a hole.
    if not mask.any():
        return [], None
    twice = np.repeat(np.repeat(mask.astype(np.uint8), 2, axis=0), 2, axis=1)
    contours, tree = cv2.findContours(twice, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    points = [np.asarray(contour[:, 0, :], dtype=np.int32) for contour in contours]
    holes = np.flatnonzero(tree[0, :, 3] >= 0)
    if not len(holes):
        return points, None
    # The contour of a hole runs over the pixels around it, so their middle lies in the hole.
    columns = points[holes[0]][:, 0] // 2
    return [], int(columns.min() + columns.max() + 1) // 2


def _to_corners(contour: NDArray[np.int32]) -> NDArray[np.int32]:
    # At twice the size, the even pixels lie at the left and upper edges of the original ones, the
    # odd ones at the right and lower edges; a diagonal step around an inner corner is one corner.
    points = (contour + 1) // 2
    points = points[(points != np.roll(points, 1, axis=0)).any(axis=1)]
    before = np.sign(points - np.roll(points, 1, axis=0))
    return points[(before != np.roll(before, -1, axis=0)).any(axis=1)]
