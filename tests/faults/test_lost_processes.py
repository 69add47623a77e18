"""One process fails, hangs or is killed: its words are there, and all processes end, by themselves.

As on GPUs, no process here leaves the group before all others do, and torchrun is told to leave
processes that do not end alone for longer than a test may take.
"""

from pathlib import Path
from typing import Any

import pytest

from helpers.fault_runs import (
    Ended,
    alone,
    left_after,
    run,
    run_arguments,
    status_of,
    torchrun,
)
from helpers.short_runs import write_data
from samft.weights.download import PACKAGED_TINY

pytestmark = pytest.mark.chaos

NEVER = "100000"  # seconds


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def end_of(
    argv: list[str], fault: dict[str, Any], *, processes: int = 2, nccl: str = "1", **changes: str
) -> Ended:
    """How a run ends in which no launcher kills, and only an abort leaves a group alone."""
    changes = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": NEVER, "SAMFT_TEST_NCCL": nccl, **changes}
    return run(torchrun(argv, processes=processes), fault, **changes)


def check_ended(ended: Ended, folder: Path, *texts: str) -> None:
    assert ended.code == 1, ended.output
    for text in texts:
        assert text in ended.output, ended.output
    assert not left_after(folder)


FAILURES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "in a step": (
        {"do": "run out of memory", "where": "forward", "at": 6, "rank": 1},
        {},
        "[rank 1] error: not enough memory for a batch of 1 images",
    ),
    "on process 0 of three": (
        {"do": "run out of memory", "where": "forward", "at": 6, "rank": 0},
        {"processes": 3, "nccl": "abort"},  # where not even an abort comes to an end
        "error: not enough memory for a batch of 1 images",
    ),
    "in validation": (
        {"do": "raise", "where": "validation", "at": 2, "rank": 1},
        {},
        "a planted bug",
    ),
    "in a save": ({"do": "raise", "where": "save", "at": 2, "rank": 0}, {}, "a planted bug"),
    "before DDP": (
        {"do": "run out of memory", "where": "wrapping", "at": 1, "rank": 1},
        {},
        "[rank 1] error: not enough memory to begin training",
    ),
    "while images are encoded": (
        {"do": "raise", "where": "encoding", "at": 3, "rank": 1},
        {"freeze_image_encoder": True, "cache_embeddings": "on"},
        "a planted bug",
    ),
}


@pytest.mark.parametrize("place", FAILURES)
def test_a_failure_on_one_process_is_told_and_ends_all(
    data: Path, tmp_path: Path, place: str
) -> None:
    fault, options, sentence = FAILURES[place]
    settings = {name: options[name] for name in options if name not in ("processes", "nccl")}
    options = {name: options[name] for name in options if name not in settings}
    argv = run_arguments(data, tmp_path, hang_timeout=600, **settings)
    rank = fault["rank"]
    ended = end_of(argv, fault, **options)
    check_ended(ended, tmp_path, sentence, f"process {rank} failed at step ")
    status = status_of(tmp_path)
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    if rank:
        assert f"process {rank} failed at step " in status["reason"]
    last_line = (tmp_path / "train.log").read_text().splitlines()[-1]
    assert last_line.endswith(f"the run ends: {status['reason']}")


def test_a_failure_in_an_evaluation_is_told_and_ends_all(data: Path, tmp_path: Path) -> None:
    fault = {"do": "raise", "where": "evaluation", "at": 1, "rank": 1}
    argv = ["--checkpoint", str(PACKAGED_TINY), "--data_root", str(data)]
    argv += ["--output", str(tmp_path / "scores.json"), "--num_workers", "0", "--device", "cpu"]
    ended = end_of(argv, fault, SAMFT_TEST_COMMAND="evaluate")
    failed = "process 1 failed at step 0, evaluating image"
    check_ended(ended, tmp_path, "ZeroDivisionError: a planted bug", failed)


def test_a_failure_before_the_group_exists_ends_all(data: Path, tmp_path: Path) -> None:
    fault = {"do": "raise", "where": "start", "at": 1, "rank": 1}
    ended = end_of(run_arguments(data, tmp_path), fault)
    check_ended(ended, tmp_path, "a planted bug")


@pytest.mark.parametrize("how", ["hang", "freeze"])  # in Python; stopped, as by a debugger
def test_a_process_that_hangs_is_named_and_ended(data: Path, tmp_path: Path, how: str) -> None:
    fault = {"do": how, "where": "forward", "at": 8, "rank": 1}
    ended = end_of(run_arguments(data, tmp_path, hang_timeout=4), fault)
    check_ended(ended, tmp_path, "error: process 1 does not answer")
    assert "process 1 does not answer" in status_of(tmp_path)["reason"]


def test_a_killed_process_is_named(data: Path, tmp_path: Path) -> None:
    fault = {"do": "kill", "where": "step", "at": 3, "rank": 1}
    ended = end_of(run_arguments(data, tmp_path, hang_timeout=600), fault)
    check_ended(ended, tmp_path, "error: process 1 does not answer")


def test_a_signal_ends_a_wait_for_a_process_that_hangs(data: Path, tmp_path: Path) -> None:
    argv = run_arguments(data, tmp_path, hang_timeout=600)
    fault = {"do": "term the agent and freeze", "where": "step", "at": 3, "rank": 1}
    # The launcher kills after ten seconds: the process that waits has to say why before.
    ended = end_of(argv, fault, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="10")
    check_ended(ended, tmp_path, "error: process 1 does not answer")
    assert status_of(tmp_path)["state"] == "failed"


def test_a_second_ctrl_c_leaves_a_true_status(data: Path, tmp_path: Path) -> None:
    ended = run(alone(run_arguments(data, tmp_path)), {"do": "interrupt", "where": "step", "at": 6})
    assert ended.code == 130 and "stopped: interrupted" in ended.output
    status = status_of(tmp_path)
    assert (status["state"], status["exit_code"]) == ("failed", 130)
    assert (status["reason"], status["step"] in (0, 4)) == ("interrupted", True)
    assert status["last_checkpoint"] == str(tmp_path / "last.ckpt")
