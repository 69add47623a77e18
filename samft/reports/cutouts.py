"""One object cut out of its image, with its box, its true outline and a model's mask.

Imports no torch.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from samft.coco.coco_index import CocoFile
from samft.coco.masks import decode_cropped
from samft.data.targets import CroppedMask

TILE = 192  # px
BEYOND = 128  # grey of what lies outside of an image
_LEAST_SIDE = 40  # px of the image that a tile shows at least
_MARGIN = 1.3
_MASK_COLOUR, _BOX_COLOUR, _PREDICTED_COLOUR = (255, 40, 220), (0, 220, 255), (20, 90, 255)
_RIM = (30, 30, 30)


@dataclass(frozen=True)
class View:
    """A square of an image around an object, brought to the side of a tile."""

    pixels: NDArray[np.uint8]  # [T, T, 3]
    top: int  # px, original frame
    left: int
    side: int


def owner_of(file: CocoFile, k: int) -> int:
    """The row of the image of object k."""
    return int(np.searchsorted(file.first_object, k, side="right")) - 1


def cut_out(file: CocoFile, k: int, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Cuts an object out of its image, with a margin, its mask's outline and its box.

    Args:
        file: The checked file.
        k: The object.
        image: uint8 [H, W, 3], its image.

    Returns:
        uint8 [TILE, TILE, 3]; what is beyond of the image is grey.
    """
    return mark(file, k, view_of(file.boxes[k], image))


def view_of(box: NDArray[np.float64], image: NDArray[np.uint8], *, tile: int = TILE) -> View:
    """The square of an image that holds a box, with a margin.

    Args:
        box: float64 [4], x0 y0 x1 y1, px, original frame.
        image: uint8 [H, W, 3].
        tile: Side of the view's pixels.
    """
    x0, y0, x1, y1 = box.tolist()
    side = int(np.ceil(max(x1 - x0, y1 - y0) * _MARGIN))
    side = max(side, _LEAST_SIDE)
    left, top = round((x0 + x1 - side) / 2), round((y0 + y1 - side) / 2)
    window = _window(image, top, left, side, fill=BEYOND)
    shrinks = cv2.INTER_AREA if side > tile else cv2.INTER_CUBIC
    resized = cv2.resize(window, (tile, tile), interpolation=shrinks)
    return View(np.asarray(resized, dtype=np.uint8), top, left, side)


def mark(
    file: CocoFile, k: int, view: View, *, predicted: CroppedMask | None = None
) -> NDArray[np.uint8]:
    """A view with the object's true outline and its box, and what a model takes it for.

    Args:
        file: The checked file.
        k: The object.
        view: Of it.
        predicted: The model's mask, original frame; it is filled.

    Returns:
        uint8 [T, T, 3].
    """
    tile = view.pixels.copy()
    size = len(tile)
    if predicted is not None:
        covered = _in_view(view, predicted.top, predicted.left, predicted.mask.view(np.uint8))
        mixed = 0.5 * tile + 0.5 * np.array(_PREDICTED_COLOUR)
        tile[covered] = mixed[covered].astype(np.uint8)
    owner = owner_of(file, k)
    top, left, crop = decode_cropped(file.segmentations[k], *file.sizes[owner].tolist())
    true = _in_view(view, top, left, crop).view(np.uint8)
    outline, _ = cv2.findContours(true, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    corners = (file.boxes[k].reshape(2, 2) - (view.left, view.top)) * (size / view.side)
    (x0, y0), (x1, y1) = np.rint(corners).astype(int).tolist()
    cv2.rectangle(tile, (x0, y0), (x1 - 1, y1 - 1), _BOX_COLOUR, 1)
    # A dark rim: there is no colour that shows on every object.
    width = max(size // 144, 1)
    cv2.drawContours(tile, outline, -1, _RIM, width + 2)
    cv2.drawContours(tile, outline, -1, _MASK_COLOUR, width)
    return tile


def _in_view(view: View, top: int, left: int, crop: NDArray[np.uint8]) -> NDArray[np.bool_]:
    size = len(view.pixels)
    mask = _window(crop, view.top - top, view.left - left, view.side, fill=0) * 255
    shrinks = cv2.INTER_AREA if view.side > size else cv2.INTER_NEAREST
    return np.asarray(cv2.resize(mask, (size, size), interpolation=shrinks) > 64)


def _window(
    picture: NDArray[np.uint8], top: int, left: int, side: int, *, fill: int
) -> NDArray[np.uint8]:
    # A square of a picture, which may reach beyond it.
    height, width = picture.shape[:2]
    window = np.full((side, side, *picture.shape[2:]), fill, dtype=np.uint8)
    y0, x0 = max(top, 0), max(left, 0)
    y1, x1 = max(min(top + side, height), y0), max(min(left + side, width), x0)
    part = picture[y0:y1, x0:x1]
    window[y0 - top : y0 - top + part.shape[0], x0 - left : x0 - left + part.shape[1]] = part
    return window
