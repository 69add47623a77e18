"""Runs that train the last blocks of the encoder: with a cache as without, and from where on."""

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.cached_runs import cached_arguments, encodings_of
from helpers.equal_metrics import check_equal_metrics
from helpers.gloo_pool import GlooPool
from helpers.short_runs import (
    command_here,
    largest_difference,
    read_metrics,
    read_weights,
    train_here,
    write_data,
)
from samft.models.sam import read_state
from samft.weights.download import PACKAGED_TINY

pytestmark = pytest.mark.run

NUM_TRAIN, NUM_VAL = 7, 3
ALL = 2 * NUM_TRAIN + NUM_VAL
LAST: dict[str, Any] = {"freeze_image_encoder": False, "train_blocks": 1, "steps": 6}
OPTIONS: dict[str, Any] = {**LAST, "batch_size": 1, "metrics_interval": 3, "layer_decay": 0.9}
FLOAT32: dict[str, Any] = {**OPTIONS, "accumulate_steps": 2, "cache_dtype": "float32"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), num_train=NUM_TRAIN, num_val=NUM_VAL)


@pytest.fixture(scope="module")
def uncached(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uncached")
    train_here(cached_arguments(data, folder, **FLOAT32, cache_embeddings="off"))
    return folder


def test_a_float32_cache_of_the_first_blocks_changes_nothing(
    data: Path, uncached: Path, tmp_path: Path
) -> None:
    assert encodings_of(cached_arguments(data, tmp_path, **FLOAT32)) == (0, ALL)
    check_equal_metrics(tmp_path, uncached, rel=1e-5)
    assert largest_difference(tmp_path, uncached) < 1e-5


def test_only_the_last_block_and_the_neck_are_trained(uncached: Path) -> None:
    start, end = read_state(PACKAGED_TINY), read_weights(uncached)
    changed = {
        name.split(".")[1] if "blocks" not in name else ".".join(name.split(".")[1:3])
        for name, tensor in end.items()
        if name.startswith("image_encoder.")
        and tensor.shape == start[name].shape
        and not torch.equal(tensor, start[name])
    }
    assert changed == {"blocks.3", "neck"}


def test_a_resumed_run_is_the_same_to_the_bit(data: Path, uncached: Path, tmp_path: Path) -> None:
    argv = cached_arguments(data, tmp_path, **FLOAT32, cache_embeddings="off")
    assert command_here([*argv, "--stop_after", "2"]) == 75
    assert command_here(argv) == 0
    assert largest_difference(tmp_path, uncached) == 0.0


def test_two_processes_learn_the_same(
    gloo2: GlooPool, data: Path, uncached: Path, tmp_path: Path
) -> None:
    argv = cached_arguments(data, tmp_path, **{**FLOAT32, "accumulate_steps": 1})
    results = gloo2.run(encodings_of, argv)
    assert [code for code, _ in results] == [0, 0]
    assert sum(number for _, number in results) == ALL
    check_equal_metrics(tmp_path, uncached, rel=1e-3)


def test_a_cache_is_found_again_by_runs_that_freeze_as_much(data: Path, tmp_path: Path) -> None:
    shared = {**FLOAT32, "steps": 1, "cache_dir": tmp_path / "embeddings"}
    assert encodings_of(cached_arguments(data, tmp_path / "1", **shared)) == (0, ALL)
    assert encodings_of(cached_arguments(data, tmp_path / "2", **shared)) == (0, 0)
    others = {**shared, "train_blocks": 2}
    assert encodings_of(cached_arguments(data, tmp_path / "3", **others)) == (0, ALL)
    assert read_metrics(tmp_path / "3", "val")


def test_more_blocks_than_there_are_is_one_sentence(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = cached_arguments(data, tmp_path, **{**OPTIONS, "train_blocks": 5})
    assert command_here(argv) == 2
    assert "train_blocks: 5 is more than the 4 blocks of vit_tiny" in capsys.readouterr().err
