"""Contact sheets: many objects of a dataset on one picture, each as an annotated crop.

Imports no torch.
"""

import bisect
import re
from collections import defaultdict
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from samft.annotations.entries import CROWD
from samft.annotations.problems import Problems
from samft.annotations.segmentation import CroppedMask
from samft.coco.index import CocoIndex
from samft.errors import ConfigError
from samft.images.files import ImageError
from samft.reports.drawing import (
    OUTSIDE_GREY,
    TILE,
    ObjectCrop,
    annotate_crop,
    crop_around,
    image_row_of,
    stack_horizontally,
    write_png,
)
from samft.runtime.logs import progress_bar
from samft.runtime.own_files import is_marked_picture

COLUMNS, NUM_TILES = 6, 24  # of a sheet
MAX_CLASSES = 100  # the most frequent classes have a sheet
_NUM_ODD = 4  # objects of each kind on the sheet of odd ones
_THIN, _SPARSE = 6, 0.25  # longer side / shorter side; area of mask / area of box
_PAPER, _INK = (255, 255, 255), (40, 40, 40)
_ODD_CODES = re.compile("(box|mask|rle|polygon)-(?!parts|flat)")


@dataclass(frozen=True)
class SheetEntry:
    """An object to show on a sheet."""

    object: int  # a row of the arrays of a `CocoIndex`
    remark: str  # part of its caption
    predicted: CroppedMask | None = None  # a model's mask, original frame


def write_sheets(index: CocoIndex, problems: Problems, folder: Path, *, name: str) -> list[Path]:
    """Writes contact sheets: one per class, the smallest, the largest and the odd objects.

    Args:
        index: The checked annotation file; crowds are not shown.
        problems: Of that file; objects named in problems of boxes and masks are odd ones.
        folder: An existing folder.
        name: Of the split; file names begin with it.

    Returns:
        The PNG files, `NAME-class-CLASS.png`, `NAME-smallest.png`, `NAME-largest.png`,
        `NAME-odd.png`; the same objects each time.

    Raises:
        ConfigError: A file by one of these names is no picture of samft; nothing was written.
        OSError: They cannot be written.
    """
    paths: list[Path] = []
    sheets = _choose_sheets(index, problems)
    for path in (folder / f"{name}-{kind}.png" for kind in sheets):
        if path.exists() and not is_marked_picture(path):
            raise ConfigError(
                f"--pictures: {path} exists, and no check of samft has written it: name another "
                "folder."
            )
    for kind, (title, entries) in progress_bar(
        sheets.items(), desc=f"drawing {name}", unit="sheet"
    ):
        path = folder / f"{name}-{kind}.png"
        write_png(path, draw_sheet(index, entries, title=f"{name}: {title}"))
        paths.append(path)
    return paths


def _choose_sheets(index: CocoIndex, problems: Problems) -> dict[str, tuple[str, list[SheetEntry]]]:
    # By the last part of the file name: title and objects.
    objects = np.flatnonzero(index.flags & CROWD == 0)
    sheets: dict[str, tuple[str, list[SheetEntry]]] = {}
    for class_name, members in _group_by_class(index, objects):
        generator = np.random.default_rng(0)
        chosen = np.sort(generator.permutation(members)[:NUM_TILES])
        kind = "class-" + re.sub(r"[^\w.-]+", "_", class_name)[:60]
        while kind in sheets:  # two class names may give one file name
            kind += "_"
        title = f"{class_name}, {len(chosen)} of {len(members):,} objects"
        sheets[kind] = title, _entries_with_areas(index, chosen)
    by_area = objects[np.argsort(index.areas[objects], kind="stable")]
    if len(objects):
        smallest, largest = by_area[:NUM_TILES], by_area[::-1][:NUM_TILES]
        sheets["smallest"] = "smallest objects", _entries_with_areas(index, smallest)
        sheets["largest"] = "largest objects", _entries_with_areas(index, largest)
    odd = odd_objects(index, problems)
    if odd:
        sheets["odd"] = "objects worth a second look", odd
    return sheets


