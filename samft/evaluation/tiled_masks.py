"""Automatic masks of the tiles of an image, merged where tiles overlap: each object once.

A mask that reaches the margin of its tile, where the image goes on, may be a part of an object. If
another tile shows the object as a whole, the part is left out; if all tiles cut it, its parts are
joined. Of several whole masks of one object, that of the highest predicted IoU stays.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_utils

from samft.annotations.segmentation import decode_cropped, encode_cropped
from samft.models.mask_generator import MaskGenerator
from samft.views.regions import ImageSource
from samft.views.windows import View, tile_windows

_SAME = 0.5  # IoU from which two masks are of one object
_MARGIN = 1 / 128  # of a tile's side; at least a pixel
_LARGEST_JOINED = 1 << 26  # px of the rectangle around joined parts, which bounds memory

Rle = dict[str, Any]


@dataclass(frozen=True)
class AutomaticMask:
    """A mask of the automatic mask generator, in the frame of the whole image.

    Attributes:
        rle: COCO's compressed RLE, of the size of the image.
        box: x0 y0 x1 y1, px, as the generator gives it.
        iou_predicted: The model's estimate.
        stability_score: The generator's.
    """

    rle: Rle
    box: tuple[float, float, float, float]
    iou_predicted: float
    stability_score: float


def generate_in_tiles(
    generator: MaskGenerator,
    source: ImageSource,
    view: View,
    *,
    follow: Callable[[NDArray[np.int64]], Iterable[Any]] = iter,
) -> list[AutomaticMask]:
    """All masks of an image, generated tile by tile.

    Args:
        generator: Of the model.
        source: The image.
        view: Its `tile_size` and `tile_overlap` are used.
        follow: Wraps the loop over tiles, to show progress.

    Raises:
        ImageError: A part of the file is damaged.
    """
    tiles = tile_windows(source.size, view)
    masks: list[AutomaticMask] = []
    owners: list[int] = []
    for number, tile in enumerate(follow(tiles)):
        entries = generator.generate(source.read(tile))
        masks += [_to_image(entry, tile, source.size) for entry in entries]
        owners += [number] * len(entries)
    return merge_tiles(masks, np.array(owners, dtype=np.int64), tiles, source.size)


def _to_image(
    entry: dict[str, Any], tile: NDArray[np.int64], size: tuple[int, int]
) -> AutomaticMask:
    left, top, right, bottom = tile.tolist()
    shape = (bottom - top, right - left)
    counts = np.array(entry["segmentation"]["counts"])
    crop = decode_cropped({"size": list(shape), "counts": counts}, shape)
    x, y, width, height = entry["bbox"]
    return AutomaticMask(
        encode_cropped(replace(crop, top=top + crop.top, left=left + crop.left), size),
        (left + x, top + y, left + x + width, top + y + height),
        entry["predicted_iou"],
        entry["stability_score"],
    )


def merge_tiles(
    masks: Sequence[AutomaticMask],
    owners: NDArray[np.int64],
    tiles: NDArray[np.int64],
    size: tuple[int, int],
) -> list[AutomaticMask]:
    """The masks of all tiles, each object once.

    Args:
        masks: M masks.
        owners: int64 [M], the tile of each, ascending.
        tiles: int64 [n, 4], x0 y0 x1 y1, px.
        size: H, W of the image, px.
    """
    boxes = np.array([mask.box for mask in masks]).reshape(-1, 4)
    are_cut = _find_cut(boxes, tiles[owners], size)
    left_out = np.zeros(len(masks), dtype=bool)
    doubles: list[tuple[int, int]] = []
    parts: list[tuple[int, int]] = []
    for first, second, overlap in _overlapping(boxes, owners, tiles):
        a, b = ([masks[k].rle for k in rows] for rows in (first, second))
        cut_a, cut_b = are_cut[first][:, None], are_cut[second][None]
        # Columns of `iou` are crowds: the share of each row's mask that they cover.
        left_out[first] |= (cut_a & ~cut_b & (_iou(a, b, shares=True) > _SAME)).any(axis=1)
        left_out[second] |= (cut_b & ~cut_a & (_iou(b, a, shares=True).T > _SAME)).any(axis=0)
        same = ~cut_a & ~cut_b & (_iou(a, b) > _SAME)
        doubles += [(first[i], second[j]) for i, j in np.argwhere(same).tolist()]
        agree = cut_a & cut_b & (_iou(_within(a, overlap, size), _within(b, overlap, size)) > _SAME)
        parts += [(first[i], second[j]) for i, j in np.argwhere(agree).tolist()]
    scores = np.array([mask.iou_predicted for mask in masks])
    left_out |= _worse_doubles(doubles, scores)
    parts = [pair for pair in parts if not left_out[list(pair)].any()]
    groups = _group_parts(parts, boxes)
    return [_join_parts([masks[k] for k in group]) for group in groups if not left_out[group[0]]]


def _find_cut(
    boxes: NDArray[np.float64], tiles: NDArray[np.int64], size: tuple[int, int]
) -> NDArray[np.bool_]:
    # Which masks reach a side of their tile that is not a side of the image: [M].
    height, width = size
    margin = np.maximum((tiles[:, 2:] - tiles[:, :2]) * _MARGIN, 1)
    low = (boxes[:, :2] - tiles[:, :2] < margin) & (tiles[:, :2] > 0)
    # The generator's boxes end at the centre of the last pixel.
    high = (tiles[:, 2:] - boxes[:, 2:] - 1 < margin) & (tiles[:, 2:] < [width, height])
    return np.asarray((low | high).any(axis=1))


def _overlapping(
    boxes: NDArray[np.float64], owners: NDArray[np.int64], tiles: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    # Of each two tiles that overlap: the masks of either that reach into the overlap, and where it
    # is, x0 y0 x1 y1.
    for a in range(len(tiles)):
        low = np.maximum(tiles[a, :2], tiles[a + 1 :, :2])
        high = np.minimum(tiles[a, 2:], tiles[a + 1 :, 2:])
        for b in np.flatnonzero((high > low).all(axis=1)).tolist():
            reach = (boxes[:, :2] < high[b]).all(axis=1) & (boxes[:, 2:] >= low[b]).all(axis=1)
            first, second = (np.flatnonzero(reach & (owners == k)) for k in (a, a + 1 + b))
            if len(first) and len(second):
                yield first, second, np.concatenate([low[b], high[b]])


def _iou(a: list[Rle], b: list[Rle], *, shares: bool = False) -> NDArray[np.float64]:
    return np.asarray(mask_utils.iou(a, b, [int(shares)] * len(b))).reshape(len(a), len(b))


def _within(rles: list[Rle], window: NDArray[np.int64], size: tuple[int, int]) -> list[Rle]:
    x0, y0, x1, y1 = window.tolist()
    outline = [[float(side) for side in (x0, y0, x1, y0, x1, y1, x0, y1)]]
    (rectangle,) = mask_utils.frPyObjects(outline, *size)
    return [mask_utils.merge([rle, rectangle], intersect=True) for rle in rles]


def _worse_doubles(pairs: list[tuple[int, int]], scores: NDArray[np.float64]) -> NDArray[np.bool_]:
    # Whole masks that are those of a better one: from the best score down, as in NMS.
    others: dict[int, list[int]] = {}
    for first, second in pairs:
        others.setdefault(first, []).append(second)
        others.setdefault(second, []).append(first)
    worse = np.zeros(len(scores), dtype=bool)
    for k in sorted(others, key=lambda k: (-scores[k], k)):
        if not worse[k]:
            worse[others[k]] = True
    return worse


def _group_parts(pairs: list[tuple[int, int]], boxes: NDArray[np.float64]) -> list[list[int]]:
    # Groups of masks that are parts of one object; a mask without others is a group of its own.
    group_of = [[k] for k in range(len(boxes))]
    for first, second in pairs:
        joined = sorted({*group_of[first], *group_of[second]})
        sides = boxes[joined, 2:].max(axis=0) - boxes[joined, :2].min(axis=0)
        if sides.prod() <= _LARGEST_JOINED:
            for k in joined:
                group_of[k] = joined
    return [group for k, group in enumerate(group_of) if group[0] == k]


def _join_parts(parts: list[AutomaticMask]) -> AutomaticMask:
    # As sure as its least sure part.
    if len(parts) == 1:
        return parts[0]
    merged = mask_utils.merge([part.rle for part in parts])
    boxes = np.array([part.box for part in parts])
    (x0, y0), (x1, y1) = boxes[:, :2].min(axis=0).tolist(), boxes[:, 2:].max(axis=0).tolist()
    return replace(
        parts[0],
        rle={"size": list(merged["size"]), "counts": merged["counts"].decode("ascii")},
        box=(x0, y0, x1, y1),
        iou_predicted=min(part.iou_predicted for part in parts),
        stability_score=min(part.stability_score for part in parts),
    )
