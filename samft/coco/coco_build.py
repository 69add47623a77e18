"""From a COCO file and its images to checked arrays. Imports no torch."""

import itertools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from samft.coco.coco_images import Images, read_images
from samft.coco.coco_objects import CROWD, NO_ID, ObjectChunk, Objects
from samft.coco.json_reader import ObjectEntry, Raw, load_document, read_entries, to_id, value_of
from samft.coco.layout import ImageFolder
from samft.coco.masks import Segmentations
from samft.coco.problems import Problems

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
        problems.add_many("all-crowd", objects.ids, word="object")
        objects.flags[:] = 0
    problems.add_many("crowd", objects.ids[objects.flags & CROWD > 0], word="object")
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
