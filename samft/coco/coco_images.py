"""The entries of 'images' of a COCO file, matched with the files on disk. Imports no torch."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from samft.coco.images import ImageFacts, inspect_image
from samft.coco.json_reader import ImageEntry, Raw, read_entries, to_id, to_size
from samft.coco.layout import ImageFolder
from samft.coco.problems import Problems

_THREADS = 8  # a network disk answers many questions at once
_PART = 64  # files a thread looks at in one go: handing over a single one costs as much as the look


@dataclass
class Images:
    """The images of a COCO file, one row for each file, N of them.

    Attributes:
        names: Relative to the image folder, as found.
        ids: int64 [N].
        sizes: int32 [N, 2], H, W of the file; what the JSON says where the file cannot be read.
        num_bytes: int64 [N], of the file; 0 where it cannot be read.
        codes: [N] why the file cannot be used, a key of `problems.KINDS`, or ''.
        row_of: From every image id to its row.
    """

    names: list[str]
    ids: NDArray[np.int64]
    sizes: NDArray[np.int32]
    num_bytes: NDArray[np.int64]
    codes: list[str]
    row_of: dict[int, int]


def read_images(entries: list[Raw], folder: ImageFolder, problems: Problems) -> Images:
    """Reads the entries, finds their files and looks at the head and the end of each file.

    Args:
        entries: Of `Document.images`.
        folder: Where the files are.
        problems: What is found is added, but for the images' own codes, which matter only where an
            image has objects.

    Returns:
        The images; entries without an id or a name are left out.
    """
    images = _read_entries(entries, folder, problems)
    rows = [row for row, code in enumerate(images.codes) if not code]
    sizes = images.sizes.tolist()
    paths = [folder.folder / images.names[row] for row in rows]
    for row, facts in zip(rows, inspect_images(paths), strict=True):
        images.codes[row], images.num_bytes[row] = facts.problem or "", facts.num_bytes
        if facts.problem is None:
            _compare(images.names[row], facts, tuple(sizes[row]), problems)
            images.sizes[row] = facts.height, facts.width
    return images


def _read_entries(entries: list[Raw], folder: ImageFolder, problems: Problems) -> Images:
    names: list[str] = []
    codes, ids, sizes = [], [], []
    row_of: dict[int, int] = {}
    row_of_name: dict[str, int] = {}
    for position, entry in enumerate(read_entries(entries, ImageEntry)):
        image_id = None if entry is None else to_id(entry.id)
        name = None if entry is None else entry.file_name
        if entry is None or image_id is None or not isinstance(name, str) or not name.strip():
            problems.add("image-malformed", f"entry {position}")
            continue
        if type(entry.id) is not int:
            problems.add("id-not-integer", f"image {entry.id!r}")
        found, code = folder.find(name)
        row = row_of_name.setdefault(found, len(names))
        known = row_of.setdefault(image_id, row)
        if known != row:
            both = f"image {image_id}: {names[known]!r} and {name!r}"
            problems.add("image-id-ambiguous", both)
        if row < len(names):
            if known == row:
                problems.add("image-listed-twice", found)
            continue
        if code == "image-name-mended":
            problems.add(code, name)
        names.append(found)
        codes.append("" if code == "image-name-mended" else code)
        ids.append(image_id)
        sizes.append(to_size(entry))
    arrays = np.array(ids, dtype=np.int64), np.array(sizes, dtype=np.int32).reshape(-1, 2)
    return Images(names, *arrays, np.zeros(len(ids), dtype=np.int64), codes, row_of)


def inspect_images(paths: list[Path]) -> Iterator[ImageFacts]:
    """Looks at many files at once, see `inspect_image`; what it finds, in the order given."""
    bar = tqdm(total=len(paths), desc="looking at images", unit="image", disable=None, delay=2)
    parts = [paths[first : first + _PART] for first in range(0, len(paths), _PART)]
    with bar, ThreadPoolExecutor(_THREADS) as pool:
        for facts in pool.map(lambda part: [inspect_image(path) for path in part], parts):
            bar.update(len(facts))
            yield from facts


def _compare(name: str, facts: ImageFacts, size_json: tuple[int, int], problems: Problems) -> None:
    size = facts.height, facts.width
    if size_json == (0, 0):
        problems.add("image-size-missing", name)
    elif size_json != size:
        words = f"{name}: {size_json[1]}x{size_json[0]} is {size[1]}x{size[0]}"
        turned = facts.orientation > 4 and size_json == size[::-1]
        problems.add("image-size-differs", words + (", as if turned by EXIF" if turned else ""))
    if facts.orientation != 1:
        problems.add("image-exif-rotated", name)
