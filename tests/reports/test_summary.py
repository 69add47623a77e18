"""The summary of a run: regressions, advice, log records and next commands."""

import ast
import logging
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from samft.checkpoints.top_k import Checkpoint
from samft.config import TrainConfig
from samft.evaluation.object_scores import Comparison, ObjectScores
from samft.reports.summary import (
    find_regressions,
    log_summary,
    next_commands,
    suggest_changes,
    summarise_run,
)
from samft.reports.validation_images import BEFORE_AFTER
from samft.training.engine import Progress

CONFIG = {**vars(TrainConfig()), "image_size": 256}


def a_comparison(*, num_lost: int, num_gained: int = 0, num: int = 20) -> Comparison:
    def rows(iou: np.ndarray) -> ObjectScores:
        return ObjectScores(np.arange(num), np.arange(num), np.full(num, 9.0), iou, iou)

    after = np.full(num, 0.5)
    after[:num_lost] = 0.3
    after[num_lost : num_lost + num_gained] = 0.8
    return Comparison(rows(np.full(num, 0.5)), rows(after))


def a_summary(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "got_worse": [],
        "what_to_try": [],
        "best_step": 40,
        "best_val_per_mask_iou": 0.75,
        "baseline_val_per_mask_iou": 0.5,
        "box_fill_iou": 0.6,
        "best_checkpoint": str(folder / "40-0.75.ckpt"),
        "wall_seconds": 83.0,
        "objects": {"compared": 20, "gained": 4, "lost": 1},
        "data": {"train": {"bad_images": {}}, "val": {"bad_images": {}}},
        **changes,
    }


# Whether it got worse


@pytest.mark.parametrize(
    ("after", "num_lost", "expected"),
    [
        (0.75, 0, []),
        (0.5, 2, []),  # a tenth of the objects is not more than a tenth
        (0.4999, 0, ["from 0.5000 at step 0 to 0.4999"]),
        (0.75, 3, ["3 of 20 objects (15%) lost more than 0.1 IoU; 5 gained as much"]),
        (0.4, 20, ["to 0.4000 at its best", "20 of 20 objects (100%)"]),
        (None, 0, ["no best checkpoint"]),
    ],
)
def test_regressions_are_described_with_their_numbers(
    after: float | None, num_lost: int, expected: list[str]
) -> None:
    sentences = find_regressions(
        0.5, after, a_comparison(num_lost=num_lost, num_gained=5 * (num_lost < 15))
    )
    assert len(sentences) == len(expected)
    assert all(part in text for part, text in zip(expected, sentences, strict=True))


def test_means_are_compared_without_object_scores() -> None:
    assert find_regressions(0.5, 0.6, None) == []
    assert len(find_regressions(0.5, 0.4, None)) == 1


def test_the_summary_holds_regressions_and_advice() -> None:
    best = Checkpoint("10-0.45.ckpt", 10, 0.45)
    progress = Progress(step=20, baseline={"per_mask_iou": 0.5}, box_fill_iou=0.3)
    parts: dict[str, Any] = {"folder": Path("run"), "counts": {}, "config": CONFIG}
    worse = summarise_run(progress, best, **parts, comparison=a_comparison(num_lost=3))
    assert len(worse["got_worse"]) == 2 and worse["what_to_try"]
    assert worse["objects"] == {"compared": 20, "gained": 0, "lost": 3}
    progress.baseline["per_mask_iou"] = 0.4
    better = summarise_run(progress, best, **parts, comparison=None)
    assert better["got_worse"] == better["what_to_try"] == [] and better["objects"] is None


@pytest.mark.parametrize(
    ("changes", "before", "step", "expected", "absent"),
    [
        ({}, 0.7, 500, ["--learning_rate 1e-05", "--freeze_image_encoder"], ["--image_size"]),
        ({"learning_rate": 1.0}, 0.7, 500, ["--learning_rate 0.0001."], ["earlier"]),
        ({"freeze_image_encoder": True}, 0.7, 500, [], ["--freeze_image_encoder"]),
        ({}, 0.7, 50, ["the first validation was the best"], []),
        ({}, 0.5, 500, ["--image_size, up to 1024", "0.600", "256 px"], []),
        ({"image_size": 1024}, 0.5, 500, [], ["--image_size"]),
    ],
)
def test_advice_fits_the_run(
    changes: dict[str, Any], before: float, step: int, expected: list[str], absent: list[str]
) -> None:
    progress = Progress(baseline={"per_mask_iou": before}, box_fill_iou=0.6)
    best = Checkpoint("name", step, 0.4)
    text = " ".join(suggest_changes({**CONFIG, **changes}, progress, best))
    assert all(part in text for part in expected)
    assert not any(part in text for part in absent)


def test_warnings_are_the_last_log_records(tmp_path, caplog):
    verdict = {"got_worse": ["IoU fell.", "3 objects lost."], "what_to_try": ["Less."]}
    for changes, expected in (({}, 0), (verdict, 2)):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="samft"):
            log_summary(a_summary(tmp_path, **changes), tmp_path, commands=[])
        loud = [r for r in caplog.records if r.levelno >= logging.WARNING]
        assert len(loud) == expected
    assert caplog.messages[-2:] == [
        "WARNING: IoU fell. 3 objects lost.",
        "What to try: Less.",
    ]


def test_the_log_has_scores_files_and_next_commands(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="samft"):
        log_summary(a_summary(tmp_path), tmp_path, commands=["one", "two", "three"])
    score, objects, places, commands = caplog.messages
    assert "0.5000 -> 0.7500 (best at step 40; filling each box: 0.6000) in 1:23" in score
    assert objects == "of 20 objects, 4 gained more than 0.1 IoU and 1 lost as much"
    assert all(
        name in places for name in (str(tmp_path), "40-0.75.ckpt", BEFORE_AFTER, "report.html")
    )
    assert commands.splitlines()[1:] == ["one", "two", "three"]


def test_the_log_counts_the_images_that_could_not_be_used(tmp_path, caplog):
    data = {"train": {"bad_images": {"a": "x", "b": "y"}}, "val": {"bad_images": {"a": "x"}}}
    log_summary(a_summary(tmp_path, data=data), tmp_path, commands=[])
    assert "3 images could not be used; summary.json names them all" in caplog.messages


# What to do next


@pytest.mark.parametrize("folder", ["run", "my run's; rm -rf $HOME", 'a"b\\c', "-x", "ä東"])
def test_commands_can_be_copied_whatever_the_folders_are_called(folder: str) -> None:
    place = Path("/data") / folder
    checkpoint = str(place / "40-0.75.ckpt")
    evaluate, predict, python = next_commands(
        checkpoint,
        data=["--data_root", str(place), "--split", "val"],
        images=place / "images",
        annotations=place / "a.json",
        folder=place,
    )
    assert shlex.split(evaluate) == [
        *("python", "-m", "samft.evaluate", "--checkpoint", checkpoint),
        *("--data_root", str(place), "--split", "val"),
    ]
    assert shlex.split(predict) == [
        *("python", "-m", "samft.predict", "--checkpoint", checkpoint),
        *("--images", str(place / "images"), "--annotations", str(place / "a.json")),
        *("--output_dir", str(place / "predictions")),
    ]
    load = ast.parse(python).body[-1]
    assert isinstance(load, ast.Assign) and isinstance(load.value, ast.Call)
    assert ast.literal_eval(load.value.args[0]) == checkpoint
