"""Draws the targets of the loss, and validation's ground truth, from COCO segmentations.

Each object has a window in the input frame, divided into a grid of cells. Its target is the share
of each cell that the object covers, drawn from polygons or RLE. The window is either around the
object (`window`: the same number of cells whatever its size) or the whole frame (`input`: a cell is
a pixel, and counts as covered or not). Imports no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samft.annotations.segmentation import CroppedMask, decode_cropped
from samft.data.rasterize import (
    MaskRuns,
    decode_runs,
    polygon_edges,
    rasterize,
    rasterize_runs,
    round_shares,
)
from samft.data.transforms import Frame

WINDOW_SCALE = 1.5  # sides of a window, in those of the object's box
WINDOW_CELLS = 64  # along each side of a window
MIN_WINDOW = 4.0  # input px, the shortest side of a window: a cell of the decoder
# Polygons are drawn straight into a grid whose cells are at least so many original pixels wide:
# there the targets agree with pycocotools' masks to an IoU of .99 (three datasets; of grids over
# the image, objects of 32 cells or more). In finer cells the pixel steps of those masks, which are
# the ground truth of validation, would show: the IoU is .95 to .98, in windows .90 to .99. In a
# window an object has more cells, so fewer of them are at its rim.
_MIN_CELL_PIXELS = {"window": 2.0, "input": 6.0}


@dataclass(frozen=True)
class TargetGrids:
    """K windows, one for each object, each divided into a grid of cells."""

    windows: NDArray[np.float64]  # [K, 4] x0 y0 x1 y1, input px; may exceed the image
    side: int  # cells along each side of a window
    is_binary: bool  # whether a cell counts as covered or not, instead of by its share
    min_cell_pixels: float  # original px, from which on outlines are drawn

    @property
    def cells(self) -> NDArray[np.float64]:
        """Width and height of a cell of each window, input px: [K, 2]."""
        return (self.windows[:, 2:] - self.windows[:, :2]) / self.side

    def empty_targets(self) -> NDArray[np.uint8]:
        """Targets of objects that cover nothing: uint8 [K, side, side]."""
        return np.zeros((len(self.windows), self.side, self.side), dtype=np.uint8)


def make_windows(boxes: NDArray[np.floating]) -> NDArray[np.float64]:
    """Windows around boxes [K, 4], both x0 y0 x1 y1 in the input frame, which they may exceed."""
    corners = np.asarray(boxes, dtype=np.float64).reshape(-1, 2, 2)
    half = np.maximum((corners[:, 1] - corners[:, 0]) * WINDOW_SCALE, MIN_WINDOW) / 2
    centre = corners.mean(axis=1)
    return np.concatenate([centre - half, centre + half], axis=1)


def make_grids(boxes: NDArray[np.floating], frame: Frame, *, resolution: str) -> TargetGrids:
    """The windows of K objects, and how many cells they have.

    Args:
        boxes: [K, 4], x0 y0 x1 y1 in the input frame, which they may exceed.
        frame: Of the image.
        resolution: `window` (around each box) or `input` (cells of 1 px of the frame; of one that
            is not square, of the square around it).
    """
    limit = _MIN_CELL_PIXELS[resolution]
    if resolution == "window":
        windows, side = make_windows(boxes), WINDOW_CELLS
    else:
        side = max(frame.size)
        windows = np.tile([0.0, 0.0, side, side], (len(boxes), 1))
    return TargetGrids(windows, side, is_binary=resolution == "input", min_cell_pixels=limit)


def draw_targets(
    segmentations: Sequence[Any], frame: Frame, grids: TargetGrids
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Draws training targets: polygons where possible straight into their grids.

    Args:
        segmentations: Checked, of K objects of one image.
        frame: Of the image.
        grids: Of the K objects.

    Returns:
        Which of the K objects have a pixel in the original image, [M], and their targets, uint8
        [M, side, side]: the share of each cell that the object covers, from 0, nothing, to 255,
        all. With binary grids: 255 where it covers half a cell or more, else 0. Cells outside of
        the image area are 0.
    """
    targets = grids.empty_targets()
    is_coarse = (grids.cells / frame.scale_xyxy[:2]).min(axis=1) >= grids.min_cell_pixels
    outlines = [
        item if coarse and isinstance(item, list) else []
        for item, coarse in zip(segmentations, is_coarse.tolist(), strict=True)
    ]
    kept = _draw_polygons(outlines, frame, grids, out=targets)
    # RLEs have no outline. And outlines that are too thin to cover anything (lines, say) still
    # have pixels in pycocotools' masks, and are objects in validation.
    undrawn = np.flatnonzero(~kept)
    runs = decode_runs([segmentations[k] for k in undrawn.tolist()], frame.file_size)
    _draw_runs(runs, frame, grids, owner=undrawn, out=targets)
    kept[undrawn[runs.mask]] = True
    return np.flatnonzero(kept), targets if kept.all() else targets[kept]


