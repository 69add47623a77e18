"""Draws masks as label images and on square crops around single objects; sets pictures together.

Pictures are uint8 [H, W, 3] RGB. Imports no torch.
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

from samft.annotations.segmentation import CroppedMask, decode_cropped
from samft.coco.index import CocoIndex
from samft.runtime.files import write_atomically
from samft.runtime.own_files import mark_picture

GAP = 6  # px between pictures set side by side

TILE = 192  # px, side of a crop as it is drawn
OUTSIDE_GREY = 128  # of the part of a crop that lies outside of the image
_MIN_CROP_SIDE = 40  # px of the image, so that a tiny object is shown with its surroundings
_CROP_MARGIN = 1.3  # side of a crop, in units of the box's longer side
_TRUE_COLOUR, _BOX_COLOUR, _PREDICTED_COLOUR = (255, 40, 220), (0, 220, 255), (20, 90, 255)
_RIM_COLOUR = (30, 30, 30)
# Of clicks, by label: "not this" and "this". Vermilion and bluish green of Okabe and Ito's palette,
# which people who do not see red or green tell apart.
CLICK_COLOURS = ((213, 94, 0), (0, 158, 115))

Pixel = TypeVar("Pixel", np.uint8, np.uint16, np.bool_)


def mask_colour(number: int) -> tuple[int, int, int]:
    """A colour for the n-th mask, R, G, B; consecutive ones differ most (golden-angle hues)."""
    hue = np.array([[[number * 0.618034 % 1 * 179, 200, 255]]], dtype=np.uint8)
    red, green, blue = cv2.cvtColor(hue, cv2.COLOR_HSV2RGB)[0, 0].tolist()
    return red, green, blue


def blend_colour(
    picture: NDArray[np.uint8], mask: NDArray[np.bool_], colour: tuple[int, ...], *, share: float
) -> None:
    """Mixes a colour into the pixels of a picture that a mask of the same size covers."""
    picture[mask] = ((1 - share) * picture[mask] + share * np.array(colour)).astype(np.uint8)


def mask_window(picture: NDArray[Pixel], mask: CroppedMask) -> NDArray[Pixel]:
    """A view of the part of a picture, [H, W] or [H, W, 3], that a cropped mask lies on."""
    height, width = mask.mask.shape
    return picture[mask.top : mask.top + height, mask.left : mask.left + width]


def largest_first(masks: Sequence[CroppedMask]) -> list[int]:
    """The numbers of masks in the order in which they are drawn, so that none hides a smaller."""
    areas = [int(np.count_nonzero(mask.mask)) for mask in masks]
    return sorted(range(len(masks)), key=lambda k: -areas[k])


def label_image(masks: Sequence[CroppedMask], size: tuple[int, int]) -> NDArray[np.uint16]:
    """A label image: for each pixel the number of its mask, counted from 1, or 0 for none.

    Args:
        masks: Where several cover a pixel, the smallest one counts.
        size: H, W of the image.

    Returns:
        uint16 [H, W].
    """
    labels = np.zeros(size, dtype=np.uint16)
    for k in largest_first(masks):
        mask_window(labels, masks[k])[masks[k].mask] = k + 1
    return labels


def encode_label_png(labels: NDArray[np.uint16]) -> bytes:
    """A label image as PNG: up to 255 masks with a palette of `mask_colour`s, else 16-bit grey."""
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
    """A picture, uint8 [H, W, 3] RGB, as JPEG: for a photograph, a tenth of the size of a PNG."""
    bgr = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
    return bytes(cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 92])[1])


def stack_horizontally(pictures: list[np.ndarray]) -> np.ndarray:
    """Sets pictures next to each other, tops aligned, with a white gap between them.

    Args:
        pictures: uint8 [H, W, 3] each; at least one.

    Returns:
        uint8 [H, W, 3].
    """
    height = max(picture.shape[0] for picture in pictures)
    parts = []
    for picture in pictures:
        below = height - picture.shape[0]
        parts.append(np.pad(picture, ((0, below), (0, GAP), (0, 0)), constant_values=255))
    return np.concatenate(parts, axis=1)[:, :-GAP]


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
        heading = np.full((30, width, 3), 255, np.uint8)
        cv2.putText(
            heading, title, (4, 21), cv2.FONT_HERSHEY_SIMPLEX, 0.55, (40, 40, 40), 1, cv2.LINE_AA
        )
        beside = width - picture.shape[1]
        parts += [heading, np.pad(picture, ((0, 0), (0, beside), (0, 0)), constant_values=255)]
    return np.concatenate(parts)


def write_png(path: Path, picture: np.ndarray) -> None:
    """Writes a picture, uint8 [H, W, 3] RGB, as PNG that says whose it is; see `mark_picture`."""
    encoded = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1]
    content = mark_picture(encoded.tobytes())
    write_atomically(path, lambda file: file.write(content))


def read_png(path: Path) -> np.ndarray:
    """Reads a picture, uint8 [H, W, 3] RGB, that `write_png` wrote.

    Raises:
        OSError: The file cannot be read.
        ValueError: It cannot be decoded.
    """
    encoded = np.frombuffer(path.read_bytes(), np.uint8)
    try:
        picture = cv2.imdecode(encoded, cv2.IMREAD_COLOR) if len(encoded) else None
    except cv2.error:  # a size in its header that no picture has
        picture = None
    if picture is None:
        raise ValueError(f"{path} is not a readable picture")
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


@dataclass(frozen=True)
class ObjectCrop:
    """A square crop of an image around an object, resized to T pixels."""

    pixels: NDArray[np.uint8]  # [T, T, 3]
    top: int  # px of the original image, as left and side; may lie outside of it
    left: int
    side: int

    def to_tile(self, points: NDArray[np.float64]) -> list[tuple[int, int]]:
        """Pixels of the crop as it is drawn, x y, of points [N, 2] in the original frame."""
        scaled = (points - (self.left, self.top)) * (len(self.pixels) / self.side)
        return [(x, y) for x, y in np.rint(scaled).astype(int).tolist()]


def image_row_of(index: CocoIndex, k: int) -> int:
    """The row in the index of the image that object k is in."""
    return int(np.searchsorted(index.first_object, k, side="right")) - 1


def crop_around(
    box: NDArray[np.float64], image: NDArray[np.uint8], *, tile: int = TILE
) -> ObjectCrop:
    """Crops a square around a box, with a margin.

    Args:
        box: float64 [4], x0 y0 x1 y1, px, original frame.
        image: uint8 [H, W, 3].
        tile: Side in px to which the crop is resized.
    """
    x0, y0, x1, y1 = box.tolist()
    side = int(np.ceil(max(x1 - x0, y1 - y0) * _CROP_MARGIN))
    side = max(side, _MIN_CROP_SIDE)
    left, top = round((x0 + x1 - side) / 2), round((y0 + y1 - side) / 2)
    square = _crop_square(image, top, left, side, fill=OUTSIDE_GREY)
    interpolation = cv2.INTER_AREA if side > tile else cv2.INTER_CUBIC
    resized = cv2.resize(square, (tile, tile), interpolation=interpolation)
    return ObjectCrop(np.asarray(resized, dtype=np.uint8), top, left, side)


def annotate_crop(
    index: CocoIndex,
    k: int,
    crop: ObjectCrop,
    *,
    predicted: CroppedMask | None = None,
    clicks: Sequence[tuple[int, int, int]] | None = None,
) -> NDArray[np.uint8]:
    """Draws an object's true outline, its box or clicks, and a model's mask on a crop.

    Args:
        index: The checked annotation file.
        k: The object, a row of its arrays.
        crop: Around that object; it is not changed.
        predicted: The model's mask, original frame; drawn filled.
        clicks: x, y in pixels of the original image and label, 1 or 0; None: the box is drawn.

    Returns:
        uint8 [T, T, 3].
    """
    tile = crop.pixels.copy()
    size = len(tile)
    if predicted is not None:
        blend_colour(tile, _resize_to_crop(crop, predicted), _PREDICTED_COLOUR, share=0.5)
    image_size = index.sizes[image_row_of(index, k)].tolist()
    truth = _resize_to_crop(crop, decode_cropped(index.segmentations[k], image_size))
    contours, _ = cv2.findContours(truth.view(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    if clicks is None:
        (x0, y0), (x1, y1) = crop.to_tile(index.boxes[k].reshape(2, 2))
        cv2.rectangle(tile, (x0, y0), (x1 - 1, y1 - 1), _BOX_COLOUR, 1)
    # With a dark rim, because no single colour stands out from every object.
    line_width = max(size // 144, 1)
    cv2.drawContours(tile, contours, -1, _RIM_COLOUR, line_width + 2)
    cv2.drawContours(tile, contours, -1, _TRUE_COLOUR, line_width)
    for x, y, label in clicks or ():
        draw_click(
            tile,
            crop.to_tile(np.array([[x + 0.5, y + 0.5]]))[0],
            label,
            size=max(len(tile) // 26, 5),
        )
    return tile


def draw_click(
    picture: NDArray[np.uint8], centre: tuple[int, int], label: int, *, size: int
) -> None:
    """Draws a click: a disc with a plus, or a square with a minus, alike in nothing but size.

    Args:
        picture: uint8 [H, W, 3] RGB, drawn on.
        centre: x, y, px.
        label: 1 for a point of the object, 0 for one of something else.
        size: Half the width of the mark, px, at least 4.
    """
    x, y = centre
    colour = CLICK_COLOURS[label]
    for grown, tone in ((2, _RIM_COLOUR), (0, colour)):
        if label:
            cv2.circle(picture, (x, y), size + grown, tone, cv2.FILLED, cv2.LINE_AA)
        else:
            reach = size - 1 + grown
            cv2.rectangle(picture, (x - reach, y - reach), (x + reach, y + reach), tone, cv2.FILLED)
    arm = size - 3
    cv2.line(picture, (x - arm, y), (x + arm, y), (255, 255, 255), 2)
    if label:
        cv2.line(picture, (x, y - arm), (x, y + arm), (255, 255, 255), 2)


def _resize_to_crop(crop: ObjectCrop, mask: CroppedMask) -> NDArray[np.bool_]:
    # The part of a mask that lies in the crop, bool [T, T].
    size, pixels = len(crop.pixels), mask.mask.view(np.uint8)
    top, left = crop.top - mask.top, crop.left - mask.left
    square = _crop_square(pixels, top, left, crop.side, fill=0) * 255
    interpolation = cv2.INTER_AREA if crop.side > size else cv2.INTER_NEAREST
    return np.asarray(cv2.resize(square, (size, size), interpolation=interpolation) > 64)


def _crop_square(
    picture: NDArray[np.uint8], top: int, left: int, side: int, *, fill: int
) -> NDArray[np.uint8]:
    # Outside of the picture, the square is filled up.
    height, width = picture.shape[:2]
    square = np.full((side, side, *picture.shape[2:]), fill, dtype=np.uint8)
    y0, x0 = max(top, 0), max(left, 0)
    y1, x1 = max(min(top + side, height), y0), max(min(left + side, width), x0)
    part = picture[y0:y1, x0:x1]
    square[y0 - top : y0 - top + part.shape[0], x0 - left : x0 - left + part.shape[1]] = part
    return square
