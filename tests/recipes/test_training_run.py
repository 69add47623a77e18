import hashlib
import json
import math
import re
import shutil
import threading
import time
from collections import namedtuple
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from pycocotools.coco import COCO

import samft
from helpers.coco_files import write_coco
from helpers.deployed_scores import deployed_iou
from helpers.equal_metrics import check_equal_metrics
from helpers.gloo_pool import GlooPool
from helpers.short_runs import (
    INTERVAL,
    STEPS,
    arguments,
    command_here,
    largest_difference,
    read_metrics,
    read_weights,
    train_here,
    write_data,
)
from helpers.trackers import (
    check_same_curves,
    curves_of_metrics,
    mlflow_curves,
    read_events,
    tensorboard_curves,
    wandb_curves,
)
from samft import cli
from samft.config import parse_config
from samft.errors import DataError
from samft.models.sam import build_sam
from samft.recipes import fit
from samft.reports.validation_images import ValidationImages
from samft.training.engine import Trainer

pytestmark = pytest.mark.run

VAL_STEPS = [0, 5, 10, 15, 20]
TRAIN_STEPS = VAL_STEPS[1:]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory) -> Path:
    """The folder of a run of 20 steps without interruption, keeping the best two."""
    folder = tmp_path_factory.mktemp("straight")
    train_here(arguments(data, folder, save_top_k=2))
    return folder


@pytest.fixture(scope="module")
def summary(straight) -> dict[str, Any]:
    return json.loads((straight / "summary.json").read_text())


def best_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.ckpt") if path.name != "last.ckpt")


# The files of a run


def test_the_first_step_does_not_wait_for_the_pictures_of_step_0(data, tmp_path, monkeypatch):
    has_stepped, in_time = threading.Event(), []
    draw, log_step = ValidationImages.record_validation, fit._log_step

    def draw_late(images: ValidationImages, step: int, validation: Any) -> None:
        if step == 0:
            in_time.append(has_stepped.wait(20))
        draw(images, step, validation)

    def log_and_tell(*arguments: Any) -> None:
        has_stepped.set()
        log_step(*arguments)

    monkeypatch.setattr(ValidationImages, "record_validation", draw_late)
    monkeypatch.setattr(fit, "_log_step", log_and_tell)
    train_here(arguments(data, tmp_path, steps=2, num_workers=1))
    assert in_time == [True]


def test_metrics_have_every_promised_line_and_key(straight):
    val, train = (read_metrics(straight, split) for split in ("val", "train"))
    assert [line["step"] for line in val] == VAL_STEPS
    assert [line["step"] for line in train] == TRAIN_STEPS
    losses = {"per_mask_iou", "loss", "loss_focal", "loss_dice", "loss_iou"}
    rates = {"lr", "images_per_second", "masks_per_second", "peak_memory_gib"}
    assert all(losses <= line.keys() for line in val)
    assert all(losses | rates <= line.keys() for line in train)
    for line in [*val, *train]:
        parts = 10 * line["loss_focal"] + line["loss_dice"] + line["loss_iou"]
        assert line["loss"] == pytest.approx(parts, rel=1e-6)
        assert 0 <= line["per_mask_iou"] <= 1
        assert all(math.isfinite(v) for name, v in line.items() if name != "split")
    # Warm-up is a tenth of the steps; the rate falls to a tenth at two thirds, and once more.
    assert [line["lr"] for line in train] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-5])
    assert all(line["images_per_second"] > 0 and line["masks_per_second"] > 0 for line in train)


def test_interval_that_does_not_divide_the_steps_ends_with_a_line(data, tmp_path):
    train_here(arguments(data, tmp_path, steps=3, metrics_interval=2))
    assert [line["step"] for line in read_metrics(tmp_path, "train")] == [2, 3]
    assert [line["step"] for line in read_metrics(tmp_path, "val")] == [0, 2, 3]


