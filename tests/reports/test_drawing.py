"""Label images and stacked pictures, pixel by pixel."""

from pathlib import Path

import numpy as np
import pytest

from samft.annotations.segmentation import CroppedMask
from samft.reports.drawing import (
    GAP,
    label_image,
    mask_colour,
    read_png,
    stack_horizontally,
    stack_with_titles,
    write_png,
)


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


def test_where_masks_overlap_the_smallest_counts() -> None:
    labels = label_image([crop_of(2, 2, 2, 2), crop_of(0, 0, 6, 6), crop_of(1, 1, 4, 4)], (6, 8))
    assert labels.dtype == np.uint16
    assert (labels[2:4, 2:4] == 1).all() and labels[1, 1] == 3 and labels[0, 0] == 2
    assert (labels[:, 6:] == 0).all()
