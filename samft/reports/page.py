"""Text, numbers and pictures as HTML. Imports no torch.

`report.html`: what a run came to, on one page that needs nothing but itself.

Every text that comes from outside, a file's name say, goes through `markup.text`; the page's policy
forbids scripts and anything from elsewhere besides.
"""

import base64
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from html import escape
from importlib import resources
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from samft.errors import escape_unprintable
from samft.evaluation.object_scores import Comparison, Group
from samft.reports.charts import Line, calibration_chart, change_chart, dumbbell, line_chart

_QUALITY = 92  # of JPEG: what an outline of one pixel takes


def text(value: object) -> str:
    """A value as text, whatever it holds: escaped, and without what is not printable."""
    # A file's name may hold what is no text at all (half of a surrogate pair), or turns it around.
    return escape(escape_unprintable(str(value)))


def score(value: float | None) -> str:
    """A score to three places."""
    return "none" if value is None else f"{value:.3f}"


def signed(value: float) -> str:
    """A change of a score, in the colour of a gain or of a loss."""
    if abs(value) < 0.0005:
        return '<span class="soft">\N{PLUS-MINUS SIGN}0</span>'
    number = f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")
    return f'<span class="{"gain" if value > 0 else "loss"}">{number}</span>'


def short(name: str) -> str:
    """The name of a file, without its middle if it is long."""
    # Begin and end of a long name tell it from others; the whole of it shows under the pointer.
    whole = escape_unprintable(name)
    cut = f"{whole[:16]}\N{HORIZONTAL ELLIPSIS}{whole[-20:]}" if len(whole) > 38 else whole
    return f'<span title="{escape(whole)}">{escape(cut)}</span>'


def table(rows: Iterable[tuple[str, Any]]) -> str:
    """Names and values, one pair a row."""
    cells = "".join(f"<tr><td>{text(name)}</td><td>{text(value)}</td></tr>" for name, value in rows)
    return f'<div class="wide"><table class="plain">{cells}</table></div>'


def picture_uri(picture: NDArray[np.uint8]) -> str:
    """A picture, uint8 [H, W, 3] RGB, as a data: address."""
    options = [cv2.IMWRITE_JPEG_QUALITY, _QUALITY]
    options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    encoded = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), options)[1]
    return f"data:image/jpeg;base64,{base64.b64encode(encoded.tobytes()).decode('ascii')}"


_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_MANY = 15  # rows of a table that are shown without asking
_KINDS = {
    "improved": ("Most improved", "The objects that gained most."),
    "worst": ("Worst now", "The lowest IoU after training, of those not shown elsewhere."),
    "harmed": (
        "Most harmed",
        "The objects that lost most. Where the outline is wrong, it is the annotation that needs "
        "another look.",
    ),
}


@dataclass(frozen=True)
class Pair:
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
class Page:
    """All that the page says.

    Attributes:
        title: Of the run.
        meta: One line below it.
        summary: What `summary.json` holds.
        metrics: The lines of `metrics.jsonl`.
        comparison: Of the objects; None if they are not known of both models.
        sizes: The objects by size.
        classes: The objects by class.
        pairs: Objects to look at, by `improved`, `worst` and `harmed`.
        no_pairs: Why there are none.
        settings: Of the configuration, those that differ from the default: name, value, default.
        defaults: The others: name, value.
        environment: Versions and devices: name, value.
        commands: What to do next, see `report.next_commands`.
    """

    title: str
    meta: str
    summary: dict[str, Any]
    metrics: Sequence[dict[str, Any]]
    comparison: Comparison | None
    sizes: Sequence[Group]
    classes: Sequence[Group]
    pairs: dict[str, list[Pair]]
    no_pairs: str
    settings: Sequence[tuple[str, Any, Any]]
    defaults: Sequence[tuple[str, Any]]
    environment: Sequence[tuple[str, Any]]
    commands: Sequence[str] = field(default_factory=list)


