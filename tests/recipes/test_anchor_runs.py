"""Runs that are pulled to their start: nearer to it, the same after a stop and on two processes."""

from pathlib import Path
from typing import Any

import pytest

from helpers.equal_metrics import check_equal_metrics
from helpers.gloo_pool import GlooPool
from helpers.short_runs import (
    arguments,
    command_here,
    largest_difference,
    read_weights,
    train_here,
    write_data,
)

pytestmark = pytest.mark.run

PULLED: dict[str, Any] = {
    "anchor_weight": 200,
    "steps": 6,
    "metrics_interval": 3,
    "batch_size": 1,
    "layer_decay": 0.8,
}
TWO: dict[str, Any] = {**PULLED, "accumulate_steps": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), num_train=5, num_val=2)


@pytest.fixture(scope="module")
def pulled(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pulled")
    train_here(arguments(data, folder, **TWO))
    return folder


def distance(folder: Path, other: Path) -> float:
    ends = read_weights(folder), read_weights(other)
    return float(sum((ends[0][name] - ends[1][name]).square().sum() for name in ends[0]))


def test_a_run_stays_nearer_to_its_start(data: Path, pulled: Path, tmp_path: Path) -> None:
    train_here(arguments(data, tmp_path / "free", **{**TWO, "anchor_weight": 0}))
    start = tmp_path / "start"  # so small a rate that float32 does not change
    train_here(arguments(data, start, **{**TWO, "anchor_weight": 0, "learning_rate": 1e-12}))
    assert 0 < distance(pulled, start) < 0.8 * distance(tmp_path / "free", start)


def test_a_resumed_run_is_the_same_to_the_bit(data: Path, pulled: Path, tmp_path: Path) -> None:
    argv = arguments(data, tmp_path, **TWO)
    assert command_here([*argv, "--stop_after", "4"]) == 75
    assert command_here(argv) == 0
    assert largest_difference(tmp_path, pulled) == 0.0
    check_equal_metrics(tmp_path, pulled, rel=0)


@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_are_pulled_alike(
    gloo2: GlooPool, data: Path, pulled: Path, tmp_path: Path, sharded: bool
) -> None:
    argv = arguments(data, tmp_path, **PULLED, optimizer_sharding=sharded)
    assert gloo2.run(command_here, argv) == [0, 0]
    check_equal_metrics(tmp_path, pulled, rel=1e-3)


def test_adapters_averages_and_the_prefix_cache_resume_with_it(data: Path, tmp_path: Path) -> None:
    more = {"lora_rank": 2, "train_blocks": 2, "ema_decay": 0.5, "cache_embeddings": "on"}
    settings = {**PULLED, **more, "steps": 4, "metrics_interval": 2}
    train_here(arguments(data, tmp_path / "straight", **settings))
    argv = arguments(data, tmp_path / "stopped", **settings)
    assert command_here([*argv, "--stop_after", "3"]) == 75
    assert command_here(argv) == 0
    assert largest_difference(tmp_path / "stopped", tmp_path / "straight") == 0.0
