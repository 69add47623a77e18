"""Our own non-maximum suppression, for where torchvision's operator does not load."""

from types import ModuleType

import pytest
import torch
import torchvision
from torch import Tensor

from samft.runtime import torchvision_compat
from samft.runtime.torchvision_compat import LIBRARY, non_maximum_suppression, replace_missing_nms


def slow_nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> list[int]:
    """The definition, pair by pair."""

    def iou(one: list[float], other: list[float]) -> float:
        width = min(one[2], other[2]) - max(one[0], other[0])
        height = min(one[3], other[3]) - max(one[1], other[1])
        common = max(width, 0) * max(height, 0)
        areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (one, other)]
        return common / (sum(areas) - common)

    kept: list[int] = []
    for k in sorted(range(len(boxes)), key=lambda k: -float(scores[k])):
        if all(iou(boxes[k].tolist(), boxes[j].tolist()) <= iou_threshold for j in kept):
            kept.append(k)
    return kept


def random_boxes(count: int) -> tuple[Tensor, Tensor]:
    low = torch.rand(count, 2) * 50
    return torch.cat([low, low + 1 + torch.rand(count, 2) * 40], dim=1), torch.rand(count)


@pytest.mark.parametrize("count", [0, 1, 120])
@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_suppression_follows_the_definition(count: int, threshold: float) -> None:
    boxes, scores = random_boxes(count)
    kept = non_maximum_suppression(boxes, scores, threshold).tolist()
    assert kept == slow_nms(boxes, scores, threshold)
    assert count < 2 or len(kept) < count


@pytest.mark.skipif(LIBRARY is not None, reason="torchvision's operators do not load here")
def test_suppression_equals_torchvisions() -> None:
    boxes, scores = random_boxes(500)
    expected = torchvision.ops.nms(boxes, scores, 0.7)
    assert torch.equal(non_maximum_suppression(boxes, scores, 0.7), expected)


def test_of_two_equal_boxes_the_better_stays() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [20, 20, 30, 30]])
    assert non_maximum_suppression(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.5).tolist() == [1, 2]


@pytest.mark.parametrize("operators_load", [True, False])
def test_only_a_missing_nms_is_replaced(
    operators_load: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchvision_compat, "LIBRARY", None if operators_load else object())
    module = ModuleType("mask_generator")
    original = vars(module)["batched_nms"] = torchvision.ops.boxes.batched_nms
    replace_missing_nms(module)
    replaced = vars(module)["batched_nms"]
    assert (replaced is original) == operators_load
    if not operators_load:
        boxes, scores = random_boxes(50)
        kept = replaced(boxes, scores, torch.zeros(50), iou_threshold=0.7)
        assert kept.tolist() == slow_nms(boxes, scores, 0.7)