def render(page: Page) -> str:
    """The page as HTML text, without a link to anything."""
    style = resources.files("samft.reports").joinpath("report.css").read_text(encoding="utf-8")
    parts = [
        _banner(page.summary),
        f'<h1>{text(page.title)}</h1><p class="meta">{text(page.meta)}</p>',
        _headline(page.summary),
        _charts(page),
        _groups("IoU by size of the object", "side of a square of its area", page.sizes),
        _groups("IoU by class", "class", page.classes),
        _objects(page),
        _use(page.commands),
        _data(page.summary),
        _configuration(page),
        f"<h2>Environment</h2>{table(page.environment)}",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(page.title)}</title><style>{style}</style></head>\n"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _banner(summary: dict[str, Any]) -> str:
    if not summary["got_worse"]:
        return ""
    found = "".join(f"<p>{text(one)}</p>" for one in summary["got_worse"])
    flag = partial(re.sub, "--[a-z_]+", r"<code>\g<0></code>")
    advice = "".join(f"<li>{flag(text(one))}</li>" for one in summary["what_to_try"])
    return (
        f'<div class="banner" role="alert"><strong>It got worse</strong>{found}'
        f"<p>What to try:</p><ul>{advice}</ul></div>"
    )


def _headline(summary: dict[str, Any]) -> str:
    before, after = summary["baseline_val_per_mask_iou"], summary["best_val_per_mask_iou"]
    change = "" if after is None else f" <small>{signed(after - before)}</small>"
    cells = [
        ("IoU before", score(before)),
        ("IoU after", f"{score(after)}{change}"),
        ("filling each box", score(summary["box_fill_iou"])),
    ]
    if objects := summary["objects"]:
        of = f" <small>of {objects['compared']:,}</small>"
        cells.append(("objects that gained over 0.1", f"{objects['gained']:,}{of}"))
        cells.append(("objects that lost over 0.1", f"{objects['lost']:,}{of}"))
    drawn = "".join(
        f"<div{' class=first' * (place < 2)}><dt>{name}</dt><dd>{value}</dd></div>"
        for place, (name, value) in enumerate(cells)
    )
    return (
        f'<dl class="scores">{drawn}</dl><p class="soft">Mean IoU over all masks of the validation '
        "split, each at the resolution of its own image, prompted with its box: the same number "
        "that the checkpoint gets in segment_anything's own SamPredictor.</p>"
    )


def _figure(title: str, chart: str, legend: Iterable[tuple[str, str]], words: str = "") -> str:
    keys = "".join(
        f'<span><i class="key {style}"></i>{text(name)}</span>' for style, name in legend
    )
    return (
        f"<figure><b>{title}</b>{chart}"
        f'<figcaption><div class="legend">{keys}</div>{words}</figcaption></figure>'
    )


def _points(page: Page, split: str, name: str) -> list[tuple[float, float]]:
    lines = [line for line in page.metrics if line.get("split") == split]
    return [(line["step"], line[name]) for line in lines if line.get(name) is not None]


def _charts(page: Page) -> str:
    val, train = _points(page, "val", "per_mask_iou"), _points(page, "train", "per_mask_iou")
    last = max((step for step, _ in [*val, *train]), default=1)
    flat = {
        "baseline": page.summary["baseline_val_per_mask_iou"],
        "filled": page.summary["box_fill_iou"],
    }
    lines = [Line(name, name, [(0, value), (last, value)]) for name, value in flat.items()]
    lines += [Line("train", "train", train), Line("val", "after", val)]
    losses = [
        Line("train", "train", _points(page, "train", "loss")),
        Line("val", "after", _points(page, "val", "loss")),
    ]
    iou_legend = [("after", "validation"), ("train", "training, augmented"), ("baseline", "step 0")]
    iou_legend.append(("filled", "filling each box"))
    figures = [
        _figure("IoU", line_chart(lines, title="IoU by step", labels=("step", "")), iou_legend),
        _figure(
            "Loss",
            line_chart(losses, title="loss by step", labels=("step", "")),
            [("after", "validation"), ("train", "training")],
        ),
    ]
    if page.comparison:
        before, after = page.comparison.before, page.comparison.after
        figures += [
            _figure(
                "Each object",
                change_chart(before.iou_actual, after.iou_actual),
                [],
                "A dot is an object. Above the line it gained; beyond the dashes by over 0.1.",
            ),
            _figure(
                "Does the model know how good it is?",
                calibration_chart(*((o.iou_predicted, o.iou_actual) for o in (before, after))),
                [("before", "before"), ("after", "after")],
                "On the straight line it is right; below it, too sure of itself.",
            ),
        ]
    return f'<h2>Curves</h2><div class="charts">{"".join(figures)}</div>'


