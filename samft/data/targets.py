"""Draws the targets of the loss, and validation's ground truth, from COCO segmentations.

Both are drawn from polygons or RLE into the input frame: at the decoder's resolution (`low`, one
cell is 4 x 4 input px, a target is the share of the cell that the object covers), or at that of the
input (`input`, binary). Imports no torch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from samft.coco.segmentation import CroppedMask, decode_cropped
from samft.data.rasterize import CoveredBlock, Polygons, rasterize_polygons
from samft.data.transforms import LOW_CELL, Frame

# Polygons are drawn straight into the input frame where a cell is at least so many original pixels
# wide: there the targets agree with pycocotools' masks to an IoU of .99 (objects of 32 cells or
# more, three datasets). In finer cells the pixel steps of those masks, which are the ground truth
# of validation, would show: the IoU is .95 to .98.
_MIN_CELL_PIXELS = 6
# The share of a cell from which on a binary target counts it, less what rounding can lose.
_HALF = 0.5 - 1e-9


def draw_targets(
    segmentations: Sequence[Any], frame: Frame, *, resolution: str
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Draws training targets: polygons where possible straight into the input frame.

    Args:
        segmentations: Checked, of K objects of one image.
        frame: Of the image.
        resolution: `low` (s = S/4) or `input` (s = S).

    Returns:
        Which of the K objects have a pixel in the original image, [M], and their targets, uint8
        [M, s, s]; see `mask_to_low` and `mask_to_input`.
    """
    targets = empty_targets(len(segmentations), frame, resolution=resolution)
    undrawn = np.arange(len(targets))
    cell = frame.image_size / targets.shape[-1]
    if cell >= _MIN_CELL_PIXELS * max(frame.scale_x, frame.scale_y):
        outlines = [[] if isinstance(item, dict) else item for item in segmentations]
        draw_polygons = polygons_to_low if resolution == "low" else polygons_to_input
        draw_polygons(Polygons.pack(outlines), frame, out=targets)
        # RLEs have no outline. And outlines that are too thin to cover anything (lines, say) still
        # have pixels in pycocotools' masks, and are objects in validation.
        undrawn = np.flatnonzero(~targets.any(axis=(1, 2)))
    kept = np.ones(len(targets), dtype=bool)
    for k in undrawn.tolist():
        mask = decode_cropped(segmentations[k], frame.original_size)
        kept[k] = mask.mask.size > 0
        _draw_mask(mask, frame, out=targets[k])
    return np.flatnonzero(kept), targets if kept.all() else targets[kept]


def rasterize_ground_truth(
    segmentations: Sequence[Any], frame: Frame, *, resolution: str
) -> tuple[NDArray[np.int64], NDArray[np.uint8], list[CroppedMask]]:
    """Draws masks at the original resolution, exactly as pycocotools does, and targets from them.

    Args:
        segmentations: Checked, of K objects of one image.
        frame: Of the image.
        resolution: `low` or `input`.

    Returns:
        As `draw_targets`, with targets that are averages of the masks; and the M masks.
    """
    masks = [decode_cropped(item, frame.original_size) for item in segmentations]
    kept = np.flatnonzero(np.array([mask.mask.size > 0 for mask in masks], dtype=bool))
    targets = empty_targets(len(kept), frame, resolution=resolution)
    truths = [masks[k] for k in kept.tolist()]
    for target, truth in zip(targets, truths, strict=True):
        _draw_mask(truth, frame, out=target)
    return kept, targets, truths


def empty_targets(num_objects: int, frame: Frame, *, resolution: str) -> NDArray[np.uint8]:
    """Targets of objects that cover nothing: uint8 [K, s, s] of zeros, see `draw_targets`."""
    side = frame.image_size // LOW_CELL if resolution == "low" else frame.image_size
    return np.zeros((num_objects, side, side), dtype=np.uint8)


def _draw_mask(mask: CroppedMask, frame: Frame, *, out: NDArray[np.uint8]) -> None:
    draw = mask_to_input if len(out) == frame.image_size else mask_to_low
    draw(mask, frame, out=out)


