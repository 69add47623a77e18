"""Augmentation: random frames, objects that a crop cuts, and colours."""

from typing import Any

import numpy as np
import pytest
import torch

from samft.annotations.segmentation import CroppedMask
from samft.data.augment import (
    ColourJitter,
    apply_colour_jitter,
    boxes_in_frame,
    draw_colour_jitter,
    draw_frame,
    filter_cropped_objects,
)
from samft.data.transforms import Frame, make_frame

SIZE = (300, 400)


def _frames(augment: str, count: int, **options: Any) -> list[Frame]:
    generator = np.random.default_rng(0)
    options = {"resize_mode": "pad", **options}
    return [
        draw_frame(SIZE, 128, augment=augment, generator=generator, **options) for _ in range(count)
    ]


def test_none_and_flip_move_nothing_else() -> None:
    plain = make_frame(SIZE, 128, resize_mode="pad")
    mirrored = make_frame(SIZE, 128, resize_mode="pad", flipped=True)
    assert set(_frames("none", 20)) == {plain}
    frames = _frames("flip", 400)
    assert set(frames) == {plain, mirrored} and 150 < frames.count(plain) < 250


@pytest.mark.parametrize("mode", ["pad", "squash"])
def test_scale_is_log_uniform_and_crops_anywhere(mode: str) -> None:
    frames = _frames("scale", 4000, resize_mode=mode)
    zooms = np.array([frame.resized_size[1] / 128 for frame in frames])
    assert 0.495 < zooms.min() < 0.51 and 1.98 < zooms.max() < 2.01
    # As often shrunk as enlarged; and quartiles a square root of 2 apart.
    quartiles = np.quantile(zooms, [0.25, 0.5, 0.75])
    np.testing.assert_allclose(quartiles, [0.5**0.5, 1, 2**0.5], rtol=0.05)
    ratio = 1.0 if mode == "squash" else 0.75
    for frame in frames:
        height, width = frame.resized_size
        assert abs(height - ratio * width) < 1.01
        (top, left), room = frame.offset, (max(0, height - 128), max(0, width - 128))
        assert 0 <= top <= room[0] and 0 <= left <= room[1]
        assert frame.is_cropped == (max(room) > 0)
    wide = [f.offset[1] / (f.resized_size[1] - 128) for f in frames if f.resized_size[1] > 200]
    assert np.abs(np.histogram(wide, 4, (0, 1))[0] / len(wide) - 0.25).max() < 0.05
    assert 1800 < sum(frame.flipped for frame in frames) < 2200


# The right upper quarter of 100 x 100 original pixels, at the scale of the input.
QUARTER = make_frame((100, 100), 50, resize_mode="pad", zoom=2.0, crop_at=(0.0, 0.99))
FLIPPED = make_frame((100, 100), 50, resize_mode="pad", zoom=2.0, crop_at=(0.0, 0.99), flipped=True)
BOXES = np.array(
    [
        [60.0, 10, 80, 30],  # inside
        [40, 10, 60, 30],  # half
        [0, 0, 54, 20],  # 4 of 54 columns: gone
        [10, 60, 30, 80],  # outside
        [90, 40, 104, 48],  # leaves the image, but not the crop
        [45, 45, 55, 55],  # a quarter of its box, but nothing of its mask
    ]
)


def _mask(k: int) -> CroppedMask:
    left, top, right, bottom = np.clip(BOXES[k], 0, 100).astype(int)
    mask = np.ones((bottom - top, right - left), bool)
    if k == 5:
        mask[:5, 5:] = False
    return CroppedMask(int(top), int(left), mask)


@pytest.mark.parametrize("frame", [QUARTER, FLIPPED])
def test_objects_that_leave_are_dropped_and_boxes_of_cut_ones_follow_their_masks(
    frame: Frame,
) -> None:
    assert boxes_in_frame(BOXES, frame).tolist() == [True, True, True, False, True, True]
    decoded = []
    kept, boxes = filter_cropped_objects(
        BOXES, frame, decode_mask=lambda k: decoded.append(k) or _mask(k)
    )
    assert kept.tolist() == [0, 1, 4] and decoded == [1, 2, 3, 5]
    np.testing.assert_array_equal(boxes, [BOXES[0], [50, 10, 60, 30], BOXES[4]])


