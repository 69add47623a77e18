"""COCO segmentations: checked, packed into one array, drawn, encoded. Imports no torch.

pycocotools crashes the process on huge coordinates and sizes, and decodes an empty RLE as
uninitialised memory. So every number of a file is checked first, many objects at a time
(`RawMasks`, `CheckedMasks`), run lengths are decoded here, and pycocotools only ever draws checked
polygons, counts their pixels and writes RLE.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_utils

from samft.coco.json_reader import MaskError, check_rle, counts_from_strings, plain_segmentation

_MAX_COORDINATE = 1e5  # px; far outside of any image, far inside what pycocotools survives
_MAX_PERIMETER = 4e6  # px; pycocotools allocates five points a pixel of perimeter
_MOST_TIMES_IMAGE = 32  # the side of an RLE may have so many times that of its image
# How run lengths are written; of each, whether `size` is W, H and whether they go along rows.
PLAIN = "plain"
LAYOUTS = {
    PLAIN: (False, False),
    "size-swapped": (True, False),
    "by-rows": (False, True),
    "by-rows-size-swapped": (True, True),
}
_SMALLEST_HOLE = 0.02  # share of a mask
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


class RawMasks:
    """Raw segmentations of many objects, in flat lists, so that all can be checked at once."""

    def __init__(self) -> None:
        """Starts with no object."""
        self.count = 0
        self.numbers = array("d")
        self.lengths: list[int] = []  # of the polygons
        self.owners: list[int] = []  # the object of each polygon
        self.rles: dict[int, dict[str, Any]] = {}
        self.refused: dict[int, str] = {}  # object -> code
        self.flat: list[int] = []  # objects whose polygon lacks the outer list
        self.respelled: list[int] = []  # objects in another notation than COCO's

    def add(self, raw: Any) -> None:
        """Adds the segmentation of the next object, whatever it is.

        Args:
            raw: Polygons (a list of lists, or one flat list), or an RLE dict whose counts are a
                list or a compressed string; or what `plain_segmentation` reads. Anything else is
                recorded as refused.
        """
        owner, self.count = self.count, self.count + 1
        plain = plain_segmentation(raw)
        self.respelled += [owner] if plain is not raw and plain != raw else []
        raw = plain
        if isinstance(raw, dict) and {"size", "counts"} & raw.keys():
            try:
                self.rles[owner] = check_rle(raw)
            except MaskError as error:
                self.refused[owner] = error.code
        elif isinstance(raw, list) and raw:
            if isinstance(raw[0], (int, float)):
                self.flat.append(owner)
                raw = [raw]
            for part in raw:
                try:
                    self.numbers.fromlist(part)  # all of it or nothing
                    self.lengths.append(len(part))
                except (TypeError, OverflowError):
                    self.lengths.append(-1)
                self.owners.append(owner)
        else:
            self.refused[owner] = "mask-malformed" if raw else "mask-missing"

    def check(self) -> "CheckedMasks":
        """Checks all objects that were added."""
        return CheckedMasks(self)


_POLYGON_CODES = (
    "",
    "polygon-malformed",
    "polygon-too-short",
    "polygon-odd",
    "polygon-not-finite",
    "polygon-far-outside",
)


class CheckedMasks:
    """The segmentations of n objects: which can be used, and their measures.

    Attributes:
        codes: [n] why an object cannot be used: a key of `problems.KINDS`, or ''.
        extents: float64 [n, 4], x0 y0 x1 y1 around the mask, px, original frame.
        areas: float64 [n], px; of several polygons the sum.
        perimeters: float64 [n], px, the sum of the longer side of each edge; 0 for RLE.
        num_parts: int64 [n] usable polygons; 1 for RLE.
        part_left_out: bool [n], whether some polygons are unusable, but not all.
        has_holes: bool [n], whether some polygons are read as holes of others, see `cut_holes`.
        rle_sizes: H, W of the objects that are RLE.
        segmentations: Of all n; those of objects with a code must not be read.
    """

    def __init__(self, raw: RawMasks) -> None:
        """Checks all objects of `raw`."""
        n = raw.count
        self.codes = np.full(n, "", dtype=object)
        self.extents, self.areas, self.perimeters = np.zeros((n, 4)), np.zeros(n), np.zeros(n)
        self.num_parts = np.zeros(n, dtype=np.int64)
        self.part_left_out, self.has_holes = np.zeros((2, n), dtype=bool)
        self.rle_sizes = {owner: tuple(rle["size"]) for owner, rle in raw.rles.items()}
        for owner, code in raw.refused.items():
            self.codes[owner] = code
        polygons, starts = self._check_polygons(raw)
        blocks, end = [polygons], len(polygons)
        for owner, rle in raw.rles.items():
            self._measure_rle(owner, rle)
            blocks.append(_pack_rle(rle))
            starts[owner], end = end, end + len(blocks[-1])
        starts = np.where(np.asarray(self.codes == "", dtype=bool), starts, -1)
        self.segmentations = Segmentations(np.concatenate(blocks), starts)

    def _check_polygons(self, raw: RawMasks) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        lengths = np.asarray(raw.lengths, dtype=np.int64)
        owners = np.asarray(raw.owners, dtype=np.int64)
        numbers = np.frombuffer(raw.numbers, dtype=np.float64) if raw.numbers else np.zeros(0)
        verdicts = judge_polygons(lengths, numbers)
        good = verdicts == 0
        unusable = np.bincount(owners[~good], minlength=raw.count) > 0
        self.num_parts = np.bincount(owners[good], minlength=raw.count)
        self.part_left_out = unusable & (self.num_parts > 0)
        for part in np.flatnonzero(~good)[::-1]:  # the first of an object gives the code
            if self.num_parts[owners[part]] == 0:
                self.codes[owners[part]] = _POLYGON_CODES[verdicts[part]]
        lengths = np.maximum(lengths, 0)
        if not good.all():
            numbers = numbers[np.repeat(good, lengths)]
            lengths, owners = lengths[good], owners[good]
        if len(lengths):
            self._measure_polygons(lengths, owners, numbers)
        self.codes[self.perimeters > _MAX_PERIMETER] = "polygon-too-long"
        return _pack_polygons(self.num_parts, lengths, owners, numbers)

    def _measure_polygons(
        self, lengths: NDArray[np.int64], owners: NDArray[np.int64], numbers: NDArray[np.float64]
    ) -> None:
        points = numbers.reshape(-1, 2)
        starts = _starts(lengths) // 2
        following = np.arange(1, len(points) + 1)
        following[starts + lengths // 2 - 1] = starts
        (x, y), (next_x, next_y) = points.T, points[following].T
        # Shoelace formula for the area; the closing edge leads to the polygon's first point.
        longer = np.maximum(np.abs(next_x - x), np.abs(next_y - y))
        parts = np.abs(np.add.reduceat(x * next_y - next_x * y, starts)) / 2
        self.areas += np.bincount(owners, weights=parts, minlength=len(self.areas))
        outline = np.add.reduceat(longer, starts)
        self.perimeters += np.bincount(owners, weights=outline, minlength=len(self.areas))
        has_parts = np.flatnonzero(self.num_parts)
        first_points = starts[_starts(self.num_parts[has_parts])]
        self.extents[has_parts, :2] = np.minimum.reduceat(points, first_points)
        self.extents[has_parts, 2:] = np.maximum.reduceat(points, first_points)

    def _measure_rle(self, owner: int, rle: dict[str, Any]) -> None:
        # From the run lengths, so that no size makes it slow or takes memory.
        ends, rows = np.cumsum(rle["counts"]), rle["size"][0]
        filled = 2 * np.flatnonzero(rle["counts"][1::2]) + 1
        firsts, lasts = ends[filled - 1], ends[filled] - 1
        left, right = firsts[0] // rows, lasts[-1] // rows + 1
        if (firsts // rows == lasts // rows).all():
            top, bottom = (firsts % rows).min(), (lasts % rows).max() + 1
        else:  # a run continues at the top of the next column
            top, bottom = 0, rows
        self.extents[owner] = left, top, right, bottom
        self.areas[owner], self.num_parts[owner] = rle["counts"][1::2].sum(), 1

    def refuse_foreign(self, sizes: NDArray[np.float64]) -> None:
        """Sets the code of RLE whose size, either way round, has nothing to do with the image's.

        Args:
            sizes: float64 [n, 2], H, W of the images, px.
        """
        owners = np.array(list(self.rle_sizes), dtype=np.int64)
        own = np.sort(np.array(list(self.rle_sizes.values())).reshape(-1, 2))
        foreign = (own > _MOST_TIMES_IMAGE * np.sort(sizes[owners])).any(1)
        self.codes[owners[foreign]] = "rle-size-foreign"

    def cut_holes(self, areas: NDArray[np.float64], sizes: NDArray[np.float64]) -> None:
        """Reads polygons inside of others as their holes, where the annotated area says so.

        COCO has no holes: a mask is the union of its polygons. But some exporters list the outlines
        of holes among them, and count their pixels off the area.

        Args:
            areas: float64 [n], 'area' of the annotations, px; -1 where there is none.
            sizes: float64 [n, 2], H, W of the images, px.
        """
        less = (areas > 0) & (areas < (1 - _SMALLEST_HOLE) * self.areas)
        blocks, end = [self.segmentations.buffer], len(self.segmentations.buffer)
        for k in np.flatnonzero(less & (self.num_parts > 1) & (self.codes == "")).tolist():
            polygons, size = self.segmentations[k], tuple(sizes[k].astype(int).tolist())
            union, crop = count_pixels(polygons, size), _draw_even_odd(polygons, size)
            area = int(crop.mask.sum())
            is_nearer = 4 * abs(areas[k] - area) < abs(areas[k] - union)
            if is_nearer and 0 < area < (1 - _SMALLEST_HOLE) * union:
                blocks.append(_pack_rle(uncompressed_rle(crop, size)))
                self.segmentations.starts[k], end = end, end + len(blocks[-1])
                self.areas[k], self.has_holes[k] = area, True
        if len(blocks) > 1:  # else no copy of a buffer that may be large
            self.segmentations = Segmentations(np.concatenate(blocks), self.segmentations.starts)

    def find_empty(self, sizes: NDArray[np.float64]) -> None:
        """Sets the code of masks that have no pixel in their images, and small areas exactly.

        Args:
            sizes: float64 [n, 2], H, W of the images, px.
        """
        # A polygon inside of the image that is thicker than a few pixels covers some: no need to
        # draw it. Nosarzewska's bound asks for half the perimeter.
        corner = sizes[:, ::-1]
        low, high = self.extents[:, :2], self.extents[:, 2:]
        inside = (low >= 0).all(1) & (high <= corner).all(1)
        outside = np.asarray(((high <= 0) | (low >= corner)).any(1))
        usable = np.asarray(self.codes == "", dtype=bool)
        has_pixels = inside & (self.areas > 2 * self.perimeters)
        for k in np.flatnonzero(usable & ~has_pixels).tolist():
            self.areas[k] = 0
            if not outside[k]:
                size = tuple(sizes[k].astype(int).tolist())
                self.areas[k] = count_pixels(self.segmentations[k], size)
            if self.areas[k] == 0:
                self.codes[k] = "mask-outside" if outside[k] else "mask-without-pixels"


def judge_polygons(lengths: NDArray[np.int64], numbers: NDArray[np.float64]) -> NDArray[np.int8]:
    """Decides which polygons cannot be used.

    Args:
        lengths: int64 [P], how many numbers each has; -1 for one that is no list of numbers.
        numbers: float64, the coordinates of all polygons, one after the other.

    Returns:
        int8 [P], indices into `_POLYGON_CODES`; 0: usable.
    """
    verdicts = np.select([lengths < 0, lengths < 6, lengths % 2 == 1], [1, 2, 3], 0)
    magnitude = np.abs(numbers)
    if not (magnitude <= _MAX_COORDINATE).all():  # false for nan as well
        some = np.flatnonzero(lengths > 0)
        starts = _starts(np.maximum(lengths, 0))[some]
        # A maximum is nan where any number is.
        largest = np.zeros(len(lengths))
        largest[some] = np.maximum.reduceat(magnitude, starts)
        finite = np.isfinite(largest)
        verdicts = np.where((verdicts == 0) & ~finite, 4, verdicts)
        verdicts = np.where((verdicts == 0) & (largest > _MAX_COORDINATE), 5, verdicts)
    return verdicts.astype(np.int8)


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


def _pack_polygons(
    num_parts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    owners: NDArray[np.int64],
    numbers: NDArray[np.float64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    # Usable polygons as they stand in `Segmentations.buffer`; starts are -1 for objects without.
    sizes = np.bincount(owners, weights=lengths, minlength=len(num_parts)).astype(np.int64)
    sizes += np.where(num_parts > 0, num_parts + 1, 0)
    starts = _starts(sizes)
    buffer = np.empty(sizes.sum(), dtype=np.int64)
    buffer[starts[num_parts > 0]] = num_parts[num_parts > 0]
    rank = np.arange(len(owners)) - _starts(num_parts)[owners]  # of a part within its object
    buffer[starts[owners] + 1 + rank] = lengths
    is_number = np.ones(len(buffer), dtype=bool)
    is_number[starts[num_parts > 0]] = False
    is_number[starts[owners] + 1 + rank] = False
    buffer.view(np.float64)[is_number] = numbers
    return buffer, np.where(num_parts > 0, starts, -1)


def _pack_rle(rle: dict[str, Any]) -> NDArray[np.int64]:
    # A checked RLE as it stands in `Segmentations.buffer`.
    text = mask_utils.frPyObjects(rle, *rle["size"])["counts"]
    padded = text + bytes(-len(text) % 8)
    return np.concatenate(
        [np.array([_RLE, *rle["size"], len(text)]), np.frombuffer(padded, dtype=np.int64)]
    )


def _starts(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
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


def _draw_even_odd(polygons: Sequence[Any], size: tuple[int, int]) -> CroppedMask:
    # The pixels inside of an odd number of polygons: holes are empty, islands in them are not.
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
