"""From a COCO file and its images to checked arrays. Imports no torch.

A checked COCO file as memory-mapped arrays in a cache folder, built once. Imports no torch.
"""

import hashlib
import itertools
import json
import logging
import os
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from samft.coco.entries import CROWD, NO_CATEGORY, NO_ID, Images, ObjectChunk, Objects, read_images
from samft.coco.json_reader import (
    ObjectEntry,
    Raw,
    file_digest,
    load_document,
    read_entries,
    to_id,
    value_of,
)
from samft.coco.layout import ImageFolder
from samft.coco.problems import Problems
from samft.coco.segmentation import Segmentations
from samft.errors import DataError
from samft.runtime.files import cache_folder, file_lock, write_json

_CHUNK = 20_000  # entries that are decoded at a time


@dataclass
class CheckedFile:
    """What a COCO file holds, checked."""

    images: Images
    objects: Objects
    categories: dict[int, str]  # id -> name
    problems: Problems


def check_file(annotations: Path, folder: ImageFolder) -> CheckedFile:
    """Reads a COCO file and checks all of it.

    Args:
        annotations: The JSON file.
        folder: Where its images are.

    Returns:
        The images and objects that can be used, and every problem.

    Raises:
        UnusableFile: It cannot be read, is not JSON, or not of COCO's form.
    """
    problems = Problems()
    document = load_document(annotations, problems)
    images = read_images(document.images, folder, problems)
    categories = read_categories(document.categories, problems)
    objects = read_objects(
        document.annotations, images, categories=set(categories), problems=problems
    )
    _note_categories(categories, objects, problems)
    plain = objects.rows[objects.flags & CROWD == 0]
    filled = np.bincount(plain, minlength=len(images.names)) > 0
    empty = [
        name
        for name, code, full in zip(images.names, images.codes, filled, strict=True)
        if not (code or full)
    ]
    problems.add("image-without-objects", *empty)
    if not len(plain):
        problems.add("no-objects", annotations.name)
    return CheckedFile(images, objects, categories, problems)


def read_categories(raw: Any, problems: Problems) -> dict[int, str]:
    """Reads the list of categories.

    Args:
        raw: Whatever stands under 'categories'.
        problems: What is found is added.

    Returns:
        From id to name.
    """
    if not isinstance(raw, list) or not raw:
        problems.add("categories-missing", "categories")
        return {}
    categories: dict[int, str] = {}
    for position, entry in enumerate(raw):
        category_id = to_id(entry.get("id")) if isinstance(entry, dict) else None
        name = entry.get("name") if isinstance(entry, dict) else None
        if category_id is None or not isinstance(name, str):
            problems.add("category-malformed", f"entry {position}")
            continue
        if type(entry["id"]) is not int:
            problems.add("id-not-integer", f"category {entry['id']!r}")
        if category_id in categories:
            problems.add("category-id-twice", f"category {category_id} ({name})")
            continue
        if name in categories.values():
            problems.add("category-name-twice", f"{name} (category {category_id})")
        categories[category_id] = name
    return categories


def _note_categories(categories: dict[int, str], objects: Objects, problems: Problems) -> None:
    used = set(np.unique(objects.categories).tolist())
    if 0 in categories and 0 not in used and len(categories) > 1:
        problems.add("category-placeholder", f"0 ({categories[0]})")
    ids = sorted(categories)
    gaps = [later for one, later in itertools.pairwise(ids) if later != one + 1]
    problems.add("category-ids-not-contiguous", *(f"gap before {later}" for later in gaps))


