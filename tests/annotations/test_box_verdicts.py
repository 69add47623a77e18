"""Which annotated boxes can be used, and how far boxes reach beyond their images."""

import numpy as np
import pytest

from samft.annotations.boxes import BOX_CODES, distance_outside, judge_boxes
from samft.annotations.problems import KINDS, NOTE

SIZE = np.array([[20.0, 30.0]])  # H, W
EXTENT = np.array([[2.0, 3.0, 8.0, 9.0]])


@pytest.mark.parametrize(
    ("box", "code"),
    [
        ((2, 3, 6, 6), ""),
        ((3, 4, 4, 4), ""),  # IoU 16 / 36, but a pixel of rounding on each side
        ((2, 3, 6, 12), ""),  # IoU one half
        ((2, 3, 6, 12.1), "box-unlike-mask"),
        ((np.nan, 3, 6, 6), "box-not-finite"),
        ((2, 3, np.inf, 6), "box-not-finite"),
        ((2, 3, 0, 6), "box-empty"),
        ((8, 9, -6, -6), "box-empty"),
        ((30, 3, 6, 6), "box-outside"),  # touches the image, but shares nothing with it
        ((2, 3, 58, 6), "box-unlike-mask"),  # as far beyond the image as it is wide
        ((2, 3, 58.1, 6), "box-outside"),
        ((-30.1, 3, 38.1, 6), "box-outside"),
    ],
)
def test_verdicts(box: tuple[float, ...], code: str) -> None:
    (verdict,) = judge_boxes(np.array([box]), SIZE, extents=EXTENT)
    assert BOX_CODES[verdict] == code


def test_every_code_is_a_note() -> None:
    assert all(KINDS[code][0] == NOTE for code in BOX_CODES[1:])


def test_distance_outside() -> None:
    boxes = np.array([[2, 3, 8, 9], [-0.5, 3, 8, 9], [2, 3, 30, 21.5], [-2, 3, 33, 9]], float)
    np.testing.assert_array_equal(distance_outside(boxes, np.repeat(SIZE, 4, 0)), [-2, 0.5, 1.5, 3])
