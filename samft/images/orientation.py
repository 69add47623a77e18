"""Views of an image: turned as EXIF says, and whether the edges of a picture follow outlines.

Orientations are EXIF's numbers, 1..8: 1 is as stored, 2 to 4 mirror or turn by half, 5 to 8 also
swap height and width. Source: CIPA DC-008 (EXIF 2.32), tag 0x0112. Imports no torch.
"""

from collections.abc import Iterable

import cv2
import numpy as np
from numpy.typing import NDArray

UPRIGHT = 1
_TRANSPOSED = frozenset((5, 6, 7, 8))
# After the transposition: turned from left to right, from top to bottom.
_MIRRORED_X = frozenset((2, 3, 6, 7))
_MIRRORED_Y = frozenset((3, 4, 7, 8))
EDGE_SIDE = 512  # px; in a picture of this longer side, careless outlines follow edges as well
_MARGIN = 2  # px; an outline along the border of the picture follows no edge
_FEWEST_POINTS = 8
_FEWEST_OBJECTS, _SURE = 4, 3.5  # objects, standard errors that tell one placement from another

Points = NDArray[np.float64]  # [n, 2], x y, as shares of width and height of the stored image


def turned_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """H, W of the view of a stored image of H, W; its own inverse."""
    return (size[1], size[0]) if orientation in _TRANSPOSED else size


def turn_pixels(image: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Stored pixels [H, W] or [H, W, C] turned into the view."""
    if orientation in _TRANSPOSED:
        image = cv2.transpose(image)  # type: ignore[assignment]
    x, y = orientation in _MIRRORED_X, orientation in _MIRRORED_Y
    return np.asarray(cv2.flip(image, -1 if x and y else int(x)) if x or y else image)


def turn_back_points(
    points: NDArray[np.float64], orientation: int, *, size: tuple[int, int]
) -> NDArray[np.float64]:
    """Points of the view in the stored image.

    Args:
        points: float64 [n, 2], x y, px, in the view; pixel (0, 0) covers 0..1.
        orientation: How the view is turned.
        size: H, W of the view, px.

    Returns:
        float64 [n, 2], x y, px, in the stored image.
    """
    points = points.copy()
    if orientation in _MIRRORED_X:
        points[:, 0] = size[1] - points[:, 0]
    if orientation in _MIRRORED_Y:
        points[:, 1] = size[0] - points[:, 1]
    return points[:, ::-1].copy() if orientation in _TRANSPOSED else points


def inverse_orientation(orientation: int) -> int:
    """The orientation that turns the view back into the stored image: 8 for 6, and 6 for 8."""
    return {6: 8, 8: 6}.get(orientation, orientation)


class EdgeMap:
    """The strength of the edges of a picture, relative to their mean."""

    def __init__(self, image: NDArray[np.uint8]) -> None:
        """Computes it.

        Args:
            image: uint8 [H, W, 3].
        """
        factor = min(1.0, EDGE_SIDE / max(image.shape[:2]))
        width, height = (max(round(side * factor), 1) for side in image.shape[1::-1])
        small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        soft = cv2.GaussianBlur(small, (0, 0), 1.0).astype(np.float32)
        slopes = [cv2.Sobel(soft, cv2.CV_32F, *order, ksize=3) for order in ((1, 0), (0, 1))]
        edges = np.hypot(*slopes).max(axis=2)
        self._strength = cv2.dilate(edges, np.ones((3, 3))) / max(float(edges.mean()), 1e-6)

    def along(self, points: Points) -> float:
        """The mean strength at points of an outline; NaN if too few lie inside of the picture."""
        height, width = self._strength.shape
        x, y = np.floor(points * [width, height]).astype(np.int64).T
        inside = (np.minimum(x, y) >= _MARGIN) & (x < width - _MARGIN) & (y < height - _MARGIN)
        if inside.sum() < max(_FEWEST_POINTS, len(points) // 4):
            return float("nan")
        return float(self._strength[y[inside], x[inside]].mean())


def find_placement(
    pictures: Iterable[tuple[NDArray[np.uint8], list[list[Points]]]],
) -> int | None:
    """Of several places of outlines on their pictures, the one that edges follow most.

    Args:
        pictures: Images as they are stored, uint8 [H, W, 3], each with its objects, each of them
            with its outline in every place.

    Returns:
        The number of the place; None if no place is clearly better than all others.
    """
    strengths: list[list[float]] = []
    for image, objects in pictures:
        edges = EdgeMap(image)
        strengths += [[edges.along(points) for points in places] for places in objects]
    if not strengths:
        return None
    logs = np.log(np.array(strengths) + 0.05)
    logs = logs[np.isfinite(logs).all(1)]
    if len(logs) < _FEWEST_OBJECTS:
        return None
    best = int(logs.mean(axis=0).argmax())
    lead = np.delete(logs[:, best : best + 1] - logs, best, axis=1)
    error = np.maximum(lead.std(axis=0, ddof=1), 0.1) / np.sqrt(len(logs))
    return best if (lead.mean(axis=0) > _SURE * error).all() else None


def points_along_polygon(polygon: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points along a closed polygon, about a pixel apart: [m, 2] from its corners [n, 2]."""
    closed = np.concatenate([polygon, polygon[:1]])
    ends = np.append(0, np.cumsum(np.hypot(*np.diff(closed, axis=0).T)))
    places = np.linspace(0, ends[-1], min(max(int(ends[-1]), 16), 2000))
    return np.stack([np.interp(places, ends, axis) for axis in closed.T], axis=1)


def points_along_mask(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The centres of the outermost pixels of a mask [h, w]: [n, 2], x y."""
    padded = np.pad(mask.astype(np.uint8), 1)
    y, x = np.nonzero(padded > cv2.erode(padded, np.ones((3, 3), np.uint8)))
    return np.asarray(np.stack([x, y], axis=1) - 0.5, dtype=np.float64)
