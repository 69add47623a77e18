import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from samft import pictures
from samft.batch import Batch
from samft.report import AFTER, BEFORE, BOTH, draw_before_and_after, draw_masks, report
from samft.validation import Validation


def a_summary(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "best_step": 40,
        "best_val_per_mask_iou": 0.75,
        "baseline_val_per_mask_iou": 0.5,
        "box_fill_iou": 0.6,
        "best_checkpoint": str(folder / "40-0.75.ckpt"),
        "wall_seconds": 83.0,
        "data": {"train": {"bad_images": {}}, "val": {"bad_images": {}}},
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "worse"),
    [
        ({}, False),
        ({"best_val_per_mask_iou": 0.5}, False),
        ({"best_val_per_mask_iou": 0.4999}, True),
        ({"best_val_per_mask_iou": None, "best_step": None, "best_checkpoint": None}, True),
    ],
    ids=["better", "equal", "worse", "no checkpoint"],
)
def test_report_says_that_it_got_worse_when_it_did(changes, worse, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="samft"):
        report(a_summary(tmp_path, **changes), tmp_path)
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert [text.startswith("IT GOT WORSE") for text in warnings] == [True] * worse


def test_report_says_the_scores_the_places_and_what_comes_next(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="samft"):
        report(a_summary(tmp_path), tmp_path)
    score, places, load, own_data = caplog.messages
    assert "0.5000 -> 0.7500 (best at step 40; filling each box: 0.6000) in 1:23" in score
    assert str(tmp_path) in places and "40-0.75.ckpt" in places and BOTH in places
    assert str(tmp_path / "40-0.75.ckpt") in load
    assert "--data_root" in own_data


def test_report_counts_the_images_that_could_not_be_used(tmp_path, caplog):
    data = {"train": {"bad_images": {"a": "x", "b": "y"}}, "val": {"bad_images": {"a": "x"}}}
    report(a_summary(tmp_path, data=data), tmp_path)
    assert "3 images could not be used; summary.json names them all" in caplog.messages


def a_validation(logits: torch.Tensor, *, input_size: tuple[int, int]) -> Validation:
    num_masks, size = len(logits), 4 * logits.shape[-1]
    batch = Batch(
        images=torch.full((1, 3, size, size), 100, dtype=torch.uint8),
        boxes=torch.tensor([[2.0, 2.0, 10.0, 10.0]] * num_masks),
        image_index=torch.zeros(num_masks, dtype=torch.int64),
        targets=torch.zeros(num_masks, size // 4, size // 4, dtype=torch.uint8),
        input_sizes=torch.tensor([input_size]),
        original_sizes=torch.tensor([input_size]),
        image_ids=[1],
        object_ids=torch.arange(num_masks),
        truths=[],
    )
    return Validation(metrics={}, box_fill_iou=0.0, shown=[(batch, logits)])


def test_masks_are_drawn_where_the_logit_is_above_0_and_padding_is_cut_off():
    logits = torch.full((1, 8, 8), -1.0)
    logits[0, :, 5:] = 1.0  # from column 20 of 32 on
    picture = draw_masks(a_validation(logits, input_size=(16, 32)))
    assert picture.shape == (16, 32, 3)
    grey = (picture == 100).all(axis=2)
    assert grey[12:, :18].all()  # neither mask nor box
    assert not grey[:, 22:].any()


def test_no_mask_leaves_the_image_as_it_is_outside_of_its_box():
    picture = draw_masks(a_validation(torch.full((1, 8, 8), -1.0), input_size=(32, 32)))
    assert (picture[12:, 12:] == 100).all()
    assert not (picture[:12, :12] == 100).all()


def test_before_stands_above_after(tmp_path):
    pictures.write_png(tmp_path / BEFORE, np.full((20, 40, 3), (200, 0, 0), np.uint8))
    pictures.write_png(tmp_path / AFTER, np.full((20, 40, 3), (0, 200, 0), np.uint8))
    draw_before_and_after(tmp_path, before=0.25, after=0.5)
    both = pictures.read_png(tmp_path / BOTH)
    red, green = ((both == colour).all(axis=2) for colour in ((200, 0, 0), (0, 200, 0)))
    assert red.sum() == green.sum() == 20 * 40
    assert np.nonzero(red)[0].max() < np.nonzero(green)[0].min()


def test_without_a_picture_of_the_best_step_there_is_no_comparison(tmp_path):
    pictures.write_png(tmp_path / BEFORE, np.zeros((20, 40, 3), np.uint8))
    draw_before_and_after(tmp_path, before=0.25, after=float("nan"))
    assert not (tmp_path / BOTH).exists()