def _groups(title: str, what: str, groups: Sequence[Group]) -> str:
    if not groups:
        return ""
    rows = [
        f'<tr><td>{text(one.name)}</td><td class="number">{one.num_objects:,}</td>'
        f'<td class="chart">{dumbbell(one.before, one.after)}</td>'
        f'<td class="number">{one.before:.3f}</td><td class="number">{one.after:.3f}</td>'
        f'<td class="number">{signed(one.after - one.before)}</td></tr>'
        for one in groups
    ]
    head = (
        f'<tr><th>{what}</th><th class="number">objects</th><th class="chart">0 to 1</th>'
        '<th class="number">before</th><th class="number">after</th><th></th></tr>'
    )
    drawn = f'<div class="wide"><table class="groups">{head}{"".join(rows[:_MANY])}</table></div>'
    if rows[_MANY:]:
        more = (
            f'<div class="wide"><table class="groups">{head}{"".join(rows[_MANY:])}</table></div>'
        )
        drawn += f"<details><summary>{len(rows) - _MANY} more</summary>{more}</details>"
    return f"<h2>{title}</h2>{drawn}"


def _objects(page: Page) -> str:
    words = (
        '<p class="soft">Left before, right after. Blue: the model\'s mask. Magenta outline: the '
        "true mask. Cyan rectangle: the box that it was given. Grey: beyond the image.</p>"
    )
    if not any(page.pairs.values()):
        return f"<h2>Objects</h2><p>There are no pictures. {text(page.no_pairs)}</p>"
    parts = []
    for kind, (title, remark) in _KINDS.items():
        cards = "".join(map(_card, page.pairs.get(kind, [])))
        body = f'<div class="objects">{cards}</div>' if cards else "<p>None.</p>"
        parts.append(f'<h3>{title}</h3><p class="soft">{remark}</p>{body}')
    return f"<h2>Objects</h2>{words}{''.join(parts)}"


def _card(pair: Pair) -> str:
    before, after = pair.ious
    sides = "".join(
        f'<div><img src="{picture_uri(tile)}" alt="{when}" width="{tile.shape[1]}" '
        f'height="{tile.shape[0]}"><span>{iou:.3f}{change}</span></div>'
        for tile, when, iou, change in zip(
            pair.tiles,
            ("the mask before", "the mask after"),
            pair.ious,
            ("", f" {signed(after - before)}"),
            strict=True,
        )
    )
    return (
        f'<figure><div class="pair">{sides}</div><figcaption>{text(pair.class_name)}, '
        f"{pair.area:,.0f} px, #{pair.object_id} in {short(pair.file_name)}</figcaption></figure>"
    )


def _use(commands: Sequence[str]) -> str:
    if not commands:
        return ""
    titles = ("Score it", "Use it on images", "Load it in Python, for segment_anything")
    blocks = "".join(
        f"<h3>{title}</h3><pre>{_command(command)}</pre>"
        for title, command in zip(titles, commands, strict=True)
    )
    return f"<h2>How to use the result</h2>{blocks}"


def _command(line: str) -> str:
    # A line breaks before a flag, not inside of it; copied, it is still one line.
    first, *flags = line.split(" --")
    return " ".join(f"<span>{text(part)}</span>" for part in [first, *(f"--{f}" for f in flags)])


def _data(summary: dict[str, Any]) -> str:
    data = summary["data"]
    why = sorted({reason for counts in data.values() for reason in counts["skipped"]})
    rows = [(name, [counts[name] for counts in data.values()]) for name in ("images", "masks")]
    rows += [
        (f"left out: {one}", [counts["skipped"].get(one, 0) for counts in data.values()])
        for one in why
    ]
    head = "".join(f'<th class="number">{text(split)}</th>' for split in data)
    body = "".join(
        f"<tr><td>{text(name)}</td>"
        + "".join(f'<td class="number">{number:,}</td>' for number in numbers)
        + "</tr>"
        for name, numbers in rows
    )
    parts = [f'<h2>Data</h2><table class="plain"><tr><th></th>{head}</tr>{body}</table>']
    for split, counts in data.items():
        if bad := counts["bad_images"]:
            title = f"{split}: {len(bad):,} images could not be used"
            parts.append(f"<details><summary>{text(title)}</summary>{table(bad.items())}</details>")
    return "".join(parts)


def _configuration(page: Page) -> str:
    rows = "".join(
        f"<tr><td>{text(name)}</td><td>{text(value)}</td><td>{text(default)}</td></tr>"
        for name, value, default in page.settings
    )
    head = "<tr><th>setting</th><th>of this run</th><th>default</th></tr>"
    return (
        f'<h2>Configuration</h2><div class="wide"><table class="plain">{head}{rows}</table></div>'
        f"<details><summary>{len(page.defaults)} more, as they are by default</summary>"
        f"{table(page.defaults)}</details>"
    )
