"""Charts as SVG text; their colours are classes in report.css. Imports no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 440, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 12, 40  # margins around the plot, for labels
_MAX_POINTS = 500  # of a scatter plot: more would only make it darker, and the file larger


@dataclass(frozen=True)
class ChartLine:
    """A line of a chart."""

    name: str
    style: str  # class in report.css
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float]] = ()  # of each point the lowest and highest y; or none


def tick_values(low: float, high: float, *, num: int = 5) -> list[float]:
    """Round numbers that span a range, in steps of 1, 2 or 5 times a power of ten.

    Args:
        low: The least value.
        high: The greatest.
        num: About how many steps.
    """
    if not high > low:
        low, high = low - 0.5, low + 0.5
    least_step = (high - low) / num
    power = 10.0 ** math.floor(math.log10(least_step))
    # A little less will do: rounding must not turn a step of exactly 1, 2 or 5 into the next one.
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= least_step * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


class _Plot:
    """The axes of a chart, and the mapping of values to SVG coordinates."""

    def __init__(
        self, x_ticks: list[float], y_ticks: list[float], *, labels: tuple[str, str]
    ) -> None:
        self.x_ticks, self.y_ticks, self.labels = x_ticks, y_ticks, labels

    def x(self, value: float) -> float:
        low, high = self.x_ticks[0], self.x_ticks[-1]
        return round(_LEFT + (value - low) / (high - low) * (WIDTH - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return round(HEIGHT - _BOTTOM - (value - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM), 1)

    def polyline(self, points: Sequence[tuple[float, float]], style: str) -> str:
        coordinates = " ".join(f"{self.x(x)},{self.y(y)}" for x, y in points)
        return f'<polyline class="{style}" points="{coordinates}"/>'

    def band(self, line: ChartLine) -> str:
        xs = [x for x, _ in line.points]
        edges = [*zip(xs, (low for low, _ in line.band), strict=True)]
        edges += [*zip(xs, (high for _, high in line.band), strict=True)][::-1]
        coordinates = " ".join(f"{self.x(x)},{self.y(y)}" for x, y in edges)
        return f'<polygon class="band {line.style}" points="{coordinates}"/>'

    def circles(self, points: Sequence[tuple[float, float]], style: str, *, radius: float) -> str:
        return "".join(
            f'<circle class="{style}" cx="{self.x(x)}" cy="{self.y(y)}" r="{radius}"/>'
            for x, y in points
        )

    def to_svg(self, content: str, *, title: str) -> str:
        """The chart: axes and labels, with `content` drawn by `polyline` and `circles`."""
        low, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
        parts = [
            f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{self.y(v)}" y2="{self.y(v)}"/>'
            f'<text x="{_LEFT - 6}" y="{self.y(v) + 4}" text-anchor="end">{label}</text>'
            for v, label in zip(self.y_ticks, _tick_labels(self.y_ticks), strict=True)
        ]
        parts += [
            f'<text x="{self.x(v)}" y="{low + 16}" text-anchor="middle">{label}</text>'
            for v, label in zip(self.x_ticks, _tick_labels(self.x_ticks), strict=True)
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


def _tick_labels(values: Sequence[float]) -> list[str]:
    # All in one unit, or the steps between them could not be compared.
    largest = max(map(abs, values))
    if largest >= 1e10:
        return [f"{value:.0e}" for value in values]
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if largest >= 10 * size:
            return [f"{value / size:g}{unit}" if value else "0" for value in values]
    return [f"{value:g}" for value in values]


def line_chart(lines: Sequence[ChartLine], *, title: str, labels: tuple[str, str]) -> str:
    """Draws lines on common axes; points that are not finite are left out.

    Args:
        lines: A line of a single point is drawn as a dot; without any, the chart is empty.
        title: Read aloud by a screen reader.
        labels: Of the x and the y axis.
    """
    lines = [
        ChartLine(line.name, line.style, [p for p in line.points if all(map(math.isfinite, p))])
        for line in lines
    ]
    xs, ys = ([p[axis] for line in lines for p in line.points] or [0.0] for axis in (0, 1))
    plot = _Plot(tick_values(min(xs), max(xs)), tick_values(min(ys), max(ys)), labels=labels)
    content = "".join(
        plot.polyline(line.points, f"line {line.style}")
        if len(line.points) > 1
        else plot.circles(line.points, f"dot {line.style}", radius=3)
        for line in lines
    )
    return plot.to_svg(content, title=title)


def click_chart(curves: Sequence[ChartLine]) -> str:
    """Draws the mean IoU against the number of clicks, of several models, with their intervals.

    Args:
        curves: At least one, of at least one point each.
    """
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for y in [*(y for _, y in curve.points), *sum(curve.band, ())]]
    whole = [float(x) for x in range(int(min(xs)), int(max(xs)) + 1)]
    steps = whole if 2 <= len(whole) <= 12 else tick_values(min(xs), max(xs))
    # Of at least 0.2, so that noise does not fill the chart.
    ticks = tick_values(min(ys), max(*ys, min(ys) + 0.2))
    plot = _Plot(steps, ticks, labels=("clicks", "mean IoU"))
    parts = [plot.band(curve) for curve in curves if curve.band]
    for curve in curves:
        parts.append(plot.polyline(curve.points, f"line {curve.style}"))
        parts.append(plot.circles(curve.points, f"dot {curve.style}", radius=3))
    return plot.to_svg("".join(parts), title="IoU by number of clicks")


def _unit_square_plot(labels: tuple[str, str]) -> _Plot:
    ticks = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    return _Plot(ticks, ticks, labels=labels)


def _scatter_points(xs: NDArray[np.float64], ys: NDArray[np.float64]) -> list[tuple[float, float]]:
    # At most _MAX_POINTS of them, the same ones each time, clipped to 0..1.
    chosen = np.random.default_rng(0).permutation(len(xs))[:_MAX_POINTS]
    points = np.stack([xs, ys], axis=1)[np.sort(chosen)]
    return [(x, y) for x, y in np.clip(np.nan_to_num(points), 0, 1).tolist()]


def change_chart(before: NDArray[np.float64], after: NDArray[np.float64]) -> str:
    """Each object's IoU before (x) and after (y): those above the diagonal gained.

    Args:
        before: float64 [K].
        after: float64 [K].
    """
    plot = _unit_square_plot(("IoU before", "IoU after"))
    tenth_lost, tenth_gained = [(0.1, 0), (1, 0.9)], [(0, 0.1), (0.9, 1)]
    lines = "".join(plot.polyline(points, "line faint") for points in (tenth_lost, tenth_gained))
    diagonal = plot.polyline([(0, 0), (1, 1)], "line reference")
    dots = plot.circles(_scatter_points(before, after), "point", radius=2.6)
    return plot.to_svg(lines + diagonal + dots, title="IoU of each object before and after")


def calibration_chart(
    before: tuple[NDArray[np.float64], NDArray[np.float64]],
    after: tuple[NDArray[np.float64], NDArray[np.float64]],
) -> str:
    """Predicted IoU (x) against the actual one (y), of two models.

    The dots are single objects of the second model; the lines join the means of bins.

    Args:
        before: Predicted and actual IoU of the first model, float64 [K] each.
        after: The same of the second model.
    """
    plot = _unit_square_plot(("IoU that the model predicts", "actual IoU"))
    parts = [plot.circles(_scatter_points(*after), "point", radius=2)]
    parts.append(plot.polyline([(0, 0), (1, 1)], "line reference"))
    for (predicted, actual), style in ((before, "before"), (after, "after")):
        means = bin_means(predicted, actual)
        parts.append(plot.polyline(means, f"line {style}"))
        parts.append(plot.circles(means, f"dot {style}", radius=3))
    return plot.to_svg("".join(parts), title="predicted and actual IoU")


def bin_means(
    predicted: NDArray[np.float64], actual: NDArray[np.float64]
) -> list[tuple[float, float]]:
    """Mean predicted and mean actual IoU of the masks in each tenth of the predicted one.

    Args:
        predicted: float64 [K]; clipped to 0..1.
        actual: float64 [K].

    Returns:
        The means, by predicted IoU; tenths without a mask are left out.
    """
    clipped = np.clip(np.nan_to_num(predicted), 0, 1)
    bins = np.minimum((clipped * 10).astype(int), 9)
    counts = np.bincount(bins, minlength=10)
    sums = [np.bincount(bins, weights=values, minlength=10) for values in (clipped, actual)]
    return [
        (float(sums[0][i] / counts[i]), float(sums[1][i] / counts[i]))
        for i in np.flatnonzero(counts)
    ]


def dumbbell_chart(before: float, after: float) -> str:
    """A line from one score to another on a scale from 0 to 1, as wide as its place in the page."""
    at = [f"{min(max(score, 0), 1) * 96 + 2:.1f}%" for score in (before, after)]
    style = "after" if after >= before else "worse"
    return (
        '<svg class="dumbbell" role="img" '
        f'aria-label="from {before:.3f} to {after:.3f}">'
        '<line class="grid" x1="2%" x2="98%" y1="50%" y2="50%"/>'
        f'<line class="line {style}" x1="{at[0]}" x2="{at[1]}" y1="50%" y2="50%"/>'
        f'<circle class="dot before" cx="{at[0]}" cy="50%" r="4"/>'
        f'<circle class="dot {style}" cx="{at[1]}" cy="50%" r="5"/></svg>'
    )
