"""The checks of a host, by what is reported of its disk, limits and devices."""

import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from samft.errors import ConfigError
from samft.runtime import host_checks

CPU = torch.device("cpu")
GIB = 2**30


class Usage(NamedTuple):
    free: int


def with_free(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(free))


# Disk


def test_a_disk_that_is_too_small_is_refused_to_the_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free(3 * GIB, monkeypatch)
    host_checks.check_disk(tmp_path, 3 * GIB)
    host_checks.check_disk(tmp_path, -1)
    with pytest.raises(ConfigError) as caught:
        host_checks.check_disk(tmp_path, 3 * GIB + 1)
    assert str(caught.value).startswith("output_dir: checkpoints will take 3.")
    assert str(tmp_path) in str(caught.value) and "lower save_top_k" in str(caught.value)


def test_the_free_space_is_that_of_the_real_disk(tmp_path: Path) -> None:
    host_checks.check_disk(tmp_path, 1)
    with pytest.raises(ConfigError, match="make room"):
        host_checks.check_disk(tmp_path, 2**60)


def check_space(folder: Path, needed: int) -> None:
    host_checks.check_host(CPU, folder, needed=needed, num_workers=0, batch_bytes=0)


@pytest.fixture
def _same_limit() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("_same_limit")
def test_a_resumed_run_needs_only_the_space_of_new_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free(100, monkeypatch)
    check_space(tmp_path, 100)
    with pytest.raises(ConfigError):
        check_space(tmp_path, 101)
    for name, size in {"last.ckpt": 10, "previous/last.ckpt": 10, "5-0.50.ckpt": 5}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    # Of an earlier run, which stay; and what is no checkpoint.
    for name in ("previous-1/last.ckpt", "previous-1/5-0.50.ckpt", "metrics.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(1000))
    check_space(tmp_path, 125)
    with pytest.raises(ConfigError):
        check_space(tmp_path, 126)


# Shared memory


@pytest.mark.parametrize(
    ("processes", "workers", "free", "warning"),
    [
        # Three batches a worker: 2 processes * 4 workers * 3 = 24.
        ("2", 4, 24 * 1000, False),
        ("2", 4, 24 * 1000 - 1, True),
        (None, 4, 12 * 1000, False),
        (None, 4, 12 * 1000 - 1, True),
        ("2", 0, 0, False),
    ],
)
def test_too_little_shared_memory_is_warned_of(
    processes: str | None,
    workers: int,
    free: int,
    warning: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    monkeypatch.setattr(host_checks, "_SHARED_MEMORY", tmp_path)
    with_free(free, monkeypatch)
    host_checks.warn_of_shared_memory(num_workers=workers, batch_bytes=1000)
    assert any("--shm-size" in text for text in caplog.messages) == warning
    caplog.clear()
    monkeypatch.setattr(host_checks, "_SHARED_MEMORY", tmp_path / "absent")
    host_checks.warn_of_shared_memory(num_workers=workers, batch_bytes=1000)
    assert caplog.messages == []


# Open files


class Limits:
    """The limits of a process that is not this one."""

    def __init__(self, soft: int, hard: int, *, raises: type[Exception] | None = None) -> None:
        self.now, self.raises = (soft, hard), raises

    def get(self, which: int) -> tuple[int, int]:
        assert which == resource.RLIMIT_NOFILE
        return self.now

    def set(self, which: int, limits: tuple[int, int]) -> None:
        if self.raises:
            raise self.raises
        self.now = limits


@pytest.mark.parametrize(
    ("limits", "after", "strategy"),
    [
        (Limits(1024, 65536), 65536, "unchanged"),
        (Limits(65536, 65536), 65536, "unchanged"),
        (Limits(1024, 2048), 2048, "file_system"),
        (Limits(72, 72), 72, "file_system"),
        (Limits(1024, 65536, raises=ValueError), 1024, "file_system"),
        (Limits(8192, 65536, raises=OSError), 8192, "unchanged"),
        (Limits(1024, resource.RLIM_INFINITY), resource.RLIM_INFINITY, "unchanged"),
    ],
)
def test_the_limit_of_open_files_is_raised_and_a_low_one_is_enough_for_few_workers(
    limits: Limits, after: int, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = ["unchanged"]
    monkeypatch.setattr(resource, "getrlimit", limits.get)
    monkeypatch.setattr(resource, "setrlimit", limits.set)
    monkeypatch.setattr(torch.multiprocessing, "set_sharing_strategy", chosen.append)
    host_checks.check_open_files(2)
    assert (limits.now[0], chosen[-1]) == (after, strategy)


def test_too_few_open_files_for_the_loader_workers_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resource, "getrlimit", Limits(64, 64).get)
    host_checks.check_open_files(0)
    with pytest.raises(ConfigError, match=r"2 loader workers need 72 open files.* may have 64"):
        host_checks.check_open_files(2)
