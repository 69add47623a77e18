"""`python -m samft.predict`: its outputs, that they are written atomically, and its errors."""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from segment_anything import SamAutomaticMaskGenerator

from helpers.coco_files import write_coco
from helpers.short_runs import clean_environment
from helpers.tiny_checkpoint import mask_finding_sam, write_tiny
from samft.check import main as check
from samft.cli import run_command
from samft.errors import ConfigError
from samft.models import frozen_encoder
from samft.models.frozen_encoder import cast_frozen_weights
from samft.predict import main
from samft.prediction.predictors import BoxPredictor
from samft.weights.download import PACKAGED_TINY

DETECTIONS = [
    {"image_id": 12, "category_id": 2, "bbox": [3, 4, 20, 21], "score": 0.75},
    {"image_id": 10, "category_id": 3, "bbox": [5, 6, 30, 25], "score": 0.5},
]


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Four images with 1, 4, 2, 7 objects, ids 10 to 13."""
    return write_coco(tmp_path / "data", 4)


def predict(output: Path, *flags: object, checkpoint: object = PACKAGED_TINY) -> dict[str, Any]:
    required = ["--checkpoint", checkpoint, "--output_dir", output, "--device", "cpu"]
    return main([str(flag) for flag in (*required, *flags)])


def rows_of(output: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((output / "results.json").read_text())
    return rows


def load(annotations: Path, results: Path) -> tuple[COCO, COCO]:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(annotations))
        return coco, coco.loadRes(str(results))


def test_annotations_give_a_mask_for_each_object(coco: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    counts = predict(output, "--images", coco.parent, "--annotations", coco, "--num_workers", 2)
    nothing = {"images_left_out": {}, "boxes_left_out": {}, "objects_cut": {}}
    assert counts == {"images": 4, "masks": 14, **nothing}
    truth, predicted = load(coco, output / "results.json")
    assert sorted(one["annotation_id"] for one in predicted.anns.values()) == sorted(truth.anns)
    for one in predicted.anns.values():
        annotated = truth.anns[one["annotation_id"]]
        assert one["image_id"] == annotated["image_id"]
        assert one["bbox"] == pytest.approx(annotated["bbox"], abs=1e-5)
        assert predicted.annToMask(one).shape == truth.annToMask(annotated).shape
        assert isinstance(one["score"], float) and "detector_score" not in one
    assert sorted(path.name for path in output.iterdir()) == [".lock", "results.json"]


def test_in_mixed_precision_weights_are_cast_once(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtypes: list[torch.dtype] = []

    def count(encoder: Any, dtype: torch.dtype) -> Any:
        dtypes.append(dtype)
        return cast_frozen_weights(encoder, dtype)

    monkeypatch.setattr(frozen_encoder, "cast_frozen_weights", count)
    inputs = ["--images", coco.parent, "--annotations", coco, "--num_workers", 0]
    assert predict(tmp_path / "out", "--amp", "bf16", *inputs)["images"] == 4
    assert dtypes == [torch.bfloat16]


def test_detections_keep_class_and_score(coco: Path, tmp_path: Path) -> None:
    results = tmp_path / "detections.json"
    results.write_text(json.dumps(DETECTIONS))
    flags = ("--images", coco.parent, "--annotations", coco, "--boxes", results)
    predict(tmp_path / "out", *flags)
    rows = rows_of(tmp_path / "out")
    assert [(row["image_id"], row["category_id"], row["detector_score"]) for row in rows] == [
        (10, 3, 0.5),
        (12, 2, 0.75),
    ]
    assert [row["bbox"] for row in rows] == [[5, 6, 30, 25], [3, 4, 20, 21]]
    assert predict(tmp_path / "out", *flags, "--min_score", 0.6)["masks"] == 1


def test_a_dataset_has_the_masks_of_the_results(coco: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    flags = ("--images", coco.parent, "--annotations", coco, "--format", "coco")
    for kind in ("rle", "polygons"):
        predict(output, *flags, "--segmentation", kind)
        results, dataset = load(coco, output / "results.json")[1], output / "dataset.json"
        with contextlib.redirect_stdout(io.StringIO()):
            predicted = COCO(str(dataset))
        assert {image["id"]: image["file_name"] for image in predicted.imgs.values()} == {
            10 + k: f"image_{k}.png" for k in range(4)
        }
        assert predicted.cats == {1: {"id": 1, "name": "thing"}}
        masks = {one["annotation_id"]: results.annToMask(one) for one in results.anns.values()}
        assert len(predicted.anns) == len(masks) == 14
        for one in predicted.anns.values():
            mask = masks[one["annotation_id"]]
            assert (predicted.annToMask(one) == mask).all()
            assert one["area"] == mask.sum()
            ys, xs = np.nonzero(mask)
            assert one["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
            assert 0 < one["score"] and one["iscrowd"] == 0
        # It is a dataset like any other: checked, indexed, and predicted on.
        report = check(["--annotations", str(dataset), "--images", str(coco.parent)])
        assert report["errors"] == report["warnings"] == report["notes"] == 0
        (split,) = report["splits"].values()
        assert split["images"] == 4 and split["objects"] == 14


def test_a_dataset_names_objects_without_a_class(coco: Path, tmp_path: Path) -> None:
    document = json.loads(coco.read_text())
    document["categories"] = [{"id": 0, "name": "thing"}, {"id": 1, "name": "other"}]
    coco.write_text(json.dumps(document))
    (tmp_path / "boxes.json").write_text('[{"image_id": 10, "bbox": [3, 4, 20, 21], "score": 1}]')
    flags = ("--images", coco.parent, "--annotations", coco, "--boxes", tmp_path / "boxes.json")
    predict(tmp_path / "out", *flags, "--format", "coco")
    (entry,) = json.loads((tmp_path / "out" / "dataset.json").read_text())["annotations"]
    assert entry["category_id"] == 0 and entry["detector_score"] == 1
    document["categories"] = [{"id": 1, "name": "thing"}]
    coco.write_text(json.dumps(document))
    predict(tmp_path / "out", *flags, "--format", "coco")
    written = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert [one["category_id"] for one in written["annotations"]] == [2]
    assert written["categories"] == [{"id": 1, "name": "thing"}, {"id": 2, "name": "object"}]


def test_a_dataset_replaces_only_its_own(coco: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    flags = ("--images", coco.parent, "--box", "2,3,30,31", "--format", "coco")
    predict(output, *flags)
    assert predict(output, *flags)["empty_masks"] == 0
    (output / "dataset.json").write_text('{"images": [], "annotations": []}')
    with pytest.raises(ConfigError, match="dataset.json exists, and no prediction"):
        predict(output, *flags)
    with pytest.raises(ConfigError, match="give --format coco as well"):
        predict(tmp_path / "new", "--images", coco.parent, "--segmentation", "rle")


def test_a_folder_gets_ids_and_pictures(coco: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    boxes = ("--box", "2,3,30,31", "--box", "10,10,20,20")
    predict(output, "--images", coco.parent, *boxes, "--masks", "--overlays")
    listed, predicted = load(output / "images.json", output / "results.json")
    assert [image["file_name"] for image in listed.imgs.values()] == [
        f"image_{k}.png" for k in range(4)
    ]
    assert [one["bbox"] for one in predicted.anns.values()] == [
        [2, 3, 28, 28],
        [10, 10, 10, 10],
    ] * 4
    for image_id, image in listed.imgs.items():
        labels = np.array(Image.open(output / "masks" / image["file_name"]))
        first, second = (
            predicted.annToMask(one) > 0
            for one in predicted.loadAnns(predicted.getAnnIds([image_id]))
        )
        drawn = sorted([(first.sum(), 1), (second.sum(), 2)], reverse=True)
        expected = np.zeros_like(labels)
        for _, number in drawn:
            expected[(first, second)[number - 1]] = number
        assert (labels == expected).all()
        name = image["file_name"].replace(".png", ".jpg")
        assert cv2.imread(str(output / "overlays" / name)).shape[:2] == labels.shape


def test_without_boxes_masks_are_automatic(
    coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = coco.parent / "image_0.png"
    few = ("--points_per_side", 2)
    nothing = write_tiny(tmp_path, sam=mask_finding_sam(iou_predicted=0.5))
    assert predict(tmp_path / "none", "--images", image, *few, checkpoint=nothing)["masks"] == 0
    assert rows_of(tmp_path / "none") == []
    assert "no mask was found" in capsys.readouterr().err
    # With a threshold, nothing may be left, whatever the tiny model was trained on.
    low = (*few, "--pred_iou_thresh", -10, "--stability_score_thresh", 0)
    flags = ("--images", coco.parent, "--annotations", coco, "--automatic")
    assert predict(tmp_path / "some", *flags, *low, "--overlays")["masks"] > 0
    for row in rows_of(tmp_path / "some"):
        assert row["category_id"] == 0 and 0 <= row["stability_score"] <= 1


def test_windows_give_the_same_objects_in_the_frame_of_the_image(
    coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = tmp_path / "tuned.ckpt"
    shutil.copy(PACKAGED_TINY, tuned)
    tiles = {"kind": "tiles", "tile_size": 32, "tile_overlap": 0.25, "context": 2.0}
    sidecar = {"view": tiles, "sha256": hashlib.sha256(tuned.read_bytes()).hexdigest()}
    tuned.with_suffix(".json").write_text(json.dumps(sidecar))
    flags = ("--images", coco.parent, "--annotations", coco, "--num_workers", 2)
    cut = predict(tmp_path / "saved", *flags, "--masks", "--format", "coco", checkpoint=tuned)
    printed = capsys.readouterr()
    assert "through tiles of 32 px that overlap by 8 px" in printed.out
    number, names = sum(cut["objects_cut"].values()), ", ".join(list(cut["objects_cut"])[:3])
    assert 0 < number < cut["masks"]
    assert f"{number} objects reach beyond the windows" in printed.err and names in printed.err
    predict(tmp_path / "given", *flags, "--view", "tiles", "--tile_size", 32)
    capsys.readouterr()
    counts = predict(tmp_path / "whole", *flags, "--view", "image", checkpoint=tuned)
    assert not counts["objects_cut"] and "beyond" not in capsys.readouterr().err
    predict(tmp_path / "plain", *flags)
    saved, given, whole, plain = (
        rows_of(tmp_path / name) for name in ("saved", "given", "whole", "plain")
    )
    assert saved == given != whole == plain
    fields = ("image_id", "annotation_id", "category_id", "bbox")
    assert [[row[name] for name in fields] for row in saved] == [
        [row[name] for name in fields] for row in plain
    ]
    sizes = [row["segmentation"]["size"] for row in saved]
    assert sizes == [row["segmentation"]["size"] for row in plain]
    load(tmp_path / "saved" / "dataset.json", tmp_path / "saved" / "results.json")


def test_automatic_masks_of_tiles_are_in_the_frame_of_the_image(coco: Path, tmp_path: Path) -> None:
    low = ("--points_per_side", 2, "--pred_iou_thresh", -10, "--stability_score_thresh", 0)
    tiles = ("--view", "tiles", "--tile_size", 32, "--overlays")
    image = coco.parent / "image_0.png"
    assert predict(tmp_path / "out", "--images", image, *low, *tiles)["masks"] > 0
    assert all(row["segmentation"]["size"] == [48, 64] for row in rows_of(tmp_path / "out"))


def test_points_and_a_box_prompt_one_object_of_each_image(coco: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    flags = ("--images", coco.parent, "--masks", "--overlays", "--format", "coco")
    prompt = ("--point", "12,13", "--point", "3,4,0", "--box", "2,3,30,31")
    assert predict(output, *flags, *prompt)["masks"] == 4
    assert [row["bbox"] for row in rows_of(output)] == [[2, 3, 28, 28]] * 4
    for kind in ("masks", "overlays"):
        assert len(list((output / kind).iterdir())) == 4
    dataset = json.loads((output / "dataset.json").read_text())
    results = {row["image_id"]: row["segmentation"] for row in rows_of(output)}
    assert {one["image_id"]: one["segmentation"] for one in dataset["annotations"]} == results


def test_a_file_of_points_gives_a_mask_for_each_object(
    coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    points = tmp_path / "points.json"
    entries: list[dict[str, Any]] = [
        {"image": "image_2.png", "points": [[5, 6], [30, 30]], "labels": [1, 0], "id": 77},
        {"image": "image_0.png", "points": [[5, 6]], "box": [1, 2, 20, 21]},
        {"image": "image_2.png", "points": [[9, 9]]},
    ]
    points.write_text(json.dumps(entries))
    flags = ("--images", coco.parent, "--annotations", coco, "--points", points, "--overlays")
    assert predict(tmp_path / "out", *flags)["masks"] == 3
    rows = rows_of(tmp_path / "out")
    assert [row["image_id"] for row in rows] == [10, 12, 12]
    assert [row.get("annotation_id") for row in rows] == [None, 77, None]
    assert rows[0]["bbox"] == [1, 2, 19, 19]
    assert "boxes only" not in capsys.readouterr().err  # it is not known of weights without sidecar


def test_a_checkpoint_tuned_on_boxes_only_says_so_before_it_gets_points(
    coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = ("--images", coco.parent / "image_0.png")
    automatic, point = ("--points_per_side", 1), ("--point", "9,9")
    config = {"checkpoint_path": "auto", "model_type": "vit_tiny"}
    trained: list[tuple[dict[str, Any], tuple[Any, ...], bool]] = [
        ({}, automatic, True),
        ({"prompts": "box", "correction_rounds": 0}, point, True),
        ({"prompts": "box", "correction_rounds": 3}, point, False),
        ({"prompts": "mixed", "correction_rounds": None}, automatic, False),
        ({}, ("--box", "1,1,9,9"), False),
    ]
    for settings, prompts, is_warned in trained:
        checkpoint = write_tiny(tmp_path, config=config | settings)
        predict(tmp_path / "out", *image, *prompts, checkpoint=checkpoint)
        warned = "30-0.67.ckpt was tuned on boxes only: " in capsys.readouterr().err
        assert warned is is_warned, (settings, prompts)


def test_settings_of_automatic_masks_reach_the_generator(
    coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {
        "points_per_side": 3,
        "points_per_batch": 5,
        "pred_iou_thresh": 0.1,
        "stability_score_thresh": 0.2,
        "stability_score_offset": 2.5,
        "box_nms_thresh": 0.6,
        "crop_n_layers": 1,
        "crop_nms_thresh": 0.5,
        "crop_overlap_ratio": 0.25,
        "crop_n_points_downscale_factor": 2,
        "min_mask_region_area": 7,
    }
    flags = [word for name, value in settings.items() for word in (f"--{name}", value)]
    image = ("--images", coco.parent / "image_0.png")
    with mock.patch.object(SamAutomaticMaskGenerator, "__init__", autospec=True) as build:
        with pytest.raises(AttributeError):  # nothing was built
            predict(tmp_path / "out", *image, *flags)
    given = build.call_args.kwargs
    assert given.pop("output_mode") == "uncompressed_rle"
    assert given == {name: v for name, v in settings.items() if name != "points_per_batch"}
    predict(tmp_path / "out", *image, "--box", "1,1,9,9", *flags[:2])
    assert "not used, because masks are not automatic here: --points_per_side" in (
        capsys.readouterr().err
    )


def test_bad_images_are_refused_or_left_out(
    coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (coco.parent / "image_1.png").unlink()
    broken = coco.parent / "image_2.png"
    content = bytearray(broken.read_bytes())
    content[60:90] = bytes(30)  # header and end are intact
    broken.write_bytes(content)
    flags = ("--images", coco.parent, "--annotations", coco)
    skip = ("--on_bad_image", "skip")
    counts = predict(tmp_path / "out", *flags, *skip)
    assert counts["images"] == 2
    assert list(counts["images_left_out"]) == ["image_1.png", "image_2.png"]
    warnings = capsys.readouterr().err
    assert "left out: image_1.png: there is no such image file" in warnings
    damage = "image_2.png: the image file cannot be decoded (the checksum of bytes"
    assert f"left out: {damage}" in warnings
    assert {row["image_id"] for row in rows_of(tmp_path / "out")} == {10, 13}
    with pytest.raises(ValueError, match=r"2 of 4 images cannot be read \(image_1.png"):
        predict(tmp_path / "none", *flags)
    assert not (tmp_path / "none").exists()
    (coco.parent / "image_1.png").write_bytes((coco.parent / "image_0.png").read_bytes())
    with pytest.raises(ValueError, match=re.escape(f"1 of 4 images cannot be read ({damage}")):
        predict(tmp_path / "other", *flags)
    assert not (tmp_path / "other").exists()


def test_an_earlier_result_stays_until_the_new_one_is_whole(coco: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    flags = ("--images", coco.parent, "--annotations", coco, "--num_workers", 0)
    predict(output, *flags)
    before = (output / "results.json").read_bytes()
    calls = []

    def fail_at_the_third(self: BoxPredictor, *args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return iter(())

    with mock.patch.object(BoxPredictor, "predict", fail_at_the_third):
        with pytest.raises(ConfigError, match=r"cannot be written \(No space left"):
            predict(output, *flags)
    assert (output / "results.json").read_bytes() == before
    assert not list(output.glob(".*.part"))


def test_a_killed_run_leaves_no_half_file(coco: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    many = tmp_path / "many"
    many.mkdir()
    for k in range(400):
        os.link(coco.parent / "image_0.png", many / f"{k}.png")
    command = [sys.executable, "-m", "samft.predict", "--checkpoint", str(PACKAGED_TINY)]
    command += ["--output_dir", str(output), "--images", str(many), "--box", "1,1,9,9"]
    process = subprocess.Popen(command, env=clean_environment(), stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 100
        while not any(part.stat().st_size for part in output.glob(".results.json.*.part")):
            assert time.monotonic() < deadline and process.poll() is None
    finally:
        process.kill()
        process.wait()
    assert not (output / "results.json").exists() and not (output / "images.json").exists()
    predict(output, "--images", coco.parent, "--box", "1,1,9,9")
    assert sorted(p.name for p in output.iterdir()) == [".lock", "images.json", "results.json"]


Flags = Callable[[Path, Path], list[object]]  # from annotation file, empty folder
REFUSALS: dict[str, tuple[Flags, str]] = {
    "checkpoint": (
        lambda coco, empty: ["--checkpoint", "none.ckpt", "--images", coco.parent],
        "there is no file none.ckpt",
    ),
    "damaged": (
        lambda coco, empty: ["--checkpoint", coco, "--images", coco.parent, "--box", "1,1,9,9"],
        "is not a readable checkpoint",
    ),
    "outside": (
        lambda coco, empty: ["--images", coco.parent, "--box", "30,30,90,90"],
        "lies outside of image_0.png, which is 64 x 48 px",
    ),
    "no area": (lambda coco, empty: ["--images", coco.parent, "--box", "9,9,1,1"], "x1 > x0"),
    "no box": (lambda coco, empty: ["--images", coco.parent, "--box", "9,9"], "x0,y0,x1,y1"),
    "image": (lambda coco, empty: ["--images", empty / "a.png"], "there is no file or folder"),
    "folder": (lambda coco, empty: ["--images", empty], "holds no image file"),
    "missing": (
        lambda coco, empty: ["--images", empty, "--annotations", coco],
        "4 of 4 images cannot be read",
    ),
    "results": (
        lambda coco, empty: [
            *("--images", coco.parent, "--annotations", coco, "--boxes", coco.parent / "r.json")
        ],
        "are of images that the annotation file does not list",
    ),
    "results without images": (
        lambda coco, empty: ["--images", coco.parent, "--boxes", coco.parent / "r.json"],
        "--boxes needs --annotations",
    ),
    "two sources": (
        lambda coco, empty: ["--images", coco.parent, "--automatic", "--box", "1,1,9,9"],
        "exclude each other",
    ),
    "two boxes of one object": (
        lambda coco, empty: [
            *("--images", coco.parent, "--point", "1,1", "--box", "1,1,9,9", "--box", "2,2,9,9")
        ],
        "so one --box goes with it",
    ),
    "points twice": (
        lambda coco, empty: ["--images", coco.parent, "--point", "1,1", "--points", coco],
        "--point and --points exclude each other",
    ),
    "point outside": (
        lambda coco, empty: ["--images", coco.parent, "--point", "1,1", "--point", "64,1,0"],
        "point 64,1 lies outside of image_0.png, which is 64 x 48 px",
    ),
    "point label": (
        lambda coco, empty: ["--images", coco.parent, "--point", "1,1,2"],
        "'1,1,2' is not x,y for a point of the object, or x,y,0",
    ),
    "point of one number": (
        lambda coco, empty: ["--images", coco.parent, "--point", "nan,1"],
        "'nan,1' is not x,y",
    ),
    "points of another form": (
        lambda coco, empty: ["--images", coco.parent, "--points", coco],
        "_annotations.coco.json has another form",
    ),
    "whole number": (
        lambda coco, empty: ["--images", coco.parent, "--points_per_side", "0"],
        "'0' is not a whole number and at least 1",
    ),
    "number": (
        lambda coco, empty: ["--images", coco.parent, "--pred_iou_thresh", "nan"],
        "'nan' is not a number",
    ),
    "crops without points": (
        lambda coco, empty: [
            *("--images", coco.parent, "--points_per_side", 4, "--crop_n_layers", 3),
            *("--crop_n_points_downscale_factor", 2),
        ],
        "leaves no point of --points_per_side 4 for the crops of layer 3",
    ),
    "two folders": (
        lambda coco, empty: ["--images", empty, empty, "--annotations", coco],
        "one folder of --images",
    ),
    "flag": (lambda coco, empty: ["--images", coco.parent, "--bocks", "1"], "--bocks"),
    "tiles of whole images": (
        lambda coco, empty: ["--images", coco.parent, "--tile_size", 64],
        "--tile_size: images are seen as a whole here: give --view tiles or --view objects",
    ),
    "overlap": (
        lambda coco, empty: ["--images", coco.parent, "--view", "tiles", "--tile_overlap", 1],
        "--tile_overlap: 1.0 must be from 0 to 0.9",
    ),
    "workers": (
        lambda coco, empty: ["--images", coco.parent, "--num_workers", -1],
        "must be at least 0",
    ),
    "cuda": (
        lambda coco, empty: ["--images", coco.parent, "--box", "1,1,9,9", "--device", "cuda"],
        "sees no GPU here",
    ),
    "output": (
        lambda coco, empty: ["--images", coco.parent, "--output_dir", coco / "below"],
        "cannot be written",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_wrong_input_is_one_paragraph_and_exit_code_2(
    coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    flags, message = REFUSALS[case]
    (coco.parent / "r.json").write_text(json.dumps([{**DETECTIONS[0], "image_id": 99}]))
    (tmp_path / "empty").mkdir()
    required = ["--checkpoint", PACKAGED_TINY, "--output_dir", tmp_path / "out"]
    with mock.patch("torch.cuda.is_available", return_value=False):
        code = run_command(
            main, [str(flag) for flag in (*required, *flags(coco, tmp_path / "empty"))]
        )
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_input_files_are_never_overwritten(coco: Path, tmp_path: Path) -> None:
    results = coco.parent / "results.json"
    results.write_text(json.dumps(DETECTIONS))
    flags = ("--images", coco.parent, "--annotations", coco, "--boxes", results)
    with pytest.raises(ConfigError, match="would be overwritten"):
        predict(coco.parent, *flags)
    shutil.move(results, tmp_path / "results.json")
    assert predict(coco.parent, *flags[:-1], tmp_path / "results.json")["masks"] == 2


def test_under_torchrun_it_refuses(coco: Path, tmp_path: Path) -> None:
    group = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    with mock.patch.dict(os.environ, group):
        with pytest.raises(ConfigError, match="one process"):
            predict(tmp_path / "out", "--images", coco.parent, "--box", "1,1,9,9")
