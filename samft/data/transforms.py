"""The original frame and the input frame, and how images and boxes get from one to the other.

The `original` frame has the pixels of the image file, also where only a window of it is seen. The
`input` frame is what the model sees: H x W pixels, most often a square, with the resized image or
window, or a crop of it, at the top left, and zeros to the right and below. All lengths are in
pixels; boxes are x0 y0 x1 y1, with pixel edges at whole numbers. Imports no torch.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from samft.views.fitting import fit_size

LOW_CELL = 4  # input px per pixel of the decoder's masks, along each axis
_MAX_JITTER = 20 / 1024  # of the longer side of the frame, as in SAM's training


@dataclass(frozen=True)
class Frame:
    """Where an image is in the input frame: it is resized, then cropped, then flipped."""

    original_size: tuple[int, int]  # H, W of the image, or of the window of it, original px
    resized_size: tuple[int, int]  # H, W of all of that, input px
    size: tuple[int, int]  # H, W of the input frame
    offset: tuple[int, int] = (0, 0)  # y, x of the crop in the resized image, input px
    flipped: bool = False  # the crop is mirrored left to right
    origin: tuple[int, int] = (0, 0)  # y, x of the window in the image, original px
    whole_size: tuple[int, int] | None = None  # H, W of the image that a window is of

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the image area in the input frame, input px."""
        (height, width), (top, left) = self.resized_size, self.offset
        return min(height - top, self.size[0]), min(width - left, self.size[1])

    @property
    def is_cropped(self) -> bool:
        """Whether a part of the image is outside the input frame."""
        return self.input_size != self.resized_size

    @property
    def file_size(self) -> tuple[int, int]:
        """H, W of the image in the original frame, of which a window may be seen."""
        return self.whole_size or self.original_size

    @property
    def cuts_objects(self) -> bool:
        """Whether a part of the image, also outside of its window, is not in the input frame."""
        return self.is_cropped or self.file_size != self.original_size

    @property
    def origin_xyxy(self) -> NDArray[np.int64]:
        """Where the window begins in the image, for the four coordinates of a box: [4]."""
        return np.array(self.origin[::-1] * 2)

    @property
    def scale_x(self) -> float:
        """Input pixels per original pixel, horizontally."""
        return self.resized_size[1] / self.original_size[1]

    @property
    def scale_y(self) -> float:
        """Input pixels per original pixel, vertically."""
        return self.resized_size[0] / self.original_size[0]

    @property
    def scale_xyxy(self) -> NDArray[np.float64]:
        """Input pixels per original pixel, for the four coordinates of a box: [4]."""
        # Two different factors, because sides are rounded: as segment_anything's apply_coords.
        return np.array([self.scale_x, self.scale_y] * 2)

    @property
    def offset_xyxy(self) -> NDArray[np.int64]:
        """Where the crop begins in the resized image, for the four coordinates of a box: [4]."""
        return np.array(self.offset[::-1] * 2)


