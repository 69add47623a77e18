"""Which masks of a validation are kept: the fixed ones and the worst, on any number of ranks."""

from typing import Any

import numpy as np
import pytest

from samft.annotations.segmentation import CroppedMask
from samft.distributed import get_rank, get_world_size
from samft.evaluation.validation import MaskSelection

SIZE = (9, 12)
FIXED = [(3, 0), (7, 1), (99, 0)]  # the last is in no image


def a_mask(number: int) -> CroppedMask:
    generator = np.random.default_rng(number)
    height, width = generator.integers(0, 5, 2)
    return CroppedMask(number % 4, number % 7, generator.random((height, width)) < 0.5)


def select_share(num_images: int, num_worst: int) -> tuple[dict[Any, Any], list[Any]]:
    selection = MaskSelection(FIXED, num_worst=num_worst)
    for image_id in range(get_rank(), num_images, get_world_size()):
        for object_id in range(2):
            number = 2 * image_id + object_id
            iou = number * 7 % 5 / 4  # many are equally bad
            selection.add((image_id, object_id), a_mask(number), ious=(iou, 1 - iou), size=SIZE)
    selection.gather()
    return selection.fixed, selection.worst


@pytest.mark.parametrize("num_worst", [0, 1, 5, 100])
def test_the_worst_are_those_of_a_sorted_list(num_worst: int) -> None:
    fixed, worst = select_share(12, num_worst)
    every = sorted((n * 7 % 5 / 4, (n // 2, n % 2)) for n in range(24))
    assert [(selected.iou_actual, selected.key) for selected in worst] == every[:num_worst]
    assert fixed.keys() == {(3, 0), (7, 1)}
    assert all(selected.iou_predicted == 1 - selected.iou_actual for selected in worst)


def test_the_selection_is_the_same_on_one_two_and_three_processes(gloo2: Any, gloo3: Any) -> None:
    alone = select_share(12, 5)
    for pool in (gloo2, gloo3):
        assert pool.run(select_share, 12, 5) == [alone] * pool.world_size


@pytest.mark.parametrize("number", range(20))
def test_a_selected_mask_keeps_its_pixels(number: int) -> None:
    mask = a_mask(number)
    selection = MaskSelection([(1, 1)], num_worst=0)
    selection.add((1, 1), mask, ious=(0.5, 0.5), size=SIZE)
    expected, restored = np.zeros(SIZE, bool), np.zeros(SIZE, bool)
    for canvas, one in ((expected, mask), (restored, selection.fixed[1, 1].mask)):
        height, width = one.mask.shape
        canvas[one.top : one.top + height, one.left : one.left + width] = one.mask
    assert (expected == restored).all()
    assert selection.fixed[1, 1].mask.mask.dtype == bool
