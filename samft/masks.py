"""COCO segmentations: checked, packed in arrays, drawn. Imports no torch.

pycocotools crashes the process on huge coordinates and sizes and decodes an empty RLE as
uninitialised memory. So every number is checked here first, run lengths are read here, and
pycocotools only ever draws polygons.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_utils

from samft.errors import DataError
from samft.images import MAX_PIXELS

_MAX_COORDINATE = 1e5  # px; far outside of any image, far inside what pycocotools survives
_MAX_PERIMETER = 4e6  # px; pycocotools allocates five points a pixel of perimeter


class MaskError(DataError):
    """A segmentation that cannot be used; `reason` is `no_mask` or `bad_mask`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Segmentations:
    """Checked segmentations of all objects in flat arrays, which workers share without copying.

    Item k is a COCO segmentation: a list of polygon arrays (x y x y ..., px, original frame), or an
    uncompressed RLE dict with `size` [H, W] and `counts`.
    """

    first_part: NDArray[np.int64]  # [K + 1]
    first_number: NDArray[np.int64]  # [parts + 1]
    numbers: NDArray[np.float64]  # a polygon's coordinates, or H, W and counts of an RLE
    is_rle: NDArray[np.bool_]  # [K]

    @classmethod
    def pack(cls, segmentations: Sequence[Any]) -> "Segmentations":
        """Packs what `check_segmentation` returned."""
        parts: list[NDArray[Any]] = []
        first_part = [0]
        for item in segmentations:
            rle = isinstance(item, dict)
            parts += [np.append(item["size"], item["counts"])] if rle else item
            first_part.append(len(parts))
        return cls(
            first_part=np.asarray(first_part, dtype=np.int64),
            first_number=np.cumsum([0, *map(len, parts)], dtype=np.int64),
            numbers=np.concatenate([*parts, np.zeros(0)], dtype=np.float64),
            is_rle=np.asarray([isinstance(item, dict) for item in segmentations], dtype=bool),
        )

    def __len__(self) -> int:
        return len(self.is_rle)

    def __getitem__(self, k: int) -> Any:
        if not 0 <= k < len(self):
            raise IndexError(k)
        first, last = self.first_part[k], self.first_part[k + 1]
        bounds = self.first_number[first : last + 1].tolist()
        parts = [self.numbers[i:j] for i, j in zip(bounds[:-1], bounds[1:], strict=True)]
        if not self.is_rle[k]:
            return parts
        numbers = parts[0].astype(np.int64)
        return {"size": numbers[:2].tolist(), "counts": numbers[2:]}


def check_segmentation(raw: Any) -> Any:
    """Checks a raw COCO segmentation so that nothing in it can hurt.

    Args:
        raw: Polygons (a list of lists, or one flat list), or an RLE dict whose counts are a list or
            a compressed string.

    Returns:
        A list of polygon arrays, or an RLE dict with `size` [H, W] and an int64 array `counts`.

    Raises:
        MaskError: `no_mask` if it is empty, `bad_mask` if it is malformed.
    """
    if raw is None or (isinstance(raw, (list, tuple)) and len(raw) == 0):
        raise MaskError("no_mask")
    if isinstance(raw, dict):
        return _check_rle(raw)
    if not isinstance(raw, (list, tuple)):
        raise MaskError("bad_mask")
    nested = isinstance(raw[0], (list, tuple, np.ndarray))
    parts = [_check_polygon(part) for part in (raw if nested else [raw])]
    parts = [part for part in parts if len(part) >= 6]
    if not parts:
        raise MaskError("no_mask")
    if sum(_perimeter(part) for part in parts) > _MAX_PERIMETER:
        raise MaskError("bad_mask")
    return parts


