"""The quality lab runs what samft runs, each run once, and compares runs without fooling itself."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import cv2
import numpy as np
import pytest
import torch
from pycocotools.coco import COCO

from benchmarks import quality, quality_datasets, quality_recipes, quality_scores
from benchmarks.quality_datasets import QualityDataset
from benchmarks.quality_recipes import RunRequest, train_with_samft
from benchmarks.quality_report import (
    Report,
    collect_results,
    compare_recipes,
    format_difference,
    replace_block,
)
from benchmarks.quality_rows import RowStore
from benchmarks.quality_scenes import draw_cells, draw_filaments, write_scenes
from benchmarks.quality_scores import Difference, paired_difference, read_scores
from helpers.short_runs import arguments, read_weights, train_here, write_data
from samft.coco.subset import CocoSubset
from samft.config import parse_config
from samft.errors import DataError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("quality"), num_train=6, num_val=3)


@pytest.fixture(autouse=True)
def _small_dataset(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = QualityDataset(64, lambda lab_dir: {"data_root": str(data)})
    monkeypatch.setitem(quality_datasets.DATASETS, "small", small)


def options(folder: Path, *argv: str) -> argparse.Namespace:
    return quality.parse_arguments(
        f"run --output_dir {folder} --datasets small --steps 2 --batch_size 2".split() + [*argv]
    )


@pytest.mark.run
@pytest.mark.parametrize("frozen", [True, False])
def test_default_ends_with_the_weights_of_samft_train(
    frozen: bool, data: Path, tmp_path: Path
) -> None:
    argv = arguments(
        data, tmp_path / "run", steps=3, metrics_interval=3, freeze_image_encoder=frozen
    )
    train_here(argv)
    model = train_with_samft(
        parse_config(
            arguments(
                data, tmp_path / "lab", steps=3, metrics_interval=3, freeze_image_encoder=frozen
            )
        )
    )
    expected = read_weights(tmp_path / "run")
    state = model.sam.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_runs_are_not_run_twice_and_leave_rows(tmp_path: Path) -> None:
    args = options(tmp_path, "--seeds", "0", "1")
    quality.run_requests(args)
    rows = RowStore(tmp_path).read_rows()
    assert [(row["recipe"], row["seed"]) for row in rows] == [
        *(("untouched", 0), ("original", 0), ("default", 0), ("original", 1), ("default", 1))
    ]
    with mock.patch.object(quality_recipes.Laboratory, "train_recipe") as train_recipe:
        quality.run_requests(args)
    assert not train_recipe.called
    scores = read_scores(tmp_path / "scores" / rows[1]["scores"])
    assert rows[1]["iou"] == scores.iou.mean() and rows[1]["num_objects"] == len(scores.iou)
    assert (scores.iou != scores.iou_own_frame).any()  # squashed
    untouched, ours = (RowStore(tmp_path).read_scores(rows[at]) for at in (0, 2))
    assert (untouched.iou == untouched.iou_own_frame).all()
    assert (untouched.object_ids == ours.object_ids).all()
    assert (untouched.iou_box_fill == ours.iou_box_fill).all()


def test_clicks_are_scored_if_asked_and_reported_where_all_runs_have_them(tmp_path: Path) -> None:
    argv = ["--seeds", "0", "--recipes", "untouched", "mixed_best_3", "--against", "untouched"]
    plain = options(tmp_path, *argv)
    quality.run_requests(plain)
    store = RowStore(tmp_path)
    assert not any("iou_clicks_box" in row for row in store.read_rows())
    results = collect_results(store, quality.plan_requests(plain))
    assert "7 clicks" not in Report("block", results, against="untouched").to_markdown()
    quality.run_requests(options(tmp_path, *argv, "--clicks"))
    rows = store.read_rows()
    assert len(rows) == 4
    scores = store.read_scores(rows[-1])
    assert scores.has_clicks and rows[-1]["iou_clicks_point"] == scores.iou_clicks_point.mean()
    assert (scores.iou_clicks_box != scores.iou).any()
    page = Report("b", collect_results(store, quality.plan_requests(plain)), against="untouched")
    assert page.to_markdown().count("IoU, box and 7 clicks") == 2


def test_automatic_masks_are_scored_on_a_sample_of_the_images(tmp_path: Path) -> None:
    argv = ["--seeds", "0", "--recipes", "untouched", "default", "--against", "untouched"]
    args = options(tmp_path, *argv, "--automatic", "2")
    columns = {"found_50": np.array([1.0, 0.0, 1.0]), "found_75": np.array([1.0, 0.0, 0.0])}

    def score(images: list[Any], subset: CocoSubset) -> Any:
        keys = [(i.image_id, one) for i in images for one in i.object_ids]
        assert len(images) == subset.num_images == 2 and len(keys) >= 3
        ids = np.array(keys[:3])
        return SimpleNamespace(
            objects=SimpleNamespace(image_ids=ids[:, 0], object_ids=ids[:, 1]), columns=columns
        )

    with mock.patch.object(quality_scores, "score_masks", score):
        quality.run_requests(args)
    store = RowStore(tmp_path)
    rows = store.read_rows()
    assert [(row["found_50"], row["found_75"]) for row in rows] == [(2 / 3, 1 / 3)] * 2
    scores = store.read_scores(rows[0])
    assert scores.has_automatic and np.isfinite(scores.found_50).sum() == 3
    quality.run_requests(args)
    assert len(store.read_rows()) == 2
    page = Report("b", collect_results(store, quality.plan_requests(args)), against="untouched")
    assert page.to_markdown().count("found automatically, IoU .50") == 2


def test_objects_without_a_score_take_no_part_in_a_difference() -> None:
    before = np.array([[0.0, np.nan, 1.0, np.nan]])
    after = np.array([[1.0, np.nan, 1.0, np.nan]])
    difference = paired_difference(before, after, np.array([1, 1, 2, 3]))
    assert difference == (0.5, 0.0, 1.0)


def test_a_row_of_other_weights_or_settings_is_not_used(tmp_path: Path) -> None:
    args = options(tmp_path, "--seeds", "0", "--recipes", "default")
    quality.run_requests(args)
    (request,) = quality.plan_requests(args)
    store = RowStore(tmp_path)
    assert store.find_row(request) is not None
    assert store.find_row(replace(request, frozen=False)) is None
    with mock.patch.dict(quality_recipes.VARIANTS, {"default": {"weight_decay": 0.5}}):
        assert store.find_row(request) is None
    store.weights = "others"
    assert store.find_row(request) is None
    # Half a line, of a process that was killed, spoils none but itself.
    with store.path.open("a") as file:
        file.write('{"dataset": "sm')
    assert len(store.read_rows()) == 1
    row = json.loads(store.path.read_text().splitlines()[0])
    assert "num_workers" not in row["settings"] and row["settings"]["box_jitter"] == 0.1


def test_a_known_difference_is_found() -> None:
    generator = np.random.default_rng(0)
    images = np.repeat(np.arange(40), 5)
    before = generator.uniform(0.3, 0.7, (3, 200))
    same = paired_difference(before, before, images)
    assert same == Difference(0.0, 0.0, 0.0)
    constant = paired_difference(before, before + 0.02, images)
    assert constant == pytest.approx((0.02, 0.02, 0.02))
    noisy = paired_difference(before, before + generator.normal(0.02, 0.03, (3, 200)), images)
    # Of 600 independent changes of .03, the mean is known to about 1.96 * .03 / sqrt(600).
    assert noisy.mean == pytest.approx(0.02, abs=0.004)
    assert 0.001 < noisy.high - noisy.low < 0.012 and noisy.low < 0.02 < noisy.high


def test_objects_of_one_image_and_seeds_count_as_one() -> None:
    generator = np.random.default_rng(1)
    change = np.repeat(generator.normal(0, 0.1, (1, 20)), 10, axis=1)  # alike in each image
    zero = np.zeros((1, 200))
    clustered = paired_difference(zero, change, np.repeat(np.arange(20), 10))
    independent = paired_difference(zero, change, np.arange(200))
    assert clustered.high - clustered.low > 2 * (independent.high - independent.low)
    by_seed = np.array([[0.0], [0.1]]).repeat(200, axis=1)
    seeds = paired_difference(np.zeros((2, 200)), by_seed, np.arange(200))
    assert seeds == pytest.approx((0.05, 0.0, 0.1))


def test_the_report_replaces_its_own_block_only(tmp_path: Path) -> None:
    quality.run_requests(options(tmp_path, "--seeds", "0"))
    page = tmp_path / "experiments.md"
    page.write_text(
        "# Page\n\n<!-- quality: other -->\nkeep\n<!-- end -->\n\n"
        "<!-- quality: default -->\nold\n<!-- end -->\n\nText.\n"
    )
    args = options(tmp_path, "--seeds", "0", "1", "--docs", str(tmp_path))
    quality.write_report(args)
    text = page.read_text()
    assert "keep" in text and "old" not in text and text.endswith("<!-- end -->\n\nText.\n")
    for line in ("| `small` (", "| `small` | default |", "| `small` | untouched |"):
        assert sum(row.startswith(line) for row in text.splitlines()) == 1, line
    assert "2 steps of 2 images, image encoder frozen; seeds 0." in text
    svg = (tmp_path / "images" / "quality_default.svg").read_text()
    assert svg.count("<circle") == 8 and "small: untouched" in svg
    quality.write_report(args)
    assert page.read_text() == text
    results = collect_results(RowStore(tmp_path), quality.plan_requests(args))
    recipes = results["small"]
    difference = compare_recipes(recipes["untouched"], recipes["default"], "iou")
    scores = {name: recipes[name][0].scores.iou.mean() for name in recipes}
    assert difference is not None
    assert difference.mean == pytest.approx(scores["default"] - scores["untouched"])
    with pytest.raises(DataError, match="not exactly one block 'new'"):
        Report("new", results, against="original").write(tmp_path)


def test_a_report_without_rows_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no row .* run"):
        quality.write_report(options(tmp_path))


def test_a_block_needs_its_marks() -> None:
    page = Path("experiments.md")
    text = "<!-- quality: a -->\nx\n<!-- end -->"
    assert replace_block(text, "a", r"\1", page=page) == text.replace("x", "\n\\1\n")
    for wrong in ("", text + "\n" + text, "<!-- quality: a -->\nx"):
        with pytest.raises(DataError, match=r"experiments.md .* block 'a'"):
            replace_block(wrong, "a", "y", page=page)


def test_differences_that_are_sure_are_bold() -> None:
    assert format_difference(Difference(0.0212, 0.013, 0.028)) == "**+.021** [+.013, +.028]"
    assert format_difference(Difference(-0.001, -0.01, 0.002)) == "-.001 [-.010, +.002]"
    assert format_difference(None) == "-"


@pytest.mark.parametrize("draw", [draw_filaments, draw_cells])
def test_scenes_are_coco_files_of_exact_masks(draw, tmp_path: Path) -> None:
    write_scenes(tmp_path, draw, seed=3, num_train=2, num_val=1)
    image, masks = draw(np.random.default_rng([3, 0, 0]))
    coco = COCO(tmp_path / "train" / "_annotations.coco.json")
    entries = coco.loadAnns(coco.getAnnIds(imgIds=[1]))
    assert len(entries) == len(masks) > 2
    assert (coco.imgs[1]["height"], coco.imgs[1]["width"]) == image.shape[:2]
    assert np.sum(masks, axis=0).max() == 1  # no pixel is in two objects
    for entry, mask in zip(entries, masks, strict=True):
        drawn = coco.annToMask(entry).astype(bool)
        assert (drawn & mask).sum() / (drawn | mask).sum() > 0.9
        assert entry["area"] == mask.sum()
    again = write_scenes(tmp_path / "again", draw, seed=3, num_train=2, num_val=1)
    for file in ("train/001.png", "val/001.png", "val/_annotations.coco.json"):
        assert (again / file).read_bytes() == (tmp_path / file).read_bytes()


def test_rings_keep_their_holes() -> None:
    scenes = [draw_filaments(np.random.default_rng(seed))[1] for seed in range(4)]
    assert any(_has_hole(mask) for masks in scenes for mask in masks)


def _has_hole(mask: np.ndarray) -> bool:
    _, hierarchy = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    return bool((hierarchy[0, :, 3] >= 0).any())


def test_every_dataset_and_recipe_has_a_valid_configuration(
    tmp_path: Path, data_root: Path
) -> None:
    real = [n for n in quality_datasets.DATASETS if n not in ("demo", "filaments", "cells")]
    for dataset in real:
        for recipe in quality_recipes.RECIPES:
            assert not RunRequest(dataset, recipe, 0, 300, 4, True).config(tmp_path).check()
