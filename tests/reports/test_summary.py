"""The summary of a run: the verdict, advice, log records and next commands."""

import ast
import logging
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from samft.annotations.boxes import SmallObjects
from samft.checkpoints.top_k import Checkpoint
from samft.commands import shell_command
from samft.config import TrainConfig
from samft.evaluation.object_scores import Comparison, ObjectScores
from samft.reports.summary import (
    find_general_regressions,
    find_regressions,
    find_test_regressions,
    log_summary,
    next_commands,
    suggest_changes,
    suggest_forgetting_less,
    summarise_run,
)
from samft.reports.validation_images import BEFORE_AFTER
from samft.training.engine import Progress

CONFIG = {**vars(TrainConfig()), "image_size": 256}


DEFAULTS = vars(TrainConfig())
ROOMY = {"val": SmallObjects(256, 20, 5, 256, 5, 5)}  # a quarter is too small, which is not many
CRAMPED = {
    "train": SmallObjects(256, 40, 12, 320, 9, 12),
    "val": SmallObjects(256, 20, 15, 512, 4, 15),
}


def a_comparison(
    *, num_lost: int, num_gained: int = 0, num: int = 20, box_fill: float = 0.4
) -> Comparison:
    def rows(iou: np.ndarray) -> ObjectScores:
        ids, filled = np.arange(num), np.full(num, box_fill)
        return ObjectScores(ids, ids, np.full(num, 9.0), iou, iou, filled)

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
        "above_box_fill": 0.15,
        "best_checkpoint": str(folder / "40-0.75.ckpt"),
        "wall_seconds": 83.0,
        "objects": {
            "compared": 20,
            "gained": 4,
            "lost": 1,
            "above_box_fill": 15,
            "images": 4,
            "change": {"difference": 0.15, "interval": [0.1, 0.2]},
        },
        "test": None,
        "general": None,
        "data": {"train": {"bad_images": {}}, "val": {"bad_images": {}}},
        **changes,
    }


# The verdict

BETTER = "Better than their filled boxes are"


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
def test_what_got_worse_is_described_with_its_numbers(
    after: float | None, num_lost: int, expected: list[str]
) -> None:
    comparison = a_comparison(num_lost=num_lost, num_gained=5 * (num_lost < 15))
    sentences = find_regressions(0.5, after, box_fill_iou=0.4, comparison=comparison)
    assert len(sentences) == len(expected)
    assert all(part in text for part, text in zip(expected, sentences, strict=True))


@pytest.mark.parametrize(
    ("before", "after", "fell", "lost_to_boxes"),
    [
        (0.5, 0.7, False, False),  # rose, above the boxes
        (0.7, 0.65, True, False),  # fell, still above
        (0.4, 0.5, False, True),  # rose, but stays below
        (0.7, 0.5, True, True),
        (0.5, 0.6, False, False),  # as good as the boxes
    ],
)
def test_no_run_is_a_success_that_loses_to_filling_each_box(
    before: float, after: float, fell: bool, lost_to_boxes: bool
) -> None:
    comparison = a_comparison(num_lost=0, num_gained=5, box_fill=0.6)
    sentences = find_regressions(before, after, box_fill_iou=0.6, comparison=comparison)
    assert len(sentences) == fell + lost_to_boxes
    if fell:
        assert f"fell from {before:.4f} at step 0 to {after:.4f}" in sentences[0]
    if lost_to_boxes:
        assert "worse than no model at all" in sentences[-1]
        assert "score 0.5000, 0.1000 below filling each box (0.6000)." in sentences[-1]
        assert sentences[-1].endswith(f"{BETTER} 5 of 20 objects (25%).")


def test_means_are_compared_without_object_scores() -> None:
    assert find_regressions(0.5, 0.6, box_fill_iou=0.3, comparison=None) == []
    assert len(find_regressions(0.5, 0.4, box_fill_iou=0.3, comparison=None)) == 1
    (sentence,) = find_regressions(0.5, 0.6, box_fill_iou=0.7, comparison=None)
    assert "0.1000 below filling each box" in sentence and BETTER not in sentence


