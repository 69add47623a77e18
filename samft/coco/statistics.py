"""What `samft.check` reports of a split: its problems, its numbers, and settings that suit it.

Imports no torch.
"""

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samft.annotations.boxes import (
    CELL,
    FEW_SMALL,
    MIN_CELLS,
    SmallObjects,
    find_small_objects,
    longer_sides,
)
from samft.annotations.entries import CROWD
from samft.annotations.json_reader import UnusableFile
from samft.annotations.problems import Problems
from samft.cli import parse_image_size
from samft.coco.index import CocoIndex, index_file
from samft.coco.layout import find_split
from samft.coco.subset import find_shared, find_siblings, see_through_windows, select_objects
from samft.errors import DataError
from samft.images.pixels import PLAIN, PixelFormat
from samft.views.windows import KINDS, View

TRAIN, VAL, TEST, GENERAL = "train", "val", "test", "general_data_root"

COVERED = 0.99  # share of the images that the suggested max_masks_per_image suffices for
_COCO_SIZES = {"small": 0, "medium": 32**2, "large": 96**2}  # px, from that area on
_SIDES = (CELL, 8, 16, 32, 64, 128, 256, 512)  # px
_TOP_CLASSES = 20
_WEIGHTS = {"objects": 1, "tiles": 2}  # of windows: one around objects is worth two tiles
_SAMPLED_IMAGES = 1000  # whose objects are looked at through windows, which takes about a second

_LINE_WIDTH = 120  # characters
_HANGING_INDENT = 45  # characters; the column in which `Problems.lines` put the meaning
_BAR_LENGTH = 40  # characters


@dataclass(frozen=True)
class Statistics:
    """The numbers of a COCO file. Crowds count as objects nowhere but in `num_crowds`.

    Attributes:
        num_images: All files, those without objects included.
        num_images_with_objects: Those that are trained on.
        num_objects: Usable objects.
        num_crowds: Crowd regions, not trained on.
        objects_per_image: From a range of counts to images that have so many.
        object_sizes: From COCO's sizes (by area of the mask, original px) to objects.
        object_sides: From a range of px to objects whose box has its longer side in it, at the
            model's input.
        classes: From name to objects, most frequent first; ids of one name are one class.
        image_size: The model's input that the sides refer to.
        num_vanishing: Objects whose longer side at the input is under 4 px, less than one cell of
            the decoder's masks.
        small: Objects that are too small at the input, and the suggested `image_size`.
        most_objects: In one image.
        max_masks_per_image: Suggested: the smallest power of two, at least 8, that is no less than
            the number of objects in 99 % of the images.
        views: See `measure_views`.
    """

    num_images: int
    num_images_with_objects: int
    num_objects: int
    num_crowds: int
    objects_per_image: dict[str, int]
    object_sizes: dict[str, int]
    object_sides: dict[str, int]
    classes: dict[str, int]
    image_size: int | str
    num_vanishing: int
    small: SmallObjects
    most_objects: int
    max_masks_per_image: int
    views: tuple["ViewFacts", ...] = ()

    @property
    def vanishing_share(self) -> float:
        """Share of the objects that vanish, 0..1."""
        return self.num_vanishing / max(self.num_objects, 1)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        suggested = suggest_view(self.views)
        return {
            "images": self.num_images,
            "images_with_objects": self.num_images_with_objects,
            "objects": self.num_objects,
            "crowds": self.num_crowds,
            "classes": self.classes,
            "histograms": {
                "objects_per_image": self.objects_per_image,
                "object_sizes": self.object_sizes,
                "object_sides": self.object_sides,
            },
            "image_size": self.image_size,
            "vanishing": {"objects": self.num_vanishing, "share": self.vanishing_share},
            "too_small": {"objects": self.small.num_small, "share": self.small.share},
            "views": {facts.view.kind: facts.to_json() for facts in self.views},
            "suggestions": {
                "max_masks_per_image": self.max_masks_per_image,
                "image_size": self.small.suggested_image_size,
                "view": suggested.view.kind if suggested else "image",
            },
        }


