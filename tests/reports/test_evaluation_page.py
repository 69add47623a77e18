"""The page of an evaluation: click curves, rows of pictures, escaping, whose it is."""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from helpers.browser import CHROMIUM, chromium
from helpers.coco_files import write_coco
from helpers.score_rows import rows_of
from samft.annotations.segmentation import decode_cropped
from samft.coco.index import CocoIndex
from samft.coco.subset import read_coco
from samft.evaluation.click_curves import compare_clicks, summarise_clicks
from samft.evaluation.clicks import Click, CorrectedMask
from samft.reports.charts import HEIGHT, ChartLine, click_chart
from samft.reports.click_pictures import ClickRow, ClickTile, draw_click_rows
from samft.reports.drawing import CLICK_COLOURS, annotate_crop, crop_around
from samft.reports.evaluation_page import (
    EvaluationPage,
    evaluation_figures,
    is_evaluation_page,
    render_evaluation,
)

HOSTILE = "</style></title>\"'><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> CocoIndex:
    annotations = write_coco(tmp_path_factory.mktemp("data"), 2, objects=(1, 2))
    return read_coco(annotations, annotations.parent).index


def test_a_band_lies_around_its_line() -> None:
    points = [(0.0, 0.2), (1.0, 0.6), (2.0, 0.8)]
    curve = ChartLine("after", "after", points, [(0.1, 0.3), (0.5, 0.7), (0.8, 0.8)])
    root = ElementTree.fromstring(click_chart([curve, ChartLine("before", "before", points)]))
    (band,) = root.iter("polygon")  # the other has no interval
    corners = [tuple(map(float, p.split(","))) for p in band.attrib["points"].split()]
    line = next(iter(root.iter("polyline"))).attrib["points"].split()
    line = [tuple(map(float, p.split(","))) for p in line]
    assert len(corners) == 6 and [x for x, _ in corners[:3]] == [x for x, _ in line]
    for (x, low), (same_x, high), (_, middle) in zip(
        corners[:3], corners[:2:-1], line, strict=True
    ):
        assert x == same_x and low == pytest.approx(2 * middle - high, abs=0.2)
    assert corners[0][1] > line[0][1] > corners[-1][1]  # SVG counts downwards
    labels = [text.text for text in root.iter("text") if "x" in text.attrib]
    assert {"0", "1", "2"} <= set(labels) and "clicks" in labels and "0.5" not in labels


@pytest.mark.parametrize(("clicks", "shown"), [([1], "1"), ([0, 1], "1"), (range(21), "20")])
def test_any_number_of_clicks_has_a_chart(clicks: list[int], shown: str) -> None:
    points = [(float(number), 0.5) for number in clicks]
    curve = ChartLine("after", "after", points, [(0.4, 0.6)] * len(points))
    root = ElementTree.fromstring(click_chart([curve]))
    assert len(list(root.iter("circle"))) == len(points)
    assert shown in [text.text for text in root.iter("text")]
    ys = [float(circle.attrib["cy"]) for circle in root.iter("circle")]
    assert len(set(ys)) == 1 and 0 < ys[0] < HEIGHT


@pytest.mark.parametrize("label", [0, 1])
def test_a_click_is_drawn_where_it_was_made(index: CocoIndex, label: int) -> None:
    image = np.full((*index.sizes[0].tolist(), 3), 90, np.uint8)
    crop = crop_around(index.boxes[0], image, tile=240)
    x, y = crop.left + crop.side // 4, crop.top + crop.side // 2
    drawn = annotate_crop(index, 0, crop, clicks=[(x, y, label)])
    plain = annotate_crop(index, 0, crop, clicks=[])
    ys, xs = np.nonzero((drawn == CLICK_COLOURS[label]).all(2))
    per_px = 240 / crop.side
    assert xs.mean() == pytest.approx((x + 0.5 - crop.left) * per_px, abs=2)
    assert ys.mean() == pytest.approx((y + 0.5 - crop.top) * per_px, abs=2)
    assert not (plain == CLICK_COLOURS[label]).all(2).any()
    # White strokes tell the two kinds apart, whatever one sees of the colours: a plus or a minus.
    white = (drawn == 255).all(2) & ~(plain == 255).all(2)
    rows, columns = np.nonzero(white)
    assert np.ptp(columns) > 5 and (np.ptp(rows) > 5) == bool(label)
    box_colour = (annotate_crop(index, 0, crop) == (0, 220, 255)).all(2)
    assert box_colour.any() and not (plain == (0, 220, 255)).all(2).any()