def a_test(before: float, after: float, **changes: Any) -> dict[str, Any]:
    scores = {"images": 4, "masks": 20, "before": before, "after": after, "box_fill": 0.6}
    return {**scores, "interval": [-0.25, -0.125], "bad_images": {}, **changes}


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (0.65, 0.7, []),
        (0.7, 0.7, []),
        (0.75, 0.7, ["fell from 0.7500 to 0.7000; the mean change on other images like these is "]),
        (0.5, 0.55, ["score 0.5500, 0.0500 below filling each box (0.6000)."]),
        (0.7, 0.5, ["fell from 0.7000 to 0.5000", "0.1000 below filling each box"]),
    ],
)
def test_a_test_split_that_got_worse_is_described(
    before: float, after: float, expected: list[str]
) -> None:
    sentences = find_test_regressions(a_test(before, after))
    assert len(sentences) == len(expected)
    for part, text in zip(expected, sentences, strict=True):
        assert text.startswith("On the test split, ") and part in text
    for text in find_test_regressions(a_test(before, after, interval=None)):
        assert "interval" not in text


def test_a_worse_test_split_is_part_of_the_verdict() -> None:
    best = Checkpoint("10-0.75.ckpt", 10, 0.75)
    progress = Progress(step=20, baseline={"per_mask_iou": 0.5}, box_fill_iou=0.3)
    parts: dict[str, Any] = {"folder": Path("run"), "config": CONFIG, "comparison": None}
    parts |= {"defaults": DEFAULTS, "small_objects": ROOMY}
    parts["counts"] = {"test": {"images": 5, "bad_images": {"a.png": "image-empty"}}}
    test = a_test(0.75, 0.7, bad_images={"b.png": "cut short"})
    worse = summarise_run(progress, best, **parts, test=test)
    assert len(worse["got_worse"]) == 1 and worse["what_to_try"] and worse["test"] == test
    assert set(worse["data"]["test"]["bad_images"]) == {"a.png", "b.png"}
    better = summarise_run(progress, best, **parts, test=a_test(0.6, 0.7))
    assert better["got_worse"] == better["what_to_try"] == []
    assert summarise_run(progress, best, **parts)["test"] is None


def a_general_set(after: float, **changes: Any) -> dict[str, Any]:
    scores = {**a_test(0.5, after), "gained": 1, "lost": 0, "interval": [-0.2, -0.1]}
    return {**scores, **changes}


@pytest.mark.parametrize(
    ("general", "expected"),
    [
        (a_general_set(0.4), "from 0.5000 to 0.4000; the mean change on other images like these"),
        (a_general_set(0.49, interval=[-0.03, 0.01]), ""),  # it may be chance
        (a_general_set(0.49, interval=[-0.03, 0.0]), ""),
        (a_general_set(0.4, interval=None), "from 0.5000 to 0.4000. 0 of 20 objects (0%)"),
        (a_general_set(0.55, interval=[0.01, 0.1], lost=2), ""),  # a tenth is not more than that
        (a_general_set(0.55, interval=[0.01, 0.1], lost=3), "3 of 20 objects (15%) lost more"),
        (a_general_set(0.4, lost=7), "7 of 20 objects (35%) lost more than 0.1 IoU; 1 gain"),
    ],
)
def test_what_is_forgotten_is_described_unless_it_may_be_chance(
    general: dict[str, Any], expected: str
) -> None:
    sentences = find_general_regressions(general)
    assert len(sentences) == bool(expected)
    for text in sentences:
        assert text.startswith("On the general set, ") and expected in text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "--anchor_weight 30,"),
        ({"anchor_weight": 30.0}, "--anchor_weight 90,"),
        ({"learning_rate": 0.07}, "--anchor_weight 14,"),  # 1 / 0.07 and more are refused
        ({"learning_rate": 1e-3, "encoder_learning_rate": 0.07}, "--anchor_weight 14,"),
        ({"learning_rate": 0.07, "anchor_weight": 14.0}, ""),
        ({"anchor_weight": 0.1}, "--anchor_weight 0.3,"),
    ],
)
def test_advice_against_forgetting_names_averages_then_the_anchor(
    changes: dict[str, Any], expected: str
) -> None:
    average, *anchor = suggest_forgetting_less({**CONFIG, **changes})
    assert "samft average" in average and len(anchor) == bool(expected)
    for text in anchor:
        assert expected in text
        weight = float(text.split("--anchor_weight ")[1].split(",")[0])
        given = {**CONFIG, "model_type": "vit_b", "checkpoint_path": "auto", "data_root": "D"}
        settings = {**given, **changes, "anchor_weight": weight}
        assert TrainConfig(**settings).check() == []


