"""`samft.finetune`: the run of the command, with a caller's own data, loss, metrics, callbacks."""

import json
import logging
import multiprocessing
import os
import resource
import signal
import threading
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import samft
from helpers.own_datasets import Discs, write_as_coco
from helpers.short_runs import largest_difference, read_metrics
from samft.errors import ConfigError, DataError, RunStopped
from samft.training.losses import mask_losses, mask_sums

pytestmark = pytest.mark.run


def a_config(output_dir: Path, **changes: Any) -> samft.TrainConfig:
    settings = {
        "model_type": "vit_tiny",
        "checkpoint_path": "auto",
        "image_size": 64,
        "batch_size": 2,
        "steps": 4,
        "metrics_interval": 2,
        "learning_rate": 1e-3,
        "num_workers": 0,
        "device": "cpu",
        "output_dir": str(output_dir),
        **changes,
    }
    return samft.TrainConfig(**settings)


def overlap_losses(mask_logits, iou_predicted, **truth):
    losses = mask_losses(mask_logits, iou_predicted, **truth)
    extents = truth["input_sizes"][truth["image_index"]].float()
    sums = mask_sums(mask_logits, truth["targets"], truth["windows"], extents)
    return losses._replace(total=1 - sums.overlap / sums.target_area.clamp(min=1))


def other_losses(mask_logits, iou_predicted, **truth):
    return overlap_losses(mask_logits, iou_predicted, **truth)


def iou(mask: np.ndarray, truth: np.ndarray) -> float:
    return (mask & truth).sum() / (mask | truth).sum()


DATA = {"train_data": Discs(6), "val_data": Discs(3, seed=1)}


@pytest.mark.parametrize("cached", [False, True])
def test_own_datasets_train_and_score_as_the_same_coco_files(tmp_path: Path, cached) -> None:
    for split, dataset in zip(("train", "val"), DATA.values(), strict=True):
        write_as_coco(dataset, tmp_path / "data", split=split)
    settings = {"freeze_image_encoder": cached, "cache_embeddings": "on" if cached else "auto"}
    ours = samft.finetune(a_config(tmp_path / "ours", **settings), **DATA)
    theirs = samft.finetune(a_config(tmp_path / "theirs", data_root=tmp_path / "data", **settings))
    assert largest_difference(tmp_path / "ours", tmp_path / "theirs") == 0.0
    assert ours.scores == theirs.scores and ours.baseline == theirs.baseline
    assert ours.summary["data"]["train"]["masks"] == 12
    assert (tmp_path / "ours" / "report.html").stat().st_size > 10_000


@pytest.mark.smoke
def test_the_result_is_what_the_files_say(tmp_path: Path) -> None:
    calls: list[tuple[int, dict[str, float]]] = []
    result = samft.finetune(
        a_config(tmp_path),
        **DATA,
        metrics={"iou_again": iou},
        callbacks=[lambda step, numbers: calls.append((step, numbers))],
    )
    lines = read_metrics(tmp_path, "val")
    assert [step for step, _ in calls] == [line["step"] for line in lines] == [0, 2, 4]
    for (_, numbers), line in zip(calls, lines, strict=True):
        assert line["iou_again"] == pytest.approx(line["per_mask_iou"], abs=1e-12)
        assert numbers["val/iou_again"] == line["iou_again"]
    assert calls[0][1].keys() & {"train/loss"} == set() and "train/loss" in calls[1][1]
    best = max(lines[1:], key=lambda line: line["per_mask_iou"])
    assert result.scores == {name: best[name] for name in result.scores}
    assert result.baseline == {name: lines[0][name] for name in result.scores}
    assert result.scores["iou_again"] == pytest.approx(result.summary["best_val_per_mask_iou"])
    assert result.summary == json.loads((tmp_path / "summary.json").read_text())
    assert samft.load_sam(result.best_checkpoint).image_encoder.img_size == 64
    again = samft.finetune(a_config(tmp_path), **DATA, metrics={"iou_again": iou})
    assert again.scores == result.scores and len(calls) == 3


