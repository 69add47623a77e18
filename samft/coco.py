"""A COCO file, checked entry by entry, as a compact index in arrays. Imports no torch."""

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samft.errors import DataError
from samft.images import MAX_PIXELS, find_missing, header_size
from samft.masks import MaskError, Segmentations, check_segmentation, decode_cropped, has_pixels
from samft.masks import decode_segmentation as decode_segmentation

logger = logging.getLogger(__name__)

_SPLIT_NAMES = {"val": ("val", "valid", "validation")}


@dataclass(frozen=True)
class CocoIndex:
    """The usable objects of a COCO file, grouped by image, for N images and K objects."""

    image_folder: Path
    file_names: list[str]
    image_ids: NDArray[np.int64]  # [N]
    sizes_json: NDArray[np.int32]  # [N, 2] H, W as the JSON says (the file's where that cannot be)
    first_object: NDArray[np.int64]  # [N + 1]; image i has objects first_object[i:i + 2]
    object_ids: NDArray[np.int64]  # [K]
    boxes: NDArray[np.float64]  # [K, 4] x0 y0 x1 y1, original frame, px, as annotated
    categories: NDArray[np.int64]  # [K]
    segmentations: Segmentations  # [K]
    counts: dict[str, int]  # what was left out, by reason

    @property
    def num_images(self) -> int:
        """Images with at least one usable object."""
        return len(self.file_names)

    @property
    def num_objects(self) -> int:
        """Usable objects."""
        return len(self.object_ids)

    def select(self, rows: Sequence[int]) -> "CocoIndex":
        """The index of some of the images, in the order given; `counts` stays behind, empty."""
        ranges = [np.arange(*self.first_object[i : i + 2]) for i in rows]
        objects = np.concatenate([*ranges, np.zeros(0, dtype=np.int64)])
        return CocoIndex(
            image_folder=self.image_folder,
            file_names=[self.file_names[i] for i in rows],
            image_ids=self.image_ids[list(rows)],
            sizes_json=self.sizes_json[list(rows)],
            first_object=np.cumsum([0, *map(len, ranges)], dtype=np.int64),
            object_ids=self.object_ids[objects],
            boxes=self.boxes[objects],
            categories=self.categories[objects],
            segmentations=Segmentations.pack([self.segmentations[int(k)] for k in objects]),
            counts={},
        )


@dataclass
class _ImageEntry:
    path: Path
    file_name: str
    size: tuple[int, int]  # H, W
    row: int
    size_is_real: bool = False  # from the file's header

    def read_size(self) -> None:
        if not self.size_is_real:
            self.size, self.size_is_real = header_size(self.path), True


def read_coco(annotations: Path, image_folder: Path) -> CocoIndex:
    """Reads and checks a COCO file.

    Left out and counted in `CocoIndex.counts`: `crowd` objects (unless there is nothing else: then
    they are used, with a warning), objects with `no_mask` (empty, or without a pixel in the image),
    a `bad_mask` (malformed), an `unknown_image`, a `bad_annotation` (not an object of JSON, or
    without an image id), a `duplicate_object` (the same entry again), and an
    `image_without_objects` (none left). A box that is missing or unusable is taken from the mask.

    Args:
        annotations: The JSON file.
        image_folder: What its file names are relative to.

    Raises:
        DataError: If the file cannot be read or holds no usable object, an image is missing or lies
            outside of the folder, or ids contradict each other.
    """
    document = _load_json(annotations)
    images = _read_images(document, annotations, image_folder)
    entries = document["annotations"]
    wanted = {_to_id(entry.get("image_id")) for entry in entries if isinstance(entry, dict)}
    used = [image for image_id, image in images.items() if image_id in wanted]
    missing = find_missing(image_folder, [image.file_name for image in used])
    if missing:
        first = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise DataError(
            f"{len(missing)} of {len(used)} images of {annotations} are not in {image_folder}: "
            f"{first}; check the image folder, or remove them from the JSON."
        )
    for image in used:
        if min(image.size) < 1 or image.size[0] * image.size[1] > MAX_PIXELS:
            image.read_size()
    counts: Counter[str] = Counter()
    objects = _read_objects(entries, images, counts, annotations)
    if not objects:
        left_out = ", ".join(f"{reason} {n}" for reason, n in sorted(counts.items()))
        raise DataError(
            f"{annotations} holds no usable object ({left_out or 'it has no annotations'}): samft "
            "needs objects with a polygon or RLE segmentation."
        )
    objects.sort(key=lambda fields: fields[0])
    image_rows, first_object = np.unique([fields[0] for fields in objects], return_index=True)
    counts["image_without_objects"] += len(images) - len(image_rows)
    by_row = list(images.items())
    kept = [by_row[row] for row in image_rows]
    return CocoIndex(
        image_folder=image_folder,
        file_names=[image.file_name for _, image in kept],
        image_ids=np.asarray([image_id for image_id, _ in kept], dtype=np.int64),
        sizes_json=np.asarray([image.size for _, image in kept], dtype=np.int32),
        first_object=np.append(first_object, len(objects)).astype(np.int64),
        object_ids=np.asarray([fields[1] for fields in objects], dtype=np.int64),
        boxes=np.asarray([fields[2] for fields in objects], dtype=np.float64),
        categories=np.asarray([fields[3] for fields in objects], dtype=np.int64),
        segmentations=Segmentations.pack([fields[4] for fields in objects]),
        counts={reason: n for reason, n in sorted(counts.items()) if n},
    )