def read_objects(
    entries: list[Raw], images: Images, *, categories: set[int], problems: Problems
) -> Objects:
    """Reads and checks all entries.

    Args:
        entries: Of `Document.annotations`.
        images: Of the same file.
        categories: The known category ids.
        problems: What is found is added, the codes of bad images that have objects included.

    Returns:
        The objects that can be used; a box that cannot is taken from the mask.
    """
    chunks = []
    lost: Counter[int] = Counter()
    bar = tqdm(total=len(entries), desc="checking objects", unit="object", disable=None, delay=2)
    with bar:
        for first in range(0, max(len(entries), 1), _CHUNK):
            part = entries[first : first + _CHUNK]
            chunk = ObjectChunk(images, categories, lost)
            for position, entry in enumerate(read_entries(part, ObjectEntry), first):
                chunk.take(position, entry)
            chunks.append(chunk.finish(problems))
            bar.update(len(part))
    for row, code in enumerate(images.codes):
        if code and lost[row]:
            lost_words = f"{lost[row]} object{'s' * (lost[row] > 1)}"
            problems.add(code, f"{images.names[row]} ({lost_words})")
        elif code:
            images.codes[row] = "image-unused-bad"
            problems.add("image-unused-bad", images.names[row])
    objects = _make_ids_unique(_join(chunks), entries, problems)
    if len(objects.flags) and (objects.flags & CROWD).all():
        problems.add_ids("all-crowd", objects.ids, noun="object")
        objects.flags[:] = 0
    problems.add_ids("crowd", objects.ids[objects.flags & CROWD > 0], noun="object")
    return objects


def _join(chunks: list[Objects]) -> Objects:
    # Grouped by image, in the order of the file within each.
    rows = np.concatenate([chunk.rows for chunk in chunks])
    order = np.argsort(rows, kind="stable")
    ends = np.cumsum([0, *(len(chunk.segmentations.words) for chunk in chunks)])
    starts = [chunk.segmentations.starts + end for chunk, end in zip(chunks, ends, strict=False)]
    words = np.concatenate([chunk.segmentations.words for chunk in chunks])
    joined = {
        name: np.concatenate([getattr(chunk, name) for chunk in chunks])[order]
        for name in ("positions", "ids", "categories", "flags", "boxes", "areas")
    }
    segmentations = Segmentations(words, np.concatenate(starts)[order])
    return Objects(rows=rows[order], segmentations=segmentations, **joined)


def _make_ids_unique(objects: Objects, entries: list[Raw], problems: Problems) -> Objects:
    # The same entry again is left out; another object of the same id, or of none, gets a new one.
    order = np.lexsort([objects.positions, objects.ids])
    ids = objects.ids[order]
    again = np.flatnonzero((ids[1:] == ids[:-1]) & (ids[1:] != NO_ID)) + 1
    firsts = np.searchsorted(ids, ids[again])
    kept = np.ones(len(ids), dtype=bool)
    renewed = np.flatnonzero(objects.ids == NO_ID).tolist()
    for k, first in zip(order[again].tolist(), order[firsts].tolist(), strict=True):
        same = value_of(entries[objects.positions[k]]) == value_of(
            entries[objects.positions[first]]
        )
        problems.add(
            "annotation-duplicate" if same else "annotation-id-twice", f"object {objects.ids[k]}"
        )
        kept[k] = not same
        renewed += [] if same else [k]
    if renewed:
        taken = set(objects.ids.tolist())
        free = (number for number in itertools.count(1) if number not in taken)
        for k in sorted(renewed, key=lambda k: int(objects.positions[k])):
            objects.ids[k] = next(free)
    return objects if kept.all() else objects.take(np.flatnonzero(kept))


logger = logging.getLogger(__name__)

FORMAT = 1
_META = "index.json"
_KEPT_DAYS = 30  # an index that no run has opened for so long is deleted


