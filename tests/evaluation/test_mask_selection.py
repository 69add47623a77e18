"""Which masks of a validation are kept: those asked for and the worst, the same on any ranks."""

from typing import Any

import numpy as np
import pytest

from samft.coco.segmentation import CroppedMask
from samft.distributed import get_rank, get_world_size
from samft.evaluation.validation import MaskSelection

SIZE = (9, 12)
FIXED = [(3, 0), (7, 1), (99, 0)]  # the last is in no image


def a_mask(number: int) -> CroppedMask:
    generator = np.random.default_rng(number)
    height, width = generator.integers(0, 5, 2)
    return CroppedMask(number % 4, number % 7, generator.random((height, width)) < 0.5)


def offer_share(num_images: int, num_worst: int) -> tuple[dict[Any, Any], list[Any]]:
    keeper = MaskSelection(FIXED, num_worst=num_worst)
    for image_id in range(get_rank(), num_images, get_world_size()):
        for object_id in range(2):
            number = 2 * image_id + object_id
            iou = number * 7 % 5 / 4  # many are equally bad
            keeper.add((image_id, object_id), a_mask(number), ious=(iou, 1 - iou), size=SIZE)
    keeper.gather()
    return keeper.fixed, keeper.worst


@pytest.mark.parametrize("num_worst", [0, 1, 5, 100])
def test_the_worst_are_those_of_a_sorted_list(num_worst: int) -> None:
    fixed, worst = offer_share(12, num_worst)
    every = sorted((n * 7 % 5 / 4, (n // 2, n % 2)) for n in range(24))
    assert [(kept.iou_actual, kept.key) for kept in worst] == every[:num_worst]
    assert fixed.keys() == {(3, 0), (7, 1)}
    assert all(kept.iou_predicted == 1 - kept.iou_actual for kept in worst)


def test_they_are_the_same_on_one_two_and_three_processes(gloo2: Any, gloo3: Any) -> None:
    alone = offer_share(12, 5)
    for pool in (gloo2, gloo3):
        assert pool.run(offer_share, 12, 5) == [alone] * pool.world_size


@pytest.mark.parametrize("number", range(20))
def test_a_mask_comes_back_as_it_was(number: int) -> None:
    mask = a_mask(number)
    keeper = MaskSelection([(1, 1)], num_worst=0)
    keeper.add((1, 1), mask, ious=(0.5, 0.5), size=SIZE)
    wanted, found = np.zeros(SIZE, bool), np.zeros(SIZE, bool)
    for canvas, one in ((wanted, mask), (found, keeper.fixed[1, 1].mask)):
        height, width = one.mask.shape
        canvas[one.top : one.top + height, one.left : one.left + width] = one.mask
    assert (wanted == found).all()
    assert keeper.fixed[1, 1].mask.mask.dtype == bool
