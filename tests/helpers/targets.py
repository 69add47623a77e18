"""Targets of single masks, for tests of targets and of frames."""

from dataclasses import replace
from typing import Any

import numpy as np

from samft.annotations.segmentation import CroppedMask, uncompressed_rle
from samft.data.targets import WINDOW_CELLS, TargetGrids, make_grids, rasterize_ground_truth
from samft.data.transforms import LOW_CELL, Frame

NO_WINDOW = np.array([0.0, 0, 1, 1])


def rle_of(mask: np.ndarray) -> dict[str, Any]:
    """A mask [H, W] as an uncompressed RLE."""
    return uncompressed_rle(CroppedMask(0, 0, mask), mask.shape)


def grids_of(windows: np.ndarray, frame: Frame, resolution: str) -> TargetGrids:
    """Grids of given windows, or over the frame: of pixels (`input`) or of `cells` of 4 px."""
    if resolution == "window":
        return TargetGrids(windows, WINDOW_CELLS, is_binary=False, min_cell_pixels=2.0)
    grids = make_grids(windows, frame, resolution="input")
    if resolution == "cells":
        grids = replace(grids, side=max(frame.size) // LOW_CELL, is_binary=False)
    return grids


def draw_mask(
    crop: CroppedMask, frame: Frame, resolution: str, *, window: np.ndarray = NO_WINDOW
) -> np.ndarray:
    """The target of a mask, uint8 [s, s], averaged from its pixels."""
    grids = grids_of(window[None], frame, resolution)
    rle = uncompressed_rle(crop, frame.original_size)
    _, targets, _ = rasterize_ground_truth([rle], frame, grids)
    return targets[0] if len(targets) else grids.empty_targets()[0]
