"""report.html: its content, escaping, and no errors in a browser."""

import base64
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from markupsafe import Markup

from helpers.browser import CHROMIUM, chromium
from helpers.short_runs import arguments, train_here
from samft.demo import write_demo
from samft.evaluation.object_scores import Comparison, GroupMeans, ObjectScores
from samft.reports.click_pictures import ClickRow, ClickTile
from samft.reports.page import (
    Figure,
    ObjectPair,
    ReportPage,
    break_at_underscores,
    data_uri,
    format_score,
    render,
    shorten_name,
    split_command,
    split_flags,
)

HOSTILE = (
    "</style></title></td>\"'><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[2J\u202e"
    "{{ 7 * 7 }}{% raw %}&amp;"
)


def a_page(name: str = "plain", **changes: Any) -> ReportPage:
    ids = np.arange(30)
    before, after = np.linspace(0, 0.8, 30), np.linspace(0.2, 0.9, 30)
    rows = [ObjectScores(ids, ids, ids + 9.0, iou, iou**2, iou) for iou in (before, after)]
    tile = np.full((16, 16, 3), 90, np.uint8)
    pair = ObjectPair(name, name, 7, 1234.0, (0.25, 0.5), (tile, tile))
    counts = {"images": 3, "masks": 30, "skipped": {name: 1}, "bad_images": {name: name}}
    summary = {
        "got_worse": [],
        "what_to_try": [],
        "baseline_val_per_mask_iou": 0.4,
        "best_val_per_mask_iou": 0.55,
        "box_fill_iou": 0.5,
        "above_box_fill": 0.05,
        "objects": {
            "compared": 30,
            "gained": 12,
            "lost": 0,
            "above_box_fill": 21,
            "images": 4,
            "change": {"difference": 0.15, "interval": [0.1, 0.2]},
        },
        "test": None,
        "general": None,
        "data": {"train": counts, "val": counts},
    }
    page = ReportPage(
        title=name,
        meta=name,
        summary=summary,
        metrics=[
            {"step": 0, "split": "val", "per_mask_iou": 0.4, "loss": 0.5},
            {"step": 5, "split": "train", "per_mask_iou": 0.5, "loss": 0.4},
            {"step": 5, "split": "val", "per_mask_iou": 0.55, "loss": None},
        ],
        comparison=Comparison(*rows),
        sizes=[GroupMeans(name, 30, 0.4, 0.55)],
        classes=[GroupMeans(f"{name} {number}", 1, 0.4, 0.5) for number in range(20)],
        pairs={"improved": [pair], "worst": [pair, pair], "harmed": []},
        why_no_pairs="",
        settings=[("steps", name, 1500), (name, name, name)],
        defaults=[("seed", name)],
        environment=[("device", name)],
        commands=[name, name, name],
    )
    return replace(page, **changes)


