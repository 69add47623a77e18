import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools import mask as mask_utils

from helpers.broken_coco import SQUARE, encode_image, write_broken
from helpers.coco_files import annotation, write_coco, write_json
from samft.annotations import entries, segmentation
from samft.annotations.json_reader import value_of
from samft.annotations.problems import BAD_IMAGES, KINDS, NO_MASKS
from samft.annotations.segmentation import decode_cropped
from samft.coco.index import index_file
from samft.coco.layout import find_split
from samft.coco.subset import (
    CocoSubset,
    find_shared,
    find_siblings,
    read_coco,
    select_objects,
    split_by_hash,
)
from samft.commands import shell_command
from samft.errors import DataError
from samft.images.decoder import open_image


def _write_image(
    folder: Path, name: str = "a.png", height: int = 20, width: int = 30
) -> dict[str, Any]:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.zeros((height, width, 3), np.uint8))
    return {"id": 1, "file_name": name, "height": height, "width": width}


def _read_entries(
    folder: Path, annotations: list[Any], images: list[Any] | None = None, **options: Any
) -> CocoSubset:
    images = [_write_image(folder)] if images is None else images
    return read_coco(write_json(folder / "a.json", images, annotations), folder, **options)


def _names(subset: CocoSubset) -> list[str]:
    return [subset.file_name(i) for i in range(subset.num_images)]


def _ids(subset: CocoSubset) -> list[int]:
    ids: list[int] = subset.index.object_ids[subset.objects].tolist()
    return ids


def _boxes(subset: CocoSubset) -> list[list[float]]:
    boxes: list[list[float]] = subset.index.boxes[subset.objects].tolist()
    return boxes


def test_index_groups_objects_by_image(tmp_path: Path) -> None:
    subset = read_coco(write_coco(tmp_path, 6, objects=(1, 0, 3)), tmp_path / "train")
    assert _names(subset) == [f"image_{i}.png" for i in (0, 2, 3, 5)]
    assert [subset.image_id(i) for i in range(4)] == [10, 12, 13, 15]
    assert subset.first_object.tolist() == [0, 1, 4, 5, 8]
    assert subset.counts == {"image-without-objects": 2}
    assert [subset.size(i) for i in range(4)] == [(48, 64), (40, 40), (48, 64), (40, 40)]
    assert subset.path(1) == tmp_path / "train" / "image_2.png"
    assert (subset.num_images, subset.num_objects) == (4, 8)
    assert subset.objects_of(1).tolist() == [1, 2, 3]


def test_annotations_of_an_image_may_be_scattered(tmp_path: Path) -> None:
    images = [_write_image(tmp_path), {**_write_image(tmp_path, "b.png"), "id": 2}]
    entries = [annotation(k, image_id, SQUARE) for k, image_id in ((1, 2), (2, 1), (3, 2), (4, 1))]
    subset = _read_entries(tmp_path, entries, images)
    assert _names(subset) == ["a.png", "b.png"]
    assert _ids(subset) == [2, 4, 1, 3] and _boxes(subset)[0] == [2, 3, 8, 9]
    assert subset.index.positions.tolist() == [1, 3, 0, 2]


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, int]]]:
    root = tmp_path_factory.mktemp("broken") / "data"
    return root, write_broken(root)


@pytest.mark.parametrize("split", ["train", "val"])
def test_everything_wrong_is_found_and_counted(
    broken: tuple[Path, dict[str, dict[str, int]]], split: str
) -> None:
    root, expected = broken
    index = index_file(root / split / "_annotations.coco.json", root / split, root=root)
    counts = {code: issue.count for code, _, issue in index.problems}
    wanted = {code: n for code, n in expected[split].items() if code in KINDS}
    wanted.pop("image-in-train-and-val", None)  # which takes both splits to see
    assert counts == wanted
    subset = select_objects(index)
    assert subset.num_objects == expected[split]["good_objects"]
    assert subset.num_images == expected[split]["good_images"]
    assert all(issue.examples for _, _, issue in index.problems)


