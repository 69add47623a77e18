"""Both models on a few objects: the masks that were scored, and why there may be none."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.short_runs import arguments, train_here, write_data
from samft.annotations.segmentation import decode_cropped
from samft.config import TrainConfig, parse_config
from samft.evaluation.metrics import cropped_iou
from samft.evaluation.object_scores import Comparison, ObjectScores, compare_objects
from samft.models.sam import load_state, read_state
from samft.recipes import build
from samft.recipes.datasets import load_splits
from samft.recipes.qualitative_examples import (
    QualitativeExamples,
    correct_objects,
    draw_examples,
    predict_objects,
)
from samft.reports.validation_images import find_objects

pytestmark = pytest.mark.run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Path]:
    """A short run from random weights, and its folder."""
    folder = tmp_path_factory.mktemp("run")
    data = write_data(tmp_path_factory.mktemp("data"), num_train=4, num_val=3)
    argv = arguments(data, folder, checkpoint_path="random", steps=4, metrics_interval=4)
    train_here(argv)
    return parse_config(argv), folder


def comparison_of(folder: Path) -> Comparison:
    steps = json.loads((folder / "objects.json").read_text())
    before, after = (ObjectScores.from_json(steps[step]) for step in ("0", "4"))
    return compare_objects(before, after)


def draw(
    config: TrainConfig, folder: Path, checkpoint: Path, *, stop: bool = False
) -> QualitativeExamples:
    model = build.build_model(config, None, torch.device("cpu"))
    return draw_examples(
        config,
        model,
        load_splits(config).val,
        comparison=comparison_of(folder),
        checkpoint=checkpoint,
        should_stop=lambda: stop,
    )


def best_of(folder: Path) -> Path:
    (checkpoint,) = folder.glob("4-*.ckpt")
    return checkpoint


def test_the_masks_are_those_that_were_scored(run: tuple[TrainConfig, Path]) -> None:
    config, folder = run
    dataset = load_splits(config).val
    model = build.build_model(config, None, torch.device("cpu"))
    load_state(model.sam, read_state(best_of(folder)))
    rows = comparison_of(folder).after
    index = dataset.subset.index
    objects = find_objects(index, rows.keys())
    masks = predict_objects(model, dataset, objects.tolist(), embeddings={})
    image_of = np.repeat(np.arange(index.num_images), np.diff(index.first_object))
    for k, wanted in zip(objects.tolist(), rows.iou_actual, strict=True):
        size = index.sizes[image_of[k]].tolist()
        truth = decode_cropped(index.segmentations[k], size)
        assert cropped_iou(masks[k], truth) == pytest.approx(wanted, abs=1e-9)


def test_objects_are_corrected_by_clicks(run: tuple[TrainConfig, Path]) -> None:
    config, folder = run
    dataset = load_splits(config).val
    model = build.build_model(config, None, torch.device("cpu"))
    load_state(model.sam, read_state(best_of(folder)))
    embeddings: dict[int, torch.Tensor] = {}
    first = correct_objects(model, dataset, embeddings=embeddings, multimask=False)
    encoded: list[int] = []
    model.sam.image_encoder.register_forward_hook(lambda *_: encoded.append(1))
    second = correct_objects(model, dataset, embeddings=embeddings, multimask=True)
    assert encoded == [] and len(embeddings) == 3  # each image was encoded once
    assert np.array_equal(first.scores.keys(), second.scores.keys())
    assert np.array_equal(first.scores.iou_clicks_box, second.scores.iou_clicks_box)
    assert np.array_equal(first.scores.iou_clicks_point[:, 0], first.scores.iou_point)
    assert np.array_equal(second.scores.iou_clicks_point[:, 0], second.scores.iou_point_multimask)
    # The IoU from the box alone is the one that validation had.
    both = compare_objects(comparison_of(folder).after, first.scores)
    assert len(both.before) == len(first.scores) == 1 + 4 + 2  # at most 4 of an image
    np.testing.assert_allclose(both.before.iou_actual, first.scores.iou_clicks_box[:, 0], atol=1e-9)
    assert first.masks.keys() == second.masks.keys() and len(first.masks) == 3
    assert set(map(tuple, first.scores.keys().tolist())) > set(first.masks)
    assert all(1 <= len(masks) <= 3 for masks in first.masks.values())


def test_only_a_training_with_clicks_shows_them(run: tuple[TrainConfig, Path]) -> None:
    config, folder = run
    assert draw(config, folder, best_of(folder)).clicked == []
    clicking = replace(config, prompts="point")
    before, after = draw(clicking, folder, best_of(folder)).clicked
    assert np.array_equal(before.scores.keys(), after.scores.keys())


def test_random_weights_are_drawn_again(run: tuple[TrainConfig, Path]) -> None:
    config, folder = run
    examples = draw(config, folder, best_of(folder))
    assert examples.why_none == ""
    pairs = [pair for kind in examples.pairs.values() for pair in kind]
    comparison = comparison_of(folder)
    assert 0 < len(pairs) <= len(comparison.before)
    for pair in pairs:
        row = comparison.before.object_ids.tolist().index(pair.object_id)
        tables = (comparison.before, comparison.after)
        assert pair.ious == tuple(table.iou_actual[row] for table in tables)
        assert pair.tiles[0].shape == pair.tiles[1].shape and pair.file_name.endswith(".png")


def test_weights_that_are_gone_or_others_leave_no_pictures(
    run: tuple[TrainConfig, Path], tmp_path: Path
) -> None:
    config, folder = run
    gone = draw(config, folder, tmp_path / "gone.ckpt")
    assert "cannot be loaded any more" in gone.why_none and gone.pairs == {}
    other = draw(replace(config, seed=5), folder, best_of(folder))
    assert "the file has changed" in other.why_none and other.pairs == {}


def test_a_stop_is_heeded(run: tuple[TrainConfig, Path]) -> None:
    config, folder = run
    assert "asked to stop" in draw(config, folder, best_of(folder), stop=True).why_none


def test_an_image_that_is_gone_leaves_its_objects_out(
    tmp_path: Path, run: tuple[TrainConfig, Path]
) -> None:
    config, folder = run
    dataset = load_splits(config).val
    index = dataset.subset.index
    moved = replace(dataset.subset, index=replace(index, image_folder=tmp_path))
    (tmp_path / index.file_name(0)).write_bytes(
        (index.image_folder / index.file_name(0)).read_bytes()
    )
    dataset.subset = moved
    model = build.build_model(config, None, torch.device("cpu"))
    masks = predict_objects(model, dataset, dataset.subset.objects.tolist(), embeddings={})
    assert masks.keys() == set(dataset.subset.objects_of(0).tolist())
