"""`samft.convert`: every layout in, masks equal; back again; what is wrong is a sentence."""

import base64
import errno
import io
import json
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps
from pycocotools import mask as mask_utils

from helpers.coco_files import write_coco
from samft.check import main as check
from samft.cli import run_command
from samft.convert import main

SIZE = (20, 30)


def convert(*flags: object) -> dict[str, Any]:
    return main([str(flag) for flag in flags])


def refused(capsys: pytest.CaptureFixture[str], *flags: object) -> str:
    capsys.readouterr()
    assert run_command(main, [str(flag) for flag in flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error
    return error


def drawn_numbers(seed: int) -> np.ndarray:
    """A label image of blocks and noise, with gaps between its numbers."""
    generator = np.random.default_rng(seed)
    numbers = np.repeat(np.repeat(generator.integers(0, 5, (10, 15)), 2, 0), 2, 1) * 60
    numbers[generator.random(SIZE) < 0.1] = 7
    return numbers


def write_image(path: Path, size: tuple[int, int] = SIZE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((*size, 3), 90, np.uint8))


def masks_of(folder: Path) -> dict[str, list[tuple[str, np.ndarray]]]:
    """Class and mask of each object, by image, of a written split."""
    document = json.loads((folder / "_annotations.coco.json").read_text())
    names = {one["id"]: one["name"] for one in document["categories"]}
    masks: dict[str, list[tuple[str, np.ndarray]]] = {}
    for image in document["images"]:
        assert (folder / image["file_name"]).is_file()
        masks[image["file_name"]] = []
        for one in document["annotations"]:
            if one["image_id"] == image["id"]:
                rle = one["segmentation"]
                if isinstance(rle, list):
                    rles = mask_utils.frPyObjects(rle, image["height"], image["width"])
                    rle = mask_utils.merge(rles)
                mask = mask_utils.decode(rle).astype(bool)
                masks[image["file_name"]].append((names[one["category_id"]], mask))
    return masks


def assert_split_of_numbers(folder: Path, numbers: dict[str, np.ndarray]) -> None:
    masks = masks_of(folder)
    assert masks.keys() == numbers.keys()
    for name, expected in numbers.items():
        values = [value for value in np.unique(expected) if value]
        assert len(masks[name]) == len(values)
        for (_, mask), value in zip(masks[name], values, strict=True):
            assert (mask == (expected == value)).all()


KINDS = ["uint8.png", "uint16.png", "uint16.tif", "uint32.tif", "float32.tif", "palette.png"]


@pytest.mark.parametrize("kind", KINDS)
def test_label_images_there_and_back(tmp_path: Path, kind: str) -> None:
    dtype, suffix = kind.split(".")
    numbers = {}
    for k in range(3):
        labels = drawn_numbers(k)
        write_image(tmp_path / "images" / f"{k}.png")
        path = tmp_path / "labels" / f"{k}_masks.{suffix}"
        path.parent.mkdir(exist_ok=True)
        if dtype == "palette":
            picture = Image.fromarray(labels.astype(np.uint8), mode="P")
            picture.putpalette([part for n in range(256) for part in (n, 255 - n, 7)])
            picture.save(path)
        elif suffix == "tif":
            tifffile.imwrite(path, labels.astype(dtype))
        else:
            Image.fromarray(labels.astype(dtype)).save(path)
        numbers[f"{k}.png"] = labels
    flags = ("--from", "labels", "--source", tmp_path / "labels", "--images", tmp_path / "images")
    report = convert(*flags, "--output_dir", tmp_path / "out")
    total = sum(len(np.unique(labels[labels > 0])) for labels in numbers.values())
    # The numbers are scattered, which is said.
    assert report["images"] == {"train": 3} and report["objects"] == {"train": total}
    assert len(report["notes"]) == 1 and "separate parts" in report["notes"][0]
    assert_split_of_numbers(tmp_path / "out" / "train", numbers)
    annotations = tmp_path / "out" / "train" / "_annotations.coco.json"
    back = ("--to", "labels", "--source", annotations, "--images", annotations.parent)
    convert(*back, "--output_dir", tmp_path / "back")
    for name, labels in numbers.items():
        again = tifffile.imread((tmp_path / "back" / name).with_suffix(".tif"))
        values = np.unique(labels)
        assert (values[again] == labels).all()
    report = check(["--annotations", str(annotations), "--images", str(annotations.parent)])
    assert report["errors"] == report["warnings"] == 0


def test_labels_may_lie_beside_their_images(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    Image.fromarray(drawn_numbers(0).astype(np.uint8)).save(tmp_path / "a_cp_masks.png")
    flags = ("--from", "labels", "--source", tmp_path, "--images", tmp_path)
    convert(*flags, "--output_dir", tmp_path / "out", "--link")
    assert_split_of_numbers(tmp_path / "out" / "train", {"a.png": drawn_numbers(0)})
    assert (tmp_path / "out" / "train" / "a.png").samefile(tmp_path / "a.png")


def test_one_picture_for_each_object(tmp_path: Path) -> None:
    labels, inner = drawn_numbers(1), tmp_path / "masks" / "a" / "masks"
    inner.mkdir(parents=True)
    write_image(tmp_path / "images" / "a.png")
    values = [value for value in np.unique(labels) if value]
    for k, value in enumerate(values):
        Image.fromarray((labels == value).astype(np.uint8) * 255).save(inner / f"{k}.png")
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(inner / "empty.png")
    flags = ("--from", "masks", "--source", tmp_path / "masks", "--images", tmp_path / "images")
    report = convert(*flags, "--output_dir", tmp_path / "out")
    assert report["objects"] == {"train": len(values)}
    assert f"left out, because it covers no pixel: {inner / 'empty.png'}" in report["notes"]
    assert_split_of_numbers(tmp_path / "out" / "train", {"a.png": labels})


def write_yolo(root: Path) -> None:
    for split in ("train", "val"):
        write_image(root / "images" / split / f"{split}.png")
        (root / "labels" / split).mkdir(parents=True)
    write_image(root / "images" / "train" / "none.png")
    text = "1 0.1 0.1 0.5 0.1 0.5 0.6\n\n0 0.2 0.2 0.9 0.2 0.9 0.9 0.2 0.9\n"
    for split in ("train", "val"):
        (root / "labels" / split / f"{split}.txt").write_text(text)
    (root / "data.yaml").write_text(
        "path: /on/another/machine\ntrain: images/train\nval: images/val\nnames: [leaf, stem]\n"
    )


def test_yolo_there_and_back(tmp_path: Path) -> None:
    write_yolo(tmp_path / "yolo")
    report = convert(
        "--from", "yolo", "--source", tmp_path / "yolo", "--output_dir", tmp_path / "o"
    )
    assert report["images"] == {"train": 2, "val": 1}
    assert report["objects"] == {"train": 2, "val": 2}
    document = json.loads((tmp_path / "o" / "val" / "_annotations.coco.json").read_text())
    assert document["categories"] == [{"id": 1, "name": "leaf"}, {"id": 2, "name": "stem"}]
    first = document["annotations"][0]
    assert first["segmentation"][0] == pytest.approx([3, 2, 15, 2, 15, 12])
    assert first["category_id"] == 2
    annotations = tmp_path / "o" / "val" / "_annotations.coco.json"
    flags = ("--to", "yolo", "--source", annotations, "--images", annotations.parent)
    assert convert(*flags, "--output_dir", tmp_path / "back")["objects"] == {"train": 2}
    lines = [
        line.split()
        for folder, split in (("yolo", "val"), ("back", "train"))
        for line in (tmp_path / folder / "labels" / split / "val.txt").read_text().splitlines()
        if line
    ]
    for before, after in zip(lines[:2], lines[2:], strict=True):
        assert before[0] == after[0]
        assert np.array(after[1:], float) == pytest.approx(np.array(before[1:], float), abs=1e-8)
    # What was written is read again, once: its data.yaml names one folder for both splits.
    flags = ("--from", "yolo", "--source", tmp_path / "back", "--output_dir", tmp_path / "again")
    assert convert(*flags)["images"] == {"train": 1}


def test_classes_of_yolo_are_called_as_they_are_written(tmp_path: Path) -> None:
    """Not False and 8, which YAML takes them for."""
    write_yolo(tmp_path / "yolo")
    file = tmp_path / "yolo/data.yaml"
    for names in ("[no, 010]", "{0: no, 1: 010}"):
        file.write_text(f"train: images/train\nval: images/val\nnames: {names}\n")
        out = tmp_path / f"out-{len(names)}"
        convert("--from", "yolo", "--source", file.parent, "--output_dir", out)
        document = json.loads((out / "val/_annotations.coco.json").read_text())
        assert [one["name"] for one in document["categories"]] == ["010", "no"]


def save_turned(path: Path, view: np.ndarray, orientation: int) -> None:
    """Stores an image so that EXIF's orientation, 6 or 8, turns it into the view."""
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.rot90(view, 1 if orientation == 6 else -1)
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, quality=95)
    with Image.open(path) as image:
        assert np.abs(np.array(ImageOps.exif_transpose(image)).astype(int) - view).max() < 40


@pytest.mark.parametrize("orientation", [6, 8])
@pytest.mark.parametrize("layout", ["yolo", "labelme"])
def test_outlines_are_on_the_view_that_exif_turns(
    layout: str, orientation: int, tmp_path: Path
) -> None:
    view, box = np.zeros((60, 90, 3), np.uint8), [12.0, 20.0, 40.0, 28.0]
    view[20:28, 12:40] = 255
    x0, y0, x1, y1 = box
    corners = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
    source = tmp_path / "in"
    if layout == "yolo":
        save_turned(source / "images" / "train" / "a.jpg", view, orientation)
        (source / "labels" / "train").mkdir(parents=True)
        numbers = " ".join(map(str, (corners / [90, 60]).ravel()))
        (source / "labels" / "train" / "a.txt").write_text(f"0 {numbers}\n")
        (source / "data.yaml").write_text("train: images/train\nval: images/train\nnames: [a]\n")
    else:
        save_turned(source / "a.jpg", view, orientation)
        shapes = [{"label": "a", "points": corners.tolist()}]
        document = {"imagePath": "a.jpg", "shapes": shapes, "imageHeight": 60, "imageWidth": 90}
        (source / "a.json").write_text(json.dumps(document))
    convert("--from", layout, "--source", source, "--output_dir", tmp_path / "out")
    annotations = tmp_path / "out" / "train" / "_annotations.coco.json"
    content = json.loads(annotations.read_text())
    assert (content["images"][0]["height"], content["images"][0]["width"]) == (60, 90)
    assert content["annotations"][0]["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0])


@pytest.mark.parametrize("orientation", [6, 8])
def test_yolo_gets_outlines_of_stored_pixels_on_the_view(orientation: int, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    view = np.zeros((60, 90, 3), np.uint8)
    view[20:28, 12:40] = 255
    save_turned(folder / "a.jpg", view, orientation)
    stored = np.rot90(view[..., 0] > 0, 1 if orientation == 6 else -1)
    ys, xs = np.nonzero(stored)
    x0, y0, x1, y1 = (int(v) for v in (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
    annotation = {
        **{"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 224},
        **{"bbox": [x0, y0, x1 - x0, y1 - y0]},
        **{"segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]]},
    }
    document = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 90, "width": 60}],
        "annotations": [annotation],
        "categories": [{"id": 1, "name": "a"}],
    }
    (folder / "a.json").write_text(json.dumps(document))
    flags = ("--to", "yolo", "--source", folder / "a.json", "--images", folder)
    convert(*flags, "--output_dir", tmp_path / "out")
    _, *numbers = (tmp_path / "out" / "labels" / "train" / "a.txt").read_text().split()
    points = np.array(numbers, float).reshape(-1, 2) * [90, 60]
    assert [*points.min(0), *points.max(0)] == pytest.approx([12, 20, 40, 28])


def test_labelme_shapes(tmp_path: Path) -> None:
    write_image(tmp_path / "in" / "a.png")
    mask = np.tri(4, 6, dtype=bool)
    buffer = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(buffer, "PNG")
    shapes = [
        {"label": "leaf", "points": [[1, 1], [9, 1], [9, 9]], "shape_type": "polygon"},
        {"label": "leaf", "points": [[12, 1], [16, 1], [16, 5]], "group_id": 4},
        {"label": "leaf", "points": [[22, 8], [18, 4]], "shape_type": "rectangle", "group_id": 4},
        {
            "label": "stem",
            "points": [[20, 12], [25, 15]],
            "shape_type": "mask",
            "mask": base64.b64encode(buffer.getvalue()).decode(),
        },
    ]
    document = {"imagePath": "..\\elsewhere\\a.png", "shapes": shapes}
    (tmp_path / "in" / "a.json").write_text(json.dumps(document))
    flags = ("--from", "labelme", "--source", tmp_path / "in")
    assert convert(*flags, "--output_dir", tmp_path / "out")["objects"] == {"train": 3}
    masks = masks_of(tmp_path / "out" / "train")["a.png"]
    assert [name for name, _ in masks] == ["leaf", "leaf", "stem"]
    assert masks[1][1][4:8, 18:22].all() and masks[1][1][2, 14]
    expected = np.zeros(SIZE, bool)
    expected[12:16, 20:26] = mask
    assert (masks[2][1] == expected).all()


def test_voc_masks_without_their_borders(tmp_path: Path) -> None:
    labels = np.zeros(SIZE, np.uint8)
    labels[2:10, 2:10], labels[12:18, 12:25] = 1, 2
    labels[2, 2:10] = 255
    classes = np.choose(np.minimum(labels, 3), [0, 12, 15, 255]).astype(np.uint8)
    for folder, values in (("SegmentationObject", labels), ("SegmentationClass", classes)):
        (tmp_path / "voc" / folder).mkdir(parents=True)
        picture = Image.fromarray(values, mode="P")
        picture.putpalette([part for n in range(256) for part in (n, 0, 0)])
        picture.save(tmp_path / "voc" / folder / "a.png")
    write_image(tmp_path / "voc" / "JPEGImages" / "a.jpg")
    lists = tmp_path / "voc" / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("a\n")
    flags = ("--from", "voc", "--source", tmp_path / "voc", "--output_dir", tmp_path / "out")
    assert convert(*flags)["objects"] == {"val": 2}
    masks = masks_of(tmp_path / "out" / "val")["a.jpg"]
    assert [name for name, _ in masks] == ["dog", "person"]
    for number, (_, mask) in enumerate(masks, start=1):
        assert (mask == (labels == number)).all()


def test_what_a_target_cannot_hold_is_named(tmp_path: Path) -> None:
    annotations = write_coco(tmp_path / "data", 1)
    document = json.loads(annotations.read_text())
    (only,) = document["annotations"]
    square = [[2.0, 2.0, 20.0, 2.0, 20.0, 20.0, 2.0, 20.0], [30.0, 30.0, 36.0, 30.0, 36.0, 36.0]]
    inner = [[4.0, 4.0, 8.0, 4.0, 8.0, 8.0, 4.0, 8.0]]
    same = {**only, "category_id": 1, "iscrowd": 0}
    document["annotations"] = [
        {**same, "id": 5, "segmentation": square, "bbox": [2, 2, 34, 34], "area": 342},
        {**same, "id": 6, "segmentation": inner, "bbox": [4, 4, 4, 4], "area": 16},
    ]
    annotations.write_text(json.dumps(document))
    flags = ("--source", annotations, "--images", annotations.parent)
    labels = convert("--to", "labels", *flags, "--output_dir", tmp_path / "labels")
    assert len(labels["notes"]) == 1 and "object 5 lost 16 of" in labels["notes"][0]
    yolo = convert("--to", "yolo", *flags, "--output_dir", tmp_path / "yolo")
    assert yolo["notes"] == ["image_0.png: object 5 became 2 outlines"]
    assert yolo["objects"] == {"train": 3}


@pytest.mark.parametrize(
    ("layout", "named"),
    [("masks", "source"), ("labels", "images"), ("yolo", "output_dir")],
)
def test_files_in_the_place_of_folders_are_named(
    layout: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    paths = {name: tmp_path / name for name in ("source", "images")[: 1 + (layout != "yolo")]}
    for path in paths.values():
        path.mkdir()
    given = {**paths, "output_dir": tmp_path / "out", named: file}
    flags = [part for name, path in given.items() for part in (f"--{name}", path)]
    assert f"--{named}: " in refused(capsys, "--from", layout, *flags)


def test_faults_are_sentences_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--output_dir", tmp_path / "out")
    assert "give --from" in refused(capsys, "--source", tmp_path, *out)
    assert "no folder" in refused(capsys, "--from", "yolo", "--source", tmp_path / "x", *out)
    write_yolo(tmp_path / "yolo")
    text = tmp_path / "yolo" / "labels" / "train" / "train.txt"
    for line, reason in (
        ("0 0.5 0.5 0.1 0.1", "is a box without an outline"),
        ("0 0.5 0.5 0.1 0.1 0.2", "x and y of three points"),
        ("7 0.5 0.5 0.1 0.1 0.2 0.2", "names no class 7"),
        ("leaf 0.5", "is no class and an outline"),
    ):
        text.write_text(f"0 0.1 0.1 0.5 0.1 0.5 0.6\n{line}\n")
        error = refused(capsys, "--from", "yolo", "--source", tmp_path / "yolo", *out)
        assert f"{text}, line 2" in error and reason in error
    images, labels = tmp_path / "images", tmp_path / "labels"
    write_image(images / "a.png")
    labels.mkdir()
    flags = ("--from", "labels", "--source", labels, "--images", images, *out)
    assert "holds no image file" in refused(capsys, *flags)
    for content, reason in (
        (np.zeros((5, 6), np.uint8), "is 6 x 5 px, and its image"),
        (np.eye(20, 30)[..., None] * np.array([1, 2, 3]), "colours or fractions"),
    ):
        Image.fromarray(content.astype(np.uint8)).save(labels / "a.png")
        assert reason in refused(capsys, *flags)
    (labels / "a.png").write_bytes(b"\x89PNG no")
    assert "cannot be read as a label image" in refused(capsys, *flags)
    (labels / "a.png").rename(labels / "b.png")
    assert "there is no image of this name" in refused(capsys, *flags)
    (tmp_path / "a.json").write_text("{")
    error = refused(capsys, "--from", "labelme", "--source", tmp_path, *out)
    assert "is no JSON file of LabelMe" in error
    document = {"imagePath": "images/a.png", "shapes": [{"label": "a", "points": [[1, 1], [2, 2]]}]}
    (tmp_path / "a.json").write_text(json.dumps(document))
    error = refused(capsys, "--from", "labelme", "--source", tmp_path, *out)
    assert "a.json, shape 1 is a polygon of 2 points, which covers no area" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("places", ["labels", "beside", "none"])
def test_outlines_of_yolo_are_found_or_missed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], places: str
) -> None:
    data = tmp_path / "data"
    write_image(data / "images" / "train" / "a.png")
    (data / "data.yaml").write_text("train: images\\train\nnames: [thing]\n")
    folder = {"labels": data / "labels" / "train", "beside": data / "images" / "train"}.get(places)
    if folder is None:
        error = refused(capsys, "--from", "yolo", "--source", data, "--output_dir", tmp_path / "b")
        assert "no image of" in error and "a.txt" in error
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.txt").write_text("\ufeff0 .1 .1 .5 .1 .5 .5\n", encoding="utf-8")
    result = convert("--from", "yolo", "--source", data, "--output_dir", tmp_path / "b")
    assert result["objects"] == {"train": 1}


@pytest.mark.parametrize(
    ("train", "place"),
    [
        ("images", ""),
        ("train.txt", "images/train"),
        ("train.txt", "./images/train"),
        ("train.txt", "data/images/train"),  # of CVAT
        ("train.txt", "C:\\sets\\images\\train"),
        ("train.txt", "/content/sets/images/train"),
        ("lists/train.txt", "../images/train"),
    ],
)
def test_images_of_yolo_are_in_folders_or_in_lists(tmp_path: Path, train: str, place: str) -> None:
    data = tmp_path / "data"
    for name in ("a", "b", "left_out"):
        folder = f"{name}_folder" if train == "images" else "train"
        write_image(data / "images" / folder / f"{name}.png")
        text = data / "labels" / folder / f"{name}.txt"
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text("0 .1 .1 .5 .1 .5 .5\n")
    (data / "data.yaml").write_text(f"train: {train}\nval: {train}\nnames: [thing]\n")
    if train == "images":
        expected = {"a.png", "b.png", "left_out.png"}
    else:
        expected = {"a.png", "b.png"}
        (data / train).parent.mkdir(exist_ok=True)
        (data / train).write_text(f"{place}/a.png\n\n{data}/images/train/b.png\r\n")
    result = convert("--from", "yolo", "--source", data, "--output_dir", tmp_path / "b")
    assert result["objects"] == {"train": len(expected)}
    assert {path.name for path in (tmp_path / "b" / "train").glob("*.png")} == expected


def test_a_list_of_yolo_names_the_image_that_is_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.txt").write_text("./images/gone.png\n")
    (tmp_path / "data.yaml").write_text("train: train.txt\nnames: [thing]\n")
    out = ("--output_dir", tmp_path / "b")
    error = refused(capsys, "--from", "yolo", "--source", tmp_path, *out)
    assert "train.txt lists ./images/gone.png, but there is no such file" in error


def test_masks_without_a_pixel_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_image(tmp_path / "images" / "a.png")
    cut_out = tmp_path / "masks" / "a" / "0.png"
    cut_out.parent.mkdir(parents=True)
    Image.new("L", SIZE[::-1]).save(cut_out)
    flags = ("--from", "masks", "--source", tmp_path / "masks", "--images", tmp_path / "images")
    error = refused(capsys, *flags, "--output_dir", tmp_path / "b")
    assert "has an object" in error and str(cut_out) in error
    assert not (tmp_path / "b").exists()


def test_what_cannot_be_read_is_not_called_unwritable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_yolo(tmp_path / "yolo")
    text = tmp_path / "yolo" / "labels" / "val" / "val.txt"
    read_text = Path.read_text

    def fail(path: Path, *args: object, **given: object) -> str:
        if path == text:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read_text(path, *args, **given)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "read_text", fail)
    out = ("--output_dir", tmp_path / "b")
    error = refused(capsys, "--from", "yolo", "--source", tmp_path / "yolo", *out)
    assert f"--source: {text} cannot be read (Input/output error)" in error


def test_numbers_of_classes_are_noticed(tmp_path: Path) -> None:
    numbers = np.zeros(SIZE, np.uint8)
    numbers[2:8, 2:8] = numbers[2:8, 12:18] = 1
    write_image(tmp_path / "images" / "a.png")
    (tmp_path / "masks").mkdir()
    Image.fromarray(numbers).save(tmp_path / "masks" / "a.png")
    places = ("--source", tmp_path / "masks", "--images", tmp_path / "images")
    result = convert("--from", "labels", *places, "--output_dir", tmp_path / "b")
    assert "1 of 1 masks are in separate parts" in result["notes"][0]