class Reader(HTMLParser):
    """The elements of a page, its visible text, and what its attributes hold."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] != "style":
            self.text += data


def test_the_page_refers_to_no_other_file() -> None:
    page = Reader(render(a_page()))
    assert not {"script", "link", "iframe", "object", "a"} & set(page.tags)
    sources = [value for name, value in page.attributes if name in ("src", "href", "srcset")]
    assert len(sources) == 6 and all(one.startswith("data:image/jpeg;base64,") for one in sources)
    assert "url(" not in render(a_page()) and "@import" not in render(a_page())


def test_names_cannot_inject_markup() -> None:
    harmless, hostile = Reader(render(a_page())), Reader(render(a_page(HOSTILE)))
    assert hostile.tags == harmless.tags
    assert [name for name, _ in hostile.attributes] == [name for name, _ in harmless.attributes]
    assert "<script>alert(1)</script>" in hostile.text  # to be read
    for text in (hostile.text, *(value for _, value in hostile.attributes)):
        assert "\x1b" not in text and "\u202e" not in text
    assert "{{ 7 * 7 }}{% raw %}&amp;" in hostile.text


@pytest.mark.parametrize(
    ("setting", "program"),
    [
        (("steps", 5, 9), "segment_anything's own SamPredictor."),
        (("image_size", 512, 1024), "segment_anything's own SamPredictor."),
        (("view", "tiles", "image"), "segment_anything's own SamPredictor on the same windows"),
        (("view", "objects", "image"), "segment_anything's own SamPredictor on the same windows"),
        (("resize_mode", "squash", "pad"), "samft predict; other programs pad images to a square."),
        (("image_size", "512x384", 1024), "samft predict; other programs pad images to a square."),
    ],
)
def test_it_says_which_program_gets_the_same_score(setting, program) -> None:
    text = " ".join(Reader(render(a_page(settings=[setting]))).text.split())
    assert f"the same number that the checkpoint gets in {program}" in text


def test_a_warning_is_the_first_thing_on_the_page() -> None:
    page = a_page()
    worse = {**page.summary, "got_worse": [f"IoU fell. {HOSTILE}"], "what_to_try": ["--steps 1"]}
    reader = Reader(render(replace(page, summary=worse, title="the title")))
    shown = reader.text.split("the title", 2)[1].strip()  # after the title of the window
    assert shown.startswith("Warning: IoU fell.") and "--steps 1" in shown
    assert ("role", "alert") in reader.attributes
    assert ("role", "alert") not in Reader(render(page)).attributes


def test_scores_and_counts_are_shown() -> None:
    text = Reader(render(a_page())).text
    for expected in (
        "0.400",
        "0.550 +0.150",
        "0.500",
        "against filling each box",
        "+0.050",
        "better than their filled box",
        "21 of 30",
        "12 of 30",
        "5 more",
        "1,234 px",
        "#7 in plain",
    ):
        assert expected in text, expected


def test_the_test_split_is_shown_where_there_is_one() -> None:
    page = a_page()
    assert "test split" not in Reader(render(page)).text
    test = {"images": 1200, "masks": 4500, "before": 0.41, "after": 0.36, "box_fill": 0.2}
    text = render(
        replace(page, summary={**page.summary, "test": {**test, "interval": [-0.1, 0.02]}})
    )
    shown = " ".join(Reader(text).text.split())
    assert (
        "test split: IoU before 0.410 IoU after 0.360 \u22120.050 filling each box 0.200" in shown
    )
    assert "4,500 masks of 1,200 images of the test split" in shown
    assert "lies between \u22120.100 and +0.020 (95 % interval" in shown
    assert "bootstrap over images): it may be chance." in shown


def test_the_general_set_is_shown_where_there_is_one() -> None:
    page = a_page()
    assert "general set" not in Reader(render(page)).text
    general = {"images": 300, "masks": 4500, "before": 0.41, "after": 0.36, "box_fill": 0.2}
    general |= {"interval": [-0.1, -0.02], "lost": 1234, "gained": 5, "since_step": 0}
    lines = [
        {"step": step, "split": "val", "general_per_mask_iou": iou, "general_loss": 1 - iou}
        for step, iou in ((0, 0.41), (5, 0.39), (10, 0.36))
    ]
    for since, num_points in ((0, 3), (5, 2), (11, 0)):
        summary = {**page.summary, "general": {**general, "since_step": since}}
        text = render(replace(page, summary=summary, metrics=[*page.metrics, *lines]))
        curves = [
            part.split('"')[0] for part in text.split('<polyline class="line after" points="')
        ]
        assert (num_points in [len(points.split()) for points in curves]) == (since < 11)
        assert ("IoU of the general set by step" in text) == (since < 11)
    shown = " ".join(Reader(text).text.split())
    assert "general set: IoU before 0.410 IoU after 0.360 \u22120.050 filling each box" in shown
    assert "objects that lost over 0.1 1,234 of 4,500" in shown
    assert "4,500 masks of 300 images of other data" in shown
    assert "lies between \u22120.100 and \u22120.020 (95 % interval" in shown


def test_missing_parts_are_explained() -> None:
    page = a_page(
        comparison=None, sizes=[], classes=[], pairs={}, why_no_pairs="Gone.", commands=[]
    )
    nothing = dict.fromkeys(("objects", "best_val_per_mask_iou", "above_box_fill"))
    summary = {**page.summary, **nothing}
    shown = render(replace(page, summary=summary, metrics=[]))
    assert "IoU by step" in shown and "loss by step" not in shown  # no axes without a line
    text = Reader(shown).text
    assert "against filling each box" not in text
    assert "There are no pictures. Gone." in text and "Each object" not in text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a < b & 'c' \"d\"", "a &lt; b &amp; &#39;c&#39; &#34;d&#34;"),
        ("\x1b[2J\u202e\ud800", "\\x1b[2J\\u202e\\ud800"),
        (None, "None"),
        (1.5, "1.5"),
    ],
)
def test_values_are_escaped_and_printable(value: object, expected: str) -> None:
    shown = render(a_page(environment=[("<i>", value)]))
    assert f"<tr><td>&lt;i&gt;</td><td>{expected}</td></tr>" in shown


@pytest.mark.parametrize(
    ("value", "expected"), [(0.5, ">+0.500<"), (-0.25, ">\u22120.250<"), (-0.0004, ">\xb10<")]
)
def test_a_change_has_its_sign(value: float, expected: str) -> None:
    shown = render(a_page(classes=[GroupMeans("cat", 1, 0.0, value)]))
    assert expected in shown[shown.index("<td>cat</td>") :]


def test_a_score_may_be_none() -> None:
    assert format_score(0.12345) == "0.123" and format_score(None) == "none"


def test_names_of_settings_may_be_broken_at_underscores_only() -> None:
    assert break_at_underscores("a_b") == "a_<wbr>b"
    assert break_at_underscores("<_\x1b") == "&lt;_<wbr>\\x1b"
    shown = render(a_page(settings=[("cache_dir", "a_b", "c_d")], defaults=[("mask_chunk", 1)]))
    assert "<td>cache_<wbr>dir</td><td>a_b</td><td>c_d</td>" in shown
    assert "<td>mask_<wbr>chunk</td>" in shown


def test_a_long_name_loses_its_middle_but_not_its_title() -> None:
    name = "a" * 30 + "<" + "b" * 30
    assert shorten_name(name) == "a" * 16 + "\N{HORIZONTAL ELLIPSIS}" + "b" * 20
    pair = ObjectPair(name, "cat", 7, 1.0, (0.25, 0.5), (np.zeros((9, 9, 3), np.uint8),) * 2)
    shown = render(a_page(pairs={"worst": [pair]}))
    assert f'<span title="{"a" * 30}&lt;{"b" * 30}">{shorten_name(name)}</span>' in shown
    assert shorten_name("a<b") == "a<b"


def test_flags_and_commands_are_split_where_they_are_marked() -> None:
    assert split_flags("Try --steps, or --lr 1.")[1::2] == ["--steps", "--lr"]
    command = "samft predict --images 'a b' --output_dir c"
    assert split_command(command)[1:] == ["--images 'a b'", "--output_dir c"]
    assert " ".join(split_command(command)) == command


def test_a_picture_keeps_its_colours() -> None:
    address = data_uri(np.full((8, 8, 3), (250, 20, 20), np.uint8))
    encoded = base64.b64decode(address.removeprefix("data:image/jpeg;base64,"))
    blue, green, red = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)[4, 4]
    assert red > 240 and green < 30 and blue < 30


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a small demo dataset, in a folder whose name is no joy."""
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder / "data", num_train=4, num_val=3, size=128)
    train_here(arguments(folder / "data", folder / "a 'run' <b>", steps=2, metrics_interval=2))
    return folder / "a 'run' <b>"


