"""The test split: its scores are those of validation on it, once, and never fail a run."""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.coco_files import write_coco
from helpers.short_runs import arguments, command_here, evaluate_here, train_here, write_data
from helpers.trainers import LOSS, make_trainer, unreadable, val_batches
from samft.data.dataset import Batch
from samft.distributed import get_rank
from samft.errors import UserError
from samft.evaluation.validation import validate
from samft.models.trainable import freeze
from samft.recipes import final_test
from samft.recipes.final_test import score_models
from samft.runtime.signals import StopInterrupt, StopRequest
from samft.train import main
from samft.weights.download import PACKAGED_TINY

pytestmark = pytest.mark.run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_data(tmp_path_factory.mktemp("data"), num_train=4, num_val=2)
    write_coco(root, 3, split="test", seed=7)
    return root


def short(data: Path, folder: Path, **changes: object) -> list[str]:
    return arguments(data, folder, **{"steps": 2, "metrics_interval": 1, **changes})


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def log_of(folder: Path) -> str:
    return (folder / "train.log").read_text()


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train_here(short(data, folder))
    return folder


def copy_of(run: Path, folder: Path) -> Path:
    shutil.copytree(run, folder)
    return folder


def forbid_scoring(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("scored")

    monkeypatch.setattr(final_test, "_score", fail)


def test_the_scores_are_those_of_a_validation_on_that_split(
    data: Path, run: Path, tmp_path: Path
) -> None:
    summary = summary_of(run)
    test = summary["test"]
    assert (test["images"], test["masks"]) == (3, 7)
    checkpoint = ["--checkpoint", summary["best_checkpoint"], "--device", "cpu"]
    report = evaluate_here([*checkpoint, "--data_root", str(data), "--split", "test"])
    assert test["after"] == pytest.approx(report["per_mask_iou"], abs=1e-12)
    other = train_here(short(data, tmp_path / "other", val_split="test", steps=1))
    assert other["test"] is None  # it was validated on
    assert test["before"] == pytest.approx(other["baseline_val_per_mask_iou"], abs=1e-12)
    assert test["box_fill"] == pytest.approx(other["box_fill_iou"], abs=1e-12)
    low, high = test["interval"]
    assert low <= test["after"] - test["before"] <= high
    assert summary["data"]["test"]["masks"] == 7


def test_the_log_and_the_report_have_a_line_of_it(run: Path) -> None:
    test, log = summary_of(run)["test"], log_of(run)
    lines = [line for line in log.splitlines() if "test: " in line or "test split" in line]
    lines = [line.split(" ", 2)[2] for line in lines if not line.startswith(" ")]
    assert lines[0] == "test: 3 images, 7 masks; scored once, at the end of the run"
    assert lines[1].startswith("scoring the test split with the untouched weights and with ")
    assert f"{test['before']:.4f} -> {test['after']:.4f} on 7 masks of 3 images" in lines[2]
    page = (run / "report.html").read_text()
    assert "test split: IoU before" in page and f"{test['after']:.3f}" in page


@pytest.mark.parametrize(
    ("frozen", "first_block", "last_block"),
    [
        ({"parts": [], "train_blocks": None}, [0, 1] * 3, [0, 1] * 3),
        ({"parts": [], "train_blocks": 1}, [0] * 3, [0, 1] * 3),
        ({"parts": ["image_encoder"], "train_blocks": None}, [0] * 3, [0] * 3),
    ],
)
def test_what_is_frozen_of_the_encoder_runs_once_for_each_image(
    frozen: dict[str, Any], first_block: list[int], last_block: list[int]
) -> None:
    models = [make_trainer().model.eval() for _ in range(2)]
    ran: dict[str, list[int]] = {"first": [], "last": []}
    for number, model in enumerate(models):
        freeze(model.sam, **frozen)
        blocks = model.sam.image_encoder.blocks
        for name, block in (("first", blocks[0]), ("last", blocks[-1])):
            block.register_forward_hook(lambda *_, to=ran[name], model=number: to.append(model))
    tables, _ = score_models(models, val_batches(3), loss=LOSS)
    assert (ran["first"], ran["last"]) == (first_block, last_block)
    rows = validate(models[1], val_batches(3), loss=LOSS).objects
    for table in tables:
        np.testing.assert_array_equal(table.iou_actual, rows.iou_actual)


def test_a_finished_run_is_not_scored_again(
    data: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of(run, tmp_path / "copy")
    argv = short(data, folder)
    with monkeypatch.context() as patch:
        forbid_scoring(patch)
        assert train_here(argv)["test"] == summary_of(run)["test"]
    page = folder / "report.html"
    assert page.read_bytes() == (run / "report.html").read_bytes()
    assert train_here([*argv, "--test_split", "none"])["test"] is None
    # Now it is new again.
    assert train_here(argv)["test"] == summary_of(run)["test"]
    assert page.read_bytes() != (run / "report.html").read_bytes()


def test_other_test_images_are_scored(data: Path, run: Path, tmp_path: Path) -> None:
    folder = copy_of(run, tmp_path / "copy")
    file = write_coco(tmp_path / "other", 2, split="mine", seed=9)
    files = ["--test_annotations", str(file), "--test_images", str(file.parent)]
    test = train_here([*short(data, folder), *files])["test"]
    assert (test["images"], test["masks"]) == (2, 5)


def test_a_stop_leaves_it_to_the_next_start(
    data: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, stop, score_batch = tmp_path / "run", StopRequest(), final_test._score_batch

    def interrupt(*inputs: Any, **options: Any) -> None:
        score_batch(*inputs, **options)
        stop.received.append("SIGTERM")

    monkeypatch.setattr(final_test, "_score_batch", interrupt)
    assert main(short(data, folder), stop=stop)["test"] is None
    assert stop.received == ["SIGTERM"]  # after the first image
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
    assert "the test split was not scored: the run was asked to stop" in log_of(folder)
    monkeypatch.undo()
    assert train_here(short(data, folder))["test"] == summary_of(run)["test"]


def test_what_fails_is_a_sentence_of_a_run_that_is_done(
    data: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug of ours")

    for number, name in enumerate(("_score_batch", "_build_model", "read_state")):
        folder = copy_of(run, tmp_path / f"copy{number}")
        (folder / "summary.json").unlink()
        with monkeypatch.context() as patch:
            patch.setattr(final_test, name, fail)
            assert command_here(short(data, folder)) == 0
        summary = summary_of(folder)
        assert summary["test"] is None and summary["best_step"] == summary_of(run)["best_step"]
        assert "the test split was not scored: " in log_of(folder)
        assert "a bug of ours. All else of the run is complete" in log_of(folder)


def test_other_initial_weights_are_not_taken_for_the_untouched(
    data: Path, run: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "mine.pth"
    shutil.copy(PACKAGED_TINY, weights)
    argv = short(data, tmp_path / "run", checkpoint_path=weights, test_split="none")
    train_here(argv)
    shutil.copy(summary_of(run)["best_checkpoint"], weights)
    argv = short(data, tmp_path / "run", checkpoint_path=weights)
    assert train_here(argv)["test"] is None
    assert "mine.pth does not score as at step 0: it has changed since" in log_of(tmp_path / "run")


class Failing(list[Batch]):
    """Batches whose second cannot be loaded, in a way that no user causes."""

    def __iter__(self) -> Iterator[Batch]:
        yield self[0]
        raise OSError("a worker was killed")


def scored_by_rank(kind: str) -> Any:
    # The second of two ranks fails, or has less to do.
    is_last = get_rank() == 1
    batches, stop = val_batches(3), False
    if kind == "load" and is_last:
        batches = Failing(batches)
    if kind == "unreadable" and is_last:
        batches = [unreadable(7)]
    if kind == "score" and is_last:
        batches[0].boxes = batches[0].boxes[:, :3]
    if kind == "stop":
        stop = is_last
    models = [make_trainer().model.eval()] * 2
    try:
        tables, bad = score_models(models, batches, loss=LOSS, should_stop=lambda: stop)
    except (UserError, StopInterrupt) as error:
        return type(error).__name__, str(error)
    return [table.iou_actual.tolist() for table in tables], bad


def test_all_ranks_have_the_same_scores(gloo2: Any) -> None:
    rows = validate(make_trainer().model.eval(), val_batches(3), loss=LOSS).objects
    assert gloo2.run(scored_by_rank, "whole") == [([rows.iou_actual.tolist()] * 2, {})] * 2
    (tables, bad), other = gloo2.run(scored_by_rank, "unreadable")
    assert (tables, bad) == other and bad == {"7.jpg": "cut short"} and len(tables[0])


@pytest.mark.parametrize("kind", ["load", "score", "stop"])
def test_what_fails_on_one_rank_ends_it_on_all(gloo2: Any, kind: str) -> None:
    expected = {
        "load": ("SharedError", "an image cannot be loaded: a worker was killed"),
        "score": ("SharedError", "image 1 cannot be scored: "),
        "stop": ("StopInterrupt", ""),
    }[kind]
    for name, reason in gloo2.run(scored_by_rank, kind):
        assert name == expected[0] and reason.startswith(expected[1])


def test_a_broken_test_split_is_refused_only_if_it_was_named(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = copy_of(data, tmp_path / "data")
    (root / "test/image_1.png").unlink()
    with caplog.at_level(logging.INFO, logger="samft"):
        assert train_here(short(root, tmp_path / "run", steps=1))["test"] is None
    assert "test_split auto: nothing is scored at the end of the run" in caplog.text
    assert "image-missing, 1" in caplog.text
    assert command_here(short(root, tmp_path / "named", test_split="test")) == 2
    assert not (tmp_path / "named/last.ckpt").exists()
