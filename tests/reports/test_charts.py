"""Charts: coordinates, labels, and well-formed SVG."""

import math
from xml.etree import ElementTree

import numpy as np
import pytest

from samft.reports.charts import (
    HEIGHT,
    WIDTH,
    ChartLine,
    bin_means,
    calibration_chart,
    change_chart,
    dumbbell_chart,
    line_chart,
    tick_values,
)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.41, 0.78, [0.4, 0.5, 0.6, 0.7, 0.8]),
        (0, 200, [0, 50, 100, 150, 200]),
        (-3, 7, [-4, -2, 0, 2, 4, 6, 8]),
        (5, 5, [4.4, 4.6, 4.8, 5, 5.2, 5.4, 5.6]),
        (0, 8.1e6, [0, 2e6, 4e6, 6e6, 8e6, 1e7]),
    ],
)
def test_ticks_are_round_and_span_the_range(low: float, high: float, expected: list[float]) -> None:
    ticks = tick_values(low, high)
    assert ticks[0] <= low and ticks[-1] >= high
    if low != high:
        assert ticks == pytest.approx(expected)


def test_a_line_is_drawn_at_its_values() -> None:
    lines = [ChartLine("a", "after", [(0, 0.0), (10, 1.0), (5, math.nan)])]
    root = ElementTree.fromstring(line_chart(lines, title="a < b", labels=("step", "")))
    (drawn,) = root.iter("polyline")
    start, end = (tuple(map(float, p.split(","))) for p in drawn.attrib["points"].split())
    assert root.attrib["aria-label"] == "a < b"
    assert 0 < start[0] < end[0] < WIDTH and 0 < end[1] < start[1] < HEIGHT
    labels = {text.text: text.attrib for text in root.iter("text") if "x" in text.attrib}
    assert float(labels["10"]["x"]) == end[0]
    assert float(labels["0.8"]["y"]) - 4 == pytest.approx(end[1] + (start[1] - end[1]) / 5, abs=0.1)


@pytest.mark.parametrize(
    ("highest", "labels"),
    [
        (8.1e6, ["0", "2M", "4M", "6M", "8M", "10M"]),
        (20_000, ["0", "5k", "10k", "15k", "20k"]),
        (1e12, ["0e+00", "2e+11", "4e+11", "6e+11", "8e+11", "1e+12"]),
    ],
)
def test_large_numbers_have_one_unit(highest: float, labels: list[str]) -> None:
    chart = line_chart([ChartLine("a", "after", [(0, 0), (1, highest)])], title="", labels=("", ""))
    shown = [text.text for text in ElementTree.fromstring(chart).iter("text")]
    assert shown[: len(labels)] == labels


@pytest.mark.parametrize("points", [[], [(0, math.nan)], [(3, 0.5)], [(0, 1e9), (1, -1e9)]])
def test_odd_lines_still_make_a_chart(points: list[tuple[float, float]]) -> None:
    root = ElementTree.fromstring(
        line_chart([ChartLine("a", "after", points)], title="", labels=("", ""))
    )
    assert "nan" not in ElementTree.tostring(root, encoding="unicode")
    assert len(list(root.iter("circle"))) == (points == [(3, 0.5)])


def test_bins_hold_means_of_clipped_predictions() -> None:
    predicted = np.array([0.02, 0.08, 0.55, 1.0, 1.3, -0.2, np.nan])
    actual = np.array([0.1, 0.3, 0.5, 0.9, 0.7, 0.0, 0.2])
    assert bin_means(predicted, actual) == [
        pytest.approx((0.025, 0.15)),
        pytest.approx((0.55, 0.5)),
        pytest.approx((1.0, 0.8)),
    ]
    assert bin_means(predicted[:0], actual[:0]) == []


def test_scatter_plots_show_each_object_up_to_a_limit() -> None:
    for number, expected in ((0, 0), (40, 40), (5000, 500)):
        values = np.linspace(0, 1, number)
        assert change_chart(values, values).count('class="point"') == expected
        chart = calibration_chart((values, values), (values, values))
        ElementTree.fromstring(chart)
        assert chart.count('class="point"') == expected


def test_a_dumbbell_shows_the_direction_of_the_change() -> None:
    up, down = dumbbell_chart(0.25, 0.75), dumbbell_chart(0.75, 0.25)
    assert 'cx="26.0%"' in up and 'cx="74.0%"' in up
    assert "worse" in down and "worse" not in up
    ElementTree.fromstring(up)
