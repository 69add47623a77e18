"""The way of boxes, points and masks from an image to a window of it.

Coordinates have pixel edges at whole numbers. Windows are moved by whole pixels only, so that what
comes back is what went in, to the bit. Imports no torch.
"""

import numpy as np
from numpy.typing import NDArray

from samft.views.windows import Windows


def boxes_to_window(boxes: NDArray[np.floating], window: Windows) -> NDArray[np.float64]:
    """Boxes [K, 4] x0 y0 x1 y1 of the image, in px of a window [4] and cut at its edges."""
    low, high = window[:2], window[2:]
    corners = np.clip(np.asarray(boxes, dtype=np.float64).reshape(-1, 2, 2), low, high)
    return np.asarray((corners - low).reshape(-1, 4))


def points_to_window(points: NDArray[np.floating], window: Windows) -> NDArray[np.float64]:
    """Points [..., 2] x y of the image, in px of a window [4], which they may exceed."""
    return np.asarray(points, dtype=np.float64) - window[:2]


def cut_window(image: NDArray[np.generic], window: Windows) -> NDArray[np.generic]:
    """The part of an image or a mask [H, W, ...] that a window [4] shows; a view of it."""
    x0, y0, x1, y1 = window.tolist()
    return image[y0:y1, x0:x1]
