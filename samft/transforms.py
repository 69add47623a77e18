"""The two frames, and the way between them for images, boxes and masks. Imports no torch.

`original` is the file's real pixels. `input` is what the model sees: `image_size` x `image_size`,
with the resized image at the top left and zeros at its right and bottom. All lengths are in pixels;
boxes are x0 y0 x1 y1 with pixel edges at whole numbers.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

Mask = NDArray[np.uint8] | NDArray[np.bool_]

_LOW_CELL = 4  # the decoder's masks have a quarter of the input's resolution
_MAX_JITTER = 20 / 1024  # of image_size, as SAM was trained


@dataclass(frozen=True)
class Frame:
    """How one image lies in the input frame."""

    original_size: tuple[int, int]  # H, W
    input_size: tuple[int, int]  # h, w of the resized image inside of the input frame
    image_size: int
    flipped: bool = False  # left and right exchanged

    @property
    def scale_x(self) -> float:
        """Input pixels per original pixel, horizontally."""
        return self.input_size[1] / self.original_size[1]

    @property
    def scale_y(self) -> float:
        """Input pixels per original pixel, vertically."""
        return self.input_size[0] / self.original_size[0]


def make_frame(
    original_size: tuple[int, int], image_size: int, *, resize_mode: str, flipped: bool = False
) -> Frame:
    """Places an image in the input frame.

    Args:
        original_size: H, W of the file.
        image_size: Side of the input frame.
        resize_mode: `pad` scales the longest side to `image_size`; `squash` scales both.
        flipped: Whether left and right are exchanged.

    Source: `pad` is `ResizeLongestSide.get_preprocess_shape` of segment_anything, to the pixel.
    """
    if resize_mode == "squash":
        return Frame(original_size, (image_size, image_size), image_size, flipped)
    height, width = original_size
    scale = image_size * 1.0 / max(height, width)
    input_size = max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
    return Frame(original_size, input_size, image_size, flipped)


def resize_image(image: NDArray[np.uint8], frame: Frame) -> NDArray[np.uint8]:
    """Brings an image uint8 [H, W, 3] into the input frame, uint8 [S, S, 3], zero-padded.

    Source: Pillow's bilinear filter, as `ResizeLongestSide.apply_image` of segment_anything.
    """
    height, width = frame.input_size
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    padded = np.zeros((frame.image_size, frame.image_size, 3), dtype=np.uint8)
    padded[:height, :width] = np.asarray(resized)[:, :: -1 if frame.flipped else 1]
    return padded


def boxes_to_input(boxes_original: NDArray[np.floating], frame: Frame) -> NDArray[np.float64]:
    """Boxes [K, 4] from the original to the input frame."""
    boxes = np.array(boxes_original, dtype=np.float64).reshape(-1, 4)
    if frame.flipped:
        boxes[:, [0, 2]] = frame.original_size[1] - boxes[:, [2, 0]]
    return boxes * _scales(frame)


def boxes_to_original(boxes: NDArray[np.floating], frame: Frame) -> NDArray[np.float64]:
    """Boxes [K, 4] from the input to the original frame."""
    boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4) / _scales(frame)
    if frame.flipped:
        boxes[:, [0, 2]] = frame.original_size[1] - boxes[:, [2, 0]]
    return boxes


def _scales(frame: Frame) -> NDArray[np.float64]:
    # As segment_anything's apply_coords computes them.
    return np.array([frame.scale_x, frame.scale_y] * 2)


def jitter_boxes(
    boxes: NDArray[np.floating], *, share: float, frame: Frame, generator: np.random.Generator
) -> NDArray[np.float64]:
    """Moves each side of each box uniformly, as an annotator's hand would.

    Args:
        boxes: [K, 4] in the input frame.
        share: Furthest that a side moves, as a share of the box's width or height; at most 20 px at
            an `image_size` of 1024. 0 leaves the boxes as they are.
        frame: Of the image, which no side leaves.
        generator: Where the randomness comes from.

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
    furthest = np.minimum(share * side, _MAX_JITTER * frame.image_size)
    moved = np.clip(corners + furthest * generator.uniform(-1, 1, corners.shape), 0, limit)
    too_small = moved[:, 1:] - moved[:, :1] < side / 2
    return np.where(too_small, corners, moved).reshape(-1, 4)


def mask_to_low(mask: Mask, frame: Frame, *, top: int = 0, left: int = 0) -> NDArray[np.uint8]:
    """The share of each 4 x 4 px cell of the input frame that an object covers.

    Args:
        mask: uint8 or bool [h, w], 0 or 1: the original frame's mask, or a crop of it.
        frame: Of the image.
        top: Of the crop, px in the original frame.
        left: Of the crop, px in the original frame.

    Returns:
        uint8 [S/4, S/4]: 0 nothing, 255 all. Padding is 0.
    """
    cover = np.zeros((frame.image_size // _LOW_CELL,) * 2, dtype=np.uint8)
    rows, columns, share = _coverage(mask, frame, cell=_LOW_CELL, top=top, left=left)
    cover[rows, columns] = np.rint(share * 255)
    return cover


def mask_to_input(mask: Mask, frame: Frame, *, top: int = 0, left: int = 0) -> NDArray[np.uint8]:
    """The input frame's pixels of which an object covers half or more; see `mask_to_low`.

    Returns:
        uint8 [S, S] of 0 and 1.
    """
    cover = np.zeros((frame.image_size,) * 2, dtype=np.uint8)
    rows, columns, share = _coverage(mask, frame, cell=1, top=top, left=left)
    cover[rows, columns] = share >= 0.5 - 1e-9
    return cover


def _coverage(
    mask: Mask, frame: Frame, *, cell: int, top: int, left: int
) -> tuple[slice, slice, NDArray[np.float64]]:
    # Rows and columns of the cells that the crop reaches, and the share of each that it covers.
    # This is what cv2.INTER_AREA and a mean over the cell come to, without the whole image: the
    # integral of a mask of constant pixels is exactly bilinear between the pixels' corners.
    height, width = mask.shape
    if mask.size == 0:
        return slice(0), slice(0), np.zeros((0, 0))
    if frame.flipped:
        mask, left = mask[:, ::-1], frame.original_size[1] - left - width
    rows, edges_y = _cell_edges(top, height, frame.scale_y / cell)
    columns, edges_x = _cell_edges(left, width, frame.scale_x / cell)
    integral = cv2.integral(np.ascontiguousarray(mask, dtype=np.uint8))
    sums = _between_rows(_between_rows(integral, edges_y).T, edges_x).T
    area = cell * cell / (frame.scale_x * frame.scale_y)
    return rows, columns, np.clip(np.diff(np.diff(sums, axis=0), axis=1) / area, 0, 1)


def _cell_edges(start: int, length: int, scale: float) -> tuple[slice, NDArray[np.float64]]:
    # The cells (of 1/scale original pixels) that start:start + length reaches, and their edges in
    # pixels of the crop.
    first = int(np.floor(start * scale + 1e-9))
    last = max(first + 1, int(np.ceil((start + length) * scale - 1e-9)))
    edges = np.arange(first, last + 1) / scale - start
    return slice(first, last), np.clip(edges, 0, length)


def _between_rows(values: NDArray[np.number], at: NDArray[np.float64]) -> NDArray[np.float64]:
    low = np.minimum(at.astype(np.int64), len(values) - 2)
    part = (at - low)[:, None]
    return values[low] * (1 - part) + values[low + 1] * part
