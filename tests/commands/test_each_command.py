"""Each command once, one after the other as a person would, on one process and on two."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.preloaded import run_preloaded
from helpers.short_runs import arguments, clean_environment, evaluate_here, train_here
from helpers.tiny_checkpoint import tiny_sam, write_tiny
from samft import average, check, demo, export, load_sam, predict
from samft.runtime.files import sha256_of

pytestmark = pytest.mark.smoke
SECONDS = 120


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "data"
    sizes = ("--images", "16", "--size", "128")
    return demo.main(["--output_dir", str(folder), *sizes])


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train_here(run_of(data, tmp_path_factory.mktemp("run")))


def run_of(data: Path, folder: Path, **changes: Any) -> list[str]:
    return arguments(data, folder, **{"steps": 4, "metrics_interval": 2, **changes})


def command(*argv: str, processes: int) -> str:
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
    command = [sys.executable, *launcher, "-m", *argv]
    code, output = run_preloaded(command, clean_environment(), timeout=SECONDS)
    assert code == 0, output
    return output


def test_check(data: Path) -> None:
    report = check.main(["--data_root", str(data)])
    assert {"train", "val"} <= set(report["splits"]), report.keys()


def test_train_and_evaluate(data: Path, trained: dict[str, Any]) -> None:
    assert trained["steps"] == 4
    best = trained["best_checkpoint"]
    scores = evaluate_here(["--checkpoint", best, "--data_root", str(data), "--device", "cpu"])
    assert scores["per_mask_iou"] == pytest.approx(trained["best_val_per_mask_iou"], abs=1e-12)


def test_average(data: Path, trained: dict[str, Any], tmp_path: Path) -> None:
    other, output = str(write_tiny(tmp_path, sam=tiny_sam())), tmp_path / "averaged.pth"
    ends = (other, trained["best_checkpoint"])
    where = ("--data_root", str(data), "--device", "cpu")
    written = average.main([*ends, *where, "--points", "0.5", "--output", str(output)])
    points = written["average"]["points"]
    best = max(points, key=lambda point: point["per_mask_iou"])
    assert [point["weight"] for point in points] == [0, 0.5, 1]
    assert points[2]["per_mask_iou"] == pytest.approx(trained["best_val_per_mask_iou"], abs=1e-12)
    sidecar = json.loads(output.with_suffix(".json").read_text())
    files = sidecar["average"]["checkpoints"]
    assert sidecar["sha256"] == sha256_of(output)
    assert [file["sha256"] for file in files] == [sha256_of(Path(path)) for path in ends]
    assert [file["weight"] for file in files] == [1 - best["weight"], best["weight"]]
    assert sidecar["config"]["checkpoint_path"] == "auto"
    states = [load_sam(path).state_dict() for path in (*ends, output)]
    for name, tensor in states[2].items():
        expected = torch.lerp(states[0][name], states[1][name], best["weight"])
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-7)
    scores = evaluate_here(["--checkpoint", str(output), *where])
    assert scores["per_mask_iou"] == best["per_mask_iou"] == sidecar["metrics"]["val_per_mask_iou"]


def test_predict(data: Path, trained: dict[str, Any], tmp_path: Path) -> None:
    source = ("--images", str(data / "val"))
    boxes = ("--annotations", str(data / "val" / "_annotations.coco.json"))
    checkpoint = ("--checkpoint", trained["best_checkpoint"])
    predict.main([*checkpoint, *source, *boxes, "--output_dir", str(tmp_path), "--device", "cpu"])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results and {"image_id", "segmentation", "score"} <= results[0].keys()


def test_export(trained: dict[str, Any], tmp_path: Path) -> None:
    output = tmp_path / "tuned.safetensors"
    checkpoint = ("--checkpoint", trained["best_checkpoint"])
    export.main([*checkpoint, "--format", "safetensors", "--output", str(output)])
    expected = load_sam(trained["best_checkpoint"]).state_dict()
    exported = load_file(output)
    assert expected.keys() == exported.keys()
    assert all(torch.equal(expected[name], exported[name]) for name in expected)


def test_two_processes_train_and_evaluate(data: Path, tmp_path: Path) -> None:
    command("samft.train", *run_of(data, tmp_path / "run", batch_size=1), processes=2)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 4
    where = ("--data_root", str(data), "--device", "cpu", "--output", str(tmp_path / "scores.json"))
    where += ("--automatic", "3", "--points_per_side", "4")
    command("samft.evaluate", "--checkpoint", summary["best_checkpoint"], *where, processes=2)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["automatic"]["images"] == 3
    expected = summary["best_val_per_mask_iou"]
    assert scores["per_mask_iou"] == pytest.approx(expected, abs=1e-12)
    where = ("--data_root", str(data), "--device", "cpu", "--output", str(tmp_path / "mean.pth"))
    ends = (str(write_tiny(tmp_path, sam=tiny_sam())), summary["best_checkpoint"])
    where += ("--general_data_root", str(data))
    command("samft.average", *ends, *where, "--points", "0,1", processes=2)
    points = json.loads((tmp_path / "mean.json").read_text())["average"]["points"]
    for name in ("per_mask_iou", "general_per_mask_iou"):
        assert points[1][name] == pytest.approx(expected, abs=1e-12)
