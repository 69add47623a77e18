"""Where a run ends: without better validations, or with its last step; and how it continues."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.gloo_pool import GlooPool
from helpers.short_runs import arguments, command_here, read_metrics, train_here, write_data
from samft.checkpoints.training_state import LAST_NAME
from samft.training.engine import LOSS_NAMES

pytestmark = pytest.mark.run

# So high a rate that nothing is learnt after the first steps.
DESTROYED: dict[str, Any] = {"learning_rate": 1.0, "lr_schedule": "constant", "warmup_steps": 0}
SHORT: dict[str, Any] = {**DESTROYED, "steps": 8, "metrics_interval": 1, "batch_size": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), num_train=3, num_val=2)


def expected_end(scores: list[float], patience: int) -> int:
    """The step after which a run with these scores of steps 1, 2, ... ends; all without an end."""
    best = float("-inf")
    stale = 0
    for step, score in enumerate(scores, 1):
        stale = 0 if score > best else stale + 1
        best = max(best, score)
        if stale == patience:
            return step
    return len(scores)


@pytest.fixture(scope="module")
def scores(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("whole")
    train_here(arguments(data, folder, **SHORT))
    return [line["per_mask_iou"] for line in read_metrics(folder, "val")[1:]]


@pytest.mark.parametrize("patience", [1, 2])
def test_it_ends_after_so_many_validations_without_a_better_one(
    data: Path, scores: list[float], tmp_path: Path, patience: int
) -> None:
    end = expected_end(scores, patience)
    assert end < len(scores)  # or this shows nothing
    argv = arguments(data, tmp_path, **SHORT, patience=patience)
    assert command_here([*argv, "--stop_after", "1"]) == 75  # what it has counted is saved
    assert command_here(argv) == 0
    assert [line["step"] for line in read_metrics(tmp_path, "val")] == list(range(end + 1))
    assert json.loads((tmp_path / "summary.json").read_text())["best_step"] <= end
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert command_here(argv) == 0
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_more_patience_continues_a_run_that_has_ended_as_if_it_had_not(
    data: Path, scores: list[float], tmp_path: Path
) -> None:
    folders = {name: tmp_path / name for name in ("straight", "continued")}
    for patience, name in ((0, "straight"), (1, "continued"), (2, "continued"), (0, "continued")):
        train_here(arguments(data, folders[name], **SHORT, patience=patience))
        if patience:
            lines = read_metrics(folders[name], "val")
            assert len(lines) == expected_end(scores, patience) + 1
    assert_same_run(*folders.values())


@pytest.mark.parametrize("processes", [1, 2])
def test_more_steps_of_a_finished_run_are_those_of_a_longer_one(
    gloo2: GlooPool, data: Path, tmp_path: Path, processes: int
) -> None:
    def take_steps(folder: str, steps: int) -> None:
        settings = {**SHORT, "learning_rate": 1e-3, "steps": steps}
        argv = arguments(data, tmp_path / folder, **settings)
        codes = gloo2.run(command_here, argv) if processes == 2 else [command_here(argv)]
        assert codes == [0] * processes

    for folder, all_steps in (("straight", [3]), ("raised", [1, 3])):
        for steps in all_steps:
            take_steps(folder, steps)
    assert_same_run(tmp_path / "straight", tmp_path / "raised")


def assert_same_run(one: Path, other: Path) -> None:
    """The same weights to the bit, metrics at every step, and best checkpoints."""
    states = [torch.load(folder / LAST_NAME, weights_only=True) for folder in (one, other)]
    assert states[0]["best"] == states[1]["best"]
    for part in ("model", "optimizer"):
        torch.testing.assert_close(states[0][part], states[1][part], rtol=0, atol=0)
    lines = [read_metrics(folder, split) for folder in (one, other) for split in ("train", "val")]
    measured = [
        [{k: v for k, v in line.items() if k in ("step", "lr", *LOSS_NAMES)} for line in part]
        for part in lines
    ]
    assert measured[:2] == measured[2:]


def test_all_processes_end_alike(
    gloo2: GlooPool, data: Path, scores: list[float], tmp_path: Path
) -> None:
    argv = arguments(data, tmp_path, **SHORT, patience=1)
    assert gloo2.run(command_here, argv) == [0, 0]
    logged = [line["per_mask_iou"] for line in read_metrics(tmp_path, "val")[1:]]
    assert len(logged) == expected_end(logged, 1) < len(scores)