def test_a_row_shows_the_masks_of_each_model(index: CocoIndex) -> None:
    keys = [(int(index.image_ids[1]), int(index.object_ids[2])), (10, 1)]
    truth = decode_cropped(index.segmentations[2], index.sizes[1].tolist())
    click = Click(truth.left, truth.top, 1)
    masks = [CorrectedMask(0, (click,), truth), CorrectedMask(0, (click, click), truth)]
    rows = draw_click_rows(index, [{keys[0]: masks, keys[1]: []}, {keys[0]: [], keys[1]: []}])
    (row,) = rows  # an object without masks, of an image that could not be evaluated, has none
    assert (row.file_name, row.object_id, row.class_name) == ("image_1.png", 3, "thing")
    assert [[(t.num_clicks, t.iou) for t in tiles] for tiles in row.models] == [
        [(1, 1), (2, 1)],
        [],
    ]
    assert draw_click_rows(index, []) == []


def a_page(name: str = "plain") -> str:
    clicks = {"box": [[0.5, 0.9], [0.2, 0.3]], "point": [[0.4], [0.6]]}
    better = {start: [[iou + 0.1 for iou in own] for own in c] for start, c in clicks.items()}
    tables = [rows_of([0.5, 0.2], clicks=clicks), rows_of([0.6, 0.4], clicks=better)]
    evaluations: list[dict[str, Any]] = [{"clicks": summarise_clicks(t, seed=0)} for t in tables]
    evaluations[1]["comparison"] = {"clicks": compare_clicks(*tables, seed=0)}
    tile = ClickTile(np.full((16, 16, 3), 90, np.uint8), 1, 0.25)
    page = EvaluationPage(
        title=name,
        models=[name, name],
        lines=[name, "  IoU <b>"],
        figures=evaluation_figures(evaluations, tables),
        click_rows=[ClickRow(name, name, 3, [[tile, tile], [tile]])],
    )
    return render_evaluation(page)


def test_the_page_shows_curves_rows_and_tables() -> None:
    text = a_page()
    assert (
        text.count("<polygon") == 4 and text.count("<svg") == 4
    )  # two starts; objects, calibration
    assert text.count("data:image/jpeg") == 3 and "1 click, IoU 0.250" in text
    assert "1.0 clicks for an IoU of .85 (50% of objects never get there)" in text
    assert "The IoU after 1 click changed by +0.100 (95 % interval +0.100 to +0.100)" in text
    assert "  IoU &lt;b&gt;" in text


def test_no_name_becomes_markup() -> None:
    text = a_page(HOSTILE)
    assert "<script" not in text and "onerror=alert(2)>" not in text and "{{ 7" in text


def test_figures_follow_what_was_computed() -> None:
    without = [rows_of([0.5]), rows_of([0.6])]
    titles = [figure.title for figure in evaluation_figures([{}, {}], without)]
    assert titles == ["Each object", "Calibration of the predicted IoU"]
    assert evaluation_figures([{}], without[:1]) == []
    clicks = {"box": [[0.5, 0.9], [0.2, 0.3]], "point": [[0.4], [0.6]]}
    one = rows_of([0.5, 0.2], clicks=clicks)
    (box, _) = evaluation_figures([{"clicks": summarise_clicks(one, seed=0)}], [one])
    assert box.legend == []  # a single model needs none


def test_a_page_is_known_again(tmp_path: Path) -> None:
    own, other = tmp_path / "own.html", tmp_path / "other.html"
    own.write_text(a_page(HOSTILE))
    other.write_text("<html>samft evaluate</html>")
    assert is_evaluation_page(own) and not is_evaluation_page(other)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
def test_a_browser_finds_no_error_in_it(tmp_path: Path) -> None:
    path = tmp_path / "scores.html"
    path.write_text(a_page(HOSTILE))
    with chromium() as tab:
        tab.open(path.as_uri())
        assert tab.complaints() == []
        assert tab.requests() == [path.as_uri()]
        for width in (1280, 390):
            tab.resize(width)
            assert tab.evaluate("document.documentElement.scrollWidth") == width
