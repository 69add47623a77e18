"""Repaired copies: everything usable is kept, everything wrong is corrected or left out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

from helpers.broken_coco import BOX, HEIGHT, SQUARE, WIDTH, encode_image, rle
from helpers.coco_files import annotation
from samft.annotations.problems import FACT
from samft.coco.index import CocoIndex, index_file
from samft.coco.repair import RepairedFile, write_repaired
from samft.errors import ConfigError, DataError

NAN = float("nan")
TRIANGLE = [2.0, 3.0, 8.0, 3.0, 8.0, 9.0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images a.png and b.png, of 20 x 30 px."""
    for number, name in enumerate(("a.png", "b.png")):
        (tmp_path / name).write_bytes(encode_image(number))
    return tmp_path


def image(image_id: Any, name: str, **fields: Any) -> dict[str, Any]:
    return {"id": image_id, "file_name": name, "height": HEIGHT, "width": WIDTH, **fields}


def index_of(folder: Path, path: Path) -> CocoIndex:
    return index_file(path, folder, cache=folder / "cache")


def repair_file(
    folder: Path,
    annotations: list[Any],
    *,
    images: list[Any] | None = None,
    categories: Any = ({"id": 1, "name": "thing"},),
    without: tuple[int, ...] = (),
    **others: Any,
) -> dict[str, Any]:
    """Writes a COCO file, repairs it, checks that the copy has only facts, and reads the copy."""
    path, target = folder / "original.json", folder / "new" / "repaired.json"
    lists = {
        "images": images or [image(1, "a.png"), image(2, "b.png")],
        "annotations": annotations,
        "categories": categories,
    }
    path.write_text(json.dumps({**others, **lists}))
    before = path.read_bytes()
    repaired = write_repaired(
        index_of(folder, path), path, target=target, without=np.array(without, np.int64)
    )
    assert path.read_bytes() == before
    again = index_of(folder, target)
    assert [line for line in again.problems.lines() if not line.startswith(FACT)] == []
    document: dict[str, Any] = json.loads(target.read_text(), parse_constant=pytest.fail)
    counts = len(document["images"]), len(document["annotations"])
    assert repaired == RepairedFile(target, *counts)
    target.unlink()
    return document


def repair_object(folder: Path, **fields: Any) -> dict[str, Any]:
    """The repaired entry of one object, the square unless fields say otherwise."""
    raw = {**annotation(1, 1, SQUARE, area=36.0), **fields}
    raw = {key: value for key, value in raw.items() if value != "absent"}
    (repaired,) = repair_file(folder, [raw])["annotations"]
    assert isinstance(repaired, dict)
    return repaired


def test_a_good_entry_is_unchanged(folder: Path) -> None:
    entry = annotation(7, 1, SQUARE, area=36, bbox=[2.0, 3, 6, 6], attributes={"occluded": True})
    assert repair_file(folder, [entry])["annotations"] == [entry]


def test_other_fields_are_kept(folder: Path) -> None:
    info = {"year": 2024, "note": "a \u00e9"}
    licences = [{"id": 1, "name": "CC BY"}]
    images = [image(1, "a.png", license=1, coco_url="http://x")]
    categories = [{"id": 1, "name": "thing", "supercategory": "all"}]
    document = repair_file(
        folder,
        [annotation(1, 1, SQUARE, area=36.0)],
        images=images,
        categories=categories,
        info=info,
        licenses=licences,
    )
    assert document["info"] == info and document["licenses"] == licences
    assert document["images"] == images and document["categories"] == categories


def test_values_outside_of_standard_json_are_replaced(folder: Path) -> None:
    entry = annotation(1, 1, SQUARE, area=NAN, score=float("inf"), text="a\ud800", big=2**70)
    document = repair_file(folder, [entry], info={"x": [NAN, 1]})
    (repaired,) = document["annotations"]
    assert document["info"] == {"x": [None, 1]}
    assert (repaired["area"], repaired["score"]) == (36, None)
    assert (repaired["text"], repaired["big"]) == ("a?", 2**70)


