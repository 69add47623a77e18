import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools import mask as mask_utils

from coco_files import annotation, write_coco, write_json
from samft.coco import decode_segmentation, find_split, read_coco, split_by_hash
from samft.errors import DataError
from samft.images import header_size
from samft.masks import MaskError, Segmentations, check_segmentation

SQUARE = [2.0, 3, 8, 3, 8, 9, 2, 9]


def _image(folder: Path, name: str = "a.png", height: int = 20, width: int = 30) -> dict[str, Any]:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.zeros((height, width, 3), np.uint8))
    return {"id": 1, "file_name": name, "height": height, "width": width}


def _read(folder: Path, annotations: list[Any], images: list[Any] | None = None) -> Any:
    images = [_image(folder)] if images is None else images
    return read_coco(write_json(folder / "a.json", images, annotations), folder)


def _rle(mask: np.ndarray, *, compressed: bool) -> dict[str, Any]:
    if compressed:
        rle = mask_utils.encode(np.asfortranarray(mask))
        return {"size": rle["size"], "counts": rle["counts"].decode()}
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat, prepend=0, append=2))
    return {"size": list(mask.shape), "counts": np.diff(edges, prepend=0).tolist()}


def test_index_groups_objects_by_image(tmp_path: Path) -> None:
    index = read_coco(write_coco(tmp_path, 6, objects=(1, 0, 3)), tmp_path / "train")
    assert index.file_names == [f"image_{i}.png" for i in (0, 2, 3, 5)]
    assert index.image_ids.tolist() == [10, 12, 13, 15]
    assert index.first_object.tolist() == [0, 1, 4, 5, 8]
    assert index.counts == {"image_without_objects": 2}
    assert index.sizes_json.tolist() == [[48, 64], [40, 40], [48, 64], [40, 40]]
    assert (index.num_images, index.num_objects, len(index.segmentations)) == (4, 8, 8)