def _load_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"There is no annotation file {path}: check the path.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check the path.") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}; "
            "it may be cut short, so export or copy it again."
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}): export it again.") from error
    for key in ("images", "annotations"):
        if not isinstance(document, dict) or not isinstance(document.get(key), list):
            raise DataError(
                f"{path} has no list '{key}': samft needs a COCO instances file, an object with "
                "'images' and 'annotations'."
            )
    return document


def _to_id(raw: Any) -> int | None:
    # Whole numbers, also as text or 5.0, as some exporters write them.
    try:
        number = int(raw)
        whole = number == float(raw) if isinstance(raw, float) else True
    except (TypeError, ValueError, OverflowError):
        return None
    return number if whole and -(2**63) <= number < 2**63 else None


def _to_size(entry: dict[str, Any]) -> tuple[int, int]:
    # (0, 0): the JSON does not say.
    height, width = _to_id(entry.get("height")), _to_id(entry.get("width"))
    return (height, width) if height and width else (0, 0)


def _read_images(
    document: dict[str, Any], annotations: Path, image_folder: Path
) -> dict[int, _ImageEntry]:
    images: dict[int, _ImageEntry] = {}
    for position, entry in enumerate(document["images"]):
        image_id = _to_id(entry.get("id")) if isinstance(entry, dict) else None
        name = entry.get("file_name") if isinstance(entry, dict) else None
        if image_id is None or not isinstance(name, str) or not name.strip():
            raise DataError(
                f"{annotations}: entry {position} of 'images' needs a whole number 'id' and a "
                "'file_name': mend or remove it."
            )
        posix, windows = PurePosixPath(name), PureWindowsPath(name)
        outside = ".." in posix.parts + windows.parts or posix.is_absolute() or windows.anchor
        if outside or "\0" in name:
            raise DataError(
                f"{annotations}: the file name {name!r} leaves the image folder: use names "
                "relative to it, without '..'."
            )
        known = images.get(image_id)
        if known is not None and known.file_name != name:
            raise DataError(
                f"{annotations}: image id {image_id} stands for both {known.file_name!r} and "
                f"{name!r}: give each image its own id."
            )
        if known is None:
            images[image_id] = _ImageEntry(
                path=image_folder / name, file_name=name, size=_to_size(entry), row=len(images)
            )
    return images


def _read_objects(
    entries: list[Any],
    images: dict[int, _ImageEntry],
    counts: Counter[str],
    annotations: Path,
) -> list[tuple[int, int, list[float], int, Any]]:
    # Tuples of image row, object id, box, category, checked segmentation.
    only_crowds = bool(entries) and all(_is_crowd(entry) for entry in entries)
    if only_crowds:
        logger.warning("%s holds only crowds (iscrowd 1): they are used as objects.", annotations)
    seen: dict[int, Any] = {}
    objects = []
    for position, entry in enumerate(entries):
        image_id = _to_id(entry.get("image_id")) if isinstance(entry, dict) else None
        object_id = _to_id(entry.get("id")) if isinstance(entry, dict) else None
        if image_id is None:
            counts["bad_annotation"] += 1
        elif image_id not in images:
            counts["unknown_image"] += 1
        elif _is_crowd(entry) and not only_crowds:
            counts["crowd"] += 1
        elif object_id in seen and seen[object_id] == entry:
            counts["duplicate_object"] += 1
        else:
            object_id = position if object_id is None else object_id
            seen[object_id] = entry
            image = images[image_id]
            try:
                box, segmentation = _check_object(entry, image)
            except MaskError as error:
                counts[error.reason] += 1
                continue
            category = _to_id(entry.get("category_id")) or 0
            objects.append((image.row, object_id, box, category, segmentation))
    return objects


