"""Click curves summed up: means, clicks needed, paired changes, rows of tables and of CSV files."""

import numpy as np
import pytest

from helpers.score_rows import rows_of
from samft.evaluation.click_curves import (
    STARTS,
    click_changes,
    click_rows,
    compare_clicks,
    has_clicks,
    summarise_clicks,
)
from samft.evaluation.object_scores import mean_change
from samft.evaluation.tables import summarise_comparison, summarise_scores

BEFORE = {
    "box": [[0.5, 0.86, 0.95], [0.9, 0.91, 0.92], [0.1, 0.2, 0.3]],
    "point": [[0.4, 0.8], [0.88, 0.95], [0.1, 0.2]],
}
AFTER = {
    "box": [[0.6, 0.96, 0.97], [0.9, 0.91, 0.92], [0.4, 0.86, 0.3]],
    "point": [[0.5, 0.9], [0.88, 0.95], [0.3, 0.2]],
}
IMAGES = [1, 2, 3]


def objects(clicks: dict[str, list[list[float]]]):
    return rows_of([0.5, 0.9, 0.1], images=IMAGES, clicks=clicks)


def test_means_and_clicks_needed() -> None:
    curves = summarise_clicks(objects(BEFORE), seed=0)
    box, point = curves["box"], curves["point"]
    assert (box["clicks"], point["clicks"]) == ([0, 1, 2], [1, 2])
    assert box["iou"] == pytest.approx([0.5, 1.97 / 3, 2.17 / 3])
    assert box["boundary_iou"] == pytest.approx([0.25, 1.97 / 6, 2.17 / 6])
    assert point["iou"] == pytest.approx([1.38 / 3, 1.95 / 3])
    # 1, 0 and never, which counts as 2; then 2, 0 and never.
    assert (box["noc_85"], box["noc_90"]) == (pytest.approx(1), pytest.approx(4 / 3))
    assert (box["never_85"], box["never_90"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    # Never, 1 and never; never, 2 and never.
    assert (point["noc_85"], point["noc_90"]) == (pytest.approx(5 / 3), pytest.approx(2))
    assert (point["never_85"], point["never_90"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    low, high = box["iou_interval"][0]
    assert 0.1 <= low < 0.5 < high <= 0.9


def test_a_single_image_has_no_interval() -> None:
    one = rows_of([0.5], clicks={"box": [[0.5, 0.6]], "point": [[0.6]]})
    curves = summarise_clicks(one, seed=0)
    assert curves["box"]["iou_interval"] == [None, None]
    assert curves["point"]["iou_interval"] == [None]


def test_changes_are_paired_by_object() -> None:
    changes = compare_clicks(objects(BEFORE), objects(AFTER), seed=3)
    differences = np.array(AFTER["box"]) - np.array(BEFORE["box"])
    for number, change in enumerate(changes["box"]["iou"]):
        assert change == mean_change(differences[:, number], np.array(IMAGES), seed=3)
    half = changes["point"]["boundary_iou"][1]["difference"]
    assert half == pytest.approx(changes["point"]["iou"][1]["difference"] / 2)
    # Only the third object, which never got there, needs fewer clicks: 1 for 2.
    assert changes["box"]["noc_85"]["difference"] == pytest.approx(-1 / 3)
    assert changes["box"]["noc_90"]["difference"] == pytest.approx(-1 / 3)  # the first: 1 for 2
    assert changes["point"]["clicks"] == [1, 2]


def test_both_are_in_the_summaries_where_there_were_clicks() -> None:
    before, after = objects(BEFORE), objects(AFTER)
    without = rows_of([0.5, 0.9, 0.1], images=IMAGES)
    names = {0: "thing"}
    summary = summarise_scores(before, np.zeros(3, int), names=names, seed=1)
    assert summary["clicks"] == summarise_clicks(before, seed=1)
    assert not has_clicks(without)
    assert "clicks" not in summarise_scores(without, np.zeros(3, int), names=names)
    compared = summarise_comparison(before, after, seed=1)
    assert compared["clicks"] == compare_clicks(before, after, seed=1)
    assert "clicks" not in summarise_comparison(without, after)


def test_rows_of_the_terminal() -> None:
    evaluations = [{"clicks": summarise_clicks(objects(c), seed=0)} for c in (BEFORE, AFTER)]
    rows = dict(click_rows(evaluations))
    assert rows["IoU by clicks, from a box"] is None
    assert rows["  a box alone"] == pytest.approx([0.5, 1.9 / 3])
    assert rows["  2 clicks"] == pytest.approx([1.95 / 3, 2.05 / 3])  # the point's come last
    labels = [label for label, _ in click_rows(evaluations)]
    assert labels[:8] == [
        *("IoU by clicks, from a box", "  a box alone", "  1 click", "  2 clicks"),
        *("  clicks to IoU .85", "  objects never at .85"),
        *("  clicks to IoU .90", "  objects never at .90"),
    ]
    changes = dict(click_changes(compare_clicks(objects(BEFORE), objects(AFTER), seed=0)))
    assert list(changes) == ["IoU, box, 2 clicks", "IoU, 2 clicks"]
    assert changes["IoU, 2 clicks"]["difference"] == pytest.approx(0.1 / 3)


def test_columns_of_the_csv_file() -> None:
    columns = {name: cells for s in STARTS for name, cells in s.columns(objects(BEFORE)).items()}
    assert columns["iou_box_clicks_0"] == [0.5, 0.9, 0.1]
    assert columns["iou_point_clicks_2"] == [0.8, 0.95, 0.2]
    assert columns["iou_boundary_point_clicks_1"] == [0.2, 0.44, 0.05]
    assert columns["noc_85_box"] == [1, 0, ""]  # empty where an object never gets there
    assert columns["noc_90_point"] == ["", 2, ""]
    assert len(columns) == 2 * 3 + 2 * 2 + 4
