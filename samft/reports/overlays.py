"""Draws masks over an image: each in a colour of its own, outlined in two tones, with a label.

Pictures are uint8 [H, W, 3] RGB. Imports no torch.
"""

from collections.abc import Iterator, Sequence
from itertools import product

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from samft.annotations.segmentation import CroppedMask
from samft.reports.drawing import blend_colour, draw_click, largest_first, mask_colour, mask_window

_PX_PER_LINE_WIDTH = 700  # a line is 1 px wide for so many px of the picture's longer side
_FILL = 0.4  # share of the colour over an object
_DARK = (16, 16, 16)
# Distance in CIELAB from which a colour stands out from an object, and how many are tried; with ten
# golden-angle hues, neighbouring ones are 36 degrees apart.
_FAR, _NUM_TRIED = 60.0, 10
_PX_PER_TEXT_PX, _SMALLEST_TEXT = 60, 10  # height of letters, by the picture's longer side; px
_LABEL_GAP = 2  # px between a label and its object

Box = tuple[int, int, int, int]  # x0 y0 x1 y1, px


def draw_overlay(
    image: NDArray[np.uint8],
    masks: Sequence[CroppedMask],
    *,
    boxes: NDArray[np.float64],
    points: Sequence[NDArray[np.float64]] = (),
    labels: Sequence[Sequence[str]] = (),
) -> NDArray[np.uint8]:
    """Draws masks over an image, each filled and outlined in its own colour, the largest first.

    The width of lines and the height of letters grow with the image.

    Args:
        image: uint8 [H, W, 3] RGB.
        masks: K masks, in pixels of the image.
        boxes: float [K, 4], x0 y0 x1 y1 in pixels of the image, NaN for no box; or [0, 4].
        points: Of each mask float [P, 3], x y in pixels of the image and the label, as `draw_click`
            draws it; or empty.
        labels: Of each mask the texts to write beside it, the first that fits: the longest first.

    Returns:
        uint8 [H, W, 3] RGB.
    """
    width = max(1, round(max(image.shape[:2]) / _PX_PER_LINE_WIDTH))
    colours = [contrasting_colour(k, _mean_colour(image, mask)) for k, mask in enumerate(masks)]
    with_boxes = image.copy()
    for k, box in enumerate(boxes):
        if np.isnan(box).any():
            continue
        x0, y0, x1, y1 = np.rint(box).astype(int).tolist()
        cv2.rectangle(with_boxes, (x0, y0), (x1 - 1, y1 - 1), colours[k], width, cv2.LINE_AA)
    # Boxes are paler than outlines and lie below them: hundreds of boxes would hide all else.
    canvas = np.asarray(cv2.addWeighted(image, 0.3, with_boxes, 0.7, 0), dtype=np.uint8)
    order = largest_first(masks)
    for k in order:
        blend_colour(mask_window(canvas, masks[k]), masks[k].mask, colours[k], share=_FILL)
    for k in order:
        _draw_outline(canvas, masks[k], colours[k], width)
    for x, y, label in (point for own in points for point in own.tolist()):
        draw_click(canvas, (int(x), int(y)), int(label), size=3 * width + 2)
    return _draw_labels(canvas, masks, labels, colours) if labels else canvas


def contrasting_colour(number: int, under: NDArray[np.float64]) -> tuple[int, int, int]:
    """A bright colour for the n-th mask that stands out from what lies under it.

    Args:
        number: Its own colour is `mask_colour` of this; the following ones are tried after it.
        under: Mean R, G, B of the object, 0..255.
    """
    tried = [mask_colour(number + 7 * k) for k in range(_NUM_TRIED)]
    distances = np.linalg.norm(_to_lab(tried) - _to_lab([under]), axis=1)
    far = np.flatnonzero(distances >= _FAR)
    return tried[int(far[0] if len(far) else distances.argmax())]