def mask_to_low(
    mask: CroppedMask, frame: Frame, *, out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """The share of each 4 x 4 px cell of the input frame that a mask covers.

    Args:
        mask: In the original frame.
        frame: Of the image.
        out: Zeros to draw on; None allocates them.

    Returns:
        uint8 [S/4, S/4] from 0, nothing covered, to 255, all covered. Padding is 0.
    """
    out = np.zeros((frame.image_size // LOW_CELL,) * 2, dtype=np.uint8) if out is None else out
    rows, columns, share = _cell_coverage(mask, frame, cell=LOW_CELL)
    out[rows, columns] = np.rint(share * 255)
    return out


def mask_to_input(
    mask: CroppedMask, frame: Frame, *, out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """The pixels of the input frame of which a mask covers half or more; see `mask_to_low`.

    Returns:
        uint8 [S, S] of 0 and 1.
    """
    out = np.zeros((frame.image_size,) * 2, dtype=np.uint8) if out is None else out
    rows, columns, share = _cell_coverage(mask, frame, cell=1)
    out[rows, columns] = share >= _HALF
    return out


def _cell_coverage(
    crop: CroppedMask, frame: Frame, *, cell: int
) -> tuple[slice, slice, NDArray[np.float64]]:
    # Rows and columns of the cells that the mask reaches, and the share of each that it covers.
    # The integral of a mask is bilinear between the corners of its pixels, so differences of the
    # integral at the cells' corners are exact areas: what cv2.INTER_AREA and a mean over the cell
    # come to, but from the crop alone, without resizing the whole image.
    mask, left = crop.mask, crop.left
    height, width = mask.shape
    (shown_height, shown_width), (offset_y, offset_x) = frame.input_size, frame.offset
    if frame.flipped:
        mask, left = mask[:, ::-1], frame.original_size[1] - left - width
        offset_x = frame.resized_size[1] - shown_width - offset_x
    scale_x, scale_y = frame.scale_x / cell, frame.scale_y / cell
    rows, edges_y = _cell_edges(crop.top, height, scale_y, offset_y / cell, shown_height / cell)
    columns, edges_x = _cell_edges(left, width, scale_x, offset_x / cell, shown_width / cell)
    if mask.size == 0 or rows.start >= rows.stop or columns.start >= columns.stop:
        return slice(0), slice(0), np.zeros((0, 0))
    integral = cv2.integral(np.ascontiguousarray(mask, dtype=np.uint8))
    at_corners = _interpolate_rows(_interpolate_rows(integral, edges_y).T, edges_x).T
    shares = np.diff(np.diff(at_corners, axis=0), axis=1) * (scale_x * scale_y)
    return rows, columns, np.clip(shares, 0, 1)


def _cell_edges(
    start: int, length: int, scale: float, offset: float, shown: float
) -> tuple[slice, NDArray[np.float64]]:
    # Along one axis: the cells (1/scale original pixels each, counted from `offset` on, `shown` of
    # them) that start:start + length reaches, and their edges in pixels of the crop.
    first = int(np.floor(start * scale - offset + 1e-9))
    last = max(first + 1, int(np.ceil((start + length) * scale - offset - 1e-9)))
    cells = slice(max(first, 0), min(last, int(np.ceil(shown))))
    edges = (np.minimum(np.arange(cells.start, cells.stop + 1), shown) + offset) / scale - start
    return cells, np.clip(edges, 0, length)


def _interpolate_rows(values: NDArray[np.number], at: NDArray[np.float64]) -> NDArray[np.float64]:
    low = np.minimum(at.astype(np.int64), len(values) - 2)
    part = (at - low)[:, None]
    return values[low] * (1 - part) + values[low + 1] * part


def polygons_to_low(polygons: Polygons, frame: Frame, *, out: NDArray[np.uint8]) -> None:
    """As `mask_to_low`, for K objects at once, from their outlines instead of their masks.

    Args:
        polygons: In the original frame.
        frame: Of the image.
        out: uint8 [K, S/4, S/4] of zeros to draw on: 0 nothing covered, 255 all.
    """
    for block in _rasterize_in_cells(polygons, frame, cell=LOW_CELL):
        _cells_of(block, out)[:] = np.rint(block.share * 255)


def polygons_to_input(polygons: Polygons, frame: Frame, *, out: NDArray[np.uint8]) -> None:
    """As `mask_to_input`, for K objects at once, from their outlines instead of their masks.

    Args:
        polygons: In the original frame.
        frame: Of the image.
        out: uint8 [K, S, S] of zeros to draw ones on.
    """
    for block in _rasterize_in_cells(polygons, frame, cell=1):
        _cells_of(block, out)[:] = block.share >= _HALF


def _rasterize_in_cells(polygons: Polygons, frame: Frame, *, cell: int) -> Iterator[CoveredBlock]:
    points = polygons.points * frame.scale_xyxy[:2] - frame.offset_xyxy[:2]
    height, width = frame.input_size
    if frame.flipped:
        points[:, 0] = width - points[:, 0]
    in_cells = replace(polygons, points=points / cell)
    return rasterize_polygons(in_cells, size=(height / cell, width / cell))


def _cells_of(block: CoveredBlock, out: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width = block.share.shape
    return out[block.object, block.top : block.top + height, block.left : block.left + width]
