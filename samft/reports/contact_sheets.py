"""Sheets of many objects, cut out, that show at a glance what a dataset holds. Imports no torch."""

import bisect
import re
from collections import defaultdict
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from samft.coco.entries import CROWD
from samft.coco.images import ImageError, read_image
from samft.coco.index import CocoIndex, class_names
from samft.coco.problems import Problems
from samft.coco.segmentation import CroppedMask
from samft.reports.drawing import (
    BEYOND,
    TILE,
    ObjectCrop,
    annotate_crop,
    crop_around,
    image_row_of,
    stack_horizontally,
    write_png,
)

COLUMNS, NUM_TILES = 6, 24
MAX_CLASSES = 100  # sheets of the most frequent ones
_NUM_ODD = 4  # of each kind
_THIN, _SPARSE = 6, 0.25  # longer side / shorter side; area of mask / area of box
_PAPER, _INK = (255, 255, 255), (40, 40, 40)
_ODD_CODES = re.compile("(box|mask|rle|polygon)-(?!parts|flat)")


@dataclass(frozen=True)
class SheetEntry:
    """An object to show, as an index into a `CocoIndex`, what to say of it, a model's mask."""

    object: int
    remark: str
    predicted: CroppedMask | None = None


def write_sheets(index: CocoIndex, problems: Problems, folder: Path, *, name: str) -> list[Path]:
    """Writes contact sheets: per class, smallest, largest, odd.

    Args:
        index: The checked file; crowds are not shown.
        problems: Objects that are examples of a problem with their box or mask are odd ones.
        folder: Must exist.
        name: What the files' names begin with: the split.

    Returns:
        The PNG files, `NAME-class-CLASS.png`, `NAME-smallest.png`, `NAME-largest.png`,
        `NAME-odd.png`; the choice is the same each time.

    Raises:
        OSError: They cannot be written.
    """
    paths: list[Path] = []
    sheets = _choose(index, problems)
    for kind, (title, entries) in tqdm(sheets.items(), desc=f"drawing {name}", disable=None):
        path = folder / f"{name}-{kind}.png"
        write_png(path, draw_sheet(index, entries, title=f"{name}: {title}"))
        paths.append(path)
    return paths


def _choose(index: CocoIndex, problems: Problems) -> dict[str, tuple[str, list[SheetEntry]]]:
    plain = np.flatnonzero(index.flags & CROWD == 0)
    sheets: dict[str, tuple[str, list[SheetEntry]]] = {}
    for class_name, objects in _by_class(index, plain):
        generator = np.random.default_rng(0)
        some = np.sort(generator.permutation(objects)[:NUM_TILES])
        kind = "class-" + re.sub(r"[^\w.-]+", "_", class_name)[:60]
        while kind in sheets:
            kind += "_"
        title = f"{class_name}, {len(some)} of {len(objects):,} objects"
        sheets[kind] = title, _with_sizes(index, some)
    by_area = plain[np.argsort(index.areas[plain], kind="stable")]
    if len(plain):
        sheets["smallest"] = "smallest objects", _with_sizes(index, by_area[:NUM_TILES])
        sheets["largest"] = "largest objects", _with_sizes(index, by_area[::-1][:NUM_TILES])
    odd = odd_objects(index, problems)
    if odd:
        sheets["odd"] = "objects worth a second look", odd
    return sheets


def _by_class(index: CocoIndex, plain: NDArray[np.int64]) -> list[tuple[str, NDArray[np.int64]]]:
    ids = defaultdict(list)
    for category_id, name in class_names(index).items():
        ids[name].append(category_id)
    members = {name: plain[np.isin(index.categories[plain], own)] for name, own in ids.items()}
    ordered = sorted(members.items(), key=lambda item: -len(item[1]))
    return [(name, objects) for name, objects in ordered[:MAX_CLASSES] if len(objects)]


def _with_sizes(index: CocoIndex, objects: NDArray[np.int64]) -> list[SheetEntry]:
    return [SheetEntry(k, f"area {index.areas[k]:,.0f} px") for k in objects.tolist()]


def odd_objects(index: CocoIndex, problems: Problems) -> list[SheetEntry]:
    """Objects that a person should look at, and why.

    Args:
        index: The checked file.
        problems: Its problems.

    Returns:
        Those named as examples of problems of boxes and masks; those that touch three or four sides
        of the image, are long and thin, or fill little of their box, the most extreme first.
    """
    remarks: dict[int, str] = {}

    def add(objects: NDArray[np.int64], words: list[str]) -> None:
        for k, text in zip(objects[:_NUM_ODD].tolist(), words, strict=False):
            remarks[k] = f"{remarks[k]}, {text}" if k in remarks else text

    for code, _, found in problems:
        if _ODD_CODES.match(code):
            named = [re.match(r"object (-?\d+)", example) for example in found.examples]
            ids = [int(match[1]) for match in named if match]
            known = np.flatnonzero(np.isin(index.object_ids, ids))
            add(known, [code] * len(known))
    plain = np.flatnonzero(index.flags & CROWD == 0)
    boxes = index.boxes[plain]
    width, height = np.maximum(boxes[:, 2:] - boxes[:, :2], 1e-9).T
    sides = _sides_touched(index, plain)
    enclosing = np.flatnonzero(sides >= 3)
    enclosing = enclosing[np.argsort(-sides[enclosing], kind="stable")]
    add(plain[enclosing], [f"touches {sides[i]} sides" for i in enclosing])
    ratio = np.maximum(width / height, height / width)
    order = np.argsort(-ratio, kind="stable")
    thin = order[ratio[order] >= _THIN]
    add(plain[thin], [f"sides 1 : {ratio[i]:.0f}" for i in thin])
    fill = index.areas[plain] / (width * height)
    order = np.argsort(fill, kind="stable")
    sparse = order[fill[order] <= _SPARSE]
    add(plain[sparse], [f"fills {fill[i]:.0%} of box" for i in sparse])
    return [SheetEntry(k, text) for k, text in remarks.items()]


