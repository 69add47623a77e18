"""Two models on the same objects: differences in closed form, intervals over images."""

from dataclasses import fields, replace

import numpy as np
import pytest

from samft.comparison import NUM_SHOWN, compare, mean_change
from samft.evaluation import EvaluatedObjects


def objects(ious: list[float], *, images: list[int] | None = None) -> EvaluatedObjects:
    count = len(ious)
    values = {field.name: np.zeros(count) for field in fields(EvaluatedObjects)}
    values["image_ids"] = np.array(images or range(count))
    values["object_ids"] = np.arange(count) + 100
    values["iou_actual"] = np.array(ious)
    return EvaluatedObjects(**values)


def test_differences_and_counts_in_closed_form() -> None:
    before = objects([0.5, 0.5, 0.5, 0.5, 0.9, 0.2])
    after = objects([0.8, 0.505, 0.5, 0.45, 0.7, 0.9])
    found = compare(before, after)
    assert found["iou"]["difference"] == pytest.approx((0.3 + 0.005 - 0.05 - 0.2 + 0.7) / 6)
    assert (found["wins"], found["losses"], found["ties"], found["lost"]) == (2, 2, 2, 1)
    assert [row["object_id"] for row in found["most_improved"]] == [105, 100, 101]
    assert [row["object_id"] for row in found["most_harmed"]] == [104, 103]
    first = found["most_harmed"][0]
    assert first == {"image_id": 4, "object_id": 104, "iou_before": 0.9, "iou_after": 0.7}
    assert found["boundary_iou"] == {"difference": 0, "interval": [0, 0]}


def test_only_so_many_are_named() -> None:
    found = compare(objects([0.1] * 30), objects([0.5] * 30))
    assert (len(found["most_improved"]), found["most_harmed"]) == (NUM_SHOWN, [])


def test_a_model_against_itself() -> None:
    one = objects([0.3, 0.6, 0.9])
    found = compare(one, one)
    assert (found["wins"], found["losses"], found["ties"]) == (0, 0, 3)
    assert found["iou"] == {"difference": 0, "interval": [0, 0]}
    assert found["most_improved"] == found["most_harmed"] == []


def test_what_is_not_in_both_is_left_out() -> None:
    before, after = objects([0.1, 0.2, 0.3]), objects([0.4, 0.5, 0.6])
    found = compare(before, after.take(np.array([0, 2])))
    assert found["iou"]["difference"] == pytest.approx(0.3)
    assert found["wins"] == 2


def test_whole_images_are_drawn() -> None:
    # Two images: a draw is one of them twice, or both; objects of one image never part.
    change, images = np.array([1.0, 1, 1, 0]), np.array([1, 1, 1, 2])
    found = mean_change(change, images, seed=0)
    assert found == {"difference": 0.75, "interval": [0.0, 1.0]}
    # As single objects the interval would be far from 0.
    alone = mean_change(change, np.arange(4), seed=0)
    assert alone["interval"] == [0.25, 1.0]


def test_the_interval_is_the_normal_one_for_many_images() -> None:
    generator = np.random.default_rng(0)
    change, images = generator.normal(0.1, 0.5, 4000), np.repeat(np.arange(2000), 2)
    low, high = mean_change(change, images, seed=0)["interval"]
    per_image = change.reshape(-1, 2).mean(1)
    error = per_image.std() / np.sqrt(2000)
    assert low == pytest.approx(change.mean() - 1.96 * error, abs=0.05 * error)
    assert high == pytest.approx(change.mean() + 1.96 * error, abs=0.05 * error)


def test_the_interval_depends_on_the_seed_alone() -> None:
    change, images = np.linspace(-1, 1, 31) ** 3, np.arange(31)
    assert mean_change(change, images, seed=3) == mean_change(change, images, seed=3)
    assert mean_change(change, images, seed=3) != mean_change(change, images, seed=4)


def test_one_image_says_nothing_about_others() -> None:
    found = mean_change(np.array([0.1, 0.3]), np.array([5, 5]), seed=0)
    assert found == {"difference": pytest.approx(0.2), "interval": None}


def test_points_and_boundaries_are_compared_too() -> None:
    before = objects([0.5, 0.5])
    after = replace(before, iou_boundary=np.array([0.2, 0.4]), iou_point=np.array([0.0, 0.5]))
    found = compare(before, after)
    assert found["boundary_iou"]["difference"] == pytest.approx(0.3)
    assert found["iou_point"]["difference"] == pytest.approx(0.25)