def test_annotations_of_an_image_may_be_scattered(tmp_path: Path) -> None:
    images = [_image(tmp_path), {**_image(tmp_path, "b.png"), "id": 2}]
    entries = [annotation(k, image_id, SQUARE) for k, image_id in ((1, 2), (2, 1), (3, 2), (4, 1))]
    index = _read(tmp_path, entries, images)
    assert index.file_names == ["a.png", "b.png"]
    assert index.object_ids.tolist() == [2, 4, 1, 3]
    assert index.boxes[0].tolist() == [2, 3, 8, 9]


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (200, 301)])
def test_rle_decodes_as_pycocotools_does(compressed: bool, shape: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    for density in (0.02, 0.5, 1.0):
        mask = (generator.random(shape) < density).astype(np.uint8)
        mask[-1, -1] = 1
        decoded = decode_segmentation(_rle(mask, compressed=compressed), *shape)
        np.testing.assert_array_equal(decoded, mask)


def test_polygons_decode_as_pycocotools_does() -> None:
    generator = np.random.default_rng(0)
    for trial in range(100):
        parts = [
            generator.uniform(-10, 50, 2 * generator.integers(3, 9)) for _ in range(trial % 3 + 1)
        ]
        expected = mask_utils.decode(mask_utils.merge(mask_utils.frPyObjects(parts, 37, 41)))
        decoded = decode_segmentation([part.tolist() for part in parts], 37, 41)
        np.testing.assert_array_equal(decoded, expected)


def test_known_square_has_the_area_that_was_drawn() -> None:
    mask = decode_segmentation([SQUARE], 20, 30)
    assert mask.sum() == 36 and mask[3:9, 2:8].all()


def test_rle_of_another_size_keeps_its_place() -> None:
    mask = np.zeros((11, 8), np.uint8)
    mask[4:, 2:7] = 1
    rle = _rle(mask, compressed=True)
    np.testing.assert_array_equal(decode_segmentation(rle, 10, 8), mask[:10])
    padded = np.pad(mask, ((0, 1), (0, 2)))
    np.testing.assert_array_equal(decode_segmentation(rle, 12, 10), padded)
    assert decode_segmentation(rle, 3, 8).sum() == 0


HUGE = [1e9, 1e9, 2e9, 1e9, 2e9, 2e9]
BAD_MASKS = {
    "huge coordinates": [HUGE],
    "negative huge": [[-v for v in HUGE]],
    "not finite": [[0, 0, float("nan"), 5, 5, 5]],
    "infinite": [[0, 0, float("inf"), 5, 5, 5]],
    "integer too large": [[0, 0, 10**400, 5, 5, 5]],
    "odd count": [[1, 1, 5, 1, 5, 5, 2]],
    "text": [["a", "b", "c", "d", "e", "f"]],
    "nested too deep": [[[1, 1], [5, 1], [5, 5]]],
    "endless zigzag": [[0, 0, 9e4, 9e4] * 100],
    "string": "polygon",
    "number": 7,
    "no size": {"counts": [0, 4]},
    "no counts": {"size": [2, 2]},
    "huge size": {"size": [10**6, 10**6], "counts": [0, 10**12]},
    "negative size": {"size": [-2, -2], "counts": [0, 4]},
    "size of three": {"size": [2, 2, 1], "counts": [0, 4]},
    "too short": {"size": [2, 2], "counts": [1, 1]},
    "too long": {"size": [2, 2], "counts": [1, 9]},
    "negative count": {"size": [2, 2], "counts": [-1, 5]},
    "fraction": {"size": [2, 2], "counts": [0.5, 3.5]},
    "wrong letters": {"size": [2, 2], "counts": "\u00e9\u00e9"},
    "cut string": {"size": [2, 2], "counts": "PP"},
    "endless number": {"size": [2, 2], "counts": "o" * 40 + "1"},
}
NO_MASKS: dict[str, Any] = {
    "null": None,
    "empty list": [],
    "empty part": [[]],
    "line": [[1, 1, 5, 5]],
    "no counts": {"size": [2, 2], "counts": []},
    "no text": {"size": [2, 2], "counts": ""},
    "all background": {"size": [20, 30], "counts": [600]},
}


@pytest.mark.parametrize("segmentation", BAD_MASKS.values(), ids=BAD_MASKS)
def test_malformed_masks_are_counted(tmp_path: Path, segmentation: Any) -> None:
    with pytest.raises(MaskError) as error:
        check_segmentation(segmentation)
    assert error.value.reason == "bad_mask"
    entries = [annotation(1, 1, SQUARE), annotation(2, 1, SQUARE, segmentation=segmentation)]
    index = _read(tmp_path, entries)
    assert index.object_ids.tolist() == [1] and index.counts == {"bad_mask": 1}


@pytest.mark.parametrize("segmentation", NO_MASKS.values(), ids=NO_MASKS)
def test_empty_masks_are_counted(tmp_path: Path, segmentation: Any) -> None:
    entries = [annotation(1, 1, SQUARE), annotation(2, 1, SQUARE, segmentation=segmentation)]
    index = _read(tmp_path, entries)
    assert index.object_ids.tolist() == [1] and index.counts == {"no_mask": 1}


def test_masks_without_a_pixel_in_the_image_are_counted(tmp_path: Path) -> None:
    far = [v + 100 for v in SQUARE]
    tiny = [2.1, 2.1, 2.2, 2.1, 2.2, 2.2]
    one_pixel = [4.0, 4, 5, 4, 5, 5, 4, 5]
    entries = [
        annotation(k, 1, polygon) for k, polygon in enumerate((SQUARE, far, tiny, one_pixel))
    ]
    index = _read(tmp_path, entries)
    assert index.object_ids.tolist() == [0, 3] and index.counts == {"no_mask": 2}


def test_a_flat_polygon_list_is_one_part() -> None:
    np.testing.assert_array_equal(
        decode_segmentation(SQUARE, 20, 30), decode_segmentation([SQUARE], 20, 30)
    )


def test_a_box_of_four_numbers_is_not_drawn() -> None:
    with pytest.raises(MaskError):
        decode_segmentation([[2, 3, 8, 9]], 20, 30)


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
    ],
)
def test_an_unusable_box_is_taken_from_the_mask(tmp_path: Path, bbox: Any) -> None:
    index = _read(tmp_path, [annotation(1, 1, SQUARE, bbox=bbox)])
    assert index.boxes.tolist() == [[2, 3, 8, 9]] and index.counts == {}


def test_a_usable_box_stays_as_annotated(tmp_path: Path) -> None:
    index = _read(tmp_path, [annotation(1, 1, SQUARE, bbox=[-0.5, 0.25, 31, 20])])
    assert index.boxes.tolist() == [[-0.5, 0.25, 30.5, 20.25]]


def test_crowds_are_left_out_unless_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    crowd = annotation(1, 1, SQUARE, iscrowd=1)
    index = _read(tmp_path, [crowd, annotation(2, 1, SQUARE)])
    assert index.object_ids.tolist() == [2] and index.counts == {"crowd": 1}
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        alone = _read(tmp_path, [crowd])
    assert alone.object_ids.tolist() == [1] and alone.counts == {}
    assert "only crowds" in caplog.text


