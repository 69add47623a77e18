"""Runs that train the norm layers and biases of a frozen image encoder, and nothing else of it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.coco_files import write_coco
from helpers.equal_metrics import check_equal_metrics
from helpers.gloo_pool import GlooPool
from helpers.short_runs import (
    arguments,
    command_here,
    evaluate_here,
    largest_difference,
    read_weights,
    train_here,
    write_data,
)
from samft.models.sam import read_state
from samft.weights.download import PACKAGED_TINY

pytestmark = pytest.mark.run

APART: dict[str, Any] = {
    "freeze_image_encoder": True,
    "train_norms": True,
    "train_biases": True,
    "steps": 2,
    "metrics_interval": 2,
    "batch_size": 1,
    "accumulate_steps": 2,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_data(tmp_path_factory.mktemp("data"), num_train=3, num_val=1)
    write_coco(folder, 1, split="test", seed=5)
    return folder


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train_here(arguments(data, folder, **APART))
    return folder


def test_exactly_these_change(run: Path) -> None:
    start, end = read_state(PACKAGED_TINY), read_weights(run)
    assert not (run / "embeddings").exists()
    for name, tensor in end.items():
        if name.startswith("image_encoder.") and tensor.shape == start[name].shape:
            is_trained = re.search(r"bias$|norm\d\.|neck\.[13]\.", name) is not None
            assert torch.equal(tensor, start[name]) != is_trained, name


def test_the_test_split_is_scored_with_the_trained_encoder(data: Path, run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    argv = ["--checkpoint", summary["best_checkpoint"], "--data_root", data, "--split", "test"]
    result = evaluate_here([*map(str, argv), "--device", "cpu", "--num_workers", "0"])
    assert summary["test"]["after"] == pytest.approx(result["per_mask_iou"], abs=1e-6)
    assert summary["test"]["before"] != summary["test"]["after"]


def test_a_resume_and_two_processes_learn_the_same(
    gloo2: GlooPool, data: Path, run: Path, tmp_path: Path
) -> None:
    argv = arguments(data, tmp_path / "resumed", **APART)
    assert command_here([*argv, "--stop_after", "1"]) == 75
    assert command_here(argv) == 0
    assert largest_difference(tmp_path / "resumed", run) == 0.0
    options = {**APART, "accumulate_steps": 1, "optimizer_sharding": True}
    assert gloo2.run(command_here, arguments(data, tmp_path / "two", **options)) == [0, 0]
    check_equal_metrics(tmp_path / "two", run, rel=1e-3)
