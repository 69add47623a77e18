"""Automatic masks equal the package's; where it finds none, in crops or not, there are none."""

import sys
from typing import Any

import numpy as np
import pytest
from segment_anything import SamAutomaticMaskGenerator, automatic_mask_generator
from segment_anything.modeling import Sam

from helpers.tiny_checkpoint import mask_finding_sam
from samft.images.synthetic import draw_scene
from samft.models import mask_generator
from samft.models.mask_generator import MaskGenerator, choose_points_per_batch
from samft.runtime.torchvision_compat import replace_missing_nms

WITH_CROPS = {"points_per_side": 4, "crop_n_layers": 1, "crop_n_points_downscale_factor": 2}


@pytest.fixture(scope="module")
def sam() -> Sam:
    return mask_finding_sam()


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return draw_scene(np.random.default_rng(3), 96)[0][:72]


@pytest.mark.parametrize(
    "settings",
    [
        {"points_per_side": 4},
        {**WITH_CROPS, "min_mask_region_area": 30, "box_nms_thresh": 0.9},
        {"points_per_side": 3, "stability_score_offset": 3.0, "points_per_batch": 2},
    ],
)
def test_masks_equal_the_packages(sam: Sam, image: np.ndarray, settings: dict[str, Any]) -> None:
    replace_missing_nms(automatic_mask_generator)
    stock = SamAutomaticMaskGenerator(sam, output_mode="uncompressed_rle", **settings)
    masks = MaskGenerator(sam, **settings).generate(image)
    assert masks == stock.generate(image) and len(masks) > 1


def test_crops_without_any_mask_give_none(image: np.ndarray) -> None:
    nothing = mask_finding_sam(iou_predicted=0.5)
    assert MaskGenerator(nothing, **WITH_CROPS).generate(image) == []
    # The package itself stops there, which is why there is a class of our own.
    with pytest.raises(IndexError):
        SamAutomaticMaskGenerator(nothing, **WITH_CROPS).generate(image)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (2, 3)])
def test_tiny_images_may_have_crops(sam: Sam, size: tuple[int, int]) -> None:
    masks = MaskGenerator(sam, **WITH_CROPS).generate(np.zeros((*size, 3), np.uint8))
    assert all(mask["segmentation"]["size"] == list(size) for mask in masks)


class CountingBar:
    """A bar that remembers what it counts."""

    def __init__(self, **options: Any) -> None:
        self.options, self.counted = options, []
        self.update = self.counted.append

    def __enter__(self) -> "CountingBar":
        return self

    def __exit__(self, *error: object) -> None:
        self.options["closed"] = True


def test_a_bar_moves_within_an_image(
    sam: Sam, image: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[CountingBar] = []

    def progress_bar(**options: Any) -> CountingBar:
        bars.append(CountingBar(**options))
        return bars[-1]

    monkeypatch.setattr(mask_generator, "progress_bar", progress_bar)
    generator = MaskGenerator(sam, **WITH_CROPS, points_per_batch=3)
    assert generator.num_points == 4 * 4 + 4 * 2 * 2
    generator.generate(image)
    (bar,) = bars
    assert bar.counted == [3, 3, 3, 3, 3, 1, *[3, 1] * 4]
    assert sum(bar.counted) == bar.options["total"] == generator.num_points
    assert bar.options["closed"] and bar.options["unit"] == "point" and not bar.options["hidden"]
    MaskGenerator(sam, points_per_side=1, show_progress=False).generate(image)
    assert bars[-1].options["hidden"]


def test_without_a_terminal_a_minute_within_an_image_is_a_line(
    sam: Sam, image: np.ndarray, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("samft.runtime.logs._LINE_SECONDS", 0.0)
    assert not sys.stderr.isatty()
    MaskGenerator(sam, points_per_side=4, points_per_batch=8).generate(image)
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("this image: 8 of 16 points after") for line in lines), lines


def test_large_images_have_fewer_points_per_batch() -> None:
    assert choose_points_per_batch((480, 640)) == choose_points_per_batch((1024, 1024)) == 64
    assert choose_points_per_batch((2048, 2048)) == 16
    assert choose_points_per_batch((20_000, 8_000)) == 1
