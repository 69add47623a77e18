"""Renders report.html: the summary, charts and objects of a run, on one self-contained page.

All HTML is in the template `report.html.j2`. It is rendered with autoescape, so a file or class
name can never become markup; the page's own policy forbids scripts and requests besides.
"""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, NamedTuple

import cv2
import jinja2
import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from samft.errors import escape_unprintable
from samft.evaluation.object_scores import Comparison, GroupMeans
from samft.reports.charts import (
    ChartLine,
    calibration_chart,
    change_chart,
    dumbbell_chart,
    line_chart,
)
from samft.reports.click_pictures import ClickRow
from samft.runtime.metrics_file import GENERAL_PREFIX

_QUALITY = 92  # of JPEG: an outline of one pixel needs it
_ROWS_SHOWN = 15  # of a table of groups; the others are folded away


@dataclass(frozen=True)
class ObjectPair:
    """One object, and two models' masks of it.

    Attributes:
        file_name: Of its image.
        class_name: Of its class.
        object_id: Of its annotation.
        area: Of its true mask, px of the original image.
        ious: Before and after.
        tiles: uint8 [T, T, 3] each, before and after.
    """

    file_name: str
    class_name: str
    object_id: int
    area: float
    ious: tuple[float, float]
    tiles: tuple[NDArray[np.uint8], NDArray[np.uint8]]


@dataclass(frozen=True)
class ReportPage:
    """Everything that report.html shows.

    Attributes:
        title: Of the run.
        meta: One line below it.
        summary: What `summary.json` holds.
        metrics: The lines of `metrics.jsonl`.
        comparison: Of the objects; None unless both models' scores are known.
        sizes: The objects by size.
        classes: The objects by class.
        pairs: Objects to look at, by `improved`, `worst` and `harmed`.
        why_no_pairs: Why there are none.
        settings: Of the configuration, those that differ from the default: name, value, default.
        defaults: The others: name, value.
        environment: Versions and devices: name, value.
        commands: What to do next, see `summary.next_commands`; the last of them alone, or none.
        clicked: How many objects were corrected by clicks, in words.
        click_figures: Their charts; empty if there were none.
        click_rows: Pictures of some of them.
    """

    title: str
    meta: str
    summary: dict[str, Any]
    metrics: Sequence[dict[str, Any]]
    comparison: Comparison | None
    sizes: Sequence[GroupMeans]
    classes: Sequence[GroupMeans]
    pairs: dict[str, list[ObjectPair]]
    why_no_pairs: str
    settings: Sequence[tuple[str, Any, Any]]
    defaults: Sequence[tuple[str, Any]]
    environment: Sequence[tuple[str, Any]]
    commands: Sequence[str] = field(default_factory=list)
    clicked: str = ""
    click_figures: Sequence["Figure"] = ()
    click_rows: Sequence[ClickRow] = ()


def render(page: ReportPage) -> str:
    """The page as HTML text, which refers to no other file and no address."""
    return (
        template_environment()
        .get_template("report.html.j2")
        .render(
            page=page,
            summary=page.summary,
            figures=_figures(page),
            commands=[split_command(command) for command in page.commands],
            data_rows=_data_rows(page.summary["data"]),
            rows_shown=_ROWS_SHOWN,
            same_as=_name_equal_predictor(page),
        )
    )


def _name_equal_predictor(page: ReportPage) -> str:
    # Whose masks the scores are of: those of stock SAM only where images are seen as it sees them.
    changed = {name: value for name, value, _ in page.settings}
    if changed.get("view", "image") != "image":
        return "segment_anything's own SamPredictor on the same windows (samft.load_predictor)"
    if changed.get("resize_mode") == "squash" or "x" in str(changed.get("image_size", "")):
        return "samft predict; other programs pad images to a square"
    return "segment_anything's own SamPredictor"


