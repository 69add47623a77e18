"""What training changes at random about an image: its place in the frame, and its colours.

Everything random is drawn here from the sample's own generator; torchvision only applies it. Where
boxes, polygons and pixels go is `Frame`'s business, so that polygons never become full-size masks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

import samft.runtime.torchvision_compat  # noqa: F401  (before all that imports torchvision)
from samft.coco.segmentation import CroppedMask
from samft.data.transforms import Frame, make_frame, visible_box

_ZOOMS = (0.5, 2.0)  # of image_size, as in large-scale jitter
_MIN_VISIBLE = 0.1  # share of an object's area below which it counts as gone
_STRENGTH = 0.2  # brightness, contrast and saturation change by up to this share
_MAX_HUE = 0.03  # of the colour circle


def draw_frame(
    size: tuple[int, int],
    image_size: int,
    *,
    resize_mode: str,
    augment: str,
    generator: np.random.Generator,
) -> Frame:
    """Draws how an image lies in the input frame.

    `flip` exchanges left and right half of the time. `scale` does, and scales the longest side to
    0.5..2 times `image_size`, log-uniformly; of what is then larger than the frame a random crop is
    taken.

    Args:
        size: H, W of the file.
        image_size: S.
        resize_mode: See `make_frame`.
        augment: `none`, `flip` or `scale`.
        generator: Where the randomness comes from.

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
    """Which boxes [K, 4] have at least a part in the input frame."""
    x0, y0, x1, y1 = visible_box(frame)
    left, top, right, bottom = boxes_original.T
    return (left < x1) & (right > x0) & (top < y1) & (bottom > y0)


def filter_cropped_objects(
    boxes_original: NDArray[np.floating], frame: Frame, *, draw: Callable[[int], CroppedMask]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Drops the objects that a crop leaves little of; boxes of those cut follow their masks.

    Args:
        boxes_original: [K, 4].
        frame: Of the image; nothing is dropped where it shows the whole.
        draw: Gives the mask of object k in the original frame; asked for cut ones only.

    Returns:
        Which objects remain, those with a tenth of their pixels or more in the frame: [M]. And
        their boxes [M, 4], original frame: as annotated, or tight around what is visible of them.
    """
    boxes = np.array(boxes_original, dtype=np.float64).reshape(-1, 4)
    kept = np.ones(len(boxes), dtype=bool)
    if frame.is_cropped:
        limit = np.array(frame.original_size[::-1] * 2)
        inside = np.clip(boxes, 0, limit)  # a box may leave the image, where there are no pixels
        corners = visible_box(frame)
        cut = (inside[:, :2] < corners[:2]).any(1) | (inside[:, 2:] > corners[2:]).any(1)
        for k in np.flatnonzero(cut).tolist():
            box = _visible_part(draw(k), np.rint(corners).astype(int).tolist())
            kept[k] = box is not None
            boxes[k] = box or boxes[k]
    return np.flatnonzero(kept), boxes[kept]


def _visible_part(crop: CroppedMask, corners: list[int]) -> tuple[int, int, int, int] | None:
    top, left, mask = crop.top, crop.left, crop.mask
    x0, y0, x1, y1 = corners
    x, y = max(x0 - left, 0), max(y0 - top, 0)
    part = mask[y : max(y1 - top, 0), x : max(x1 - left, 0)]
    if not part.any() or np.count_nonzero(part) < _MIN_VISIBLE * np.count_nonzero(mask):
        return None
    rows, columns = np.flatnonzero(part.any(axis=1)), np.flatnonzero(part.any(axis=0))
    x, y = x + left, y + top
    return x + int(columns[0]), y + int(rows[0]), x + int(columns[-1]) + 1, y + int(rows[-1]) + 1


@dataclass(frozen=True)
class ColourJitter:
    """A change of colours: factors around 1, and a turn of the hue around 0."""

    brightness: float
    contrast: float
    saturation: float
    hue: float  # of the colour circle, 0 leaves it


def draw_colour_jitter(generator: np.random.Generator) -> ColourJitter:
    """Draws a moderate change of colours; the hue, which costs most, turns in a half of them."""
    brightness, contrast, saturation = generator.uniform(1 - _STRENGTH, 1 + _STRENGTH, 3).tolist()
    hue = float(generator.uniform(-_MAX_HUE, _MAX_HUE)) * int(generator.integers(2))
    return ColourJitter(brightness, contrast, saturation, hue)


def apply_colour_jitter(image: NDArray[np.uint8], colour: ColourJitter) -> NDArray[np.uint8]:
    """Changes the colours of an image uint8 [H, W, 3], RGB."""
    # Channels first: torchvision's kernels take six times as long for channels last.
    changed = tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1).contiguous())
    changed = F.adjust_brightness(changed, colour.brightness)
    changed = F.adjust_contrast(changed, colour.contrast)
    changed = F.adjust_saturation(changed, colour.saturation)
    if colour.hue:
        changed = F.adjust_hue(changed, colour.hue)
    return np.asarray(changed.permute(1, 2, 0).numpy(), dtype=np.uint8)
