"""Targets of the loss and ground truth, from polygons, RLE and masks."""

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from helpers.targets import draw_mask, grids_of, rle_of
from samft.annotations.segmentation import decode_cropped
from samft.coco.layout import find_split
from samft.coco.subset import read_coco
from samft.data.targets import (
    MIN_WINDOW,
    WINDOW_CELLS,
    draw_targets,
    make_windows,
    rasterize_ground_truth,
)
from samft.data.transforms import Frame, boxes_to_input, make_frame, visible_box

EACH = pytest.mark.parametrize("resolution", ["cells", "input", "window"])
SIZE = (960, 1280)  # large beside an image size of 64: 20 original pixels for an input pixel


def _ring(seed: int, *, centre: tuple[float, float], reach: float) -> np.ndarray:
    generator = np.random.default_rng(seed)
    angle = np.sort(generator.uniform(0, 2 * np.pi, 15))
    far = reach * generator.uniform(0.5, 1, (15, 1))
    return (np.array(centre) + far * np.stack([np.cos(angle), np.sin(angle)], axis=1)).ravel()


def _windows(objects: list[Any], frame: Frame) -> np.ndarray:
    # Around what the frame's image has of each object.
    height, width = frame.original_size
    extents = []
    for item in objects:
        if isinstance(item, dict):
            extents.append(decode_cropped(item, frame.original_size).extent)
        else:
            points = np.concatenate(item).reshape(-1, 2)
            extents.append((*points.min(axis=0), *points.max(axis=0)))
    return make_windows(boxes_to_input(np.clip(extents, 0, [width, height] * 2), frame))


def _draw_objects(
    objects: list[Any], frame: Frame, resolution: str
) -> tuple[np.ndarray, np.ndarray]:
    grids = grids_of(_windows(objects, frame), frame, resolution)
    return draw_targets(objects, frame, grids)


def _averaged(item: Any, frame: Frame, resolution: str) -> np.ndarray:
    crop = decode_cropped(item, frame.original_size)
    return draw_mask(crop, frame, resolution, window=_windows([item], frame)[0])


FRAMES = {
    "whole": {},
    "flipped": {"flipped": True},
    "squashed": {"resize_mode": "squash", "flipped": True},
    "cropped": {"zoom": 1.7, "crop_at": (0.4, 0.9)},
    "cropped, flipped": {"zoom": 1.7, "crop_at": (0.4, 0.3), "flipped": True},
    "small": {"zoom": 0.55, "flipped": True},
}


