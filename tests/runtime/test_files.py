"""Atomic writes: the old content or the new, never a part, never a stray file."""

import fcntl
import hashlib
import json
import multiprocessing
import os
import socket
import tempfile
from pathlib import Path
from typing import Any, BinaryIO
from unittest import mock

import pytest

from samft.errors import ConfigError
from samft.runtime.files import (
    NotAFileError,
    atomic_replacement,
    cache_folder,
    matches_sidecar,
    open_file,
    private_temporary_folder,
    read_digests,
    read_file,
    staging_path,
    try_lock,
    write_atomically,
    write_json,
    write_text,
)
from samft.runtime.output_dir import (
    delete_partial_files,
    lock_output_dir,
    write_status,
)


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
    monkeypatch.setenv("SAMFT_STATUS_FILE", str(tmp_path / "launcher.json"))
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
    assert json.loads((tmp_path / "launcher.json").read_text()) == expected


def test_status_without_a_folder_reaches_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAMFT_STATUS_FILE", str(tmp_path / "launcher.json"))
    write_status(None, state="failed", exit_code=2)
    assert json.loads((tmp_path / "launcher.json").read_text())["exit_code"] == 2
    write_status(tmp_path / "absent", state="failed", exit_code=1)
    assert json.loads((tmp_path / "launcher.json").read_text())["exit_code"] == 1
    assert os.listdir(tmp_path) == ["launcher.json"]
    monkeypatch.setenv("SAMFT_STATUS_FILE", str(tmp_path / "absent" / "launcher.json"))
    write_status(tmp_path, state="running")
    assert sorted(os.listdir(tmp_path)) == ["launcher.json", "status.json"]