def test_what_is_forgotten_is_part_of_the_verdict_with_advice_of_its_own() -> None:
    best = Checkpoint("10-0.75.ckpt", 10, 0.75)
    progress = Progress(step=20, baseline={"per_mask_iou": 0.5}, box_fill_iou=0.3)
    progress.bad_images = {"general": {"c.png": "cut short"}}
    parts: dict[str, Any] = {"folder": Path("run"), "config": CONFIG, "comparison": None}
    parts |= {"defaults": DEFAULTS, "small_objects": ROOMY}
    parts["counts"] = {"general": {"images": 5, "bad_images": {"a.png": "image-empty"}}}
    general = a_general_set(0.4, bad_images={"b.png": "cut short"})
    worse = summarise_run(progress, best, **parts, general=general)
    assert len(worse["got_worse"]) == 1 and worse["general"] == general
    assert worse["what_to_try"] == suggest_forgetting_less(CONFIG)
    assert set(worse["data"]["general"]["bad_images"]) == {"a.png", "b.png", "c.png"}
    both = summarise_run(progress, best, **parts, general=general, test=a_test(0.75, 0.7))
    assert len(both["got_worse"]) == 2 and both["what_to_try"][-2:] == worse["what_to_try"]
    own = summarise_run(
        progress, best, **parts, general=general, test=a_test(0.75, 0.7), has_files=False
    )["what_to_try"]
    assert len(own) == len(both["what_to_try"]) and "samft check" in " ".join(both["what_to_try"])
    assert "samft check" not in " ".join(own)
    assert "average, of the weights before and after, with the validation data as a COCO" in own[-2]
    kept = summarise_run(progress, best, **parts, general=a_general_set(0.6, interval=[0.05, 0.2]))
    assert kept["got_worse"] == kept["what_to_try"] == []


def test_the_summary_holds_the_verdict_and_advice() -> None:
    best = Checkpoint("10-0.45.ckpt", 10, 0.45)
    progress = Progress(step=20, baseline={"per_mask_iou": 0.5}, box_fill_iou=0.3)
    parts: dict[str, Any] = {"folder": Path("run"), "counts": {}, "config": CONFIG}
    parts |= {"defaults": DEFAULTS, "small_objects": ROOMY}
    worse = summarise_run(progress, best, **parts, comparison=a_comparison(num_lost=3))
    assert len(worse["got_worse"]) == 2 and worse["what_to_try"]
    objects = worse["objects"]
    counts = {"compared": 20, "images": 20, "gained": 0, "lost": 3, "above_box_fill": 17}
    assert {name: objects[name] for name in counts} == counts
    low, high = objects["change"]["interval"]  # each object is alone in its image: 3 of 20 lost 0.2
    assert objects["change"]["difference"] == pytest.approx(-0.03)
    # The number that lost is binomial: the 2.5th percentile of B(20, 0.15) is 0, the 97.5th is 6.
    assert (low, high) == pytest.approx((-0.06, 0.0))
    progress.baseline["per_mask_iou"] = 0.4
    better = summarise_run(progress, best, **parts, comparison=None)
    assert better["got_worse"] == better["what_to_try"] == [] and better["objects"] is None
    assert better["above_box_fill"] == pytest.approx(0.15)
    assert better["too_small"]["val"] == {
        "image_size": 256,
        "num_objects": 20,
        "num_small": 5,
        "suggested_image_size": 256,
        "num_small_then": 5,
        "num_small_in_windows": 5,
        "in_windows": False,
    }
    progress.box_fill_iou = 0.6
    below = summarise_run(progress, best, **parts, comparison=None)
    assert below["above_box_fill"] == pytest.approx(-0.15)
    assert len(below["got_worse"]) == 1 and below["what_to_try"]
    none = summarise_run(progress, None, **parts, comparison=None)
    assert none["above_box_fill"] is None and len(none["got_worse"]) == 1