@EACH
@pytest.mark.parametrize("options", FRAMES.values(), ids=FRAMES)
def test_outlines_give_what_averaging_the_drawn_masks_gives(
    resolution: str, options: dict[str, Any]
) -> None:
    frame = make_frame(SIZE, 64, **{"resize_mode": "pad", **options})
    objects = [
        [_ring(0, centre=(300, 400), reach=250)],
        [_ring(1, centre=(900, 300), reach=200), _ring(2, centre=(1000, 700), reach=150)],
        [_ring(3, centre=(1250, 900), reach=300)],  # leaves the image
        [_ring(4, centre=(640, 480), reach=700)],
    ]
    kept, targets = _draw_objects(objects, frame, resolution)
    assert kept.tolist() == [0, 1, 2, 3]
    expected = np.stack([_averaged(item, frame, resolution) for item in objects])
    assert targets.dtype == np.uint8 and targets.shape == expected.shape
    if resolution == "cells":
        np.testing.assert_allclose(targets.astype(int), expected, atol=6)  # pixels of 1/6400 cell
    elif resolution == "window":
        # Cells of 6 or more pixels at the widest objects, less at the others.
        assert np.abs(targets.astype(int) - expected).max() <= 255 / 6 + 1
        assert np.abs(targets.astype(float) - expected).mean() < 1
    else:
        assert np.count_nonzero(targets != expected) < 0.01 * np.count_nonzero(expected)
    if resolution != "window":
        height, width = (-(-side * len(targets[0]) // 64) for side in frame.input_size)
        assert targets[:, height:].sum() == targets[:, :, width:].sum() == 0


@EACH
def test_where_original_pixels_are_coarse_the_drawn_masks_are_averaged(resolution: str) -> None:
    frame = make_frame((60, 80), 128, resize_mode="pad", flipped=True)
    objects = [[_ring(k, centre=(30 + k, 30), reach=20)] for k in range(3)]
    _, targets = _draw_objects(objects, frame, resolution)
    expected = [_averaged(item, frame, resolution) for item in objects]
    np.testing.assert_array_equal(targets, expected)


def _rle(top: int, left: int, height: int, width: int) -> dict[str, Any]:
    # A rectangle.
    mask = np.zeros(SIZE, np.uint8)
    mask[top : top + height, left : left + width] = 1
    return rle_of(mask)


@EACH
def test_rle_thin_outlines_and_nothing_at_all(resolution: str) -> None:
    frame = make_frame(SIZE, 64, resize_mode="pad")
    line = [np.array([100, 200.4, 140, 200.4, 140, 200.6, 100, 200.6])]
    outside = [np.array([2000.0, 2000, 2100, 2000, 2100, 2100])]
    square = [np.array([100.0, 100, 300, 100, 300, 300, 100, 300])]
    objects = [line, _rle(100, 100, 200, 200), outside, square]
    # A fifth of a pixel wide, but over the centres of 40 pixels, all of which pycocotools draws.
    assert decode_cropped(line, SIZE).mask.sum() == 40
    kept, targets = _draw_objects(objects, frame, resolution)
    assert kept.tolist() == [0, 1, 3]
    np.testing.assert_array_equal(targets[0], _averaged(line, frame, resolution))
    np.testing.assert_array_equal(targets[1], targets[2])
    # 10 x 10 input pixels, or of a window of 15 x 15; cells are rounded to 1/255.
    whole = 255 * {"input": 100, "cells": 100 / 16, "window": (64 / 1.5) ** 2}[resolution]
    most = {"input": 0, "cells": 4, "window": 0.5 * 4 * 44}[resolution]
    assert targets[1].sum() == pytest.approx(whole, abs=most)
    assert targets[0].any() or resolution == "input"


@EACH
def test_truths_are_the_drawn_masks_to_the_pixel(resolution: str) -> None:
    frame = make_frame(SIZE, 64, resize_mode="pad")
    objects = [[_ring(0, centre=(300, 400), reach=250)], [np.array([2e3, 1, 3e3, 1, 3e3, 9])]]
    objects.append([_ring(1, centre=(900, 300), reach=9)])
    grids = grids_of(_windows(objects, frame), frame, resolution)
    kept, targets, truths = rasterize_ground_truth(objects, frame, grids)
    assert kept.tolist() == [0, 2] and len(targets) == len(truths) == 2
    for k, target, truth in zip(kept, targets, truths, strict=True):
        drawn = decode_cropped(objects[k], SIZE)
        assert (truth.top, truth.left, truth.mask.dtype) == (drawn.top, drawn.left, bool)
        np.testing.assert_array_equal(truth.mask, drawn.mask)
        np.testing.assert_array_equal(target, _averaged(objects[k], frame, resolution))


@given(seed=st.integers(0, 10**6), zoom=st.floats(0.5, 2), flipped=st.booleans())
def test_areas_of_outlines_survive_any_frame(seed: int, zoom: float, flipped: bool) -> None:
    frame = make_frame(SIZE, 64, resize_mode="pad", zoom=zoom, crop_at=(0, 0), flipped=flipped)
    outline = _ring(seed, centre=(150, 150), reach=140)
    _, targets = _draw_objects([[outline]], frame, "cells")
    x, y = outline.reshape(-1, 2).T * [[frame.scale_x], [frame.scale_y]]
    area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    rounding = 0.5 * np.count_nonzero(targets) / 255 * 16
    assert targets.sum(dtype=float) / 255 * 16 == pytest.approx(area, abs=rounding + 1e-6)


@given(
    seed=st.integers(0, 10**6),
    zoom=st.floats(0.5, 2),
    flipped=st.booleans(),
    mode=st.sampled_from(["pad", "squash"]),
)
def test_windows_hold_the_area_that_an_outline_has_in_the_image(
    seed: int, zoom: float, flipped: bool, mode: str
) -> None:
    frame = make_frame(SIZE, 64, resize_mode=mode, zoom=zoom, crop_at=(0.3, 0.6), flipped=flipped)
    centre = np.random.default_rng(seed).uniform((0, 0), SIZE[::-1])
    outline = _ring(seed, centre=tuple(centre), reach=400)
    grids = grids_of(_windows([[outline]], frame), frame, "window")
    for parts in ([outline], rle_of(_pixels(outline))):
        kept, targets = draw_targets([parts], frame, grids)
        # Pixels of the original, in which the frame's edge is rounded.
        x0, y0, x1, y1 = visible_box(frame)
        seen = _pixels(outline)[round(y0) : round(y1), round(x0) : round(x1)].sum()
        area = seen * frame.scale_x * frame.scale_y
        total = targets.sum(dtype=float) / 255 * grids.cells.prod()
        rounding = 0.5 * ((x1 - x0) + (y1 - y0)) * frame.scale_x * frame.scale_y
        most = 0.1 + 0.01 * 2 * np.pi * 400 * frame.scale_x + rounding
        assert kept.tolist() == [0] and total == pytest.approx(area, abs=most)


def _pixels(outline: np.ndarray) -> np.ndarray:
    crop = decode_cropped([outline], SIZE)
    x0, y0, x1, y1 = crop.extent
    mask = np.zeros(SIZE, dtype=bool)
    mask[y0:y1, x0:x1] = crop.mask
    return mask


def test_a_window_has_its_boxs_centre_and_half_as_much_again_of_its_sides() -> None:
    boxes = np.array([[10, 20, 30, 60], [-4, 5, 2, 5.5], [7, 7, 7, 7]])
    expected = [[5, 10, 35, 70], [-5.5, 3.25, 3.5, 7.25], [5, 5, 9, 9]]
    np.testing.assert_array_equal(make_windows(boxes), expected)
    assert make_windows(np.zeros((0, 4))).shape == (0, 4) and MIN_WINDOW == 4


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("as_rle", [False, True])
def test_a_rectangle_in_a_window_covers_exact_shares(as_rle: bool, flipped: bool) -> None:
    # 16 x 32 input px from (8, 16) on, of 4 px in the original each; a window of 24 x 48 px.
    frame = make_frame((256, 256), 64, resize_mode="pad", flipped=flipped)
    box = np.array([[32.0, 64, 96, 192]])
    mask = np.zeros((256, 256), dtype=bool)
    mask[64:192, 32:96] = True
    item: Any = rle_of(mask) if as_rle else [np.array([32.0, 64, 96, 64, 96, 192, 32, 192])]
    windows = make_windows(boxes_to_input(box, frame))
    np.testing.assert_array_equal(windows, [[36, 8, 60, 56]] if flipped else [[4, 8, 28, 56]])
    _, targets = draw_targets([item], frame, grids_of(windows, frame, "window"))
    # A margin of a sixth on each side is ten cells and two thirds.
    share = np.array([0] * 10 + [1 / 3] + [1] * 42 + [1 / 3] + [0] * 10)
    assert targets.shape == (1, WINDOW_CELLS, WINDOW_CELLS)
    np.testing.assert_array_equal(targets[0], np.rint(255 * np.outer(share, share)))


@pytest.mark.parametrize("options", FRAMES.values(), ids=FRAMES)
def test_windows_agree_with_targets_of_the_whole_input(options: dict[str, Any]) -> None:
    # In windows whose cells are half an input pixel, four cells are a pixel.
    frame = make_frame(SIZE, 64, **{"resize_mode": "pad", **options})
    objects = [[_ring(0, centre=(300, 400), reach=250)], [_ring(3, centre=(1250, 900), reach=300)]]
    height, width = frame.input_size
    corners = np.array([[-4.0, -7], [width - 20.0, height - 9]])
    windows = np.concatenate([corners, corners + WINDOW_CELLS / 2], axis=1)
    _, windowed = draw_targets(objects, frame, grids_of(windows, frame, "window"))
    cells, whole = (
        _draw_objects(objects, frame, resolution)[1] for resolution in ("cells", "input")
    )
    assert cells.any()
    for (x, y), target, drawn in zip(corners.astype(int), windowed, whole, strict=True):
        pixels = target.reshape(32, 2, 32, 2).mean(axis=(1, 3)) / 255
        padded = np.pad(drawn, 64)[y + 64 : y + 96, x + 64 : x + 96]
        clear = np.abs(pixels - 0.5) > 0.02
        np.testing.assert_array_equal(255 * (pixels > 0.5)[clear], padded[clear])


@EACH
def test_objects_drawn_together_are_as_drawn_alone(resolution: str) -> None:
    # Coarse and fine cells, outlines, RLEs, parts, and what leaves the image, in one image.
    frame = make_frame(SIZE, 256, resize_mode="pad", flipped=True)
    objects: list[Any] = [[_ring(k, centre=(90 * k, 60 * k), reach=20 * k)] for k in range(1, 15)]
    objects[4:4] = [_rle(300, 200, 50, 9), objects[3] + objects[9], _rle(0, 0, *SIZE)]
    kept, targets = _draw_objects(objects, frame, resolution)
    assert kept.tolist() == list(range(17))
    alone = [_draw_objects([item], frame, resolution)[1][0] for item in objects]
    np.testing.assert_array_equal(targets, alone)


def test_what_is_thinner_than_a_cell_stays_in_its_window() -> None:
    size = (4000, 6000)
    frame = make_frame(size, 256, resize_mode="pad")
    pixel = np.array([5000.0, 9, 5001, 9, 5001, 10, 5000, 10])
    diagonal = np.array([10.0, 10, 11, 10, 3900, 3900, 3899, 3900])
    objects = [[pixel], [diagonal], [pixel, diagonal]]
    kept, targets = _draw_objects(objects, frame, "window")
    assert kept.tolist() == [0, 1, 2] and targets.any(axis=(1, 2)).all()


def test_nothing_to_draw() -> None:
    frame = make_frame(SIZE, 64, resize_mode="pad")
    grids = grids_of(make_windows(np.zeros((0, 4))), frame, "window")
    kept, targets = draw_targets([], frame, grids)
    assert len(kept) == 0 and targets.shape == (0, 64, 64)
    assert rasterize_ground_truth([], frame, grids)[1].shape == (0, 64, 64)
    # A window that is all beyond the image.
    square = [np.array([100.0, 100, 300, 100, 300, 300, 100, 300])]
    beside = grids_of(np.array([[70.0, 5, 80, 15]]), frame, "window")
    assert draw_targets([square], frame, beside)[1].sum() == 0


@pytest.mark.parametrize("name", ["hbn_flakes", "mushrooms", "coco_open104"])
@pytest.mark.parametrize("image_size", [256, 1024])
def test_real_targets_agree_with_the_masks_that_pycocotools_draws(
    data_root: Any, name: str, image_size: int
) -> None:
    subset = read_coco(*find_split(data_root / name, "train"))
    ious = []
    for i in range(0, subset.num_images, subset.num_images // 6):
        frame = make_frame(subset.size(i), image_size, resize_mode="pad")
        objects = [subset.index.segmentations[k] for k in subset.objects_of(i).tolist()[:40]]
        for resolution in ("cells", "input"):
            kept, targets = _draw_objects(objects, frame, resolution)
            assert len(kept) == len(objects)
            half = 128
            for item, target in zip(objects, targets, strict=True):
                truth, drawn = _averaged(item, frame, resolution) >= half, target >= half
                if truth.sum() >= 32:
                    ious.append((truth & drawn).sum() / (truth | drawn).sum())
    assert len(ious) > 10 and np.mean(ious) >= 0.985
