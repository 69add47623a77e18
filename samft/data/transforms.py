"""The two frames, and the way between them for images, boxes, masks and polygons. No torch.

`original` is the file's real pixels. `input` is what the model sees: `image_size` x `image_size`,
with the resized image, or a crop of it, at the top left and zeros at its right and bottom. All
lengths are in pixels; boxes are x0 y0 x1 y1 with pixel edges at whole numbers.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

LOW_CELL = 4  # input px; the decoder's masks have a quarter of the input's resolution
_MAX_JITTER = 20 / 1024  # of image_size, as SAM was trained


@dataclass(frozen=True)
class Frame:
    """How one image lies in the input frame: resized, then cropped, then flipped."""

    original_size: tuple[int, int]  # H, W of the file
    resized_size: tuple[int, int]  # H, W of the whole image at the input's scale
    image_size: int
    offset: tuple[int, int] = (0, 0)  # y, x of the crop in the resized image
    flipped: bool = False  # left and right of the crop exchanged

    @property
    def input_size(self) -> tuple[int, int]:
        """h, w of what is visible of the image inside of the input frame."""
        (height, width), (top, left) = self.resized_size, self.offset
        return min(height - top, self.image_size), min(width - left, self.image_size)

    @property
    def is_cropped(self) -> bool:
        """Whether a part of the image is not visible."""
        return self.input_size != self.resized_size

    @property
    def scale_x(self) -> float:
        """Input pixels per original pixel, horizontally."""
        return self.resized_size[1] / self.original_size[1]

    @property
    def scale_y(self) -> float:
        """Input pixels per original pixel, vertically."""
        return self.resized_size[0] / self.original_size[0]


def make_frame(
    original_size: tuple[int, int],
    image_size: int,
    *,
    resize_mode: str,
    flipped: bool = False,
    zoom: float = 1.0,
    crop_at: tuple[float, float] = (0.0, 0.0),
) -> Frame:
    """Places an image in the input frame.

    Args:
        original_size: H, W of the file.
        image_size: Side of the input frame.
        resize_mode: `pad` scales the longest side to `image_size`; `squash` scales both.
        flipped: Whether left and right are exchanged.
        zoom: Scales to so many times `image_size` instead; what is larger than the frame is cut.
        crop_at: Where to cut, y and x: 0 keeps the top or left end, just under 1 the other.

    Source: `pad` is `ResizeLongestSide.get_preprocess_shape` of segment_anything, to the pixel.
    """
    height, width = original_size
    scale = image_size * zoom / max(height, width)
    scale_y, scale_x = scale, scale
    if resize_mode == "squash":
        scale_y, scale_x = image_size * zoom / height, image_size * zoom / width
    resized = max(1, int(height * scale_y + 0.5)), max(1, int(width * scale_x + 0.5))
    top, left = (
        int(at * (max(side - image_size, 0) + 1)) for at, side in zip(crop_at, resized, strict=True)
    )
    return Frame(original_size, resized, image_size, (top, left), flipped)


def resize_image(
    image: NDArray[np.uint8], frame: Frame, *, exact: bool = True
) -> NDArray[np.uint8]:
    """Brings an image into the input frame.

    Args:
        image: uint8 [H, W, 3] of the file's size, or reduced to a half, a quarter or an eighth of
            it, rounded up, when it was decoded.
        frame: Of the file.
        exact: As `SamPredictor` does it, to the level. Otherwise faster: an enlarged image may be a
            level off, and a reduced one that has the right size already, at its far end, a pixel.

    Returns:
        uint8 [S, S, 3], zero-padded.

    Source: Pillow's bilinear filter, as `ResizeLongestSide.apply_image` of segment_anything.
    """
    (height, width), (top, left) = frame.input_size, frame.offset
    resized_height, resized_width = frame.resized_size
    shown = slice(top, top + height), slice(left, left + width)
    is_reduced = image.shape[:2] != frame.original_size
    is_shrunk = image.shape[0] > resized_height or image.shape[1] > resized_width
    padded = np.zeros((frame.image_size, frame.image_size, 3), dtype=np.uint8)
    visible = padded[:height, :width]
    if not exact and image.shape[:2] == frame.resized_size:
        visible[:] = image[shown]
    elif exact or is_reduced or is_shrunk:
        visible[:] = _resize_with_pillow(image, frame)
    elif frame.is_cropped:
        visible[:] = cv2.resize(image, (resized_width, resized_height))[shown]
    else:
        cv2.resize(image, (width, height), dst=visible)
    if frame.flipped:
        cv2.flip(visible, 1, dst=visible)
    return padded


def _resize_with_pillow(image: NDArray[np.uint8], frame: Frame) -> NDArray[np.uint8]:
    (height, width), (top, left) = frame.input_size, frame.offset
    reduction = next(
        factor
        for factor in (1, 2, 4, 8)
        if image.shape[:2] == tuple(-(-side // factor) for side in frame.original_size)
    )
    box = None  # all of it
    if frame.is_cropped or reduction > 1:
        # In pixels of `image`, of which the last may be only partly filled.
        down, across = 1 / frame.scale_y / reduction, 1 / frame.scale_x / reduction
        right = min((left + width) * across, image.shape[1])  # rounding may carry it over
        bottom = min((top + height) * down, image.shape[0])
        box = (left * across, top * down, right, bottom)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR, box=box)
    return np.asarray(resized)


def boxes_to_input(boxes_original: NDArray[np.floating], frame: Frame) -> NDArray[np.float64]:
    """Boxes [K, 4] from the original to the input frame; they may reach out of it."""
    boxes = np.array(boxes_original, dtype=np.float64).reshape(-1, 4) * scales(frame)
    return _mirror_boxes(boxes - offsets(frame), frame)


def boxes_to_original(boxes: NDArray[np.floating], frame: Frame) -> NDArray[np.float64]:
    """Boxes [K, 4] from the input to the original frame."""
    boxes = _mirror_boxes(np.array(boxes, dtype=np.float64).reshape(-1, 4), frame)
    return (boxes + offsets(frame)) / scales(frame)


def visible_box(frame: Frame) -> NDArray[np.float64]:
    """x0 y0 x1 y1 of the part of the original image that is in the input frame."""
    height, width = frame.input_size
    return boxes_to_original(np.array([[0, 0, width, height]]), frame)[0]


def scales(frame: Frame) -> NDArray[np.float64]:
    """Model pixels to an original pixel, as (x, y, x, y)."""
    # As segment_anything's apply_coords computes them.
    return np.array([frame.scale_x, frame.scale_y] * 2)


def offsets(frame: Frame) -> NDArray[np.int64]:
    """Where the visible part begins in the resized image, in model pixels, as (x, y, x, y)."""
    return np.array(frame.offset[::-1] * 2)


def _mirror_boxes(boxes: NDArray[np.float64], frame: Frame) -> NDArray[np.float64]:
    if frame.flipped:
        boxes[:, [0, 2]] = frame.input_size[1] - boxes[:, [2, 0]]
    return boxes


def jitter_boxes(
    boxes: NDArray[np.floating],
    *,
    share: float,
    frame: Frame,
    generator: np.random.Generator,
    most: float = _MAX_JITTER,
) -> NDArray[np.float64]:
    """Moves each side of each box uniformly, as an annotator's hand would.

    Args:
        boxes: [K, 4] in the input frame.
        share: Furthest that a side moves, as a share of the box's width or height. 0 leaves the
            boxes as they are.
        frame: Of the image, which no side leaves.
        generator: Where the randomness comes from.
        most: Furthest that a side moves, as a share of `image_size`: 20 px at 1024.

    Returns:
        Boxes [K, 4] in the input frame, each at least half as wide and high as it was.
    """
    boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    if share == 0:
        return boxes
    limit = np.array([frame.input_size[1], frame.input_size[0]], dtype=np.float64)
    corners = np.clip(boxes.reshape(-1, 2, 2), 0, limit)  # [K, low/high, x/y]
    # A box that touches the image at its edge only keeps a sliver of a pixel.
    corners[:, 0] = np.minimum(corners[:, 0], limit - 1e-2)
    corners[:, 1] = np.maximum(corners[:, 1], corners[:, 0] + 1e-2)
    side = corners[:, 1:] - corners[:, :1]
    furthest = np.minimum(share * side, most * frame.image_size)
    moved = np.clip(corners + furthest * generator.uniform(-1, 1, corners.shape), 0, limit)
    too_small = moved[:, 1:] - moved[:, :1] < side / 2
    return np.where(too_small, corners, moved).reshape(-1, 4)