def make_frame(
    original_size: tuple[int, int],
    image_size: int | tuple[int, int],
    *,
    resize_mode: str,
    flipped: bool = False,
    zoom: float = 1.0,
    crop_at: tuple[float, float] = (0.0, 0.0),
) -> Frame:
    """Places an image in the input frame.

    Args:
        original_size: H, W of the image, original px.
        image_size: Side of the input frame, or its H, W.
        resize_mode: See `views.fitting.fit_scales`.
        flipped: Whether to mirror left to right.
        zoom: Scales to this times the frame instead, and crops what does not fit.
        crop_at: Position of the crop, y and x, from 0 (top or left end) to just under 1.

    Example:
        >>> make_frame((480, 640), 1024, resize_mode="pad").input_size
        (768, 1024)
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    resized = fit_size(original_size, size, resize_mode=resize_mode, zoom=zoom)
    top, left = (
        int(at * (max(side - shown, 0) + 1))
        for at, side, shown in zip(crop_at, resized, size, strict=True)
    )
    return Frame(original_size, resized, size, (top, left), flipped)


def resize_image(
    image: NDArray[np.uint8], frame: Frame, *, exact: bool = True
) -> NDArray[np.uint8]:
    """Resizes, crops, flips and pads an image into the input frame.

    Args:
        image: uint8 [H, W, 3] of the original size, or of a half, a quarter or an eighth of it,
            rounded up, if it was reduced when it was decoded.
        frame: Of the image.
        exact: Gives the very values of `SamPredictor`. Otherwise faster: an enlarged image may
            differ by one level (of 255), and a reduced image that has the right size already may be
            off by a pixel at its right and bottom ends.

    Returns:
        uint8 [H, W, 3] of the frame, zero-padded.

    Source: Pillow's bilinear filter, as `ResizeLongestSide.apply_image` of segment_anything.
    """
    (height, width), (top, left) = frame.input_size, frame.offset
    resized_height, resized_width = frame.resized_size
    shown = slice(top, top + height), slice(left, left + width)
    is_reduced = image.shape[:2] != frame.original_size
    is_shrunk = image.shape[0] > resized_height or image.shape[1] > resized_width
    padded = np.zeros((*frame.size, 3), dtype=np.uint8)
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
    box = None  # the whole image
    if frame.is_cropped or reduction > 1:
        # In pixels of `image`; of a reduced one, the last pixel may be only partly filled.
        down, across = 1 / frame.scale_y / reduction, 1 / frame.scale_x / reduction
        right = min((left + width) * across, image.shape[1])  # rounding may exceed the image
        bottom = min((top + height) * down, image.shape[0])
        box = (left * across, top * down, right, bottom)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR, box=box)
    return np.asarray(resized)


def boxes_to_input(boxes_original: NDArray[np.floating], frame: Frame) -> NDArray[np.float64]:
    """Maps boxes [K, 4] from the original to the input frame, which they may exceed."""
    boxes = np.array(boxes_original, dtype=np.float64).reshape(-1, 4) - frame.origin_xyxy
    return _mirror_boxes(boxes * frame.scale_xyxy - frame.offset_xyxy, frame)


def boxes_to_original(boxes: NDArray[np.floating], frame: Frame) -> NDArray[np.float64]:
    """Maps boxes [K, 4] from the input to the original frame."""
    boxes = _mirror_boxes(np.array(boxes, dtype=np.float64).reshape(-1, 4), frame)
    return (boxes + frame.offset_xyxy) / frame.scale_xyxy + frame.origin_xyxy


def visible_box(frame: Frame) -> NDArray[np.float64]:
    """The part of the original image that is in the input frame: x0 y0 x1 y1, original px."""
    height, width = frame.input_size
    return boxes_to_original(np.array([[0, 0, width, height]]), frame)[0]


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
    """Moves each side of each box by a uniform random amount, as hand-drawn boxes are imprecise.

    Args:
        boxes: [K, 4] in the input frame.
        share: Largest move, as a share of the box's width or height. 0 changes nothing.
        frame: Of the image. No side leaves the image area.
        generator: The source of randomness.
        most: Largest move, as a share of the frame's longer side: 20 px at 1024.

    Returns:
        Boxes [K, 4] in the input frame, each at least half as wide and high as before.
    """
    boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    if share == 0:
        return boxes
    limit = np.array([frame.input_size[1], frame.input_size[0]], dtype=np.float64)
    corners = np.clip(boxes.reshape(-1, 2, 2), 0, limit)  # [K, low/high, x/y]
    # A box that only touches the image area keeps 1/100 px, so that no box is empty.
    corners[:, 0] = np.minimum(corners[:, 0], limit - 1e-2)
    corners[:, 1] = np.maximum(corners[:, 1], corners[:, 0] + 1e-2)
    side = corners[:, 1:] - corners[:, :1]
    furthest = np.minimum(share * side, most * max(frame.size))
    moved = np.clip(corners + furthest * generator.uniform(-1, 1, corners.shape), 0, limit)
    too_small = moved[:, 1:] - moved[:, :1] < side / 2
    return np.where(too_small, corners, moved).reshape(-1, 4)
