"""Charts as SVG text, in the colours of the page that they stand in. Imports no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 440, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 12, 40
_MAX_POINTS = 500  # of a cloud: more would only be darker, and weigh


@dataclass(frozen=True)
class ChartLine:
    """A line of a chart: its name, its style's class in the page, and its points."""

    name: str
    style: str
    points: Sequence[tuple[float, float]]


def tick_values(low: float, high: float, *, num: int = 5) -> list[float]:
    """Round numbers that span a range: steps of 1, 2 or 5 times a power of ten.

    Args:
        low: The least value.
        high: The greatest.
        num: About how many.
    """
    if not high > low:
        low, high = low - 0.5, low + 0.5
    rough = (high - low) / num
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * one for one in (1, 2, 5, 10) if power * one >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


class _Plot:
    # Maps values to places, and draws the axes.
    def __init__(self, xs: list[float], ys: list[float], *, labels: tuple[str, str]) -> None:
        self.x_ticks, self.y_ticks, self.labels = xs, ys, labels

    def x(self, value: float) -> float:
        low, high = self.x_ticks[0], self.x_ticks[-1]
        return round(_LEFT + (value - low) / (high - low) * (WIDTH - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return round(HEIGHT - _BOTTOM - (value - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM), 1)

    def path(self, points: Sequence[tuple[float, float]], style: str) -> str:
        places = " ".join(f"{self.x(x)},{self.y(y)}" for x, y in points)
        return f'<polyline class="{style}" points="{places}"/>'

    def dots(self, points: Sequence[tuple[float, float]], style: str, radius: float) -> str:
        return "".join(
            f'<circle class="{style}" cx="{self.x(x)}" cy="{self.y(y)}" r="{radius}"/>'
            for x, y in points
        )

    def draw(self, content: str, *, title: str) -> str:
        """The whole chart as SVG, `content` being what `path` and `dots` have drawn."""
        low, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
        parts = [
            f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{self.y(v)}" y2="{self.y(v)}"/>'
            f'<text x="{_LEFT - 6}" y="{self.y(v) + 4}" text-anchor="end">{label}</text>'
            for v, label in zip(self.y_ticks, _numbers(self.y_ticks), strict=True)
        ]
        parts += [
            f'<text x="{self.x(v)}" y="{low + 16}" text-anchor="middle">{label}</text>'
            for v, label in zip(self.x_ticks, _numbers(self.x_ticks), strict=True)
        ]
        x_label, y_label = map(escape, self.labels)
        middle = (_LEFT + right) / 2
        parts.append(
            f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{x_label}</text>'
            f'<text transform="translate(11 {(_TOP + low) / 2}) rotate(-90)" '
            f'text-anchor="middle">{y_label}</text>'
        )
        return (
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
            f"{''.join(parts)}{content}</svg>"
        )


def _numbers(values: Sequence[float]) -> list[str]:
    largest = max(map(abs, values))
    if largest >= 1e10:
        return [f"{value:.0e}" for value in values]
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if largest >= 10 * size:
            return [f"{value / size:g}{unit}" if value else "0" for value in values]
    return [f"{value:g}" for value in values]


def line_chart(lines: Sequence[ChartLine], *, title: str, labels: tuple[str, str]) -> str:
    """Lines over a common axis; points that are not finite are left out.

    Args:
        lines: With at least one finite point between them, or the chart is empty.
        title: For those who cannot see it.
        labels: Of the axes, across and up.
    """
    finite = [
        ChartLine(one.name, one.style, [p for p in one.points if all(map(math.isfinite, p))])
        for one in lines
    ]
    xs, ys = ([p[axis] for one in finite for p in one.points] or [0.0] for axis in (0, 1))
    plot = _Plot(tick_values(min(xs), max(xs)), tick_values(min(ys), max(ys)), labels=labels)
    drawn = "".join(
        plot.path(one.points, f"line {one.style}")
        if len(one.points) > 1
        else plot.dots(one.points, f"dot {one.style}", 3)
        for one in finite
    )
    return plot.draw(drawn, title=title)


def _unit_plot(labels: tuple[str, str]) -> _Plot:
    unit = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    return _Plot(unit, unit, labels=labels)


def _cloud(xs: NDArray[np.float64], ys: NDArray[np.float64]) -> list[tuple[float, float]]:
    some = np.random.default_rng(0).permutation(len(xs))[:_MAX_POINTS]
    inside = np.clip(np.nan_to_num(np.stack([xs, ys], axis=1)[np.sort(some)]), 0, 1)
    return [(x, y) for x, y in inside.tolist()]


def change_chart(before: NDArray[np.float64], after: NDArray[np.float64]) -> str:
    """Each object's IoU, before across and after up: what lies above the diagonal gained.

    Args:
        before: float64 [K].
        after: float64 [K].
    """
    plot = _unit_plot(("IoU before", "IoU after"))
    bands = [([(0.1, 0), (1, 0.9)], "faint"), ([(0, 0.1), (0.9, 1)], "faint")]
    lines = "".join(plot.path(points, f"line {style}") for points, style in bands)
    diagonal = plot.path([(0, 0), (1, 1)], "line reference")
    dots = plot.dots(_cloud(before, after), "point", 2.6)
    return plot.draw(lines + diagonal + dots, title="IoU of each object before and after")


def calibration_chart(
    before: tuple[NDArray[np.float64], NDArray[np.float64]],
    after: tuple[NDArray[np.float64], NDArray[np.float64]],
) -> str:
    """How the predicted IoU, across, goes with the actual one, up.

    Args:
        before: Predicted and actual IoU, float64 [K] each.
        after: The same, of the better model.
    """
    plot = _unit_plot(("IoU that the model predicts", "actual IoU"))
    parts = [plot.dots(_cloud(*after), "point", 2)]
    parts.append(plot.path([(0, 0), (1, 1)], "line reference"))
    for (predicted, actual), style in ((before, "before"), (after, "after")):
        means = bin_means(predicted, actual)
        parts += [plot.path(means, f"line {style}"), plot.dots(means, f"dot {style}", 3)]
    return plot.draw("".join(parts), title="predicted and actual IoU")


def bin_means(
    predicted: NDArray[np.float64], actual: NDArray[np.float64], *, num: int = 10
) -> list[tuple[float, float]]:
    """The mean of the actual IoU, and of the predicted, in each tenth of the predicted.

    Args:
        predicted: float64 [K].
        actual: float64 [K].
        num: Bins from 0 to 1; those without a mask are left out.
    """
    inside = np.clip(np.nan_to_num(predicted), 0, 1)
    bins = np.minimum((inside * num).astype(int), num - 1)
    counts = np.bincount(bins, minlength=num)
    sums = [np.bincount(bins, weights=values, minlength=num) for values in (inside, actual)]
    kept = np.flatnonzero(counts)
    return [(float(sums[0][i] / counts[i]), float(sums[1][i] / counts[i])) for i in kept]


def dumbbell_chart(before: float, after: float) -> str:
    """A line from one score to another, on a scale from 0 to 1 as wide as it is given room."""
    at = [f"{min(max(value, 0), 1) * 96 + 2:.1f}%" for value in (before, after)]
    style = "after" if after >= before else "worse"
    return (
        '<svg class="dumbbell" role="img" '
        f'aria-label="from {before:.3f} to {after:.3f}">'
        '<line class="grid" x1="2%" x2="98%" y1="50%" y2="50%"/>'
        f'<line class="line {style}" x1="{at[0]}" x2="{at[1]}" y1="50%" y2="50%"/>'
        f'<circle class="dot before" cx="{at[0]}" cy="50%" r="4"/>'
        f'<circle class="dot {style}" cx="{at[1]}" cy="50%" r="5"/></svg>'
    )
