"""No command multiplies in TF32, on a GPU that would: whatever its program has set."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.deployed_scores import deployed_iou
from helpers.pretend_cuda.runs import needs_harness, run_with_pretended_gpus
from helpers.short_runs import (
    arguments,
    evaluate_here,
    read_metrics,
    read_weights,
    train_here,
    write_data,
)
from helpers.tensor_cores import TensorCores
from samft import export, predict
from samft.weights.download import PACKAGED_TINY

TINY = str(PACKAGED_TINY)


@pytest.fixture(autouse=True)
def _program_that_wants_tf32() -> Iterator[None]:
    torch.set_float32_matmul_precision("high")
    assert torch.backends.cudnn.allow_tf32  # PyTorch's default
    yield
    after = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    assert after == ("high", True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), num_train=4, num_val=3)


def scores(folder: Path) -> list[dict[str, Any]]:
    kept = ("per_mask_iou", "loss", "iou_predicted")
    return [{name: line.get(name) for name in kept} for line in read_metrics(folder)]


@pytest.mark.run
@pytest.mark.parametrize("frozen", [False, True])
def test_training_and_evaluation_give_the_numbers_of_a_cpu(
    data: Path, tmp_path: Path, frozen: bool
) -> None:
    settings = {"steps": 2, "metrics_interval": 1, "freeze_image_encoder": frozen}
    if frozen:
        settings |= {"cache_embeddings": "on", "cache_dtype": "float32"}
    train_here(arguments(data, tmp_path / "cpu", **settings))
    with TensorCores() as gpu:
        summary = train_here(arguments(data, tmp_path / "gpu", **settings))
        path = ["--checkpoint", summary["best_checkpoint"]]
        where = ["--data_root", str(data), "--split", "val"]
        evaluated = evaluate_here([*path, *where, "--num_workers", "0", "--device", "cpu"])
    assert not gpu.rounded and gpu.exact["addmm"] and gpu.exact["convolution"]
    assert scores(tmp_path / "gpu") == scores(tmp_path / "cpu")
    before, after = read_weights(tmp_path / "cpu"), read_weights(tmp_path / "gpu")
    assert all(torch.equal(before[name], after[name]) for name in before)
    validated = json.loads(Path(path[1]).with_suffix(".json").read_text())["metrics"]
    assert evaluated["per_mask_iou"] == pytest.approx(validated["val_per_mask_iou"], rel=1e-12)


@pytest.mark.run
@pytest.mark.parametrize("automatic", [False, True])
def test_prediction_is_exact(data: Path, tmp_path: Path, automatic: bool) -> None:
    argv = ["--checkpoint", TINY, "--output_dir", str(tmp_path / "out"), "--num_workers", "0"]
    argv += ["--images", str(data / "val")]
    if automatic:
        argv += ["--automatic", "--points_per_side", "2"]
    else:
        argv += ["--annotations", str(data / "val" / "_annotations.coco.json")]
    with TensorCores() as gpu:
        predict.main([*argv, "--device", "cpu"])
    assert not gpu.rounded and gpu.exact["convolution"]


@pytest.mark.run
def test_exports_are_verified_exactly(data: Path, tmp_path: Path) -> None:
    with TensorCores() as gpu:
        export.main(
            ["--checkpoint", TINY, "--format", "safetensors", "--output", str(tmp_path / "sam")]
        )
    assert not gpu.rounded and gpu.exact["convolution"]


@needs_harness
@pytest.mark.processes
def test_on_a_gpu_what_is_validated_is_what_is_deployed(data: Path, tmp_path: Path) -> None:
    argv = arguments(data, tmp_path / "run", steps=2, metrics_interval=1, device="cuda")
    trained = run_with_pretended_gpus("samft.train", argv, folder=tmp_path)
    assert trained.code == 0 and not trained.reports[0].faults, trained.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    checkpoint = Path(summary["best_checkpoint"])
    validated = json.loads(checkpoint.with_suffix(".json").read_text())["metrics"]
    where = ["--data_root", str(data), "--split", "val", "--output", str(tmp_path / "iou.json")]
    argv = ["--checkpoint", str(checkpoint), *where, "--device", "cuda", "--num_workers", "0"]
    evaluated = run_with_pretended_gpus("samft.evaluate", argv, folder=tmp_path)
    assert evaluated.code == 0 and not evaluated.reports[0].faults, evaluated.output
    score = json.loads((tmp_path / "iou.json").read_text())["per_mask_iou"]
    assert score == pytest.approx(validated["val_per_mask_iou"], abs=1e-12)
    val = data / "val"
    deployed = deployed_iou(checkpoint, val / "_annotations.coco.json", val)
    assert score == pytest.approx(deployed, abs=1e-5)
