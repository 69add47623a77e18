"""Augmentation: random flips, scales, crops and colours.

All random numbers come from the generator of the sample; torchvision only applies the colours.
Flips, scales and crops are properties of a `Frame`, which maps boxes, polygons and pixels alike: so
no full-size mask is ever drawn.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from samft.annotations.segmentation import CroppedMask
from samft.data.transforms import Frame, make_frame, visible_box

_ZOOMS = (0.5, 2.0)  # of the frame, as in large-scale jitter
_MIN_VISIBLE = 0.1  # share of its pixels that an object must have in the frame to be kept
_MAX_COLOUR_CHANGE = 0.2  # of brightness, contrast and saturation
_MAX_HUE_SHIFT = 0.03  # of the colour circle


def draw_frame(
    size: tuple[int, int],
    image_size: int | tuple[int, int],
    *,
    resize_mode: str,
    augment: str,
    generator: np.random.Generator,
) -> Frame:
    """Draws where an image is in the input frame.

    `flip` mirrors left to right with probability 1/2. `scale` does so, too, and scales the image to
    0.5 to 2 times what just fits, log-uniformly; of what is larger than the frame, it takes a
    random crop.

    Args:
        size: H, W of the image, original px.
        image_size: Side of the input frame, or its H, W.
        resize_mode: See `make_frame`.
        augment: `none`, `flip` or `scale`.
        generator: The source of randomness.

    Source: large-scale jitter of https://arxiv.org/abs/2012.07177, its range chosen by the issue.
    """
    flipped = augment != "none" and bool(generator.integers(2))
    zoom, crop_at = 1.0, (0.0, 0.0)
    if augment == "scale":
        zoom = float(np.exp(generator.uniform(*np.log(_ZOOMS))))
        crop_at = (generator.random(), generator.random())
    return make_frame(
        size, image_size, resize_mode=resize_mode, flipped=flipped, zoom=zoom, crop_at=crop_at
    )


def boxes_in_frame(boxes_original: NDArray[np.floating], frame: Frame) -> NDArray[np.bool_]:
    """Which boxes [K, 4], original frame, overlap the part of the image in the input frame: [K]."""
    x0, y0, x1, y1 = visible_box(frame)
    left, top, right, bottom = boxes_original.T
    return (left < x1) & (right > x0) & (top < y1) & (bottom > y0)


def filter_cropped_objects(
    boxes_original: NDArray[np.floating],
    frame: Frame,
    *,
    decode_mask: Callable[[int], CroppedMask],
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Drops objects of which a crop or a window shows little, and tightens the boxes of cut ones.

    Args:
        boxes_original: [K, 4].
        frame: Of the image. Without a crop or a window, nothing is dropped.
        decode_mask: Returns the mask of object k; called only for objects that are cut.

    Returns:
        The objects that are kept, those with a tenth of their pixels or more in the frame: [M]. And
        their boxes [M, 4], original frame: as annotated, or tight around the visible part of the
        mask where they are cut.
    """
    boxes = np.array(boxes_original, dtype=np.float64).reshape(-1, 4)
    kept = np.ones(len(boxes), dtype=bool)
    if frame.cuts_objects:
        limit = np.array(frame.file_size[::-1] * 2)
        inside = np.clip(boxes, 0, limit)  # what leaves the image has no pixels to be cut
        visible = visible_box(frame)
        cut = (inside[:, :2] < visible[:2]).any(1) | (inside[:, 2:] > visible[2:]).any(1)
        for k in np.flatnonzero(cut).tolist():
            box = _tight_visible_box(decode_mask(k), np.rint(visible).astype(int).tolist())
            kept[k] = box is not None
            boxes[k] = box or boxes[k]
    return np.flatnonzero(kept), boxes[kept]


def _tight_visible_box(crop: CroppedMask, visible: list[int]) -> tuple[int, int, int, int] | None:
    # Around the pixels of the mask inside `visible`; None if they are too few.
    top, left, mask = crop.top, crop.left, crop.mask
    x0, y0, x1, y1 = visible
    x, y = max(x0 - left, 0), max(y0 - top, 0)
    part = mask[y : max(y1 - top, 0), x : max(x1 - left, 0)]
    if not part.any() or np.count_nonzero(part) < _MIN_VISIBLE * np.count_nonzero(mask):
        return None
    rows, columns = np.flatnonzero(part.any(axis=1)), np.flatnonzero(part.any(axis=0))
    x, y = x + left, y + top
    return x + int(columns[0]), y + int(rows[0]), x + int(columns[-1]) + 1, y + int(rows[-1]) + 1


@dataclass(frozen=True)
class ColourJitter:
    """A change of colours: factors around 1, and a shift of the hue."""

    brightness: float
    contrast: float
    saturation: float
    hue: float  # share of the colour circle


def draw_colour_jitter(generator: np.random.Generator) -> ColourJitter:
    """Draws a moderate change of colours; half of them leave the hue, which costs most time."""
    low, high = 1 - _MAX_COLOUR_CHANGE, 1 + _MAX_COLOUR_CHANGE
    brightness, contrast, saturation = generator.uniform(low, high, 3).tolist()
    hue = float(generator.uniform(-_MAX_HUE_SHIFT, _MAX_HUE_SHIFT)) * int(generator.integers(2))
    return ColourJitter(brightness, contrast, saturation, hue)


def apply_colour_jitter(image: NDArray[np.uint8], jitter: ColourJitter) -> NDArray[np.uint8]:
    """Changes the colours of an image uint8 [H, W, 3], RGB."""
    # Channels first: torchvision's kernels take six times as long for channels last.
    changed = tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1).contiguous())
    changed = F.adjust_brightness(changed, jitter.brightness)
    changed = F.adjust_contrast(changed, jitter.contrast)
    changed = F.adjust_saturation(changed, jitter.saturation)
    if jitter.hue:
        changed = F.adjust_hue(changed, jitter.hue)
    return np.asarray(changed.permute(1, 2, 0).numpy(), dtype=np.uint8)
