"""Masks of overlapping tiles become one mask for each object, wherever it lies at the seams."""

from collections.abc import Iterable
from typing import Any

import cv2
import numpy as np
import pytest

from samft.annotations.segmentation import CroppedMask, decode_encoded, encode_cropped
from samft.evaluation.tiled_masks import AutomaticMask, generate_in_tiles, merge_tiles
from samft.views.regions import DecodedImage
from samft.views.windows import View, tile_windows

SIZE = (240, 300)
VIEW = View("tiles", tile_size=100, tile_overlap=0.3)
TILES = tile_windows(SIZE, VIEW)


class PerfectGenerator:
    """Stands for a generator: the connected areas that a tile shows, as it gives masks."""

    def __init__(self, score: Any = lambda mask: 0.9) -> None:
        self.score = score

    def generate(self, image: np.ndarray) -> list[dict[str, Any]]:
        count, labels = cv2.connectedComponents(image[..., 0], connectivity=4)
        return [self._entry(labels == k) for k in range(1, count)]

    def _entry(self, mask: np.ndarray) -> dict[str, Any]:
        x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
        flat = mask.T.ravel()
        ends = np.flatnonzero(np.diff(flat, prepend=False)).tolist()
        counts = np.diff([0, *ends, flat.size]).tolist()
        return {
            "segmentation": {"size": list(mask.shape), "counts": counts},
            "bbox": [x, y, width - 1, height - 1],
            "predicted_iou": self.score(mask),
            "stability_score": 0.95,
        }


def masks_of(picture: np.ndarray, **options: Any) -> list[np.ndarray]:
    generator: Any = PerfectGenerator(**options)
    source = DecodedImage(np.repeat(picture[..., None], 3, axis=2))
    return [to_canvas(one) for one in generate_in_tiles(generator, source, VIEW)]


def to_canvas(mask: AutomaticMask) -> np.ndarray:
    crop, canvas = decode_encoded(mask.rle), np.zeros(SIZE, bool)
    x0, y0, x1, y1 = crop.extent
    canvas[y0:y1, x0:x1] = crop.mask
    return canvas


def same_masks(masks: Iterable[np.ndarray], expected: Iterable[np.ndarray]) -> bool:
    return sorted(mask.tobytes() for mask in masks) == sorted(one.tobytes() for one in expected)


@pytest.mark.parametrize("top", [0, 35, 66, 90, 131])
def test_an_object_is_once_and_whole_wherever_it_is(top: int) -> None:
    for left in range(0, 270, 7):
        picture = np.zeros(SIZE, np.uint8)
        cv2.ellipse(picture, (left + 14, top + 20), (14, 20), 0, 0, 360, 255, -1)
        assert same_masks(masks_of(picture), [picture > 0]), (left, top)


@pytest.mark.parametrize("sides", [(90, 20), (20, 90), (140, 60), (250, 8), (200, 200)])
def test_an_object_that_no_tile_holds_is_joined(sides: tuple[int, int]) -> None:
    for x, y in ((3, 5), (25, 30), (41, 37)):
        picture = np.zeros(SIZE, np.uint8)
        picture[y : y + sides[1], x : x + sides[0]] = 255
        assert same_masks(masks_of(picture), [picture > 0]), (x, y)


def test_neighbours_stay_apart() -> None:
    picture = np.zeros(SIZE, np.uint8)
    for y in range(4, 230, 11):
        for x in range(3, 290, 13):
            picture[y : y + 8, x : x + 10] = 255
    count, labels = cv2.connectedComponents(picture, connectivity=4)
    assert same_masks(masks_of(picture), [labels == k for k in range(1, count)])


def test_of_two_whole_masks_of_an_object_the_surer_one_stays() -> None:
    picture = np.zeros(SIZE, np.uint8)
    picture[20:40, 76:92] = 255  # as a whole in two tiles
    scores = iter([0.8, 0.9])
    generator: Any = PerfectGenerator(score=lambda mask: next(scores))
    source = DecodedImage(np.repeat(picture[..., None], 3, axis=2))
    (only,) = generate_in_tiles(generator, source, VIEW)
    assert only.iou_predicted == 0.9 and only.box == (76, 20, 91, 39)


def test_joined_parts_are_as_sure_as_the_least_sure() -> None:
    parts = [part_at(0, 90, 0.9), part_at(75, 160, 0.7)]
    tiles = np.array([[0, 0, 90, 240], [75, 0, 160, 240]])
    (joined,) = merge_tiles(parts, np.array([0, 1]), tiles, SIZE)
    assert joined.iou_predicted == 0.7 and joined.box == (0, 50, 159, 59)
    assert to_canvas(joined)[50:60, :160].all()


def part_at(x0: int, x1: int, score: float) -> AutomaticMask:
    crop = CroppedMask(50, x0, np.ones((10, x1 - x0), bool))
    return AutomaticMask(encode_cropped(crop, SIZE), (x0, 50, x1 - 1, 59), score, 0.95)


def test_no_mask_at_all() -> None:
    assert masks_of(np.zeros(SIZE, np.uint8)) == []
