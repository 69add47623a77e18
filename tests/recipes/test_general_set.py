"""A general set: scored as validation is; it changes nothing of a run, though ids may be equal."""

import json
import logging
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import ANY

import cv2
import numpy as np
import pytest

import samft
from helpers.cached_runs import cached_arguments, counted_encodings
from helpers.coco_files import write_coco
from helpers.equal_metrics import check_equal_metrics
from helpers.gloo_pool import GlooPool
from helpers.own_datasets import Discs
from helpers.short_runs import (
    a_config,
    arguments,
    command_here,
    evaluate_here,
    largest_difference,
    read_metrics,
    train_here,
    write_data,
)
from helpers.tiny_checkpoint import tiny_sam, write_tiny
from samft import average
from samft.errors import ConfigError, DataError, RunStopped
from samft.evaluation.validation import Validation
from samft.recipes import final_test, fit
from samft.recipes.datasets import load_splits
from samft.runtime.metrics_file import GENERAL_PREFIX
from samft.runtime.signals import StopRequest
from samft.train import main
from samft.training.engine import Progress

pytestmark = pytest.mark.run

SHORT: dict[str, Any] = {"steps": 4, "metrics_interval": 2, "trackers": "none"}
IOU = f"{GENERAL_PREFIX}per_mask_iou"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), num_train=5, num_val=3)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other images, by the ids and names that those of `data` have."""
    root = tmp_path_factory.mktemp("other")
    write_coco(root, 5, split="val", seed=9, sizes=((64, 64), (50, 70)))
    return root


@pytest.fixture(scope="module")
def run(data: Path, other: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train_here(arguments(data, folder, **SHORT, general_data_root=other))
    return folder


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def evaluated(checkpoint: str, root: Path, split: str = "val") -> float:
    argv = ["--checkpoint", checkpoint, "--data_root", str(root), "--split", split]
    return float(evaluate_here([*argv, "--device", "cpu"])["per_mask_iou"])


def untouched(data: Path, folder: Path, root: Path, split: str = "val") -> float:
    """What the untouched weights score as the validation split of a run."""
    files = {"val_annotations": root / split / "_annotations.coco.json"}
    files["val_images"] = root / split
    summary = train_here(arguments(data, folder, **{**SHORT, **files, "steps": 1}))
    return float(summary["baseline_val_per_mask_iou"])


def without_times(line: dict[str, Any]) -> dict[str, Any]:
    return {n: v for n, v in line.items() if "second" not in n and n != "peak_memory_gib"}


def test_a_run_with_it_is_the_run_without_it(data: Path, run: Path, tmp_path: Path) -> None:
    train_here(arguments(data, tmp_path, **SHORT))
    assert largest_difference(tmp_path, run) == 0.0
    for ours, theirs in zip(read_metrics(run), read_metrics(tmp_path), strict=True):
        own = {n: v for n, v in ours.items() if not n.startswith(GENERAL_PREFIX)}
        assert without_times(own) == without_times(theirs)
        general = {n.removeprefix(GENERAL_PREFIX) for n in ours.keys() - own.keys()}
        measured = {"loss", "loss_focal", "loss_dice", "loss_iou", "iou_predicted", "per_mask_iou"}
        assert general == (measured if ours["split"] == "val" else set())
    with_it, alone = summary_of(run), summary_of(tmp_path)
    assert with_it["objects"] == alone["objects"] and alone["general"] is None
    assert with_it["best_step"] == alone["best_step"]
    assert with_it["data"]["general"] == {"images": 5, "masks": 17, "skipped": {}, "bad_images": {}}
    for name in ("before.png", "after.png"):
        assert (run / name).read_bytes() == (tmp_path / name).read_bytes()


def test_its_scores_are_those_of_evaluate(
    data: Path, other: Path, run: Path, tmp_path: Path
) -> None:
    summary, lines = summary_of(run), read_metrics(run, "val")
    general = summary["general"]
    assert (general["images"], general["masks"], general["since_step"]) == (5, 17, 0)
    by_step = {line["step"]: line[IOU] for line in lines}
    assert general["before"] == pytest.approx(by_step[0], abs=1e-12)
    assert general["after"] == pytest.approx(by_step[summary["best_step"]], abs=1e-12)
    assert general["after"] == pytest.approx(evaluated(summary["best_checkpoint"], other), abs=1e-6)
    assert general["before"] == pytest.approx(untouched(data, tmp_path, other), abs=1e-6)
    low, high = general["interval"]
    assert low <= general["after"] - general["before"] <= high
    sidecar = json.loads(Path(summary["best_checkpoint"]).with_suffix(".json").read_text())
    assert sidecar["metrics"][IOU] == by_step[summary["best_step"]]


def test_the_log_and_the_report_have_it(run: Path) -> None:
    general, log = summary_of(run)["general"], (run / "train.log").read_text()
    assert "general: 5 images, 17 masks; other data, scored at each validation" in log
    assert f"step 0: general_per_mask_iou {general['before']:.4f} before training" in log
    last = read_metrics(run, "val")[-1][IOU]
    assert f"general IoU {last:.4f} ({last - general['before']:+.4f})" in log
    assert f"general set: per_mask_iou {general['before']:.4f} -> {general['after']:.4f}" in log
    page = (run / "report.html").read_text()
    assert "IoU of the general set" in page and f"{general['after']:.3f}" in page


def test_two_processes_score_each_of_its_objects_once(
    gloo2: GlooPool, data: Path, other: Path, run: Path, tmp_path: Path
) -> None:
    argv = arguments(data, tmp_path, **SHORT, general_data_root=other, batch_size=1)
    assert gloo2.run(command_here, argv) == [0, 0]
    for ours, theirs in zip(read_metrics(tmp_path, "val"), read_metrics(run, "val"), strict=True):
        assert ours[IOU] == pytest.approx(theirs[IOU], abs=1e-6 if not ours["step"] else 1e-3)
    summary, expected = summary_of(tmp_path), summary_of(run)["general"]
    general = summary["general"]
    assert (general["masks"], general["fingerprint"]) == (17, expected["fingerprint"])
    assert general["after"] == pytest.approx(evaluated(summary["best_checkpoint"], other), abs=1e-6)


def test_a_resumed_run_goes_on_with_it(data: Path, other: Path, run: Path, tmp_path: Path) -> None:
    argv = arguments(data, tmp_path, **SHORT, general_data_root=other)
    assert command_here([*argv, "--stop_after", "3"]) == 75
    assert command_here(argv) == 0
    check_equal_metrics(tmp_path, run, rel=0)
    assert summary_of(tmp_path)["general"] == summary_of(run)["general"]


def test_a_stop_while_it_is_scored_loses_nothing(
    data: Path, other: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv, stop, validate = arguments(data, tmp_path, **SHORT), StopRequest(), fit.validate
    argv += ["--general_data_root", str(other)]
    sources: list[str] = []

    def interrupt(*inputs: Any, **options: Any) -> Validation:
        sources.append(options.get("source", ""))
        if sources == ["", "general ", "", "general "]:  # of step 2
            stop.received.append("SIGTERM")
        return validate(*inputs, **options)

    with monkeypatch.context() as patch:
        patch.setattr(fit, "validate", interrupt)
        with pytest.raises(RunStopped):
            main(argv, stop=stop)
    assert [line["step"] for line in read_metrics(tmp_path)] == [0]
    train_here(argv)
    check_equal_metrics(tmp_path, run, rel=0)
    assert summary_of(tmp_path)["general"] == summary_of(run)["general"]


def test_a_resumed_run_is_scored_anew_on_another_one(
    data: Path, other: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    another = tmp_path / "another"
    write_coco(another, 4, seed=11)  # one file, of whatever name
    folder = tmp_path / "run"
    argv = arguments(data, folder, **SHORT)
    assert command_here([*argv, "--general_data_root", str(other), "--stop_after", "3"]) == 75
    argv += ["--general_data_root", str(another)]
    assert command_here(argv) == 0
    assert largest_difference(folder, run) == 0.0
    general, best = summary_of(folder)["general"], summary_of(folder)["best_checkpoint"]
    assert (general["images"], general["since_step"]) == (4, 4)
    before, after = (
        untouched(data, tmp_path / "untouched", another, "train"),
        evaluated(best, another, "train"),
    )
    assert [general["before"], general["after"]] == pytest.approx([before, after], abs=1e-6)
    log = (folder / "train.log").read_text()
    assert "what metrics.jsonl has of steps up to 3 is not of them" in log
    page = (folder / "report.html").read_text()
    assert f"{general['before']:.3f}" in page

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("scored")

    monkeypatch.setattr(final_test, "_score", fail)
    assert train_here(argv)["general"] == general  # once


def test_nothing_of_an_earlier_one_is_taken_for_another_ones() -> None:
    bad = {"val": {"a.png": "cut short"}, "general": {"a.png": "cut short"}}
    progress = Progress(general_set="one", baseline={"per_mask_iou": 0.5, IOU: 0.4}, bad_images=bad)
    for fingerprint, logged_step, since in (
        ("one", 7, 0),
        ("two", 7, 8),
        ("", 9, 10),
        ("two", 9, 10),
    ):
        splits = SimpleNamespace(general_fingerprint=fingerprint)
        fit._check_general_set(
            SimpleNamespace(progress=progress, splits=splits, logged_step=logged_step)  # type: ignore
        )
        assert (progress.general_set, progress.general_since) == (fingerprint, since)
        assert set(progress.baseline) == {"per_mask_iou", *[IOU] * (not since)}
        assert set(progress.bad_images) == {"val", *["general"] * (not since)}


# With a cache of embeddings


@pytest.fixture
def overlapping(data: Path, other: Path, tmp_path: Path) -> Path:
    """The general set, one of whose five images is one of the three that are validated on."""
    root = tmp_path / "overlapping"
    shutil.copytree(other, root)
    shutil.copy(data / "val/image_0.png", root / "val/image_0.png")
    return root


def test_it_is_cached_beside_the_validation_images(
    data: Path, overlapping: Path, tmp_path: Path
) -> None:
    settings = {**SHORT, "general_data_root": overlapping, "cache_dtype": "float32"}
    settings |= {"batch_size": 1, "test_split": "none"}
    train_here(cached_arguments(data, tmp_path / "off", **settings, cache_embeddings="off"))
    with counted_encodings() as counts:
        train_here(cached_arguments(data, tmp_path / "on", **settings))
    assert sum(counts) == 2 * 5 + 3 + 5 - 1  # the image that is in both sets once
    check_equal_metrics(tmp_path / "on", tmp_path / "off", rel=0)
    for ours, theirs in zip(
        *(read_metrics(tmp_path / n, "val") for n in ("on", "off")), strict=True
    ):
        assert ours[IOU] == theirs[IOU]
    with counted_encodings() as counts:
        argv = cached_arguments(data, tmp_path / "again", **settings, seed=1)
        train_here([*argv, "--cache_dir", str(tmp_path / "on/embeddings")])
    assert not counts


def test_without_room_for_it_the_others_are_cached(
    data: Path, other: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {**SHORT, "cache_dtype": "float32", "batch_size": 1}
    alone = cached_arguments(data, tmp_path / "alone", **settings)
    with counted_encodings() as counts:
        train_here(alone)
    assert sum(counts) == 2 * 5 + 3
    gib = 14 * 128 * 4 * 4 * 4 / 2**30  # 14 embeddings, of which 13 are theirs
    settings |= {"cache_max_gib": gib, "general_data_root": other}
    with caplog.at_level(logging.WARNING, logger="samft"):
        train_here(cached_arguments(data, tmp_path / "with", **settings))
    assert "the embeddings of general_data_root are not cached, because " in caplog.text
    assert largest_difference(tmp_path / "with", tmp_path / "alone") == 0.0
    assert summary_of(tmp_path / "with")["general"]["masks"] == 17


def test_whether_to_cache_does_not_depend_on_it(data: Path, tmp_path: Path) -> None:
    large = tmp_path / "large"
    write_coco(large, 40, objects=(1,), seed=5)
    settings = {**SHORT, "cache_embeddings": "auto", "batch_size": 4, "metrics_interval": 1}
    train_here(cached_arguments(data, tmp_path / "alone", **settings))
    train_here(cached_arguments(data, tmp_path / "with", **settings, general_data_root=large))
    assert (tmp_path / "alone/embeddings").is_dir()
    assert largest_difference(tmp_path / "with", tmp_path / "alone") == 0.0


# What a user can get wrong


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("nowhere", "nowhere does not exist: give the folder of a dataset"),
        ("file.json", "file.json is no folder: give the folder of a dataset"),
        ("empty", "has no split val or valid or validation"),
        ("two", "a folder with a validation split, or with a single COCO file"),
        ("no_objects", "no-objects"),
        ("broken", "image-missing, 1"),
    ],
)
def test_a_folder_that_is_no_general_set_is_a_sentence(
    place: str, expected: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for split in ("train", "test"):
        write_coco(tmp_path / "two", 2, split=split)
    empty = write_coco(tmp_path / "no_objects", 2, split="val")
    empty.write_text(json.dumps({**json.loads(empty.read_text()), "annotations": []}))
    (write_coco(tmp_path / "broken", 2, split="val").parent / "image_1.png").unlink()
    argv = arguments(data, tmp_path / "run", **SHORT, general_data_root=tmp_path / place)
    assert command_here(argv) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert expected in error and "Traceback" not in error
    assert not (tmp_path / "run/last.ckpt").exists()


def damage_pixels(path: Path) -> None:
    """Leaves the ends of a PNG file whole, so that it shows only when it is decoded."""
    content = path.read_bytes()
    path.write_bytes(content[:300] + bytes(300) + content[600:])


def test_images_that_cannot_be_read_are_left_out_or_refused(
    data: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "other"
    shutil.copytree(other, root)
    load_splits(a_config(data, general_data_root=root))  # which indexes them, whole as they are
    damage_pixels(root / "val/image_1.png")
    argv = arguments(data, tmp_path / "run", **SHORT, general_data_root=root)
    assert train_here([*argv, "--on_bad_image", "skip"])["general"]["masks"] == 13
    summary = summary_of(tmp_path / "run")
    assert set(summary["data"]["general"]["bad_images"]) == {"image_1.png"}
    assert not summary["data"]["val"]["bad_images"]  # one of that name, too
    for number in (0, 2, 3, 4):
        damage_pixels(root / f"val/image_{number}.png")
    argv = arguments(data, tmp_path / "none", **SHORT, general_data_root=root)
    assert command_here([*argv, "--on_bad_image", "skip"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "none of the 5 images of general_data_root can be used" in error


def test_a_dry_run_counts_it(data: Path, other: Path, tmp_path: Path, caplog: Any) -> None:
    with caplog.at_level(logging.INFO, logger="samft"):
        argv = arguments(data, tmp_path, **SHORT, general_data_root=other, dry_run=True)
        assert command_here(argv) == 0
    assert "general: 5 images, 17 masks" in caplog.text
    assert not list(tmp_path.iterdir())


def test_finetune_gives_its_scores(data: Path, other: Path, run: Path, tmp_path: Path) -> None:
    config = a_config(data, tmp_path, **SHORT, general_data_root=other)
    seen: list[dict[str, float]] = []
    result = samft.finetune(config, callbacks=[lambda _, numbers: seen.append(numbers)])
    general = summary_of(run)["general"]
    assert result.scores[IOU] == pytest.approx(general["after"], abs=1e-12)
    assert result.baseline[IOU] == pytest.approx(general["before"], abs=1e-12)
    assert seen[0][f"val/{IOU}"] == result.baseline[IOU]


def test_beside_own_datasets_it_is_read_as_the_settings_say(other: Path, tmp_path: Path) -> None:
    root = tmp_path / "other"
    shutil.copytree(other, root)
    for path in root.rglob("*.png"):
        cv2.imwrite(str(path), cv2.imread(str(path)).astype(np.uint16) * 100)
    settings = {**SHORT, "steps": 2, "general_data_root": root, "pixel_range": "0,25500"}
    config = replace(a_config(Path("unused"), tmp_path / "run", **settings), data_root=None)
    own = {"train_data": Discs(4), "val_data": Discs(2, seed=1)}
    result = samft.finetune(config, **own)  # ids and names are equal here, too
    general = result.summary["general"]
    assert general["masks"] == 17
    assert general["after"] == pytest.approx(evaluated(str(result.best_checkpoint), root), abs=1e-6)
    with pytest.raises(ConfigError, match="data_root: has no effect with train_data and val_data"):
        samft.finetune(replace(config, data_root=str(root)), **own)
    with pytest.raises(ConfigError, match="pixel_range: has no effect with train_data and val_dat"):
        samft.finetune(replace(config, general_data_root=None), **own)


def test_tokens_that_enter_the_first_trained_block_are_cached_for_it_too(
    data: Path, other: Path, tmp_path: Path
) -> None:
    settings = {**SHORT, "train_blocks": 1, "batch_size": 1, "cache_dtype": "float32"}
    for name, cache in (("off", "off"), ("on", "on")):
        argv = arguments(data, tmp_path / name, **settings, general_data_root=other)
        train_here([*argv, "--cache_embeddings", cache])
    check_equal_metrics(tmp_path / "on", tmp_path / "off")
    pairs = zip(*(read_metrics(tmp_path / name, "val") for name in ("on", "off")), strict=True)
    assert all(ours[IOU] == pytest.approx(theirs[IOU], abs=1e-6) for ours, theirs in pairs)
    assert (tmp_path / "on/embeddings").is_dir()


def averaged(
    tuned: Path, data: Path, folder: Path, *flags: str
) -> tuple[dict[str, Any], str, list[float]]:
    """The sidecar of an average with random weights, these, and their and its general IoU."""
    random = str(write_tiny(folder, sam=tiny_sam()))
    argv = [random, str(tuned), "--data_root", str(data), "--device", "cpu", "--num_workers", "0"]
    sidecar = average.main([*argv, "--points", "0.5", "--output", str(folder / "mean.pth"), *flags])
    assert json.loads((folder / "mean.json").read_text()) == {**sidecar, "sha256": ANY}
    return sidecar, random, [point.get(IOU, math.nan) for point in sidecar["average"]["points"]]


def test_averages_are_scored_on_the_general_set_of_the_tuned_run(
    data: Path, other: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = Path(summary_of(run)["best_checkpoint"])
    sidecar, random, scores = averaged(tuned, data, tmp_path)
    assert scores[2] == pytest.approx(summary_of(run)["general"]["after"], abs=1e-12)
    assert scores[0] == evaluated(random, other) and scores[1] not in (scores[0], scores[2])
    number = {0: 0, 0.5: 1, 1: 2}[sidecar["average"]["checkpoints"][1]["weight"]]
    assert sidecar["metrics"][IOU] == scores[number]
    assert evaluated(str(tmp_path / "mean.pth"), other) == scores[number]
    general = {"images_folder": str(other / "val"), "images": 5, "masks": 17}
    assert sidecar["average"]["general"] == general
    text = capsys.readouterr().out
    assert f"general set {other / 'val'}: 5 images, 17 masks" in text
    assert f"{scores[0]:.4f} with A, {scores[2]:.4f} with B, {scores[number]:.4f} with the" in text
    # It chooses nothing, and none is the same without it.
    alone, _, none = averaged(tuned, data, tmp_path, "--general_data_root", "none", "--force")
    assert alone["average"]["checkpoints"] == sidecar["average"]["checkpoints"]
    assert np.isnan(none).all() and "general" not in alone["average"]
    assert "general" not in capsys.readouterr().out


def test_a_general_set_is_seen_whole_and_with_all_classes_by_averages_too(
    data: Path, other: Path, tmp_path: Path
) -> None:
    windows = {"view": "tiles", "tile_size": 32, "category_names": "thing"}
    document = json.loads((other / "val/_annotations.coco.json").read_text())
    document["categories"] = [{"id": one["id"], "name": "other"} for one in document["categories"]]
    (tmp_path / "other").mkdir()
    shutil.copytree(other / "val", tmp_path / "other/val")
    (tmp_path / "other/val/_annotations.coco.json").write_text(json.dumps(document))
    flags = {**SHORT, **windows, "general_data_root": tmp_path / "other"}
    train_here(arguments(data, tmp_path / "run", **flags))
    tuned = Path(summary_of(tmp_path / "run")["best_checkpoint"])
    _, _, scores = averaged(tuned, data, tmp_path, "--category_names", "thing")
    assert scores[2] == pytest.approx(summary_of(tmp_path / "run")["general"]["after"], abs=1e-12)


def test_a_general_set_that_is_not_here_keeps_no_average_from_being_written(
    data: Path, other: Path, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tuned = shutil.copy(summary_of(run)["best_checkpoint"], tmp_path / "tuned.ckpt")
    sidecar = json.loads(Path(summary_of(run)["best_checkpoint"]).with_suffix(".json").read_text())
    sidecar["config"]["general_data_root"] = str(tmp_path / "elsewhere")
    tuned.with_suffix(".json").write_text(json.dumps(sidecar))
    _, _, scores = averaged(tuned, data, tmp_path)
    assert np.isnan(scores).all()
    assert "elsewhere does not exist" in caplog.text and "It is not scored" in caplog.text
    with pytest.raises(DataError, match="general_data_root: .*nowhere does not exist"):
        averaged(tuned, data, tmp_path, "--general_data_root", str(tmp_path / "nowhere"), "--force")
    _, _, scores = averaged(tuned, data, tmp_path, "--general_data_root", str(other), "--force")
    assert scores[2] == pytest.approx(summary_of(run)["general"]["after"], abs=1e-12)
