"""Points between two checkpoints score as checkpoints of their own, each image encoded once."""

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.coco_files import write_coco
from helpers.tiny_checkpoint import SIZE, tiny_sam
from samft.average import evaluate_line
from samft.coco.subset import read_coco
from samft.data.dataset import Batch, Coco2MaskDataset
from samft.data.loaders import val_loader
from samft.evaluation.evaluator import evaluate_split
from samft.evaluation.tables import format_line
from samft.models.prompted_sam import PromptedSam
from samft.models.sam import load_state
from samft.weights.averages import average_states, best_point

WEIGHTS = (0.0, 0.25, 1.0)


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> list[Batch]:
    folder: Path = write_coco(tmp_path_factory.mktemp("data"), 2).parent
    subset = read_coco(folder / "_annotations.coco.json", folder)
    dataset = Coco2MaskDataset(subset.index.image_folder, subset=subset, image_size=SIZE)
    return list(val_loader(dataset))


def states(*, same_encoder: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    first, second = tiny_sam(seed=1).state_dict(), tiny_sam(seed=2).state_dict()
    if same_encoder:
        second |= {n: t for n, t in first.items() if n.startswith("image_encoder.")}
    return first, second


@pytest.mark.parametrize("same_encoder", [True, False])
def test_each_point_scores_as_a_checkpoint(batches: list[Batch], same_encoder: bool) -> None:
    ends = states(same_encoder=same_encoder)
    model = PromptedSam(tiny_sam(seed=3))
    load_state(model.sam, dict(ends[0]))
    encoded: list[int] = []
    model.sam.image_encoder.register_forward_hook(lambda *_: encoded.append(1))
    passes: list[int] = []

    def open_batches() -> Iterator[Batch]:
        passes.append(1)
        return iter(batches)

    tables, bad_images = evaluate_line(model, ends, WEIGHTS, open_batches=open_batches)
    assert not bad_images
    assert len(passes) == (1 if same_encoder else len(WEIGHTS))
    assert len(encoded) == len(passes) * len(batches)
    for weight, table in zip(WEIGHTS, tables, strict=True):
        sam = tiny_sam(seed=4)
        load_state(sam, average_states(*ends, weight))
        expected, _ = evaluate_split(PromptedSam(sam), batches)
        for column in fields(expected):
            assert np.array_equal(getattr(table, column.name), getattr(expected, column.name))
    assert not np.array_equal(tables[0].iou_predicted, tables[1].iou_predicted)


def test_the_best_point_is_the_least_changed_among_equals() -> None:
    assert best_point([0.5, 0.7, 0.7, 0.6], [0.0, 0.3, 0.6, 1.0]) == 1
    assert best_point([0.7, 0.7], [1.0, 0.0]) == 1
    assert best_point([0.1, 0.2, 0.3], [0.0, 0.5, 1.0]) == 2


def test_the_table_has_what_averages_forget_of_a_general_set() -> None:
    points = [
        {"weight": weight, "per_mask_iou": iou, "boundary_iou": 0.5, "iou_jitter_10": 0.5}
        | {"iou_point": 0.25, "objects_harmed": 7}
        for weight, iou in ((0.0, 0.5), (0.5, 0.75), (1.0, 0.7))
    ]
    head, *rows = format_line(points, 1)[:4]
    assert head.split() == [
        "share",
        "of",
        "B",
        "IoU",
        "boundary",
        "box",
        "+-10%",
        "point",
        "harmed",
    ]
    assert rows[1].split() == ["0.5", "0.7500", "0.5000", "0.5000", "0.2500", "7", "best"]
    for point, general, harmed in zip(points, (0.8, 0.76, 0.6), (0, 3, 9), strict=True):
        point |= {"general_per_mask_iou": general, "general_objects_harmed": harmed}
    head, *rows = format_line(points, 1)[:4]
    assert head.endswith("   general") and rows[1].endswith("    0.7600  best")
    assert max(map(len, rows)) <= 80
    (line,) = (line for line in format_line(points, 1) if line.startswith("general:"))
    assert "0.8000 with A, 0.6000 with B, 0.7600 with the best (-0.0400 since A; harmed 3)" in line
