"""What can be drawn of known masks, and the table by size of the object."""

import numpy as np
import pytest

from benchmarks.object_sizes import averaged_iou, fit_mask, format_groups
from samft.annotations.segmentation import CroppedMask
from samft.data.transforms import make_frame

FRAME = make_frame((64, 64), 64, resize_mode="pad")


def square(side: int, at: int = 20) -> CroppedMask:
    return CroppedMask(at, at, np.ones((side, side), dtype=bool))


def test_the_whole_image_is_drawn_perfectly() -> None:
    assert averaged_iou(square(64, at=0), FRAME) == fit_mask(square(64, at=0), FRAME) == 1


def test_an_averaged_mask_of_half_a_cell_is_empty_but_a_fitted_one_is_not() -> None:
    """A covered share of 4/16 is under one half in the only cell that the square touches."""
    assert averaged_iou(square(2), FRAME) == 0
    assert fit_mask(square(2), FRAME) > 0.25


def test_fitting_does_not_harm() -> None:
    assert fit_mask(square(10, at=21), FRAME) > averaged_iou(square(10, at=21), FRAME)


@pytest.mark.parametrize(
    ("cells", "label"), [(1.99, "1.5 to 2"), (2, "2 to 2.5"), (99, "16 and more")]
)
def test_the_table_groups_objects_by_cells(cells: float, label: str) -> None:
    rows = np.array([[cells, 0.5, 0.25, 0.75], [cells, 0.5, 0.75, 1.0]])
    table = format_groups(rows, ("before", "after")).splitlines()
    assert table[0] == "| shorter side, cells | objects | filled box | before | after | better |"
    assert table[2:] == [f"| {label} | 2 | 0.50 | 0.50 | 0.88 | 50% / 100% |"]
