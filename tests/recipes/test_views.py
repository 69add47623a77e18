"""Runs on windows of images: scored as deployed, cached, divided, stopped, held out as others."""

import json
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

import samft  # first: torchvision then imports beside a CPU-only torch
from helpers.cached_runs import cached_arguments, encodings_of
from helpers.coco_files import write_coco
from helpers.equal_metrics import check_equal_metrics
from helpers.gloo_pool import GlooPool
from helpers.short_runs import (
    a_config,
    arguments,
    command_here,
    evaluate_here,
    largest_difference,
    read_metrics,
    train_here,
)
from samft.images.decoder import read_image
from samft.recipes.datasets import load_splits
from samft.views.windows import View, tile_windows
from samft.weights.saved_settings import saved_view

from segment_anything import SamPredictor  # isort: skip

pytestmark = pytest.mark.run

SIZES = ((150, 130), (60, 170), (50, 40))
TILES: dict[str, Any] = {"view": "tiles", "tile_size": 48, "tile_overlap": 0.25}
OBJECTS: dict[str, Any] = {"view": "objects", "tile_size": 48, "view_context": 1.5}
SHORT: dict[str, Any] = {"steps": 4, "metrics_interval": 2, "trackers": "none"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_coco(root, 4, objects=(14, 9, 3), sizes=SIZES)
    write_coco(root, 3, objects=(14, 9, 3), sizes=SIZES, seed=1, split="val")
    return root


def best_file(folder: Path) -> Path:
    (path,) = (one for one in folder.glob("*.ckpt") if one.name != "last.ckpt")
    return path


def evaluate(checkpoint: Path, data: Path, *flags: str) -> dict[str, Any]:
    places = ["--checkpoint", str(checkpoint), "--data_root", str(data), "--split", "val"]
    return evaluate_here([*places, "--num_workers", "0", "--device", "cpu", *flags])


def share_of(box: np.ndarray, window: np.ndarray) -> float:
    low, high = np.maximum(box[:2], window[:2]), np.minimum(box[2:], window[2:])
    return float(np.clip(high - low, 0, None).prod())


def predict_in_tiles(checkpoint: Path, split: Path, view: View) -> list[float]:
    """IoU of a loop of stock `SamPredictor` over the windows, each object in its best one."""
    predictor = SamPredictor(samft.load_sam(checkpoint))
    coco, ious = COCO(split / "_annotations.coco.json"), []
    for image_id, image in coco.imgs.items():
        pixels = read_image(split / image["file_name"])
        windows = tile_windows(pixels.shape[:2], view)
        for entry in coco.imgToAnns[image_id]:
            x, y, width, height = entry["bbox"]
            box = np.array([x, y, x + width, y + height])
            centre = (box[:2] + box[2:]) / 2
            # The nearest centre among those that hold most.
            ranks = [
                (-round(share_of(box, w), 6), ((w.reshape(2, 2).mean(0) - centre) ** 2).sum())
                for w in windows
            ]
            x0, y0, x1, y1 = windows[ranks.index(min(ranks))].tolist()
            predictor.set_image(pixels[y0:y1, x0:x1])
            cut = np.clip(box, [x0, y0, x0, y0], [x1, y1, x1, y1]) - [x0, y0, x0, y0]
            mask = np.zeros(pixels.shape[:2], dtype=bool)
            mask[y0:y1, x0:x1] = predictor.predict(box=cut, multimask_output=False)[0][0]
            truth = mask_utils.decode(coco.annToRLE(entry)).astype(bool)
            ious.append(float((mask & truth).sum() / (mask | truth).sum()))
    return ious


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train_here(arguments(data, folder, **SHORT, **TILES))
    return folder


def test_validated_is_what_stock_predicts_on_the_windows(data: Path, trained: Path) -> None:
    path = best_file(trained)
    line = read_metrics(trained, "val")[int(path.name.split("-")[0]) // 2]
    ious = predict_in_tiles(path, data / "val", View("tiles", 48, 0.25))
    assert len(ious) == 26
    assert line["per_mask_iou"] == pytest.approx(np.mean(ious), abs=1e-3)


def test_evaluate_sees_what_training_saw(data: Path, trained: Path, tmp_path: Path) -> None:
    path = best_file(trained)
    assert saved_view(path) == saved_view(trained / "last.ckpt") == View("tiles", 48, 0.25)
    line = read_metrics(trained, "val")[int(path.name.split("-")[0]) // 2]
    report = evaluate(path, data, "--clicks", "2", "--output", str(tmp_path / "scores.json"))
    assert report["per_mask_iou"] == pytest.approx(line["per_mask_iou"], abs=1e-6)
    assert report["view"] == View("tiles", 48, 0.25).to_json()
    assert report["masks"] == 26 and report["images"] == 3
    summary = json.loads((trained / "summary.json").read_text())
    assert report["box_fill_iou"] == pytest.approx(summary["box_fill_iou"], abs=1e-6)


def test_flags_change_how_a_checkpoint_is_evaluated(data: Path, trained: Path) -> None:
    path = best_file(trained)
    whole = evaluate(path, data, "--view", "image")
    assert whole["view"] == {"kind": "image"}
    wide = evaluate(path, data, "--tile_size", "170")  # a window holds all of any image
    assert wide["view"]["tile_size"] == 170
    assert wide["per_mask_iou"] == pytest.approx(whole["per_mask_iou"], abs=1e-6)


def test_two_processes_validate_the_windows_of_one(
    gloo2: GlooPool, data: Path, trained: Path, tmp_path: Path
) -> None:
    argv = arguments(data, tmp_path, **SHORT, **TILES, batch_size=1)
    assert gloo2.run(command_here, argv) == [0, 0]
    ours, theirs = (read_metrics(folder, "val")[0] for folder in (tmp_path, trained))
    for name in ("per_mask_iou", "loss", "iou_predicted"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-7), name
    check_equal_metrics(tmp_path, trained, rel=1e-3)  # Adam makes much of rounding


def test_a_stop_changes_nothing(data: Path, trained: Path, tmp_path: Path) -> None:
    argv = arguments(data, tmp_path, **SHORT, **TILES)
    assert command_here([*argv, "--stop_after", "3"]) == 75
    assert command_here(argv) == 0
    assert largest_difference(trained, tmp_path) == 0.0
    check_equal_metrics(tmp_path, trained)


def test_a_run_is_not_resumed_with_other_windows(data: Path, tmp_path: Path) -> None:
    argv = arguments(data, tmp_path, **SHORT, **TILES)
    assert command_here([*argv, "--stop_after", "1"]) == 75
    assert command_here([*argv, "--tile_overlap", "0.5"]) == 2


@pytest.mark.parametrize("view", [TILES, OBJECTS], ids=["tiles", "objects"])
def test_each_window_is_encoded_once_and_a_cache_changes_nothing(
    data: Path, view: dict[str, Any], tmp_path: Path
) -> None:
    # One window at a time is encoded as the pass encodes it.
    one: dict[str, Any] = {**SHORT, **view, "batch_size": 1, "accumulate_steps": 2}
    config = a_config(data, tmp_path / "cached", **one)
    splits = load_splits(config)
    num_windows = 2 * len(splits.train) + len(splits.val)
    assert num_windows > 2 * 4 + 3
    argv = cached_arguments(data, tmp_path / "cached", cache_dtype="float32", **one)
    assert encodings_of(argv) == (0, num_windows)
    train_here(cached_arguments(data, tmp_path / "uncached", cache_embeddings="off", **one))
    check_equal_metrics(tmp_path / "cached", tmp_path / "uncached", rel=0)
    assert largest_difference(tmp_path / "cached", tmp_path / "uncached") == 0.0


def test_a_dry_run_counts_windows(data: Path, tmp_path: Path) -> None:
    def embedding_bytes(**view: Any) -> int:
        argv = cached_arguments(data, tmp_path, **SHORT, **view, dry_run=True)
        return int(train_here(argv)["embedding_bytes"])

    splits = load_splits(a_config(data, tmp_path, **TILES))
    num_windows = 2 * len(splits.train) + len(splits.val)  # flipped ones as well
    assert embedding_bytes(**TILES) * (2 * 4 + 3) == embedding_bytes() * num_windows


def test_the_report_counts_images_and_windows(data: Path, trained: Path) -> None:
    counts = json.loads((trained / "summary.json").read_text())["data"]
    splits = load_splits(a_config(data, trained, **TILES))
    assert (counts["train"]["images"], counts["val"]["images"]) == (4, 3)
    assert counts["train"]["windows"] == len(splits.train) > 4
    log = (trained / "train.log").read_text()
    assert f"val: 3 images in {len(splits.val)} windows, 26 masks" in log
    assert "images are seen through tiles of 48 px that overlap by 12 px" in log
    row = rf"windows</td>\s*<td[^>]*>{len(splits.train)}"
    assert re.search(row, (trained / "report.html").read_text())


def test_held_out_are_images_not_windows(data: Path, tmp_path: Path) -> None:
    config = a_config(data, tmp_path, val_split="none", val_fraction=0.3, **TILES)
    splits = load_splits(config)
    rows = [set(one.subset.rows.tolist()) for one in (splits.train, splits.val)]
    assert all(rows) and not rows[0] & rows[1]
    assert splits.counts["val"]["images"] == len(rows[1])
    assert splits.counts["val"]["windows"] == len(splits.val) > len(rows[1])


def test_a_broken_image_is_named_once_for_all_its_windows(tmp_path: Path) -> None:
    write_coco(tmp_path, 3, objects=(14,), sizes=SIZES[:1])
    write_coco(tmp_path, 2, objects=(14,), sizes=SIZES[:1], seed=1, split="val")
    for split, number in (("train", 1), ("val", 0)):
        path = tmp_path / split / f"image_{number}.png"
        content = path.read_bytes()
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes(400) + content[middle + 400 :])
    argv = arguments(tmp_path, tmp_path / "run", **SHORT, **TILES, on_bad_image="skip")
    train_here(argv)
    data = json.loads((tmp_path / "run" / "summary.json").read_text())["data"]
    assert list(data["val"]["bad_images"]) == ["image_0.png"]
    assert read_metrics(tmp_path / "run", "val")[-1]["per_mask_iou"] > 0


def test_a_large_image_is_seen_at_its_own_scale(tmp_path: Path) -> None:
    # The default window is as large as the model's input: an object has all of its pixels.
    write_coco(tmp_path, 2, objects=(9,), sizes=((200, 300),))
    write_coco(tmp_path, 1, objects=(9,), sizes=((200, 300),), seed=1, split="val")
    val = load_splits(a_config(tmp_path, tmp_path, view="tiles")).val
    image = cv2.imread(str(val.subset.path(0)), cv2.IMREAD_COLOR_RGB)
    y0, x0 = val.subset.corner(0)
    pixels = val[0].image.permute(1, 2, 0).numpy()
    assert np.array_equal(pixels, image[y0 : y0 + 64, x0 : x0 + 64])
