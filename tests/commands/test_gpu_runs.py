"""Whole commands on pretended GPUs (`helpers/pretend_cuda`): no fault, and one wait in a step.

Nothing of this needs a GPU; what does is in `make gpu`.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.pretend_cuda.ledger import CudaReport
from helpers.pretend_cuda.runs import PretendedRun, needs_harness, run_with_pretended_gpus
from helpers.short_runs import arguments, write_data

pytestmark = [pytest.mark.processes, needs_harness]

# The host must know whether the gradient is finite before it changes any weight.
WAITS_OF_A_STEP = ["samft/training/engine.py _update: item"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset in `data`; commands put their results beside it."""
    folder = tmp_path_factory.mktemp("gpu")
    write_data(folder / "data", num_train=6, num_val=2)
    return folder


def train(
    folder: Path, name: str, *, processes: int = 1, code: int = 0, **settings: Any
) -> PretendedRun:
    """A run of three steps in a folder of this name; checked for what no run may do."""
    changes = {"steps": 3, "metrics_interval": 3, "num_workers": 1, "device": "auto", **settings}
    argv = arguments(folder / "data", folder / name, **changes)
    run = run_with_pretended_gpus("samft.train", argv, folder=folder, processes=processes)
    check_run(run, processes=processes, code=code)
    return run


def check_run(run: PretendedRun, *, processes: int = 1, code: int = 0) -> None:
    assert run.code == code, run.output[-5000:]
    assert len(run.reports) == processes
    for report in run.reports:
        assert not report.faults


def check_state(folder: Path) -> None:
    """Every number in last.ckpt has arrived."""
    state = torch.load(folder / "last.ckpt", weights_only=True)
    moments = [value for own in state["optimizer"]["state"].values() for value in own.values()]
    tensors = [*state["model"].values(), *(v for v in moments if isinstance(v, torch.Tensor))]
    assert len(moments) > 100
    assert [tensor.shape for tensor in tensors if not tensor.isfinite().all()] == []


def waits_of_the_last_step(report: CudaReport) -> list[str]:
    return report.steps[-1].functions_that_wait()


@pytest.fixture(scope="module")
def fresh(folder: Path) -> PretendedRun:
    return train(folder, "fresh")


def test_fresh_run(fresh: PretendedRun, folder: Path) -> None:
    check_state(folder / "fresh")
    assert len(fresh.reports[0].steps) == 3


def test_loading_holds_up_no_step(fresh: PretendedRun) -> None:
    # A copy that is not blocking, from other memory, is waited for all the same
    kinds = {wait.kind for wait in fresh.reports[0].waits}
    assert "copy from the host" in kinds
    assert "copy from memory that is not page-locked" not in kinds


def test_a_step_waits_once(fresh: PretendedRun) -> None:
    assert waits_of_the_last_step(fresh.reports[0]) == WAITS_OF_A_STEP


def test_validation_brings_the_numbers_of_an_image_to_the_host_at_once(
    fresh: PretendedRun,
) -> None:
    places = [wait.place for wait in fresh.reports[0].waits.elements()]
    functions = [place.function for place in places if "evaluation/" in place.file]
    # Of two images, before the first step and after the last; masks come one by one
    assert functions == ["_score_logits"] * 4


def test_cached_float16_run_with_probe(folder: Path) -> None:
    run = train(
        folder,
        "cached",
        freeze_image_encoder=True,
        cache_embeddings="on",
        amp="fp16",
        probe_memory=True,
    )
    check_state(folder / "cached")
    # GradScaler asks on the device whether a gradient has overflowed, as fused AdamW lets it
    assert waits_of_the_last_step(run.reports[0]) == WAITS_OF_A_STEP


def test_sharded_run_resumes_on_two_gpus(folder: Path) -> None:
    settings: dict[str, Any] = {"optimizer_sharding": True, "steps": 4, "metrics_interval": 2}
    # Stopped as planned, with code 75, of which torchrun makes 1
    train(folder, "sharded", processes=2, code=1, stop_after=2, **settings)
    assert json.loads((folder / "sharded" / "status.json").read_text())["exit_code"] == 75
    check_state(folder / "sharded")
    run = train(folder, "sharded", processes=2, **settings)
    check_state(folder / "sharded")
    assert len(run.reports[0].steps) == 2
    for report in run.reports:
        assert {collective.devices for collective in report.collectives} == {"cuda"}
        assert waits_of_the_last_step(report) == WAITS_OF_A_STEP


def test_deterministic_run(folder: Path) -> None:
    # Nothing is computed for which CUDA has no deterministic kernel; it would be a fault
    run = train(folder, "deterministic", deterministic=True, steps=1, metrics_interval=1)
    assert len(run.reports[0].steps) == 1


def test_deterministic_run_with_clicks(folder: Path) -> None:
    # Clicks are chosen on the device: a step waits no more often, and adds up in a fixed order
    settings: dict[str, Any] = {"prompts": "mixed", "correction_rounds": 1, "multimask": "best"}
    run = train(folder, "clicks", deterministic=True, steps=3, **settings)
    check_state(folder / "clicks")
    for step in run.reports[0].steps[1:]:  # with boxes, and with points
        assert step.functions_that_wait() == WAITS_OF_A_STEP


def test_dry_run(folder: Path) -> None:
    run = train(folder, "dry", dry_run=True)
    assert "of 80.0 GiB" in run.output


def test_evaluate(fresh: PretendedRun, folder: Path) -> None:
    [checkpoint] = (folder / "fresh").glob("3-*.ckpt")
    argv = ["--checkpoint", str(checkpoint), "--data_root", str(folder / "data")]
    argv += ["--split", "val", "--output", str(folder / "scores.json"), "--clicks", "2"]
    argv += ["--automatic", "2", "--points_per_side", "2"]
    check_run(run_with_pretended_gpus("samft.evaluate", argv, folder=folder))
    scores = json.loads((folder / "scores.json").read_text())
    [logged] = [
        line["per_mask_iou"]
        for line in map(json.loads, (folder / "fresh" / "metrics.jsonl").read_text().splitlines())
        if line["split"] == "val" and line["step"] == 3
    ]
    assert scores["per_mask_iou"] == pytest.approx(logged, abs=1e-6)


def test_predict(fresh: PretendedRun, folder: Path) -> None:
    [checkpoint] = (folder / "fresh").glob("3-*.ckpt")
    data = folder / "data" / "val"
    argv = ["--checkpoint", str(checkpoint), "--images", str(data)]
    argv += ["--annotations", str(data / "_annotations.coco.json")]
    argv += ["--output_dir", str(folder / "predictions")]
    check_run(run_with_pretended_gpus("samft.predict", argv, folder=folder))
    results = json.loads((folder / "predictions" / "results.json").read_text())
    # Every box of the file: five objects, and one without a mask; crowds are not prompts
    assert sorted(row["annotation_id"] for row in results) == [1, 2, 3, 4, 5, 902]


def test_predict_from_points(fresh: PretendedRun, folder: Path) -> None:
    [checkpoint] = (folder / "fresh").glob("3-*.ckpt")
    [image, *_] = sorted((folder / "data" / "val").glob("*.png"))
    argv = ["--checkpoint", str(checkpoint), "--images", str(image), "--amp", "bf16"]
    argv += ["--point", "12,13", "--point", "3,4,0", "--output_dir", str(folder / "pointed")]
    check_run(run_with_pretended_gpus("samft.predict", argv, folder=folder))
    assert len(json.loads((folder / "pointed" / "results.json").read_text())) == 1
