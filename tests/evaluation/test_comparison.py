"""Two tables of scores: objects paired by id, groups, and the interval of the mean change."""

import numpy as np
import pytest

from samft.evaluation.object_scores import (
    ObjectScores,
    compare_objects,
    describe_against_box_fill,
    describe_share,
    mean_by_group,
    mean_by_size,
    mean_change,
)


def rows(objects: dict[tuple[int, int], tuple[float, float]]) -> ObjectScores:
    """A table of (image id, object id): (area, IoU)."""
    keys, values = list(objects), list(objects.values())
    return ObjectScores(
        image_ids=np.array([key[0] for key in keys], dtype=np.int64),
        object_ids=np.array([key[1] for key in keys], dtype=np.int64),
        areas=np.array([value[0] for value in values], dtype=float),
        iou_actual=np.array([value[1] for value in values], dtype=float),
        iou_predicted=np.full(len(keys), 0.5),
        iou_box_fill=np.full(len(keys), 0.4),
    )


def test_objects_are_paired_by_both_ids_and_the_others_left_out() -> None:
    before = rows({(1, 1): (9, 0.1), (1, 2): (9, 0.2), (2, 1): (9, 0.3), (5, 5): (9, 0.9)})
    after = rows({(2, 1): (9, 0.7), (1, 2): (9, 0.6), (1, 3): (9, 0.0), (1, 1): (9, 0.5)})
    comparison = compare_objects(before, after)
    assert comparison.before.keys().tolist() == [[1, 1], [1, 2], [2, 1]]
    assert comparison.after.keys().tolist() == comparison.before.keys().tolist()
    assert comparison.change == pytest.approx([0.4, 0.4, 0.4])
    assert (comparison.num_gained, comparison.num_lost) == (3, 0)


def test_objects_better_than_their_filled_boxes_are_counted() -> None:
    objects = rows({(1, k): (9, iou) for k, iou in enumerate((0.39, 0.4, 0.41, 0.9))})
    assert objects.num_above_box_fill == 2  # a tie is not better


@pytest.mark.parametrize(
    ("iou", "expected"),
    [
        (0.65, "0.1250 above filling each box (0.5250)"),
        (0.5, "0.0250 below filling each box (0.5250)"),
        (0.525, "just as good as filling each box (0.5250)"),
        (float("nan"), "not comparable with filling each box (0.5250)"),
    ],
)
def test_a_mean_is_described_against_filling_each_box(iou: float, expected: str) -> None:
    assert describe_against_box_fill(iou, 0.525) == expected


def test_a_share_of_the_objects_is_described_with_its_numbers() -> None:
    assert describe_share(1500, 2000) == "1,500 of 2,000 objects (75%)"
    assert describe_share(0, 0) == "0 of 0 objects (0%)"


def change_by(changes: list[float]) -> tuple[ObjectScores, ObjectScores]:
    before = {(1, k): (9.0, 0.5) for k in range(len(changes))}
    after = {(1, k): (9.0, 0.5 + change) for k, change in enumerate(changes)}
    return rows(before), rows(after)


def test_objects_that_changed_by_over_a_tenth_are_counted() -> None:
    comparison = compare_objects(*change_by([0.3, 0.11, 0.09, 0, -0.09, -0.11, -0.2, -0.3]))
    assert (comparison.num_gained, comparison.num_lost) == (2, 3)


def test_examples_are_in_one_group_each_and_have_changed() -> None:
    comparison = compare_objects(*change_by([0.3, 0.2, 0.001, 0, -0.001, -0.2, -0.3, 0.1]))
    assert {kind: which.tolist() for kind, which in comparison.choose_examples(2).items()} == {
        "improved": [0, 1],
        "harmed": [6, 5],
        "worst": [4, 3],
    }
    assert comparison.choose_examples(9)["improved"].tolist() == [0, 1, 7]
    unchanged = compare_objects(*change_by([0.0, 0.0])).choose_examples(2)
    assert [len(unchanged[kind]) for kind in ("improved", "harmed", "worst")] == [0, 0, 2]


def test_groups_are_means_over_objects() -> None:
    comparison = compare_objects(*change_by([0.1, 0.3, -0.5]))
    groups = mean_by_group(comparison, np.array([1, 1, 0]), ["cat", "dog", "none"])
    assert [(one.name, one.num_objects) for one in groups] == [("cat", 1), ("dog", 2)]
    assert [one.before for one in groups] == pytest.approx([0.5, 0.5])
    assert [one.after for one in groups] == pytest.approx([0.0, 0.7])


def test_sizes_are_of_the_root_of_the_area() -> None:
    areas = [63, 64, 32**2 - 1, 32**2, 96**2, 600**2]
    table = rows({(1, k): (area, 0.5) for k, area in enumerate(areas)})
    names = [(one.name, one.num_objects) for one in mean_by_size(compare_objects(table, table))]
    assert names == [
        ("under 8 px", 1),
        ("8 to 16 px", 1),
        ("24 to 32 px", 1),
        ("32 to 48 px", 1),
        ("96 to 128 px", 1),
        ("over 512 px", 1),
    ]


def test_without_objects_there_is_nothing_to_compare() -> None:
    comparison = compare_objects(rows({}), rows({(1, 1): (9, 0.5)}))
    assert len(comparison.before) == len(comparison.after) == comparison.num_lost == 0
    assert mean_by_size(comparison) == []


def test_the_bootstrap_resamples_whole_images() -> None:
    # Two images: a draw is one of them twice, or both; objects of one image never part.
    change, images = np.array([1.0, 1, 1, 0]), np.array([1, 1, 1, 2])
    result = mean_change(change, images, seed=0)
    assert result == {"difference": 0.75, "interval": [0.0, 1.0]}
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


def test_a_single_image_has_no_interval() -> None:
    result = mean_change(np.array([0.1, 0.3]), np.array([5, 5]), seed=0)
    assert result == {"difference": pytest.approx(0.2), "interval": None}