def test_at_least_thirty_kinds(broken: tuple[Path, dict[str, dict[str, int]]]) -> None:
    _, expected = broken
    codes = {code for counts in expected.values() for code in counts if code in KINDS}
    assert len(codes) > 60
    # tests/annotations/test_frame.py has those of outlines in another frame.
    codes |= {code for code in KINDS if code.startswith("frame-")}
    codes |= {"rle-size-swapped", "rle-by-rows", "boxes-unlike-masks"}
    # Of those that are not in there, each has a test of its own.
    assert set(KINDS) - codes == {
        "json-missing",
        "json-unreadable",
        "json-not-coco",
        "json-not-utf8",
        *NO_MASKS,
        "categories-table",
        "image-id-ambiguous",
        "image-ambiguous",
        "image-not-a-file",
        "image-copies-in-train-and-val",
        "image-in-general-set",
        "split-name",
        "objects-not-chosen",
        "object-in-no-window",
    }


def test_errors_are_refused_and_broken_images_may_be_skipped(
    broken: tuple[Path, dict[str, dict[str, int]]],
) -> None:
    root, expected = broken
    files = root / "train" / "_annotations.coco.json", root / "train"
    with pytest.raises(DataError) as error:
        read_coco(*files, root=root)
    # tests/images/test_folder.py has the others.
    bad_images = BAD_IMAGES - {"image-ambiguous", "image-not-a-file"}
    for code in bad_images:
        assert f"{code}, {expected['train'][code]}:" in str(error.value)
    assert shell_command("check") in str(error.value) and "--on_bad_image skip" in str(error.value)
    subset = read_coco(*files, root=root, on_bad_image="skip")
    assert subset.num_objects == expected["train"]["good_objects"]
    assert set(subset.index.bad_images.values()) == bad_images
    assert (
        subset.counts["image-missing"] == 1
        and subset.counts["mask-missing"] == expected["train"]["mask-missing"]
    )


def test_usable_objects_are_whole(broken: tuple[Path, dict[str, dict[str, int]]]) -> None:
    root, _ = broken
    files = root / "train" / "_annotations.coco.json", root / "train"
    subset = read_coco(*files, root=root, on_bad_image="skip")
    assert len(set(_ids(subset))) == subset.num_objects
    for i in range(subset.num_images):
        assert open_image(subset.path(i)).size == subset.size(i) == (20, 30)
        for k in subset.objects_of(i):
            crop = decode_cropped(subset.index.segmentations[int(k)], (20, 30))
            assert np.abs(subset.index.boxes[k] - crop.extent).max() < 3
            if subset.index.areas[k] < 40:
                assert subset.index.areas[k] == crop.mask.sum()


@pytest.mark.parametrize(
    "bbox",
    [
        None,
        [],
        [0, 0, 0, 5],
        [1, 2, -3, 4],
        ["x", 0, 1, 1],
        [float("nan"), 0, 5, 5],
        [1e9, 1e9, 5, 5],
        [0, 0, 1e9, 5],
        [40, 0, 5, 5],
        {"x": 1},
        5,
        [10**400, 0, 5, 5],
    ],
)
def test_an_unusable_box_is_taken_from_the_mask(tmp_path: Path, bbox: Any) -> None:
    subset = _read_entries(tmp_path, [annotation(1, 1, SQUARE, bbox=bbox)])
    assert _boxes(subset) == [[2, 3, 8, 9]] and subset.counts == {}


def test_a_usable_box_stays_as_annotated(tmp_path: Path) -> None:
    entries = [
        annotation(1, 1, SQUARE, bbox=[-0.5, 0.25, 31, 20]),
        annotation(2, 1, [0.0, 0, 30, 0, 30, 20, 0, 20], bbox=[-0.5, 0.25, 31, 20]),
        annotation(3, 1, SQUARE, bbox=[1, 2, 7, 8]),
    ]
    subset = _read_entries(tmp_path, entries)
    # The first has less than half in common with its mask.
    assert _boxes(subset) == [[2, 3, 8, 9], [-0.5, 0.25, 30.5, 20.25], [1, 2, 8, 10]]


