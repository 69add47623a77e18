"""Boxes of COCO objects, many at a time: checked against their masks, and measured in cells.

Boxes tell, before any image is read, which objects are too small for the decoder's masks, and which
`image_size` suits them (`find_small_objects`): training and `samft.check` ask here. Imports no
torch.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samft.annotations.mask_checks import CheckedMasks
from samft.cli import name_image_size, parse_image_size

BOX_CODES = (
    "",
    "box-missing",
    "box-malformed",
    "box-not-finite",
    "box-empty",
    "box-outside",
    "box-unlike-mask",
)
BOX_MISSING, BOX_MALFORMED, NOT_FINITE, EMPTY, OUTSIDE, UNLIKE_MASK = range(1, len(BOX_CODES))
MAX_ROUNDING = 2  # px; a box that differs less from the mask's extent is the mask's

_SAME_SIZE, SAME_SHARE = 2, 0.01  # px, share: sizes that differ less are the same
_OVERHANG, _OVERHANG_SHARE = 3.0, 0.03  # px; share of the image's side
_FEWEST_BEYOND = 3  # objects
_MOST = 20_000  # objects whose numbers are weighed
_SHARE_UNITS = (1, 100, 1000)  # shares, percent as of Label Studio, and per mille
_PERCENT = np.full((1, 2), 100, dtype=np.int32)
_LARGER = 1.1  # times a unit are the sides of images whose numbers may be in it
_FULL = 0.9  # share of an image that a box covers which says nothing about its mask

CELL = 4  # px of the model's input: one cell of the decoder's masks
# An object is small if the shorter side of its box has fewer cells. Measured (docs/experiments.md,
# "Image size and object size"): of smaller objects, tuned models' masks are mostly worse than
# filling the box, of larger ones mostly better.
MIN_CELLS = 2
FEW_SMALL = 0.25  # largest share of the objects that may be small at the suggested image_size
# px. SAM's own image size, to which it enlarges smaller images; and what still fits into memory.
SAM_IMAGE_SIZE, LARGEST_SUGGESTED = 1024, 2048
_WINDOW_STEP = 64  # px; image sizes that keep the encoder's windows whole


def judge_boxes(
    boxes_xywh: NDArray[np.float64], sizes: NDArray[np.float64], *, extents: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Decides which boxes of n objects cannot be used.

    Args:
        boxes_xywh: float64 [n, 4], x y width height, as annotated, px, original frame.
        sizes: float64 [n, 2], H, W of the images, px.
        extents: float64 [n, 4], x0 y0 x1 y1 around the masks, px, original frame.

    Returns:
        int64 [n], indices into `BOX_CODES`; 0: usable.
    """
    with np.errstate(all="ignore"):
        boxes = to_corners(boxes_xywh)
        verdicts = np.where(~np.isfinite(boxes).all(1), NOT_FINITE, 0)
        empty = (boxes_xywh[:, 2:] <= 0).any(1)
        verdicts = np.where((verdicts == 0) & empty, EMPTY, verdicts)
        verdicts = np.where((verdicts == 0) & _is_far_outside(boxes, sizes), OUTSIDE, verdicts)
        unlike = _is_unlike_mask(boxes, sizes, extents=extents)
        return np.where((verdicts == 0) & unlike, UNLIKE_MASK, verdicts)


def to_corners(boxes_xywh: NDArray[np.float64]) -> NDArray[np.float64]:
    """Boxes [n, 4] as x0 y0 x1 y1."""
    return np.concatenate([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], axis=1)


