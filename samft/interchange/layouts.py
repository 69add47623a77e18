"""Reads the layouts of other tools: label images, masks, YOLO, LabelMe, VOC. Imports no torch."""

import base64
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from samft.annotations.segmentation import CroppedMask
from samft.errors import DataError
from samft.interchange.coco_writer import NO_CLASS
from samft.interchange.labelled import (
    LabelledImage,
    LabelledObject,
    check_sizes,
    find_images,
    has_images,
    image_size,
    mask_object,
    objects_of_numbers,
    read_numbers,
    viewed_size,
)
from samft.runtime.files import read_file
from samft.settings import read_yaml

# What annotators append to the name of an image for its labels, such as Cellpose.
_ENDINGS = ("_cp_masks", "_masks", "_mask", "_labels", "_label")
_VOID = 255  # of VOC: the border of objects
_VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
    "person pottedplant sheep sofa train tvmonitor"
).split()  # 1 to 20 in its label images


def read_labels(source: Path, images: Path) -> Iterator[LabelledImage]:
    """A folder of label images, one whole number for each object, named as the images are.

    Args:
        source: The label images; their names may end in `_masks`, `_label` and the like.
        images: The images, all of which must have labels.

    Yields:
        Each image.

    Raises:
        DataError: Files do not belong together, or cannot be read.
    """
    for image, labels in _pairs(*_images_and_labels(images, source)):
        numbers = read_numbers(labels)
        height, width = numbers.shape
        check_sizes(image, labels, (height, width))
        objects = objects_of_numbers(numbers, name=NO_CLASS, source=labels)
        yield LabelledImage(image, (height, width), objects)


