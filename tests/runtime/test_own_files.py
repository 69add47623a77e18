"""Which files of a folder are those of a run, and what a fresh start does with them and others."""

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from helpers.short_runs import a_config
from samft.checkpoints.top_k import TopK
from samft.checkpoints.training_state import save_last
from samft.evaluation.object_scores import ObjectScores
from samft.reports.drawing import encode_jpeg, read_png, write_png
from samft.runtime.files import write_json
from samft.runtime.output_dir import archive_previous_run, holds_previous_run, write_status
from samft.runtime.own_files import (
    foreign_files,
    is_checkpoint,
    is_config,
    is_marked_picture,
    mark_picture,
    own_files,
)
from samft.settings import to_yaml

PICTURE = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
EVENTS = "tensorboard/run/val/events.out.tfevents.1.host.2.0"


def write_run(folder: Path) -> list[str]:
    """What a run leaves, in small; the names."""
    (folder / EVENTS).parent.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(a_config(folder / "data", folder)))
    (folder / "metrics.jsonl").write_text('{"step": 0, "split": "val", "per_mask_iou": 0.5}\n')
    record = {"after_step": 3, "position": 4, "image_ids": [[1]]}
    (folder / "bad_steps.jsonl").write_text(json.dumps(record) + "\n")
    one = np.ones(1)
    scores = ObjectScores(one.astype(int), one.astype(int), one, one, one, one)
    (folder / "objects.json").write_text(json.dumps({0: scores.to_json()}) + "\n")
    write_json(folder / "summary.json", {"baseline_val_per_mask_iou": 0.5, "best_checkpoint": None})
    (folder / "report.html").write_text("<html>IoU by step</html>")
    (folder / "train.log").write_text("2026-01-01 10:00:00,000 device cpu, 1 process(es), 2 im\n")
    for name in ("before.png", "after.png", "before_after.png"):
        write_png(folder / name, PICTURE)
    (folder / EVENTS).write_bytes(b"\x18\0\0brain.Event:2 iou/per_mask_iou")
    write_json(folder / "trackers.json", {"name": "run", "ids": {}})
    write_status(folder, state="done")
    for _ in range(2):
        save_last(folder, {"global_batch": 1})
    TopK(folder, k=1).save_if_better({}, score=0.5, sidecar={"step": 7})
    return sorted(files_of(folder))


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_all_files_of_a_run_are_its_own_and_are_archived(tmp_path: Path) -> None:
    names = write_run(tmp_path)
    before = files_of(tmp_path)
    assert sorted(own_files(tmp_path)) == names and foreign_files(tmp_path) == []
    assert holds_previous_run(tmp_path)
    archive = archive_previous_run(tmp_path)
    assert archive == tmp_path / "previous-1" and files_of(archive) == before
    assert os.listdir(tmp_path) == ["previous-1"]
    assert archive_previous_run(tmp_path) is None


FOREIGN = {
    "config.yaml": b"# mine\nlearning_rate: 1e-4\n",
    "metrics.jsonl": b'{"epoch": 1, "loss": 0.5}\n',
    "bad_steps.jsonl": b'{"step": 1}\n',
    "objects.json": b'[{"id": 1}]',
    "summary.json": b'{"accuracy": 0.5}',
    "status.json": b'{"state": "on"}',
    "trackers.json": b'{"name": "mine"}',
    "report.html": b"<html></html>",
    "train.log": b"2026-01-01 10:00:00,000 epoch 1\n",
    "before.png": cv2.imencode(".png", PICTURE[..., 0])[1].tobytes(),
    "after.png": b"\x89PNG",
    "before_after.png": b"",
    "last.ckpt": b"PK\3\4 of another trainer",
    "last.json": b'{"sha256": "0"}',
    "previous/last.ckpt": b"mine",
    "previous/last.json": b"[" * 100_000,
}
OTHERS = {
    "cat.png": b"\x89PNG a training image",
    "model.ckpt": b"weights",
    "model.json": b"{}",
    "12-0.50.ckpt": b"weights without a sidecar",
    "13-0.50.ckpt": b"weights that are not those of the sidecar",
    "13-0.50.json": b'{"step": 13, "sha256": "0"}',
    "previous/notes.txt": b"mine",
    "tensorboard/events.out.tfevents.9.host.1.0": b"\x18\0\0 of another trainer",
}


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def test_files_of_others_are_not_a_runs_own(tmp_path: Path) -> None:
    write_files(tmp_path, {**FOREIGN, **OTHERS})
    assert own_files(tmp_path) == []
    assert sorted(foreign_files(tmp_path)) == sorted(FOREIGN)
    assert archive_previous_run(tmp_path) is None
    assert files_of(tmp_path) == {**FOREIGN, **OTHERS}


def test_files_of_others_stay_beside_a_run_that_is_archived(tmp_path: Path) -> None:
    write_run(tmp_path)
    write_files(tmp_path, OTHERS)
    own = {name: content for name, content in files_of(tmp_path).items() if name not in OTHERS}
    archive = archive_previous_run(tmp_path)
    assert archive is not None and files_of(archive) == own
    for path in archive.rglob("*.*"):
        path.unlink(missing_ok=True) if path.is_file() else None
    assert files_of(tmp_path) == OTHERS


def test_links_and_folders_take_names_too(tmp_path: Path) -> None:
    (tmp_path / "train.log").symlink_to(tmp_path / "gone")
    (tmp_path / "summary.json").mkdir()
    (tmp_path / "tensorboard").touch()
    assert sorted(foreign_files(tmp_path)) == ["summary.json", "tensorboard", "train.log"]
    assert foreign_files(tmp_path / "absent") == []


def test_a_configuration_that_was_edited_is_not_a_runs_own(tmp_path: Path) -> None:
    path, text = tmp_path / "config.yaml", to_yaml(a_config(tmp_path))
    for content, own in ((text, True), (f"# mine\n{text}", False), (text[:-20], False)):
        path.write_text(content)
        assert is_config(path) is own
    path.write_text("\n".join(line for line in text.splitlines() if "amp" not in line) + "\n")
    assert is_config(path)  # an earlier version had fewer settings


def test_a_checkpoint_is_proven_by_its_digest(tmp_path: Path) -> None:
    TopK(tmp_path, k=1).save_if_better({}, score=0.5, sidecar={"step": 7})
    path = tmp_path / "7-0.50.ckpt"
    assert is_checkpoint(path)
    path.write_bytes(path.read_bytes() + b"0")
    assert not is_checkpoint(path)


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_marked_pictures_show_the_same_pixels(kind: str, tmp_path: Path) -> None:
    encoded = encode_jpeg(PICTURE) if kind == "jpg" else cv2.imencode(".png", PICTURE)[1].tobytes()
    plain, marked = tmp_path / f"a.{kind}", tmp_path / f"b.{kind}"
    plain.write_bytes(encoded)
    marked.write_bytes(mark_picture(encoded))
    assert (read_png(plain) == read_png(marked)).all()
    assert is_marked_picture(marked) and not is_marked_picture(tmp_path / "absent.png")
