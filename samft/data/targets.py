"""From segmentations to what the loss and the metrics are taken against. Imports no torch."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from samft.coco.segmentation import CroppedMask, decode_cropped
from samft.data.rasterize import CoveredBlock, Polygons, rasterize_polygons
from samft.data.transforms import LOW_CELL, Frame, offsets, scales

Mask = NDArray[np.uint8] | NDArray[np.bool_]

# Original pixels across a cell from which on outlines are drawn in the cells right away. They then
# agree with pycocotools' masks to an IoU of .99 (objects of 32 cells or more, three data sets); in
# finer cells the steps of those masks, which count in validation, would show: .95 to .98.
_MIN_CELL = 6


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
        crop = decode_cropped(segmentations[k], frame.original_size)
        kept[k] = crop.mask.size > 0
        _draw_mask(crop, frame, out=targets[k])
    return np.flatnonzero(kept), targets if kept.all() else targets[kept]


def rasterize_ground_truth(
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
    crops = [decode_cropped(item, frame.original_size) for item in segmentations]
    kept = np.flatnonzero(np.array([crop.mask.size > 0 for crop in crops], dtype=bool))
    targets = _blank(len(kept), frame, resolution=resolution)
    truths = [crops[k] for k in kept.tolist()]
    for target, truth in zip(targets, truths, strict=True):
        _draw_mask(truth, frame, out=target)
    return kept, targets, truths


def _blank(num_objects: int, frame: Frame, *, resolution: str) -> NDArray[np.uint8]:
    side = frame.image_size // LOW_CELL if resolution == "low" else frame.image_size
    return np.zeros((num_objects, side, side), dtype=np.uint8)


def _draw_mask(crop: CroppedMask, frame: Frame, *, out: NDArray[np.uint8]) -> None:
    draw = mask_to_input if len(out) == frame.image_size else mask_to_low
    draw(crop.mask, frame, top=crop.top, left=crop.left, out=out)


def mask_to_low(
    mask: Mask, frame: Frame, *, top: int = 0, left: int = 0, out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """The share of each 4 x 4 px cell of the input frame that an object covers.

    Args:
        mask: uint8 or bool [h, w], 0 or 1: the original frame's mask, or a crop of it.
        frame: Of the image.
        top: Of the crop, px in the original frame.
        left: Of the crop, px in the original frame.
        out: Zeros to draw on; None: new ones.

    Returns:
        uint8 [S/4, S/4]: 0 nothing, 255 all. Padding is 0.
    """
    out = np.zeros((frame.image_size // LOW_CELL,) * 2, dtype=np.uint8) if out is None else out
    rows, columns, share = _coverage(mask, frame, cell=LOW_CELL, top=top, left=left)
    out[rows, columns] = np.rint(share * 255)
    return out


def mask_to_input(
    mask: Mask, frame: Frame, *, top: int = 0, left: int = 0, out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """The input frame's pixels of which an object covers half or more; see `mask_to_low`.

    Returns:
        uint8 [S, S] of 0 and 1.
    """
    out = np.zeros((frame.image_size,) * 2, dtype=np.uint8) if out is None else out
    rows, columns, share = _coverage(mask, frame, cell=1, top=top, left=left)
    out[rows, columns] = share >= 0.5 - 1e-9
    return out


def _coverage(
    mask: Mask, frame: Frame, *, cell: int, top: int, left: int
) -> tuple[slice, slice, NDArray[np.float64]]:
    # Rows and columns of the cells that the crop reaches, and the share of each that it covers.
    # This is what cv2.INTER_AREA and a mean over the cell come to, without the whole image: the
    # integral of a mask of constant pixels is exactly bilinear between the pixels' corners.
    height, width = mask.shape
    (shown_height, shown_width), (offset_y, offset_x) = frame.input_size, frame.offset
    if frame.flipped:
        mask, left = mask[:, ::-1], frame.original_size[1] - left - width
        offset_x = frame.resized_size[1] - shown_width - offset_x
    scale_x, scale_y = frame.scale_x / cell, frame.scale_y / cell
    rows, edges_y = _cell_edges(top, height, scale_y, offset_y / cell, shown_height / cell)
    columns, edges_x = _cell_edges(left, width, scale_x, offset_x / cell, shown_width / cell)
    if mask.size == 0 or rows.start >= rows.stop or columns.start >= columns.stop:
        return slice(0), slice(0), np.zeros((0, 0))
    integral = cv2.integral(np.ascontiguousarray(mask).view(np.uint8))
    sums = _between_rows(_between_rows(integral, edges_y).T, edges_x).T
    shares = np.diff(np.diff(sums, axis=0), axis=1) * (scale_x * scale_y)
    return rows, columns, np.clip(shares, 0, 1)


def _cell_edges(
    start: int, length: int, scale: float, offset: float, shown: float
) -> tuple[slice, NDArray[np.float64]]:
    # The cells (of 1/scale original pixels, counted from `offset` on, `shown` of them) that
    # start:start + length reaches, and their edges in pixels of the crop.
    first = int(np.floor(start * scale - offset + 1e-9))
    last = max(first + 1, int(np.ceil((start + length) * scale - offset - 1e-9)))
    cells = slice(max(first, 0), min(last, int(np.ceil(shown))))
    edges = (np.minimum(np.arange(cells.start, cells.stop + 1), shown) + offset) / scale - start
    return cells, np.clip(edges, 0, length)


def _between_rows(values: NDArray[np.number], at: NDArray[np.float64]) -> NDArray[np.float64]:
    low = np.minimum(at.astype(np.int64), len(values) - 2)
    part = (at - low)[:, None]
    return values[low] * (1 - part) + values[low + 1] * part


def polygons_to_low(polygons: Polygons, frame: Frame, *, out: NDArray[np.uint8]) -> None:
    """What `mask_to_low` gives for the masks of K objects, from their outlines at once.

    Args:
        polygons: In the original frame.
        frame: Of the image.
        out: uint8 [K, S/4, S/4] of zeros to draw on: 0 nothing, 255 all.
    """
    for block in _blocks(polygons, frame, cell=LOW_CELL):
        _place(block, out)[:] = np.rint(block.share * 255)


def polygons_to_input(polygons: Polygons, frame: Frame, *, out: NDArray[np.uint8]) -> None:
    """What `mask_to_input` gives for the masks of K objects; see `polygons_to_low`.

    Args:
        polygons: In the original frame.
        frame: Of the image.
        out: uint8 [K, S, S] of zeros to draw on, with ones.
    """
    for block in _blocks(polygons, frame, cell=1):
        _place(block, out)[:] = block.share >= 0.5 - 1e-9


def _place(block: CoveredBlock, out: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width = block.share.shape
    return out[block.object, block.top : block.top + height, block.left : block.left + width]


def _blocks(polygons: Polygons, frame: Frame, *, cell: int) -> Iterator[CoveredBlock]:
    points = polygons.points * scales(frame)[:2] - offsets(frame)[:2]
    height, width = frame.input_size
    if frame.flipped:
        points[:, 0] = width - points[:, 0]
    return rasterize_polygons(
        replace(polygons, points=points / cell), size=(height / cell, width / cell)
    )
