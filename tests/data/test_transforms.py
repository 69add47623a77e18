"""Frames: where images, boxes and masks land in the input, against the stock transforms."""

from typing import Any

import cv2
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from PIL import Image
from segment_anything.utils.transforms import ResizeLongestSide
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from helpers.targets import draw_mask
from samft.annotations.segmentation import CroppedMask
from samft.data.transforms import (
    Frame,
    boxes_to_input,
    boxes_to_original,
    jitter_boxes,
    make_frame,
    resize_image,
    visible_box,
)

SIDES = st.integers(1, 3000)


def crop_of(mask: np.ndarray, *, top: int = 0, left: int = 0) -> CroppedMask:
    return CroppedMask(top, left, mask.astype(bool))


def _noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@given(height=SIDES, width=SIDES, image_size=st.sampled_from([128, 256, 512, 768, 1024]))
def test_pad_frame_is_the_stock_one_to_the_pixel(height: int, width: int, image_size: int) -> None:
    frame = make_frame((height, width), image_size, resize_mode="pad")
    stock = ResizeLongestSide.get_preprocess_shape(height, width, image_size)
    assert frame.input_size == tuple(max(1, side) for side in stock)
    assert max(frame.input_size) == image_size


@pytest.mark.parametrize("size", [(48, 64), (301, 200), (7, 500), (256, 256), (600, 601)])
def test_image_and_boxes_are_the_stock_ones(size: tuple[int, int]) -> None:
    image, stock = _noise(*size), ResizeLongestSide(256)
    frame = make_frame(size, 256, resize_mode="pad")
    resized, (height, width) = resize_image(image, frame), frame.input_size
    np.testing.assert_array_equal(resized[:height, :width], stock.apply_image(image))
    assert resized.shape == (256, 256, 3)
    assert resized[height:].sum() == 0 and resized[:, width:].sum() == 0
    boxes = np.random.default_rng(1).uniform(0, 300, (9, 4))
    np.testing.assert_array_equal(boxes_to_input(boxes, frame), stock.apply_boxes(boxes, size))