def test_a_callback_ends_a_run_which_is_then_finished(tmp_path: Path) -> None:
    calls: list[int] = []

    def end_at_2(step: int, numbers: dict[str, float]) -> bool:
        calls.append(step)
        return step == 2

    nan = {"nan": lambda mask, truth: float("nan")}
    result = samft.finetune(a_config(tmp_path), **DATA, callbacks=[end_at_2], metrics=nan)
    assert calls == [0, 2] and result.summary["steps"] == result.summary["best_step"] == 2
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "done"
    assert np.isnan(result.scores["nan"]) and np.isnan(result.baseline["nan"])
    again = samft.finetune(a_config(tmp_path), **DATA, callbacks=[end_at_2], metrics=nan)
    assert again.summary["steps"] == 2 and calls == [0, 2]


def test_a_run_with_an_own_loss_resumes_and_not_with_another(tmp_path: Path) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    result = samft.finetune(a_config(straight), **DATA, loss=overlap_losses)
    sidecar = json.loads(result.best_checkpoint.with_suffix(".json").read_text())
    assert sidecar["loss"].startswith("overlap_losses ")
    with pytest.raises(RunStopped, match="saved after step 3 of 4"):
        samft.finetune(a_config(stopped, stop_after=3), **DATA, loss=overlap_losses)
    for loss in (None, other_losses):
        with pytest.raises(ConfigError, match="holds a run of another configuration") as failure:
            samft.finetune(a_config(stopped), **DATA, loss=loss)
        assert "loss                     overlap_losses " in str(failure.value)
    samft.finetune(a_config(stopped), **DATA, loss=overlap_losses)
    assert largest_difference(straight, stopped) == 0.0
    own = tmp_path / "own"
    samft.finetune(a_config(own), **DATA)
    assert largest_difference(straight, own) > 0
    with pytest.raises(ConfigError, match="loss                     samft's own"):
        samft.finetune(a_config(own), **DATA, loss=overlap_losses)


def test_a_run_with_other_data_is_not_resumed(tmp_path: Path) -> None:
    with pytest.raises(RunStopped):
        samft.finetune(a_config(tmp_path, stop_after=2), **DATA)

    class Changed(Discs):
        def __getitem__(self, i):
            image, masks = super().__getitem__(i)
            return image, masks if i else masks[:, ::-1]

    with pytest.raises(ConfigError, match="training data"):
        samft.finetune(a_config(tmp_path), train_data=Changed(6), val_data=DATA["val_data"])


def test_validation_images_may_be_held_out_or_of_a_coco_file(tmp_path: Path) -> None:
    result = samft.finetune(a_config(tmp_path / "a", val_fraction=0.3), train_data=Discs(6))
    assert [result.summary["data"][split]["images"] for split in ("train", "val")] == [4, 2]
    write_as_coco(Discs(6), tmp_path / "data", split="val")
    config = a_config(tmp_path / "b", data_root=tmp_path / "data")
    result = samft.finetune(config, train_data=Discs(8))
    skipped = result.summary["data"]["train"]["skipped"]
    assert skipped == {"image-in-train-and-val": 6}  # files of equal pixels
    with pytest.raises(DataError, match="there is nothing to validate on: give val_data"):
        samft.finetune(a_config(tmp_path / "c"), train_data=Discs(6))


def process_state() -> dict[str, Any]:
    """What a run must not change in its process."""
    handlers = {number: signal.getsignal(number) for number in (2, 10, 12, 15)}
    cudnn = torch.backends.cudnn
    return {
        "handlers": handlers,
        "threads": {thread.name for thread in threading.enumerate()},
        "environment": dict(os.environ),
        "log": (logging.getLogger().handlers[:], logging.getLogger("samft").level),
        "warnings": warnings.showwarning,
        "random": torch.get_rng_state().tolist(),
        "torch": (
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(),
            torch.is_grad_enabled(),
            torch.is_anomaly_enabled(),
            torch.get_num_threads(),
            cudnn.benchmark,
            cudnn.allow_tf32,
            torch.multiprocessing.get_sharing_strategy(),
        ),
        "files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "folder": os.getcwd(),
        "hook": threading.excepthook,
    }


