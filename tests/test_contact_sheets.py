"""Contact sheets: the right objects, cut out where they are, drawn with their outline."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from coco_files import annotation
from samft.coco_index import CocoFile, index_file
from samft.contact_sheets import (
    COLUMNS,
    NUM_TILES,
    TILE,
    Pick,
    cut_out,
    draw_sheet,
    odd_objects,
    write_sheets,
)
from samft.pictures import PADDING, read_png

MAGENTA, CYAN, GREY = (255, 40, 220), (0, 220, 255), 128
HEIGHT, WIDTH = 100, 200
HEAD, CAPTION = 44, 54  # px: two lines of 19 and three of 16, and 6 below


def rectangle(x: float, y: float, width: float, height: float) -> list[float]:
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def write(folder: Path, objects: list[dict[str, Any]], *, images: int = 1) -> CocoFile:
    """A set of green images of 100 x 200 px."""
    entries = []
    for number in range(1, images + 1):
        cv2.imwrite(str(folder / f"{number}.png"), np.full((HEIGHT, WIDTH, 3), (0, 90, 0)))
        entries.append(
            {"id": number, "file_name": f"{number}.png", "height": HEIGHT, "width": WIDTH}
        )
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "a/b ä"}, {"id": 3, "name": "a b ä"}]
    document = {"images": entries, "annotations": objects, "categories": categories}
    path = folder / "file.json"
    path.write_text(json.dumps(document))
    return index_file(path, folder, cache=folder / "cache")


def found_at(tile: np.ndarray, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Around the pixels of a colour: x0, y0, x1, y1."""
    ys, xs = np.nonzero((tile == colour).all(-1))
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


