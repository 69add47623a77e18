"""Raw COCO segmentations, checked many at a time before anything draws them. Imports no torch."""

from array import array
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samft.coco.masks import MaskError, Segmentations, check_rle, decode_cropped, rle_words

_MAX_COORDINATE = 1e5  # px; far outside of any image, far inside what pycocotools survives
_MAX_PERIMETER = 4e6  # px; pycocotools allocates five points a pixel of perimeter


class RawMasks:
    """Raw segmentations of many objects, gathered flat, so that all are checked at once."""

    def __init__(self) -> None:
        """Begins with none."""
        self.count = 0
        self.numbers = array("d")
        self.lengths: list[int] = []  # of the polygons
        self.owners: list[int] = []  # the object of each polygon
        self.rles: dict[int, dict[str, Any]] = {}
        self.refused: dict[int, str] = {}
        self.flat: list[int] = []  # objects whose polygon came without the outer list

    def add(self, raw: Any) -> None:
        """Takes the segmentation of the next object, whatever it is.

        Args:
            raw: Polygons (a list of lists, or one flat list), or an RLE dict whose counts are a
                list or a compressed string, or anything else, which will be refused.
        """
        owner = self.count
        self.count += 1
        if isinstance(raw, dict):
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
        """Checks all that were added."""
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
    """What was found of many segmentations, for n objects.

    Attributes:
        codes: [n] why an object cannot be used, a key of `problems.KINDS`, or ''.
        extents: float64 [n, 4], x0 y0 x1 y1 around the mask, px, original frame.
        areas: float64 [n], px; of several polygons the sum.
        perimeters: float64 [n], px, longer side of each edge; 0 for RLE.
        num_parts: int64 [n] usable polygons; 1 for RLE.
        part_left_out: [n] whether some polygon, but not all, was unusable.
        rle_sizes: H, W of the objects that are RLE.
        segmentations: Of all n; those with a code have the start -1.
    """

    def __init__(self, raw: RawMasks) -> None:
        """Checks what was gathered."""
        n = raw.count
        self.codes = np.full(n, "", dtype=object)
        self.extents, self.areas, self.perimeters = np.zeros((n, 4)), np.zeros(n), np.zeros(n)
        self.num_parts = np.zeros(n, dtype=np.int64)
        self.part_left_out = np.zeros(n, dtype=bool)
        self.rle_sizes = {owner: tuple(rle["size"]) for owner, rle in raw.rles.items()}
        for owner, code in raw.refused.items():
            self.codes[owner] = code
        words, starts = self._check_polygons(raw)
        blobs = [words]
        end = len(words)
        for owner, rle in raw.rles.items():
            self._measure_rle(owner, rle)
            blobs.append(rle_words(rle))
            starts[owner], end = end, end + len(blobs[-1])
        starts = np.where(np.asarray(self.codes == "", dtype=bool), starts, -1)
        self.segmentations = Segmentations(np.concatenate(blobs), starts)

    def _check_polygons(self, raw: RawMasks) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        lengths = np.asarray(raw.lengths, dtype=np.int64)
        owners = np.asarray(raw.owners, dtype=np.int64)
        numbers = np.frombuffer(raw.numbers, dtype=np.float64) if raw.numbers else np.zeros(0)
        verdicts = judge_polygons(lengths, numbers)
        good = verdicts == 0
        unusable = np.bincount(owners[~good], minlength=raw.count) > 0
        self.num_parts = np.bincount(owners[good], minlength=raw.count)
        self.part_left_out = unusable & (self.num_parts > 0)
        for part in np.flatnonzero(~good)[::-1]:  # the first one of an object gives the reason
            if self.num_parts[owners[part]] == 0:
                self.codes[owners[part]] = _POLYGON_CODES[verdicts[part]]
        lengths = np.maximum(lengths, 0)
        if not good.all():
            numbers = numbers[np.repeat(good, lengths)]
            lengths, owners = lengths[good], owners[good]
        if len(lengths):
            self._measure_polygons(lengths, owners, numbers)
        self.codes[self.perimeters > _MAX_PERIMETER] = "polygon-too-long"
        return _polygon_words(self.num_parts, lengths, owners, numbers)

    def _measure_polygons(
        self, lengths: NDArray[np.int64], owners: NDArray[np.int64], numbers: NDArray[np.float64]
    ) -> None:
        points = numbers.reshape(-1, 2)
        starts = _starts(lengths) // 2
        following = np.arange(1, len(points) + 1)
        following[starts + lengths // 2 - 1] = starts
        (x, y), (next_x, next_y) = points.T, points[following].T
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
        top, left, crop = decode_cropped(rle, *rle["size"])
        self.extents[owner] = left, top, left + crop.shape[1], top + crop.shape[0]
        self.areas[owner], self.num_parts[owner] = rle["counts"][1::2].sum(), 1


def judge_polygons(lengths: NDArray[np.int64], numbers: NDArray[np.float64]) -> NDArray[np.int8]:
    """Which polygons cannot be used, and why.

    Args:
        lengths: int64 [P], numbers of each; -1 for one that is no list of numbers.
        numbers: Of all polygons, one after the other.

    Returns:
        [P] places in `_POLYGON_CODES`; 0 is good.
    """
    verdicts = np.select([lengths < 0, lengths < 6, lengths % 2 == 1], [1, 2, 3], 0)
    magnitude = np.abs(numbers)
    if not (magnitude <= _MAX_COORDINATE).all():  # nan is not, either
        some = np.flatnonzero(lengths > 0)
        starts = _starts(np.maximum(lengths, 0))[some]
        # A maximum hands nan on.
        largest = np.zeros(len(lengths))
        largest[some] = np.maximum.reduceat(magnitude, starts)
        finite = np.isfinite(largest)
        verdicts = np.where((verdicts == 0) & ~finite, 4, verdicts)
        verdicts = np.where((verdicts == 0) & (largest > _MAX_COORDINATE), 5, verdicts)
    return verdicts.astype(np.int8)


def _starts(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.cumsum(lengths) - lengths


def _polygon_words(
    num_parts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    owners: NDArray[np.int64],
    numbers: NDArray[np.float64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    # See `Segmentations`; starts are -1 for objects without polygons.
    sizes = np.bincount(owners, weights=lengths, minlength=len(num_parts)).astype(np.int64)
    sizes += np.where(num_parts > 0, num_parts + 1, 0)
    starts = _starts(sizes)
    words = np.empty(sizes.sum(), dtype=np.int64)
    words[starts[num_parts > 0]] = num_parts[num_parts > 0]
    rank = np.arange(len(owners)) - _starts(num_parts)[owners]  # of a part within its object
    words[starts[owners] + 1 + rank] = lengths
    is_number = np.ones(len(words), dtype=bool)
    is_number[starts[num_parts > 0]] = False
    is_number[starts[owners] + 1 + rank] = False
    words.view(np.float64)[is_number] = numbers
    return words, np.where(num_parts > 0, starts, -1)


def check_segmentation(raw: Any) -> Any:
    """Checks one raw COCO segmentation so that nothing in it can hurt.

    Args:
        raw: See `RawMasks.add`.

    Returns:
        A list of polygon arrays, or an RLE dict with `size` [H, W] and an int64 array `counts`.

    Raises:
        MaskError: It is empty or malformed.
    """
    masks = RawMasks()
    masks.add(raw)
    checked = masks.check()
    if checked.codes[0]:
        raise MaskError(checked.codes[0])
    return checked.segmentations[0]


def decode_segmentation(raw: Any, height: int, width: int) -> NDArray[np.uint8]:
    """Checks and draws a raw segmentation: uint8 [height, width] of 0 and 1.

    Raises:
        MaskError: If the segmentation is empty or malformed.
    """
    top, left, crop = decode_cropped(check_segmentation(raw), height, width)
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[top : top + crop.shape[0], left : left + crop.shape[1]] = crop
    return mask
