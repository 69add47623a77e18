"""Contact sheets: which objects are on them, and where."""

from pathlib import Path

import numpy as np
import pytest

from helpers.coco_files import annotation
from helpers.painted_objects import (
    GREY,
    HEIGHT,
    MAGENTA,
    WIDTH,
    bounds_of_colour,
    rectangle,
    write_painted,
)
from samft.reports.contact_sheets import (
    COLUMNS,
    NUM_TILES,
    SheetEntry,
    draw_sheet,
    odd_objects,
    write_sheets,
)
from samft.reports.drawing import GAP, TILE, read_png

HEAD, CAPTION = 44, 54  # px: two lines of 19 and three of 16, and 6 below


@pytest.mark.parametrize("number", [1, 6, 7, 24])
def test_a_sheet_has_rows_of_six(tmp_path: Path, number: int) -> None:
    objects = [annotation(k + 1, 1, rectangle(2 * k, 2 * k, 20, 10)) for k in range(number)]
    index = write_painted(tmp_path, objects)
    sheet = draw_sheet(index, [SheetEntry(k, "") for k in range(number)], title="t")
    assert sheet.shape[1] == COLUMNS * (TILE + GAP) - GAP
    assert sheet.shape[0] == HEAD + -(-number // COLUMNS) * (TILE + CAPTION)
    assert (sheet[:4] == 255).all()


def test_tiles_stay_in_the_order_given(tmp_path: Path) -> None:
    """Though images are decoded in another."""
    sizes = [(60, 10), (10, 60), (30, 30)]
    objects = [
        annotation(k + 1, 2 - k % 2, rectangle(60, 20, *size)) for k, size in enumerate(sizes)
    ]
    index = write_painted(tmp_path, objects, images=2)
    of_id = {int(one): k for k, one in enumerate(index.object_ids)}
    sheet = draw_sheet(index, [SheetEntry(of_id[one], "") for one in (1, 2, 3)], title="t")
    shapes = []
    for column in range(3):
        tile = sheet[HEAD : HEAD + TILE, column * (TILE + GAP) :][:, :TILE]
        x0, y0, x1, y1 = bounds_of_colour(tile, MAGENTA)
        shapes.append(round((x1 - x0) / (y1 - y0), 1))
    assert shapes[0] > 4 and shapes[1] < 0.25 and shapes[2] == 1


def test_an_image_that_cannot_be_decoded_leaves_its_tile_grey(tmp_path: Path) -> None:
    index = write_painted(tmp_path, [annotation(1, 1, rectangle(50, 50, 10, 10))])
    (tmp_path / "1.png").write_text("not any more")
    sheet = draw_sheet(index, [SheetEntry(0, "")], title="t")
    assert (sheet[60 + TILE // 2, 2:TILE] == GREY).all()


def test_odd_objects_and_why(tmp_path: Path) -> None:
    thin = annotation(5, 1, rectangle(10, 50, 90, 9))
    sparse = annotation(6, 1, [10, 10, 60, 60, 59, 60, 10, 12], bbox=[10, 10, 50, 50])
    whole = annotation(7, 1, rectangle(0, 0, WIDTH, HEIGHT))
    leaving = annotation(8, 1, rectangle(50, 60, 20, 20), bbox=[50, 60, 20, 41])
    ordinary = annotation(9, 1, rectangle(50, 60, 20, 20), iscrowd=0)
    crowd = annotation(10, 1, rectangle(0, 0, WIDTH, HEIGHT), iscrowd=1)
    index = write_painted(tmp_path, [thin, sparse, whole, leaving, ordinary, crowd])
    remarks = {
        int(index.object_ids[entry.object]): entry.remark
        for entry in odd_objects(index, index.problems)
    }
    assert remarks == {
        5: "sides 1 : 10",
        6: remarks[6],
        7: "touches 4 sides",
        8: "box-leaves-image",
    }
    assert remarks[6].startswith("fills ") and remarks[6].endswith("% of box")


def test_sheets_of_a_set(tmp_path: Path) -> None:
    objects = [
        annotation(k + 1, 1, rectangle(10, 10, 10 + k, 10 + k), category_id=1 + (k > 29) + (k > 30))
        for k in range(32)
    ]
    index = write_painted(tmp_path, objects)
    out = tmp_path / "out"
    out.mkdir()
    paths = write_sheets(index, index.problems, out, name="train")
    names = ["class-cat", "class-a_b_ä", "class-a_b_ä_", "smallest", "largest"]
    assert [path.name for path in paths] == [f"train-{name}.png" for name in names]
    assert sorted(out.iterdir()) == sorted(paths)
    full = read_png(paths[0])
    assert full.shape[0] == HEAD + NUM_TILES // COLUMNS * (TILE + CAPTION)
    again = write_sheets(index, index.problems, out, name="again")
    np.testing.assert_array_equal(read_png(again[0])[HEAD:], full[HEAD:])
    assert (read_png(paths[1])[100] != full[100]).any()


def test_a_set_without_objects_has_no_sheets(tmp_path: Path) -> None:
    index = write_painted(tmp_path, [])
    assert write_sheets(index, index.problems, tmp_path, name="train") == []