def test_a_tile_shows_mask_box_and_margin(tmp_path: Path) -> None:
    """A box of 64 px, of which the mask fills the left half; the tile spans 84 px."""
    mask = rectangle(60, 20, 32, 64)
    file = write(tmp_path, [annotation(1, 1, mask, bbox=[60, 20, 64, 64])])
    image = cv2.imread(str(tmp_path / "1.png"))[..., ::-1]
    tile = cut_out(file, 0, image)
    assert tile.shape == (TILE, TILE, 3)
    scale = TILE / 84
    box = [round(v * scale) for v in (10, 10, 74, 74)]
    np.testing.assert_allclose(
        found_at(tile, MAGENTA), [box[0], box[1], 42 * scale, box[3]], atol=2
    )
    assert found_at(tile, CYAN)[2] == box[2]
    assert tile[box[1] + 9, 40 * TILE // 84 + 30].tolist() == [0, 90, 0]
    assert (tile[-1] == [0, 90, 0]).all()  # the margin; nothing beyond the image is in sight


def test_beyond_the_image_a_tile_is_grey(tmp_path: Path) -> None:
    file = write(tmp_path, [annotation(1, 1, rectangle(0, 40, 40, 20))])
    image = cv2.imread(str(tmp_path / "1.png"))[..., ::-1]
    tile = cut_out(file, 0, image)
    edge = 6 * TILE // 52
    assert (tile[:, : edge - 8] == GREY).all()  # where interpolation does not reach
    assert (tile[5, edge + 8 :] == [0, 90, 0]).all()


def test_a_tiny_object_is_shown_with_what_is_around_it(tmp_path: Path) -> None:
    file = write(tmp_path, [annotation(1, 1, rectangle(50, 50, 4, 4))])
    tile = cut_out(file, 0, cv2.imread(str(tmp_path / "1.png"))[..., ::-1])
    x0, _, x1, _ = found_at(tile, MAGENTA)
    np.testing.assert_allclose([x0, x1], [18 * TILE / 40, 22 * TILE / 40], atol=2)


def test_holes_are_outlined(tmp_path: Path) -> None:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[20:80, 20:80] = 1
    mask[40:60, 40:60] = 0
    edges = np.flatnonzero(np.diff(mask.T.reshape(-1), prepend=0, append=2))
    runs = {"size": [HEIGHT, WIDTH], "counts": np.diff(edges, prepend=0).tolist()}
    file = write(tmp_path, [annotation(1, 1, rectangle(20, 20, 60, 60), segmentation=runs)])
    tile = cut_out(file, 0, cv2.imread(str(tmp_path / "1.png"))[..., ::-1])
    middle = (tile[TILE // 2] == MAGENTA).all(-1)
    assert middle.sum() == 4  # two outer edges, two inner ones


@pytest.mark.parametrize("number", [1, 6, 7, 24])
def test_a_sheet_has_rows_of_six(tmp_path: Path, number: int) -> None:
    objects = [annotation(k + 1, 1, rectangle(2 * k, 2 * k, 20, 10)) for k in range(number)]
    file = write(tmp_path, objects)
    sheet = draw_sheet(file, [Pick(k, "") for k in range(number)], title="t")
    assert sheet.shape[1] == COLUMNS * (TILE + PADDING) - PADDING
    assert sheet.shape[0] == HEAD + -(-number // COLUMNS) * (TILE + CAPTION)
    assert (sheet[:4] == 255).all()


def test_tiles_stay_in_the_order_given(tmp_path: Path) -> None:
    """Though images are decoded in another."""
    sizes = [(60, 10), (10, 60), (30, 30)]
    objects = [
        annotation(k + 1, 2 - k % 2, rectangle(60, 20, *size)) for k, size in enumerate(sizes)
    ]
    file = write(tmp_path, objects, images=2)
    of_id = {int(one): k for k, one in enumerate(file.object_ids)}
    sheet = draw_sheet(file, [Pick(of_id[one], "") for one in (1, 2, 3)], title="t")
    shapes = []
    for column in range(3):
        tile = sheet[HEAD : HEAD + TILE, column * (TILE + PADDING) :][:, :TILE]
        x0, y0, x1, y1 = found_at(tile, MAGENTA)
        shapes.append(round((x1 - x0) / (y1 - y0), 1))
    assert shapes[0] > 4 and shapes[1] < 0.25 and shapes[2] == 1


def test_an_image_that_cannot_be_decoded_leaves_its_tile_grey(tmp_path: Path) -> None:
    file = write(tmp_path, [annotation(1, 1, rectangle(50, 50, 10, 10))])
    (tmp_path / "1.png").write_text("not any more")
    sheet = draw_sheet(file, [Pick(0, "")], title="t")
    assert (sheet[60 + TILE // 2, 2:TILE] == GREY).all()


def test_odd_objects_and_why(tmp_path: Path) -> None:
    thin = annotation(5, 1, rectangle(10, 50, 90, 9))
    sparse = annotation(6, 1, [10, 10, 60, 60, 59, 60, 10, 12], bbox=[10, 10, 50, 50])
    whole = annotation(7, 1, rectangle(0, 0, WIDTH, HEIGHT))
    leaving = annotation(8, 1, rectangle(50, 60, 20, 20), bbox=[50, 60, 20, 41])
    plain = annotation(9, 1, rectangle(50, 60, 20, 20), iscrowd=0)
    crowd = annotation(10, 1, rectangle(0, 0, WIDTH, HEIGHT), iscrowd=1)
    file = write(tmp_path, [thin, sparse, whole, leaving, plain, crowd])
    remarks = {
        int(file.object_ids[pick.object]): pick.remark for pick in odd_objects(file, file.problems)
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
    file = write(tmp_path, objects)
    out = tmp_path / "out"
    out.mkdir()
    paths = write_sheets(file, file.problems, out, name="train")
    names = ["class-cat", "class-a_b_ä", "class-a_b_ä_", "smallest", "largest"]
    assert [path.name for path in paths] == [f"train-{name}.png" for name in names]
    assert sorted(out.iterdir()) == sorted(paths)
    full = read_png(paths[0])
    assert full.shape[0] == HEAD + NUM_TILES // COLUMNS * (TILE + CAPTION)
    again = write_sheets(file, file.problems, out, name="again")
    np.testing.assert_array_equal(read_png(again[0])[HEAD:], full[HEAD:])
    assert (read_png(paths[1])[100] != full[100]).any()


def test_a_set_without_objects_has_no_sheets(tmp_path: Path) -> None:
    file = write(tmp_path, [])
    assert write_sheets(file, file.problems, tmp_path, name="train") == []
