"""Objects called crowds: which are left out, which are objects that a tool calls so."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools import mask as mask_utils

from helpers.coco_files import annotation
from samft.annotations.entries import CROWD
from samft.coco.index import CocoIndex, index_file
from samft.coco.layout import find_split

HEIGHT, WIDTH = 100, 140
CASES = Path(__file__).parents[2].parent / "shared" / "cases"


def square(x: int, y: int, side: int = 8) -> list[float]:
    return [float(v) for v in (x, y, x + side, y, x + side, y + side, x, y + side)]


def blobs(*squares: tuple[int, int, int]) -> dict[str, Any]:
    """The RLE of squares, each x, y, side."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    for x, y, side in squares:
        mask[y : y + side, x : x + side] = 1
    rle = mask_utils.encode(np.asfortranarray(mask))
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = [xs[0], ys[0], xs[-1] - xs[0] + 1, ys[-1] - ys[0] + 1]
    return {
        "segmentation": {"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode()},
        "bbox": [float(side) for side in box],
    }


def build_index(
    folder: Path, drawn: list[list[float]], masks: list[dict[str, Any]], *, crowds: str = "auto"
) -> CocoIndex:
    """A file of ordinary polygons, ids from 1, and of further masks, ids from 101."""
    entries = [annotation(1 + k, 1, polygon) for k, polygon in enumerate(drawn)]
    entries += [annotation(101 + k, 1, square(0, 0), **mask) for k, mask in enumerate(masks)]
    document = {
        "images": [{"id": 1, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}],
        "annotations": entries,
        "categories": [{"id": 1, "name": "thing"}, {"id": 2, "name": "other"}],
    }
    folder.mkdir(exist_ok=True)
    path = folder / "a.json"
    path.write_text(json.dumps(document))
    cv2.imwrite(str(folder / "a.png"), np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    return index_file(path, folder, cache=folder / "cache", crowds=crowds)


def left_out(index: CocoIndex) -> list[int]:
    return index.object_ids[index.flags & CROWD > 0].tolist()


POLYGONS = [square(10 + 20 * k, 5) for k in range(6)]
BRUSHED = [{**blobs((10 + 12 * k, 50, 7 + k % 3)), "iscrowd": 1} for k in range(10)]
# Large, in parts, around ordinary objects.
CROWD_REGION = {**blobs((5, 15, 9), (60, 30, 20), (110, 4, 9)), "iscrowd": 1}


@pytest.mark.parametrize("num_brushed", [1, 3, 10])
@pytest.mark.parametrize("num_drawn", [1, 6])
def test_brush_masks_called_crowds_are_objects(
    tmp_path: Path, num_brushed: int, num_drawn: int
) -> None:
    index = build_index(tmp_path, POLYGONS[:num_drawn], BRUSHED[:num_brushed])
    assert left_out(index) == []
    assert index.problems["crowd-used"] == num_brushed and index.problems["crowd"] == 0


def test_true_crowds_are_left_out(tmp_path: Path) -> None:
    index = build_index(tmp_path, POLYGONS, [CROWD_REGION])
    assert left_out(index) == [101]
    assert index.problems["crowd-used"] == 0 and index.problems["crowd"] == 1


def test_one_that_looks_like_no_crowd_is_left_out_with_those_that_do(tmp_path: Path) -> None:
    assert left_out(build_index(tmp_path, POLYGONS, [CROWD_REGION, BRUSHED[0]])) == [101, 102]


def test_a_true_crowd_among_brush_masks_is_left_out(tmp_path: Path) -> None:
    assert left_out(build_index(tmp_path, POLYGONS, [*BRUSHED, CROWD_REGION])) == [111]


def test_objects_that_occlusion_cuts_in_two_are_objects(tmp_path: Path) -> None:
    parted = {**blobs((20, 80, 6), (28, 80, 6)), "iscrowd": 1}
    assert left_out(build_index(tmp_path, POLYGONS, [*BRUSHED, parted])) == []


def test_a_tool_that_writes_rle_of_ordinary_objects_means_what_it_says(tmp_path: Path) -> None:
    ordinary = [{**mask, "iscrowd": 0} for mask in BRUSHED]
    assert left_out(build_index(tmp_path, [], [*ordinary, BRUSHED[0]])) == [111]
    # Those of another class prove nothing.
    others = [{**mask, "category_id": 2} for mask in ordinary]
    assert left_out(build_index(tmp_path, POLYGONS, [*others, BRUSHED[0]])) == []


def test_polygons_called_crowds_are_meant_so(tmp_path: Path) -> None:
    region = square(50, 50, 20)
    marked = {"segmentation": [region], "bbox": [50, 50, 20, 20], "iscrowd": 1}
    assert left_out(build_index(tmp_path, POLYGONS, [marked])) == [101]


def test_a_sparse_one_among_many_objects_is_a_crowd(tmp_path: Path) -> None:
    # A subset of COCO has one: an L of people at the border of a picture.
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[60:63, 60:78] = mask[60:78, 60:63] = 1
    corner = {**blobs((60, 60, 18)), "iscrowd": 1}
    corner["segmentation"]["counts"] = mask_utils.encode(np.asfortranarray(mask))["counts"].decode()
    many = [square(2 + 12 * (k % 11), 2 + 13 * (k // 11), side=10) for k in range(33)]
    assert left_out(build_index(tmp_path / "many", many, [corner])) == [101]
    assert left_out(build_index(tmp_path / "few", many[:6], [corner])) == []
    assert (
        left_out(build_index(tmp_path / "full", many, [{**blobs((60, 60, 18)), "iscrowd": 1}]))
        == []
    )


def test_nothing_but_crowds_is_used(tmp_path: Path) -> None:
    assert left_out(build_index(tmp_path, [], [CROWD_REGION])) == []


def test_who_knows_better_says_so(tmp_path: Path) -> None:
    masks = [BRUSHED[0], CROWD_REGION]
    assert left_out(build_index(tmp_path, POLYGONS, masks, crowds="use")) == []
    index = build_index(tmp_path, POLYGONS, BRUSHED, crowds="leave_out")
    assert len(left_out(index)) == 10 and index.problems["crowd"] == 10


@pytest.mark.skipif(not CASES.exists(), reason="no shared cases")
def test_the_case_of_cvat(tmp_path: Path) -> None:
    root = CASES / "cvat_mixed_masks"
    index = index_file(*find_split(root, "default"), root=root, cache=tmp_path)
    assert index.problems["crowd-used"] == 18 and left_out(index) == []


@pytest.mark.parametrize(("split", "number"), [("train2017", 6), ("val2017", 7)])
def test_the_crowds_of_coco_stay_out(
    tmp_path: Path, data_root: Path, split: str, number: int
) -> None:
    index = index_file(*find_split(data_root / "coco_open104", split), cache=tmp_path)
    assert len(left_out(index)) == number and index.problems["crowd-used"] == 0
