"""Images to predict on: which are listed, their ids, and why some cannot be read."""

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from helpers.coco_files import write_coco, write_json
from samft.errors import DataError
from samft.prediction.images import list_images, read_coco_images
from samft.prediction.inputs import build_task


def write_image(path: Path, height: int = 20, width: int = 30) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((height, width, 3), 90, np.uint8))
    return path


def test_a_folder_lists_only_its_images_sorted_by_name(tmp_path: Path) -> None:
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


def test_files_and_folders_keep_their_order_without_repeats(tmp_path: Path) -> None:
    first, second = write_image(tmp_path / "z.png"), write_image(tmp_path / "folder" / "a.png")
    images = list_images([first, second.parent, first])
    assert images.paths == [first, second]
    assert images.names == [str(first), str(second)]


def test_unreadable_images_are_named_with_the_reason(tmp_path: Path) -> None:
    good = write_image(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(good.read_bytes()[:60])
    (tmp_path / "c.jpg").write_text("<html>")
    assert list_images([tmp_path]).bad == {
        1: "the image file is cut short",
        2: "the file is no image (HTML, text, a Git LFS pointer, ...)",
    }


def test_images_that_viewers_turn_are_listed_as_stored_with_a_note(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    assert list_images([tmp_path]).notes == []
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "b.jpg", exif=exif)
    images = list_images([tmp_path])
    assert images.sizes.tolist() == [[20, 30], [20, 30]]
    (note,) = images.notes
    assert "1 of 2 images with an EXIF orientation (b.jpg)" in note and "stored pixels" in note


def test_paths_without_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no image file"):
        list_images([tmp_path])
    with pytest.raises(DataError, match="there is no file or folder"):
        list_images([tmp_path / "absent"])


def test_a_coco_file_without_objects_lists_images(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", 11, 13)
    entries = [{"id": 7, "file_name": name, "height": 1, "width": 1} for name in ("a.png",)]
    entries += [{"id": 8, "file_name": "gone.png"}, {"id": 9, "file_name": "../out.png"}]
    images, index = read_coco_images(write_json(tmp_path / "c.json", entries, []), tmp_path)
    assert images.ids.tolist() == [7, 8, 9]
    assert images.sizes[0].tolist() == [11, 13]  # the file's, not the JSON's
    assert images.bad == {
        1: "there is no such image file",
        2: "the file lies outside of the data folder; it is never opened",
    }
    assert len(index.boxes) == 0


def test_a_coco_file_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        write_image(tmp_path / name)
    entries = [{"id": 1, "file_name": name} for name in ("a.png", "b.png")]
    with pytest.raises(DataError, match="image-id-ambiguous"):
        read_coco_images(write_json(tmp_path / "c.json", entries, []), tmp_path)
    with pytest.raises(DataError, match="lists no image"):
        read_coco_images(write_json(tmp_path / "d.json", [], []), tmp_path)


def test_result_fields_come_from_the_box(tmp_path: Path) -> None:
    annotations = write_coco(tmp_path, 2, objects=(1, 2))
    annotated = build_task([annotations.parent], annotations=annotations)
    fields = {"image_id": 11, "category_id": 1, "annotation_id": 3}
    assert annotated.result_fields(1, 1) == fields
    results = tmp_path / "results.json"
    entry = {"image_id": 11, "category_id": 5, "bbox": [1, 2, 3, 4], "score": 0.25}
    results.write_text(json.dumps([entry]))
    detected = build_task([annotations.parent], annotations=annotations, results=results)
    fields = {"image_id": 11, "category_id": 5, "detector_score": 0.25}
    assert detected.result_fields(1, 0) == fields
    assert detected.rows == [1]
    automatic = build_task([annotations.parent], annotations=annotations, automatic=True)
    assert automatic.result_fields(1, 0) == {"image_id": 11, "category_id": 0}
    assert automatic.boxes_of(1).shape == (0, 4)


def test_unreadable_images_stay_in_the_task(tmp_path: Path) -> None:
    annotations = write_coco(tmp_path, 3, objects=(1,))
    (annotations.parent / "image_1.png").unlink()
    task = build_task([annotations.parent], annotations=annotations)
    assert task.rows == [0, 1, 2]
    assert list(task.images.bad) == [1]


def test_images_without_a_coco_file_have_one_class(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    task = build_task([tmp_path], boxes=[[1, 2, 11, 12], [3, 4, 9, 8]])
    assert task.boxes_of(0).tolist() == [[1, 2, 11, 12], [3, 4, 9, 8]]
    assert task.result_fields(0, 1) == {"image_id": 1, "category_id": 1}


def test_links_in_a_folder_lead_outside_only_where_they_may(tmp_path: Path) -> None:
    write_image(tmp_path / "pool" / "1.png").rename(tmp_path / "pool" / "1")
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").symlink_to("../pool/1")
    os.mkfifo(folder / "pipe.png")
    pipe = "a pipe, socket or device instead of a file; it is never opened"
    outside = "the file lies outside of the data folder; it is never opened"
    hint = f"behind a link: --allow_links {tmp_path / 'pool'} opens it"
    assert list_images([folder]).bad == {0: f"{outside} ({hint})", 1: pipe}
    assert list_images([folder], allow_links=[tmp_path / "pool"]).bad == {1: pipe}
    # Whoever names a file means it.
    assert list_images([folder / "a.png", folder / "pipe.png"]).bad == {1: pipe}
