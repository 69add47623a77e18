"""Boxes of COCO objects, many at a time: checked against their masks, and measured in cells.

Boxes tell, before any image is read, which objects are too small for the decoder's masks, and which
`image_size` suits them (`find_small_objects`): training and `samft.check` ask here. Imports no
torch.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
class SmallObjects:
    """How many objects are too small for the decoder's masks, and an image size for them.

    Attributes:
        image_size: The model's input, px.
        num_objects: All.
        num_small: Those whose box has a shorter side of under `MIN_CELLS` cells at the input.
        suggested_image_size: The smallest multiple of 64 px above `image_size` at which no more
            than `FEW_SMALL` of the objects are small, or the largest that `suggest_image_size`
            tries; `image_size` itself where no more are small.
        num_small_then: Objects that are small at the suggested size.
    """

    image_size: int
    num_objects: int
    num_small: int
    suggested_image_size: int
    num_small_then: int

    @property
    def share(self) -> float:
        """Share of the objects that are small, 0..1."""
        return self.num_small / max(self.num_objects, 1)

    @property
    def are_many(self) -> bool:
        """Whether a larger image size, or images cut into tiles, would help."""
        return self.num_small > FEW_SMALL * self.num_objects

    def advise(self, objects: str) -> str:
        """How many objects are too small, and what to do, as a phrase for where they are many.

        Args:
            objects: What to call the objects.
        """
        text = (
            f"{self.num_small:,} of {self.num_objects:,} {objects} ({self.share:.1%}) are too "
            f"small for image_size {self.image_size}: the shorter side of their box is under "
            f"{MIN_CELLS * CELL} px there, {MIN_CELLS} cells of the decoder's masks, where filling "
            "the box tends to be better than the mask"
        )
        if self.suggested_image_size > self.image_size:
            cost = (self.suggested_image_size / self.image_size) ** 2
            text += (
                f"; --image_size {self.suggested_image_size} leaves {self.num_small_then:,} of "
                f"them, at {cost:.1f} times the time and memory of an image"
            )
        if self.num_small_then > FEW_SMALL * self.num_objects:
            text += "; or cut the images into tiles"
        return text


def find_small_objects(
    boxes: NDArray[np.floating],
    sizes: NDArray[np.integer],
    *,
    image_size: int,
    resize_mode: str = "pad",
) -> SmallObjects:
    """Counts the objects that are small at an image size, and suggests one; reads no pixels.

    Args:
        boxes: [n, 4], x0 y0 x1 y1, px, original frame.
        sizes: [n, 2], H, W of the objects' images, px.
        image_size: The model's input, px.
        resize_mode: `pad` or `squash`: how images fit into it.
    """
    sides = shorter_sides(boxes, sizes, resize_mode=resize_mode)
    suggested = suggest_image_size(
        sides, at_least=image_size, longest_side=int(sizes.max(initial=0))
    )
    return SmallObjects(
        image_size=image_size,
        num_objects=len(boxes),
        num_small=_count_small(sides, image_size),
        suggested_image_size=suggested,
        num_small_then=_count_small(sides, suggested),
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
    name, worst = max(
        splits.items(), key=lambda item: (item[1].suggested_image_size, item[1].share)
    )
    return worst.advise(f"{name} objects") if worst.are_many else None


def shorter_sides(
    boxes: NDArray[np.floating], sizes: NDArray[np.integer], *, resize_mode: str
) -> NDArray[np.float64]:
    """The shorter side of each box at the model's input, as a share of the input's side.

    Args:
        boxes: [n, 4], x0 y0 x1 y1, px, original frame.
        sizes: [n, 2], H, W of the objects' images, px.
        resize_mode: `pad` or `squash`.

    Returns:
        float64 [n].
    """
    widths_heights = np.asarray(boxes[:, 2:] - boxes[:, :2], dtype=np.float64)
    full = np.maximum(sizes[:, ::-1], 1)
    if resize_mode == "pad":  # both axes are scaled as the longer one is
        full = full.max(axis=1, keepdims=True)
    return np.asarray((widths_heights / full).min(axis=1))


def suggest_image_size(sides: NDArray[np.float64], *, at_least: int, longest_side: int) -> int:
    """The smallest input at which no more than `FEW_SMALL` of the objects are small.

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
