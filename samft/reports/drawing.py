"""Pictures of masks: what a person looks at to believe a number.

One object cut out of its image, with its box, its true outline and a model's mask.

Imports no torch.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from samft.coco.index import CocoIndex
from samft.coco.segmentation import CroppedMask, decode_cropped

PADDING = 6
_SIDE_A_LINE = 700  # px of a picture's longer side for each px of a line's width

Pixel = TypeVar("Pixel", np.uint8, np.uint16)


def mask_colour(number: int) -> tuple[int, int, int]:
    """A colour for the n-th mask, far from those of its neighbours (golden-angle hues)."""
    hue = np.array([[[number * 0.618034 % 1 * 179, 200, 255]]], dtype=np.uint8)
    red, green, blue = cv2.cvtColor(hue, cv2.COLOR_HSV2RGB)[0, 0].tolist()
    return red, green, blue


def draw_objects(
    image: NDArray[np.uint8], masks: Sequence[CroppedMask], *, boxes: NDArray[np.float64]
) -> NDArray[np.uint8]:
    """Draws many masks over an image of any size, so that each can be told from its neighbours.

    Each is filled and outlined, the larger ones first; lines are as wide as suits the picture.

    Args:
        image: uint8 [H, W, 3] RGB.
        masks: K of them, in pixels of the image.
        boxes: float [K, 4], x0 y0 x1 y1 in pixels of the image; or [0, 4].

    Returns:
        uint8 [H, W, 3] RGB.
    """
    width = max(1, round(max(image.shape[:2]) / _SIDE_A_LINE))
    lines = image.copy()
    for k, box in enumerate(boxes):
        x0, y0, x1, y1 = np.rint(box).astype(int).tolist()
        cv2.rectangle(lines, (x0, y0), (x1 - 1, y1 - 1), mask_colour(k), width, cv2.LINE_AA)
    # Boxes are paler than outlines, and below: of hundreds, nothing else would be seen.
    canvas = np.asarray(cv2.addWeighted(image, 0.3, lines, 0.7, 0), dtype=np.uint8)
    for k in _largest_first(masks):
        _blend(_window(canvas, masks[k]), masks[k].mask, mask_colour(k), share=0.4)
    for k in _largest_first(masks):
        inside, corner = masks[k].mask.astype(np.uint8), (masks[k].left, masks[k].top)
        edges, _ = cv2.findContours(inside, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(canvas, edges, -1, mask_colour(k), width, cv2.LINE_AA, offset=corner)
    return canvas


def _blend(
    canvas: NDArray[np.uint8], mask: NDArray[np.bool_], colour: tuple[int, ...], *, share: float
) -> None:
    canvas[mask] = ((1 - share) * canvas[mask] + share * np.array(colour)).astype(np.uint8)


def _window(picture: NDArray[Pixel], crop: CroppedMask) -> NDArray[Pixel]:
    height, width = crop.mask.shape
    return picture[crop.top : crop.top + height, crop.left : crop.left + width]


def _largest_first(masks: Sequence[CroppedMask]) -> list[int]:
    areas = [int(np.count_nonzero(crop.mask)) for crop in masks]
    return sorted(range(len(masks)), key=lambda k: -areas[k])


def label_image(masks: Sequence[CroppedMask], size: tuple[int, int]) -> NDArray[np.uint16]:
    """The number of the mask, from 1 on, that each pixel belongs to; 0: none.

    Args:
        masks: Where several cover a pixel, the smallest counts.
        size: H, W of the image.

    Returns:
        uint16 [H, W].
    """
    labels = np.zeros(size, dtype=np.uint16)
    for k in _largest_first(masks):
        _window(labels, masks[k])[masks[k].mask] = k + 1
    return labels


def encode_label_png(labels: NDArray[np.uint16]) -> bytes:
    """A label image as PNG: with a palette of `mask_colour`s up to 255, else grey of 16 bits."""
    if labels.max(initial=0) > 255:
        picture = Image.fromarray(labels)
    else:
        picture = Image.fromarray(labels.astype(np.uint8), mode="P")
        colours = [(0, 0, 0), *(mask_colour(k) for k in range(255))]
        picture.putpalette([part for colour in colours for part in colour])
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def encode_jpeg(picture: NDArray[np.uint8]) -> bytes:
    """A picture, uint8 [H, W, 3] RGB, as JPEG: a tenth of the size of a PNG of a photograph."""
    turned = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
    return bytes(cv2.imencode(".jpg", turned, [cv2.IMWRITE_JPEG_QUALITY, 92])[1])


def stack_horizontally(pictures: list[np.ndarray]) -> np.ndarray:
    """Sets pictures side by side, tops aligned, with a white gap between.

    Args:
        pictures: uint8 [H, W, 3] each; at least one.

    Returns:
        uint8 [H, W, 3].
    """
    height = max(picture.shape[0] for picture in pictures)
    parts = []
    for picture in pictures:
        below = height - picture.shape[0]
        parts.append(np.pad(picture, ((0, below), (0, PADDING), (0, 0)), constant_values=255))
    return np.concatenate(parts, axis=1)[:, :-PADDING]


def stack_with_titles(rows: list[tuple[str, np.ndarray]]) -> np.ndarray:
    """Sets rows of pictures one below the other, each under its title.

    Args:
        rows: Title and uint8 [H, W, 3] picture.

    Returns:
        uint8 [H, W, 3].
    """
    width = max(picture.shape[1] for _, picture in rows)
    parts = []
    for title, picture in rows:
        bar = np.full((30, width, 3), 255, np.uint8)
        cv2.putText(
            bar, title, (4, 21), cv2.FONT_HERSHEY_SIMPLEX, 0.55, (40, 40, 40), 1, cv2.LINE_AA
        )
        beside = width - picture.shape[1]
        parts += [bar, np.pad(picture, ((0, 0), (0, beside), (0, 0)), constant_values=255)]
    return np.concatenate(parts)


def write_png(path: Path, picture: np.ndarray) -> None:
    """Writes a picture, uint8 [H, W, 3] RGB, as PNG."""
    encoded = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1]
    path.write_bytes(encoded.tobytes())


def read_png(path: Path) -> np.ndarray:
    """Reads what `write_png` wrote."""
    encoded = np.frombuffer(path.read_bytes(), np.uint8)
    picture = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
    if picture is None:
        raise ValueError(f"{path} is not a picture")
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


TILE = 192  # px
BEYOND = 128  # grey of what lies outside of an image
_LEAST_SIDE = 40  # px of the image that a tile shows at least
_MARGIN = 1.3
_MASK_COLOUR, _BOX_COLOUR, _PREDICTED_COLOUR = (255, 40, 220), (0, 220, 255), (20, 90, 255)
_RIM = (30, 30, 30)


@dataclass(frozen=True)
class ObjectCrop:
    """A square of an image around an object, brought to the side of a tile."""

    pixels: NDArray[np.uint8]  # [T, T, 3]
    top: int  # px, original frame
    left: int
    side: int


def image_row_of(index: CocoIndex, k: int) -> int:
    """The row of the image of object k."""
    return int(np.searchsorted(index.first_object, k, side="right")) - 1


def crop_around(
    box: NDArray[np.float64], image: NDArray[np.uint8], *, tile: int = TILE
) -> ObjectCrop:
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
    window = _crop_square(image, top, left, side, fill=BEYOND)
    shrinks = cv2.INTER_AREA if side > tile else cv2.INTER_CUBIC
    resized = cv2.resize(window, (tile, tile), interpolation=shrinks)
    return ObjectCrop(np.asarray(resized, dtype=np.uint8), top, left, side)


def annotate_crop(
    index: CocoIndex, k: int, view: ObjectCrop, *, predicted: CroppedMask | None = None
) -> NDArray[np.uint8]:
    """A view with the object's true outline and its box, and what a model takes it for.

    Args:
        index: The checked file.
        k: The object.
        view: Of it.
        predicted: The model's mask, original frame; it is filled.

    Returns:
        uint8 [T, T, 3].
    """
    tile = view.pixels.copy()
    size = len(tile)
    if predicted is not None:
        covered = _in_view(view, predicted)
        mixed = 0.5 * tile + 0.5 * np.array(_PREDICTED_COLOUR)
        tile[covered] = mixed[covered].astype(np.uint8)
    owner = image_row_of(index, k)
    truth = decode_cropped(index.segmentations[k], *index.sizes[owner].tolist())
    true = _in_view(view, truth).view(np.uint8)
    outline, _ = cv2.findContours(true, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    corners = (index.boxes[k].reshape(2, 2) - (view.left, view.top)) * (size / view.side)
    (x0, y0), (x1, y1) = np.rint(corners).astype(int).tolist()
    cv2.rectangle(tile, (x0, y0), (x1 - 1, y1 - 1), _BOX_COLOUR, 1)
    # A dark rim: there is no colour that shows on every object.
    width = max(size // 144, 1)
    cv2.drawContours(tile, outline, -1, _RIM, width + 2)
    cv2.drawContours(tile, outline, -1, _MASK_COLOUR, width)
    return tile


def _in_view(view: ObjectCrop, mask: CroppedMask) -> NDArray[np.bool_]:
    size, pixels = len(view.pixels), mask.mask.view(np.uint8)
    top, left = view.top - mask.top, view.left - mask.left
    window = _crop_square(pixels, top, left, view.side, fill=0) * 255
    shrinks = cv2.INTER_AREA if view.side > size else cv2.INTER_NEAREST
    return np.asarray(cv2.resize(window, (size, size), interpolation=shrinks) > 64)


def _crop_square(
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