@dataclass(frozen=True)
class CocoIndex:
    """What a COCO file holds, checked: N images, K objects grouped by image, crowds included.

    All arrays are files mapped into memory, so that processes share them; a pickle of this is a
    path, not data.
    """

    folder: Path  # of the arrays
    image_folder: Path
    names: NDArray[np.uint8]  # file names one after the other, UTF-8
    name_ends: NDArray[np.int64]  # [N]
    image_ids: NDArray[np.int64]  # [N]
    sizes: NDArray[np.int32]  # [N, 2] H, W of the file
    num_bytes: NDArray[np.int64]  # [N] of the file
    bad: NDArray[np.bool_]  # [N] whether the file cannot be used
    first_object: NDArray[np.int64]  # [N + 1]; image i has objects first_object[i:i + 2]
    positions: NDArray[np.int64]  # [K] the entry in the list 'annotations'
    object_ids: NDArray[np.int64]  # [K]
    categories: NDArray[np.int64]  # [K]
    flags: NDArray[np.uint8]  # [K] bits, see `coco_objects`
    boxes: NDArray[np.float64]  # [K, 4] x0 y0 x1 y1, original frame, px
    areas: NDArray[np.float64]  # [K] of the mask, px
    segmentations: Segmentations  # [K]
    category_names: dict[int, str]
    bad_images: dict[str, str]  # of those with objects, file name -> code in `problems.KINDS`
    problems: Problems

    def __reduce__(self) -> tuple[Any, ...]:
        return open_index, (self.folder, self.image_folder)

    @property
    def num_images(self) -> int:
        """All images, those that cannot be used and those without objects included."""
        return len(self.image_ids)

    def file_name(self, row: int) -> str:
        """Of an image, relative to the image folder."""
        start = int(self.name_ends[row - 1]) if row else 0
        return self.names[start : int(self.name_ends[row])].tobytes().decode(errors=_ESCAPE)

    def file_names(self) -> list[str]:
        """Of all images."""
        return [self.file_name(row) for row in range(self.num_images)]


_ESCAPE = "surrogateescape"  # file names that are not UTF-8 come back as they were
_NO_ARRAYS = {"folder", "image_folder", "segmentations", "category_names", "bad_images", "problems"}
_ARRAYS = tuple(name for name in CocoIndex.__annotations__ if name not in _NO_ARRAYS)


def index_file(
    annotations: Path, image_folder: Path, *, root: Path | None = None, cache: Path | None = None
) -> CocoIndex:
    """Opens the checked index of a COCO file, built the first time, once per node.

    It is built anew when the JSON's content changes, when image files come or go, and when a
    broken one is replaced.

    Args:
        annotations: The JSON file.
        image_folder: What its file names are relative to.
        root: The dataset's folder; symbolic links of images may lead to anywhere below it.
        cache: Folder of indexes; by default `index` in the cache folder.

    Raises:
        UnusableFile: The JSON cannot be read, or the index cannot be written.
    """
    digest = file_digest(annotations)
    images = ImageFolder(image_folder, root=root)
    words = [FORMAT, digest, image_folder.resolve(), root and root.resolve()]
    key = hashlib.sha256("\n".join(map(str, words)).encode(errors=_ESCAPE)).hexdigest()[:32]
    try:
        cache = _writable(cache)
        with file_lock(cache / f"{key}.lock"):
            place = cache / key
            if not _is_fresh(place, images):
                started = time.monotonic()
                checked = check_file(annotations, images)
                _save(checked, place, images)
                _prune(cache)
                seconds = time.monotonic() - started
                logger.info("checked and indexed %s in %.1f s", annotations, seconds)
            os.utime(place / _META)
            return open_index(place, image_folder)
    except OSError as error:
        raise DataError(
            f"the index of {annotations} cannot be written to {cache} ({error.strerror}): set "
            "SAMFT_CACHE to a folder with room."
        ) from error


def open_index(folder: Path, image_folder: Path) -> CocoIndex:
    """Maps an index that `index_file` has built into memory.

    Args:
        folder: Of the arrays.
        image_folder: What file names are relative to.
    """
    meta = json.loads((folder / _META).read_text())
    arrays = {name: _map(folder / f"{name}.npy") for name in (*_ARRAYS, "words", "starts")}
    segmentations = Segmentations(arrays.pop("words"), arrays.pop("starts"))
    return CocoIndex(
        folder=folder,
        image_folder=image_folder,
        segmentations=segmentations,
        category_names={int(key): name for key, name in meta["categories"].items()},
        bad_images=meta["bad_images"],
        problems=Problems.from_json(meta["problems"]),
        **arrays,
    )