def _images_and_labels(images: Path, source: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    files = find_images(images)
    if images.resolve() != source.resolve():
        return files, find_images(source)
    labels = {
        stem: path
        for stem, path in files.items()
        if any(stem.endswith(end) and stem.removesuffix(end) in files for end in _ENDINGS)
    }
    return {stem: path for stem, path in files.items() if stem not in labels}, labels


def _pairs(images: dict[str, Path], labels: dict[str, Path]) -> Iterator[tuple[Path, Path]]:
    of_image: dict[str, Path] = {}
    for stem, path in labels.items():
        names = [stem, *(stem.removesuffix(end) for end in _ENDINGS if stem.endswith(end))]
        name = next((name for name in names if name in images), None)
        if name is None:
            raise DataError(f"{path}: there is no image of this name in the folder of --images.")
        of_image[name] = path
    for stem, image in images.items():
        if stem not in of_image:
            raise DataError(f"{image} has no labels: add them, or take the image away.")
        yield image, of_image[stem]


def read_masks(source: Path, images: Path) -> Iterator[LabelledImage]:
    """A folder for each image, named as the image is, with a picture of each object's mask.

    Args:
        source: The folders; each may hold its masks in a folder `masks`.
        images: The images.

    Yields:
        Each image.

    Raises:
        DataError: Files do not belong together, or cannot be read.
    """
    folders = {path.name: path for path in sorted(source.iterdir()) if path.is_dir()}
    for stem, image in _pairs_of_folders(find_images(images), folders, source):
        inner = folders[stem] / "masks"
        objects = []
        for path in find_images(inner if inner.is_dir() else folders[stem]).values():
            one, size = mask_object(path, name=NO_CLASS)
            check_sizes(image, path, size)
            objects.append(one)
        yield LabelledImage(image, size, objects)


def _pairs_of_folders(
    images: dict[str, Path], folders: dict[str, Path], source: Path
) -> Iterator[tuple[str, Path]]:
    for name in sorted(folders.keys() ^ images.keys()):
        has, lacks = ("a folder", "no image") if name in folders else ("an image", "no folder")
        raise DataError(f"{source}: there is {has} {name}, and {lacks} of this name.")
    yield from images.items()


def read_yolo(source: Path) -> Iterator[LabelledImage]:
    """A YOLO dataset for segmentation: data.yaml, images, and a text file of outlines for each.

    Args:
        source: The folder of data.yaml, or that file.

    Yields:
        Each image; one without a text file has no objects.

    Raises:
        DataError: A file cannot be read, or a line is no outline.
    """
    file = source / "data.yaml" if source.is_dir() else source
    settings, names = _read_data_yaml(file)
    root = file.parent / str(settings.get("path") or "")
    root = root if root.is_dir() else file.parent  # some name a place on another machine
    read: set[Path] = set()
    num_texts = 0
    for split in ("train", "val", "test"):
        entry = settings.get(split)
        for folder in entry if isinstance(entry, list) else [entry] if entry else []:
            folder = str(folder).replace("\\", "/")
            place = root / folder
            if not place.exists():  # Roboflow writes ../train/images
                place = file.parent / folder.removeprefix("../")
            # YOLO needs a val, so datasets without one name their images for training twice.
            images = [] if place.resolve() in read else _yolo_images(place)
            read.add(place.resolve())
            for image in images:
                text_file = _yolo_text(image)
                num_texts += text_file.is_file()
                yield _read_yolo_image(image, text_file, names, split)
    if read and not num_texts:
        raise DataError(f"no image of {file} has outlines: there is no {text_file}, for one.")


def _read_data_yaml(file: Path) -> tuple[dict[str, Any], dict[int, str]]:
    try:
        settings = read_yaml(read_file(file).decode())
        names = settings["names"]
        pairs = names.items() if isinstance(names, dict) else enumerate(names)
        return settings, {int(key): str(name) for key, name in pairs}
    except Exception as error:  # whatever the YAML parser raises
        raise DataError(
            f"{file} cannot be read ({error}): it should have train, val and names, as YOLO's do."
        ) from error


def _yolo_images(place: Path) -> list[Path]:
    # Of a folder and those below it, or of a text file that lists them, as YOLO reads them.
    if not place.is_file():
        below = (path for path in sorted(place.rglob("*")) if path.is_dir())
        folders = [path for path in below if has_images(path)]
        if not folders or has_images(place):
            folders.insert(0, place)
        return [image for folder in folders for image in find_images(folder).values()]
    lines = read_file(place).decode("utf-8-sig").splitlines()
    return [_find_listed(line.strip(), place) for line in lines if line.strip()]


def _find_listed(name: str, place: Path) -> Path:
    # Some lists name places on another machine, or begin with a folder that is not there (CVAT).
    # Source: https://docs.cvat.ai/docs/dataset_management/formats/format-yolo-ultralytics
    path = Path(name.replace("\\", "/"))
    inner = (Path(*path.parts[first:]) for first in range(len(path.parts)))
    image = next((place.parent / one for one in inner if (place.parent / one).is_file()), None)
    if image is None:
        raise DataError(f"{place} lists {name}, but there is no such file: check the path.")
    return image


def _yolo_text(image: Path) -> Path:
    # Beside the image, where there is one, as of Darknet.
    parts = list(image.parent.parts)
    places = [k for k, part in enumerate(parts) if part == "images"]
    if places:
        parts[places[-1]] = "labels"
    beside = image.with_suffix(".txt")
    return beside if beside.is_file() else Path(*parts) / f"{image.stem}.txt"


def _read_yolo_image(
    image: Path, text_file: Path, names: dict[int, str], split: str
) -> LabelledImage:
    # Shares of the sides of the view: YOLO's readers turn images, as `exif_size` of ultralytics.
    height, width = viewed_size(image)
    labelled = LabelledImage(image, (height, width), split=split)
    lines = text_file.read_text(encoding="utf-8-sig").splitlines() if text_file.is_file() else []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{text_file}, line {number}"
        points, name = _read_yolo_line(line, names, where)
        polygon = (points * [width, height]).ravel().tolist()
        labelled.objects.append(LabelledObject(name, [polygon], where))
    return labelled


def _read_yolo_line(line: str, names: dict[int, str], where: str) -> tuple[np.ndarray, str]:
    try:
        first, *rest = line.split()
        key, numbers = int(first), np.array(rest, dtype=float)
    except ValueError:
        raise DataError(f"{where}: '{line[:60]}' is no class and an outline.") from None
    if key not in names:
        raise DataError(f"{where}: data.yaml names no class {key}.")
    if len(numbers) == 4:
        raise DataError(
            f"{where} is a box without an outline: this is a dataset for detection; predict masks "
            "for its boxes first."
        )
    if len(numbers) < 6 or len(numbers) % 2 or not np.isfinite(numbers).all():
        raise DataError(f"{where}: an outline has x and y of three points or more.")
    return numbers.reshape(-1, 2), names[key]


def read_labelme(source: Path) -> Iterator[LabelledImage]:
    """A folder of LabelMe's JSON files; shapes of one label and group_id are one object.

    Args:
        source: The folder.

    Yields:
        Each image.

    Raises:
        DataError: A file cannot be read, or has a shape that is no area.
    """
    files = sorted(source.glob("*.json"))
    if not files:
        raise DataError(f"the folder {source} holds no .json file: check the path.")
    for file in files:
        try:
            document = json.loads(read_file(file))
            image = file.parent / str(document["imagePath"]).replace("\\", "/")
            shapes = list(document["shapes"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{file} is no JSON file of LabelMe ({error}).") from error
        if not image.is_file():
            image = file.parent / image.name
        labelled = LabelledImage(image, _labelme_size(image, document))
        groups: dict[tuple[str, Any], list[list[float]]] = {}
        for number, shape in enumerate(shapes, start=1):
            where = f"{file}, shape {number}"
            name, outline = _read_shape(shape, where)
            key = (name, shape.get("group_id"))
            if isinstance(outline, list) and key[1] is not None and key in groups:
                groups[key] += outline
                continue
            if isinstance(outline, list):
                groups[key] = outline
            labelled.objects.append(LabelledObject(name, outline, where))
        yield labelled


def _labelme_size(image: Path, document: dict[str, Any]) -> tuple[int, int]:
    # LabelMe shows an image as EXIF turns it, and writes the size of that.
    stored, written = image_size(image), (document.get("imageHeight"), document.get("imageWidth"))
    return stored if written == stored else viewed_size(image)


def _read_shape(shape: Any, where: str) -> tuple[str, CroppedMask | list[list[float]]]:
    try:
        kind, points = shape.get("shape_type") or "polygon", np.array(shape["points"], dtype=float)
        name = str(shape["label"])
        if kind == "polygon" and len(points) >= 3:
            return name, [points.ravel().tolist()]
        if kind == "rectangle":
            (x0, y0), (x1, y1) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
            return name, [[x0, y0, x1, y0, x1, y1, x0, y1]]
        if kind == "mask":
            with Image.open(io.BytesIO(base64.b64decode(shape["mask"]))) as picture:
                pixels = np.array(picture) != 0
            x0, y0 = points.min(axis=0).round().astype(int).tolist()
            return name, CroppedMask(y0, x0, pixels)
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise DataError(f"{where} cannot be read ({error!r}).") from error
    raise DataError(
        f"{where} is a {kind} of {len(points)} points, which covers no area: samft reads polygons, "
        "rectangles and masks; take it away, or redraw it."
    )


def read_voc(source: Path) -> Iterator[LabelledImage]:
    """Pascal VOC: JPEGImages, SegmentationObject, SegmentationClass and lists of splits.

    The border of objects, 255, is no part of them.

    Args:
        source: The folder of these folders.

    Yields:
        Each image that a list names; without lists each that has a picture of objects.

    Raises:
        DataError: A file is missing or cannot be read.
    """
    images = find_images(source / "JPEGImages")
    objects = find_images(source / "SegmentationObject")
    classes = find_images(source / "SegmentationClass")
    for split, names in _voc_splits(source, list(objects)).items():
        for name in names:
            for folder, files in (
                ("JPEGImages", images),
                ("SegmentationObject", objects),
                ("SegmentationClass", classes),
            ):
                if name not in files:
                    raise DataError(f"{source / folder} has no {name}, which {split} names.")
            numbers, kinds = read_numbers(objects[name]), read_numbers(classes[name])
            height, width = numbers.shape
            check_sizes(images[name], objects[name], (height, width))
            check_sizes(images[name], classes[name], kinds.shape)
            yield LabelledImage(
                images[name],
                (height, width),
                _voc_objects(numbers, kinds, objects[name]),
                split=split,
            )


def _voc_objects(numbers: np.ndarray, kinds: np.ndarray, source: Path) -> list[LabelledObject]:
    objects = objects_of_numbers(numbers, name="", source=source, background=(_VOID,))
    named = []
    for one in objects:
        assert isinstance(one.shape, CroppedMask)
        x0, y0, x1, y1 = one.shape.extent
        inside = kinds[y0:y1, x0:x1][one.shape.mask]
        values, counts = np.unique(inside[(inside != 0) & (inside != _VOID)], return_counts=True)
        if not len(values):
            raise DataError(f"{one.source} has no class in SegmentationClass.")
        kind = int(values[counts.argmax()])
        known = 1 <= kind <= len(_VOC_CLASSES)
        name = _VOC_CLASSES[kind - 1] if known else f"class {kind}"
        named.append(LabelledObject(name, one.shape, one.source))
    return named


def _voc_splits(source: Path, all_names: list[str]) -> dict[str, list[str]]:
    lists = source / "ImageSets" / "Segmentation"
    splits = {
        split: (lists / f"{split}.txt").read_text().split()
        for split in ("train", "val", "test")
        if (lists / f"{split}.txt").is_file()
    }
    return splits or {"train": all_names}


READERS: dict[str, Callable[..., Iterator[LabelledImage]]] = {
    "labels": read_labels,
    "masks": read_masks,
    "yolo": read_yolo,
    "labelme": read_labelme,
    "voc": read_voc,
}
NEED_IMAGES = ("labels", "masks")  # the others say where their images are
