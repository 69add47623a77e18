"""The segmentations of many objects, checked and measured at once. Imports no torch.

pycocotools crashes the process on huge coordinates and sizes, and decodes an empty RLE as
uninitialised memory. So every number of a file is checked here before it may see any.
"""

from array import array
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samft.annotations.notation import MaskError, check_rle, plain_segmentation
from samft.annotations.segmentation import (
    Segmentations,
    count_pixels,
    draw_even_odd,
    pack_polygons,
    pack_rle,
    starts_of,
    uncompressed_rle,
)

_MAX_COORDINATE = 1e5  # px; far outside of any image, far inside what pycocotools survives
_MAX_PERIMETER = 4e6  # px; pycocotools allocates five points a pixel of perimeter
_MOST_TIMES_IMAGE = 32  # the side of an RLE may have so many times that of its image
_SMALLEST_HOLE = 0.02  # share of a mask


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
            blocks.append(pack_rle(rle))
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
        return pack_polygons(self.num_parts, lengths, owners, numbers)

    def _measure_polygons(
        self, lengths: NDArray[np.int64], owners: NDArray[np.int64], numbers: NDArray[np.float64]
    ) -> None:
        points = numbers.reshape(-1, 2)
        starts = starts_of(lengths) // 2
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
        first_points = starts[starts_of(self.num_parts[has_parts])]
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
            union, crop = count_pixels(polygons, size), draw_even_odd(polygons, size)
            area = int(crop.mask.sum())
            is_nearer = 4 * abs(areas[k] - area) < abs(areas[k] - union)
            if is_nearer and 0 < area < (1 - _SMALLEST_HOLE) * union:
                blocks.append(pack_rle(uncompressed_rle(crop, size)))
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
        starts = starts_of(np.maximum(lengths, 0))[some]
        # A maximum is nan where any number is.
        largest = np.zeros(len(lengths))
        largest[some] = np.maximum.reduceat(magnitude, starts)
        finite = np.isfinite(largest)
        verdicts = np.where((verdicts == 0) & ~finite, 4, verdicts)
        verdicts = np.where((verdicts == 0) & (largest > _MAX_COORDINATE), 5, verdicts)
    return verdicts.astype(np.int8)