def test_crowds_are_left_out_unless_alone(tmp_path: Path) -> None:
    crowd = annotation(1, 1, SQUARE, iscrowd=1)
    subset = _read_entries(tmp_path, [crowd, annotation(2, 1, SQUARE)])
    assert _ids(subset) == [2] and subset.counts == {"crowd": 1}
    alone = _read_entries(tmp_path, [crowd])
    assert _ids(alone) == [1] and alone.counts == {} and alone.index.problems["crowd-used"] == 1


def test_ids_are_made_unique(tmp_path: Path) -> None:
    other = annotation(1, 1, [v + 4 for v in SQUARE])
    last = annotation(2**63 - 1, 1, SQUARE)
    without = {key: value for key, value in other.items() if key != "id"}
    entries = [annotation(1, 1, SQUARE), {**other, "image_id": "1"}, last, without, other, other]
    subset = _read_entries(tmp_path, entries)
    # The last is what the one before it is; that one and the second differ from the first.
    assert _ids(subset) == [1, 2, 2**63 - 1, 3, 4]
    assert subset.index.problems["annotation-id-twice"] == 2
    assert subset.index.problems["annotation-duplicate"] == 1


def test_objects_that_share_an_id_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Any] = []

    def count(raw: Any) -> Any:
        read.append(raw)
        return value_of(raw)

    monkeypatch.setattr(entries, "value_of", count)
    objects = [annotation(1, 1, [v + k / 100 for v in SQUARE]) for k in range(50)]
    assert len(_ids(_read_entries(tmp_path, objects))) == 50
    assert len(read) == 50


def test_an_rle_that_has_nothing_to_do_with_the_image_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge = {"size": [13_000, 13_000], "counts": [5, 10, 13_000**2 - 15]}
    large = [2.0, 2, 28, 2, 28, 18, 2, 18]
    objects = [annotation(1, 1, large), annotation(2, 1, SQUARE, segmentation=huge)]
    monkeypatch.setattr(segmentation, "decode_cropped", pytest.fail)  # by its numbers alone
    subset = _read_entries(tmp_path, objects)
    assert _ids(subset) == [1] and subset.counts == {"rle-size-foreign": 1}


def test_masks_without_a_pixel_in_the_image_are_counted(tmp_path: Path) -> None:
    far = [v + 100 for v in SQUARE]
    tiny = [2.1, 2.1, 2.2, 2.1, 2.2, 2.2]
    one_pixel = [4.0, 4, 5, 4, 5, 5, 4, 5]
    entries = [
        annotation(k + 1, 1, polygon) for k, polygon in enumerate((SQUARE, far, tiny, one_pixel))
    ]
    subset = _read_entries(tmp_path, entries)
    assert _ids(subset) == [1, 4]
    assert subset.counts == {"mask-outside": 1, "mask-without-pixels": 1}
    assert subset.index.areas.tolist() == [36, 1]


def test_the_files_size_counts_where_the_json_is_wrong(tmp_path: Path) -> None:
    image = _write_image(tmp_path, height=200, width=300)
    far = [v + 150 for v in SQUARE]
    for size in ({"height": 20, "width": 30}, {"height": None, "width": 0}, {"height": 10**99}):
        subset = _read_entries(tmp_path, [annotation(1, 1, far)], [{**image, **size}])
        assert _boxes(subset) == [[152, 153, 158, 159]] and subset.size(0) == (200, 300)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"images": [],\n "annotations": [', ["json-invalid", "line 2", "column"]),
        ("", ["not valid JSON"]),
        ("[1, 2]", ["'images'"]),
        ('{"images": []}', ["'annotations'"]),
        ('{"images": {}, "annotations": []}', ["'images'"]),
        ("\udcff", ["not valid JSON"]),
        ("\x1f\udc8b\x08", ["json-invalid", "compressed"]),
        ("PK\x03\x04", ["json-invalid", "compressed"]),
        ("[" * 100_000, ["not valid JSON"]),
        ('{"images": [], "annotations": []}', ["no-objects", "no annotations"]),
        ('{"images": [5], "annotations": []}', ["no-objects"]),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, content: str, expected: list[str]) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(DataError) as error:
        read_coco(path, tmp_path)
    code = getattr(error.value, "code", "")
    for word in ["broken.json", *expected]:
        assert word in f"{error.value} {code}"