def test_stray_entries_are_counted(tmp_path: Path) -> None:
    good = annotation(1, 1, SQUARE)
    strays = ["text", None, {"id": 9}, {**good, "image_id": "x"}, {**good, "image_id": [1]}]
    index = _read(tmp_path, [good, good, annotation(2, 77, SQUARE), *strays])
    assert index.object_ids.tolist() == [1]
    assert index.counts == {"bad_annotation": 5, "unknown_image": 1, "duplicate_object": 1}


def test_different_objects_may_share_an_id_and_ids_may_be_text(tmp_path: Path) -> None:
    other = annotation(1, 1, [v + 4 for v in SQUARE])
    index = _read(tmp_path, [annotation(1, 1, SQUARE), {**other, "image_id": "1"}])
    assert index.object_ids.tolist() == [1, 1] and index.counts == {}


def test_the_files_size_counts_where_the_json_is_wrong(tmp_path: Path) -> None:
    image = _image(tmp_path, height=200, width=300)
    far = [v + 150 for v in SQUARE]
    for size in ({"height": 20, "width": 30}, {"height": None, "width": 0}, {"height": 10**9}):
        index = _read(tmp_path, [annotation(1, 1, far)], [{**image, **size}])
        assert index.boxes.tolist() == [[152, 153, 158, 159]]
    assert index.sizes_json.tolist() == [[200, 300]]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"images": [],\n "annotations": [', ["line 2", "column"]),
        ("", ["not valid JSON"]),
        ("[1, 2]", ["'images'"]),
        ('{"images": []}', ["'annotations'"]),
        ('{"images": {}, "annotations": []}', ["'images'"]),
        ("\udcff", ["not valid JSON"]),
        ("[" * 100_000, ["not valid JSON"]),
        ('{"images": [], "annotations": []}', ["no usable object"]),
        ('{"images": [5], "annotations": []}', ["entry 0 of 'images'"]),
        ('{"images": [{"id": 1.5, "file_name": "a"}], "annotations": []}', ["entry 0"]),
        ('{"images": [{"id": 1e400, "file_name": "a"}], "annotations": []}', ["entry 0"]),
        ('{"images": [{"id": 1, "file_name": 3}], "annotations": []}', ["entry 0"]),
    ],
)
def test_broken_files_are_refused_in_one_sentence(
    tmp_path: Path, content: str, words: list[str]
) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(DataError) as error:
        read_coco(path, tmp_path)
    for word in ["broken.json", *words]:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_paths_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no annotation file .*gone\.json"):
        read_coco(tmp_path / "gone.json", tmp_path)
    with pytest.raises(DataError, match=str(tmp_path)):
        read_coco(tmp_path, tmp_path)


@pytest.mark.parametrize(
    "name", ["../a.png", "x/../../a.png", "/etc/a.png", "..\\a.png", "C:\\a.png", "a\0.png"]
)
def test_file_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    _image(tmp_path.parent)
    image = {"id": 1, "file_name": name, "height": 20, "width": 30}
    with pytest.raises(DataError, match="leaves the image folder"):
        _read(tmp_path, [annotation(1, 1, SQUARE)], [image])


def test_missing_images_are_counted_and_named(tmp_path: Path) -> None:
    path = write_coco(tmp_path, 6)
    for i in range(1, 6):
        (path.parent / f"image_{i}.png").unlink()
    with pytest.raises(DataError, match=r"5 of 6 images .*image_1.png, .*image_3.png, \.\.\."):
        read_coco(path, path.parent)


def test_images_in_subfolders_are_found(tmp_path: Path) -> None:
    index = _read(tmp_path, [annotation(1, 1, SQUARE)], [_image(tmp_path, "sub/b.png")])
    assert index.file_names == ["sub/b.png"]


def test_an_image_id_for_two_files_is_refused(tmp_path: Path) -> None:
    images = [_image(tmp_path), _image(tmp_path, "b.png")]
    with pytest.raises(DataError, match=r"image id 1 .*'a.png' and 'b.png'"):
        _read(tmp_path, [annotation(1, 1, SQUARE)], images)


def test_packed_segmentations_come_back_whole() -> None:
    raw = [[SQUARE, [1.0, 1, 4, 1, 4, 5.25]], _rle(np.eye(5, dtype=np.uint8), compressed=True)]
    packed = Segmentations.pack([check_segmentation(item) for item in raw])
    assert [part.tolist() for part in packed[0]] == raw[0]
    np.testing.assert_array_equal(decode_segmentation(packed[1], 5, 5), np.eye(5))
    with pytest.raises(IndexError):
        packed[2]


def _touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}")