def _map(path: Path) -> NDArray[Any]:
    # A plain array over the mapped file: slices of np.memmap cost several times as much.
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def _writable(cache: Path | None) -> Path:
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        return cache
    folder = cache_folder() / "index"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        # A home that cannot be written is common in containers.
        other = Path(tempfile.gettempdir()) / f"samft-{os.getuid()}" / "index"
        logger.warning("%s cannot be written (%s); indexes go to %s", folder, error, other)
        other.mkdir(mode=0o700, parents=True, exist_ok=True)
        return other


def _is_fresh(place: Path, images: ImageFolder) -> bool:
    try:
        meta = json.loads((place / _META).read_text())
    except FileNotFoundError:
        return False
    return not images.changed(meta["listings"]) and all(
        _stamp(images.folder, name, meta["bad_images"][name]) == stamp
        for name, stamp in meta["bad_stamps"].items()
    )


def _stamp(folder: Path, name: str, code: str) -> list[int] | None:
    # Changes when a broken file is replaced. What lies outside is not even looked at.
    try:
        found = None if code == "image-outside" else (folder / name).lstat()
    except (OSError, ValueError):
        found = None
    if found is None:
        return None
    return [found.st_size, found.st_mtime_ns]


def _save(checked: CheckedFile, place: Path, listed: ImageFolder) -> None:
    images, objects = checked.images, checked.objects
    names = [name.encode(errors=_ESCAPE) for name in images.names]
    per_image = np.bincount(objects.rows, minlength=len(names))
    bad = {
        name: code
        for name, code in zip(images.names, images.codes, strict=True)
        if code not in ("", "image-unused-bad")
    }
    arrays = {
        "names": np.frombuffer(b"".join(names), dtype=np.uint8),
        "name_ends": np.cumsum([len(name) for name in names], dtype=np.int64),
        "image_ids": images.ids,
        "sizes": images.sizes,
        "num_bytes": images.num_bytes,
        "bad": np.array([code != "" for code in images.codes], dtype=bool),
        "first_object": np.cumsum([0, *per_image], dtype=np.int64),
        "object_ids": objects.ids,
        "words": objects.segmentations.words,
        "starts": objects.segmentations.starts,
        **{name: getattr(objects, name) for name in _OBJECT_ARRAYS},
    }
    place.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=place.parent, prefix=".index.", suffix=".part"))
    try:
        for name, values in arrays.items():
            with (part / f"{name}.npy").open("wb") as file:
                np.save(file, values, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
        meta = {
            "listings": listed.digests(),
            "bad_images": bad,
            "bad_stamps": {name: _stamp(listed.folder, name, code) for name, code in bad.items()},
            "categories": checked.categories,
            "problems": checked.problems.to_json(),
        }
        write_json(part / _META, meta)
        _replace_folder(place, part)
    finally:
        shutil.rmtree(part, ignore_errors=True)


_OBJECT_ARRAYS = ("positions", "categories", "flags", "boxes", "areas")


def _replace_folder(place: Path, part: Path) -> None:
    # Processes that still have the old files mapped keep them.
    if place.exists():
        old = Path(tempfile.mkdtemp(dir=place.parent, prefix=".index.", suffix=".part"))
        place.rename(old / "old")
        part.rename(place)
        shutil.rmtree(old, ignore_errors=True)
    else:
        part.rename(place)


def _prune(cache: Path) -> None:
    limit = time.time() - _KEPT_DAYS * 86_400
    for folder in cache.iterdir():
        meta = folder / _META
        old = folder.name.endswith(".part") and folder.stat().st_mtime < limit
        if old or (meta.exists() and meta.stat().st_mtime < limit):
            shutil.rmtree(folder, ignore_errors=True)


def class_names(index: CocoIndex) -> dict[int, str]:
    """The names of all category ids that are listed or used: `category 99`, `unknown`."""
    used = np.unique(index.categories).tolist()
    missing = {one: f"category {one}" for one in used if one not in index.category_names}
    if NO_CATEGORY in missing:
        missing[NO_CATEGORY] = "unknown"
    return {**index.category_names, **missing}