def test_paths_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no annotation file .*gone\.json") as error:
        read_coco(tmp_path / "gone.json", tmp_path)
    assert getattr(error.value, "code", "") == "json-missing"
    with pytest.raises(DataError, match=str(tmp_path)) as error:
        read_coco(tmp_path, tmp_path)
    assert getattr(error.value, "code", "") == "json-unreadable"


def test_missing_images_are_counted_and_named(tmp_path: Path) -> None:
    path = write_coco(tmp_path, 6)
    for i in range(1, 6):
        (path.parent / f"image_{i}.png").unlink()
    expected = r"image-missing, 5: .*image_1.png \(4 objects\), .*image_3.png .*, \.\.\."
    with pytest.raises(DataError, match=expected):
        read_coco(path, path.parent)
    assert read_coco(path, path.parent, on_bad_image="skip").num_images == 1


def test_an_image_id_for_two_files_is_refused(tmp_path: Path) -> None:
    images = [_write_image(tmp_path), _write_image(tmp_path, "b.png")]
    with pytest.raises(DataError, match=r"image-id-ambiguous, 1: .*image 1: 'a.png' and 'b.png'"):
        _read_entries(tmp_path, [annotation(1, 1, SQUARE)], images)


def _write_three_classes(folder: Path) -> Path:
    images = [{**_write_image(folder, f"{i}.png"), "id": i} for i in range(4)]
    entries = [
        annotation(1, 0, SQUARE, category_id=1),
        annotation(2, 0, SQUARE, category_id=2),
        annotation(3, 1, SQUARE, category_id=3),
        annotation(4, 2, [v * 2 for v in SQUARE], category_id=1),
    ]
    path = write_json(folder / "a.json", images, entries)
    document = json.loads(path.read_text())
    names = ("cat", "dog", "cat")
    document["categories"] = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize(
    ("names", "area", "ids", "left"),
    [
        ((), 0, [1, 2, 3, 4], {"image-without-objects": 1}),
        (("dog",), 0, [2], {"image-without-objects": 3, "objects-not-chosen": 3}),
        # Two categories of one name are one class.
        (("cat",), 0, [1, 3, 4], {"image-without-objects": 1, "objects-not-chosen": 1}),
        (("cat", "dog"), 37, [4], {"image-without-objects": 3, "objects-not-chosen": 3}),
        ((), 36, [1, 2, 3, 4], {"image-without-objects": 1}),
    ],
)
def test_classes_and_sizes_are_chosen(
    tmp_path: Path, names: Sequence[str], area: float, ids: list[int], left: dict[str, int]
) -> None:
    subset = read_coco(
        _write_three_classes(tmp_path), tmp_path, category_names=names, min_mask_area=area
    )
    assert _ids(subset) == ids and subset.counts == left
    assert subset.num_images == len({(0, 0, 0, 1, 2)[k] for k in ids})


def test_choosing_nothing_or_an_unknown_class_is_refused(tmp_path: Path) -> None:
    path = _write_three_classes(tmp_path)
    with pytest.raises(DataError, match=r"no class 'dogs' among cat, dog\. Did you mean 'dog'"):
        read_coco(path, tmp_path, category_names=["dogs"])
    with pytest.raises(DataError, match="no object is left"):
        read_coco(path, tmp_path, min_mask_area=1000)


