"""Images to predict on: found, numbered, and named where they cannot be read."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from helpers.coco_files import write_coco, write_json
from samft.errors import DataError
from samft.prediction.inputs import find_task, list_images, read_coco_images


def write_image(path: Path, height: int = 20, width: int = 30) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((height, width, 3), 90, np.uint8))
    return path


def test_a_folder_gives_its_images_by_name_and_nothing_else(tmp_path: Path) -> None:
    write_image(tmp_path / "b.png", 10, 12)
    write_image(tmp_path / "a.JPG", 7, 9)
    write_image(tmp_path / "within" / "c.png")
    write_image(tmp_path / "._b.png")
    (tmp_path / "notes.txt").write_text("no image")
    images = list_images([tmp_path])
    assert images.names == ["a.JPG", "b.png"]
    assert images.ids.tolist() == [1, 2]
    assert images.sizes.tolist() == [[7, 9], [10, 12]]
    assert images.bad == {}


def test_files_and_folders_keep_their_order_and_come_once(tmp_path: Path) -> None:
    first, second = write_image(tmp_path / "z.png"), write_image(tmp_path / "folder" / "a.png")
    images = list_images([first, second.parent, first])
    assert images.paths == [first, second]
    assert images.names == [str(first), str(second)]


def test_what_cannot_be_read_is_named_with_its_reason(tmp_path: Path) -> None:
    good = write_image(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(good.read_bytes()[:60])
    (tmp_path / "c.jpg").write_text("<html>")
    assert list_images([tmp_path]).bad == {
        1: "the image file is cut short",
        2: "the file is no image (HTML, text, ...)",
    }


def test_places_without_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no image file"):
        list_images([tmp_path])
    with pytest.raises(DataError, match="there is no file or folder"):
        list_images([tmp_path / "absent"])


def test_a_coco_file_without_objects_lists_images(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", 11, 13)
    entries = [{"id": 7, "file_name": name, "height": 1, "width": 1} for name in ("a.png",)]
    entries += [{"id": 8, "file_name": "gone.png"}, {"id": 9, "file_name": "../out.png"}]
    images, file = read_coco_images(write_json(tmp_path / "c.json", entries, []), tmp_path)
    assert images.ids.tolist() == [7, 8, 9]
    assert images.sizes[0].tolist() == [11, 13]  # the file's, not the JSON's
    assert images.bad == {
        1: "the image file cannot be read",
        2: "the file lies outside of the data folder; it is never opened",
    }
    assert len(file.boxes) == 0


def test_a_coco_file_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        write_image(tmp_path / name)
    entries = [{"id": 1, "file_name": name} for name in ("a.png", "b.png")]
    with pytest.raises(DataError, match="image-id-ambiguous"):
        read_coco_images(write_json(tmp_path / "c.json", entries, []), tmp_path)
    with pytest.raises(DataError, match="lists no image"):
        read_coco_images(write_json(tmp_path / "d.json", [], []), tmp_path)


def test_a_mask_is_described_by_its_box(tmp_path: Path) -> None:
    file = write_coco(tmp_path, 2, objects=(1, 2))
    annotated = find_task([file.parent], annotations=file)
    words = {"image_id": 11, "category_id": 1, "annotation_id": 3}
    assert annotated.describe(1, 1) == words
    results = tmp_path / "results.json"
    entry = {"image_id": 11, "category_id": 5, "bbox": [1, 2, 3, 4], "score": 0.25}
    results.write_text(json.dumps([entry]))
    detected = find_task([file.parent], annotations=file, results=results)
    words = {"image_id": 11, "category_id": 5, "detector_score": 0.25}
    assert detected.describe(1, 0) == words
    assert detected.rows == [1]
    automatic = find_task([file.parent], annotations=file, automatic=True)
    assert automatic.describe(1, 0) == {"image_id": 11, "category_id": 0}
    assert automatic.boxes_of(1).shape == (0, 4)


def test_images_that_are_lost_with_their_objects_stay_in_the_task(tmp_path: Path) -> None:
    file = write_coco(tmp_path, 3, objects=(1,))
    (file.parent / "image_1.png").unlink()
    task = find_task([file.parent], annotations=file)
    assert task.rows == [0, 1, 2]
    assert list(task.images.bad) == [1]


def test_plain_images_have_one_class(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    task = find_task([tmp_path], boxes=[[1, 2, 11, 12], [3, 4, 9, 8]])
    assert task.boxes_of(0).tolist() == [[1, 2, 11, 12], [3, 4, 9, 8]]
    assert task.describe(0, 1) == {"image_id": 1, "category_id": 1}
