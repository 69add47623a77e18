"""Deep pixels by the command line: one mapping in train, evaluate, predict, export and scripts."""

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from segment_anything import SamPredictor

import samft
from helpers.coco_files import write_coco
from helpers.short_runs import arguments
from samft import check, evaluate, export, predict
from samft.errors import ConfigError, DataError
from samft.images.pixels import PixelFormat
from samft.train import main as train
from samft.weights.saved_settings import saved_pixels

pytestmark = pytest.mark.run

SPLITS = (("train", 4), ("val", 2))


def change_images(source: Path, target: Path, change: Any) -> Path:
    """A copy of a dataset with `change(path) -> (suffix, writer)` applied to each image."""
    shutil.copytree(source, target)
    for annotations in target.rglob("_annotations.coco.json"):
        document = json.loads(annotations.read_text())
        for entry in document["images"]:
            path = annotations.parent / entry["file_name"]
            entry["file_name"] = change(path).name
            path.unlink(missing_ok=path.name != entry["file_name"])
        annotations.write_text(json.dumps(document))
    return target


def write_12_bits(path: Path) -> Path:
    # Dark and grey in 16 bits: of the upper 8 of them, hardly anything is left.
    grey = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2GRAY).astype(np.uint16)
    tifffile.imwrite(path.with_suffix(".tif"), grey * 13 + 301)
    return path.with_suffix(".tif")


def short_run(data: Path, output: Path, **changes: Any) -> dict[str, Any]:
    settings = {"steps": 1, "metrics_interval": 1, "augment": "none", "box_jitter": 0.0, **changes}
    return train(arguments(data, output, **settings))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """The folder of datasets and runs `deep` and `plain`, which is `deep` mapped by hand."""
    root = tmp_path_factory.mktemp("deep")
    for split, number in SPLITS:
        write_coco(root / "source", number, split=split, seed=number)
    change_images(root / "source", root / "deep", write_12_bits)
    summaries = {"deep": short_run(root / "deep", root / "run-deep")}
    sidecar = Path(summaries["deep"]["best_checkpoint"]).with_suffix(".json")
    low, high = json.loads(sidecar.read_text())["pixels"]["ranges"]["uint16"]

    def map_by_hand(path: Path) -> Path:
        share = (tifffile.imread(path).astype(float) - low) / (high - low)
        image = np.round(np.clip(share, 0, 1) * 255).astype(np.uint8)
        cv2.imwrite(str(path.with_suffix(".png")), image)
        return path.with_suffix(".png")

    change_images(root / "deep", root / "plain", map_by_hand)
    summaries["plain"] = short_run(root / "plain", root / "run-plain")
    return root, summaries


def checkpoint_of(runs: tuple[Path, dict[str, dict[str, Any]]], name: str) -> str:
    return str(runs[1][name]["best_checkpoint"])


def test_the_range_is_that_of_the_training_images(runs: Any) -> None:
    images = [tifffile.imread(path) for path in (runs[0] / "deep" / "train").glob("*.tif")]
    expected = np.percentile(np.concatenate([image.reshape(-1) for image in images]), (1, 99))
    pixels = saved_pixels(checkpoint_of(runs, "deep"))
    assert pixels == PixelFormat(ranges=(("uint16", *expected.tolist()),))
    assert saved_pixels(runs[0] / "run-deep" / "last.ckpt") == pixels
    assert (
        f"uint16 values from {expected[0]:g} to {expected[1]:g}"
        in (runs[0] / "run-deep" / "train.log").read_text()
    )


def test_train_scores_16_bits_as_the_same_in_8(runs: Any) -> None:
    deep, plain = (runs[1][name] for name in ("deep", "plain"))
    for name in ("baseline_val_per_mask_iou", "best_val_per_mask_iou"):
        assert deep[name] == pytest.approx(plain[name], abs=1e-3)


def test_evaluate_takes_the_range_from_the_checkpoint(runs: Any) -> None:
    scores = [
        evaluate.main(
            [
                *("--checkpoint", checkpoint_of(runs, "deep"), "--data_root", str(runs[0] / data)),
                *("--device", "cpu", "--num_workers", "0"),
            ]
        )["per_mask_iou"]
        for data in ("deep", "plain")
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)
    assert scores[0] == pytest.approx(runs[1]["deep"]["best_val_per_mask_iou"], abs=1e-3)