def test_the_new_content_is_on_disk_before_it_replaces_the_old(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with atomic_replacement(path, lambda file: file.write(b"new")) as part:
        assert (part.read_text(), path.read_text()) == ("new", "old")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_an_error_before_the_replacement_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(KeyError), atomic_replacement(path, lambda file: file.write(b"new")):
        raise KeyError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_only_temporary_files_of_a_run_are_deleted(tmp_path: Path) -> None:
    foreign = [".film.mkv.part", ".film.mkv.abc_1234.part", ".scores.json.abc_1234.part"]
    foreign += ["mine.part", ".hidden", "a.txt", ".last.ckpt.abc.part", ".model.ckpt.abc_1234.part"]
    for folder in (tmp_path, tmp_path / "previous", tmp_path / "previous" / "deeper"):
        folder.mkdir(exist_ok=True)
        for name in (".last.ckpt.abc_1234.part", ".last.ckpt.part", *foreign):
            (folder / name).touch()
        for name in (".12-0.34.ckpt.abc_1234.part", ".12--1.00.json.abc_1234.part"):
            (folder / name).touch()
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / ".last.ckpt.abc_1234.part").touch()
    delete_partial_files(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([*foreign, "pool", "previous"])
    assert sorted(os.listdir(tmp_path / "previous")) == sorted([*foreign, "deeper"])
    assert os.listdir(tmp_path / "pool") == [".last.ckpt.abc_1234.part"]
    assert ".last.ckpt.part" in os.listdir(tmp_path / "previous" / "deeper")  # none of ours


def test_the_temporary_files_of_a_killed_process_are_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # a kill leaves no time for it
    with pytest.raises(RuntimeError, match="disk full"):
        write_atomically(tmp_path / "summary.json", fail_halfway)
    assert len(os.listdir(tmp_path)) == 1
    monkeypatch.undo()
    delete_partial_files(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_folder_is_used_by_one_run_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("samft.runtime.output_dir._LOCK_SECONDS", -1.0)
    (tmp_path / ".last.ckpt.abcd1234.part").touch()
    with lock_output_dir(tmp_path):
        assert os.listdir(tmp_path) == [".lock"]
        (tmp_path / ".last.json.abcd1234.part").touch()
        with (
            pytest.raises(ConfigError, match="another run is writing into"),
            lock_output_dir(tmp_path),
        ):
            raise AssertionError("two at a time")
        assert ".last.json.abcd1234.part" in os.listdir(tmp_path)  # of the run that holds the lock
    with lock_output_dir(tmp_path):
        assert os.listdir(tmp_path) == [".lock"]


def test_a_run_waits_for_the_end_of_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = try_lock(tmp_path / ".lock")
    assert other is not None
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            fcntl.flock(other, fcntl.LOCK_UN)

    monkeypatch.setattr("time.sleep", sleep)
    with lock_output_dir(tmp_path):
        assert len(waits) == 2
    other.close()


def test_a_worker_that_outlives_the_run_keeps_no_lock(tmp_path: Path) -> None:
    lock = try_lock(tmp_path / ".lock")
    assert lock is not None
    context = multiprocessing.get_context("fork")
    ready, end = context.Event(), context.Event()
    worker = context.Process(target=lambda: (ready.set(), end.wait()), daemon=True)
    worker.start()
    try:
        assert ready.wait(60)
        assert try_lock(tmp_path / ".lock") is None  # the worker has not given up the run's own
        lock.close()
        again = try_lock(tmp_path / ".lock")
        assert again is not None and worker.is_alive()
        again.close()
    finally:
        end.set()
        worker.join()


def test_a_folder_is_free_again_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(KeyError), lock_output_dir(tmp_path):
        raise KeyError
    with lock_output_dir(tmp_path):
        pass


@pytest.mark.parametrize(
    ("digests", "known"),
    [
        ({"sha256": "a"}, ["a"]),
        ({"sha256": ["a", "b"]}, ["a", "b"]),
        ({"sha256": []}, []),
        ({"sha256": None}, []),
        ({"sha256": 5}, []),
        ({"step": 3}, []),
        (["sha256"], []),
        (None, []),
    ],
)
def test_the_digests_that_a_sidecar_names(tmp_path: Path, digests: Any, known: list[str]) -> None:
    write_json(tmp_path / "a.json", digests)
    assert read_digests(tmp_path / "a.json") == known


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe\0"])
def test_an_unreadable_sidecar_names_none(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    assert read_digests(tmp_path / "a.json") == []


def test_a_file_matches_its_sidecar(tmp_path: Path) -> None:
    path, sidecar = tmp_path / "a.ckpt", tmp_path / "a.json"
    path.write_bytes(b"weights")
    assert matches_sidecar(path, sidecar)  # there is no sidecar
    digest = hashlib.sha256(b"weights").hexdigest()
    for digests, known in (
        (digest, True),
        (["0", digest], True),
        ("0", False),
        (["0", "1"], False),
    ):
        write_json(sidecar, {"sha256": digests})
        assert matches_sidecar(path, sidecar) is known


def test_the_private_temporary_folder_is_open_to_its_user_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"samft-{os.getuid()}"
    for _ in range(2):
        assert private_temporary_folder() == folder
        assert folder.stat().st_mode & 0o777 == 0o700
        folder.chmod(0o755)


@pytest.mark.parametrize("taken", ["link", "file", "another user's", "open"])
def test_a_temporary_folder_that_others_can_write_is_not_taken(
    taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    user = os.getuid() + (taken == "another user's")
    monkeypatch.setattr(os, "getuid", lambda: user)
    folder = tmp_path / f"samft-{user}"
    (tmp_path / "other").mkdir()
    if taken == "link":
        folder.symlink_to(tmp_path / "other")
    elif taken == "file":
        folder.touch()
    else:
        folder.mkdir()
        folder.chmod(0o777 if taken == "open" else 0o700)
    with pytest.raises(PermissionError) as caught:
        private_temporary_folder()
    assert caught.value.filename == str(folder)


def test_a_user_without_a_home_folder_has_a_private_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("SAMFT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert cache_folder() == tmp_path / f"samft-{os.getuid()}"


def test_a_staged_file_replaces_the_target_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    with staging_path(target) as part:
        assert part.name == "a.bin" and not part.exists() and not target.exists()
        part.touch(mode=0o600)
        part.write_bytes(b"new")
        assert not target.exists()
    assert target.read_bytes() == b"new"
    assert target.stat().st_mode & 0o777 == 0o644
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_staged_folder_replaces_a_folder_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.mkdir()
    (target / "old").write_text("old")
    with staging_path(target) as part:
        part.mkdir()
        (part / "new").write_text("new")
        assert os.listdir(target) == ["old"]
    assert os.listdir(target) == ["new"]
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_block_that_fails_leaves_the_target(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "a"
    old = target / "old" if kind == "folder" else target
    old.parent.mkdir(exist_ok=True)
    old.write_text("old")
    with pytest.raises(RuntimeError, match="no good"), staging_path(target) as part:
        part.write_text("new")
        raise RuntimeError("no good")
    assert old.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_that_cannot_be_replaced_is_restored(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.mkdir()
    (target / "old").write_text("old")
    replace = os.replace

    def fail(source: Path, place: Path) -> None:
        if Path(place) == target:
            raise OSError(28, "No space left on device")
        replace(source, place)

    with mock.patch("os.replace", fail), pytest.raises(OSError, match="No space"):
        with staging_path(target) as part:
            part.mkdir()
    assert (target / "old").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    for path in (tmp_path / "pipe", tmp_path / "link", tmp_path / "socket", Path("/dev/zero")):
        with pytest.raises(NotAFileError, match="no file"):
            open_file(path)
    with pytest.raises(IsADirectoryError):
        open_file(tmp_path)
    (tmp_path / "file").write_bytes(b"abc")
    assert read_file(tmp_path / "file") == b"abc"
