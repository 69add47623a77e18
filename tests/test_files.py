"""Atomic writes: the old content or the new, never a part, never a stray file."""

import json
import os
from pathlib import Path
from typing import BinaryIO

import pytest

from samft.files import write_atomically, write_json, write_status, write_text


def fail_halfway(file: BinaryIO) -> None:
    file.write(b"half of")
    file.flush()
    raise RuntimeError("disk full")


def test_the_new_content_replaces_the_old(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old, and longer")
    write_text(path, "nü")
    assert path.read_bytes() == "nü".encode()
    assert os.listdir(tmp_path) == ["a.txt"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError, match="disk full"):
        write_atomically(path, fail_halfway)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_failing_writer_leaves_no_new_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="disk full"):
        write_atomically(tmp_path / "a.txt", fail_halfway)
    assert os.listdir(tmp_path) == []


def test_readers_see_the_old_content_until_the_new_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    seen = []

    def write(file: BinaryIO) -> None:
        file.write(b"new")
        file.flush()
        seen.append(path.read_text())

    write_atomically(path, write)
    assert seen == ["old"]
    assert path.read_text() == "new"


def test_content_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append("fsync"), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    write_text(tmp_path / "a.txt", "x")
    assert calls == ["fsync", "replace", "fsync"]  # the last is the folder's


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "absent" / "a.txt", "x")


def test_json_round_trip(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [1, None, 0.5]})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"a": [1, None, 0.5]}
    assert text.endswith("}\n")


def test_status_goes_to_the_folder_and_to_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.setenv("SAMFT_STATUS_FILE", str(tmp_path / "told.json"))
    write_status(
        run, state="preempted", step=7, exit_code=75, reason="SIGTERM", last_checkpoint="last.ckpt"
    )
    expected = {
        "state": "preempted",
        "step": 7,
        "exit_code": 75,
        "reason": "SIGTERM",
        "last_checkpoint": "last.ckpt",
    }
    assert json.loads((run / "status.json").read_text()) == expected
    assert json.loads((tmp_path / "told.json").read_text()) == expected


def test_status_without_a_folder_reaches_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAMFT_STATUS_FILE", str(tmp_path / "told.json"))
    write_status(None, state="failed", exit_code=2)
    assert json.loads((tmp_path / "told.json").read_text())["exit_code"] == 2
    write_status(tmp_path / "absent", state="failed", exit_code=1)
    assert json.loads((tmp_path / "told.json").read_text())["exit_code"] == 1
    assert os.listdir(tmp_path) == ["told.json"]
    monkeypatch.setenv("SAMFT_STATUS_FILE", str(tmp_path / "absent" / "told.json"))
    write_status(tmp_path, state="running")
    assert sorted(os.listdir(tmp_path)) == ["status.json", "told.json"]