@dataclass
class CheckedSplit:
    """One annotation file and its problems, or the reason why it cannot be read.

    Attributes:
        annotations: The JSON file.
        images: Its image folder.
        problems: Of the file, and of the file beside the other splits.
        index: The checked file; None if the JSON cannot be read.
        statistics: None if the JSON cannot be read.
        failure: Why the JSON cannot be read, as a sentence.
        shared_rows: int64, rows of `index` whose images are in validation as well.
    """

    annotations: Path
    images: Path
    problems: Problems = field(default_factory=Problems)
    index: CocoIndex | None = None
    statistics: Statistics | None = None
    failure: str = ""
    shared_rows: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "annotations": str(self.annotations),
            "image_folder": str(self.images),
            **(self.statistics.to_json() if self.statistics else {}),
            "frame": self.index.frame if self.index else {},
            "problems": self.problems.to_json(),
        }

    def lines(self, *, suggest: bool) -> list[str]:
        """The report as text: problems, numbers and, with `suggest`, settings that suit."""
        if self.statistics is None:
            return [self.failure, "", *self._problem_lines()]
        counts, *histograms = statistics_lines(self.statistics)
        suggestions = ["", *suggestion_lines(self.statistics)] if suggest else []
        problems = self._problem_lines() or ["no problems"]
        return [counts, "", *problems, *histograms, *suggestions]

    def _problem_lines(self) -> list[str]:
        wrapper = textwrap.TextWrapper(
            _LINE_WIDTH,
            subsequent_indent=" " * _HANGING_INDENT,
            break_long_words=False,
            break_on_hyphens=False,
        )
        return [part for line in self.problems.lines() for part in wrapper.wrap(line)]


def check_splits(
    data_root: Path,
    *,
    train_split: str,
    val_split: str,
    image_size: int | str,
    allow_links: Sequence[Path] = (),
    crowds: str = "auto",
    pixels: PixelFormat = PLAIN,
    decode: bool = False,
) -> dict[str, CheckedSplit]:
    """Checks the splits that a dataset has, and whether images are in train and in val.

    Args:
        data_root: The dataset's folder.
        train_split: Name of the training split.
        val_split: Name of the validation split.
        image_size: The model's input that sizes of objects refer to, see `cli.parse_image_size`.
        allow_links: See `index_file`.
        crowds: See `crowds.mark_crowds`.
        pixels: See `index_file`.
        decode: See `index_file`.

    Returns:
        By `train`, `val` and `test`. A missing training split is in it as a failure; the others may
        be missing, for training can hold a part of its images out.

    Raises:
        DataError: There is none of them.
    """
    splits: dict[str, CheckedSplit] = {}
    missing: dict[str, DataError] = {}
    shared: Any = {"root": data_root, "allow_links": allow_links, "decode": decode}
    shared |= {"image_size": image_size, "crowds": crowds}
    for role, name in ((TRAIN, train_split), (VAL, val_split), (TEST, TEST)):
        try:
            annotations, images = find_split(
                data_root,
                name,
                flags=f"--{role}_split NAME, or --annotations FILE and --images DIR",
            )
        except DataError as error:
            missing[role] = error
            if role == TRAIN:
                folder = data_root / name
                splits[role] = _unreadable_split(folder, folder, "json-missing", error)
            continue
        splits[role] = check_split(annotations, images, pixels=pixels, **shared)
        if role == TRAIN and (index := splits[TRAIN].index):
            pixels = index.pixels  # as in training, the ranges of the training images
    if len(missing) == 3:
        raise missing[TRAIN]
    if VAL in splits:
        _compare_splits(splits[TRAIN], splits[VAL])
    return splits


