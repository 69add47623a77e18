"""Overlays, label images and stacked pictures, pixel by pixel."""

from pathlib import Path

import numpy as np
import pytest

from samft.coco.segmentation import CroppedMask
from samft.reports.drawing import (
    GAP,
    draw_objects,
    label_image,
    mask_colour,
    read_png,
    stack_horizontally,
    stack_with_titles,
    write_png,
)

NO_BOXES = np.zeros((0, 4))


def grey(height: int, width: int, value: int = 100) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def test_colours_are_bright_and_neighbours_differ() -> None:
    colours = np.array([mask_colour(number) for number in range(20)])
    assert (colours.max(1) == 255).all()
    assert (np.abs(colours[1:] - colours[:-1]).sum(1) > 150).all()


def test_a_row_aligns_tops_and_leaves_gaps() -> None:
    joined = stack_horizontally([grey(4, 5, 10), grey(7, 3, 20)])
    assert joined.shape == (7, 5 + GAP + 3, 3)
    assert (joined[:4, :5] == 10).all() and (joined[:, 5 + GAP :] == 20).all()
    assert (joined[4:, :5] == 255).all() and (joined[:, 5 : 5 + GAP] == 255).all()
    assert stack_horizontally([grey(4, 5)]).shape == (4, 5, 3)


def test_a_stack_has_titles_and_one_width() -> None:
    stacked = stack_with_titles([("before", grey(4, 90, 10)), ("", grey(6, 50, 20))])
    assert stacked.shape == (30 + 4 + 30 + 6, 90, 3)
    assert (stacked[:30] < 255).any()  # the title
    assert (stacked[30:34] == 10).all()
    assert (stacked[34:64] == 255).all()  # no title
    assert (stacked[64:, :50] == 20).all() and (stacked[64:, 50:] == 255).all()


def test_png_keeps_every_colour(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (9, 7, 3)).astype(np.uint8)
    write_png(tmp_path / "a.png", picture)
    assert (read_png(tmp_path / "a.png") == picture).all()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("number", [0, 5, 10**6])
def test_colours_are_plain_integers(number: int) -> None:
    assert all(type(part) is int and 0 <= part <= 255 for part in mask_colour(number))


def crop_of(top: int, left: int, height: int, width: int) -> CroppedMask:
    return CroppedMask(top, left, np.ones((height, width), bool))


def test_objects_are_filled_and_outlined_the_smaller_on_top() -> None:
    masks = [crop_of(10, 10, 9, 9), crop_of(4, 4, 30, 30)]
    drawn = draw_objects(grey(40, 40), masks, boxes=NO_BOXES)
    outline = drawn[4, 8:30]
    assert (np.abs(outline - np.array(mask_colour(1))).max(1) < 30).all()
    filled = [int(0.6 * 100 + 0.4 * part) for part in mask_colour(1)]
    assert (drawn[24:30, 24:30] == filled).all()
    both = [int(0.6 * one + 0.4 * part) for one, part in zip(filled, mask_colour(0), strict=True)]
    assert (drawn[13:16, 13:16] == both).all()
    assert (drawn[37:, :] == 100).all()


def test_lines_are_as_wide_as_suits_the_picture() -> None:
    widths = []
    for side in (300, 2800):
        corner = side / 4
        boxes = np.array([[corner, corner, 3 * corner, 3 * corner]])
        drawn = draw_objects(grey(side, side), [crop_of(0, 0, 0, 0)], boxes=boxes)
        across = drawn[side // 2, : side // 2].astype(int)
        widths.append(int((np.abs(across - 100).max(1) > 40).sum()))
    assert widths[0] == 1 and 4 <= widths[1] <= 6


def test_where_masks_overlap_the_smallest_counts() -> None:
    labels = label_image([crop_of(2, 2, 2, 2), crop_of(0, 0, 6, 6), crop_of(1, 1, 4, 4)], (6, 8))
    assert labels.dtype == np.uint16
    assert (labels[2:4, 2:4] == 1).all() and labels[1, 1] == 3 and labels[0, 0] == 2
    assert (labels[:, 6:] == 0).all()