def test_step_0_is_the_untouched_checkpoint(data, straight, tmp_path):
    train_here(arguments(data, tmp_path, steps=1, learning_rate=0.01))
    ours, theirs = (read_metrics(folder, "val")[0] for folder in (straight, tmp_path))
    assert ours["per_mask_iou"] == theirs["per_mask_iou"]
    assert ours["loss"] == theirs["loss"]


def test_config_repeats_the_run(data, straight, tmp_path):
    argv = ["--config", str(straight / "config.yaml")]
    assert parse_config(argv) == parse_config(arguments(data, straight, save_top_k=2))
    train_here([*argv, "--output_dir", str(tmp_path)])
    assert largest_difference(straight, tmp_path) == 0.0


def test_best_checkpoints_are_the_best_validations(straight, summary):
    scores = {line["step"]: line["per_mask_iou"] for line in read_metrics(straight, "val")}
    untouched = scores.pop(0)
    ranked = sorted(scores, key=lambda step: (-scores[step], step))
    assert {path.name for path in best_files(straight)} == {
        f"{step}-{scores[step]:.2f}.ckpt" for step in ranked[:2]
    }
    assert {p.stem for p in straight.glob("*-*.json")} == {p.stem for p in best_files(straight)}
    best = ranked[0]
    assert summary["best_step"] == best
    assert summary["best_val_per_mask_iou"] == scores[best]
    assert summary["baseline_val_per_mask_iou"] == untouched
    assert summary["best_checkpoint"] == str(straight / f"{best}-{scores[best]:.2f}.ckpt")


def test_best_checkpoint_is_a_flat_state_dict_of_sams_own_keys(straight):
    for path in best_files(straight):
        state = torch.load(path, weights_only=True)
        assert list(state) == list(build_sam("vit_tiny", 64).state_dict())
        assert all(type(value) is torch.Tensor for value in state.values())


