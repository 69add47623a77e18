"""Targets of the loss and ground truth, from polygons, RLE and masks."""

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from samft.coco.layout import find_split
from samft.coco.segmentation import decode_cropped
from samft.coco.subset import read_coco
from samft.data.targets import draw_targets, mask_to_input, mask_to_low, rasterize_ground_truth
from samft.data.transforms import Frame, make_frame

BOTH = pytest.mark.parametrize("resolution", ["low", "input"])
SIZE = (960, 1280)  # large beside an image size of 64: 20 original pixels for an input pixel


def _ring(seed: int, *, centre: tuple[float, float], reach: float) -> np.ndarray:
    generator = np.random.default_rng(seed)
    angle = np.sort(generator.uniform(0, 2 * np.pi, 15))
    far = reach * generator.uniform(0.5, 1, (15, 1))
    return (np.array(centre) + far * np.stack([np.cos(angle), np.sin(angle)], axis=1)).ravel()


def _averaged(item: Any, frame: Frame, resolution: str) -> np.ndarray:
    crop = decode_cropped(item, frame.original_size)
    draw = mask_to_low if resolution == "low" else mask_to_input
    return draw(crop, frame)


FRAMES = {
    "whole": {},
    "flipped": {"flipped": True},
    "squashed": {"resize_mode": "squash", "flipped": True},
    "cropped": {"zoom": 1.7, "crop_at": (0.4, 0.9)},
    "cropped, flipped": {"zoom": 1.7, "crop_at": (0.4, 0.3), "flipped": True},
    "small": {"zoom": 0.55, "flipped": True},
}


@BOTH
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
    kept, targets = draw_targets(objects, frame, resolution=resolution)
    assert kept.tolist() == [0, 1, 2, 3]
    expected = np.stack([_averaged(item, frame, resolution) for item in objects])
    assert targets.dtype == np.uint8 and targets.shape == expected.shape
    if resolution == "low":
        np.testing.assert_allclose(targets.astype(int), expected, atol=6)  # pixels of 1/6400 cell
    else:
        assert np.count_nonzero(targets != expected) < 0.01 * np.count_nonzero(expected)
    height, width = (-(-side * len(targets[0]) // 64) for side in frame.input_size)
    assert targets[:, height:].sum() == targets[:, :, width:].sum() == 0


@BOTH
def test_where_original_pixels_are_coarse_the_drawn_masks_are_averaged(resolution: str) -> None:
    frame = make_frame((60, 80), 128, resize_mode="pad", flipped=True)
    objects = [[_ring(k, centre=(30 + k, 30), reach=20)] for k in range(3)]
    _, targets = draw_targets(objects, frame, resolution=resolution)
    expected = [_averaged(item, frame, resolution) for item in objects]
    np.testing.assert_array_equal(targets, expected)


def _rle(top: int, left: int, height: int, width: int) -> dict[str, Any]:
    # A rectangle as an uncompressed RLE of the whole image.
    mask = np.zeros(SIZE, np.uint8)
    mask[top : top + height, left : left + width] = 1
    changes = np.flatnonzero(np.diff(mask.T.ravel())) + 1
    return {"size": list(SIZE), "counts": np.diff([0, *changes, mask.size])}


@BOTH
def test_rle_thin_outlines_and_nothing_at_all(resolution: str) -> None:
    frame = make_frame(SIZE, 64, resize_mode="pad")
    line = [np.array([100, 200.4, 140, 200.4, 140, 200.6, 100, 200.6])]
    outside = [np.array([2000.0, 2000, 2100, 2000, 2100, 2100])]
    square = [np.array([100.0, 100, 300, 100, 300, 300, 100, 300])]
    objects = [line, _rle(100, 100, 200, 200), outside, square]
    # A fifth of a pixel wide, but over the centres of 40 pixels, all of which pycocotools draws.
    assert decode_cropped(line, SIZE).mask.sum() == 40
    kept, targets = draw_targets(objects, frame, resolution=resolution)
    assert kept.tolist() == [0, 1, 3]
    np.testing.assert_array_equal(targets[0], _averaged(line, frame, resolution))
    np.testing.assert_array_equal(targets[1], targets[2])
    # 10 x 10 input pixels; cells are rounded to 1/255.
    whole = 100 if resolution == "input" else 100 / 16 * 255
    assert targets[1].sum() == pytest.approx(whole, abs=4 if resolution == "low" else 0)
    if resolution == "low":
        assert targets[0].any()


@BOTH
def test_truths_are_the_drawn_masks_to_the_pixel(resolution: str) -> None:
    frame = make_frame(SIZE, 64, resize_mode="pad")
    objects = [[_ring(0, centre=(300, 400), reach=250)], [np.array([2e3, 1, 3e3, 1, 3e3, 9])]]
    objects.append([_ring(1, centre=(900, 300), reach=9)])
    kept, targets, truths = rasterize_ground_truth(objects, frame, resolution=resolution)
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
    _, targets = draw_targets([[outline]], frame, resolution="low")
    x, y = outline.reshape(-1, 2).T * [[frame.scale_x], [frame.scale_y]]
    area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    rounding = 0.5 * np.count_nonzero(targets) / 255 * 16
    assert targets.sum(dtype=float) / 255 * 16 == pytest.approx(area, abs=rounding + 1e-6)


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
        for resolution in ("low", "input"):
            kept, targets = draw_targets(objects, frame, resolution=resolution)
            assert len(kept) == len(objects)
            half = 128 if resolution == "low" else 1
            for item, target in zip(objects, targets, strict=True):
                truth, drawn = _averaged(item, frame, resolution) >= half, target >= half
                if truth.sum() >= 32:
                    ious.append((truth & drawn).sum() / (truth | drawn).sum())
    assert len(ious) > 10 and np.mean(ious) >= 0.985
