"""The forecast of a run: its parts, what it counts, and that it leaves nothing behind."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from helpers.coco_files import write_coco
from helpers.gloo_pool import GlooPool
from helpers.short_runs import (
    a_config,
    arguments,
    command,
    command_here,
    read_metrics,
    train_here,
    write_data,
)
from samft.recipes import dry_run
from samft.recipes.dry_run import Forecast, log_forecast

pytestmark = pytest.mark.run

KEPT = ["config.yaml", "last.ckpt", "metrics.jsonl", "status.json", "summary.json", "train.log"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def test_the_forecast_is_logged_and_nothing_is_left(data, tmp_path, capsys):
    folder = tmp_path / "run"
    forecast = train_here(arguments(data, folder, dry_run=True))
    assert list(folder.iterdir()) == []
    parts = ("encoding", "training", "validation", "saving")
    assert forecast["seconds"] == pytest.approx(sum(forecast[f"{part}_seconds"] for part in parts))
    assert forecast["training_seconds"] > 0 and forecast["validation_seconds"] > 0
    assert forecast["encoding_seconds"] == 0 and forecast["embedding_bytes"] == 0
    assert 0 < forecast["peak_memory_gib"] < forecast["memory_gib"]
    stderr = capsys.readouterr().err
    for text in ("nothing was trained", "memory", "for 20 steps at", "for checkpoints"):
        assert text in stderr


def test_time_is_steps_and_validations_times_what_one_takes(data, tmp_path, monkeypatch):
    # A clock that counts how often it is asked: every piece of work takes one second.
    ticks = iter(range(1000))
    monkeypatch.setattr(dry_run, "synchronized_time", lambda device: float(next(ticks)))
    options = {"dry_run": True, "steps": 12, "metrics_interval": 5, "num_workers": 0}
    forecast = train_here(arguments(data, tmp_path, batch_size=2, accumulate_steps=3, **options))
    # A step, and its six images, loaded at two a second: without workers one after the other.
    assert forecast["training_seconds"] == pytest.approx(12 * (1 + 6 / 2))
    assert forecast["images_per_second"] == pytest.approx(6 / 4)
    assert forecast["validation_seconds"] == 4 * 5  # at 0, 5, 10, 12; five images
    assert forecast["saving_seconds"] == 4


def test_the_test_split_takes_the_time_of_two_models(tmp_path, monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr(dry_run, "synchronized_time", lambda device: float(next(ticks)))
    root = write_data(tmp_path / "data", num_train=2, num_val=1)
    write_coco(root, 3, split="test", seed=7)
    argv = arguments(root, tmp_path / "run", dry_run=True, steps=1, metrics_interval=1)
    assert train_here(argv)["validation_seconds"] == 2 * 1 + 2 * 3


def test_the_largest_batch_has_the_most_objects(tmp_path):
    annotations = write_coco(tmp_path, 9)
    write_coco(tmp_path, 2, split="val", seed=1)
    document = json.loads(annotations.read_text())
    first = document["annotations"][0]
    crowd = [{**first, "id": 1000 + k} for k in range(30)]
    document["annotations"] += crowd
    annotations.write_text(json.dumps(document))
    objects = [e["image_id"] for e in document["annotations"]]
    counts = sorted((objects.count(image["id"]) for image in document["images"]), reverse=True)
    options = {"dry_run": True, "batch_size": 2, "augment": "none"}
    forecast = train_here(arguments(tmp_path, tmp_path / "run", **options))
    assert forecast["largest_batch"] == counts[0] + counts[1]
    few = {**options, "max_masks_per_image": 3}
    assert train_here(arguments(tmp_path, tmp_path / "run", **few))["largest_batch"] <= 6


@pytest.mark.parametrize("augment, sides", [("none", 1), ("flip", 2)])
def test_the_cache_is_part_of_the_forecast(data, tmp_path, augment, sides):
    options = {"freeze_image_encoder": True, "steps": 200, "augment": augment}
    forecast = train_here(arguments(data, tmp_path, dry_run=True, **options))
    embeddings = sides * 13 + 5  # of training, as they are and flipped, and of validation
    assert forecast["embedding_bytes"] == embeddings * 128 * 4 * 4 * 2
    assert forecast["encoding_seconds"] > 0
    train_here(arguments(data, tmp_path, **{**options, "steps": 20, "cache_embeddings": "on"}))
    stored = (tmp_path / "embeddings").glob("*/embeddings.bin")
    assert sum(file.stat().st_size for file in stored) == forecast["embedding_bytes"]
    assert train_here(arguments(data, tmp_path, dry_run=True, **options))["embedding_bytes"] == 0


def test_the_forecast_of_the_disk_is_what_the_run_writes(data, tmp_path):
    forecast = train_here(arguments(data, tmp_path, dry_run=True, save_top_k=2))
    train_here(arguments(data, tmp_path, save_top_k=2))
    written = sum(file.stat().st_size for file in tmp_path.rglob("*.ckpt"))
    last = (tmp_path / "last.ckpt").stat().st_size
    best = max(f.stat().st_size for f in tmp_path.glob("*.ckpt") if f.name != "last.ckpt")
    # While they are replaced, there is one more of each.
    assert forecast["checkpoint_bytes"] == pytest.approx(written + last + best, rel=0.02)


def test_a_run_in_the_folder_is_not_changed(data, tmp_path):
    argv = arguments(data, tmp_path, steps=4)
    train_here(argv)
    before = {name: (tmp_path / name).read_bytes() for name in KEPT}
    train_here([*argv, "--dry_run"])
    assert {name: (tmp_path / name).read_bytes() for name in KEPT} == before
    assert len(read_metrics(tmp_path)) > 0


def test_two_processes_forecast_one_run(gloo2: GlooPool, data, tmp_path):
    argv = arguments(data, tmp_path, dry_run=True, freeze_image_encoder=True, steps=200)
    first, second = gloo2.run(train_here, argv)
    assert first == second
    assert first["checkpoint_bytes"] > 0
    assert list(tmp_path.iterdir()) == []


def test_the_command_exits_with_0_and_writes_the_launchers_status(data, tmp_path, monkeypatch):
    monkeypatch.setenv("SAMFT_STATUS_FILE", str(tmp_path / "status.json"))
    assert command_here(arguments(data, tmp_path / "run", dry_run=True)) == 0
    assert json.loads((tmp_path / "status.json").read_text())["exit_code"] == 0


def test_a_full_disk_is_a_warning_and_a_users_error(data, tmp_path, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    train_here(arguments(data, tmp_path, dry_run=True))
    assert "THE DISK IS TOO SMALL" in capsys.readouterr().err

    def fail(path: Path, state: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(dry_run, "save_tensors", fail)
    assert command_here(arguments(data, tmp_path, dry_run=True)) == 2
    assert "output_dir: a checkpoint cannot be written: no space" in capsys.readouterr().err


def test_too_little_memory_names_the_batch_and_the_settings_to_lower(
    data, tmp_path, monkeypatch, capsys
):
    def give_out(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(dry_run.Trainer, "_forward", give_out)
    assert command_here(arguments(data, tmp_path, dry_run=True)) == 1
    stderr = capsys.readouterr().err
    assert "a batch of 2 images with" in stderr and "activation_checkpointing blocks" in stderr


def test_short_memory_is_a_warning(tmp_path, caplog):
    short = Forecast(9.5, 10.0, 8, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0, 10, 100)
    with caplog.at_level("INFO", logger="samft"):
        log_forecast(short, a_config(tmp_path))
    assert "MEMORY IS SHORT" in caplog.text


def test_a_wrong_start_is_refused_as_the_run_would(tmp_path):
    done = command(arguments(tmp_path / "nothing", tmp_path / "run", dry_run=True))
    assert done.returncode == 2 and "nothing" in done.stderr and "Traceback" not in done.stderr