def test_sidecar_describes_its_checkpoint(data, straight):
    for path in best_files(straight):
        sidecar = json.loads(path.with_suffix(".json").read_text())
        assert sidecar["model_type"] == "vit_tiny"
        assert sidecar["image_size"] == 64
        assert sidecar["resize_mode"] == "pad"
        assert path.name.startswith(f"{sidecar['step']}-")
        assert sidecar["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert sidecar["samft_version"] == samft.__version__
        assert sidecar["torch_version"] == torch.__version__
        assert sidecar["git_commit"] is None or len(sidecar["git_commit"]) == 40
        config = parse_config(arguments(data, straight, save_top_k=2))
        resolved = {**vars(config), "correction_rounds": config.num_corrections}
        assert sidecar["config"] == resolved
        line = next(v for v in read_metrics(straight, "val") if v["step"] == sidecar["step"])
        for name in ("per_mask_iou", "loss", "loss_focal", "loss_dice", "loss_iou"):
            assert sidecar["metrics"][f"val_{name}"] == line[name]


def test_last_checkpoint_holds_the_final_weights_and_plain_values(straight):
    last = torch.load(straight / "last.ckpt", weights_only=True)
    assert last["progress"]["step"] == STEPS
    final = [path for path in best_files(straight) if path.name.startswith(f"{STEPS}-")]
    for path in final:
        best = torch.load(path, weights_only=True)
        assert all(torch.equal(best[name], last["model"][name]) for name in best)
    start = samft.load_sam(Path(samft.__file__).parent / "pretrained" / "vit_tiny.pth")
    before, after = start.mask_decoder.mask_tokens.weight, last["model"]
    assert not torch.equal(before, after["mask_decoder.mask_tokens.weight"])


def test_summary_has_what_is_promised(straight, summary, data):
    assert summary["steps"] == STEPS
    assert summary["wall_seconds"] > summary["train_seconds"] > 0
    assert summary["images_per_second"] == pytest.approx(2 * STEPS / summary["train_seconds"])
    left_out = {"annotation-orphan": 1, "crowd": 1, "mask-missing": 1}
    assert summary["data"] == {
        "train": {"images": 13, "masks": 41, "skipped": {}, "bad_images": {}},
        "val": {"images": 5, "masks": 17, "skipped": left_out, "bad_images": {}},
    }
    assert summary["skipped_steps"] == 0
    assert summary["box_fill_iou"] == pytest.approx(filled_boxes(data / "val"), abs=1e-6)


def filled_boxes(split: Path) -> float:
    """Mean IoU of filling each box of a split, its corners rounded to whole pixels."""
    coco = COCO(split / "_annotations.coco.json")
    ious = []
    for entry in coco.loadAnns(coco.getAnnIds(iscrowd=False)):
        if entry["image_id"] not in coco.imgs or not entry["segmentation"]:
            continue
        mask, (x, y, width, height) = coco.annToMask(entry).astype(bool), entry["bbox"]
        box = np.zeros_like(mask)
        box[round(y) : round(y + height), round(x) : round(x + width)] = True
        ious.append((mask & box).sum() / (mask | box).sum())
    return float(np.mean(ious))


def test_main_returns_the_summary(data, tmp_path):
    returned = train_here(arguments(data, tmp_path, steps=1))
    assert returned == json.loads((tmp_path / "summary.json").read_text())


def test_status_says_done(straight):
    assert json.loads((straight / "status.json").read_text()) == {
        "state": "done",
        "step": STEPS,
        "exit_code": 0,
        "reason": "finished",
        "last_checkpoint": str(straight / "last.ckpt"),
    }


def test_train_log_holds_the_whole_run(straight, summary):
    text = (straight / "train.log").read_text()
    for line in (
        "weights: ",  # before the folder is known to be free
        "train: 13 images, 41 masks",
        "left out: annotation-orphan 1, mask-missing 1, crowd 1",
        "step 0: val_per_mask_iou",
        "step 20/20: loss",
        summary["best_checkpoint"],
    ):
        assert text.count(line) >= 1, line
    assert text.count("weights: ") == 1


def test_tensorboard_has_the_same_scalars(straight):
    check_same_curves(tensorboard_curves(straight), curves_of_metrics(straight))
    for name in ("same_objects", "worst_objects", "calibration"):
        images = read_events(straight, "val").Images(f"masks/{name}")
        assert [event.step for event in images] == VAL_STEPS
    events = read_events(straight)
    assert "config/text_summary" in events.Tags()["tensors"]
    assert events.summary_metadata["_hparams_/session_start_info"].plugin_data.content


def test_its_runs_are_named_by_model_data_and_date(data, straight):
    (run,) = (straight / "tensorboard").iterdir()
    date = r"\d{4}-\d\d-\d\d-\d{4}"
    assert re.fullmatch(f"vit_tiny-{re.escape(data.name)}-{date}", run.name), run.name
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == ["train", "val"]


def test_pictures_before_and_after_are_of_the_same_images(straight):
    before, after, both = (
        cv2.imread(str(straight / f"{name}.png")) for name in ("before", "after", "before_after")
    )
    assert before.shape == after.shape
    assert both.shape[1] > 2 * before.shape[1]
    assert not np.array_equal(before, after)


def test_objects_are_known_at_step_0_and_at_the_best_step(straight, summary):
    rows = json.loads((straight / "objects.json").read_text())
    assert {"0", str(summary["best_step"])} <= rows.keys()
    for step, name in ((0, "baseline"), (summary["best_step"], "best")):
        mean = np.mean(rows[str(step)]["iou_actual"])
        assert mean == pytest.approx(summary[f"{name}_val_per_mask_iou"], abs=1e-12)


# Stop and go on


def run_in_two_parts(argv: list[str], stop_after: int) -> list[int]:
    return [command_here([*argv, "--stop_after", str(stop_after)]), command_here(argv)]


def test_stop_in_the_middle_of_an_epoch_changes_nothing(data, straight, tmp_path):
    argv = arguments(data, tmp_path, save_top_k=2)
    assert command_here([*argv, "--stop_after", "7"]) == 75  # 14 images: one into epoch 1 of 13
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"], status["exit_code"]) == ("preempted", 7, 75)
    assert not (tmp_path / "summary.json").exists()
    assert command_here(argv) == 0
    assert largest_difference(straight, tmp_path) == 0.0
    check_equal_metrics(tmp_path, straight)
    assert {p.name for p in best_files(tmp_path)} == {p.name for p in best_files(straight)}
    for name in ("before.png", "after.png", "objects.json"):
        assert (tmp_path / name).read_bytes() == (straight / name).read_bytes(), name


def test_crash_between_two_saves_changes_nothing(data, straight, tmp_path):
    argv = arguments(data, tmp_path)
    assert command_here([*argv, "--stop_after", "7"]) == 75
    shutil.copy(tmp_path / "last.ckpt", tmp_path / "saved")
    assert command_here([*argv, "--stop_after", "12"]) == 75
    # As if the machine had gone down while it wrote a line, with nothing saved since step 7.
    (tmp_path / "saved").replace(tmp_path / "last.ckpt")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "spl')
    assert command_here(argv) == 0
    assert largest_difference(straight, tmp_path) == 0.0
    check_equal_metrics(tmp_path, straight)
    check_same_curves(tensorboard_curves(tmp_path), curves_of_metrics(tmp_path))


def test_after_a_crash_all_trackers_hold_the_curves_of_the_file(data, tmp_path):
    readers = {"tensorboard": tensorboard_curves, "mlflow": mlflow_curves, "wandb": wandb_curves}
    readers = {name: read for name, read in readers.items() if find_spec(name)}
    if len(readers) == 1:
        pytest.skip("neither mlflow nor wandb: pip install '.[mlflow,wandb]'")
    argv = arguments(data, tmp_path, trackers=",".join(readers))
    assert command_here([*argv, "--stop_after", "7"]) == 75
    shutil.copy(tmp_path / "last.ckpt", tmp_path / "saved")
    assert command_here([*argv, "--stop_after", "12"]) == 75
    (tmp_path / "saved").replace(tmp_path / "last.ckpt")  # as if step 10 had not been saved
    assert command_here(argv) == 0
    for read in readers.values():
        check_same_curves(read(tmp_path), curves_of_metrics(tmp_path))


def test_a_tracker_without_its_package_is_refused_before_the_run(
    data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(cli.EXTRAS, "wandb", ("no_such_package",))
    assert command_here(arguments(data, tmp_path, trackers="tensorboard,wandb")) == 2
    assert "--trackers wandb needs no_such_package, which" in capsys.readouterr().err
    assert not (tmp_path / "tensorboard").exists()


def test_accumulation_and_workers_may_change_on_resume(data, straight, tmp_path):
    argv = arguments(data, tmp_path, save_top_k=2)
    assert command_here([*argv, "--stop_after", "7"]) == 75
    changed = {"batch_size": 1, "accumulate_steps": 2, "num_workers": 1}
    assert command_here(arguments(data, tmp_path, save_top_k=2, **changed)) == 0
    assert largest_difference(straight, tmp_path) < 1e-3  # Adam makes much of rounding
    check_equal_metrics(tmp_path, straight, rel=1e-3)


def test_two_processes_stop_and_resume_as_one_run(gloo2: GlooPool, data, tmp_path):
    folders = tmp_path / "straight", tmp_path / "resumed"
    changes = {"batch_size": 1, "amp": "bf16", "clip_grad_norm": 0.5}
    argvs = [arguments(data, folder, **changes) for folder in folders]
    assert gloo2.run(command_here, argvs[0]) == [0, 0]
    assert gloo2.run(run_in_two_parts, argvs[1], 7) == [[75, 0]] * 2
    assert largest_difference(*folders) == 0.0
    check_equal_metrics(folders[1], folders[0])


def test_optimizer_sharding_changes_nothing_and_may_change_on_resume(
    gloo2: GlooPool, data, tmp_path
):
    names = ("unsharded", "sharded", "first", "later")
    folders = {name: tmp_path / name for name in names}
    unsharded, sharded = (
        {
            name: arguments(data, folders[name], batch_size=1, steps=10, optimizer_sharding=yes)
            for name in names
        }
        for yes in (False, True)
    )
    assert gloo2.run(command_here, unsharded["unsharded"]) == [0, 0]
    assert gloo2.run(command_here, sharded["sharded"]) == [0, 0]
    stop = ["--stop_after", "7"]
    assert gloo2.run(command_here, [*sharded["first"], *stop]) == [75, 75]
    assert gloo2.run(command_here, unsharded["first"]) == [0, 0]
    assert gloo2.run(command_here, [*unsharded["later"], *stop]) == [75, 75]
    assert gloo2.run(command_here, sharded["later"]) == [0, 0]
    for name in names[1:]:
        assert largest_difference(folders["unsharded"], folders[name]) == 0.0
    # All of the state is in the file, whoever held it.
    states = [torch.load(f / "last.ckpt", weights_only=True) for f in folders.values()]
    counts = [len(state["optimizer"]["state"]) for state in states]
    assert counts[0] > 0 and len(set(counts)) == 1


def test_bf16_compress_rounds_gradients_and_no_more(gloo2: GlooPool, data, tmp_path):
    folders = tmp_path / "whole", tmp_path / "halves"
    for folder, halves in zip(folders, (False, True), strict=True):
        argv = arguments(data, folder, batch_size=1, steps=10, bf16_compress=halves)
        assert gloo2.run(command_here, argv) == [0, 0]
    assert largest_difference(*folders) > 0.0
    check_equal_metrics(folders[1], folders[0], rel=0.02)


def test_probing_memory_leaves_nothing_behind(data, tmp_path):
    folders = tmp_path / "plain", tmp_path / "probed"
    for folder, probed in zip(folders, (False, True), strict=True):
        assert command_here(arguments(data, folder, steps=3, probe_memory=probed)) == 0
    assert largest_difference(*folders) == 0.0


def test_the_time_limit_of_a_job_stops_the_run_before_it(data, tmp_path, monkeypatch):
    argv = arguments(data, tmp_path, save_before_limit=60)
    assert command_here(argv) == 2  # there is no job
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 30))
    assert command_here(argv) == 75
    status = json.loads((tmp_path / "status.json").read_text())
    assert "the job's time limit" in status["reason"] and status["step"] == 0
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 3600))
    assert command_here(argv) == 0


