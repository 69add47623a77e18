"""EXIF orientations: how the stored pixels of an image are turned into the view that people see.

Numbers are EXIF's, 1..8: 1 is as stored, 2 to 4 mirror or turn by half, 5 to 8 also swap height and
width. Source: CIPA DC-008 (EXIF 2.32), tag 0x0112. Imports no torch.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

UPRIGHT = 1
_TRANSPOSED = frozenset((5, 6, 7, 8))
# After the transposition: turned from left to right, from top to bottom.
_MIRRORED_X = frozenset((2, 3, 6, 7))
_MIRRORED_Y = frozenset((3, 4, 7, 8))


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