def test_a_selection_keeps_its_objects(tmp_path: Path) -> None:
    subset = read_coco(write_coco(tmp_path, 6, objects=(1, 0, 3)), tmp_path / "train")
    part = subset.select([3, 0])
    assert _names(part) == ["image_5.png", "image_0.png"] and part.counts == {}
    assert part.objects.tolist() == [5, 6, 7, 0] and part.first_object.tolist() == [0, 3, 4]
    assert subset.select([]).num_objects == 0


def test_split_by_hash_depends_on_names_only(tmp_path: Path) -> None:
    path = write_coco(tmp_path, 20)
    subset = read_coco(path, path.parent)
    train, val = split_by_hash(subset, 0.2)
    assert (train.num_images, val.num_images) == (16, 4)
    assert sorted(_names(train) + _names(val)) == sorted(_names(subset))
    assert train.num_objects + val.num_objects == subset.num_objects
    reverse_train, reverse_val = split_by_hash(subset.select(range(19, -1, -1)), 0.2)
    assert sorted(_names(reverse_val)) == sorted(_names(val))
    row = _names(subset).index(val.file_name(0))
    assert val.objects_of(0).tolist() == subset.objects_of(row).tolist()


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_split_by_hash_leaves_both_sides_an_image(tmp_path: Path, share: float) -> None:
    path = write_coco(tmp_path, 3)
    subset = read_coco(path, path.parent)
    assert {part.num_images for part in split_by_hash(subset, share)} == {1, 2}
    with pytest.raises(DataError, match="at least two"):
        split_by_hash(subset.select([0]), share)


def _copies(tmp_path: Path, names: list[str]) -> CocoSubset:
    images = [{**_write_image(tmp_path, name), "id": k} for k, name in enumerate(names)]
    square = [annotation(k + 1, k, [1, 1, 9, 1, 9, 9, 1, 9]) for k in range(len(names))]
    return read_coco(write_json(tmp_path / "a.json", images, square), tmp_path)


def _rf(name: str, k: int) -> str:
    return f"{name}_jpg.rf.{k:032x}.png"


def test_copies_of_a_picture_stay_on_one_side(tmp_path: Path) -> None:
    names = [_rf(f"p{k % 7}", k) for k in range(21)] + ["a.png", "b.png"]
    subset = _copies(tmp_path, names)
    train, val = split_by_hash(subset, 0.3, group_by="auto")
    originals = [{name.split(".rf.")[0] for name in _names(part)} for part in (train, val)]
    assert not originals[0] & originals[1]
    assert train.num_images + val.num_images == 23
    assert abs(val.num_images - 7) <= 2  # half a group
    # Without groups, as before: by names alone.
    _, alone = split_by_hash(subset, 0.3)
    by_hash = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    assert set(_names(alone)) == set(by_hash[:7])
    assert len(find_siblings(train, alone, group_by="auto")) > 0
    assert len(find_siblings(train, val, group_by="auto")) == 0


@pytest.mark.parametrize(
    ("group_by", "expected"), [("folder", 2), (r"(\w+)_frame", 2), ("none", 6), ("auto", 6)]
)
def test_groups_are_folders_or_what_a_pattern_finds(
    tmp_path: Path, group_by: str, expected: int
) -> None:
    names = [f"{video}/{video}_frame{k}.png" for video in "vw" for k in range(3)]
    train, val = split_by_hash(_copies(tmp_path, names), 0.5, group_by=group_by)
    videos = [{name[0] for name in _names(part)} for part in (train, val)]
    assert len(videos[0]) == len(videos[1]) == (1 if expected == 2 else len(videos[0]))
    assert (videos[0] | videos[1]) == {"v", "w"}
    assert train.num_images == val.num_images == 3


