"""A run that is killed at any write of its cache of embeddings ends in the same weights."""

import json
import signal
import sys
from pathlib import Path

import pytest

from helpers import TESTS
from helpers.cached_runs import cached_arguments
from helpers.fault_runs import Ended, run
from helpers.short_runs import largest_difference, write_data

pytestmark = pytest.mark.chaos

SCRIPT = str(TESTS / "helpers" / "watched_command.py")
PARTS = 8  # of the writes, each a test


def train(data: Path, folder: Path, **variables: str) -> Ended:
    argv = cached_arguments(data, folder, steps=1, metrics_interval=1, batch_size=1)
    return run([sys.executable, SCRIPT, "samft.train", *argv], **variables)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), num_train=1, num_val=1)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run, with the calls that changed the disk in `report.json`."""
    folder = tmp_path_factory.mktemp("whole")
    ended = train(data, folder, SAMFT_TEST_REPORT=str(folder / "report.json"))
    assert ended.code == 0, ended.output
    return folder


@pytest.mark.parametrize("part", range(PARTS))
def test_a_kill_at_any_write_of_the_cache_changes_no_weight(
    data: Path, whole: Path, tmp_path: Path, part: int
) -> None:
    calls = json.loads((whole / "report.json").read_text())["calls"]
    # One image as it is and flipped, and one to validate on: embeddings, and their records.
    assert calls.count("pwrite") == 2 * 3 and "replace" in calls and "fsync" in calls
    for number in range(1 + part, len(calls) + 1, PARTS):
        folder = tmp_path / str(number)
        killed = train(data, folder, SAMFT_TEST_KILL_AT=str(number))
        assert killed.code == -signal.SIGKILL, (number, killed.output)
        ended = train(data, folder)
        assert ended.code == 0, (number, calls[number - 1], ended.output)
        assert largest_difference(whole, folder) == 0.0, (number, calls[number - 1])