def advice_for(
    changes: dict[str, Any], *, before: float, after: float = 0.4, step: int = 500, **parts: Any
) -> list[str]:
    progress = Progress(baseline={"per_mask_iou": before}, box_fill_iou=0.6)
    given: dict[str, Any] = {"defaults": DEFAULTS, "small_objects": ROOMY, **parts}
    best = Checkpoint("name", step, after)
    return suggest_changes({**CONFIG, **changes}, progress, best=best, **given)


@pytest.mark.parametrize(
    ("changes", "before", "step", "expected", "absent"),
    [
        ({}, 0.7, 500, ["--learning_rate 1e-05", "--freeze_image_encoder"], ["--image_size"]),
        ({"learning_rate": 1.0}, 0.7, 500, ["--learning_rate 0.0001."], ["earlier"]),
        ({"freeze_image_encoder": True}, 0.7, 500, [], ["--freeze_image_encoder"]),
        ({}, 0.7, 50, ["the first validation was the best"], []),
        ({"metrics_interval": 1}, 0.7, 1, [], ["--metrics_interval"]),
        ({"freeze_mask_decoder": True}, 0.7, 500, [], ["--freeze_image_encoder"]),
        ({}, 0.7, 500, ["More images, or --augment scale."], []),
        ({"augment": "scale"}, 0.7, 500, ["More images."], ["--augment"]),
        ({"cache_embeddings": "on"}, 0.7, 500, ["More images."], ["--augment"]),
        (
            {"train_blocks": 2, "encoder_learning_rate": 1e-5},
            0.7,
            500,
            ["--freeze_image_encoder instead of --train_blocks and --encoder_learning_rate:"],
            [],
        ),
        (
            {"lora_rank": 2, "lora_decoder": True},
            0.7,
            500,
            ["--freeze_image_encoder instead of --lora_rank and --lora_decoder:"],
            [],
        ),
    ],
)
def test_advice_fits_the_run(
    changes: dict[str, Any], before: float, step: int, expected: list[str], absent: list[str]
) -> None:
    text = " ".join(advice_for(changes, before=before, step=step))
    assert all(part in text for part in expected)
    assert not any(part in text for part in absent)


@pytest.mark.parametrize(
    ("before", "after", "rate", "steps"),
    [
        (0.7, 0.65, True, False),  # fell, above the boxes
        (0.7, 0.5, True, False),  # fell, below
        (0.4, 0.5, False, True),  # rose, but stays below the boxes
        (0.5, 0.5, False, True),  # did not fall
        (0.5, 0.7, True, False),  # rose above the boxes, but single objects lost
    ],
)
def test_a_rate_that_raised_the_score_is_not_lowered(
    before: float, after: float, rate: bool, steps: bool
) -> None:
    text = " ".join(advice_for({"steps": 300}, before=before, after=after))
    assert ("A lower learning rate: --learning_rate 1e-05." in text) == rate
    assert ("More steps: --steps 600." in text) == steps


def test_advice_names_the_loss_then_the_image_size_then_the_rate() -> None:
    loss, size, rate, *_ = advice_for(
        {"loss_resolution": "input"},
        before=0.7,
        small_objects=CRAMPED,
    )
    assert loss.startswith("The default --loss_resolution window:")
    assert size.startswith("Larger objects: 15 of 20 val objects (75.0%) are too small")
    assert "--image_size 512 leaves 4 of them, at 4.0 times the time" in size
    assert rate.startswith("A lower learning rate:")


