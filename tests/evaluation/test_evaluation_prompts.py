"""Jittered boxes and centre points: where they lie, and what they depend on."""

import numpy as np
import pytest
from segment_anything.utils.transforms import ResizeLongestSide

from samft.annotations.segmentation import CroppedMask
from samft.data.transforms import make_frame
from samft.evaluation.clicks import centre_point, points_to_input
from samft.evaluation.evaluator import jittered_boxes

FRAME = make_frame((600, 800), 1024, resize_mode="pad")
BOXES = np.array([[100.0, 100, 500, 300], [400, 200, 700, 700], [300, 300, 310, 320]])
IDS = np.array([7, 8, 2**40])


def moved(share: float, *, rows: tuple[int, ...] = (0, 1, 2), seed: int = 0) -> np.ndarray:
    which = list(rows)
    return jittered_boxes(BOXES[which], IDS[which], share=share, frame=FRAME, seed=seed)


def test_a_box_depends_on_its_object_and_the_seed_alone() -> None:
    assert np.array_equal(moved(0.1), moved(0.1))
    assert np.array_equal(moved(0.1, rows=(2, 0)), moved(0.1)[[2, 0]])
    assert not np.isclose(moved(0.1), moved(0.1, seed=1)).any()
    one, two = (
        jittered_boxes(BOXES[:1], np.array([k]), share=0.1, frame=FRAME, seed=0) for k in (1, 2)
    )
    assert not np.isclose(one, two).any()


def test_levels_are_one_draw_scaled_and_not_capped() -> None:
    offsets = {share: moved(share) - BOXES for share in (0.05, 0.1, 0.2)}
    np.testing.assert_allclose(offsets[0.1], 2 * offsets[0.05], atol=1e-9)
    np.testing.assert_allclose(offsets[0.2], 4 * offsets[0.05], atol=1e-9)
    sides = np.tile(BOXES[:, 2:] - BOXES[:, :2], 2)
    assert (np.abs(offsets[0.2]) <= 0.2 * sides).all()
    ids = np.arange(200)
    many = jittered_boxes(np.repeat(BOXES[:1], 200, axis=0), ids, share=0.2, frame=FRAME, seed=0)
    reach = np.abs(many - BOXES[0])[:, [0, 2]].max()
    assert 70 < reach <= 80  # 20 % of 400 px; training's limit is 20 px


def test_jittered_boxes_stay_inside_the_image() -> None:
    box = np.array([[0.0, 0, 1024, 768]])
    for number in range(20):
        jittered = jittered_boxes(box, np.array([number]), share=0.2, frame=FRAME, seed=0)[0]
        assert jittered.min() >= 0 and jittered[2] <= 1024 and jittered[3] <= 768
    assert jittered_boxes(np.zeros((0, 4)), IDS[:0], share=0.1, frame=FRAME, seed=0).shape == (0, 4)


L_SHAPE = np.zeros((9, 9), dtype=bool)
L_SHAPE[:, :3] = True
L_SHAPE[4:, :] = True  # the corner is 5 x 9 and has the widest place


@pytest.mark.parametrize(
    "mask, top, left, point",
    [
        (np.ones((5, 7), bool), 10, 20, (22, 12)),  # the first of three that are as far
        (np.ones((1, 1), bool), 3, 4, (4, 3)),
        (np.ones((7, 7), bool), 0, 0, (3, 3)),  # the image's edge is a border
        (L_SHAPE, 0, 0, (2, 6)),
    ],
)
def test_the_centre_is_farthest_from_the_border(
    mask: np.ndarray, top: int, left: int, point: tuple[int, int]
) -> None:
    assert centre_point(CroppedMask(top, left, mask)) == point


def test_the_centre_lies_on_the_mask_where_the_centroid_does_not() -> None:
    ring = np.ones((21, 21), bool)
    ring[4:17, 4:17] = False
    x, y = centre_point(CroppedMask(5, 6, ring))
    assert ring[y - 5, x - 6]


@pytest.mark.parametrize("size", [(600, 800), (333, 121), (64, 64)])
def test_points_are_scaled_as_stock_does(size: tuple[int, int]) -> None:
    points = np.array([[0, 0], [120, 63], [5, 60]])
    expected = ResizeLongestSide(256).apply_coords(points, size)
    scaled = points_to_input(points, make_frame(size, 256, resize_mode="pad"))
    np.testing.assert_allclose(scaled, expected, atol=1e-9)