def test_one_group_alone_cannot_be_shared_out(tmp_path: Path) -> None:
    subset = _copies(tmp_path, ["a.png", "b.png"])
    with pytest.raises(DataError, match="one group by group_by folder"):
        split_by_hash(subset, 0.5, group_by="folder")


def test_names_that_are_no_utf8_are_kept_and_impossible_ones_counted(tmp_path: Path) -> None:
    names = [os.fsdecode(b"caf\xe9.png"), "\ud800.png", "x" * 300 + ".png", "y" * 300 + "/a.png"]
    _write_image(tmp_path, "a.png")
    (tmp_path / "a.png").rename(tmp_path / names[0])
    images = [{"id": k, "file_name": name} for k, name in enumerate(names)]
    square = [annotation(k + 1, k, [1, 1, 9, 1, 9, 9, 1, 9]) for k in range(4)]
    path = write_json(tmp_path / "a.json", images, square)
    for _ in range(2):  # the second time from the index
        subset = read_coco(path, tmp_path, on_bad_image="skip")
        assert _names(subset) == names[:1]
        assert subset.index.file_names() == names
        assert subset.counts["image-missing"] == 3
    with pytest.raises(DataError, match="image-missing, 3"):
        read_coco(path, tmp_path)


def test_images_of_equal_size_and_start_are_compared_as_a_whole(tmp_path: Path) -> None:
    # Uncompressed, with a black border of more than 64 KiB: equal to the last pixels.
    subsets = []
    for split, values in (("train", (1, 2, 3)), ("val", (9, 3))):
        folder = tmp_path / split
        images = []
        for k, value in enumerate(values):
            images.append({**_write_image(folder, f"{k}.bmp", 200, 300), "id": k})
            content = bytearray((folder / f"{k}.bmp").read_bytes())
            content[-300:] = bytes([value]) * 300
            (folder / f"{k}.bmp").write_bytes(content)
        square = [annotation(k + 1, k, [1, 1, 9, 1, 9, 9, 1, 9]) for k in range(len(values))]
        subsets.append(read_coco(write_json(folder / "a.json", images, square), folder))
    assert find_shared(*subsets).tolist() == [2]
    for subset in subsets:  # what cannot be read is equal to nothing
        subset.path(subset.num_images - 1).unlink()
    assert find_shared(*subsets).tolist() == []


def test_images_in_both_splits_are_found_by_content(tmp_path: Path) -> None:
    for split, names in (("train", "abcd"), ("val", "xyz")):
        for name in names:
            _write_image(tmp_path / split, f"{name}.png")
    (tmp_path / "train" / "b.png").write_bytes(encode_image(1))
    (tmp_path / "train" / "d.png").write_bytes(encode_image(2))
    (tmp_path / "val" / "y.png").write_bytes(encode_image(2))
    (tmp_path / "val" / "z.png").write_bytes(encode_image(3))
    cv2.imwrite(str(tmp_path / "val" / "x.png"), np.zeros((21, 30, 3), np.uint8))
    indices = []
    for split, names in (("train", "abcd"), ("val", "xyz")):
        images = [{"id": i, "file_name": f"{name}.png"} for i, name in enumerate(names)]
        entries = [annotation(i + 1, i, SQUARE) for i in range(len(names))]
        indices.append(_read_entries(tmp_path / split, entries, images))
    assert find_shared(*indices).tolist() == [3]
    assert find_shared(*indices[::-1]).tolist() == [1]
    assert find_shared(indices[0], indices[0]).tolist() == [0, 1, 2, 3]


def test_an_index_travels_as_a_path(tmp_path: Path) -> None:
    subset = read_coco(write_coco(tmp_path, 40), tmp_path / "train").select([3, 1])
    content = pickle.dumps(subset)
    assert len(content) < 2000
    back = pickle.loads(content)
    assert _names(back) == _names(subset) and _boxes(back) == _boxes(subset)