@pytest.mark.parametrize("ending", ["done", "failed", "stopped"])
def test_nothing_is_left_behind_in_the_process(tmp_path: Path, ending: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 5000), hard))

    def act(step: int, numbers: dict[str, float]) -> None:
        if step == 2 and ending == "failed":
            raise KeyError("of the caller")
        if step == 2 and ending == "stopped":
            os.kill(os.getpid(), signal.SIGINT)

    torch.manual_seed(5)
    before, children = process_state(), set(multiprocessing.active_children())
    for workers in (1, 0):
        config = a_config(tmp_path / str(workers), num_workers=workers, deterministic=True)
        try:
            samft.finetune(config, **DATA, callbacks=[act])
            outcome = "done"
        except KeyError:
            outcome = "failed"
        except RunStopped:
            outcome = "stopped"
        assert outcome == ending
    after = process_state()
    assert {name: value for name, value in after.items() if value != before[name]} == {}
    # Those of other tests, their servers say, may end meanwhile, and come in any order.
    assert not set(multiprocessing.active_children()) - children
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


REFUSED = [
    ({"data_root": "D"}, DATA, "data_root: has no effect with train_data and val_data"),
    ({"train_annotations": "a", "train_images": "b"}, DATA, "train_annotations: has no effect"),
    ({"group_by": "folder"}, DATA, "group_by: has no effect with train_data"),
    ({"page": 2}, DATA, "page: has no effect with train_data and val_data"),
    ({"loss_dice_weight": 2.0}, {**DATA, "loss": mask_losses}, "loss_dice_weight: has no effect"),
    ({"cuda_graphs": True}, {**DATA, "loss": mask_losses}, "cuda_graphs: has no effect with loss"),
    ({"steps": "many"}, DATA, "steps: 'many' is not a whole number."),
    ({"augment": "flips"}, DATA, "Did you mean 'flip'?"),
    ({}, {"val_data": Discs(2)}, "data_root is missing"),
    ({}, {**DATA, "metrics": {"loss": iou}}, "metrics: 'loss' is a number of samft's own"),
]


@pytest.mark.parametrize(
    ("settings", "parts", "message"), REFUSED, ids=lambda value: str(value)[:30]
)
def test_what_would_have_no_effect_is_refused(tmp_path, settings, parts, message) -> None:
    with pytest.raises(ConfigError) as failure:
        samft.finetune(a_config(tmp_path / "out", **settings), **parts)
    assert message in str(failure.value) and not (tmp_path / "out").exists()


def test_a_dictionary_is_no_configuration() -> None:
    with pytest.raises(ConfigError, match=r"give a samft.TrainConfig\(...\), not a dict"):
        samft.finetune({"data_root": "DATASET"})  # type: ignore[arg-type]


def test_a_dry_run_forecasts(tmp_path: Path) -> None:
    config = a_config(tmp_path, dry_run=True)
    result = samft.finetune(config, **DATA, loss=overlap_losses, metrics={"again": iou})
    assert result.best_checkpoint is None and result.scores == {}
    assert result.summary["largest_batch"] > 0
    assert not (tmp_path / "last.ckpt").exists()


def test_settings_are_converted(tmp_path: Path) -> None:
    config = replace(a_config(tmp_path), output_dir=tmp_path, learning_rate="1e-3", steps=2)
    samft.finetune(config, **DATA)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert (state["config"]["output_dir"], state["config"]["learning_rate"]) == (
        str(tmp_path),
        1e-3,
    )
