"""Segmentations as tools write them, read as COCO means them. Imports no torch."""

import ast
import json
import re
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samft.errors import DataError
from samft.images.limits import MAX_MASK_PIXELS


def plain_segmentation(raw: Any) -> Any:
    """A segmentation as COCO writes it, where it is plain what is meant; else unchanged."""
    first = raw[0] if isinstance(raw, list) and raw else None
    if isinstance(first, list):
        is_usual = len(first) > 2 and isinstance(first[0], (int, float))
    else:
        is_usual = isinstance(first, (int, float))  # one flat list of numbers
    return raw if is_usual else rle_in(raw) or polygons_in(raw) or raw


def polygons_in(raw: Any, *, depth: int = 0) -> list[list[float]] | None:
    """The polygons of a segmentation in another notation than COCO's, where that is plain.

    Read are points as pairs, objects or text, lists of x and y, numbers as text, JSON in a text,
    and any of these nested too deeply.

    Args:
        raw: The segmentation; not an RLE.
        depth: How often it is nested in what was given.

    Returns:
        Lists of x y x y ...; None where it is not plain what is meant.
    """
    if isinstance(raw, str):
        return _polygons_in_text(raw, depth=depth)
    if isinstance(raw, dict):
        x, y = (raw.get(axis, raw.get(f"all_points_{axis}")) for axis in "xy")
        if isinstance(x, list) and isinstance(y, list) and len(x) == len(y):
            return polygons_in(list(map(list, zip(x, y, strict=True))), depth=depth)
        return polygons_in(raw["points"], depth=depth + 1) if "points" in raw else None
    if not isinstance(raw, list) or not raw or depth > _MAX_NESTING:
        return None
    numbers = [_to_number(one) for one in raw]
    if None not in numbers:
        return [[one for one in numbers if one is not None]]
    points = [_to_point(one) for one in raw]
    if None not in points:
        return [[side for point in points if point for side in point]]
    parts = [polygons_in(one, depth=depth + 1) for one in raw]
    return None if None in parts else [polygon for part in parts if part for polygon in part]


_MAX_NESTING = 4
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
_SEPARATORS = re.compile(r"[\s,;]+")
_OUTSIDE_CODE = re.compile(r"[\s,]")  # separates numbers, and is no character of COCO's RLE


def _polygons_in_text(text: str, *, depth: int) -> list[list[float]] | None:
    text = text.strip()
    if text[:1] in ("[", "{"):
        try:
            return polygons_in(json.loads(text), depth=depth + 1)
        except (ValueError, RecursionError):
            return None
    numbers = [_to_number(one) for one in _SEPARATORS.split(text)]
    if None in numbers or len(numbers) < 6:
        return None
    floats = [one for one in numbers if one is not None]
    # Whole numbers between spaces may be starts and lengths of runs: then the starts ascend.
    ascending = all(before < after for before, after in pairwise(floats[::2]))
    return None if ascending and not re.search("[,;.]", text) else [floats]


def _to_number(raw: Any) -> float | None:
    is_number = isinstance(raw, (int, float)) and not isinstance(raw, bool)
    if not is_number and not (isinstance(raw, str) and _NUMBER.fullmatch(raw.strip())):
        return None
    try:
        return float(raw)
    except OverflowError:
        return None


def _to_point(raw: Any) -> list[float] | None:
    raw = raw[0] if isinstance(raw, list) and len(raw) == 1 else raw  # of OpenCV's contours
    if isinstance(raw, dict):
        raw = [raw.get("x", raw.get("X")), raw.get("y", raw.get("Y"))]
    elif isinstance(raw, str):
        raw = _SEPARATORS.split(raw.strip())
    if not isinstance(raw, list) or len(raw) != 2:
        return None
    numbers = [one for one in map(_to_number, raw) if one is not None]
    return numbers if len(numbers) == 2 else None


def rle_in(raw: Any) -> dict[str, Any] | None:
    """The RLE that a segmentation is, or holds in a list or in a text; None where there is none."""
    if isinstance(raw, str) and raw.lstrip()[:1] in ("[", "{"):
        try:
            raw = json.loads(raw)
        except (ValueError, RecursionError):
            return None
    if isinstance(raw, list) and len(raw) == 1:
        raw = raw[0]
    return raw if isinstance(raw, dict) and "counts" in raw else None