def test_squash_fills_the_frame() -> None:
    frame = make_frame((50, 100), 64, resize_mode="squash")
    assert frame.input_size == (64, 64) and (frame.scale_x, frame.scale_y) == (0.64, 1.28)
    assert resize_image(np.full((50, 100, 3), 9, np.uint8), frame).min() == 9


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("mode", ["pad", "squash"])
@pytest.mark.parametrize("size", [(120, 160), (160, 120)])
def test_a_box_drawn_on_the_original_lands_where_the_image_has_it(
    size: tuple[int, int], mode: str, flipped: bool
) -> None:
    image = np.zeros((*size, 3), np.uint8)
    image[20:80, 30:70] = 255
    frame = make_frame(size, 512, resize_mode=mode, flipped=flipped)
    bright = resize_image(image, frame)[..., 0] > 127
    ys, xs = np.flatnonzero(bright.any(axis=1)), np.flatnonzero(bright.any(axis=0))
    tight_box = [xs[0], ys[0], xs[-1] + 1, ys[-1] + 1]
    box = boxes_to_input(np.array([[30, 20, 70, 80]]), frame)[0]
    np.testing.assert_allclose(box, tight_box, atol=0.51)
    low = draw_mask(crop_of(image[..., 0] // 255), frame, "cells")
    # Bilinear interpolation rounds the corners off.
    at_input = draw_mask(crop_of(image[..., 0] // 255), frame, "input")
    assert np.count_nonzero(at_input != 255 * bright) <= 4
    mean = bright.reshape(128, 4, 128, 4).mean(axis=(1, 3))
    np.testing.assert_allclose(low / 255, mean, atol=0.26)


@given(height=SIDES, width=SIDES, flipped=st.booleans(), mode=st.sampled_from(["pad", "squash"]))
def test_boxes_map_back_to_the_original_frame(
    height: int, width: int, flipped: bool, mode: str
) -> None:
    frame = make_frame((height, width), 512, resize_mode=mode, flipped=flipped)
    boxes = np.array([[0, 0, width, height], [0.25 * width, 0, 0.5 * width, 0.125 * height]])
    there = boxes_to_input(boxes, frame)
    np.testing.assert_allclose(boxes_to_original(there, frame), boxes, atol=1e-9)
    np.testing.assert_allclose(there[0], [0, 0, *frame.input_size[::-1]], atol=1e-9)
    assert (there[:, 2:] > there[:, :2]).all()


def test_a_flip_stays_left_of_the_padding() -> None:
    image = _noise(100, 50)
    plain, mirrored = (
        make_frame((100, 50), 128, resize_mode="pad", flipped=f) for f in (False, True)
    )
    width = plain.input_size[1]
    expected = resize_image(image, plain)[:, :width][:, ::-1]
    np.testing.assert_array_equal(resize_image(image, mirrored)[:, :width], expected)
    assert resize_image(image, mirrored)[:, width:].sum() == 0
    box = boxes_to_input(np.array([[5, 10, 20, 30]]), mirrored)[0]
    np.testing.assert_allclose(box, [30 * 1.28, 12.8, 45 * 1.28, 38.4])


def _reference(mask: np.ndarray, frame: Frame) -> np.ndarray:
    # cv2.INTER_AREA to the input frame, zero-padded: the share of each input pixel.
    height, width = frame.input_size
    padded = np.zeros(frame.size, dtype=np.float64)
    area = cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
    padded[:height, :width] = area[:, :: -1 if frame.flipped else 1]
    return padded


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("size", [(300, 400), (257, 131), (40, 64), (50, 33), (128, 128), (5, 300)])
def test_targets_are_area_averages(size: tuple[int, int], flipped: bool) -> None:
    generator = np.random.default_rng(0)
    mask = (cv2.blur(generator.random(size), (9, 9)) > 0.5).astype(np.uint8)
    frame = make_frame(size, 128, resize_mode="pad", flipped=flipped)
    expected = _reference(mask, frame)
    low = draw_mask(crop_of(mask), frame, "cells")
    assert low.dtype == np.uint8 and low.shape == (32, 32)
    mean = expected.reshape(32, 4, 32, 4).mean(axis=(1, 3))
    np.testing.assert_allclose(low / 255, mean, atol=0.5 / 255 + 1e-4)
    at_input = draw_mask(crop_of(mask), frame, "input")
    clear = np.abs(expected - 0.5) > 1e-4
    np.testing.assert_array_equal(at_input[clear], 255 * (expected > 0.5)[clear])


@given(
    seed=st.integers(0, 10**6),
    flipped=st.booleans(),
    image_size=st.sampled_from([64, 256]),
    mode=st.sampled_from(["pad", "squash"]),
)
def test_a_crop_gives_what_the_whole_mask_gives(
    seed: int, flipped: bool, image_size: int, mode: str
) -> None:
    generator = np.random.default_rng(seed)
    height, width = generator.integers(1, 200, 2)
    y, x = (
        np.sort(generator.integers(0, height + 1, 2)),
        np.sort(generator.integers(0, width + 1, 2)),
    )
    mask = np.zeros((height, width), np.uint8)
    mask[y[0] : y[1], x[0] : x[1]] = generator.integers(0, 2, (y[1] - y[0], x[1] - x[0]))
    frame = make_frame((int(height), int(width)), image_size, resize_mode=mode, flipped=flipped)
    crop = mask[y[0] : y[1], x[0] : x[1]].astype(bool)
    for resolution in ("cells", "input"):
        cropped = draw_mask(crop_of(crop, top=int(y[0]), left=int(x[0])), frame, resolution)
        whole = draw_mask(crop_of(mask), frame, resolution).astype(int)
        # A share on the very edge between two values may round either way.
        assert np.abs(cropped - whole).max() <= 1 and np.mean(cropped != whole) < 0.01


def test_targets_of_a_known_rectangle() -> None:
    frame = make_frame((64, 64), 64, resize_mode="pad")
    mask = np.zeros((64, 64), np.uint8)
    mask[8:16, 6:13] = 1
    expected = np.zeros((16, 16))
    expected[2:4, 1:4] = [0.5, 1, 0.25]
    np.testing.assert_array_equal(draw_mask(crop_of(mask), frame, "cells"), np.rint(expected * 255))
    np.testing.assert_array_equal(draw_mask(crop_of(mask), frame, "input"), 255 * mask)
    full = draw_mask(
        crop_of(np.ones((64, 32))), make_frame((64, 32), 64, resize_mode="pad"), "cells"
    )
    assert (full[:, :8] == 255).all() and full[:, 8:].sum() == 0


def test_one_pixel_of_a_large_image_still_leaves_its_share() -> None:
    frame = make_frame((512, 512), 256, resize_mode="pad")
    low = draw_mask(crop_of(np.ones((1, 1)), top=100, left=200), frame, "cells")
    assert low[12, 25] == round(255 / 64) and np.count_nonzero(low) == 1
    assert draw_mask(crop_of(np.zeros((0, 0))), frame, "cells").sum() == 0


@given(
    seed=st.integers(0, 10**6),
    share=st.sampled_from([0.05, 0.1, 0.5, 3.0]),
    image_size=st.sampled_from([256, 1024]),
)
def test_jitter_keeps_its_bounds(seed: int, share: float, image_size: int) -> None:
    generator = np.random.default_rng(seed)
    frame = make_frame((300, 200), image_size, resize_mode="pad")
    limit = np.array(frame.input_size[::-1] * 2)
    start = generator.uniform(0, 0.9, (50, 2)) * limit[:2]
    boxes = np.hstack([start, start + generator.uniform(0.001, 1, (50, 2)) * (limit[:2] - start)])
    moved = jitter_boxes(boxes, share=share, frame=frame, generator=generator)
    side = boxes[:, 2:] - boxes[:, :2]
    furthest = np.minimum(share * np.tile(side, 2), 20 * image_size / 1024)
    assert (np.abs(moved - boxes) <= furthest + 0.011).all()
    assert (moved >= 0).all() and (moved <= limit).all()
    assert (moved[:, 2:] - moved[:, :2] >= side / 2 - 1e-9).all()


def test_jitter_is_uniform_and_reaches_its_bounds() -> None:
    frame = make_frame((1000, 1000), 1024, resize_mode="pad")
    boxes = np.tile([400.0, 400, 500, 600], (4000, 1))
    moved = jitter_boxes(boxes, share=0.1, frame=frame, generator=np.random.default_rng(0)) - boxes
    for side, bound in enumerate([10, 20, 10, 20]):
        assert abs(moved[:, side].mean()) < 0.05 * bound
        assert 0.99 * bound < np.abs(moved[:, side]).max() <= bound
        assert abs(moved[:, side].std() - bound / 3**0.5) < 0.03 * bound
    assert np.abs(np.corrcoef(moved.T) - np.eye(4)).max() < 0.06


def test_no_jitter_leaves_boxes_alone_and_edge_slivers_stay_boxes() -> None:
    frame = make_frame((100, 100), 128, resize_mode="pad")
    outside = np.array([[-5.0, 3, 140, 20]])
    generator = np.random.default_rng(0)
    np.testing.assert_array_equal(
        jitter_boxes(outside, share=0, frame=frame, generator=generator), outside
    )
    slivers = np.array([[128.0, 5, 129, 9], [-3, -2, 0, 0], [4, 4, 4, 4]])
    moved = jitter_boxes(slivers, share=0.1, frame=frame, generator=generator)
    assert (moved[:, 2:] > moved[:, :2]).all() and moved.min() >= 0 and moved.max() <= 128


CROPS = {
    "top left": {"zoom": 1.6, "crop_at": (0.0, 0.0)},
    "middle": {"zoom": 1.6, "crop_at": (0.4, 0.7)},
    "end": {"zoom": 2.0, "crop_at": (0.999, 0.999)},
    "one side": {"zoom": 1.2, "crop_at": (0.5, 0.5)},
    "small": {"zoom": 0.5, "crop_at": (0.9, 0.9)},
}
EACH_CROP = pytest.mark.parametrize("options", CROPS.values(), ids=CROPS)


@EACH_CROP
@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("mode", ["pad", "squash"])
def test_a_crop_is_a_part_of_the_resized_image(options: Any, flipped: bool, mode: str) -> None:
    image = cv2.blur(_noise(90, 150), (5, 5))
    frame = make_frame((90, 150), 128, resize_mode=mode, flipped=flipped, **options)
    (height, width), (top, left) = frame.input_size, frame.offset
    size = frame.resized_size[::-1]
    whole = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    part = whole[top : top + height, left : left + width][:, :: -1 if flipped else 1]
    assert part.shape[:2] == (height, width) and max(height, width) <= 128
    assert frame.is_cropped == (frame.resized_size != (height, width))
    for exact in (True, False):
        resized = resize_image(image, frame, exact=exact)
        assert np.abs(resized[:height, :width] - part.astype(int)).max() <= 1
        assert resized[height:].sum() == resized[:, width:].sum() == 0
    # Whatever of the frame could show image does.
    assert height == min(128, size[1]) and width == min(128, size[0])


def test_crops_reach_both_ends() -> None:
    tops = {
        make_frame((100, 50), 64, resize_mode="pad", zoom=1.5, crop_at=(at, at)).offset
        for at in np.arange(0, 1, 0.001)
    }
    assert tops == {(top, 0) for top in range(33)}  # 96 px high, 48 wide


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("size", [(48, 64), (301, 200), (1023, 1024), (256, 256)])
def test_fast_enlarging_is_within_a_level_of_stock(size: tuple[int, int], flipped: bool) -> None:
    frame = make_frame(size, 1024, resize_mode="pad", flipped=flipped)
    exact, fast = (resize_image(_noise(*size), frame, exact=e) for e in (True, False))
    assert np.abs(exact.astype(int) - fast).max() <= 1


def test_fast_shrinking_is_stock_and_a_reduced_image_lands_where_the_whole_one_does() -> None:
    image = cv2.blur(_noise(400, 600), (31, 31))
    frame = make_frame((400, 600), 256, resize_mode="pad", zoom=1.3, crop_at=(0.5, 0.8))
    exact = resize_image(image, frame)
    np.testing.assert_array_equal(resize_image(image, frame, exact=False), exact)
    reduced = cv2.resize(image, (300, 200), interpolation=cv2.INTER_AREA)
    assert np.abs(resize_image(reduced, frame, exact=False) - exact.astype(int)).max() <= 3


@EACH_CROP
@pytest.mark.parametrize("flipped", [False, True])
def test_frames_map_boxes_as_torchvision_does(options: Any, flipped: bool) -> None:
    size = (96, 160)
    frame = make_frame(size, 128, resize_mode="pad", flipped=flipped, **options)
    corners = np.random.default_rng(0).uniform(0, 96, (20, 2, 2))
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    theirs = tv_tensors.BoundingBoxes(
        torch.from_numpy(boxes),
        format=tv_tensors.BoundingBoxFormat.XYXY,
        canvas_size=size,
        clamping_mode=None,
    )
    theirs = F.resize(theirs, list(frame.resized_size))
    theirs = F.crop(theirs, *frame.offset, *frame.input_size)
    theirs = F.horizontal_flip(theirs) if flipped else theirs
    # torchvision's scales are float32.
    np.testing.assert_allclose(boxes_to_input(boxes, frame), theirs.numpy(), atol=2e-5)
    np.testing.assert_allclose(boxes_to_original(theirs.numpy(), frame), boxes, atol=2e-5)
    image = tv_tensors.Image(torch.from_numpy(cv2.blur(_noise(*size), (9, 9))).permute(2, 0, 1))
    image = F.crop(F.resize(image, list(frame.resized_size)), *frame.offset, *frame.input_size)
    image = F.horizontal_flip(image) if flipped else image
    height, width = frame.input_size
    ours = resize_image(cv2.blur(_noise(*size), (9, 9)), frame)[:height, :width]
    assert np.abs(ours - image.permute(1, 2, 0).numpy().astype(int)).max() <= 1


@EACH_CROP
@pytest.mark.parametrize("flipped", [False, True])
def test_masks_are_cropped_with_the_image(options: Any, flipped: bool) -> None:
    mask = np.zeros((90, 150), np.uint8)
    mask[20:70, 40:130] = cv2.blur(_noise(50, 90), (9, 9))[..., 0] > 127
    frame = make_frame((90, 150), 128, resize_mode="pad", flipped=flipped, **options)
    (height, width), (top, left) = frame.input_size, frame.offset
    size = frame.resized_size[::-1]
    # Enlarged, each input pixel takes what it overlaps: by INTER_AREA from a multiple of the size.
    fine = np.kron(mask, np.ones((8, 8)))
    whole = cv2.resize(fine, size, interpolation=cv2.INTER_AREA)
    part = np.zeros((128, 128))
    shown = whole[top : top + height, left : left + width]
    part[:height, :width] = shown[:, :: -1 if flipped else 1]
    low = draw_mask(crop_of(mask), frame, "cells") / 255
    np.testing.assert_allclose(low, part.reshape(32, 4, 32, 4).mean(axis=(1, 3)), atol=0.004)
    crop = draw_mask(crop_of(mask[20:70, 40:130], top=20, left=40), frame, "cells") / 255
    np.testing.assert_allclose(crop, low, atol=0.005)
    clear = np.abs(part - 0.5) > 1e-3
    np.testing.assert_array_equal(
        draw_mask(crop_of(mask), frame, "input")[clear], 255 * (part > 0.5)[clear]
    )


def test_a_mask_outside_of_the_crop_leaves_nothing() -> None:
    frame = make_frame((100, 100), 64, resize_mode="pad", zoom=2.0, crop_at=(0.0, 0.99))
    np.testing.assert_allclose(visible_box(frame), [50, 0, 100, 50])
    for top, left in ((60, 60), (10, 10), (60, 10)):
        assert draw_mask(crop_of(np.ones((30, 30)), top=top, left=left), frame, "cells").sum() == 0
    # 12.8 rows and 25.6 columns are visible; of the pixel at the corner 0.8 * 0.6, under a half.
    shown = draw_mask(crop_of(np.ones((30, 30)), top=40, left=40), frame, "input")
    assert shown.sum() == shown[51:, :26].sum() == 255 * (13 * 26 - 1)


@given(height=SIDES, width=SIDES, frame=st.sampled_from([(768, 1024), (256, 192), (16, 512)]))
def test_images_just_fit_into_a_rectangle(height: int, width: int, frame: tuple[int, int]) -> None:
    placed = make_frame((height, width), frame, resize_mode="pad")
    (h, w), (frame_height, frame_width) = placed.input_size, frame
    assert h <= frame_height and w <= frame_width and not placed.is_cropped
    assert h == frame_height or w == frame_width  # one side is filled
    scale = min(frame_height / height, frame_width / width)
    assert abs(h - height * scale) <= 0.5 + 1e-6 or h == 1
    assert abs(w - width * scale) <= 0.5 + 1e-6 or w == 1


def test_rectangle_of_a_shape_is_its_part_of_the_square() -> None:
    # 4:3 in 4:3: the same pixels as in the padded square; boxes are where they are there.
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    part, whole = (
        make_frame((48, 64), size, resize_mode="pad", flipped=True) for size in ((96, 128), 128)
    )
    pixels, padded = resize_image(image, part), resize_image(image, whole)
    assert pixels.shape == (96, 128, 3) and padded.shape == (128, 128, 3)
    np.testing.assert_array_equal(pixels, padded[:96])
    boxes = np.array([[1.0, 2, 30, 40]])
    np.testing.assert_array_equal(boxes_to_input(boxes, part), boxes_to_input(boxes, whole))


def test_rectangle_is_filled_by_squash_and_cropped_by_zoom() -> None:
    assert make_frame((50, 50), (96, 128), resize_mode="squash").input_size == (96, 128)
    zoomed = make_frame((48, 64), (96, 128), resize_mode="pad", zoom=2.0, crop_at=(0.99, 0.99))
    assert zoomed.resized_size == (192, 256) and zoomed.input_size == (96, 128)
    assert zoomed.offset == (96, 127)
    np.testing.assert_allclose(visible_box(zoomed), [31.75, 24, 63.75, 48])