def _group_by_class(
    index: CocoIndex, objects: NDArray[np.int64]
) -> list[tuple[str, NDArray[np.int64]]]:
    # Class name and objects, the most frequent class first. Category ids may share a name.
    ids = defaultdict(list)
    for category_id, name in index.category_names.items():
        ids[name].append(category_id)
    categories = index.categories[objects]
    members = {name: objects[np.isin(categories, own_ids)] for name, own_ids in ids.items()}
    ordered = sorted(members.items(), key=lambda item: -len(item[1]))
    return [(name, own) for name, own in ordered[:MAX_CLASSES] if len(own)]


def _entries_with_areas(index: CocoIndex, objects: NDArray[np.int64]) -> list[SheetEntry]:
    return [SheetEntry(k, f"area {index.areas[k]:,.0f} px") for k in objects.tolist()]


def odd_objects(index: CocoIndex, problems: Problems) -> list[SheetEntry]:
    """Chooses objects whose annotation may be wrong, with the reason as their remark.

    Args:
        index: The checked annotation file.
        problems: Of that file.

    Returns:
        Objects that are named as examples of problems of boxes and masks; and those that touch
        three or four sides of the image, are long and thin, or fill little of their box, the most
        extreme ones of each kind.
    """
    remarks: dict[int, str] = {}
    for objects, reasons in [*_problem_examples(index, problems), *_odd_shapes(index)]:
        for k, reason in zip(objects[:_NUM_ODD].tolist(), reasons, strict=False):
            remarks[k] = f"{remarks[k]}, {reason}" if k in remarks else reason
    return [SheetEntry(k, remark) for k, remark in remarks.items()]


def _problem_examples(
    index: CocoIndex, problems: Problems
) -> Iterator[tuple[NDArray[np.int64], list[str]]]:
    for code, _, problem in problems:
        if _ODD_CODES.match(code):
            matches = [re.match(r"object (-?\d+)", example) for example in problem.examples]
            ids = [int(match[1]) for match in matches if match]
            objects = np.flatnonzero(np.isin(index.object_ids, ids))
            yield objects, [code] * len(objects)


def _odd_shapes(index: CocoIndex) -> Iterator[tuple[NDArray[np.int64], list[str]]]:
    objects = np.flatnonzero(index.flags & CROWD == 0)
    boxes = index.boxes[objects]
    width, height = np.maximum(boxes[:, 2:] - boxes[:, :2], 1e-9).T

    sides = _count_touched_sides(index, objects)
    enclosing = np.flatnonzero(sides >= 3)
    enclosing = enclosing[np.argsort(-sides[enclosing], kind="stable")]
    yield objects[enclosing], [f"touches {sides[i]} sides" for i in enclosing]

    ratio = np.maximum(width / height, height / width)
    order = np.argsort(-ratio, kind="stable")
    thin = order[ratio[order] >= _THIN]
    yield objects[thin], [f"sides 1 : {ratio[i]:.0f}" for i in thin]

    fill = index.areas[objects] / (width * height)
    order = np.argsort(fill, kind="stable")
    sparse = order[fill[order] <= _SPARSE]
    yield objects[sparse], [f"fills {fill[i]:.0%} of box" for i in sparse]


def _count_touched_sides(index: CocoIndex, objects: NDArray[np.int64]) -> NDArray[np.int64]:
    # How many sides of its image each box comes within a pixel of.
    rows = np.searchsorted(index.first_object, objects, side="right") - 1
    boxes, corner = index.boxes[objects], index.sizes[rows][:, ::-1]
    is_near = np.concatenate([boxes[:, :2] < 1, boxes[:, 2:] > corner - 1], axis=1)
    return np.asarray(is_near.sum(axis=1))