@pytest.mark.parametrize(
    ("bbox", "expected"),
    [
        ([2.1, 3.2, 5.3, 5.7], [2.1, 3.2, 5.3, 5.7]),
        ([-0.5, 3, 8.5, 6], [0, 3, 8, 6]),
        ("absent", BOX),
        ([1, 2, 3], BOX),
        (["1", 2, 3, 4], BOX),
        ([NAN, 2, 3, 4], BOX),
        ([2, 3, 0, 6], BOX),
        ([500, 500, 6, 6], BOX),
        ([15, 12, 6, 6], BOX),
    ],
)
def test_box(folder: Path, bbox: Any, expected: list[float]) -> None:
    assert repair_object(folder, bbox=bbox)["bbox"] == expected


def test_area_is_the_masks(folder: Path) -> None:
    entry = repair_object(folder, segmentation=[TRIANGLE], area=36.0)
    drawn = mask_utils.merge(mask_utils.frPyObjects([TRIANGLE], HEIGHT, WIDTH))
    assert entry["area"] == int(mask_utils.area(drawn)) == 15


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (SQUARE, [SQUARE]),
        ([SQUARE, [1, 2, 3], [0, 0, 1, NAN, 1, 1]], [SQUARE]),
        ([[2, 3, 8, 3, 8, 9, 2, 9]], [[2, 3, 8, 3, 8, 9, 2, 9]]),
    ],
)
def test_polygons(folder: Path, raw: Any, expected: list[list[float]]) -> None:
    assert repair_object(folder, segmentation=raw)["segmentation"] == expected


@pytest.mark.parametrize("compressed", [True, False])
def test_rle_of_the_images_size_stays(folder: Path, compressed: bool) -> None:
    raw = rle(compressed=compressed)
    assert repair_object(folder, segmentation=raw)["segmentation"] == raw


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("size", [(40, 30), (20, 50), (12, 10)])
def test_rle_of_another_size_is_cut_or_padded(
    folder: Path, compressed: bool, size: tuple[int, int]
) -> None:
    raw = rle(compressed=compressed, height=size[0], width=size[1])
    entry = repair_object(folder, segmentation=raw, bbox=BOX)
    mask = mask_utils.decode(entry["segmentation"])
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[3:9, 2:8] = 1
    np.testing.assert_array_equal(mask, expected)
    assert (entry["bbox"], entry["area"]) == (BOX, 36)


def test_the_box_of_a_cut_mask_is_what_is_left_of_it(folder: Path) -> None:
    """An L whose long leg is beyond the image: the old box would disagree with the mask."""
    mask = np.zeros((HEIGHT, 60), np.uint8)
    mask[2:4, 28:60] = 1
    mask[2:18, 40:60] = 1
    encoded = mask_utils.encode(np.asfortranarray(mask))
    raw = {"size": [HEIGHT, 60], "counts": encoded["counts"].decode()}
    entry = repair_object(folder, segmentation=raw, bbox=[28, 2, 32, 16])
    assert (entry["bbox"], entry["area"]) == ([28, 2, 2, 2], 4)


@pytest.mark.parametrize(
    ("raw", "expected"), [("absent", 0), (None, 0), ("0", 0), (False, 0), (0, 0)]
)
def test_iscrowd(folder: Path, raw: Any, expected: int) -> None:
    entry = repair_object(folder, iscrowd=raw)["iscrowd"]
    assert (entry, type(entry)) == (expected, int)


def test_crowds_are_kept_unless_all_are(folder: Path) -> None:
    crowd = annotation(1, 1, SQUARE, area=36.0, iscrowd=1, segmentation=rle(compressed=False))
    plain = annotation(2, 1, SQUARE, area=36.0)
    assert [a["iscrowd"] for a in repair_file(folder, [crowd, plain])["annotations"]] == [1, 0]
    assert [a["iscrowd"] for a in repair_file(folder, [crowd])["annotations"]] == [0]