def check_split(
    annotations: Path,
    images: Path,
    *,
    root: Path | None = None,
    allow_links: Sequence[Path] = (),
    pixels: PixelFormat = PLAIN,
    decode: bool = False,
    image_size: int | str,
    crowds: str = "auto",
) -> CheckedSplit:
    """Checks one annotation file; that it cannot be read is a problem like any other.

    Args:
        annotations: The JSON file.
        images: What its file names are relative to.
        root: See `index_file`.
        allow_links: See `index_file`.
        pixels: See `index_file`.
        decode: See `index_file`.
        image_size: The model's input that sizes of objects refer to, see `cli.parse_image_size`.
        crowds: See `crowds.mark_crowds`.
    """
    try:
        index = index_file(
            annotations,
            images,
            root=root,
            allow_links=allow_links,
            pixels=pixels,
            decode=decode,
            crowds=crowds,
        )
        index = replace(index, pixels=select_objects(index).measure_pixels(pixels))
    except UnusableFile as error:
        return _unreadable_split(annotations, images, error.code, error)
    statistics = compute_statistics(index, image_size=image_size)
    return CheckedSplit(annotations, images, index.problems, index, statistics)


def _unreadable_split(annotations: Path, images: Path, code: str, error: DataError) -> CheckedSplit:
    split = CheckedSplit(annotations, images, failure=str(error))
    split.problems.add(code, annotations.name)
    return split


def _compare_splits(train: CheckedSplit, val: CheckedSplit) -> None:
    if val.images.name.startswith("valid"):
        val.problems.add("split-name", val.images.name)
    if train.index and val.index:
        subset = select_objects(train.index)
        shared = find_shared(subset, select_objects(val.index))
        train.shared_rows = subset.rows[shared]
        train.problems.add("image-in-train-and-val", *map(subset.file_name, shared.tolist()))
        siblings = find_siblings(subset, select_objects(val.index), group_by="auto")
        copies = np.setdiff1d(siblings, shared)
        train.problems.add("image-copies-in-train-and-val", *map(subset.file_name, copies.tolist()))


def compare_general_set(general: CheckedSplit, others: Mapping[str, CheckedSplit]) -> None:
    """Adds to the problems of a general set the images that other splits have, too."""
    shared: set[str] = set()
    for other in others.values():
        if general.index and other.index:
            subset = select_objects(general.index)
            places = find_shared(subset, select_objects(other.index))
            shared |= {subset.file_name(i) for i in places.tolist()}
    general.problems.add("image-in-general-set", *sorted(shared))


def compute_statistics(
    index: CocoIndex, *, image_size: int | str, with_views: bool = True
) -> Statistics:
    """Counts images and objects of a checked file.

    Args:
        index: The checked file.
        image_size: The model's input, see `cli.parse_image_size`.
        with_views: Whether `views` are measured, too.
    """
    row_of = np.repeat(np.arange(index.num_images), np.diff(index.first_object))
    plain = np.flatnonzero(index.flags & CROWD == 0)
    per_image = np.bincount(row_of[plain], minlength=index.num_images)[~index.bad]
    boxes, sizes = index.boxes[plain], index.sizes[row_of[plain]]
    sides = longer_sides(boxes, sizes, image_size)
    filled = per_image[per_image > 0]
    return Statistics(
        num_images=index.num_images,
        num_images_with_objects=len(filled),
        num_objects=len(plain),
        num_crowds=len(index.flags) - len(plain),
        objects_per_image=_count_by_powers_of_two(per_image),
        object_sizes=_count_coco_sizes(index.areas[plain]),
        object_sides=_count_sides(sides),
        classes=_count_classes(index, plain),
        image_size=image_size,
        num_vanishing=int((sides < CELL).sum()),
        small=find_small_objects(boxes, sizes, image_size=image_size),
        most_objects=int(per_image.max(initial=0)),
        max_masks_per_image=suggest_max_masks(filled),
        views=measure_views(index, image_size=image_size) if with_views else (),
    )


