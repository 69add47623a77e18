"""Tables and a plot of the quality lab's rows, written into docs/experiments.md and docs/images.

A block of the page between `<!-- quality: NAME -->` and `<!-- end -->` is replaced; all else stays.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.quality_recipes import UNTOUCHED, RunRequest
from benchmarks.quality_rows import Row, RowStore
from benchmarks.quality_scores import (
    METRICS,
    Difference,
    RunScores,
    measured_metrics,
    paired_difference,
)
from benchmarks.tables import markdown_table
from samft.errors import DataError
from samft.reports.charts import tick_values
from samft.runtime.files import write_text

PAGE = "experiments.md"


class Result(NamedTuple):
    """A run that is in the rows."""

    request: RunRequest
    row: Row
    scores: RunScores


Results = dict[str, dict[str, dict[int, Result]]]  # by dataset, recipe and seed


def collect_results(store: RowStore, requests: Iterable[RunRequest]) -> Results:
    """The results of the requests that have run.

    Raises:
        DataError: None has.
    """
    results: Results = {}
    for request in requests:
        row = store.find_row(request)
        if row is not None:
            by_recipe = results.setdefault(request.dataset, {})
            result = Result(request, row, store.read_scores(row))
            by_recipe.setdefault(request.recipe, {})[request.seed] = result
    if not results:
        raise DataError(
            f"{store.path} has no row of these recipes, datasets, seeds, steps and batch size with "
            "the packaged weights: `python -m benchmarks.quality run` with the same arguments adds "
            "them."
        )
    return results


def compare_recipes(
    before: dict[int, Result], after: dict[int, Result], metric: str
) -> Difference | None:
    """The difference of two recipes on a dataset, over the seeds that both have run with.

    Args:
        before: Results by seed; those of `untouched` stand for any seed.
        after: The same.
        metric: A key of `METRICS`.
    """
    sides = [dict(side) for side in (before, after)]
    for side, other in (sides, sides[::-1]):
        first = next(iter(side.values()))
        if first.request.recipe == UNTOUCHED:
            side.update(dict.fromkeys(other, first))
    seeds = sorted(sides[0].keys() & sides[1].keys())
    if not seeds:
        return None
    scores = [[side[seed].scores for seed in seeds] for side in sides]
    first_scores = scores[0][0]
    assert all((one.object_ids == first_scores.object_ids).all() for one in scores[0] + scores[1])
    tables = [np.stack([getattr(one, metric) for one in side]) for side in scores]
    return paired_difference(tables[0], tables[1], first_scores.image_ids)


def format_score(value: float) -> str:
    """Three digits without the zero before the point: .467."""
    return f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.2f}"


def format_difference(difference: Difference | None) -> str:
    """`+.021 [+.013, +.028]`, in bold where the interval leaves out zero."""
    if difference is None:
        return "-"
    mean, low, high = (f"{value:+.3f}".replace("0.", ".", 1) for value in difference)
    is_sure = difference.low > 0 or difference.high < 0
    return f"**{mean}** [{low}, {high}]" if is_sure else f"{mean} [{low}, {high}]"


@dataclass(frozen=True)
class Report:
    """What a block of the page says.

    Attributes:
        name: Of the block and of the plot.
        results: At least one.
        against: The recipe that the others are compared with.
    """

    name: str
    results: Results
    against: str

    def to_markdown(self) -> str:
        """The block: the facts, the scores, the differences, the plot."""
        parts = [self._describe_runs(), self._scores_table()]
        if self._differences():
            parts += [self._differences_table(), f"![{self._title}](images/{self._plot_name})"]
        return "\n\n".join(parts)

    def write(self, docs: Path) -> None:
        """Writes the block into the page, and the plot beside it.

        Args:
            docs: The folder of `experiments.md`.

        Raises:
            DataError: The page has no block of this name.
        """
        page = docs / PAGE
        text = replace_block(page.read_text(), self.name, self.to_markdown(), page=page)
        if differences := self._differences():
            (docs / "images").mkdir(exist_ok=True)
            plot = draw_plot(differences, self._title, metrics=self._metrics)
            write_text(docs / "images" / self._plot_name, plot)
        write_text(page, text)

    @property
    def _metrics(self) -> dict[str, str]:
        return measured_metrics(run.scores for run in self._runs())

    @property
    def _plot_name(self) -> str:
        return f"quality_{self.name}.svg"

    @property
    def _title(self) -> str:
        return f"Difference to {self.against} on each dataset, with 95 % intervals"

    def _runs(self) -> list[Result]:
        return [
            result
            for by_recipe in self.results.values()
            for by_seed in by_recipe.values()
            for result in by_seed.values()
        ]

    def _describe_runs(self) -> str:
        runs = self._runs()
        trained = [run.request for run in runs if run.request.recipe != UNTOUCHED]
        seeds = ", ".join(map(str, sorted({one.seed for one in trained})))
        how = {
            f"{one.steps} steps of {one.batch_size} images, image encoder "
            f"{'frozen' if one.frozen else 'trained'}"
            for one in trained
        }
        machines = sorted({run.row["machine"] for run in runs})
        commits = sorted({str(run.row["commit"])[:9] for run in runs})
        weights = runs[0].row["weights"][:12]
        return (
            f"`vit_tiny` (SHA-256 {weights}...), {'; '.join(sorted(how)) or 'not trained'}; seeds "
            f"{seeds or 'none'}. Means over objects and seeds, weights of the last step; *area*: "
            f"median of predicted / true area; *own frame*: squashed, for a recipe that squashes. "
            f"Intervals: bootstrap over images and seeds, 95 %. {'; '.join(machines)}. Commit "
            f"{', '.join(commits)}."
        )

    def _scores_table(self) -> str:
        columns = [*self._metrics.values(), "own frame", "area"]
        head = f"| data | box fill | recipe | seeds | {' | '.join(columns)} |"
        rows = []
        for dataset, by_recipe in self.results.items():
            for number, (recipe, by_seed) in enumerate(by_recipe.items()):
                runs = [result.row for result in by_seed.values()]
                names = (*self._metrics, "iou_own_frame", "area_ratio")
                means = {name: np.mean([row[name] for row in runs]) for name in names}
                scores = " | ".join(format_score(float(means[name])) for name in names)
                label = f"`{dataset}` ({runs[0]['num_objects']} masks)" if not number else ""
                fill = format_score(runs[0]["iou_box_fill"]) if not number else ""
                rows.append(f"| {label} | {fill} | {recipe} | {len(runs)} | {scores} |")
        return markdown_table(head, rows)

    def _differences(self) -> dict[tuple[str, str], dict[str, Difference | None]]:
        # By dataset and recipe, of each metric.
        return {
            (dataset, recipe): {
                metric: compare_recipes(by_recipe[self.against], by_seed, metric)
                for metric in self._metrics
            }
            for dataset, by_recipe in self.results.items()
            if self.against in by_recipe
            for recipe, by_seed in by_recipe.items()
            if recipe != self.against
        }

    def _differences_table(self) -> str:
        labels = " | ".join(self._metrics.values())
        head = f"| data | recipe less {self.against} | {labels} |"
        rows = []
        for (dataset, recipe), by_metric in self._differences().items():
            cells = " | ".join(format_difference(value) for value in by_metric.values())
            rows.append(f"| `{dataset}` | {recipe} | {cells} |")
        return markdown_table(head, rows)


def replace_block(text: str, name: str, content: str, *, page: Path) -> str:
    """Puts content between the marks of a block.

    Raises:
        DataError: The text has not exactly one such block.
    """
    start, end = f"<!-- quality: {name} -->", "<!-- end -->"
    pattern = re.compile(f"{re.escape(start)}\n.*?{re.escape(end)}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise DataError(
            f"{page} has not exactly one block {name!r}: put the lines '{start}' and '{end}' where "
            "the tables are to go."
        )
    return pattern.sub(lambda _: f"{start}\n\n{content}\n\n{end}", text)


# The plot.

_COLOURS = ("#1f6fb4", "#d2691e", "#2e8b57", "#8b3fa0", "#b8860b", "#555555")
_ROW, _LEFT, _PANEL, _GAP, _TOP = 15, 190, 240, 48, 44


def draw_plot(
    differences: dict[tuple[str, str], dict[str, Difference | None]],
    title: str,
    *,
    metrics: dict[str, str] = METRICS,
) -> str:
    """A dot with its interval for each dataset and recipe, in a panel for each metric.

    Args:
        differences: By dataset and recipe, of each metric.
        title: Of the whole plot.
        metrics: Name and label of each panel's.

    Returns:
        SVG text.
    """
    known = [d for by_metric in differences.values() for d in by_metric.values() if d is not None]
    ticks = tick_values(
        min(0.0, *(d.low for d in known)), max(0.0, *(d.high for d in known)), num=4
    )
    recipes = list(dict.fromkeys(recipe for _, recipe in differences))
    colours = {recipe: _COLOURS[i % len(_COLOURS)] for i, recipe in enumerate(recipes)}
    width = _LEFT + len(metrics) * (_PANEL + _GAP)
    height = _TOP + _ROW * len(differences) + 40
    parts = [f'<rect width="{width}" height="{height}" fill="#ffffff"/>']
    for row, (dataset, recipe) in enumerate(differences):
        y = _TOP + _ROW * (row + 0.5) + 4
        text = escape(f"{dataset}: {recipe}")
        parts.append(
            f'<text x="{_LEFT - 8}" y="{y}" text-anchor="end" fill="{colours[recipe]}">'
            f"{text}</text>"
        )
    for number, (metric, label) in enumerate(metrics.items()):
        left = _LEFT + number * (_PANEL + _GAP)
        column = [by_metric[metric] for by_metric in differences.values()]
        styles = [colours[recipe] for _, recipe in differences]
        parts += _draw_panel(column, styles, left=left, ticks=ticks, label=label)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title)}" font-family="sans-serif" font-size="11">{"".join(parts)}'
        "</svg>\n"
    )


def _draw_panel(
    column: Sequence[Difference | None],
    colours: Sequence[str],
    *,
    left: int,
    ticks: list[float],
    label: str,
) -> list[str]:
    bottom = _TOP + _ROW * len(column)

    def x(value: float) -> float:
        return round(left + (value - ticks[0]) / (ticks[-1] - ticks[0]) * _PANEL, 1)

    parts = [f'<text x="{left + _PANEL / 2}" y="{_TOP - 14}" text-anchor="middle">{label}</text>']
    for tick in ticks:
        colour = "#777777" if tick == 0 else "#dddddd"
        parts.append(
            f'<line x1="{x(tick)}" x2="{x(tick)}" y1="{_TOP}" y2="{bottom}" stroke="{colour}"/>'
            f'<text x="{x(tick)}" y="{bottom + 14}" text-anchor="middle">{tick:+g}</text>'
        )
    for row, (difference, colour) in enumerate(zip(column, colours, strict=True)):
        if difference is None:
            continue
        y = _TOP + _ROW * (row + 0.5)
        parts.append(
            f'<line x1="{x(difference.low)}" x2="{x(difference.high)}" y1="{y}" y2="{y}" '
            f'stroke="{colour}" stroke-width="2"/>'
            f'<circle cx="{x(difference.mean)}" cy="{y}" r="3.5" fill="{colour}"/>'
        )
    return parts
