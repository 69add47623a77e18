"""Checked COCO segmentations: packed into one array, drawn, encoded. Imports no torch.

`mask_checks` has checked every number, and run lengths are decoded by `notation`: pycocotools only
ever draws polygons that it survives, counts their pixels and writes RLE.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_utils

from samft.annotations.notation import counts_from_strings

# How run lengths are written; of each, whether `size` is W, H and whether they go along rows.
PLAIN = "plain"
LAYOUTS = {
    PLAIN: (False, False),
    "size-swapped": (True, False),
    "by-rows": (False, True),
    "by-rows-size-swapped": (True, True),
}
_RLE = -1  # in `Segmentations`, instead of a number of polygons


@dataclass(frozen=True)
class CroppedMask:
    """A mask at the original resolution, cropped tightly; h and w are 0 if it has no pixel."""

    top: int  # px, original frame
    left: int
    mask: NDArray[np.bool_]  # [h, w]

    @property
    def extent(self) -> tuple[int, int, int, int]:
        """x0 y0 x1 y1 around the crop, px, original frame."""
        height, width = self.mask.shape
        return self.left, self.top, self.left + width, self.top + height


_NO_PIXELS = CroppedMask(0, 0, np.zeros((0, 0), dtype=bool))


@dataclass(frozen=True)
class Segmentations:
    """Checked segmentations of all objects in one buffer, which processes share without copying.

    Item k is a COCO segmentation: a list of polygon arrays (x y x y ..., px, original frame), or an
    uncompressed RLE dict with `size` [H, W] and `counts`.

    Attributes:
        buffer: int64. From `starts[k]` on stand, for polygons, their number P, P lengths and their
            coordinates (the bits of float64); for an RLE, -1, H, W, the number of bytes and those
            bytes of COCO's compressed RLE, padded to a multiple of 8.
        starts: int64 [K].
    """

    buffer: NDArray[np.int64]
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts)

    def are_rle(self) -> NDArray[np.bool_]:
        """Which are RLE, not polygons, bool [K]."""
        return np.asarray(self.buffer[self.starts] == _RLE)

    def take(self, which: NDArray[np.int64]) -> "Segmentations":
        """Some of the segmentations, in the order given, with the same buffer."""
        return Segmentations(self.buffer, self.starts[which])

    def are_equal(self, first: int, second: int) -> bool:
        """Whether two items have the same numbers."""
        one, other = (self._content(int(self.starts[k])) for k in (first, second))
        return np.array_equal(one, other)

    def _content(self, start: int) -> NDArray[np.int64]:
        kind = int(self.buffer[start])
        if kind == _RLE:
            return self.buffer[start : start + 4 + -(-int(self.buffer[start + 3]) // 8)]
        first = start + 1 + kind
        return self.buffer[start : first + int(self.buffer[start + 1 : first].sum())]

    def __getitem__(self, k: int) -> Any:
        if not 0 <= k < len(self):
            raise IndexError(k)
        buffer, start = self.buffer, int(self.starts[k])
        if buffer[start] == _RLE:
            height, width, num_bytes = buffer[start + 1 : start + 4].tolist()
            text = buffer[start + 4 : start + 4 + -(-num_bytes // 8)].tobytes()[:num_bytes]
            return {"size": [height, width], "counts": counts_from_strings([text])[0]}
        first = start + 1 + int(buffer[start])
        lengths = buffer[start + 1 : first].tolist()
        ends = accumulate(lengths, initial=first)
        return [buffer[low:high].view(np.float64) for low, high in pairwise(ends)]


def pack_polygons(
    num_parts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    owners: NDArray[np.int64],
    numbers: NDArray[np.float64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Usable polygons as they stand in `Segmentations.buffer`.

    Args:
        num_parts: int64 [n], polygons of each object.
        lengths: int64 [P], numbers of each polygon.
        owners: int64 [P], the object of each polygon, ascending.
        numbers: float64, the coordinates of all polygons.

    Returns:
        The buffer, and `Segmentations.starts`, -1 for objects without polygons.
    """
    sizes = np.bincount(owners, weights=lengths, minlength=len(num_parts)).astype(np.int64)
    sizes += np.where(num_parts > 0, num_parts + 1, 0)
    starts = starts_of(sizes)
    buffer = np.empty(sizes.sum(), dtype=np.int64)
    buffer[starts[num_parts > 0]] = num_parts[num_parts > 0]
    rank = np.arange(len(owners)) - starts_of(num_parts)[owners]  # of a part within its object
    buffer[starts[owners] + 1 + rank] = lengths
    is_number = np.ones(len(buffer), dtype=bool)
    is_number[starts[num_parts > 0]] = False
    is_number[starts[owners] + 1 + rank] = False
    buffer.view(np.float64)[is_number] = numbers
    return buffer, np.where(num_parts > 0, starts, -1)