@dataclass(frozen=True)
class ViewFacts:
    """What a view shows of objects at the model's input.

    Attributes:
        view: How images are seen.
        windows_per_image: Mean number of windows that are validated on.
        small_share: Share of the objects that are too small, see `SmallObjects`, 0..1.
        vanishing_share: Share of the objects whose longer side is under 4 px, 0..1.
    """

    view: View
    windows_per_image: float
    small_share: float
    vanishing_share: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "windows_per_image": self.windows_per_image,
            "too_small": self.small_share,
            "vanishing": self.vanishing_share,
        }


def measure_views(index: CocoIndex, *, image_size: int | str) -> tuple[ViewFacts, ...]:
    """What each kind of view shows of objects, in windows as large as the model's input.

    Args:
        index: The checked file; of many images, `_SAMPLED_IMAGES` are looked at, evenly spaced.
        image_size: The model's input for whole images; windows are of the square around it.
    """
    subset = select_objects(index)
    number = min(subset.num_images, _SAMPLED_IMAGES)
    subset = subset.select(np.unique(np.linspace(0, subset.num_images - 1, number).astype(int)))
    facts = []
    for kind in KINDS if subset.num_objects else ():
        view = View(kind, tile_size=max(parse_image_size(image_size)))
        seen = see_through_windows(subset, view)
        size = view.tile_size if view.has_windows else image_size
        boxes = np.concatenate([seen.visible_boxes(i) for i in range(seen.num_images)])
        sizes = np.repeat(seen.sizes, np.diff(seen.first_object), axis=0)
        small = find_small_objects(boxes, sizes, image_size=size)
        longer = longer_sides(boxes, sizes, size)
        mean = seen.num_images / subset.num_images
        facts.append(ViewFacts(view, mean, small.share, float((longer < CELL).mean())))
    return tuple(facts)


def suggest_view(views: Sequence[ViewFacts]) -> ViewFacts | None:
    """Windows, if many objects are too small in whole images and half as many or fewer in them.

    Args:
        views: From `measure_views`.

    Returns:
        Windows around `objects`, which cut none and scored more than tiles (docs/experiments.md);
        `tiles` where there are less than half as many. None: whole images.
    """
    share = views[0].small_share if views else 0.0  # of whole images
    helpful = [one for one in views if share > FEW_SMALL and one.small_share <= share / 2]
    cost = {one.view.kind: one.windows_per_image * _WEIGHTS[one.view.kind] for one in helpful}
    return min(helpful, key=lambda one: cost[one.view.kind], default=None)


def suggest_max_masks(per_image: NDArray[np.int64]) -> int:
    """The smallest power of two, at least 8, that holds all objects of 99 % of the images.

    Args:
        per_image: Number of objects in each image that has any.
    """
    enough = int(np.quantile(per_image, COVERED, method="higher")) if len(per_image) else 0
    return max(8, 1 << max(enough - 1, 0).bit_length())


def _count_by_powers_of_two(per_image: NDArray[np.int64]) -> dict[str, int]:
    # 0, 1, 2-3, 4-7, ...
    counts = {"0": int((per_image == 0).sum())}
    low = 1
    while low <= per_image.max(initial=0):
        label = f"{low}-{2 * low - 1}" if low > 1 else "1"
        counts[label] = int(((per_image >= low) & (per_image < 2 * low)).sum())
        low *= 2
    return counts


def _count_coco_sizes(areas: NDArray[np.float64]) -> dict[str, int]:
    place = np.searchsorted(list(_COCO_SIZES.values()), areas, side="right") - 1
    return dict(zip(_COCO_SIZES, np.bincount(place, minlength=3).tolist(), strict=True))


def _count_sides(sides: NDArray[np.float64]) -> dict[str, int]:
    place = np.searchsorted(_SIDES, sides, side="right")
    labels = [f"under {_SIDES[0]} px"]
    labels += [f"{low}-{2 * low} px" for low in _SIDES[:-1]] + [f"{_SIDES[-1]} px and more"]
    return dict(zip(labels, np.bincount(place, minlength=len(labels)).tolist(), strict=True))