def _sides_touched(index: CocoIndex, objects: NDArray[np.int64]) -> NDArray[np.int64]:
    rows = np.searchsorted(index.first_object, objects, side="right") - 1
    boxes, corner = index.boxes[objects], index.sizes[rows][:, ::-1]
    near = np.concatenate([boxes[:, :2] < 1, boxes[:, 2:] > corner - 1], axis=1)
    return np.asarray(near.sum(axis=1))


def draw_sheet(
    index: CocoIndex,
    entries: list[SheetEntry],
    *,
    title: str,
    columns: int = COLUMNS,
    views: MutableMapping[int, ObjectCrop] | None = None,
) -> NDArray[np.uint8]:
    """Draws objects in rows, each under its image's name, id, class and remark.

    Args:
        index: The checked file.
        entries: At least one.
        title: Stands above.
        columns: Objects in a row.
        views: Of objects that were drawn before; those of others are added.

    Returns:
        uint8 [H, W, 3] RGB.
    """
    names = class_names(index)
    tiles: dict[int, NDArray[np.uint8]] = {}
    views = {} if views is None else views
    image_row, image = -1, None
    for place in sorted(range(len(entries)), key=lambda place: entries[place].object):
        k = entries[place].object
        owner = image_row_of(index, k)
        if k not in views and owner != image_row:  # each image is decoded once
            image_row, image = owner, _read(index, owner)
        if k not in views and image is not None:
            views[k] = crop_around(index.boxes[k], image)
        x0, y0, x1, y1 = index.boxes[k].tolist()
        caption = [
            index.file_name(owner),
            f"#{index.object_ids[k]}  {names[int(index.categories[k])]}",
            f"{_round(x1 - x0)} x {_round(y1 - y0)} px   {entries[place].remark}",
        ]
        predicted = entries[place].predicted
        tile = annotate_crop(index, k, views[k], predicted=predicted) if k in views else _blank()
        tiles[place] = np.concatenate([tile, _write_lines(caption, width=TILE, size=12)])
    # Filled up with white ones, so that all rows have one width.
    num_blank = -len(tiles) % columns
    ordered = [tiles[place] for place in range(len(entries))]
    ordered += [np.full_like(ordered[0], 255)] * num_blank
    rows = [
        stack_horizontally(ordered[first : first + columns])
        for first in range(0, len(ordered), columns)
    ]
    legend = "outline: mask   rectangle: box   grey: beyond the image"
    if any(entry.predicted is not None for entry in entries):
        legend = legend.replace("mask", "true mask   blue: the model's mask")
    head = _write_lines(
        [title, legend],
        width=rows[0].shape[1],
        size=15,
    )
    return np.concatenate([head, *rows])


def _round(side: float) -> str:
    return f"{side:.0f}" if side >= 10 else f"{side:.1f}"


def _read(index: CocoIndex, owner: int) -> NDArray[np.uint8] | None:
    try:
        return read_image(index.image_folder / index.file_name(owner))
    except ImageError:
        return None


def _blank() -> NDArray[np.uint8]:
    text = _write_lines(["the image cannot be read"], width=TILE, size=12)
    return np.pad(text, ((0, TILE - len(text)), (0, 0), (0, 0)), constant_values=BEYOND)


def _write_lines(lines: list[str], *, width: int, size: int) -> NDArray[np.uint8]:
    font = ImageFont.load_default(size)
    height = size + 4
    paper = Image.new("RGB", (width, height * len(lines) + 6), _PAPER)
    draw = ImageDraw.Draw(paper)
    for number, line in enumerate(lines):
        text = _fit(line, font, width - 4)
        draw.text((2, 2 + number * height), text, fill=_INK, font=font)
    return np.asarray(paper, dtype=np.uint8)


def _fit(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    # The end of a long file name tells it from others, so what is cut is the middle.
    def keeping(kept: int) -> str:
        return f"{line[: kept // 2]}...{line[len(line) - (kept - kept // 2) :]}"

    if font.getlength(line) <= width:
        return line
    lengths = range(2, len(line))
    too_long = bisect.bisect_left(
        lengths, True, key=lambda kept: font.getlength(keeping(kept)) > width
    )
    return keeping(lengths[max(too_long - 1, 0)]) if lengths else line
