"""Counts of automatic masks, of models that are made to find some or none; and evaluations."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.tiny_checkpoint import mask_finding_sam
from samft.annotations.segmentation import CroppedMask, uncompressed_rle
from samft.exporters import automatic_masks
from samft.exporters.automatic_masks import compare_automatic_masks, evaluation_warnings
from samft.exporters.verification import synthetic_sample


@pytest.fixture(autouse=True)
def _few_points(monkeypatch) -> None:
    monkeypatch.setattr(automatic_masks, "POINTS_PER_SIDE", 4)


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


def rle_of(mask: CroppedMask, size: tuple[int, int]) -> dict[str, Any]:
    rle = uncompressed_rle(mask, size)
    return {"segmentation": {**rle, "counts": rle["counts"].tolist()}}


def test_the_built_in_picture_knows_its_objects() -> None:
    sample = synthetic_sample()
    height, width = sample.image.shape[:2]
    assert len(sample.objects) >= len(sample.boxes) > 3
    extents = np.array([mask.extent for mask in sample.objects], dtype=float)
    assert (extents[:, 2] <= width).all() and (extents[:, 3] <= height).all()
    for box in sample.boxes:  # around outlines, so off by less than a pixel
        assert np.abs(extents - box).max(1).min() < 1.5


@pytest.mark.parametrize(("num_lost", "is_warned"), [(0, False), (2, True)])
def test_fewer_objects_than_before_are_warned_about(num_lost: int, is_warned: bool, monkeypatch):
    sample = synthetic_sample()
    size = sample.image.shape[0], sample.image.shape[1]
    before = [rle_of(mask, size) for mask in sample.objects]
    nothing = [rle_of(CroppedMask(0, 0, np.ones((1, 1), bool)), size)]
    # As many masks as before: it is objects that count.
    after = before[num_lost:] + nothing * num_lost
    masks = iter([after, before])
    monkeypatch.setattr(automatic_masks, "_generate_masks", lambda *_: next(masks))
    sam = mask_finding_sam()
    counts = compare_automatic_masks(sam, sam, sample)
    known = len(sample.objects)
    assert (counts.objects, counts.base_found, counts.tuned_found) == (
        *(known, known),
        known - num_lost,
    )
    assert counts.tuned == counts.base == known
    expected = f"of the {known} in the built-in picture, {known - 2} at an IoU of .50, and {known}"
    assert (expected in (counts.warning or "")) is is_warned
    assert (counts.warning is None) is not is_warned


def evaluation(*shares: tuple[str, float | None]) -> dict[str, Any]:
    """A report of `samft evaluate` on some checkpoints, with the objects that they find."""
    first, *others = (
        {
            "per_mask_iou": 0.5,
            "checkpoint": name,
            **({} if share is None else {"automatic": {"found_50": share, "images": 20}}),
        }
        for name, share in shares
    )
    return {**first, "others": others, "samft_version": "1"}


@pytest.mark.parametrize(
    ("content", "is_warned"),
    [
        (evaluation(("base.pth", 0.625), ("runs/mine/5-0.80.ckpt", 0.5)), True),
        (evaluation(("base.pth", 0.5), ("5-0.80.ckpt", 0.5)), False),
        (evaluation(("base.pth", 0.625), ("9-0.80.ckpt", 0.5)), False),
        (evaluation(("base.pth", 0.6), ("9-0.80.ckpt", 0.9), ("5-0.80.ckpt", 0.5)), True),
        (evaluation(("base.pth", None), ("5-0.80.ckpt", None)), False),
        (evaluation(("5-0.80.ckpt", 0.1)), False),
        ({**evaluation(("base.pth", 0.6)), "others": [7]}, False),
        ({**evaluation(("base.pth", 0.6)), "others": 7}, False),
        ({"metrics": {}}, False),
        ([], False),
    ],
)
def test_an_evaluation_beside_the_checkpoint_is_read(
    content: Any, is_warned: bool, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "5-0.80.ckpt"
    checkpoint.touch()
    (tmp_path / "scores.json").write_text(json.dumps(content))
    (tmp_path / "broken.json").write_text('{"per_mask_iou": ')
    warnings = evaluation_warnings(checkpoint)
    assert len(warnings) == int(is_warned)
    if is_warned:
        share = "62.5%" if content["automatic"]["found_50"] == 0.625 else "60.0%"
        assert f"50.0% at an IoU of .50, and {share} with base.pth, on 20 images" in warnings[0]
        assert str(tmp_path / "scores.json") in warnings[0]


def test_an_evaluation_of_another_file_of_the_same_name_is_not_meant(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "5-0.80.ckpt").touch()
    report = evaluation(("base.pth", 0.6), (str(tmp_path / "b" / "5-0.80.ckpt"), 0.5))
    (tmp_path / "a" / "scores.json").write_text(json.dumps(report))
    assert evaluation_warnings(tmp_path / "a" / "5-0.80.ckpt") == []