def draw_sheet(
    index: CocoIndex,
    entries: list[SheetEntry],
    *,
    title: str,
    columns: int = COLUMNS,
    crops: MutableMapping[int, ObjectCrop] | None = None,
) -> NDArray[np.uint8]:
    """Draws objects in rows, each above its image's name, its id, class, size and remark.

    Args:
        index: The checked annotation file.
        entries: At least one.
        title: Heading of the sheet.
        columns: Objects in a row.
        crops: By object, crops from earlier calls; missing ones are added.

    Returns:
        uint8 [H, W, 3] RGB.
    """
    crops = {} if crops is None else crops
    _add_missing_crops(index, [entry.object for entry in entries], crops=crops)
    names = index.category_names
    tiles = []
    for entry in entries:
        k = entry.object
        tile = _unreadable_tile()
        if k in crops:
            tile = annotate_crop(index, k, crops[k], predicted=entry.predicted)
        caption = _object_caption(index, entry, class_name=names[int(index.categories[k])])
        tiles.append(np.concatenate([tile, _render_lines(caption, width=TILE, size=12)]))
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)  # the last row is filled up
    rows = [
        stack_horizontally(tiles[first : first + columns])
        for first in range(0, len(tiles), columns)
    ]
    legend = "outline: mask   rectangle: box   grey: beyond the image"
    if any(entry.predicted is not None for entry in entries):
        legend = legend.replace("mask", "true mask   blue: the model's mask")
    heading = _render_lines([title, legend], width=rows[0].shape[1], size=15)
    return np.concatenate([heading, *rows])


def _add_missing_crops(
    index: CocoIndex, objects: list[int], *, crops: MutableMapping[int, ObjectCrop]
) -> None:
    # In the order of the index, in which the objects of an image are adjacent: so each image is
    # decoded once, and one image is in memory at a time.
    image_row, image = -1, None
    for k in sorted(k for k in objects if k not in crops):
        if image_row_of(index, k) != image_row:
            image_row = image_row_of(index, k)
            image = _read_or_none(index, image_row)
        if image is not None:
            crops[k] = crop_around(index.boxes[k], image)


def _read_or_none(index: CocoIndex, row: int) -> NDArray[np.uint8] | None:
    try:
        return index.open_image(row).decode()
    except ImageError:
        return None


def _object_caption(index: CocoIndex, entry: SheetEntry, *, class_name: str) -> list[str]:
    x0, y0, x1, y1 = index.boxes[entry.object].tolist()
    return [
        index.file_name(image_row_of(index, entry.object)),
        f"#{index.object_ids[entry.object]}  {class_name}",
        f"{_format_side(x1 - x0)} x {_format_side(y1 - y0)} px   {entry.remark}",
    ]


def _format_side(side: float) -> str:
    return f"{side:.0f}" if side >= 10 else f"{side:.1f}"


def _unreadable_tile() -> NDArray[np.uint8]:
    text = _render_lines(["the image cannot be read"], width=TILE, size=12)
    below = TILE - len(text)
    return np.pad(text, ((0, below), (0, 0), (0, 0)), constant_values=OUTSIDE_GREY)


def _render_lines(lines: list[str], *, width: int, size: int) -> NDArray[np.uint8]:
    font = ImageFont.load_default(size)
    height = size + 4
    paper = Image.new("RGB", (width, height * len(lines) + 6), _PAPER)
    draw = ImageDraw.Draw(paper)
    for number, line in enumerate(lines):
        text = _shorten_to_width(line, font, width - 4)
        draw.text((2, 2 + number * height), text, fill=_INK, font=font)
    return np.asarray(paper, dtype=np.uint8)


def _shorten_to_width(
    line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> str:
    # The middle is cut out, because long file names often differ only at their end.
    def without_middle(kept: int) -> str:
        return f"{line[: kept // 2]}...{line[len(line) - (kept - kept // 2) :]}"

    if font.getlength(line) <= width:
        return line
    lengths = range(2, len(line))
    too_long = bisect.bisect_left(
        lengths, True, key=lambda kept: font.getlength(without_middle(kept)) > width
    )
    return without_middle(lengths[max(too_long - 1, 0)]) if lengths else line