def test_object_ids(folder: Path) -> None:
    """Zero, absent and taken ids get free ones; text becomes a number; order is the file's."""
    ids = [2, 0, "5", 2, None, 1, 0]
    boxes = [[2, 3, 6, 5 + 0.1 * k] for k in range(len(ids))]
    entries = [annotation(k, 2 - k % 2, SQUARE, area=36.0, bbox=box) for k, box in enumerate(boxes)]
    for entry, object_id in zip(entries, ids, strict=True):
        entry["id"] = object_id
    repaired = repair_file(folder, entries)["annotations"]
    assert [a["bbox"] for a in repaired] == boxes
    new = [a["id"] for a in repaired]
    assert [new[0], new[2], new[5]] == [2, 5, 1]
    assert sorted(new) == [1, 2, 3, 4, 5, 6, 7] and {type(one) for one in new} == {int}


def test_unusable_and_unassigned_objects_are_left_out(folder: Path) -> None:
    good = annotation(1, 1, SQUARE, area=36.0)
    bad = [
        good,  # the same again
        "text",
        annotation(3, 777, SQUARE),
        {**annotation(4, 1, SQUARE), "image_id": None},
        annotation(5, 1, SQUARE, segmentation=[]),
        annotation(6, 1, SQUARE, segmentation=[[1, 1, 2, 2]]),
        annotation(7, 1, [v + 100 for v in SQUARE]),
    ]
    assert repair_file(folder, [good, *bad])["annotations"] == [good]


def test_images(folder: Path) -> None:
    (folder / "cut.png").write_bytes(encode_image(3)[:-20])
    images = [
        image("1", "a.png", height=99),
        image(2, "B.png", width=None),
        image(3, "a.png"),  # listed twice; its objects go to image 1
        image(4, "missing.png"),
        image(5, "cut.png"),
        image(6, "../a.png"),
        {"file_name": "a.png"},
        "text",
    ]
    objects = [annotation(k, k, SQUARE, area=36.0) for k in range(1, 7)]
    document = repair_file(folder, objects, images=images)
    assert document["images"] == [image(1, "a.png"), image(2, "b.png")]
    assert [(a["id"], a["image_id"]) for a in document["annotations"]] == [(1, 1), (2, 2), (3, 1)]


def test_objects_of_an_ambiguous_image_id_are_left_out(folder: Path) -> None:
    """Id 1 is a.png and b.png; b.png is also id 2, of which there is no doubt."""
    images = [image(1, "a.png"), image(1, "b.png"), image(2, "b.png")]
    objects = [annotation(k, image_id, SQUARE, area=36.0) for k, image_id in ((8, 1), (9, 2))]
    document = repair_file(folder, objects, images=images)
    assert document["images"] == [image(2, "b.png")]
    assert [a["id"] for a in document["annotations"]] == [9]


def test_images_of_validation_are_left_out(folder: Path) -> None:
    objects = [annotation(k, k, SQUARE, area=36.0) for k in (1, 2)]
    document = repair_file(folder, objects, without=(0,))
    assert document["images"] == [image(2, "b.png")]
    assert [a["id"] for a in document["annotations"]] == [2]


def test_categories(folder: Path) -> None:
    categories = [
        {"id": "1", "name": "cat", "supercategory": "animal"},
        {"id": 2, "name": "dog"},
        {"id": 2, "name": "again"},
        {"id": 3, "name": "cat"},
        {"id": 4},
        "text",
    ]
    used = [1, 2, 3, 4, 99, None]
    objects = [
        annotation(k + 1, 1, SQUARE, area=36.0, category_id=one, bbox=[2, 3, 6, 5 + k / 9])
        for k, one in enumerate(used)
    ]
    document = repair_file(folder, objects, categories=categories)
    assert document["categories"] == [
        {"id": 1, "name": "cat", "supercategory": "animal"},
        {"id": 2, "name": "dog"},
        {"id": 4, "name": "category 4"},
        {"id": 99, "name": "category 99"},
        {"id": 100, "name": "unknown"},
    ]
    assert [a["category_id"] for a in document["annotations"]] == [1, 2, 1, 4, 99, 100]


@pytest.mark.parametrize("categories", [None, []])
def test_without_categories_numbers_become_names(folder: Path, categories: Any) -> None:
    document = repair_file(folder, [annotation(1, 1, SQUARE, area=36.0)], categories=categories)
    assert document["categories"] == [{"id": 1, "name": "category 1"}]


