"""Masks through windows are stock `SamPredictor`'s on the same windows, each prompt once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from segment_anything import SamPredictor

from helpers.tiny_checkpoint import mask_finding_sam
from samft.images.pixels import PixelFormat
from samft.models.prompted_sam import PromptedSam
from samft.models.sam import load_sam, open_checkpoint
from samft.prediction.points import NO_BOX, PointPrompt
from samft.prediction.predictors import (
    AutomaticPredictor,
    BoxPredictor,
    PointPredictor,
    PredictedMask,
)
from samft.prediction.windows import (
    WindowedImage,
    group_prompts,
    predict_through_windows,
    reaches_beyond,
)
from samft.views.windows import View, best_windows, tile_windows
from samft.weights.download import PACKAGED_TINY

HEIGHT, WIDTH = 400, 560
TILES = View("tiles", tile_size=160, tile_overlap=0.25)


def draw_discs(seed: int = 0, number: int = 14) -> tuple[np.ndarray, np.ndarray]:
    """A picture of small discs, uint8 [H, W, 3], and their boxes [K, 4]."""
    rng = np.random.default_rng(seed)
    image = np.full((HEIGHT, WIDTH, 3), 230, np.uint8)
    radius = rng.integers(4, 20, number)
    centres = rng.uniform([20, 20], [WIDTH - 20, HEIGHT - 20], (number, 2)).round().astype(int)
    for centre, r in zip(centres.tolist(), radius.tolist(), strict=True):
        colour = rng.integers(0, 160, 3).tolist()
        cv2.circle(image, centre, r, colour, -1, cv2.LINE_AA)
    boxes = np.concatenate([centres - radius[:, None], centres + radius[:, None] + 1], axis=1)
    return image, boxes.clip(0, [WIDTH, HEIGHT] * 2).astype(float)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, np.ndarray]:
    image, boxes = draw_discs()
    path = tmp_path_factory.mktemp("picture") / "discs.tif"
    tifffile.imwrite(path, image, photometric="rgb", tile=(64, 64), compression="zlib")
    return path, image, boxes


def take_all(k: int, image: WindowedImage, masks: Iterator[PredictedMask]) -> list[PredictedMask]:
    assert image.size == (HEIGHT, WIDTH)
    return list(masks)


def predict(predictor: Any, path: Path, prompts: Any, view: View = TILES) -> list[PredictedMask]:
    pixels = PixelFormat(in_windows=True)
    (masks,) = predict_through_windows(
        predictor, [(path, prompts)], take_all, view=view, num_workers=2, pixels=pixels
    )
    assert isinstance(masks, list)
    return masks


def paste(predicted: PredictedMask) -> np.ndarray:
    canvas = np.zeros((HEIGHT, WIDTH), bool)
    x0, y0, x1, y1 = predicted.mask.extent
    canvas[y0:y1, x0:x1] = predicted.mask.mask
    return canvas


def stock_mask(window: np.ndarray, image: np.ndarray, **prompt: Any) -> np.ndarray:
    x0, y0, x1, y1 = window.tolist()
    stock = SamPredictor(load_sam(PACKAGED_TINY))
    stock.set_image(image[y0:y1, x0:x1])
    masks, _, _ = stock.predict(**prompt, multimask_output=False)
    canvas = np.zeros((HEIGHT, WIDTH), bool)
    canvas[y0:y1, x0:x1] = masks[0]
    return canvas


@pytest.mark.parametrize("view", [TILES, View("objects", tile_size=128, context=3.0)])
def test_masks_of_boxes_are_stocks_on_the_same_windows(
    picture: tuple[Path, np.ndarray, np.ndarray], view: View
) -> None:
    path, image, boxes = picture
    sam = open_checkpoint(PACKAGED_TINY, attention="fast").sam
    masks = predict(BoxPredictor(PromptedSam(sam)), path, boxes, view)
    assert sorted(one.number or 0 for one in masks) == list(range(len(boxes)))
    seen = group_prompts(boxes, (HEIGHT, WIDTH), view)
    window_of = np.repeat(np.arange(len(seen.windows)), seen.counts)[np.argsort(seen.objects)]
    if view.kind == "tiles":
        expected = best_windows(boxes, tile_windows((HEIGHT, WIDTH), view))
        np.testing.assert_array_equal(
            seen.windows[window_of], tile_windows((HEIGHT, WIDTH), view)[expected]
        )
    shares = []
    for one in masks:
        assert one.number is not None
        window, box = seen.windows[window_of[one.number]], boxes[one.number]
        cut = np.clip(box.reshape(2, 2), window[:2], window[2:]) - window[:2]
        shares.append((paste(one) == stock_mask(window, image, box=cut.ravel())).mean())
        assert list(one.box_original) == box.tolist()
    assert min(shares) >= 0.999


def test_points_outside_of_the_window_are_left_out(
    picture: tuple[Path, np.ndarray, np.ndarray],
) -> None:
    path, image, boxes = picture
    largest = boxes[np.argmax(boxes[:, 2] - boxes[:, 0])]
    centre = (largest[:2] + largest[2:]) / 2
    far = (centre + 300) % [WIDTH, HEIGHT]
    points = np.array([[*centre, 1], [*(centre + 25), 0], [*far, 0]])
    prompts = [PointPrompt(points, np.array(NO_BOX)), PointPrompt(points, largest)]
    sam = open_checkpoint(PACKAGED_TINY, attention="fast").sam
    predictor = PointPredictor(PromptedSam(sam), three_masks=False)
    masks = {one.number: one for one in predict(predictor, path, prompts)}
    for number, prompt in enumerate(prompts):
        seen = group_prompts([prompt], (HEIGHT, WIDTH), TILES)
        corner = seen.windows[0, :2]
        box = {"box": largest - np.tile(corner, 2)} if prompt.has_box else {}
        expected = stock_mask(
            seen.windows[0],
            image,
            point_coords=points[:2, :2] - corner,
            point_labels=points[:2, 2],
            **box,
        )
        assert (paste(masks[number]) == expected).mean() >= 0.999
    assert list(masks[1].box_original) == largest.tolist()
    ys, xs = np.nonzero(paste(masks[0]))
    extent = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] if len(xs) else [0, 0, 0, 0]
    assert list(masks[0].box_original) == extent


@pytest.mark.parametrize(
    ("points", "box", "is_cut"),
    [
        ([[10, 10, 1], [99, 99, 1]], NO_BOX, False),
        ([[10, 10, 1], [100, 50, 1]], NO_BOX, True),  # a click of the object, which is not used
        ([[10, 10, 1], [300, 50, 0]], NO_BOX, False),  # of something else: nothing is lost
        ([[-1, 10, 1]], (10, 10, 20, 20), True),
        ([], (0, 0, 100, 100), False),
        ([], (-1, 0, 101, 100), False),  # as annotations have it
        ([], (0, 0, 102, 100), True),
        ([], (0, -2, 100, 100), True),
    ],
)
def test_an_object_is_cut_where_a_part_of_it_is_not_shown(
    points: list[list[float]], box: tuple[float, ...], is_cut: bool
) -> None:
    window, corners = np.array([0, 0, 100, 100]), np.array(box, dtype=float)
    prompt = PointPrompt(np.array(points, dtype=float).reshape(-1, 3), corners)
    assert reaches_beyond(prompt, window) == is_cut
    assert (
        reaches_beyond(
            PointPrompt(prompt.points + [50, 7, 0], corners + np.tile([50, 7], 2)),
            window + np.tile([50, 7], 2),
        )
        == is_cut
    )
    if not points:
        assert reaches_beyond(corners, window) == is_cut


def test_masks_say_whether_their_objects_are_cut(
    picture: tuple[Path, np.ndarray, np.ndarray],
) -> None:
    path, _, boxes = picture
    large = np.array([[20.0, 20, 300, 100]])
    predictor = BoxPredictor(PromptedSam(open_checkpoint(PACKAGED_TINY, attention="fast").sam))
    masks = predict(predictor, path, np.concatenate([boxes, large]))
    assert [one.number for one in masks if one.is_cut] == [len(boxes)]


def test_an_object_of_points_far_apart_is_where_one_of_them_is() -> None:
    points = np.array([[10.0, 10, 1], [550, 390, 1], [300, 200, 0]])
    seen = group_prompts([PointPrompt(points, np.array(NO_BOX))], (HEIGHT, WIDTH), TILES)
    x0, y0, x1, y1 = seen.windows[0].tolist()
    assert ((points[:2, 0] >= x0) & (points[:2, 0] < x1)).any()
    assert ((points[:2, 1] >= y0) & (points[:2, 1] < y1)).any()


def test_an_object_whose_points_are_far_from_its_box_is_where_its_box_is() -> None:
    box = np.array([500.0, 350, 540, 390])
    points = np.array([[520.0, 370, 1], [10, 10, 1]])
    seen = group_prompts([PointPrompt(points, box)], (HEIGHT, WIDTH), TILES)
    assert (seen.windows[0, :2] <= box[:2]).all() and (box[2:] <= seen.windows[0, 2:]).all()


def test_automatic_masks_of_one_tile_are_those_of_the_image(
    picture: tuple[Path, np.ndarray, np.ndarray],
) -> None:
    path, image, _ = picture
    options: dict[str, Any] = {"points_per_side": 8, "pred_iou_thresh": 0.0}
    options |= {"stability_score_thresh": 0.0}
    predictor = AutomaticPredictor(PromptedSam(mask_finding_sam()), **options)
    whole = list(predictor.predict(predictor.prepare(image), None))
    tiled = predict(predictor, path, np.zeros((0, 4)), View("tiles", tile_size=600))
    assert len(whole) == len(tiled) > 0
    for one, other in zip(whole, tiled, strict=True):
        np.testing.assert_array_equal(paste(one), paste(other))
        assert one.iou_predicted == other.iou_predicted
        np.testing.assert_equal(one.extra_fields, other.extra_fields)