def test_detect_anomaly_names_the_operation(data, tmp_path, monkeypatch, capsys):
    stock = Trainer._forward

    def not_finite(trainer: Trainer, *arguments: Any, **options: Any) -> Any:
        total, losses = stock(trainer, *arguments, **options)
        return (total - total.detach()).sqrt(), losses  # whose gradient is infinite at zero

    monkeypatch.setattr(Trainer, "_forward", not_finite)
    assert command_here(arguments(data, tmp_path, steps=2, detect_anomaly=True)) == 1
    assert "returned nan values" in capsys.readouterr().err


def test_fp16_run_resumes_with_its_scaler(data, tmp_path):
    folders = tmp_path / "straight", tmp_path / "resumed"
    argvs = [arguments(data, folder, amp="fp16", steps=4) for folder in folders]
    assert command_here(argvs[0]) == 0
    assert run_in_two_parts(argvs[1], 2) == [75, 0]
    assert largest_difference(*folders) == 0.0
    scalers = [torch.load(f / "last.ckpt", weights_only=True)["scaler"] for f in folders]
    assert scalers[0] == scalers[1] and scalers[0]["_growth_tracker"] == 4


def test_finished_run_started_again_does_nothing(data, straight, summary, tmp_path):
    folder = tmp_path / "copy"
    argv = arguments(data, folder, steps=5)
    first = train_here(argv)
    kept = ["metrics.jsonl", "last.ckpt", *(path.name for path in best_files(folder))]
    before = {name: (folder / name).read_bytes() for name in kept}
    again = train_here(argv)
    assert {name: (folder / name).read_bytes() for name in kept} == before
    for name in ("best_step", "best_val_per_mask_iou", "baseline_val_per_mask_iou", "steps"):
        assert again[name] == first[name]
    assert again["box_fill_iou"] == first["box_fill_iou"]
    assert again["best_checkpoint"] == first["best_checkpoint"]
    assert json.loads((folder / "status.json").read_text())["state"] == "done"