def distance_outside(boxes: NDArray[np.float64], sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    """By how many px boxes x0 y0 x1 y1 [n, 4] reach beyond their images; negative inside."""
    outside = np.concatenate([-boxes[:, :2], boxes[:, 2:] - sizes[:, ::-1]], axis=1)
    return np.asarray(outside.max(1))


def _is_far_outside(boxes: NDArray[np.float64], sizes: NDArray[np.float64]) -> NDArray[np.bool_]:
    # True where a box does not touch the image, or leaves it by more than the image's size.
    corner = sizes[:, ::-1]
    low, high = boxes[:, :2], boxes[:, 2:]
    inside = (low >= -corner) & (low < corner) & (high > 0) & (high <= 2 * corner)
    return ~np.asarray(inside.all(1))


def _is_unlike_mask(
    boxes: NDArray[np.float64], sizes: NDArray[np.float64], *, extents: NDArray[np.float64]
) -> NDArray[np.bool_]:
    # True where box and mask extent have IoU < 0.5 and differ by more than 2 px.
    limit = np.tile(sizes[:, ::-1], 2)
    ours, other = np.clip(boxes, 0, limit), np.clip(extents, 0, limit)
    low, high = np.maximum(ours[:, :2], other[:, :2]), np.minimum(ours[:, 2:], other[:, 2:])
    common = np.maximum(high - low, 0).prod(1)
    both = (ours[:, 2:] - ours[:, :2]).prod(1) + (other[:, 2:] - other[:, :2]).prod(1)
    differ = np.abs(ours - other).max(1) > MAX_ROUNDING
    return np.asarray((common < 0.5 * (both - common)) & differ)


@dataclass(frozen=True)
class Numbers:
    """The numbers of K objects as they stand in the file, or moved by an `OutlineFrame`.

    Attributes:
        rows: int64 [K], rows of their images.
        positions: int64 [K], positions in the list 'annotations'.
        extents: float64 [K, 4], x0 y0 x1 y1 around the mask; around the box where there is no mask.
        boxes: float64 [K, 4], x y width height; NaN where the box is unusable.
        has_mask: bool [K].
        rle_sizes: int64 [K, 2], H, W of RLE; 0 for others.
    """

    rows: NDArray[np.int64]
    positions: NDArray[np.int64]
    extents: NDArray[np.float64]
    boxes: NDArray[np.float64]
    has_mask: NDArray[np.bool_]
    rle_sizes: NDArray[np.int64]

    @property
    def is_rle(self) -> NDArray[np.bool_]:
        """Bool [K]."""
        return np.asarray(self.has_mask & (self.rle_sizes[:, 0] > 0))

    def take(self, which: NDArray[Any]) -> "Numbers":
        """Some of the objects."""
        return Numbers(*(values[which] for values in vars(self).values()))


class Evidence:
    """Collects the numbers of all objects of a file while they are read."""

    def __init__(self) -> None:
        """Starts with none."""
        self._parts: list[Numbers] = []

    def add(
        self,
        rows: NDArray[np.int64],
        positions: NDArray[np.int64],
        *,
        masks: CheckedMasks,
        boxes_xywh: NDArray[np.float64],
    ) -> None:
        """Adds objects whose masks were checked by themselves, without the images.

        Args:
            rows: int64 [n], rows of their images.
            positions: int64 [n], positions in the list 'annotations'.
            masks: Of the n objects.
            boxes_xywh: float64 [n, 4], x y width height.
        """
        has_mask = np.asarray(masks.codes == "", dtype=bool)
        has_box = np.asarray(np.isfinite(boxes_xywh).all(1) & (boxes_xywh[:, 2:] > 0).all(1))
        boxes = np.where(has_box[:, None], boxes_xywh, np.nan)
        extents = np.where(has_mask[:, None], masks.extents, to_corners(boxes))
        rle_sizes = np.zeros((len(rows), 2), dtype=np.int64)
        for owner, size in masks.rle_sizes.items():
            rle_sizes[owner] = size
        numbers = Numbers(rows, positions, extents, boxes, has_mask, rle_sizes)
        self._parts.append(numbers.take(has_mask | has_box))

    def numbers(self) -> Numbers:
        """The objects, or `_MOST` of them, spread over the file."""
        parts = [vars(part).values() for part in self._parts]
        whole = Numbers(*(np.concatenate(values) for values in zip(*parts, strict=True)))
        step = -(-len(whole.rows) // _MOST) or 1
        return whole.take(np.arange(0, len(whole.rows), step))


def scale_corners(
    corners: NDArray[np.float64], factors: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Boxes x0 y0 x1 y1 [n, 4], scaled and moved by factors of x and y, and shifts: [n, 4]."""
    return corners * np.tile(factors[:, :2], 2) + np.tile(factors[:, 2:], 2)


def share_units(numbers: Numbers, sizes: NDArray[np.int32]) -> list[int]:
    """What sides of images may be in the numbers of a file, if those are shares of the sides.

    Args:
        numbers: K objects, all those that can be told from garbage.
        sizes: int32 [N, 2], H, W of all images, px.

    Returns:
        Of 1, 100 and 1000, those that all objects fit into, and that are less than the images.
    """
    if not len(numbers.rows) or numbers.is_rle.any():
        return []
    extents, sides = numbers.extents, sizes[numbers.rows]
    fit = [
        unit
        for unit in _SHARE_UNITS
        if (sides > _LARGER * unit).all() and not leaves_image(100 / unit * extents, _PERCENT).any()
    ]
    # Whole numbers are pixels, or those of a bitmap.
    return [unit for unit in fit if unit > 1 or (extents % 1 > 0).any(1).mean() > 0.5]


def ways_to_fit(
    stretched: NDArray[np.float64], sizes: NDArray[np.int32]
) -> list[NDArray[np.float64]]:
    """Ways in which images came to their sizes H, W [N, 2]: factors and shifts, float64 [N, 4].

    Where the shape changed: stretched, or with a border at the right and below, or on both sides.
    """
    if (np.abs(stretched[:, 0] / stretched[:, 1] - 1) <= 2 * SAME_SHARE).all():
        return [stretched]
    corner, middle = stretched.copy(), stretched.copy()
    corner[:, :2] = middle[:, :2] = stretched[:, :2].min(axis=1, keepdims=True)
    middle[:, 2:] = sizes[:, ::-1] / 2 * (1 - middle[:, :2] / stretched[:, :2])
    return [stretched, corner, middle]


def sizes_differ(sizes: NDArray[np.integer], others: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Which sizes H, W [n, 2] are others than by rounding."""
    room = np.maximum(_SAME_SIZE, SAME_SHARE * others)
    return np.asarray((np.abs(sizes - others) > room).any(1))


def spread(which: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Some of the values [n], spread over all of them."""
    step = -(-len(which) // most) or 1
    return which[::step]


def leaves_image(extents: NDArray[np.float64], sizes: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Which extents x0 y0 x1 y1 [n, 4] leave their images of H, W [n, 2] by more than is careless.

    What leaves it further is in another frame than the image.
    """
    full = sizes[:, ::-1].astype(np.float64)
    room = np.maximum(_OVERHANG, _OVERHANG_SHARE * full)
    return np.asarray(((extents[:, :2] < -room) | (extents[:, 2:] > full + room)).any(1))


def have_y_first(extents: NDArray[np.float64], sizes: NDArray[np.int32]) -> bool:
    """Whether outlines of extents x0 y0 x1 y1 [n, 4] fit images of H, W [n, 2] as rows, columns."""
    beyond = leaves_image(extents, sizes).sum()
    fit = not leaves_image(extents[:, [1, 0, 3, 2]], sizes).any()
    return bool(fit and beyond >= max(_FEWEST_BEYOND, 0.1 * len(extents)))


def boxes_agree(extents: NDArray[np.float64], corners: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which boxes x0 y0 x1 y1 [n, 4] are where the masks are; false for NaN."""
    with np.errstate(all="ignore"):
        low = np.maximum(extents[:, :2], corners[:, :2])
        high = np.minimum(extents[:, 2:], corners[:, 2:])
        common = np.maximum(high - low, 0).prod(1)
        both = (extents[:, 2:] - extents[:, :2]).prod(1) + (corners[:, 2:] - corners[:, :2]).prod(1)
        near = np.abs(extents - corners).max(1) <= MAX_ROUNDING
        overlap = (2 * common >= both - common) & (common > 0)
        return np.asarray(overlap | near)


def box_forms(numbers: Numbers, sizes: NDArray[np.int32]) -> list[NDArray[np.float64]]:
    """Boxes as corners, as COCO gives them and in the forms that exporters write by mistake.

    Those are x0 y0 x1 y1, centre and size, and each of the three as shares of the image.

    Args:
        numbers: K objects.
        sizes: int32 [N, 2], H, W of all images, px.

    Returns:
        Six times float64 [K, 4], x0 y0 x1 y1, px.
    """
    boxes = numbers.boxes
    around = np.concatenate(
        [boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1
    )
    forms = [to_corners(boxes), boxes, around]
    full = np.tile(sizes[numbers.rows][:, ::-1], 2)
    return forms + [form * full for form in forms]


def tell_of_masks(numbers: Numbers, sizes: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Which objects have a mask, and a box that says where it is; bool [K].

    A box around all of the image is right for any mask.

    Args:
        numbers: K objects.
        sizes: int32 [N, 2], H, W of all images, px.
    """
    corners, full = to_corners(numbers.boxes), sizes[numbers.rows][:, ::-1].astype(np.float64)
    shown = np.clip(corners, 0, np.tile(full, 2))
    covered = (shown[:, 2:] - shown[:, :2]).prod(1)
    has_box = np.isfinite(numbers.boxes).all(1)
    return np.asarray(numbers.has_mask & has_box & ~(covered >= _FULL * full.prod(1)))


@dataclass(frozen=True)
class SmallObjects:
    """How many objects are too small for the decoder's masks, and an image size for them.

    Attributes:
        image_size: The model's input, see `cli.parse_image_size`.
        num_objects: All.
        num_small: Those whose box has a shorter side of under `MIN_CELLS` cells at the input.
        suggested_image_size: The smallest of that shape, its longer side a multiple of 64 px above
            that of `image_size`, at which no more than `FEW_SMALL` of the objects are small, or the
            largest that `suggest_image_size` tries; `image_size` itself where no more are small.
        num_small_then: Objects that are small at the suggested size.
        num_small_in_windows: Those that are small in windows of `image_size` px of the images,
            which are not shrunk.
        in_windows: Images are seen through windows, which a smaller `tile_size` enlarges.
    """

    image_size: int | str
    num_objects: int
    num_small: int
    suggested_image_size: int | str
    num_small_then: int
    num_small_in_windows: int
    in_windows: bool = False

    @property
    def suggested_side(self) -> int:
        """The longer side of `suggested_image_size`, px."""
        return max(parse_image_size(self.suggested_image_size))

    @property
    def share(self) -> float:
        """Share of the objects that are small, 0..1."""
        return self.num_small / max(self.num_objects, 1)

    @property
    def are_many(self) -> bool:
        """Whether a larger image size, or windows of the images, would help."""
        return self.num_small > FEW_SMALL * self.num_objects

    @property
    def would_windows_help(self) -> bool:
        """Whether windows show half of the small objects large enough; a rectangle has none."""
        height, width = parse_image_size(self.image_size)
        return height == width and self.num_small_in_windows <= self.num_small / 2

    def count(self, objects: str) -> str:
        """How many objects, called so, are too small, as a phrase."""
        return (
            f"{self.num_small:,} of {self.num_objects:,} {objects} ({self.share:.1%}) are too "
            f"small for image_size {self.image_size}"
        )

    def advise(self, objects: str) -> str:
        """How many objects are too small, and what to do, as a phrase for where they are many.

        Args:
            objects: What to call the objects.
        """
        text = (
            f"{self.count(objects)}: the shorter side of their box is under {MIN_CELLS * CELL} px "
            f"there, {MIN_CELLS} cells of the decoder's masks, where filling "
            "the box tends to be better than the mask"
        )
        if self.in_windows:
            return f"{text}; a smaller --tile_size enlarges them"
        either = ""
        if self.would_windows_help:
            text += (
                f"; windows of {self.image_size} px of the images (--view objects) leave "
                f"{self.num_small_in_windows:,} of them, each at the time and memory of an image"
            )
            either = "or "
        if self.suggested_image_size != self.image_size:
            new, own = map(parse_image_size, (self.suggested_image_size, self.image_size))
            cost = new[0] * new[1] / (own[0] * own[1])
            text += (
                f"; {either}--image_size {self.suggested_image_size} leaves "
                f"{self.num_small_then:,} of them, at {cost:.1f} times the time and memory of an "
                "image"
            )
        if not self.would_windows_help and self.num_small_then > FEW_SMALL * self.num_objects:
            text += "; or enlarge them: --view objects with a --tile_size below image_size"
        return text


def find_small_objects(
    boxes: NDArray[np.floating],
    sizes: NDArray[np.integer],
    *,
    image_size: int | str,
    resize_mode: str = "pad",
) -> SmallObjects:
    """Counts the objects that are small at an image size, and suggests one; reads no pixels.

    Args:
        boxes: [n, 4], x0 y0 x1 y1, px, original frame.
        sizes: [n, 2], H, W of the objects' images, px.
        image_size: The model's input, see `cli.parse_image_size`.
        resize_mode: `pad` or `squash`: how images fit into it.
    """
    frame_size = parse_image_size(image_size)
    side = max(frame_size)
    sides = shorter_sides(boxes, sizes, resize_mode=resize_mode, frame_size=frame_size)
    suggested = suggest_image_size(sides, at_least=side, longest_side=int(sizes.max(initial=0)))
    larger = image_size
    if suggested > side:
        height, width = (-(-one * suggested // side // 16) * 16 for one in frame_size)
        larger = name_image_size((height, width))
    return SmallObjects(
        image_size=image_size,
        num_objects=len(boxes),
        num_small=_count_small(sides, side),
        suggested_image_size=larger,
        num_small_then=_count_small(sides, suggested),
        num_small_in_windows=int(((boxes[:, 2:] - boxes[:, :2]).min(1) < MIN_CELLS * CELL).sum()),
    )


def advise_on_small_objects(splits: dict[str, SmallObjects]) -> str | None:
    """What to do about small objects, from the split that needs the larger image size.

    Args:
        splits: By name, all at one image size.

    Returns:
        A phrase; None where no split has many of them.
    """
    if not splits:
        return None
    name, worst = max(splits.items(), key=lambda item: (item[1].suggested_side, item[1].share))
    return worst.advise(f"{name} objects") if worst.are_many else None


def shorter_sides(
    boxes: NDArray[np.floating],
    sizes: NDArray[np.integer],
    *,
    resize_mode: str,
    frame_size: tuple[int, int] = (1, 1),
) -> NDArray[np.float64]:
    """The shorter side of each box at the model's input, as a share of the input's longer side.

    Args:
        boxes: [n, 4], x0 y0 x1 y1, px, original frame.
        sizes: [n, 2], H, W of the objects' images, px.
        resize_mode: `pad` or `squash`.
        frame_size: H, W of the input, of which the shape counts.

    Returns:
        float64 [n].
    """
    widths_heights = np.asarray(boxes[:, 2:] - boxes[:, :2], dtype=np.float64)
    full = np.maximum(sizes, 1) * (max(frame_size) / np.array(frame_size))
    full = full[:, ::-1]
    if resize_mode == "pad":  # both axes are scaled as the one that fills the input
        full = full.max(axis=1, keepdims=True)
    return np.asarray((widths_heights / full).min(axis=1))


def longer_sides(
    boxes: NDArray[np.floating], sizes: NDArray[np.integer], image_size: int | str
) -> NDArray[np.float64]:
    """The longer side of each box [n, 4] at the model's input, px: float64 [n].

    Args:
        boxes: x0 y0 x1 y1, px, original frame.
        sizes: [n, 2], H, W of the objects' images, px, which are padded.
        image_size: See `cli.parse_image_size`.
    """
    frame_size = parse_image_size(image_size)
    side = max(frame_size)
    longest = (sizes * (side / np.array(frame_size))).max(axis=1, initial=1)
    return np.asarray((boxes[:, 2:] - boxes[:, :2]).max(axis=1, initial=0) / longest * side)


def suggest_image_size(sides: NDArray[np.float64], *, at_least: int, longest_side: int) -> int:
    """The longer side of the smallest input at which few, `FEW_SMALL`, of the objects are small.

    Args:
        sides: See `shorter_sides`.
        at_least: The smallest size to suggest, px.
        longest_side: Of the images, original px. Larger sizes than this are not tried, except up to
            1024, nor ones over 2048.

    Returns:
        `at_least` or a multiple of 64 above it, px; the last that is tried if none suffices.
    """
    at_most = min(max(longest_side, SAM_IMAGE_SIZE), LARGEST_SUGGESTED)
    larger = range((at_least // _WINDOW_STEP + 1) * _WINDOW_STEP, at_most + 1, _WINDOW_STEP)
    size = at_least
    for size in (at_least, *larger):
        if _count_small(sides, size) <= FEW_SMALL * len(sides):
            break
    return size


def _count_small(sides: NDArray[np.float64], image_size: int) -> int:
    return int((sides * image_size < MIN_CELLS * CELL).sum())
