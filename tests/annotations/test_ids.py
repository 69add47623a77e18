"""Ids, categories and class names as tools write them: used, renumbered, said."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.broken_coco import SQUARE, encode_image, rle
from helpers.coco_files import annotation
from samft.annotations.json_reader import to_id, to_key
from samft.annotations.problems import FACT
from samft.coco.index import CocoIndex, index_file
from samft.coco.repair import write_repaired
from samft.coco.subset import find_categories
from samft.errors import DataError

THING = [{"id": 1, "name": "thing"}]


def build_index(
    folder: Path, annotations: list[Any], *, images: tuple[Any, Any] = (1, 2), categories: Any
) -> CocoIndex:
    """A file of images a.png and b.png with these ids; its repaired copy has only facts."""
    for number, name in enumerate(("a.png", "b.png")):
        (folder / name).write_bytes(encode_image(number))
    sizes = {"height": 20, "width": 30}
    entries = [
        {"id": one, "file_name": name, **sizes}
        for one, name in zip(images, ("a.png", "b.png"), strict=True)
    ]
    document = {"images": entries, "annotations": annotations, "categories": categories}
    path, target = folder / "a.json", folder / "fixed" / "a.json"
    path.write_text(json.dumps({k: v for k, v in document.items() if v is not None}))
    index = index_file(path, folder, cache=folder / "cache")
    write_repaired(index, path, target=target)
    again = index_file(target, folder, cache=folder / "cache")
    assert [line for line in again.problems.lines() if not line.startswith(FACT)] == []
    assert again.image_ids.tolist() == index.image_ids.tolist()
    assert again.object_ids.tolist() == index.object_ids.tolist()
    assert names_of(again) == names_of(index)
    target.unlink()
    return index


def names_of(index: CocoIndex) -> list[str]:
    """The class of each object."""
    return [index.category_names[one] for one in index.categories.tolist()]


def square(object_id: Any, image_id: Any, category_id: Any = 1) -> dict[str, Any]:
    return annotation(object_id, image_id, SQUARE, category_id=category_id, area=36.0)


@pytest.mark.parametrize(
    ("encoding", "codes"),
    [
        ("utf-8", {}),
        ("utf-16", {"json-not-standard": 1}),
        ("cp1252", {"json-not-utf8": 1}),
    ],
)
def test_names_are_read_in_the_encoding_of_the_program_that_wrote_them(
    tmp_path: Path, encoding: str, codes: dict[str, int]
) -> None:
    (tmp_path / "größe.png").write_bytes(encode_image(0))
    document = {
        "images": [{"id": 1, "file_name": "größe.png", "height": 20, "width": 30}],
        "annotations": [square(1, 1)],
        "categories": [{"id": 1, "name": "Käfer"}],
    }
    path = tmp_path / "a.json"
    path.write_text(json.dumps(document, ensure_ascii=False), encoding=encoding)
    index = index_file(path, tmp_path, cache=tmp_path / "cache")
    assert names_of(index) == ["Käfer"]
    assert {code: issue.count for code, _, issue in index.problems} == codes


@pytest.mark.parametrize(
    ("raw", "number"),
    [
        (5, 5), (" 5 ", 5), ("-5", -5), ("5.0", 5), (5.0, 5), ("007", 7), (2**63 - 1, 2**63 - 1),
        ("1_000", None), ("5.5", None), (2**63, None), (5.5, None), ("", None), ("٣", None),
        (None, None), ([5], None), (float("nan"), None), ("9" * 5000, None),
    ],
)  # fmt: skip
def test_whole_numbers_are_read(raw: Any, number: int | None) -> None:
    assert to_id(raw) == number


def test_other_ids_are_compared_as_text() -> None:
    assert to_key("0000001_02999_d") == "0000001_02999_d"
    assert to_key(2**70) == to_key(str(2**70)) == to_key(float(2**70)) == str(2**70)
    assert to_key(1.5) == to_key("1.5") == "1.5"
    assert [to_key(raw) for raw in (None, " ", [1], {}, float("inf"))] == [None] * 5


@pytest.mark.parametrize(
    "images", [("a_1", "b_2"), (2**70, 2**71), (1.5, 2.5), ("1_0", "10_"), ("x", 1)]
)
def test_image_ids_of_any_kind_are_used(tmp_path: Path, images: tuple[Any, Any]) -> None:
    objects = [square(1, images[0]), square(2, images[1]), square(3, images[1])]
    index = build_index(tmp_path, objects, images=images, categories=THING)
    assert index.image_ids.tolist() == ([2, 1] if images[0] == "x" else [1, 2])
    assert index.first_object.tolist() == [0, 1, 3]
    assert index.problems["id-renumbered"] == (1 if images[0] == "x" else 2)
    assert index.image_ids_as_written() == [to_key(one) for one in images]


@pytest.mark.parametrize("field", ["coco_url", "filename"])
def test_images_without_a_file_name_are_found_by_what_names_them(
    tmp_path: Path, field: str
) -> None:
    place = "http://images.cocodataset.org/train2017/" if field == "coco_url" else ""
    (tmp_path / "a.png").write_bytes(encode_image(0))
    document = {"images": [{"id": 1, field: f"{place}a.png"}], "annotations": [square(1, 1)]}
    (tmp_path / "a.json").write_text(json.dumps(document))  # as LVIS: only the URL of COCO
    index = index_file(tmp_path / "a.json", tmp_path, cache=tmp_path / "cache")
    assert index.file_names() == ["a.png"] and index.object_ids.tolist() == [1]
    target = tmp_path / "fixed.json"
    write_repaired(index, tmp_path / "a.json", target=target)
    assert json.loads(target.read_text())["images"][0]["file_name"] == "a.png"


@pytest.mark.parametrize("ids", [("a", "b", "c"), (2**64, 2**65, 2**66), (0.5, 1.5, 2.5)])
def test_object_ids_of_any_kind_are_used(tmp_path: Path, ids: tuple[Any, ...]) -> None:
    objects = [square(ids[0], 1), square(ids[1], 1), square(ids[1], 1), square(ids[1], 2)]
    objects.append(square(2, 2))
    index = build_index(tmp_path, objects, categories=THING)
    # The third repeats the second; the fourth differs from it.
    assert sorted(index.object_ids.tolist()) == [1, 2, 3, 4]
    assert index.problems["annotation-duplicate"] == 1
    assert index.problems["annotation-id-twice"] == 1


def test_equal_objects_of_other_ids_are_counted(tmp_path: Path) -> None:
    moved = [value + 1 for value in SQUARE]
    rle_of_square = {"segmentation": rle(compressed=True)}
    objects = [
        *(square(1, 1), square(2, 2), square(3, 1), square(4, 1, 2), square(5, 1)),
        *(annotation(6, 1, moved, category_id=1), {**square(7, 1), **rle_of_square}),
        *({**square(8, 2), **rle_of_square}, {**square(9, 2), **rle_of_square}),
    ]
    index = build_index(tmp_path, objects, categories=THING)
    assert index.problems["object-twice"] == 3
    (*_, last) = index.problems.issues["object-twice"].examples
    assert last == "objects 8 and 9" and len(index.object_ids) == 9


@pytest.mark.parametrize(
    ("categories", "used", "expected"),
    [
        (THING, ["thing", 1], ["thing", "thing"]),
        (THING, ["dog", 1], ["dog", "thing"]),
        (None, ["dog", "cat"], ["dog", "cat"]),
        (None, [3, 7], ["category 3", "category 7"]),
        ([], [None, 7], ["unknown", "category 7"]),
        (THING, [1, 99], ["thing", "category 99"]),
        (["cat", "dog"], [0, 1], ["cat", "dog"]),
        (["cat", "dog"], [1, 2], ["cat", "dog"]),
        (["cat", "dog"], ["dog", "cat"], ["dog", "cat"]),
        ({"1": "cat", "2": "dog"}, [1, 2], ["cat", "dog"]),
        ({"cat": 4, "dog": 5}, [4, 5], ["cat", "dog"]),
        ({"4": {"name": "cat"}, "5": {"name": "dog"}}, [4, 5], ["cat", "dog"]),
        ({"id": 1, "name": "cat"}, [1, 1], ["cat", "cat"]),
        ([{"id": "c", "name": "cat"}, {"id": "d", "name": "dog"}], ["d", "cat"], ["dog", "cat"]),
        ([{"id": 2**80, "name": "cat"}, {"id": 1, "name": "dog"}], [2**80, 1], ["cat", "dog"]),
        ([{"id": 1, "name": 5}], [1, 1], ["5", "5"]),
        ("cat", [1, 1], ["category 1", "category 1"]),
    ],
)
def test_classes_are_found(
    tmp_path: Path, categories: Any, used: list[Any], expected: list[str]
) -> None:
    objects = [square(k, k, one) for k, one in enumerate(used, start=1)]
    assert names_of(build_index(tmp_path, objects, categories=categories)) == expected


def test_a_list_of_names_says_from_which_number(tmp_path: Path) -> None:
    objects = [square(1, 1, 0), square(2, 2, 1)]
    index = build_index(tmp_path, objects, categories=["cat", "dog"])
    (example,) = index.problems.issues["categories-table"].examples
    assert example == "2 names, numbered from 0"


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("cup, glass", {2}),
        ("cup,glass", {1, 3}),
        ("glass,cup, glass", {2, 3}),
        ("cup, glass,cup", {1, 2}),
        (" cup ,", {1}),
        ("", None),
    ],
)
def test_names_may_have_commas(tmp_path: Path, flag: str, expected: set[int] | None) -> None:
    names = ["cup", "cup, glass", "glass"]
    categories = [{"id": k, "name": name} for k, name in enumerate(names, start=1)]
    index = build_index(tmp_path, [square(1, 1)], categories=categories)
    assert find_categories(index, flag.split(",")) == expected


def test_a_name_that_is_none_is_refused(tmp_path: Path) -> None:
    index = build_index(tmp_path, [square(1, 1)], categories=THING)
    with pytest.raises(DataError, match="no class 'thin' among thing.* 'thing'"):
        find_categories(index, ["thin"])
