"""Runs with a moving average: what is validated and saved, and what a resume goes on from."""

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.equal_metrics import check_equal_metrics
from helpers.gloo_pool import GlooPool
from helpers.short_runs import (
    arguments,
    command_here,
    largest_difference,
    read_metrics,
    read_weights,
    train_here,
    write_data,
)
from samft.models.sam import read_state

pytestmark = pytest.mark.run

AVERAGED: dict[str, Any] = {"ema_decay": 0.8, "steps": 6, "metrics_interval": 3, "batch_size": 1}
TWO: dict[str, Any] = {**AVERAGED, "accumulate_steps": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), num_train=5, num_val=2)


@pytest.fixture(scope="module")
def averaged(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("averaged")
    train_here(arguments(data, folder, **TWO, save_top_k=2))
    return folder


def test_the_average_is_validated_and_saved(data: Path, averaged: Path, tmp_path: Path) -> None:
    train_here(arguments(data, tmp_path, **{**TWO, "ema_decay": 0}))
    # The same steps were taken: only what is validated differs.
    trained, plain = read_metrics(averaged, "train"), read_metrics(tmp_path, "train")
    assert [line["loss"] for line in trained] == [line["loss"] for line in plain]
    scores = [
        [line["per_mask_iou"] for line in read_metrics(folder, "val")]
        for folder in (averaged, tmp_path)
    ]
    assert scores[0][0] == scores[1][0] and scores[0][1:] != scores[1][1:]
    own = torch.load(averaged / "last.ckpt", weights_only=True)["own_values"]
    raw = read_weights(tmp_path)
    assert own and all(torch.equal(value, raw[name]) for name, value in own.items())
    (best,) = averaged.glob("6-*.ckpt")
    last, saved = read_weights(averaged), read_state(best)
    assert all(torch.equal(last[name], saved[name]) for name in last)


def test_a_resumed_run_is_the_same_to_the_bit(data: Path, averaged: Path, tmp_path: Path) -> None:
    argv = arguments(data, tmp_path, **TWO)
    assert command_here([*argv, "--stop_after", "4"]) == 75
    assert command_here(argv) == 0
    assert largest_difference(tmp_path, averaged) == 0.0
    check_equal_metrics(tmp_path, averaged, rel=0)


def test_two_processes_average_the_same(
    gloo2: GlooPool, data: Path, averaged: Path, tmp_path: Path
) -> None:
    argv = arguments(data, tmp_path, **AVERAGED, optimizer_sharding=True)
    assert gloo2.run(command_here, argv) == [0, 0]
    check_equal_metrics(tmp_path, averaged, rel=1e-3)
