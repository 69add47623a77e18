"""Runs at an image size that is not square: scored as deployed, cached, resumed, refused."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_utils

import samft
from helpers.cached_runs import cached_arguments, encodings_of
from helpers.coco_files import write_coco
from helpers.deployed_scores import predictor_iou
from helpers.equal_metrics import check_equal_metrics
from helpers.short_runs import (
    a_config,
    arguments,
    command_here,
    evaluate_here,
    largest_difference,
    read_metrics,
    train_here,
)
from samft import average, export, predict
from samft.errors import CheckpointError, ConfigError
from samft.images.decoder import read_image
from samft.models.sam import build_sam, load_state, open_checkpoint, read_state
from samft.recipes.datasets import load_splits
from samft.views.windows import View

pytestmark = pytest.mark.run

SIZES = ((90, 120), (60, 80), (80, 60), (45, 60))  # H, W: 4:3, and one portrait
SHORT: dict[str, Any] = {
    "image_size": "64x48",
    "steps": 4,
    "metrics_interval": 2,
    "trackers": "none",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_coco(root, 4, objects=(5, 9, 3, 2), sizes=SIZES)
    write_coco(root, 4, objects=(6, 2, 3, 4), sizes=SIZES, seed=1, split="val")
    return root


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train_here(arguments(data, folder, prompts="mixed", correction_rounds=1, **SHORT))
    return folder


def best_file(folder: Path) -> Path:
    (path,) = (one for one in folder.glob("*.ckpt") if one.name != "last.ckpt")
    return path


def evaluate(checkpoint: Path, data: Path, *flags: str) -> dict[str, Any]:
    places = ["--checkpoint", str(checkpoint), "--data_root", str(data), "--split", "val"]
    return evaluate_here([*places, "--num_workers", "0", "--device", "cpu", *flags])


def test_what_is_validated_is_what_is_deployed(data: Path, trained: Path) -> None:
    best = best_file(trained)
    logged = json.loads((trained / "summary.json").read_text())["best_val_per_mask_iou"]
    for checkpoint in (best, trained / "last.ckpt"):
        assert evaluate(checkpoint, data)["per_mask_iou"] == pytest.approx(logged, abs=1e-6)
    predictor, annotations = samft.load_predictor(best), data / "val/_annotations.coco.json"
    deployed = predictor_iou(predictor, annotations, data / "val")
    assert deployed == pytest.approx(logged, abs=1e-3)
    padded = evaluate(Path(export_of(best, trained / "padded.safetensors")), data)
    assert padded["image_size"] == 64 and padded["per_mask_iou"] != pytest.approx(logged, abs=1e-5)


def export_of(checkpoint: Path, output: Path) -> str:
    flags = ["--checkpoint", str(checkpoint), "--format", "safetensors", "--output", str(output)]
    return export.main([*flags, "--force"])["output"]


def test_sidecar_keeps_the_side_for_its_readers(trained: Path) -> None:
    sidecar = json.loads(best_file(trained).with_suffix(".json").read_text())
    assert (sidecar["image_size"], sidecar["rectangle"]) == (64, "64x48")
    assert sidecar["config"]["image_size"] == "64x48"
    assert "image_size: 64x48\n" in (trained / "config.yaml").read_text()


def test_sidecar_of_another_checkpoint_is_refused(trained: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.pth"
    copy.write_bytes(best_file(trained).read_bytes())
    for rectangle, image_size in (("128x96", None), ("64x60", 64), ([64, 48], 64), (None, 64)):
        (tmp_path / "copy.json").write_text(json.dumps({"rectangle": rectangle}))
        if image_size is None:
            with pytest.raises(CheckpointError, match="positions for 64 px, but its sidecar says"):
                open_checkpoint(copy, attention="fast", as_trained=True)
        else:  # damaged, or none
            assert open_checkpoint(copy, as_trained=True).image_size == image_size


def test_stock_reads_the_square(trained: Path) -> None:
    with pytest.warns(UserWarning, match="tuned at image_size 64x48; SamPredictor pads"):
        sam = samft.load_sam(best_file(trained))
    state = read_state(best_file(trained))
    square = build_sam("vit_tiny", 64)
    load_state(square, state)
    assert all(torch.equal(sam.state_dict()[name], value) for name, value in state.items())
    assert sam.image_encoder(torch.zeros(1, 3, 64, 64)).shape == (1, 128, 4, 4)


def test_export_says_that_readers_pad(trained: Path, tmp_path: Path, capsys) -> None:
    export_of(best_file(trained), tmp_path / "x.safetensors")
    errors = " ".join(capsys.readouterr().err.split())
    assert "trained at image_size 64x48, but every program that reads SAM pads" in errors
    with pytest.MonkeyPatch.context() as patch:  # the file has no sidecar, and says a square
        patch.setattr("warnings.warn", lambda *_, **__: pytest.fail("warned of the square"))
        samft.load_sam(tmp_path / "x.safetensors")


def test_resumed_runs_are_undisturbed_ones(data: Path, trained: Path, tmp_path: Path) -> None:
    run = arguments(data, tmp_path / "run", prompts="mixed", correction_rounds=1, **SHORT)
    assert command_here([*run, "--stop_after", "2"]) == 75
    train_here(run)
    check_equal_metrics(tmp_path / "run", trained)
    assert largest_difference(tmp_path / "run", trained) == 0


@pytest.mark.parametrize("size", ["64", "48x64", "64x32"])
def test_another_size_is_another_run(data: Path, trained: Path, size: str) -> None:
    changed = {"prompts": "mixed", "correction_rounds": 1, **SHORT, "image_size": size}
    argv = arguments(data, trained, resume=trained / "last.ckpt", **changed)
    assert command_here(argv) == 2


@pytest.mark.parametrize("settings", [{}, {"freeze_image_encoder": False, "train_blocks": 2}])
def test_cached_runs_are_uncached_ones(data: Path, tmp_path: Path, settings: Any) -> None:
    changes = {**SHORT, **settings, "cache_dtype": "float32", "batch_size": 1}
    argv = cached_arguments(data, tmp_path / "cached", **changes)
    code, num_encoded = encodings_of(argv)
    assert code == 0 and num_encoded > 0
    changes["cache_embeddings"] = "off"
    train_here(cached_arguments(data, tmp_path / "plain", **changes))
    check_equal_metrics(tmp_path / "cached", tmp_path / "plain")


@pytest.mark.parametrize(
    "settings",
    [
        {"augment": "scale", "loss_resolution": "input", "batch_size": 3},
        {"lora_rank": 2, "activation_checkpointing": "full"},
        {"decoder": "stock", "resize_mode": "squash"},
        {"image_size": "48x64", "mask_chunk": 2, "prompts": "point", "multimask": "best"},
    ],
)
def test_runs_of_every_kind(data: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    train_here(arguments(data, tmp_path, **{**SHORT, "ema_decay": 0.5, **settings}))
    losses = [one["loss"] for one in read_metrics(tmp_path) if one["split"] == "train"]
    assert losses and all(np.isfinite(losses))
    logged = json.loads((tmp_path / "summary.json").read_text())["best_val_per_mask_iou"]
    scored = evaluate(best_file(tmp_path), data)["per_mask_iou"]
    assert scored == pytest.approx(logged, abs=1e-6)


def test_commands_predict_in_the_rectangle(data: Path, trained: Path, tmp_path: Path) -> None:
    best = best_file(trained)
    common = ["--checkpoint", str(best), "--device", "cpu", "--num_workers", "0"]
    images, annotations = data / "val", data / "val/_annotations.coco.json"
    prompts = ["--images", str(images), "--annotations", str(annotations)]
    predict.main([*common, *prompts, "--output_dir", str(tmp_path / "boxes")])
    rows = json.loads((tmp_path / "boxes/results.json").read_text())
    predictor = samft.load_predictor(best)
    names = {one["id"]: one["file_name"] for one in json.loads(annotations.read_text())["images"]}
    equal = []
    for row in rows:
        predictor.set_image(read_image(images / names[row["image_id"]]))
        x, y, width, height = row["bbox"]
        masks, _, _ = predictor.predict(
            box=np.array([x, y, x + width, y + height]), multimask_output=False
        )
        equal.append((mask_utils.decode(row["segmentation"]) == masks[0]).mean())
    assert rows and min(equal) > 0.999
    predict.main(
        [*common, "--images", str(images), "--points_per_side", "4"]
        + ["--output_dir", str(tmp_path / "automatic"), "--pred_iou_thresh", "0"]
        + ["--stability_score_thresh", "0"]
    )
    assert json.loads((tmp_path / "automatic/results.json").read_text())
    clicked = evaluate(best, data, "--clicks", "2", "--automatic", "2")
    assert clicked["image_size"] == "64x48"


def test_windows_of_a_rectangle_are_refused(data: Path, trained: Path, tmp_path: Path) -> None:
    flags = ["--checkpoint", str(best_file(trained)), "--view", "tiles", "--device", "cpu"]
    places = ["--images", str(data / "val"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match="image_size 64x48, for whole images"):
        predict.main([*flags, *places])
    with pytest.raises(ConfigError, match="windows are square"):
        evaluate(best_file(trained), data, "--view", "objects")
    for kind in ("tiles", "objects"):
        with pytest.raises(ConfigError, match=r"^view: .* at image_size 64x48.*: leave view out"):
            samft.load_predictor(best_file(trained), view=View(kind, tile_size=48))
    assert samft.load_predictor(best_file(trained), view=View("image")).model.device.type == "cpu"


def test_averages_keep_the_rectangle(data: Path, trained: Path, tmp_path: Path) -> None:
    start = Path(samft.__file__).parent / "pretrained" / "vit_tiny.pth"
    square = tmp_path / "square.pth"
    sam = build_sam("vit_tiny", 64)
    load_state(sam, read_state(start))
    torch.save(sam.state_dict(), square)
    output = tmp_path / "average.pth"
    flags = ["--data_root", str(data), "--split", "val", "--points", "0.5,1", "--device", "cpu"]
    average.main([str(square), str(best_file(trained)), *flags, "--output", str(output)])
    sidecar = json.loads(output.with_suffix(".json").read_text())
    assert (sidecar["image_size"], sidecar["rectangle"]) == (64, "64x48")
    scored = evaluate(output, data)["per_mask_iou"]
    assert scored == pytest.approx(sidecar["metrics"]["val_per_mask_iou"], abs=1e-6)


def test_images_of_another_shape_are_counted(data: Path, caplog) -> None:
    load_splits(a_config(data, **SHORT)).log_counts()
    (of_train,) = (text for text in caplog.messages if re.match("train: .*shape", text))
    assert of_train == (
        "train: 1 of 4 images (25.0%) are of another shape than image_size 64x48, which shows "
        "them smaller than 64 would, down to 75% of the size"
    )
    caplog.clear()
    load_splits(a_config(data, **{**SHORT, "image_size": 64})).log_counts()
    assert "another shape" not in caplog.text
