"""The scores of the packaged weights on procedural scenes are what they are called."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from segment_anything.utils.amg import mask_to_rle_pytorch
from torch import from_numpy

from benchmarks import pretrain_tiny
from benchmarks.pretrain_tiny import HELD_OUT_SEED, score_automatic, score_held_out
from benchmarks.procedural import make_scene
from samft.models.prompted_sam import PromptedSam
from samft.models.sam import build_sam

SIZE = 64


@pytest.fixture(scope="module")
def model() -> PromptedSam:
    return PromptedSam(build_sam("vit_tiny", SIZE).eval())


@pytest.mark.parametrize(("share", "expected"), [(1.0, 1.0), (0.6, 1.0), (0.4, 0.0)])
def test_an_object_is_found_by_a_mask_of_half_its_union(
    model: PromptedSam, monkeypatch: pytest.MonkeyPatch, share: float, expected: float
) -> None:
    scenes = iter([make_scene(seed, size=SIZE) for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + 2)])

    def generate(self: Any, image: NDArray[np.uint8]) -> list[dict[str, Any]]:
        masks = np.stack([part_of(mask, share) for mask in next(scenes).masks])
        return [{"segmentation": rle} for rle in mask_to_rle_pytorch(from_numpy(masks))]

    monkeypatch.setattr(pretrain_tiny.MaskGenerator, "generate", generate)
    assert score_automatic(model, size=SIZE, num_scenes=2)["found_50"] == expected


def part_of(mask: NDArray[np.uint8], share: float) -> NDArray[np.bool_]:
    """A mask with this share of the pixels, which is its IoU with the whole."""
    pixels = np.flatnonzero(mask)
    part = np.zeros(mask.size, dtype=bool)
    part[pixels[: round(share * len(pixels))]] = True
    return part.reshape(mask.shape)


def test_no_mask_finds_nothing(model: PromptedSam, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain_tiny.MaskGenerator, "generate", lambda self, image: [])
    scores = score_automatic(model, size=SIZE, num_scenes=1)
    assert scores == {"found_50": 0.0, "masks": 0.0}


def test_scores_of_prompts_are_means_over_objects(model: PromptedSam) -> None:
    scores = score_held_out(model, size=SIZE, num_scenes=2)
    assert set(scores) == {"iou", "box_fill_iou", "point_iou", "clicks_iou"}
    assert all(0 <= score <= 1 for score in scores.values()) and scores["box_fill_iou"] > 0.2
