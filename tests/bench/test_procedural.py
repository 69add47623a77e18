"""The procedural scenes: a pure function of the seed, with exact masks and boxes."""

import numpy as np
import pytest

from benchmarks.procedural import MIN_VISIBLE_PIXELS, Scene, make_scene

SEEDS = range(24)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [make_scene(seed, size=128) for seed in SEEDS]


def test_a_scene_is_a_function_of_the_seed(scenes: list[Scene]) -> None:
    for seed in (0, 7, 23):
        again = make_scene(seed, size=128)
        np.testing.assert_array_equal(again.image, scenes[seed].image)
        np.testing.assert_array_equal(again.masks, scenes[seed].masks)
        np.testing.assert_array_equal(again.boxes, scenes[seed].boxes)


def test_other_seeds_give_other_scenes(scenes: list[Scene]) -> None:
    assert len({scene.image.tobytes() for scene in scenes}) == len(scenes)


@pytest.mark.parametrize("size", [96, 128, 256])
def test_shapes_and_types(size: int) -> None:
    scene = make_scene(3, size=size, max_objects=5)
    count = len(scene.masks)
    assert 1 <= count <= 5
    assert scene.image.shape == (size, size, 3) and scene.image.dtype == np.uint8
    assert scene.masks.shape == (count, size, size) and scene.masks.dtype == np.uint8
    assert scene.boxes.shape == (count, 4) and scene.boxes.dtype == np.float32


def test_masks_are_binary_disjoint_and_large_enough(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert set(np.unique(scene.masks)) == {0, 1}
        assert scene.masks.sum(0).max() == 1
        assert scene.masks.sum((1, 2)).min() >= MIN_VISIBLE_PIXELS / 4  # a quarter of the area


def test_boxes_are_tight(scenes: list[Scene]) -> None:
    for scene in scenes:
        for mask, box in zip(scene.masks, scene.boxes, strict=True):
            rows, columns = np.nonzero(mask)
            tight = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            np.testing.assert_array_equal(box, tight)


def test_the_number_of_objects_is_limited() -> None:
    counts = [len(make_scene(seed, size=96, max_objects=3).masks) for seed in SEEDS]
    assert min(counts) >= 1 and max(counts) == 3


def test_objects_differ_from_the_background(scenes: list[Scene]) -> None:
    """Some scenes are dim and noisy, but objects mostly differ from the background in colour."""
    differences = []
    for scene in scenes:
        covered = scene.masks.sum(0) > 0
        ground = scene.image[~covered].mean(0)
        for mask in scene.masks:
            differences.append(np.abs(scene.image[mask > 0].mean(0) - ground).max())
    assert np.median(differences) > 20
    assert np.mean(np.array(differences) > 5) > 0.9


def test_filling_the_boxes_is_a_poor_prediction() -> None:
    """Scenes teach outlines only if boxes also contain much background."""
    fills: list[float] = []
    for seed in range(100, 180):
        scene = make_scene(seed, size=128)
        sides = scene.boxes[:, 2:] - scene.boxes[:, :2]
        fills += (scene.masks.sum((1, 2)) / sides.prod(1)).tolist()
    assert 0.48 < np.mean(fills) < 0.64