def rasterize_ground_truth(
    segmentations: Sequence[Any], frame: Frame, grids: TargetGrids
) -> tuple[NDArray[np.int64], NDArray[np.uint8], list[CroppedMask]]:
    """Draws masks at the original resolution, exactly as pycocotools does, and targets from them.

    Args:
        segmentations: Checked, of K objects of one image.
        frame: Of the image.
        grids: Of the K objects.

    Returns:
        As `draw_targets`, with targets that are averages of the masks; and the M masks.
    """
    masks = [decode_cropped(item, frame.file_size) for item in segmentations]
    kept = np.flatnonzero(np.array([mask.mask.size > 0 for mask in masks], dtype=bool))
    targets = grids.empty_targets()
    runs = decode_runs(segmentations, frame.file_size)
    _draw_runs(runs, frame, grids, owner=np.arange(len(masks)), out=targets)
    return kept, targets[kept], [masks[k] for k in kept.tolist()]


def _draw_polygons(
    outlines: Sequence[Sequence[NDArray[np.floating]]],
    frame: Frame,
    grids: TargetGrids,
    *,
    out: NDArray[np.uint8],
) -> NDArray[np.bool_]:
    # Returns which of the K objects cover anything.
    scale, shift, areas = _place_grids(frame, grids)
    edges = polygon_edges(outlines).scale_and_shift(scale, shift)
    covers = np.zeros(len(out), dtype=bool)
    for block in rasterize(edges, areas):
        (height, width), k = block.share.shape, block.object
        drawn = out[k, block.top : block.top + height, block.left : block.left + width]
        drawn[:] = round_shares(block.share, is_binary=grids.is_binary)
        covers[k] = drawn.any()
    return covers


def _draw_runs(
    runs: MaskRuns,
    frame: Frame,
    grids: TargetGrids,
    *,
    owner: NDArray[np.int64],
    out: NDArray[np.uint8],
) -> None:
    scale, shift, areas = _place_grids(frame, grids)
    rasterize_runs(
        runs, owner, scale=scale, shift=shift, areas=areas, is_binary=grids.is_binary, out=out
    )


def _place_grids(
    frame: Frame, grids: TargetGrids
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    # From original pixels to cells: cells = pixels * scale [K, 2] + shift [K, 2]. And the part of
    # the grid that is image, x0 y0 x1 y1 in cells: [K, 4].
    size = np.array(frame.input_size[::-1], dtype=np.float64)
    scale = frame.scale_xyxy[:2]
    shift = -frame.offset_xyxy[:2] - frame.origin_xyxy[:2] * scale
    if frame.flipped:
        scale[0], shift[0] = -scale[0], size[0] - shift[0]
    origins, cells = grids.windows[:, :2], grids.cells
    image = np.concatenate([-origins, size - origins], axis=1)
    areas = np.clip(image / np.tile(cells, 2), 0, grids.side)
    return scale / cells, (shift - origins) / cells, areas