class MaskError(DataError):
    """A segmentation that cannot be used; `code` is a key of `problems.KINDS`."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


def check_rle(raw: dict[str, Any]) -> dict[str, Any]:
    """Checks a raw RLE dict, whose counts are a list or a compressed string.

    Returns:
        `size` [H, W], and `counts` as int64.

    Raises:
        MaskError: `rle-empty`, `rle-too-large` or `rle-malformed`.
    """
    counts = raw.get("counts")
    if isinstance(counts, str):
        counts = _plain_counts(counts)
    numbers = counts_from_strings([counts])[0] if isinstance(counts, bytes) else _to_numbers(counts)
    size = _to_numbers(raw.get("size"))
    if len(size) != 2 or not (size >= 1).all():
        raise MaskError("rle-malformed")
    if size.prod() > MAX_MASK_PIXELS:
        raise MaskError("rle-too-large")
    if len(numbers) == 0 or not numbers[1::2].any():
        raise MaskError("rle-empty")
    whole = (numbers >= 0).all() and (numbers % 1 == 0).all() and (size % 1 == 0).all()
    if not whole or numbers.sum() != size.prod():
        raise MaskError("rle-malformed")
    return {"size": size.astype(int).tolist(), "counts": numbers.astype(np.int64)}


def _plain_counts(text: str) -> bytes | list[str]:
    # COCO's code goes from 0 to o, with ; and [ and ], but without quotes, spaces and commas: b'..'
    # is how Python prints it, and the rest is a list.
    if text[:2] in ("b'", 'b"'):
        try:
            return bytes(ast.literal_eval(text))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise MaskError("rle-malformed") from None
    if not _OUTSIDE_CODE.search(text):
        return text.encode("ascii", "replace")
    return _SEPARATORS.split(text.strip(" []"))


def _to_numbers(raw: Any) -> NDArray[np.float64]:
    try:
        numbers = np.asarray(raw, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise MaskError("rle-malformed") from None
    if numbers.ndim != 1 or not np.isfinite(numbers).all():
        raise MaskError("rle-malformed")
    return numbers


def counts_from_strings(texts: Sequence[bytes]) -> list[NDArray[np.int64]]:
    """Decodes run lengths from COCO's compressed RLE, of many masks at once.

    Raises:
        MaskError: `rle-malformed`.
    """
    # COCO's code: a number is groups of 5 bits, the lowest first; bit 5 says that another group
    # follows, and bit 4 of the last group is the sign. From the fourth number on, the difference to
    # the number two places before is stored.
    # Source: rleFrString in cocoapi/common/maskApi.c.
    codes = np.frombuffer(b"".join(texts), dtype=np.uint8).astype(np.int64) - 48
    if len(codes) == 0:
        return [codes] * len(texts)
    text_ends = np.fromiter(accumulate(map(len, texts)), dtype=np.int64)
    is_last = codes & 32 == 0
    if codes.min() < 0 or codes.max() > 63 or not is_last[text_ends - 1].all():
        raise MaskError("rle-malformed")
    ends = np.flatnonzero(is_last) + 1
    lengths = np.diff(ends, prepend=0)
    if lengths.max() > 7:
        raise MaskError("rle-malformed")
    starts = ends - lengths
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, lengths))
    numbers = np.add.reduceat((codes & 31) << shifts, starts)
    numbers -= (codes[ends - 1] >> 4 & 1) << (5 * lengths)
    first_numbers = np.append(0, np.searchsorted(ends, text_ends, side="right"))
    per_text = np.diff(first_numbers)
    nth = np.arange(len(numbers)) - np.repeat(first_numbers[:-1], per_text)
    for chosen, count in (
        (nth % 2 == 1, per_text // 2),
        (nth % 2 < (nth > 0), (per_text - 1) // 2),
    ):
        # The running sum of each text: that of all texts, less what it was before the text.
        sums = np.append(0, np.cumsum(numbers[chosen]))
        numbers[chosen] = sums[1:] - np.repeat(sums[np.cumsum(count) - count], count)
    return [numbers[first:end] for first, end in pairwise(first_numbers.tolist())]
