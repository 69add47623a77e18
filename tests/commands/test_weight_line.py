"""Points between two checkpoints score as checkpoints of their own, each image encoded once."""

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.coco_files import write_coco
from helpers.tiny_checkpoint import SIZE, tiny_sam
from samft.average import best_point, evaluate_line
from samft.coco.subset import read_coco
from samft.data.dataset import Batch, Coco2MaskDataset
from samft.data.loaders import val_loader
from samft.evaluation.evaluator import evaluate_split
from samft.models.prompted_sam import PromptedSam
from samft.models.sam import load_state
from samft.weights.averages import average_states

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