def test_find_split_in_both_layouts(tmp_path: Path) -> None:
    _touch(tmp_path, "a/train/_annotations.coco.json", "a/valid/_annotations.coco.json")
    _touch(tmp_path, "b/annotations/instances_train2017.json", "b/train2017/x.jpg")
    _touch(tmp_path, "b/annotations/instances_val.json", "b/images/val/x.jpg")
    a, b = tmp_path / "a", tmp_path / "b"
    assert find_split(a, "train") == (a / "train/_annotations.coco.json", a / "train")
    assert find_split(a, "val") == (a / "valid/_annotations.coco.json", a / "valid")
    official = b / "annotations/instances_train2017.json", b / "train2017"
    assert find_split(b, "train2017") == official
    assert find_split(b, "train") == official
    assert find_split(b, "val") == (b / "annotations/instances_val.json", b / "images/val")
    _touch(b, "annotations/instances_train2014.json")
    with pytest.raises(DataError, match="train2014, train2017"):
        find_split(b, "train")
    with pytest.raises(DataError, match="no split test"):
        find_split(a, "test")
    with pytest.raises(DataError, match="no dataset folder"):
        find_split(tmp_path / "c", "train")


def test_split_by_hash_depends_on_names_only(tmp_path: Path) -> None:
    path = write_coco(tmp_path, 20)
    index = read_coco(path, path.parent)
    train, val = split_by_hash(index, 0.2)
    assert (train.num_images, val.num_images) == (16, 4)
    assert set(train.file_names) | set(val.file_names) == set(index.file_names)
    assert train.num_objects + val.num_objects == index.num_objects
    reverse_train, reverse_val = split_by_hash(index.select(range(19, -1, -1)), 0.2)
    assert set(reverse_val.file_names) == set(val.file_names)
    row = index.file_names.index(val.file_names[0])
    expected = index.segmentations[int(index.first_object[row])][0]
    np.testing.assert_array_equal(val.segmentations[0][0], expected)


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_split_by_hash_leaves_both_sides_an_image(tmp_path: Path, share: float) -> None:
    path = write_coco(tmp_path, 3)
    index = read_coco(path, path.parent)
    assert {part.num_images for part in split_by_hash(index, share)} == {1, 2}
    with pytest.raises(DataError, match="at least two"):
        split_by_hash(index.select([0]), share)


def test_reading_imports_no_torch() -> None:
    code = "import sys, samft.coco, samft.transforms; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


REAL = {
    ("hbn_flakes", "train"): (177, 1601, {"image_without_objects": 3}),
    ("hbn_flakes", "val"): (21, 277, {}),
    ("hbn_flakes", "test"): (10, 87, {"no_mask": 1}),
    ("mushrooms", "train"): (78, 10335, {}),
    ("mushrooms", "val"): (6, 702, {}),
    ("coco_open104", "train2017"): (47, 518, {"crowd": 6}),
    ("coco_open104", "val"): (55, 510, {"crowd": 7, "image_without_objects": 2}),
    ("fruits_nuts", ""): (18, 165, {}),
}


@pytest.mark.parametrize("name", REAL, ids="/".join)
def test_real_datasets_load_with_known_counts(data_root: Path, name: tuple[str, str]) -> None:
    root = data_root / name[0]
    explicit = root / "data" / "trainval.json", root / "data" / "images"
    index = read_coco(*(find_split(root, name[1]) if name[1] else explicit))
    assert (index.num_images, index.num_objects, index.counts) == REAL[name]


@pytest.mark.parametrize("name", ["hbn_flakes/val", "hbn_flakes/train", "coco_open104/val"])
def test_real_masks_are_pycocotools_at_the_real_size(data_root: Path, name: str) -> None:
    annotations, folder = find_split(data_root / name.split("/")[0], name.split("/")[1])
    index = read_coco(annotations, folder)
    entries = {entry["id"]: entry for entry in json.loads(annotations.read_text())["annotations"]}
    differing = [
        row
        for row in range(index.num_images)
        if header_size(folder / index.file_names[row]) != tuple(index.sizes_json[row])
    ]
    # Of 71 such images, one has no objects.
    assert len(differing) == (70 if name == "hbn_flakes/train" else 0)
    for row in (differing or range(index.num_images))[:6]:
        size = header_size(folder / index.file_names[row])
        for k in range(*index.first_object[row : row + 2]):
            raw = entries[int(index.object_ids[k])]["segmentation"]
            expected = mask_utils.decode(mask_utils.merge(mask_utils.frPyObjects(raw, *size)))
            decoded = decode_segmentation(index.segmentations[k], *size)
            np.testing.assert_array_equal(decoded, expected)
