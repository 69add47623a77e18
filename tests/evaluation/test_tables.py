"""The summary of an evaluation and of a comparison, in closed form."""

from dataclasses import fields, replace

import numpy as np
import pytest

from helpers.score_rows import rows_of
from samft.evaluation.evaluator import EvaluatedObjects
from samft.evaluation.tables import (
    NUM_SHOWN,
    calibration,
    summarise_comparison,
    summarise_scores,
    summary_statistics,
)


def rows(**columns: list[float]) -> EvaluatedObjects:
    count = len(next(iter(columns.values())))
    values = {field.name: np.zeros(count) for field in fields(EvaluatedObjects)}
    values |= {name: np.array(column) for name, column in columns.items()}
    return EvaluatedObjects(**values)


def test_sizes_classes_and_prompts() -> None:
    objects = rows(
        image_ids=[1, 1, 2, 2, 2],
        areas=[1023, 1024, 9215, 9216, 5],
        iou_actual=[0.2, 0.4, 0.6, 0.8, 1.0],
        iou_boundary=[0.1, 0.1, 0.3, 0.5, 1.0],
        iou_jitter_10=[0.1, 0.2, 0.3, 0.4, 0.5],
        iou_point=[0.0, 0.0, 1.0, 1.0, 0.5],
        iou_box_fill=[0.5] * 5,
    )
    summary = summarise_scores(
        objects, np.array([3, 7, 7, 3, 3]), names={3: "cat", 5: "none", 7: "dog"}
    )
    assert next(iter(summary)) == "per_mask_iou"
    assert summary["per_mask_iou"] == summary["iou"]["mean"] == pytest.approx(0.6)
    assert (summary["images"], summary["masks"], summary["box_fill_iou"]) == (2, 5, 0.5)
    assert summary["masks_above_box_fill"] == 3
    assert summary["dice"]["mean"] == pytest.approx(
        np.mean([2 * i / (1 + i) for i in (0.2, 0.4, 0.6, 0.8, 1)])
    )
    assert summary["boundary_iou"]["mean"] == pytest.approx(0.4)
    sizes = summary["by_size"]
    assert {name: row["masks"] for name, row in sizes.items()} == {
        "small": 2,
        "medium": 2,
        "large": 1,
    }
    assert sizes["small"]["iou"] == pytest.approx(0.6)
    assert sizes["medium"]["iou"] == pytest.approx(0.5)
    assert sizes["large"]["iou"] == pytest.approx(0.8)
    cat, dog = summary["by_category"]
    assert (cat["id"], cat["name"], cat["masks"]) == (3, "cat", 3)
    assert cat["iou"] == pytest.approx(2 / 3)
    assert (dog["name"], dog["iou"], dog["boundary_iou"]) == (
        "dog",
        pytest.approx(0.5),
        pytest.approx(0.2),
    )
    prompts = summary["by_prompt"]
    assert list(prompts) == [
        *("box", "jitter_5", "jitter_10", "jitter_20", "point", "point_multimask")
    ]
    assert prompts["box"] == summary["iou"]
    assert (prompts["jitter_10"]["mean"], prompts["point"]["mean"]) == pytest.approx((0.3, 0.5))


def test_a_size_without_objects_has_no_mean() -> None:
    summary = summarise_scores(rows(areas=[10.0], iou_actual=[0.5]), np.array([1]), names={1: "a"})
    assert summary["by_size"]["large"] == {
        "masks": 0,
        "iou": None,
        "dice": None,
        "boundary_iou": None,
        "iou_point": None,
    }


def test_summary_statistics() -> None:
    assert summary_statistics(np.arange(11.0)) == {"mean": 5, "median": 5, "percentile_10": 1}


def test_calibration_in_closed_form() -> None:
    predicted = np.array([0.05, 0.91, 0.93, 0.99, 1.04, -0.02])
    actual = np.array([0.15, 0.90, 0.70, 0.99, 0.94, 0.10])
    result = calibration(predicted, actual)
    low, high = result["bins"]
    assert (low["from"], low["to"], low["masks"]) == (0.0, 0.1, 2)
    assert (high["from"], high["to"], high["masks"]) == (0.9, 1.0, 4)
    assert (low["predicted"], low["actual"]) == pytest.approx((0.015, 0.125))
    assert (high["predicted"], high["actual"]) == pytest.approx((0.9675, 0.8825))
    expected = (2 * 0.11 + 4 * 0.085) / 6
    assert result["expected_calibration_error"] == pytest.approx(expected)
    assert result["bias"] == pytest.approx((predicted - actual).mean())
    assert result["correlation"] == pytest.approx(np.corrcoef(predicted, actual)[0, 1])


def test_perfect_and_constant_predictions() -> None:
    actual = np.array([0.1, 0.5, 0.9, 1.0])
    perfect = calibration(actual, actual)
    assert perfect["expected_calibration_error"] == 0
    assert perfect["correlation"] == pytest.approx(1)
    constant = calibration(np.full(4, 0.5), actual)
    assert constant["correlation"] is None
    assert constant["expected_calibration_error"] == pytest.approx(0.125)


# Two models


def test_differences_and_counts_in_closed_form() -> None:
    before = rows_of([0.5, 0.5, 0.5, 0.5, 0.9, 0.2])
    after = rows_of([0.8, 0.504, 0.5, 0.45, 0.7, 0.9])
    comparison = summarise_comparison(before, after)
    assert comparison["iou"]["difference"] == pytest.approx((0.3 + 0.004 - 0.05 - 0.2 + 0.7) / 6)
    assert (comparison["wins"], comparison["losses"], comparison["ties"], comparison["lost"]) == (
        2,
        2,
        2,
        1,
    )
    assert [row["object_id"] for row in comparison["most_improved"]] == [105, 100]
    assert [row["object_id"] for row in comparison["most_harmed"]] == [104, 103]
    first = comparison["most_harmed"][0]
    assert first == {"image_id": 4, "object_id": 104, "iou_before": 0.9, "iou_after": 0.7}
    assert comparison["boundary_iou"] == {"difference": 0, "interval": [0, 0]}


def test_the_number_of_named_objects_is_limited() -> None:
    comparison = summarise_comparison(rows_of([0.1] * 30), rows_of([0.5] * 30))
    assert (len(comparison["most_improved"]), comparison["most_harmed"]) == (NUM_SHOWN, [])


def test_a_model_against_itself() -> None:
    one = rows_of([0.3, 0.6, 0.9])
    comparison = summarise_comparison(one, one)
    assert (comparison["wins"], comparison["losses"], comparison["ties"]) == (0, 0, 3)
    assert comparison["iou"] == {"difference": 0, "interval": [0, 0]}
    assert comparison["most_improved"] == comparison["most_harmed"] == []


def test_objects_in_only_one_table_are_left_out() -> None:
    before, after = rows_of([0.1, 0.2, 0.3]), rows_of([0.4, 0.5, 0.6])
    comparison = summarise_comparison(before, after.take(np.array([0, 2])))
    assert comparison["iou"]["difference"] == pytest.approx(0.3)
    assert comparison["wins"] == 2


def test_points_and_boundaries_are_compared_too() -> None:
    before = rows_of([0.5, 0.5])
    after = replace(before, iou_boundary=np.array([0.2, 0.4]), iou_point=np.array([0.0, 0.5]))
    comparison = summarise_comparison(before, after)
    assert comparison["boundary_iou"]["difference"] == pytest.approx(0.3)
    assert comparison["iou_point"]["difference"] == pytest.approx(0.25)