def test_a_tenth_of_an_object_is_enough() -> None:
    for share, expected in ((9, []), (10, [0]), (11, [0])):
        box = np.array([[50.0 - (100 - share), 0, 50 + share, 1]])
        crop = CroppedMask(0, 50 - (100 - share), np.ones((1, 100), bool))
        kept, _ = filter_cropped_objects(box, QUARTER, decode_mask=lambda k, crop=crop: crop)
        assert kept.tolist() == expected


def test_the_visible_part_of_a_mask_bounds_the_box() -> None:
    mask = np.zeros((30, 40), bool)
    mask[5:8, 0:25] = True  # columns 40..65 of the image
    mask[20:30, 0:5] = True  # not in the crop
    kept, boxes = filter_cropped_objects(
        np.array([[40.0, 10, 80, 40]]), QUARTER, decode_mask=lambda k: CroppedMask(10, 40, mask)
    )
    assert kept.tolist() == [0] and boxes.tolist() == [[50, 15, 65, 18]]


def test_no_mask_is_decoded_where_the_whole_image_is_visible() -> None:
    frame = make_frame((100, 100), 50, resize_mode="pad", zoom=0.7)
    kept, boxes = filter_cropped_objects(BOXES, frame, decode_mask=lambda k: pytest.fail("drawn"))
    assert kept.tolist() == list(range(6))
    np.testing.assert_array_equal(boxes, BOXES)


def test_colours_change_moderately_and_not_always_in_hue() -> None:
    generator = np.random.default_rng(0)
    colours = [draw_colour_jitter(generator) for _ in range(2000)]
    for name in ("brightness", "contrast", "saturation"):
        values = np.array([getattr(colour, name) for colour in colours])
        assert 0.8 <= values.min() < 0.81 and 1.19 < values.max() <= 1.2
        assert abs(values.mean() - 1) < 0.01
    hues = np.array([colour.hue for colour in colours])
    assert 0.4 < np.mean(hues == 0) < 0.6 and 0.029 < np.abs(hues).max() <= 0.03


def test_colour_changes_have_closed_forms() -> None:
    image = np.zeros((4, 6, 3), np.uint8)
    image[:2], image[2:] = (100, 50, 20), (40, 40, 40)
    same = ColourJitter(1.0, 1.0, 1.0, 0.0)
    np.testing.assert_array_equal(apply_colour_jitter(image, same), image)
    brighter = apply_colour_jitter(image, ColourJitter(1.2, 1.0, 1.0, 0.0))
    assert brighter[0, 0].tolist() == [120, 60, 24] and brighter[3, 3].tolist() == [48] * 3
    grey = apply_colour_jitter(image, ColourJitter(1.0, 1.0, 0.0, 0.0))
    luma = 0.2989 * 100 + 0.587 * 50 + 0.114 * 20
    assert np.abs(grey[0, 0] - luma).max() <= 1 and np.ptp(grey[0, 0]) == 0
    turned = apply_colour_jitter(image, ColourJitter(1.0, 1.0, 1.0, 1 / 3))
    np.testing.assert_allclose(turned[0, 0].astype(int), [20, 100, 50], atol=1)
    view = np.zeros((8, 8, 3), np.uint8)
    view[:4, :6] = image
    np.testing.assert_array_equal(apply_colour_jitter(view[:4, :6], same), image)


def test_nothing_global_is_random() -> None:
    torch_state, numpy_state = torch.get_rng_state(), str(np.random.get_state())
    image = np.full((8, 8, 3), 77, np.uint8)
    for seed in (0, 0, 1):
        generator = np.random.default_rng(seed)
        draw_frame(SIZE, 64, resize_mode="pad", augment="scale", generator=generator)
        apply_colour_jitter(image, draw_colour_jitter(generator))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert str(np.random.get_state()) == numpy_state
