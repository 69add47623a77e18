"""Outlines on the view that EXIF turns: every command gives what the same pictures give upright."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.drawn_sets import Change, draw_set, write_set
from helpers.short_runs import arguments, evaluate_here, train_here
from samft import check, predict

pytestmark = pytest.mark.run
UPRIGHT, TURNED = "upright", "turned"
CHANGES = {UPRIGHT: Change(), TURNED: Change(orientation=6)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frames")
    for name, change in CHANGES.items():
        for seed, split in enumerate(("train", "val")):
            write_set(folder / name / split, draw_set(seed, num_images=4), change)
    return folder


@pytest.fixture(scope="module", params=["off", "on"])
def runs(request: pytest.FixtureRequest, folder: Path) -> dict[str, dict[str, Any]]:
    changes = {"steps": 2, "metrics_interval": 1, "freeze_image_encoder": True, "augment": "none"}
    return {
        name: train_here(
            arguments(
                folder / name,
                folder / f"run-{name}-{request.param}",
                **changes,
                cache_embeddings=request.param,
                cache_dir=folder / "embeddings",  # of both: a turned image has its own embedding
            )
        )
        for name in CHANGES
    }


def test_training_and_evaluation_see_turned_images(
    folder: Path, runs: dict[str, dict[str, Any]]
) -> None:
    upright, turned = (runs[name] for name in CHANGES)
    for key in ("baseline_val_per_mask_iou", "best_val_per_mask_iou", "box_fill_iou"):
        assert turned[key] == pytest.approx(upright[key], abs=1e-9), key
    for split in ("train", "val"):
        assert "frame" not in upright["data"][split]
        assert turned["data"][split]["frame"]["turned_by_exif"]
    scores = evaluate_here(
        ["--checkpoint", turned["best_checkpoint"], "--data_root", str(folder / TURNED)]
        + ["--device", "cpu"]
    )
    assert scores["per_mask_iou"] == pytest.approx(turned["best_val_per_mask_iou"], abs=1e-9)


def test_predicted_masks_are_in_the_frame_of_the_outlines(
    folder: Path, runs: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    results = {}
    for name in CHANGES:
        val, target = folder / name / "val", folder / "predicted" / name
        checkpoint = ("--checkpoint", runs[UPRIGHT]["best_checkpoint"], "--device", "cpu")
        source = ("--images", str(val), "--annotations", str(val / "_annotations.coco.json"))
        capsys.readouterr()
        predict.main([*checkpoint, *source, "--output_dir", str(target), "--overlays"])
        assert ("frame-exif-turned" in capsys.readouterr().err) == (name == TURNED)
        results[name] = json.loads((target / "results.json").read_text())
        detected = [{**one, "score": 1.0} for one in results[name]]
        (target / "detected.json").write_text(json.dumps(detected))
        boxes = ("--boxes", str(target / "detected.json"), "--output_dir", str(target / "again"))
        predict.main([*checkpoint, *source, *boxes])
        again = json.loads((target / "again" / "results.json").read_text())
        assert [one["segmentation"] for one in again] == [
            one["segmentation"] for one in results[name]
        ]
    assert results[TURNED] == results[UPRIGHT]


def test_the_check_says_the_same_and_draws_sheets(folder: Path, tmp_path: Path) -> None:
    reports = [
        check.main(["--data_root", str(folder / name), "--pictures", str(tmp_path / name)])
        for name in CHANGES
    ]
    frames = [report["splits"]["val"]["frame"] for report in reports]
    assert frames[0] == {} and frames[1]["turned_by_exif"]
    (sheets, turned) = (sorted((tmp_path / name).rglob("*.png")) for name in CHANGES)
    assert len(sheets) == len(turned) > 0