def _count_classes(index: CocoIndex, plain: NDArray[np.int64]) -> dict[str, int]:
    ids, numbers = np.unique(index.categories[plain], return_counts=True)
    number_of = dict(zip(ids.tolist(), numbers.tolist(), strict=True))
    counts: Counter[str] = Counter()
    for category_id, name in index.category_names.items():
        counts[name] += number_of.get(category_id, 0)
    return dict(counts.most_common())


def statistics_lines(statistics: Statistics) -> list[str]:
    """The numbers as text: a line of totals, then histograms."""
    used = {name: number for name, number in statistics.classes.items() if number}
    top = dict(list(used.items())[:_TOP_CLASSES])
    sides_title = f"longer side of the box at image_size {statistics.image_size}: objects"
    sizes_title = "area (small < 32 x 32 px <= medium < 96 x 96): objects"
    lines = [
        f"{statistics.num_images:,} images, {statistics.num_images_with_objects:,} of them with "
        f"objects; {statistics.num_objects:,} objects in {len(used)} classes; "
        f"{statistics.num_crowds:,} crowds",
        *_histogram_lines("objects per image: images", statistics.objects_per_image),
        *_histogram_lines(sizes_title, statistics.object_sizes),
        *_histogram_lines(sides_title, statistics.object_sides),
        *_histogram_lines(f"class (of {len(statistics.classes)}): objects", top),
    ]
    if len(used) > len(top):
        rest = sum(used.values()) - sum(top.values())
        lines.append(f"  and {len(used) - len(top)} more with {rest:,} objects")
    return lines


def suggestion_lines(statistics: Statistics) -> list[str]:
    """Settings that suit the split, with reasons."""
    masks, size = statistics.max_masks_per_image, statistics.image_size
    more = f"; one has {statistics.most_objects}" if statistics.most_objects > masks else ""
    lines = [
        f"suggested max_masks_per_image: {masks} (enough for all objects of 99 % of the images"
        f"{more}; of more objects each epoch draws others)"
    ]
    vanishing, share = "no object vanishes", statistics.vanishing_share
    if share:
        vanishing = f"{statistics.num_vanishing:,} objects ({share:.1%}) vanish: longer side under "
        vanishing += f"{CELL} px, less than one cell of the decoder's masks"
    lines.append(f"at image_size {size} {vanishing}")
    if any(facts.small_share for facts in statistics.views):
        lines += _view_lines(statistics)
    return lines


def _view_lines(statistics: Statistics) -> list[str]:
    lines = [f"objects by view, in windows of {statistics.views[0].view.tile_size} px:"]
    for facts in statistics.views:
        lines.append(
            f"  {facts.view.kind:8} {facts.windows_per_image:6.1f} windows an image, "
            f"{facts.small_share:5.1%} of the objects too small (shorter side under "
            f"{MIN_CELLS * CELL} px), {facts.vanishing_share:5.1%} vanish"
        )
    if one := suggest_view(statistics.views):
        lines.append(f"suggested view: {one.view.kind} (`--view {one.view.kind}`, docs/views.md)")
    return lines


def _histogram_lines(title: str, counts: dict[str, int]) -> list[str]:
    # Empty ranges at either end are not shown.
    filled = [place for place, number in enumerate(counts.values()) if number]
    shown = list(counts.items())[min(filled, default=0) : max(filled, default=-1) + 1]
    width = max((len(label) for label, _ in shown), default=0)
    longest = max((number for _, number in shown), default=1)
    lines = ["", title]
    for label, number in shown:
        bar = "#" * -(-number * _BAR_LENGTH // longest)
        lines.append(f"  {label:{width}}  {number:>9,}  {bar}".rstrip())
    return lines
