"""Segmentations in other notations than COCO's are read where they are plain, else refused."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools import mask as mask_utils

from helpers.broken_coco import BOX, SQUARE, encode_image, rle
from helpers.coco_files import annotation, write_json
from helpers.segmentations import check_segmentation, decode_segmentation
from samft.annotations.json_reader import UnusableFile
from samft.annotations.notation import MaskError
from samft.annotations.problems import FACT
from samft.annotations.segmentation import decode_cropped
from samft.coco.index import index_file
from samft.coco.repair import write_repaired
from samft.coco.subset import read_coco
from samft.errors import DataError

PAIRS = [SQUARE[k : k + 2] for k in range(0, len(SQUARE), 2)]
POINTS = [{"x": x, "y": y} for x, y in PAIRS]
OTHER = [v + 10 for v in SQUARE]
TEXT = ", ".join(map(str, SQUARE))

PRINTED = repr(rle(compressed=True)["counts"].encode())
NOTATIONS = {
    "pairs": PAIRS,
    "closed pairs": [*PAIRS, PAIRS[0]],
    "polygons of pairs": [PAIRS],
    "contour of OpenCV": [[pair] for pair in PAIRS],
    "contours of OpenCV": [[[pair] for pair in PAIRS]],
    "points": POINTS,
    "polygons of points": [POINTS],
    "nested once too often": [[SQUARE]],
    "nested twice too often": [[[SQUARE]]],
    "numbers as text": list(map(str, SQUARE)),
    "a polygon of numbers as text": [list(map(str, SQUARE))],
    "text": TEXT,
    "text in a list": [TEXT],
    "text of decimals between spaces": " ".join(map(str, SQUARE)),
    "text of whole numbers between spaces": " ".join(str(int(v)) for v in SQUARE),
    "points as text": [f"{x},{y}" for x, y in PAIRS],
    "svg": " ".join(f"{x},{y}" for x, y in PAIRS),
    "json": json.dumps([SQUARE]),
    "json of points": json.dumps(POINTS),
    "x and y": {"x": SQUARE[::2], "y": SQUARE[1::2]},
    "via": {"name": "polygon", "all_points_x": SQUARE[::2], "all_points_y": SQUARE[1::2]},
    "labelme": {"points": PAIRS, "shape_type": "polygon"},
    "rle in a list": [rle(compressed=True)],
    "rle as json": json.dumps(rle(compressed=False)),
    "rle printed by python": {**rle(compressed=True), "counts": PRINTED},
    "rle counts as text": {**rle(compressed=False), "counts": str(rle(compressed=False)["counts"])},
}  # fmt: skip


@pytest.mark.parametrize("name", NOTATIONS)
def test_plain_notations_are_read(tmp_path: Path, name: str) -> None:
    expected = decode_segmentation([SQUARE], (20, 30))
    assert (decode_segmentation(NOTATIONS[name], (20, 30)) == expected).all()
    (tmp_path / "a.png").write_bytes(encode_image(0))
    image = {"id": 1, "file_name": "a.png", "height": 20, "width": 30}
    entry = annotation(1, 1, SQUARE, segmentation=NOTATIONS[name], area=36.0)
    path = write_json(tmp_path / "a.json", [image], [entry])
    index = index_file(path, tmp_path, cache=tmp_path / "cache")
    assert index.boxes.tolist() == [[2, 3, 8, 9]]
    is_counts_only = name in ("rle printed by python", "rle counts as text")
    assert index.problems["mask-notation"] == (not is_counts_only)
    write_repaired(index, path, target=tmp_path / "fixed.json")
    (fixed,) = json.loads((tmp_path / "fixed.json").read_text())["annotations"]
    again = index_file(tmp_path / "fixed.json", tmp_path, cache=tmp_path / "cache")
    assert [line for line in again.problems.lines() if not line.startswith(FACT)] == []
    rles = mask_utils.frPyObjects(fixed["segmentation"], 20, 30)
    if isinstance(fixed["segmentation"], dict) and isinstance(fixed["segmentation"]["counts"], str):
        rles = fixed["segmentation"]
    decoded = mask_utils.decode(rles if isinstance(rles, dict) else rles[0])
    assert (decoded == expected).all()


def test_several_polygons_stay_several() -> None:
    expected = decode_segmentation([SQUARE, OTHER], (20, 30))
    pairs = [[one[k : k + 2] for k in range(0, 8, 2)] for one in (SQUARE, OTHER)]
    for raw in (pairs, [[SQUARE], [OTHER]], [str(SQUARE), str(OTHER)]):
        assert (decode_segmentation(raw, (20, 30)) == expected).all()


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        ({}, "mask-missing"),
        ("", "mask-missing"),
        ({"size": [20, 30]}, "rle-malformed"),
        ({"a": 1}, "mask-malformed"),
        ({"x": [1, 2, 3], "y": [1, 2]}, "mask-malformed"),
        ("outline", "mask-malformed"),
        # Starts and lengths of runs, as Kaggle writes them.
        ("65 5 85 5 105 5 125 5", "mask-malformed"),
        ("[[1, 2, 3", "mask-malformed"),
        ([[1, 2], [3, 4]], "polygon-too-short"),
        ([[2, 3, 6, 6]], "polygon-too-short"),
        ([{"x": 1}, {"x": 2}, {"x": 3}], "polygon-malformed"),
        ([[None, None], [1, 2], [3, 4]], "polygon-malformed"),
        ({"size": [20, 30], "counts": "b'"}, "rle-malformed"),
        ([rle(compressed=True), rle(compressed=True)], "polygon-malformed"),
    ],
)
def test_what_is_not_plain_has_its_reason(raw: Any, code: str) -> None:
    with pytest.raises(MaskError) as caught:
        check_segmentation(raw)
    assert caught.value.code == code


@pytest.mark.parametrize("depth", [30, 5000])
def test_deep_nesting_ends(depth: int) -> None:
    raw: Any = SQUARE
    for _ in range(depth):
        raw = [raw]
    with pytest.raises(MaskError):
        check_segmentation(raw)
    with pytest.raises(MaskError):
        check_segmentation("[" * depth + "1" + "]" * depth)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"segmentation": {}, "bbox": BOX}, "boxes-only"),
        ({"bbox": BOX}, "boxes-only"),
        ({"bbox": BOX, "keypoints": [1, 2, 2], "num_keypoints": 1}, "keypoints-only"),
        ({"segments_info": [{"id": 1, "bbox": BOX}], "file_name": "a.png"}, "panoptic-only"),
        ({"caption": "a square"}, "captions-only"),
        ({}, "no-objects"),
    ],
)
def test_files_without_masks_say_what_they_are(
    tmp_path: Path, fields: dict[str, Any], code: str
) -> None:
    (tmp_path / "a.png").write_bytes(encode_image(0))
    image = {"id": 1, "file_name": "a.png", "height": 20, "width": 30}
    entries = [{"id": k, "image_id": 1, "category_id": 1, **fields} for k in range(3)]
    path = write_json(tmp_path / "a.json", [image], entries)
    named = "" if code == "no-objects" else ".*samft predict"
    with pytest.raises(DataError, match=f"{code}, 1{named}"):
        read_coco(path, tmp_path, cache=tmp_path / "cache")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ([{"image_id": 1, "category_id": 1, "bbox": BOX, "score": 1}], "samft predict --boxes"),
        ({"shapes": [], "imagePath": "a.png"}, "LabelMe"),
        ({"_via_img_metadata": {}}, "VIA"),
        ({"type": "FeatureCollection", "features": []}, "GeoJSON"),
        ({"images": []}, "no list 'annotations'"),
        ([], "no list 'images'"),
    ],
)
def test_other_files_are_named(tmp_path: Path, content: Any, named: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UnusableFile, match=named) as caught:
        index_file(path, tmp_path, cache=tmp_path / "cache")
    assert caught.value.code == "json-not-coco"
    assert np.char.find(str(caught.value), "COCO instances file") > 0


RING, ISLAND = [4.0, 5, 15, 5, 15, 16, 4, 16], [7.0, 8, 11, 8, 11, 12, 7, 12]
OUTER = [1.0, 2, 21, 2, 21, 18, 1, 18]
BESIDE = [22.0, 2, 28, 2, 28, 8, 22, 8]


@pytest.mark.parametrize(
    ("polygons", "area", "expected"),
    [
        ([OUTER, RING], 320 - 121, 320 - 121),
        ([RING, OUTER], 320 - 121, 320 - 121),  # in any order
        ([OUTER, RING], 199.6, 199),  # of the outlines, not of the pixels
        ([OUTER, RING, ISLAND], 320 - 121 + 16, 320 - 121 + 16),
        ([OUTER, RING, BESIDE], 320 - 121 + 36, 320 - 121 + 36),
        ([OUTER, RING], 320, 320),  # as COCO has it
        ([OUTER, RING], 320 + 121, 320),  # added up
        ([OUTER, RING], None, 320),
        ([OUTER, RING], 121, 320),  # of one of them
        ([OUTER, OUTER], 320, 320),
        ([OUTER, BESIDE], 320, 356),
    ],
)
def test_polygons_inside_of_others_are_holes_where_the_area_says_so(
    tmp_path: Path, polygons: list[list[float]], area: float | None, expected: int
) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((20, 30, 3), np.uint8))
    entry = annotation(1, 1, OUTER, segmentation=polygons, bbox=[1, 2, 27, 16], area=area)
    entry["bbox"][2] = 27 if BESIDE in polygons else 20
    image = {"id": 1, "file_name": "a.png", "height": 20, "width": 30}
    subset = read_coco(write_json(tmp_path / "a.json", [image], [entry]), tmp_path)
    crop = decode_cropped(subset.index.segmentations[0], (20, 30))
    assert crop.mask.sum() == expected
    assert crop.extent == (1, 2, 28 if BESIDE in polygons else 21, 18)
    parts = [mask_utils.decode(mask_utils.frPyObjects([one], 20, 30))[..., 0] for one in polygons]
    drawn = np.zeros((20, 30), dtype=np.uint8)
    drawn[2:18, 1 : crop.extent[2]] = crop.mask
    has_holes = expected < np.bitwise_or.reduce(parts).sum()
    combine = np.bitwise_xor if has_holes else np.bitwise_or
    assert (drawn == combine.reduce(parts)).all()
    assert [subset.index.problems[each] for each in ("polygon-parts", "polygon-holes")] == [
        not has_holes,
        has_holes,
    ]


def test_a_repaired_copy_has_holes_as_other_programs_read_them(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((20, 30, 3), np.uint8))
    entry = annotation(1, 1, OUTER, segmentation=[OUTER, RING], area=199)
    image = {"id": 1, "file_name": "a.png", "height": 20, "width": 30}
    path = write_json(tmp_path / "a.json", [image], [entry])
    index = index_file(path, tmp_path, cache=tmp_path / "cache")
    write_repaired(index, path, target=tmp_path / "fixed.json")
    (repaired,) = json.loads((tmp_path / "fixed.json").read_text())["annotations"]
    counts = mask_utils.frPyObjects(repaired["segmentation"], 20, 30)
    assert repaired["area"] == mask_utils.area(counts) == 199 and repaired["bbox"] == entry["bbox"]