def template_environment() -> jinja2.Environment:
    """The templates of this room, with autoescape and the filters that they use."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("samft", "reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,  # a misspelt name is an error, not an empty cell
        finalize=_make_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "breakable": break_at_underscores,
        "data_uri": data_uri,
        "score": format_score,
        "shorten_name": shorten_name,
        "signed_number": signed_number,
        "split_flags": split_flags,
        "thousands": "{:,}".format,
    }
    style = resources.files("samft.reports").joinpath("report.css").read_text(encoding="utf-8")
    environment.globals["style"] = Markup(style)
    environment.globals["dumbbell"] = lambda before, after: Markup(dumbbell_chart(before, after))
    return environment


def _make_printable(value: object) -> str:
    # Runs on every value that the template prints, before it is escaped. A file name may hold half
    # of a surrogate pair, which cannot be encoded, or a character that reverses what follows it.
    return value if isinstance(value, Markup) else escape_unprintable(str(value))


def format_score(score: float | None) -> str:
    """A score to three places."""
    return "none" if score is None else f"{score:.3f}"


def signed_number(change: float) -> str:
    """A change of a score to three places, with its sign; minus is not a hyphen."""
    return f"{change:+.3f}".replace("-", "\N{MINUS SIGN}")


def shorten_name(name: str) -> str:
    """The name of a file without its middle, if it is long: long names differ at their ends."""
    whole = escape_unprintable(name)
    return f"{whole[:16]}\N{HORIZONTAL ELLIPSIS}{whole[-20:]}" if len(whole) > 38 else whole


def break_at_underscores(name: str) -> Markup:
    """A name whose line may be broken behind each underscore; copied, it is unchanged."""
    return escape(escape_unprintable(name)).replace("_", Markup("_<wbr>"))


def split_flags(text: str) -> list[str]:
    """A sentence, split so that every other part, from the second on, is a command-line flag."""
    return re.split("(--[a-z_]+)", text)


def split_command(line: str) -> list[str]:
    """A command, split before each flag, where its line may be broken.

    Joined by spaces, the parts are the command again.
    """
    first, *flags = line.split(" --")
    return [first, *(f"--{flag}" for flag in flags)]


def data_uri(picture: NDArray[np.uint8]) -> str:
    """A picture, uint8 [H, W, 3] RGB, as a JPEG in a `data:` address."""
    options = [cv2.IMWRITE_JPEG_QUALITY, _QUALITY]
    options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    encoded = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), options)[1]
    return f"data:image/jpeg;base64,{base64.b64encode(encoded.tobytes()).decode('ascii')}"


class Figure(NamedTuple):
    """A chart with its title, its legend and a remark below it."""

    title: str
    chart: Markup
    legend: Sequence[tuple[str, str]]  # class in report.css, name
    remark: str = ""


def _figures(page: ReportPage) -> list[Figure]:
    figures = [_iou_figure(page)]
    if _general_points(page, "per_mask_iou"):
        figures.append(_general_figure(page))
    if any(line.get("loss") is not None for line in page.metrics):
        figures.append(_loss_figure(page))
    return figures + (comparison_figures(page.comparison) if page.comparison else [])


def comparison_figures(comparison: Comparison) -> list[Figure]:
    """Charts of two models' scores of the same objects."""
    before, after = comparison.before, comparison.after
    return [
        Figure(
            "Each object",
            Markup(change_chart(before.iou_actual, after.iou_actual)),
            [],
            "Each dot is an object. Above the diagonal its IoU rose; outside of the dashed "
            "lines it changed by more than 0.1.",
        ),
        Figure(
            "Calibration of the predicted IoU",
            Markup(calibration_chart(*((o.iou_predicted, o.iou_actual) for o in (before, after)))),
            [("before", "before"), ("after", "after")],
            "On the diagonal the model estimates its IoU correctly; below it, too high.",
        ),
    ]


def _iou_figure(page: ReportPage) -> Figure:
    val, train = (_metric_points(page, split, "per_mask_iou") for split in ("val", "train"))
    last = max((step for step, _ in [*val, *train]), default=1)
    levels = {
        "baseline": page.summary["baseline_val_per_mask_iou"],
        "filled": page.summary["box_fill_iou"],
    }
    lines = [ChartLine(name, name, [(0, value), (last, value)]) for name, value in levels.items()]
    lines += [ChartLine("train", "train", train), ChartLine("val", "after", val)]
    legend = [
        ("after", "validation"),
        ("train", "training, augmented"),
        ("baseline", "step 0"),
        ("filled", "filling each box"),
    ]
    chart = line_chart(lines, title="IoU by step", labels=("step", ""))
    return Figure("IoU", Markup(chart), legend)


def _general_points(page: ReportPage, name: str) -> list[tuple[float, float]]:
    # Of these images only: a resumed run may have been given others.
    general = page.summary["general"]
    points = _metric_points(page, "val", f"{GENERAL_PREFIX}{name}")
    return [point for point in points if general and point[0] >= general["since_step"]]


def _general_figure(page: ReportPage) -> Figure:
    points, before = _general_points(page, "per_mask_iou"), page.summary["general"]["before"]
    lines = [
        ChartLine("baseline", "baseline", [(0, before), (points[-1][0], before)]),
        ChartLine("general set", "after", points),
    ]
    chart = line_chart(lines, title="IoU of the general set by step", labels=("step", ""))
    legend = [("after", "general set"), ("baseline", "untouched")]
    remark = "Other data, that of general_data_root: what falls here is forgotten."
    return Figure("IoU of the general set", Markup(chart), legend, remark)


def _loss_figure(page: ReportPage) -> Figure:
    lines = [
        ChartLine("train", "train", _metric_points(page, "train", "loss")),
        ChartLine("val", "after", _metric_points(page, "val", "loss")),
    ]
    legend = [("after", "validation"), ("train", "training")]
    if general := _general_points(page, "loss"):
        lines.append(ChartLine("general set", "before", general))
        legend.append(("before", "general set"))
    chart = line_chart(lines, title="loss by step", labels=("step", ""))
    return Figure("Loss", Markup(chart), legend)


def _metric_points(page: ReportPage, split: str, name: str) -> list[tuple[float, float]]:
    lines = [line for line in page.metrics if line.get("split") == split]
    return [(line["step"], line[name]) for line in lines if line.get(name) is not None]


def _data_rows(data: dict[str, dict[str, Any]]) -> list[tuple[str, list[int]]]:
    # The counts of each split, in the order of `data`.
    reasons = sorted({reason for counts in data.values() for reason in counts["skipped"]})
    names = [
        name for name in ("images", "windows", "masks") if any(name in c for c in data.values())
    ]
    rows = [(name, [counts.get(name, 0) for counts in data.values()]) for name in names]
    return rows + [
        (f"left out: {reason}", [counts["skipped"].get(reason, 0) for counts in data.values()])
        for reason in reasons
    ]
