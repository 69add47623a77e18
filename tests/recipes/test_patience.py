"""A run ends where its validations get no better, once and for all, and with the best kept."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.gloo_pool import GlooPool
from helpers.short_runs import arguments, command_here, read_metrics, train_here, write_data

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


def test_all_processes_end_alike(
    gloo2: GlooPool, data: Path, scores: list[float], tmp_path: Path
) -> None:
    argv = arguments(data, tmp_path, **SHORT, patience=1)
    assert gloo2.run(command_here, argv) == [0, 0]
    logged = [line["per_mask_iou"] for line in read_metrics(tmp_path, "val")[1:]]
    assert len(logged) == expected_end(logged, 1) < len(scores)
