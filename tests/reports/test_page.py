"""report.html: what it says, that strangers' names do it no harm, and a browser's opinion of it."""

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.browser import CHROMIUM, chromium
from helpers.short_runs import arguments, train_here
from samft.demo import write_demo
from samft.evaluation.object_scores import Comparison, Group, ObjectScores
from samft.reports.page import Page, Pair, render

HOSTILE = (
    "</style></title></td>\"'><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[2J\u202e"
)


def a_page(name: str = "plain", **changes: Any) -> Page:
    ids = np.arange(30)
    before, after = np.linspace(0, 0.8, 30), np.linspace(0.2, 0.9, 30)
    rows = [ObjectScores(ids, ids, ids + 9.0, iou, iou**2) for iou in (before, after)]
    tile = np.full((16, 16, 3), 90, np.uint8)
    pair = Pair(name, name, 7, 1234.0, (0.25, 0.5), (tile, tile))
    counts = {"images": 3, "masks": 30, "skipped": {name: 1}, "bad_images": {name: name}}
    summary = {
        "got_worse": [],
        "what_to_try": [],
        "baseline_val_per_mask_iou": 0.4,
        "best_val_per_mask_iou": 0.55,
        "box_fill_iou": 0.5,
        "objects": {"compared": 30, "gained": 12, "lost": 0},
        "data": {"train": counts, "val": counts},
    }
    page = Page(
        title=name,
        meta=name,
        summary=summary,
        metrics=[
            {"step": 0, "split": "val", "per_mask_iou": 0.4, "loss": 0.5},
            {"step": 5, "split": "train", "per_mask_iou": 0.5, "loss": 0.4},
            {"step": 5, "split": "val", "per_mask_iou": 0.55, "loss": None},
        ],
        comparison=Comparison(*rows),
        sizes=[Group(name, 30, 0.4, 0.55)],
        classes=[Group(f"{name} {number}", 1, 0.4, 0.5) for number in range(20)],
        pairs={"improved": [pair], "worst": [pair, pair], "harmed": []},
        no_pairs="",
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


def test_the_page_needs_nothing_from_anywhere() -> None:
    found = Reader(render(a_page()))
    assert not {"script", "link", "iframe", "object", "a"} & set(found.tags)
    sources = [value for name, value in found.attributes if name in ("src", "href", "srcset")]
    assert len(sources) == 6 and all(one.startswith("data:image/jpeg;base64,") for one in sources)
    assert "url(" not in render(a_page()) and "@import" not in render(a_page())


def test_names_from_outside_are_text_and_nothing_else() -> None:
    plain, hostile = Reader(render(a_page())), Reader(render(a_page(HOSTILE)))
    assert hostile.tags == plain.tags
    assert [name for name, _ in hostile.attributes] == [name for name, _ in plain.attributes]
    assert "<script>alert(1)</script>" in hostile.text  # to be read
    for text in (hostile.text, *(value for _, value in hostile.attributes)):
        assert "\x1b" not in text and "\u202e" not in text


def test_a_run_that_got_worse_says_so_before_anything_else() -> None:
    page = a_page()
    worse = {**page.summary, "got_worse": [f"IoU fell. {HOSTILE}"], "what_to_try": ["--steps 1"]}
    found = Reader(render(replace(page, summary=worse, title="the title")))
    shown = found.text.split("the title", 2)[1]  # after the title of the window
    assert shown.startswith("It got worseIoU fell.") and "--steps 1" in shown
    assert ("role", "alert") in found.attributes
    assert ("role", "alert") not in Reader(render(page)).attributes


def test_the_numbers_are_there() -> None:
    text = Reader(render(a_page())).text
    for words in (
        "0.400",
        "0.550 +0.150",
        "0.500",
        "12 of 30",
        "5 more",
        "1,234 px",
        "#7 in plain",
    ):
        assert words in text, words


def test_what_is_not_known_is_said() -> None:
    page = a_page(comparison=None, sizes=[], classes=[], pairs={}, no_pairs="Gone.", commands=[])
    summary = {**page.summary, "objects": None, "best_val_per_mask_iou": None}
    text = Reader(render(replace(page, summary=summary, metrics=[]))).text
    assert "There are no pictures. Gone." in text and "Each object" not in text


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a small demo dataset, in a folder whose name is no joy."""
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder / "data", num_train=4, num_val=3, size=128)
    train_here(arguments(folder / "data", folder / "a 'run' <b>", steps=2, metrics_interval=2))
    return folder / "a 'run' <b>"


def test_the_report_of_a_run_agrees_with_its_summary(demo_run: Path) -> None:
    found = Reader((demo_run / "report.html").read_text())
    summary = json.loads((demo_run / "summary.json").read_text())
    for name in ("baseline_val_per_mask_iou", "best_val_per_mask_iou", "box_fill_iou"):
        assert f"{summary[name]:.3f}" in found.text
    assert found.tags.count("img") >= 2
    assert "a 'run' <b>" in found.text and "b" not in found.tags[found.tags.index("pre") :]


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (Debian: chromium)")
def test_a_browser_has_nothing_to_complain_of(demo_run: Path, tmp_path: Path) -> None:
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