def test_predict_and_a_script_give_the_same_masks(runs: Any, tmp_path: Path) -> None:
    root, checkpoint = runs[0], checkpoint_of(runs, "deep")
    rows = []
    for data in ("deep", "plain"):
        folder = root / data / "val"
        flags = ["--images", folder, "--annotations", folder / "_annotations.coco.json"]
        flags += ["--checkpoint", checkpoint, "--output_dir", tmp_path / data, "--device", "cpu"]
        predict.main([str(flag) for flag in flags])
        rows.append(json.loads((tmp_path / data / "results.json").read_text()))
    assert rows[0] == rows[1] and rows[0]
    predictor = SamPredictor(samft.load_sam(checkpoint))
    for path in (root / "deep" / "val").glob("*.tif"):
        image = samft.read_image(path, like=checkpoint)
        by_hand = cv2.imread(str(root / "plain" / "val" / path.with_suffix(".png").name))
        np.testing.assert_array_equal(image, by_hand)
        predictor.set_image(image)


@pytest.mark.parametrize("format", ["pth", "safetensors"])
def test_exports_keep_it(
    runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    # As small as the checkpoint, not Meta's 1024 px, and few automatic masks to compare.
    monkeypatch.setattr("samft.exporters.exporter.META_SIZE", 64)
    monkeypatch.setattr("samft.exporters.automatic_masks.POINTS_PER_SIDE", 2)
    output, checkpoint = tmp_path / f"tuned.{format}", checkpoint_of(runs, "deep")
    image = next((runs[0] / "deep" / "val").glob("*.tif"))
    argv = ["--checkpoint", checkpoint, "--format", format, "--image", image, "--output", output]
    export.main([str(one) for one in argv])
    assert saved_pixels(output) == saved_pixels(checkpoint) is not None


def test_a_flag_that_contradicts_the_checkpoint_is_refused(runs: Any, tmp_path: Path) -> None:
    argv = ["--checkpoint", checkpoint_of(runs, "deep"), "--data_root", str(runs[0] / "deep")]
    with pytest.raises(ConfigError, match="--pixel_range: .* was trained with pixel_range auto"):
        evaluate.main([*argv, "--pixel_range", "full", "--device", "cpu"])


def test_a_resumed_run_keeps_the_range(runs: Any, tmp_path: Path) -> None:
    data, output = tmp_path / "data", tmp_path / "run"
    shutil.copytree(runs[0] / "deep", data)
    settings = {"lr_schedule": "constant", "resume": "auto"}
    short_run(data, output, **settings)
    before = saved_pixels(output / "last.ckpt")
    for path in (data / "train").glob("*.tif"):
        tifffile.imwrite(path, tifffile.imread(path) + 5000)
    short_run(data, output, **settings, steps=2)
    assert saved_pixels(output / "last.ckpt") == before is not None


def test_the_embedding_cache_tells_ranges_apart(runs: Any, tmp_path: Path) -> None:
    settings = {"freeze_image_encoder": True, "cache_embeddings": "on", "cache_dir": tmp_path / "c"}
    settings["cache_dtype"] = "float32"
    scores = {}
    for name in ("0,65535", "300,3700", "0,65535 again", "300,3700 without"):
        pixel_range, _, rest = name.partition(" ")
        more = {"cache_embeddings": "off", "cache_dir": None} if rest == "without" else {}
        scores[name] = short_run(
            runs[0] / "deep", tmp_path / name, pixel_range=pixel_range, **{**settings, **more}
        )["baseline_val_per_mask_iou"]
    assert scores["0,65535"] == scores["0,65535 again"]
    assert abs(scores["0,65535"] - scores["300,3700"]) > 1e-3
    assert scores["300,3700"] == pytest.approx(scores["300,3700 without"], abs=1e-4)


def write_five_bands(path: Path) -> Path:
    blue, green, red = np.moveaxis(cv2.imread(str(path)), 2, 0)
    bands = np.stack([blue, green, red, 255 - red, 255 - blue])
    tifffile.imwrite(path.with_suffix(".tif"), bands, planarconfig="separate", compression="lzw")
    return path.with_suffix(".tif")


def test_bands_are_chosen_once_and_kept(runs: Any, tmp_path: Path) -> None:
    data = change_images(runs[0] / "source", tmp_path / "data", write_five_bands)
    with pytest.raises(DataError, match=r"image-bands, 4: .* choose some with channels"):
        short_run(data, tmp_path / "refused")
    with pytest.raises(DataError, match="image-bands 4"):
        check.main(["--data_root", str(data)])
    check.main(["--data_root", str(data), "--channels", "3,2,1"])
    bands = short_run(data, tmp_path / "bands", channels="3,2,1")
    colours = short_run(runs[0] / "source", tmp_path / "colours")
    for name in ("baseline_val_per_mask_iou", "best_val_per_mask_iou"):
        assert bands[name] == pytest.approx(colours[name], abs=1e-4)
    argv = ["--checkpoint", bands["best_checkpoint"], "--data_root", str(data), "--device", "cpu"]
    scores = evaluate.main([*argv, "--num_workers", "0"])
    assert scores["per_mask_iou"] == pytest.approx(bands["best_val_per_mask_iou"], abs=1e-3)
