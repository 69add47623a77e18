"""Counts of automatic masks, of models that are made to find some or none."""

import pytest

from helpers.tiny_checkpoint import mask_finding_sam
from samft.exporters import verification
from samft.exporters.verification import compare_automatic_masks, synthetic_sample


@pytest.fixture(autouse=True)
def _few_points(monkeypatch) -> None:
    monkeypatch.setattr(verification, "POINTS_PER_SIDE", 4)


def test_both_models_are_counted_and_there_is_no_warning_if_both_find_masks() -> None:
    counts = compare_automatic_masks(mask_finding_sam(), mask_finding_sam(), synthetic_sample())
    assert counts.tuned == counts.base > 0
    assert counts.warning is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iou_predicted": 0.5}, "highest predicted IoU is 0.50 (pred_iou_thresh is 0.88)"),
        ({"steepness": 0.1}, "(stability_score_thresh is 0.95)"),
    ],
)
def test_a_tuned_model_without_masks_is_warned_about(options, message: str) -> None:
    counts = compare_automatic_masks(
        mask_finding_sam(**options), mask_finding_sam(), synthetic_sample()
    )
    assert counts.tuned == 0 < counts.base
    assert f"finds NO masks in the built-in picture with the tuned model, and {counts.base}" in (
        counts.warning
    )
    assert message in counts.warning


def test_no_warning_if_the_base_has_no_masks_or_is_unknown() -> None:
    nothing = mask_finding_sam(iou_predicted=0.5)
    counts = compare_automatic_masks(nothing, nothing, synthetic_sample())
    assert (counts.tuned, counts.base, counts.warning) == (0, 0, None)
    counts = compare_automatic_masks(nothing, None, synthetic_sample())
    assert (counts.tuned, counts.base, counts.warning) == (0, None, None)