def pack_rle(rle: dict[str, Any]) -> NDArray[np.int64]:
    """A checked RLE as it stands in `Segmentations.buffer`, int64."""
    text = mask_utils.frPyObjects(rle, *rle["size"])["counts"]
    padded = text + bytes(-len(text) % 8)
    return np.concatenate(
        [np.array([_RLE, *rle["size"], len(text)]), np.frombuffer(padded, dtype=np.int64)]
    )


def starts_of(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where pieces of such lengths begin, one after the other, int64."""
    return np.cumsum(lengths) - lengths


def decode_cropped(segmentation: Any, size: tuple[int, int]) -> CroppedMask:
    """Draws a segmentation exactly as pycocotools does on the whole image, and crops it tightly.

    Args:
        segmentation: An item of `Segmentations`. An RLE of another size than the image is decoded
            at its own size and then cut.
        size: H, W of the image, px.
    """
    height, width = size
    if isinstance(segmentation, dict):
        counts, rows = segmentation["counts"], segmentation["size"][0]
    else:
        counts, rows = draw_polygons([segmentation], size)[0]["counts"], height
    ends = np.cumsum(counts)
    filled = 2 * np.flatnonzero(counts[1::2]) + 1
    if len(filled) == 0:
        return _NO_PIXELS
    # Only the columns of the image between the first and the last pixel are ever written out.
    first = int(filled[0])
    left = int(ends[first - 1]) // rows
    if left >= width:
        return _NO_PIXELS
    last = min(int(filled[-1]), int(np.searchsorted(ends, width * rows)))
    right = min((int(ends[last]) - 1) // rows + 1, width)
    runs = counts[first - 1 : last + 1].copy()
    runs[0] = ends[first - 1] - left * rows
    runs[-1] -= max(int(ends[last]) - width * rows, 0)
    flat = np.repeat((np.arange(len(runs)) & 1).astype(bool), runs)
    flat = np.append(flat, np.zeros((right - left) * rows - len(flat), dtype=bool))
    mask = flat.reshape(right - left, rows).T[:height]
    return _crop_tightly(mask, left=left)


def relayout(rle: dict[str, Any], layout: str) -> dict[str, Any]:
    """A checked RLE that is written in another layout, as COCO writes it: down the columns, H, W.

    Args:
        rle: `size` and `counts` int64.
        layout: A key of `LAYOUTS`.
    """
    swapped, by_rows = LAYOUTS[layout]
    height, width = rle["size"][::-1] if swapped else rle["size"]
    if not by_rows:
        return {"size": [height, width], "counts": rle["counts"]}
    # Along the rows of a mask is down the columns of the transposed one.
    crop = decode_cropped({"size": [width, height], "counts": rle["counts"]}, (width, height))
    transposed = CroppedMask(crop.left, crop.top, np.ascontiguousarray(crop.mask.T))
    return uncompressed_rle(transposed, (height, width))


def resample(rle: dict[str, Any], size: tuple[int, int], factors: Any) -> dict[str, Any]:
    """An RLE in an image of H, W; factors are for x and y, and what is then added to them, px."""
    crop, (fx, fy, dx, dy) = decode_cropped(rle, rle["size"]), factors
    axes = zip(size, (fy, fx), (dy, dx), (crop.top, crop.left), strict=True)
    places = [  # each pixel is the one under its centre
        np.floor((np.arange(length) + 0.5 - shift) / factor).astype(np.int64) - first
        for length, factor, shift, first in axes
    ]
    inside = [
        np.flatnonzero((place >= 0) & (place < length))
        for place, length in zip(places, crop.mask.shape, strict=True)
    ]
    if not all(map(len, inside)):
        return {"size": list(size), "counts": np.array([size[0] * size[1]])}
    (ys, xs), (rows, columns) = inside, places
    mask = crop.mask[np.ix_(rows[ys], columns[xs])]
    return uncompressed_rle(CroppedMask(int(ys[0]), int(xs[0]), mask), size)


def decode_encoded(rle: dict[str, Any]) -> CroppedMask:
    """The mask that `encode_cropped` encoded, cropped tightly."""
    counts = counts_from_strings([rle["counts"].encode("ascii")])[0]
    return decode_cropped({"size": rle["size"], "counts": counts}, rle["size"])


def count_pixels(segmentation: Any, size: tuple[int, int]) -> int:
    """Number of pixels of an image of size H, W that a checked segmentation covers."""
    if isinstance(segmentation, list):  # in C: a tenth of a large file's objects come here
        return int(mask_utils.area(mask_utils.merge(mask_utils.frPyObjects(segmentation, *size))))
    return int(decode_cropped(segmentation, size).mask.sum())


def draw_polygons(objects: Sequence[Any], size: tuple[int, int]) -> list[dict[str, Any]]:
    """Objects of polygons as uncompressed RLE, in an image of H, W."""
    rles = mask_utils.frPyObjects([part for parts in objects for part in parts], *size)
    ends = accumulate(map(len, objects), initial=0)
    merged = [mask_utils.merge(rles[i:j]) if j > i + 1 else rles[i] for i, j in pairwise(ends)]
    decoded = counts_from_strings([rle["counts"] for rle in merged])
    return [{"size": size, "counts": counts} for counts in decoded]


def draw_even_odd(polygons: Sequence[Any], size: tuple[int, int]) -> CroppedMask:
    """The pixels inside of an odd number of polygons: holes are empty, islands in them are not.

    Args:
        polygons: Arrays of x y x y ..., px, original frame.
        size: H, W of the image, px.
    """
    parts = [part for one in polygons if (part := decode_cropped([one], size)).mask.size]
    extents = np.array([part.extent for part in parts] or [_NO_PIXELS.extent])
    (left, top), (right, bottom) = extents[:, :2].min(0).tolist(), extents[:, 2:].max(0).tolist()
    mask = np.zeros((bottom - top, right - left), dtype=bool)
    for part in parts:
        x0, y0, x1, y1 = part.extent
        mask[y0 - top : y1 - top, x0 - left : x1 - left] ^= part.mask
    return CroppedMask(top, left, mask)


def _crop_tightly(mask: NDArray[np.bool_], *, left: int) -> CroppedMask:
    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(ys) == 0:
        return _NO_PIXELS
    crop = mask[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]
    return CroppedMask(int(ys[0]), left + int(xs[0]), np.ascontiguousarray(crop))


def encode_cropped(crop: CroppedMask, size: tuple[int, int]) -> dict[str, Any]:
    """A mask as COCO's compressed RLE, as pycocotools would encode the whole image.

    Args:
        crop: The mask, inside of the image; it need not be tight.
        size: H, W of the image, px.

    Returns:
        `size` [H, W], and `counts` as text, which JSON can hold.
    """
    rle = uncompressed_rle(crop, size)
    text = mask_utils.frPyObjects({**rle, "counts": rle["counts"].tolist()}, *size)["counts"]
    return {**rle, "counts": text.decode("ascii")}


def uncompressed_rle(crop: CroppedMask, size: tuple[int, int]) -> dict[str, Any]:
    """The same with `counts` as int64 [R]: a checked segmentation, see `decode_cropped`."""
    height, width = size
    num_rows, num_columns = crop.mask.shape
    # Column after column, with an empty pixel before the first and below each.
    flat = np.zeros(1 + num_columns * (num_rows + 1), dtype=bool)
    flat[1:].reshape(num_columns, num_rows + 1)[:, :num_rows] = crop.mask.T
    columns, rows = np.divmod(np.flatnonzero(flat[1:] != flat[:-1]), num_rows + 1)
    positions = (crop.left + columns) * height + crop.top + rows
    # A run that continues at the top of the next column is one run.
    joins = np.flatnonzero((positions[1:] == positions[:-1]) & (columns[1:] != columns[:-1]))
    positions = np.delete(positions, np.concatenate([joins, joins + 1]))
    counts = np.diff(positions, prepend=0, append=height * width)
    if len(counts) % 2 == 1 and len(counts) > 1 and counts[-1] == 0:
        counts = counts[:-1]
    return {"size": [height, width], "counts": counts}
