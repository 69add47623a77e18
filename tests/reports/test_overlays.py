"""Overlays, pixel by pixel: colours, outlines in two tones, labels beside the objects."""

import numpy as np
import pytest

from samft.annotations.segmentation import CroppedMask
from samft.reports.drawing import CLICK_COLOURS, mask_colour
from samft.reports.overlays import contrasting_colour, draw_overlay

NO_BOXES = np.zeros((0, 4))


def grey(height: int, width: int, value: int = 100) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def crop_of(top: int, left: int, height: int, width: int) -> CroppedMask:
    return CroppedMask(top, left, np.ones((height, width), bool))


def test_objects_are_filled_the_smaller_on_top() -> None:
    masks = [crop_of(10, 10, 9, 9), crop_of(4, 4, 30, 30)]
    drawn = draw_overlay(grey(40, 40), masks, boxes=NO_BOXES)
    filled = [int(0.6 * 100 + 0.4 * part) for part in mask_colour(1)]
    assert (drawn[24:30, 24:30] == filled).all()
    both = [int(0.6 * one + 0.4 * part) for one, part in zip(filled, mask_colour(0), strict=True)]
    assert (drawn[13:16, 13:16] == both).all()
    assert (drawn[37:, :] == 100).all()


@pytest.mark.parametrize("background", [0, 100, 255])
def test_outlines_have_a_dark_and_a_light_line_on_any_background(background: int) -> None:
    drawn = draw_overlay(grey(40, 40, background), [crop_of(8, 8, 20, 20)], boxes=NO_BOXES)
    rows = drawn[15:20].astype(int)
    assert (rows[:, 7].max(1) < 40).all()  # around the object
    assert (rows[:, 8].min(1) > 120).all() and (rows[:, 8].max(1) == 255).all()  # on its edge
    assert (rows[:, :6] == background).all()


@pytest.mark.parametrize("number", range(12))
def test_colours_stand_out_from_what_lies_under_them(number: int) -> None:
    own = mask_colour(number)
    assert contrasting_colour(number, np.array([0.0, 0.0, 0.0])) == own
    other = np.array(contrasting_colour(number, np.array(own, dtype=float)), dtype=float)
    assert np.abs(other - own).sum() > 200


def test_lines_are_as_wide_as_suits_the_picture() -> None:
    widths = []
    for side in (300, 2800):
        corner = side / 4
        boxes = np.array([[corner, corner, 3 * corner, 3 * corner]])
        drawn = draw_overlay(grey(side, side), [crop_of(0, 0, 0, 0)], boxes=boxes)
        across = drawn[side // 2, : side // 2].astype(int)
        widths.append(int((np.abs(across - 100).max(1) > 40).sum()))
    assert widths[0] == 1 and 4 <= widths[1] <= 6


def with_and_without_labels(
    masks: list[CroppedMask], size: tuple[int, int], labels: list[list[str]]
) -> np.ndarray:
    """Which pixels the labels changed, bool [H, W]."""
    plain = draw_overlay(grey(*size), masks, boxes=NO_BOXES)
    labelled = draw_overlay(grey(*size), masks, boxes=NO_BOXES, labels=labels)
    assert labelled.shape == plain.shape
    return np.asarray((plain != labelled).any(axis=2))


@pytest.mark.parametrize("corner", [(0, 0), (0, 108), (88, 0), (88, 108), (44, 54)])
def test_labels_lie_beside_objects_also_at_the_edges(corner: tuple[int, int]) -> None:
    mask = crop_of(*corner, 12, 12)
    changed = with_and_without_labels([mask], (100, 120), [["leaf 1  0.93"]])
    assert changed.sum() > 400
    x0, y0, x1, y1 = mask.extent
    assert not changed[y0:y1, x0:x1].any()


def test_labels_are_shorter_where_space_is_scarce_and_hide_nothing() -> None:
    generator = np.random.default_rng(0)
    corners = generator.integers(0, [88, 108], (60, 2)).tolist()
    masks = [crop_of(top, left, 8, 8) for top, left in corners]
    texts = [[f"a long name {k}  0.50", f"{k}  0.50", f"{k}"] for k in range(len(masks))]
    changed = with_and_without_labels(masks, (100, 120), texts)
    assert changed.any()
    for mask in masks:
        x0, y0, x1, y1 = mask.extent
        assert not changed[y0:y1, x0:x1].any()


def test_a_picture_too_small_for_a_label_has_none() -> None:
    changed = with_and_without_labels([crop_of(1, 1, 3, 3)], (8, 8), [["leaf 1  0.93", "1"]])
    assert not changed.any()


def test_an_empty_mask_has_no_label() -> None:
    changed = with_and_without_labels([crop_of(0, 0, 0, 0)], (60, 60), [["leaf 1  0.93"]])
    assert not changed.any()


def test_points_are_marked_by_label_and_no_box_is_drawn_where_there_is_none() -> None:
    boxes = np.array([[np.nan] * 4, [70, 5, 95, 30]])
    points = [np.array([[20.0, 30, 1], [50.6, 30, 0]]), np.array([[80.0, 15, 1]])]
    masks = [crop_of(25, 15, 9, 9), crop_of(10, 75, 9, 9)]
    drawn = draw_overlay(grey(60, 100), masks, boxes=boxes, points=points)
    for label, (y, x) in ((1, (30, 20)), (0, (30, 50)), (1, (15, 80))):
        mark = drawn[y - 4 : y + 5, x - 4 : x + 5].reshape(-1, 3)
        assert (mark == CLICK_COLOURS[label]).all(1).any()
        assert not (mark == CLICK_COLOURS[1 - label]).all(1).any()
        assert (drawn[y, x] == 255).all()  # its plus or minus
    assert (drawn[5, 71:94] != 100).any() and (drawn[40:, :] == 100).all()