def test_class_names_of_all_that_is_used(folder: Path) -> None:
    path = folder / "file.json"
    objects = [
        annotation(1, 1, SQUARE, category_id=5),
        annotation(2, 1, SQUARE, category_id="text"),
    ]
    lists = {"images": [image(1, "a.png")], "annotations": objects}
    path.write_text(json.dumps({**lists, "categories": [{"id": 0, "name": "cat"}]}))
    names = index_of(folder, path).category_names
    assert names == {0: "cat", 5: "category 5", 1: "text"}


def test_the_bom_is_left_out(folder: Path) -> None:
    path, target = folder / "bom.json", folder / "repaired.json"
    lists = {"images": [image(1, "a.png")], "annotations": [annotation(1, 1, SQUARE)]}
    text = json.dumps({"info": {"x": 1}, **lists})
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    write_repaired(index_of(folder, path), path, target=target)
    assert json.loads(target.read_bytes())["info"] == {"x": 1}
    assert target.read_bytes().startswith(b"{")


def test_pycocotools_reads_the_copy(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, target = folder / "original.json", folder / "repaired.json"
    objects = [
        annotation(0, 1, SQUARE, segmentation=rle(compressed=True, height=40)),
        annotation(1, 1, SQUARE, segmentation=SQUARE),
    ]
    lists = {"images": [image(1, "a.png")], "annotations": objects}
    path.write_text(json.dumps(lists))
    write_repaired(index_of(folder, path), path, target=target)
    coco = COCO(str(target))
    assert [coco.annToMask(a).sum() for a in coco.loadAnns(coco.getAnnIds())] == [36, 36]


def test_nothing_is_overwritten(folder: Path) -> None:
    path, target = folder / "original.json", folder / "repaired.json"
    target.write_text("mine")
    lists = {"images": [image(1, "a.png")], "annotations": [annotation(1, 1, SQUARE)]}
    path.write_text(json.dumps(lists))
    with pytest.raises(ConfigError, match="exists"):
        write_repaired(index_of(folder, path), path, target=target)
    assert target.read_text() == "mine"


def test_a_set_without_objects_is_not_written(folder: Path) -> None:
    path, target = folder / "original.json", folder / "new" / "repaired.json"
    crowd = annotation(2, 2, SQUARE, iscrowd=1)
    objects = [annotation(1, 1, SQUARE), crowd]
    lists = {"images": [image(1, "a.png"), image(2, "b.png")], "annotations": objects}
    path.write_text(json.dumps(lists))
    with pytest.raises(DataError, match="no usable object"):
        write_repaired(index_of(folder, path), path, target=target, without=np.array([0]))
    assert not target.parent.exists()


def test_the_box_of_what_is_drawn_of_an_outline_with_a_spike(folder: Path) -> None:
    """The outline reaches down to 18, the pixels that it covers only to 9."""
    spike = [2.0, 3.0, 8.0, 3.0, 8.0, 9.0, 2.0, 9.0, 2.0, 18.0, 2.0, 9.0]
    assert repair_object(folder, segmentation=[spike], bbox="absent")["bbox"] == BOX


numbers = st.floats(-6, 36) | st.integers(-6, 36) | st.sampled_from([NAN, 1e9])
polygons = st.lists(st.lists(numbers, min_size=4, max_size=12), min_size=0, max_size=3)
boxes = st.lists(st.floats(-6, 36) | st.just(NAN), min_size=4, max_size=4) | st.none()


@given(
    st.lists(
        st.fixed_dictionaries(
            {"segmentation": polygons, "bbox": boxes, "area": numbers},
            optional={"id": st.integers(0, 3), "category_id": st.integers(0, 2)},
        ),
        max_size=6,
    )
)
def test_any_set_is_clean_once_repaired(
    tmp_path_factory: pytest.TempPathFactory, objects: list[dict[str, Any]]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "a.png").write_bytes(encode_image(0))
    entries = [{"image_id": 1, **entry} for entry in objects]
    repair_file(folder, [*entries, annotation(2, 1, SQUARE)], images=[image(1, "a.png")])
