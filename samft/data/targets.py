"""From segmentations to what the loss and the metrics are taken against. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samft.coco.masks import decode_cropped
from samft.data.rasterize import Polygons
from samft.data.transforms import (
    LOW_CELL,
    Frame,
    mask_to_input,
    mask_to_low,
    polygons_to_input,
    polygons_to_low,
)

# Original pixels across a cell from which on outlines are drawn in the cells right away. They then
# agree with pycocotools' masks to an IoU of .99 (objects of 32 cells or more, three data sets); in
# finer cells the steps of those masks, which count in validation, would show: .95 to .98.
_MIN_CELL = 6


@dataclass(frozen=True)
class CroppedMask:
    """A true mask at the original resolution, cropped tightly."""

    top: int  # px, original frame
    left: int
    mask: NDArray[np.bool_]  # [h, w]


def draw_targets(
    segmentations: Sequence[Any], frame: Frame, *, resolution: str
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Draws objects in the input frame, where it can without drawing them in the original one.

    Args:
        segmentations: Checked, of K objects of one image.
        frame: Of the image.
        resolution: `low` (s = S/4) or `input` (s = S).

    Returns:
        Which of the objects have a pixel in the original image, [M], and their targets, uint8
        [M, s, s]; see `mask_to_low` and `mask_to_input`.
    """
    targets = _blank(len(segmentations), frame, resolution=resolution)
    missing = np.arange(len(targets))
    cell = frame.image_size / targets.shape[-1]
    if cell >= _MIN_CELL * max(frame.scale_x, frame.scale_y):
        outlines = [[] if isinstance(item, dict) else item for item in segmentations]
        draw = polygons_to_low if resolution == "low" else polygons_to_input
        draw(Polygons.pack(outlines), frame, out=targets)
        # Of an RLE there is no outline. And of outlines too thin to cover anything, lines say,
        # pycocotools draws some pixels, which count as the object in validation.
        missing = np.flatnonzero(~targets.any(axis=(1, 2)))
    kept = np.ones(len(targets), dtype=bool)
    for k in missing.tolist():
        top, left, mask = decode_cropped(segmentations[k], *frame.original_size)
        kept[k] = mask.size > 0
        _draw_mask(mask, frame, top=top, left=left, out=targets[k])
    return np.flatnonzero(kept), targets if kept.all() else targets[kept]


def draw_truths(
    segmentations: Sequence[Any], frame: Frame, *, resolution: str
) -> tuple[NDArray[np.int64], NDArray[np.uint8], list[CroppedMask]]:
    """Draws objects at the original resolution, as pycocotools does to the pixel.

    Args:
        segmentations: Checked, of K objects of one image.
        frame: Of the image.
        resolution: `low` or `input`.

    Returns:
        What `draw_targets` does, with targets that are averages of the masks, and the M masks.
    """
    crops = [decode_cropped(item, *frame.original_size) for item in segmentations]
    kept = np.flatnonzero(np.array([crop[2].size > 0 for crop in crops], dtype=bool))
    targets = _blank(len(kept), frame, resolution=resolution)
    truths = []
    for target, k in zip(targets, kept.tolist(), strict=True):
        top, left, mask = crops[k]
        _draw_mask(mask, frame, top=top, left=left, out=target)
        truths.append(CroppedMask(top, left, mask.astype(bool)))
    return kept, targets, truths


def _blank(num_objects: int, frame: Frame, *, resolution: str) -> NDArray[np.uint8]:
    side = frame.image_size // LOW_CELL if resolution == "low" else frame.image_size
    return np.zeros((num_objects, side, side), dtype=np.uint8)


def _draw_mask(
    mask: NDArray[np.uint8], frame: Frame, *, top: int, left: int, out: NDArray[np.uint8]
) -> None:
    draw = mask_to_input if len(out) == frame.image_size else mask_to_low
    draw(mask, frame, top=top, left=left, out=out)