def _to_lab(colours: Sequence[Sequence[float]] | Sequence[NDArray[np.float64]]) -> np.ndarray:
    pixels = (np.asarray(colours, dtype=np.float32) / 255)[None]
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2LAB)[0])


def _mean_colour(image: NDArray[np.uint8], mask: CroppedMask) -> NDArray[np.float64]:
    pixels = mask_window(image, mask)[mask.mask]
    return pixels.mean(axis=0) if len(pixels) else np.zeros(3)


def _draw_outline(
    canvas: NDArray[np.uint8], mask: CroppedMask, colour: tuple[int, int, int], width: int
) -> None:
    # The dark line lies around the object and the light one on its edge, so that one of them
    # differs from whatever is beside it.
    pixels = np.pad(mask.mask.astype(np.uint8), width)
    corner = (mask.left - width, mask.top - width)
    around = cv2.dilate(pixels, np.ones((2 * width + 1, 2 * width + 1), np.uint8))
    for area, tone in ((around, _DARK), (pixels, _lighten(colour))):
        contours, _ = cv2.findContours(area, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(canvas, contours, -1, tone, width, offset=corner)


# Labels.


def _draw_labels(
    canvas: NDArray[np.uint8],
    masks: Sequence[CroppedMask],
    labels: Sequence[Sequence[str]],
    colours: Sequence[tuple[int, int, int]],
) -> NDArray[np.uint8]:
    height, width = canvas.shape[:2]
    text_height = max(_SMALLEST_TEXT, round(max(height, width) / _PX_PER_TEXT_PX))
    font = ImageFont.load_default(text_height)
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    free = _FreeSpace(masks, (height, width))
    # The smallest first: they have the least space, and what is large can be told without.
    for k in reversed(largest_first(masks)):
        if not masks[k].mask.any():
            continue
        for text in labels[k]:
            left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
            place = free.take(masks[k].extent, (int(right - left) + 4, int(bottom - top) + 4))
            if place is None:
                continue
            draw.rectangle((place[0], place[1], place[2] - 1, place[3] - 1), fill=_DARK)
            corner = (place[0] + 2 - left, place[1] + 2 - top)
            draw.text(corner, text, fill=_lighten(colours[k]), font=font)
            break
    return np.array(picture)


def _lighten(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    red, green, blue = ((part + 255) // 2 for part in colour)
    return red, green, blue


class _FreeSpace:
    """Where labels can go: inside of the picture, on no object, and on no other label."""

    def __init__(self, masks: Sequence[CroppedMask], size: tuple[int, int]) -> None:
        self._taken = np.zeros(size, dtype=bool)
        for mask in masks:
            mask_window(self._taken, mask)[mask.mask] = True

    def take(self, around: Box, size: tuple[int, int]) -> Box | None:
        """Takes a free place of a width and height beside an object; None if there is none."""
        height, width = self._taken.shape
        for x, y in _places_around(around, size):
            x0 = min(max(x, 0), width - size[0])
            y0 = min(max(y, 0), height - size[1])
            place = self._taken[max(y0, 0) : y0 + size[1], max(x0, 0) : x0 + size[0]]
            if min(x0, y0) >= 0 and not place.any():
                place[:] = True
                return x0, y0, x0 + size[0], y0 + size[1]
        return None


def _places_around(around: Box, size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    # Upper left corners, px: above, below, right, left of an object, along each of these sides.
    (x0, y0, x1, y1), (width, height) = around, size
    above, below = y0 - height - _LABEL_GAP, y1 + _LABEL_GAP
    before, after = x0 - width - _LABEL_GAP, x1 + _LABEL_GAP
    columns = x0, (x0 + x1 - width) // 2, x1 - width
    rows = y0, (y0 + y1 - height) // 2, y1 - height
    yield from product(columns, (above,))
    yield from product(columns, (below,))
    yield from product((after, before), rows)
    yield from product((after, before), (above, below))