def test_run_of_another_configuration_is_refused_and_left_alone(data, tmp_path, capsys):
    train_here(arguments(data, tmp_path, steps=5))
    before = {p.name: p.read_bytes() for p in tmp_path.glob("*.*") if p.name != "status.json"}
    capsys.readouterr()
    assert command_here(arguments(data, tmp_path, steps=5, learning_rate=2e-3)) == 2
    error = capsys.readouterr().err.split("error: ")[1]
    row = next(line for line in error.splitlines() if "learning_rate" in line)
    assert row.split() == ["learning_rate", "0.001", "0.002"]
    after = {p.name: p.read_bytes() for p in tmp_path.glob("*.*") if p.name != "status.json"}
    assert after == before


def test_resume_never_archives_the_earlier_run(data, straight, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    old = {p.relative_to(straight) for p in straight.rglob("*") if p.name != ".lock"}
    argv = arguments(data, folder, steps=3, learning_rate=2e-3, resume="never")
    assert command_here(argv) == 0
    archive = folder / "previous-1"
    assert {path.relative_to(archive) for path in archive.rglob("*")} == old
    assert (archive / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
    assert [line["step"] for line in read_metrics(folder, "val")] == [0, 3]
    assert len(best_files(folder)) == 1
    assert "previous-1" in (folder / "train.log").read_text()
    assert command_here(argv) == 0
    assert (folder / "previous-2" / "metrics.jsonl").exists()


def contents(folder: Path) -> dict[Path, bytes | None]:
    """Every file and folder below a folder; None for folders."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def damage_the_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    (folder / "damaged.pth").write_bytes(b"PK\3\4 this was a checkpoint")
    return {"checkpoint_path": folder / "damaged.pth"}


def drop_a_tensor(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    state = build_sam("vit_tiny", 64).state_dict()
    del state["mask_decoder.iou_token.weight"]
    torch.save(state, folder / "incomplete.pth")
    return {"checkpoint_path": folder / "incomplete.pth"}


def fill_the_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    # Enough for checkpoints that replaced the earlier ones, too little for both.
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 40_000_000)
    monkeypatch.setattr("samft.runtime.host_checks.shutil.disk_usage", lambda path: usage)
    return {}


@pytest.mark.parametrize("spoil", [damage_the_weights, drop_a_tensor, fill_the_disk])
def test_a_refused_fresh_start_leaves_the_earlier_run_in_place(
    spoil, data, straight, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    before = contents(folder)
    changes = spoil(tmp_path, monkeypatch)
    assert command_here(arguments(data, folder, resume="never", **changes)) == 2
    assert "error: " in capsys.readouterr().err
    assert contents(folder) == before


def test_resume_of_a_path_continues_in_another_folder(data, straight, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert command_here(arguments(data, first, save_top_k=2, stop_after=7)) == 75
    argv = arguments(data, second, save_top_k=2, resume=first / "last.ckpt")
    assert command_here(argv) == 0
    assert largest_difference(straight, second) == 0.0
    summary = json.loads((second / "summary.json").read_text())
    assert summary["best_val_per_mask_iou"] == pytest.approx(
        json.loads((straight / "summary.json").read_text())["best_val_per_mask_iou"], rel=1e-9
    )
    assert Path(summary["best_checkpoint"]).is_file()


# What is validated is what is deployed


def check_deployed(folder: Path, annotations: Path, images: Path) -> None:
    checkpoint = Path(json.loads((folder / "summary.json").read_text())["best_checkpoint"])
    sidecar = json.loads(checkpoint.with_suffix(".json").read_text())
    validated = sidecar["metrics"]["val_per_mask_iou"]
    assert validated > 0.1  # something is there to compare
    assert deployed_iou(checkpoint, annotations, images) == pytest.approx(validated, abs=1e-3)


def test_validated_is_deployed_on_synthetic_images(tmp_path):
    sizes = ((150, 220), (97, 64), (64, 64), (31, 50))  # larger and smaller than the model's input
    write_coco(tmp_path, 6, sizes=sizes)
    write_coco(tmp_path, 6, sizes=sizes, seed=1, split="val")
    train_here(arguments(tmp_path, tmp_path / "run", steps=4, metrics_interval=2))
    val = tmp_path / "val"
    check_deployed(tmp_path / "run", val / "_annotations.coco.json", val)


def test_validated_is_deployed_on_real_images(data_root, tmp_path):
    root = data_root / "coco_open104"
    document = json.loads((root / "annotations" / "instances_val2017.json").read_text())
    document["images"] = document["images"][:6]
    ids = {image["id"] for image in document["images"]}
    document["annotations"] = [a for a in document["annotations"] if a["image_id"] in ids]
    annotations = tmp_path / "few.json"
    annotations.write_text(json.dumps(document))
    files = {f"{split}_annotations": annotations for split in ("train", "val")}
    folders = {f"{split}_images": root / "val2017" for split in ("train", "val")}
    sizes = {"image_size": 256, "batch_size": 1, "steps": 4, "metrics_interval": 4}
    argv = arguments(None, tmp_path / "run", **files, **folders, **sizes)  # type: ignore[arg-type]
    train_here(argv)
    check_deployed(tmp_path / "run", annotations, root / "val2017")


# One process or many


@pytest.mark.parametrize("num_val", [57, 2, 1])
def test_validation_is_the_same_on_1_2_and_3_processes(
    gloo2: GlooPool, gloo3: GlooPool, num_val, tmp_path
):
    write_coco(tmp_path, 6)
    write_coco(tmp_path, num_val, seed=1, split="val")
    baselines = []
    for world, pool in enumerate((None, gloo2, gloo3), start=1):
        folder = tmp_path / f"{world}"
        argv = arguments(tmp_path, folder, steps=1, batch_size=6 // world)
        assert command_here(argv) == 0 if pool is None else set(pool.run(command_here, argv)) == {0}
        baselines.append(read_metrics(folder, "val")[0])
    for name in ("per_mask_iou", "loss", "iou_predicted"):
        values = [line[name] for line in baselines]
        assert values == pytest.approx([values[0]] * 3, rel=1e-7), name


def test_two_processes_leave_the_files_of_one_run(gloo2: GlooPool, data, straight, tmp_path):
    assert gloo2.run(command_here, arguments(data, tmp_path, batch_size=1, save_top_k=2)) == [0, 0]
    check_equal_metrics(tmp_path, straight, rel=1e-3)  # Adam makes much of rounding
    assert {path.name for path in best_files(tmp_path)} == {p.name for p in best_files(straight)}
    assert (tmp_path / "train.log").read_text().count("2 process(es)") == 1
    assert (tmp_path / "before.png").read_bytes() == (straight / "before.png").read_bytes()
    assert (tmp_path / "report.html").exists()


def test_run_that_gets_worse_logs_a_warning(data, tmp_path):
    summary = train_here(arguments(data, tmp_path, steps=INTERVAL, learning_rate=1.0))
    assert summary["best_val_per_mask_iou"] < summary["baseline_val_per_mask_iou"]
    log = (tmp_path / "train.log").read_text()
    assert "WARNING: Validation IoU fell from" in log and "What to try: " in log


def test_run_that_gets_better_logs_no_warning(straight, summary):
    assert summary["best_val_per_mask_iou"] > summary["baseline_val_per_mask_iou"]
    # Its masks of rectangles score less than the filled boxes, which is all there is to warn of.
    (warning,) = summary["got_worse"]
    assert "below filling each box" in warning
    assert (straight / "train.log").read_text().count("WARNING: ") == 1


def test_held_out_images_are_logged(tmp_path):
    write_coco(tmp_path, 10)
    summary = train_here(arguments(tmp_path, tmp_path / "run", steps=1, val_fraction=0.3))
    assert summary["data"]["val"]["images"] == 3
    assert "3 of 10 images are held out" in (tmp_path / "run" / "train.log").read_text()
    assert read_weights(tmp_path / "run")


# Broken images


def break_images(root: Path, *, split: str, broken: dict[int, str]) -> dict[str, str]:
    """Breaks images of a split: by what is seen at the start, or only when they are decoded."""
    names = {}
    for number, how in broken.items():
        path = root / split / f"image_{number}.png"
        names[path.name] = how
        content = path.read_bytes()
        if how == "missing":
            path.unlink()
        elif how == "empty":
            path.write_bytes(b"")
        elif how == "html":
            path.write_bytes(b"<html>not found</html>")
        elif how == "cut":
            path.write_bytes(content[:-40])
        else:  # whole at both ends, and nonsense in between
            middle = len(content) // 2
            path.write_bytes(content[:middle] + bytes(200) + content[middle + 200 :])
    return names


BROKEN_TRAIN = {3: "missing", 17: "empty", 41: "html", 58: "cut", 77: "corrupt"}
BROKEN_VAL = {2: "corrupt", 5: "cut"}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_set_with_broken_images_is_trained_on_and_all_are_named(
    gloo2: GlooPool, tmp_path, processes
):
    data, folder = tmp_path / "data", tmp_path / "run"
    write_coco(data, 100, objects=(1, 2))
    write_coco(data, 10, objects=(1, 2), split="val", seed=1)
    bad = {
        "train": break_images(data, split="train", broken=BROKEN_TRAIN),
        "val": break_images(data, split="val", broken=BROKEN_VAL),
    }
    argv = arguments(
        data, folder, on_bad_image="skip", steps=14, metrics_interval=7, batch_size=8 // processes
    )
    if processes == 1:
        train_here(argv)
    else:
        assert gloo2.run(command_here, argv) == [0, 0]
    summary = json.loads((folder / "summary.json").read_text())
    log = (folder / "train.log").read_text()
    for split, names in bad.items():
        assert summary["data"][split]["bad_images"].keys() == names.keys()
        for name in names:
            assert log.count(name) == 1, name
    assert summary["data"]["train"]["images"] == 95 and summary["data"]["val"]["images"] == 8
    assert summary["steps"] == 14 and summary["best_val_per_mask_iou"] > 0


def test_broken_images_are_refused_unless_they_may_be_skipped(tmp_path):
    data = tmp_path / "data"
    write_coco(data, 8)
    write_coco(data, 3, split="val", seed=1)
    break_images(data, split="train", broken={1: "corrupt", 2: "cut"})
    with pytest.raises(DataError, match="image-truncated, 1: .*image_2.png"):
        train_here(arguments(data, tmp_path / "run"))
    (data / "train" / "image_2.png").write_bytes((data / "train" / "image_0.png").read_bytes())
    with pytest.raises(DataError, match=r"image-damaged, 1: .*image_1.png .*checksum of bytes"):
        train_here(arguments(data, tmp_path / "run"))