def test_advice_does_not_name_what_is_as_it_should_be() -> None:
    first = advice_for({}, before=0.7)[0]
    assert first.startswith("A lower learning rate:")


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


def test_the_log_names_no_file_that_is_not_there(tmp_path, caplog):
    (tmp_path / "summary.json").touch()
    with caplog.at_level(logging.INFO, logger="samft"):
        log_summary(a_summary(tmp_path, best_checkpoint=None), tmp_path, commands=[])
    assert f"all results are in {tmp_path}: summary.json" in caplog.messages


def test_the_log_has_scores_files_and_next_commands(tmp_path, caplog):
    for name in ("40-0.75.ckpt", BEFORE_AFTER, "report.html"):
        (tmp_path / name).touch()
    with caplog.at_level(logging.INFO, logger="samft"):
        log_summary(a_summary(tmp_path), tmp_path, commands=["one", "two", "three"])
    score, objects, places, commands = caplog.messages
    assert score == (
        "done: val_per_mask_iou 0.5000 -> 0.7500 (best at step 40), "
        "0.1500 above filling each box (0.6000), in 1:23"
    )
    assert objects == (
        "of 20 objects in 4 images, 4 gained more than 0.1 IoU and 1 lost as much; "
        "better than their filled boxes are 15 of 20 objects (75%); "
        "the mean change on other images like these is +0.100 to +0.200 (95 % interval)"
    )
    assert all(
        name in places for name in (str(tmp_path), "40-0.75.ckpt", BEFORE_AFTER, "report.html")
    )
    assert commands.splitlines()[1:] == ["one", "two", "three"]


def test_the_log_has_the_scores_of_the_test_split(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="samft"):
        log_summary(a_summary(tmp_path, test=a_test(0.5, 0.7)), tmp_path, commands=[])
    assert caplog.messages[2] == (
        "test split: per_mask_iou 0.5000 -> 0.7000 on 20 masks of 4 images, 0.1000 above filling "
        "each box (0.6000); the mean change on other images like these is -0.250 to -0.125 (95 % "
        "interval)"
    )


def test_the_log_has_the_scores_of_the_general_set(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="samft"):
        log_summary(a_summary(tmp_path, general=a_general_set(0.4, lost=7)), tmp_path, commands=[])
    assert caplog.messages[2] == (
        "general set: per_mask_iou 0.5000 -> 0.4000 on 20 masks of 4 images, of which 1 gained "
        "more than 0.1 IoU and 7 lost as much; the mean change on other images like these is "
        "-0.200 to -0.100 (95 % interval)"
    )


@pytest.mark.parametrize(
    ("after", "expected"),
    [(0.55, "0.0500 below filling each box (0.6000)"), (None, "not comparable with filling")],
)
def test_the_log_says_how_the_result_stands_to_filling_each_box(
    after: float | None, expected: str, tmp_path, caplog
) -> None:
    with caplog.at_level(logging.INFO, logger="samft"):
        log_summary(a_summary(tmp_path, best_val_per_mask_iou=after), tmp_path, commands=[])
    assert expected in caplog.messages[0]


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
        links=["--allow_links", str(place)],
        folder=place,
    )
    assert shlex.split(evaluate) == [
        *shlex.split(shell_command("evaluate", "--checkpoint", checkpoint)),
        *("--data_root", str(place), "--split", "val"),
    ]
    assert shlex.split(predict) == [
        *shlex.split(shell_command("predict", "--checkpoint", checkpoint)),
        *("--images", str(place / "images"), "--annotations", str(place / "a.json")),
        *("--allow_links", str(place)),
        *("--output_dir", str(place / "predictions")),
    ]
    load = ast.parse(python).body[-1]
    assert isinstance(load, ast.Assign) and isinstance(load.value, ast.Call)
    assert ast.literal_eval(load.value.args[0]) == checkpoint