def _is_crowd(entry: Any) -> bool:
    return isinstance(entry, dict) and _to_id(entry.get("iscrowd")) == 1


def _check_object(entry: dict[str, Any], image: _ImageEntry) -> tuple[list[float], Any]:
    # Box (x0 y0 x1 y1) and checked segmentation.
    segmentation = check_segmentation(entry.get("segmentation"))
    try:
        x, y, width, height = (float(number) for number in entry["bbox"])
        box = [x, y, x + width, y + height]
    except (KeyError, TypeError, ValueError, OverflowError):
        box = [0.0] * 4
    # Only the file knows its size: what does not fit the JSON's may fit it.
    if not (_fits(box, image.size) and has_pixels(segmentation, *image.size)):
        image.read_size()
        if not has_pixels(segmentation, *image.size):
            raise MaskError("no_mask")
    if not _fits(box, image.size):
        top, left, crop = decode_cropped(segmentation, *image.size)
        box = [left, top, left + crop.shape[1], top + crop.shape[0]]
    return box, segmentation


def _fits(box: list[float], size: tuple[int, int]) -> bool:
    # A box may leave the image, but not by more than the image's size. NaN fits nowhere.
    (x0, y0, x1, y1), (height, width) = box, size
    across = -width <= x0 < min(x1, width) and 0 < x1 <= 2 * width
    return across and -height <= y0 < min(y1, height) and 0 < y1 <= 2 * height


def find_split(data_root: Path, split: str) -> tuple[Path, Path]:
    """Finds a split's annotation file and image folder under a dataset's root.

    Two layouts: `SPLIT/_annotations.coco.json` beside its images, and the official
    `annotations/instances_SPLIT.json` with `SPLIT/`. For `val`, `valid` and `validation` are tried
    as well; a year at the end (`train2017`) may be left out where there is only one.

    Raises:
        DataError: If there is no such folder, no such split, or more than one that fits.
    """
    if not data_root.is_dir():
        raise DataError(f"There is no dataset folder {data_root}: check --data_root.")
    for name in _SPLIT_NAMES.get(split, (split,)):
        beside = data_root / name / "_annotations.coco.json"
        if beside.is_file():
            return beside, beside.parent
        fitting = _official_names(data_root, name)
        if len(fitting) > 1:
            raise DataError(
                f"{data_root} has more than one split for {split!r}: name one of "
                f"{', '.join(fitting)}."
            )
        if fitting:
            file = data_root / "annotations" / f"instances_{fitting[0]}.json"
            folders = [data_root / fitting[0], data_root / "images" / fitting[0]]
            return file, next((folder for folder in folders if folder.is_dir()), folders[0])
    tried = " or ".join(_SPLIT_NAMES.get(split, (split,)))
    raise DataError(
        f"{data_root} has no split {tried}: neither {split}/_annotations.coco.json nor "
        f"annotations/instances_{split}.json; name the split, or give the annotation file and the "
        "image folder."
    )


def _official_names(data_root: Path, name: str) -> list[str]:
    if (data_root / "annotations" / f"instances_{name}.json").is_file():
        return [name]
    pattern = re.compile(rf"instances_({re.escape(name)}\d{{4}})\.json")
    files = sorted((data_root / "annotations").glob("instances_*.json"))
    return [match[1] for match in map(pattern.fullmatch, (file.name for file in files)) if match]


def split_by_hash(index: CocoIndex, val_fraction: float) -> tuple[CocoIndex, CocoIndex]:
    """Holds out a share of the images for validation: those whose file names hash lowest.

    The choice depends on the file names only, not on their order or on a seed.

    Args:
        index: Of all images.
        val_fraction: Share to hold out; at least one image goes to either side.

    Returns:
        The training index, which keeps `counts`, and the validation index.

    Raises:
        DataError: If there are fewer than two images to share out.
    """
    names = sorted(set(index.file_names), key=lambda name: hashlib.sha256(name.encode()).digest())
    if len(names) < 2:
        raise DataError(
            f"{index.image_folder} has {len(names)} image with objects: holding out a share for "
            "validation takes at least two."
        )
    held_out = set(names[: min(max(round(val_fraction * len(names)), 1), len(names) - 1)])
    rows = range(index.num_images)
    train = index.select([i for i in rows if index.file_names[i] not in held_out])
    val = index.select([i for i in rows if index.file_names[i] in held_out])
    return replace(train, counts=index.counts), val