def _to_numbers(raw: Any) -> NDArray[np.float64]:
    try:
        numbers = np.asarray(raw, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise MaskError("bad_mask") from None
    if numbers.ndim != 1 or not np.isfinite(numbers).all():
        raise MaskError("bad_mask")
    return numbers


def _check_polygon(raw: Any) -> NDArray[np.float64]:
    numbers = _to_numbers(raw)
    if len(numbers) % 2 or (np.abs(numbers) > _MAX_COORDINATE).any():
        raise MaskError("bad_mask")
    return numbers


def _perimeter(polygon: NDArray[np.float64]) -> float:
    points = polygon.reshape(-1, 2)
    return float(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum())


def _check_rle(raw: dict[str, Any]) -> dict[str, Any]:
    counts = raw.get("counts")
    if isinstance(counts, str):
        counts = counts.encode("ascii", "replace")
    numbers = _counts_from_string(counts) if isinstance(counts, bytes) else _to_numbers(counts)
    size = _to_numbers(raw.get("size"))
    if len(size) != 2 or not (size >= 1).all() or size.prod() > MAX_PIXELS:
        raise MaskError("bad_mask")
    if len(numbers) == 0 or not numbers[1::2].any():
        raise MaskError("no_mask")
    whole = (numbers >= 0).all() and (numbers % 1 == 0).all() and (size % 1 == 0).all()
    if not whole or numbers.sum() != size.prod():
        raise MaskError("bad_mask")
    return {"size": size.astype(int).tolist(), "counts": numbers.astype(np.int64)}


def _counts_from_string(text: bytes) -> NDArray[np.int64]:
    # COCO's code: groups of 5 bits, low first, bit 5 says "more follow", the last group's bit 4 is
    # the sign; from the fourth number on, what is stored is the difference to the last but one.
    # Source: rleFrString in cocoapi/common/maskApi.c.
    codes = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - 48
    if len(codes) == 0:
        return codes
    is_last = codes & 32 == 0
    if codes.min() < 0 or codes.max() > 63 or not is_last[-1]:
        raise MaskError("bad_mask")
    ends = np.flatnonzero(is_last) + 1
    lengths = np.diff(ends, prepend=0)
    if lengths.max() > 7:
        raise MaskError("bad_mask")
    starts = ends - lengths
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, lengths))
    numbers = np.add.reduceat((codes & 31) << shifts, starts)
    numbers -= (codes[ends - 1] >> 4 & 1) << (5 * lengths)
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers


def decode_cropped(
    segmentation: Any, height: int, width: int
) -> tuple[int, int, NDArray[np.uint8]]:
    """Draws a segmentation as pycocotools does on the whole image, and keeps the part that counts.

    Args:
        segmentation: Raw or checked COCO segmentation. An RLE of another size is decoded at its own
            size and then cut.
        height: Of the image, px.
        width: Of the image, px.

    Returns:
        top, left, and the tight crop: uint8 [h, w] of 0 and 1, or [0, 0] if no pixel is left.

    Raises:
        MaskError: If the segmentation is empty or malformed.
    """
    checked = check_segmentation(segmentation)
    if isinstance(checked, dict):
        counts, rows = checked["counts"], checked["size"][0]
    else:
        rles = mask_utils.frPyObjects(checked, height, width)
        rle = mask_utils.merge(rles) if len(rles) > 1 else rles[0]
        counts, rows = _counts_from_string(rle["counts"]), height
    ends = np.cumsum(counts)
    filled = 2 * np.flatnonzero(counts[1::2]) + 1
    if len(filled) == 0:
        return 0, 0, np.zeros((0, 0), dtype=np.uint8)
    # Only the columns between the first and the last pixel are ever written out.
    first, last = int(filled[0]), int(filled[-1])
    left, right = int(ends[first - 1]) // rows, (int(ends[last]) - 1) // rows + 1
    runs = counts[first - 1 : last + 1].copy()
    runs[0] = ends[first - 1] - left * rows
    flat = np.repeat((np.arange(len(runs)) & 1).astype(np.uint8), runs)
    flat = np.append(flat, np.zeros((right - left) * rows - len(flat), dtype=np.uint8))
    mask = flat.reshape(right - left, rows).T[:height, : max(0, width - left)]
    return _tight(mask, left)


def _tight(mask: NDArray[np.uint8], left: int) -> tuple[int, int, NDArray[np.uint8]]:
    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(ys) == 0:
        return 0, 0, np.zeros((0, 0), dtype=np.uint8)
    crop = mask[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]
    return int(ys[0]), left + int(xs[0]), np.ascontiguousarray(crop)


def has_pixels(checked: Any, height: int, width: int) -> bool:
    """Whether a checked segmentation covers any pixel of an image of this size."""
    if isinstance(checked, dict):
        return decode_cropped(checked, height, width)[2].size > 0
    size = np.array([width, height])
    for part in checked:
        points = part.reshape(-1, 2)
        # At least two pixels thick and inside of the image: no need to draw it.
        x, y = points.T
        area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
        if area > 4 * _perimeter(part) and (points >= 0).all() and (points <= size).all():
            return True
    return bool(mask_utils.area(mask_utils.frPyObjects(checked, height, width)).any())


def decode_segmentation(segmentation: Any, height: int, width: int) -> NDArray[np.uint8]:
    """Draws a segmentation: uint8 [height, width] of 0 and 1; see `decode_cropped`."""
    top, left, crop = decode_cropped(segmentation, height, width)
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[top : top + crop.shape[0], left : left + crop.shape[1]] = crop
    return mask
