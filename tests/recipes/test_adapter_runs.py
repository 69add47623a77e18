"""Runs that train adapters: what their files hold, resumes, processes, caches, exports."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from segment_anything.modeling import Sam

import samft
from helpers.cached_runs import cached_arguments, encodings_of
from helpers.equal_metrics import check_equal_metrics
from helpers.gloo_pool import GlooPool
from helpers.short_runs import (
    arguments,
    command_here,
    evaluate_here,
    largest_difference,
    read_metrics,
    read_weights,
    train_here,
    write_data,
)
from samft.export import main as export
from samft.models.sam import build_sam, load_state, read_state
from samft.runtime.files import sha256_of
from samft.weights.download import PACKAGED_TINY

pytestmark = pytest.mark.run

NUM_TRAIN, NUM_VAL = 5, 2
ADAPTERS: dict[str, Any] = {
    "lora_rank": 2,
    "lora_alpha": 4,
    "lora_targets": "q,v,mlp",
    "lora_decoder": True,
    "train_blocks": 2,
    "ema_decay": 0.5,
}
SHORT: dict[str, Any] = {"steps": 4, "metrics_interval": 2, "batch_size": 1, **ADAPTERS}
TWO: dict[str, Any] = {**SHORT, "accumulate_steps": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    return write_data(root, num_train=NUM_TRAIN, num_val=NUM_VAL)


@pytest.fixture(scope="module")
def adapted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapted")
    train_here(arguments(data, folder, **TWO, cache_embeddings="off"))
    return folder


def best_of(folder: Path) -> Path:
    return Path(json.loads((folder / "summary.json").read_text())["best_checkpoint"])


def test_checkpoints_hold_merged_weights_under_sams_own_keys(data: Path, adapted: Path) -> None:
    best, stock = read_state(best_of(adapted)), build_sam("vit_tiny", 64)
    assert best.keys() == stock.state_dict().keys() == read_weights(adapted).keys()
    load_state(stock, read_state(PACKAGED_TINY))
    changed = {n for n, t in stock.state_dict().items() if not torch.equal(t, best[n])}
    in_encoder = {name for name in changed if name.startswith("image_encoder.")}
    layers = ("attn.qkv", "mlp.lin1", "mlp.lin2")
    assert in_encoder == {f"image_encoder.blocks.{i}.{n}.weight" for i in (2, 3) for n in layers}
    keys = slice(128, 256)  # of the fused matrix: not among the targets
    name = "image_encoder.blocks.3.attn.qkv.weight"
    assert torch.equal(best[name][keys], stock.state_dict()[name][keys])
    assert isinstance(samft.load_sam(adapted / "last.ckpt"), Sam)


def test_evaluate_scores_the_checkpoint_as_the_run_did(data: Path, adapted: Path) -> None:
    best = best_of(adapted)
    argv = ["--checkpoint", best, "--data_root", data, "--split", "val"]
    result = evaluate_here([*map(str, argv), "--device", "cpu", "--num_workers", "0"])
    step = int(best.name.split("-")[0])
    (line,) = (line for line in read_metrics(adapted, "val") if line["step"] == step)
    assert result["per_mask_iou"] == pytest.approx(line["per_mask_iou"], abs=1e-6)


def test_an_adapter_stands_beside_and_merges_into_the_base(adapted: Path, tmp_path: Path) -> None:
    best = best_of(adapted)
    path = best.with_suffix(".adapter.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        low_rank = {name for name in file.keys() if name.endswith((".up", ".down"))}
    assert metadata["base_sha256"] == sha256_of(PACKAGED_TINY)
    assert (metadata["rank"], metadata["alpha"], metadata["targets"]) == ("2", "4.0", "q,v,mlp")
    assert low_rank and len(list(adapted.glob("*.adapter.safetensors"))) == 1
    output = tmp_path / "merged.safetensors"
    argv = ["--checkpoint", PACKAGED_TINY, "--adapter", path, "--format", "safetensors"]
    export([*map(str, argv), "--output", str(output)])
    merged, expected = read_state(output), read_state(best)
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=1e-5)


def test_a_resumed_run_is_the_same_to_the_bit(data: Path, adapted: Path, tmp_path: Path) -> None:
    argv = arguments(data, tmp_path, **TWO, cache_embeddings="off")
    assert command_here([*argv, "--stop_after", "3"]) == 75
    assert command_here(argv) == 0
    assert largest_difference(tmp_path, adapted) == 0.0


def test_two_processes_with_a_cache_learn_the_same(
    gloo2: GlooPool, data: Path, adapted: Path, tmp_path: Path
) -> None:
    changes = {**SHORT, "freeze_image_encoder": False, "cache_dtype": "float32"}
    results = gloo2.run(encodings_of, cached_arguments(data, tmp_path, **changes))
    assert [code for code, _ in results] == [0, 0]
    assert sum(number for _, number in results) == 2 * NUM_TRAIN + NUM_VAL
    check_equal_metrics(tmp_path, adapted, rel=1e-3)
    assert (tmp_path / "report.html").exists()  # whose pictures come from what is cached, too


def test_checkpointed_activations_change_nothing(data: Path, adapted: Path, tmp_path: Path) -> None:
    options = {"activation_checkpointing": "full", "cache_embeddings": "off", "steps": 4}
    train_here(arguments(data, tmp_path, **{**TWO, **options}))
    check_equal_metrics(tmp_path, adapted, rel=1e-5)


def test_a_rank_above_the_width_is_one_sentence(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_here(arguments(data, tmp_path, **{**SHORT, "lora_rank": 129})) == 2
    assert "lora_rank: 129 is more than 128, the width of vit_tiny" in capsys.readouterr().err


def test_without_a_frozen_block_nothing_is_cached(data: Path, tmp_path: Path) -> None:
    changes = {**SHORT, "train_blocks": None, "steps": 1, "freeze_image_encoder": False}
    argv = cached_arguments(data, tmp_path, **{**changes, "cache_embeddings": "auto"})
    assert command_here(argv) == 0
    assert not (tmp_path / "embeddings").exists()