AUDIT = """
import os, sys
from pathlib import Path
opened = []
sys.addaudithook(lambda event, given: opened.append(given[0]) if event == "open" else None)
from samft.coco.subset import read_coco
root = Path(sys.argv[1])
subset = read_coco(root / "train/a.json", root / "train", root=root, on_bad_image="skip")
print(subset.num_images, subset.counts["image-outside"])
names = [os.path.realpath(name) for name in opened if isinstance(name, (str, bytes, Path))]
outside = [name for name in names if "secret" in str(name) or "passwd" in str(name)]
print(str(root / "train" / "a.png") in names, outside)
"""


def test_what_lies_outside_is_never_opened(tmp_path: Path) -> None:
    root = tmp_path / "data"
    images = [_write_image(root / "train"), {"id": 2, "file_name": "../../etc/passwd"}]
    _write_image(tmp_path, "secret.png")
    (root / "train" / "link.png").symlink_to(tmp_path / "secret.png")
    outside = ("/etc/passwd", "../../secret.png", "link.png", "..\\..\\secret.png")
    images += [{"id": k, "file_name": name} for k, name in enumerate(outside, 3)]
    entries = [annotation(k, k, SQUARE) for k in range(1, 7)]
    write_json(root / "train" / "a.json", images, entries)
    command = [sys.executable, "-c", AUDIT, str(root)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.stdout.splitlines() == ["1 5", "True []"], ended.stderr


def test_reading_imports_no_torch() -> None:
    code = "import sys, samft.coco.subset, samft.coco.layout; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


REAL = {
    ("hbn_flakes", "train"): (177, 1601, {"image-without-objects": 3}),
    ("hbn_flakes", "val"): (21, 277, {}),
    ("hbn_flakes", "test"): (10, 87, {"mask-missing": 1}),
    ("mushrooms", "train"): (78, 10335, {}),
    ("mushrooms", "val"): (6, 702, {}),
    ("coco_open104", "train2017"): (47, 518, {"crowd": 6}),
    ("coco_open104", "val"): (55, 510, {"crowd": 7, "image-without-objects": 2}),
    ("fruits_nuts", ""): (18, 165, {}),
}


@pytest.mark.parametrize("name", REAL, ids="/".join)
def test_real_datasets_load_with_known_counts(data_root: Path, name: tuple[str, str]) -> None:
    root = data_root / name[0]
    explicit = root / "data" / "trainval.json", root / "data" / "images"
    subset = read_coco(*(find_split(root, name[1]) if name[1] else explicit))
    assert (subset.num_images, subset.num_objects, subset.counts) == REAL[name]


@pytest.mark.parametrize("name", ["hbn_flakes/val", "hbn_flakes/train", "coco_open104/val"])
def test_real_masks_are_pycocotools_at_the_real_size(data_root: Path, name: str) -> None:
    annotations, folder = find_split(data_root / name.split("/")[0], name.split("/")[1])
    subset = read_coco(annotations, folder)
    document = json.loads(annotations.read_text())
    entries = {entry["id"]: entry for entry in document["annotations"]}
    assert subset.num_images and not subset.index.bad.any()
    sizes = {image["id"]: (image["height"], image["width"]) for image in document["images"]}
    differing = [i for i in range(subset.num_images) if sizes[subset.image_id(i)] != subset.size(i)]
    # Of 71 such images, one has no objects.
    assert len(differing) == (70 if name == "hbn_flakes/train" else 0)
    for i in (differing or range(subset.num_images))[:6]:
        size = open_image(subset.path(i)).size
        for k in subset.objects_of(i):
            raw = entries[int(subset.index.object_ids[k])]["segmentation"]
            expected = mask_utils.decode(mask_utils.merge(mask_utils.frPyObjects(raw, *size)))
            crop = decode_cropped(subset.index.segmentations[int(k)], size)
            x0, y0, x1, y1 = crop.extent
            np.testing.assert_array_equal(expected[y0:y1, x0:x1], crop.mask)
            assert expected.sum() == crop.mask.sum()
