"""Renders the page of an evaluation: tables, charts, and rows of pictures, in one HTML file."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from markupsafe import Markup

from samft.evaluation.click_curves import STARTS, describe_clicks
from samft.evaluation.evaluator import EvaluatedObjects
from samft.evaluation.object_scores import compare_objects
from samft.reports.charts import ChartLine, click_chart
from samft.reports.click_pictures import ClickRow
from samft.reports.page import (
    Figure,
    comparison_figures,
    signed_number,
    template_environment,
)

# In the head of each page: what tells one from a file of the same name that is not ours.
MARK = '<meta name="generator" content="samft evaluate">'
_STYLES = ("before", "after", "train", "worse")  # of the lines of models, classes in report.css
_HEAD_BYTES = 1000


@dataclass(frozen=True)
class EvaluationPage:
    """Everything that the page of an evaluation shows.

    Attributes:
        title: Of the data.
        models: Names of the checkpoints, the first one that others are compared with.
        lines: The tables of the terminal.
        figures: Charts, see `evaluation_figures`.
        click_rows: Objects after one click, two, three.
    """

    title: str
    models: Sequence[str]
    lines: Sequence[str]
    figures: Sequence[Figure]
    click_rows: Sequence[ClickRow]


def render_evaluation(page: EvaluationPage) -> str:
    """The page as HTML text, which refers to no other file and no address."""
    template = template_environment().get_template("evaluation.html.j2")
    return template.render(page=page, mark=Markup(MARK))


def is_evaluation_page(path: Path) -> bool:
    """Whether a file is a page that an evaluation wrote."""
    with path.open("rb") as file:
        return MARK.encode() in file.read(_HEAD_BYTES)


def evaluation_figures(
    evaluations: Sequence[Mapping[str, Any]], tables: Sequence[EvaluatedObjects]
) -> list[Figure]:
    """The charts of an evaluation of one model or several.

    Args:
        evaluations: Of each model, what `summarise_scores` returned.
        tables: Of each model, its rows.
    """
    figures = []
    if all("clicks" in evaluation for evaluation in evaluations):
        changes = evaluations[1]["comparison"]["clicks"] if len(evaluations) == 2 else None
        figures += click_figures([one["clicks"] for one in evaluations], changes=changes)
    if len(tables) == 2:
        figures += comparison_figures(compare_objects(*tables))
    return figures


def click_figures(
    curves: Sequence[Mapping[str, Any]], *, changes: Mapping[str, Any] | None = None
) -> list[Figure]:
    """The charts of IoU against clicks, one for each start.

    Args:
        curves: Of each model, what `summarise_clicks` returned.
        changes: Of two models, what `compare_clicks` returned.
    """
    names = _model_names(len(curves))
    styles = ["after"] if len(curves) == 1 else [*islice(cycle(_STYLES), len(curves))]
    legend = [(style, name) for style, name in zip(styles, names, strict=True) if name]
    return [
        Figure(
            f"IoU by clicks, from {start.label}",
            Markup(click_chart(list(map(_curve_line, [c[start.name] for c in curves], styles)))),
            legend,
            " ".join(
                [
                    *_describe_needed([curve[start.name] for curve in curves], names),
                    *(_describe_change(changes[start.name]) if changes else ()),
                    "The bands are 95 % intervals of each mean, bootstrapped over images.",
                ]
            ),
        )
        for start in STARTS
    ]


def _model_names(num_models: int) -> list[str]:
    if num_models <= 2:
        return [[""], ["before", "after"]][num_models - 1]
    return [chr(ord("A") + number) for number in range(num_models)]


def _curve_line(curve: Mapping[str, Any], style: str) -> ChartLine:
    points = list(zip(curve["clicks"], curve["iou"], strict=True))
    intervals = curve["iou_interval"]
    band = [] if None in intervals else [(low, high) for low, high in intervals]
    return ChartLine(style, style, points, band)


def _describe_needed(curves: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Iterator[str]:
    for curve, name in zip(curves, names, strict=True):
        yield (
            f"{name.capitalize() + ': ' if name else ''}{curve['noc_85']:.1f} clicks for an IoU of "
            f".85 ({curve['never_85']:.0%} of objects never get there), {curve['noc_90']:.1f} for "
            f".90 ({curve['never_90']:.0%})."
        )


def _describe_change(changes: Mapping[str, Any]) -> Iterator[str]:
    change, most = changes["iou"][-1], describe_clicks(changes["clicks"][-1])
    interval = change["interval"]
    between = ""
    if interval is not None:
        between = f" (95 % interval {signed_number(interval[0])} to {signed_number(interval[1])})"
    yield f"The IoU after {most} changed by {signed_number(change['difference'])}{between}."