def test_the_report_of_a_run_agrees_with_its_summary(demo_run: Path) -> None:
    page = Reader((demo_run / "report.html").read_text())
    summary = json.loads((demo_run / "summary.json").read_text())
    for name in ("baseline_val_per_mask_iou", "best_val_per_mask_iou", "box_fill_iou"):
        assert f"{summary[name]:.3f}" in page.text
    assert summary["above_box_fill"] == summary["best_val_per_mask_iou"] - summary["box_fill_iou"]
    assert format_score(abs(summary["above_box_fill"])) in page.text
    assert all(sentence in page.text for sentence in summary["got_worse"])
    assert page.tags.count("img") >= 2
    assert "a 'run' <b>" in page.text and "b" not in page.tags[page.tags.index("pre") :]


def test_corrections_by_clicks_have_a_section() -> None:
    assert "Corrections by clicks" not in render(a_page())
    tile = ClickTile(np.full((16, 16, 3), 90, np.uint8), 2, 0.25)
    figure = Figure("IoU by clicks", Markup("<svg></svg>"), [("after", HOSTILE)], HOSTILE)
    text = render(
        a_page(
            clicked="36 objects of 9 images",
            click_figures=[figure],
            click_rows=[ClickRow(HOSTILE, HOSTILE, 3, [[tile], [tile, tile]])],
        )
    )
    assert "36 objects of 9 images of the validation split" in text
    assert text.count("2 clicks, IoU 0.250") == 3 and "<b>IoU by clicks</b><svg></svg>" in text
    assert "<script" not in text


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (Debian: chromium)")
def test_a_browser_reports_no_errors_and_makes_no_requests(demo_run: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "hostile.html"
    hostile.write_text(render(a_page(HOSTILE)))
    with chromium() as tab:
        for path in (demo_run / "report.html", hostile):
            tab.open(path.as_uri())
            assert tab.complaints() == []
            assert tab.requests() == [path.as_uri()]
            widths = tab.evaluate("[...document.images].map(image => image.naturalWidth)")
            assert len(widths) >= 2 and all(width > 0 for width in widths)
            for width in (1280, 390):
                tab.resize(width)
                assert tab.evaluate("document.documentElement.scrollWidth") == width
        # The test itself would see what it looks for.
        bad = tmp_path / "bad.html"
        bad.write_text("<img src='gone.png'><script>console.error(1)</script>")
        tab.open(bad.as_uri())
        assert tab.complaints() and tab.requests()[1:] == [(tmp_path / "gone.png").as_uri()]
        assert tab.evaluate("document.images[0].naturalWidth") == 0


LINES_OF = """[...document.querySelectorAll('SELECTOR')].map(cell => {
  const range = document.createRange()
  range.selectNodeContents(cell)
  return new Set([...range.getClientRects()].map(line => line.top)).size
})"""


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (Debian: chromium)")
def test_a_long_path_leaves_room_for_other_cells_on_a_phone(tmp_path: Path) -> None:
    path, page = tmp_path / "page.html", a_page()
    settings = [("data_root", "/data/" + "x" * 300, ""), ("steps", 7, 1500), ("amp", "off", "auto")]
    classes = [GroupMeans("Saccharomyces", 12345, 0.4, 0.5), GroupMeans("y" * 90, 1, 0.4, 0.5)]
    path.write_text(render(replace(page, settings=settings, classes=classes)))
    with chromium() as tab:
        tab.resize(380)
        tab.open(path.as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") == 380
        assert tab.evaluate(LINES_OF.replace("SELECTOR", ".settings td:first-child")) == [1, 1, 1]
        assert tab.evaluate(LINES_OF.replace("SELECTOR", ".settings td:last-child")) == [0, 1, 1]
        names = tab.evaluate(LINES_OF.replace("SELECTOR", ".groups td:first-child"))
        assert names[-2] == 1 and names[-1] > 1
