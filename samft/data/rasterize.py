"""Rasterises polygons and masks: the exact share of each cell of a grid that they cover.

The method for polygons is that of font rasterisers. An outline is split where it crosses cell
borders. Each piece deposits in its cell the signed area to its right, and in the next cell what is
missing to its signed height; so the running sum of the deposits along a row is the covered area of
each cell. All objects of an image are drawn in one pass, each part in a box of its own: the cost is
proportional to the lengths of the outlines in cells. Imports no torch.

Source: signed-area accumulation as in FreeType's `ftgrays.c` and Raph Levien's font-rs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samft.annotations.segmentation import draw_polygons

_CHUNK_CELLS = 2**16  # of the parts that are drawn together: buffers of 512 KiB stay in a cache
_ROUNDING = 1e-9  # cells
# The share of a cell from which on a binary target counts it, less what rounding can lose.
_HALF = 0.5 - 1e-9

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Edges:
    """E directed edges of the outlines of K objects.

    Each object has P or fewer parts, which are drawn on their own and then joined. Edges are sorted
    by part, and parts by object; the edges of a part form closed outlines, of which those along x
    may be left out, as they change no coverage.
    """

    start: Floats  # [E, 2] x, y
    end: Floats  # [E, 2]
    part: Ints  # [E], 0 to P - 1
    owner: Ints  # [P], the object of each part, 0 to K - 1

    @property
    def object(self) -> Ints:
        """The object of each edge, [E]."""
        return self.owner[self.part]

    def take(self, rows: NDArray[np.bool_]) -> "Edges":
        """Some of the edges."""
        return Edges(self.start[rows], self.end[rows], self.part[rows], self.owner)

    def merge(self, other: "Edges") -> "Edges":
        """Both edges, of the same parts."""
        part = np.concatenate([self.part, other.part])
        order = np.argsort(part, kind="stable")
        start = np.concatenate([self.start, other.start])[order]
        end = np.concatenate([self.end, other.end])[order]
        return Edges(start, end, part[order], self.owner)

    def scale_and_shift(self, scale: Floats, shift: Floats) -> "Edges":
        """Every point times the scale [K, 2] of its object, plus its shift [K, 2]."""
        by, to = scale.take(self.object, axis=0), shift.take(self.object, axis=0)
        return Edges(self.start * by + to, self.end * by + to, self.part, self.owner)


@dataclass(frozen=True)
class CoveredBlock:
    """A rectangle of cells around an object, with their coverage; all other cells have none."""

    object: int  # which of the K
    top: int  # cells
    left: int  # cells
    share: Floats  # [h, w], 0 to 1: the share of each cell that is covered


def polygon_edges(objects: Sequence[Sequence[NDArray[np.floating]]]) -> Edges:
    """The outlines of objects.

    Args:
        objects: COCO's lists: for each object its closed parts, each x y x y ..., not empty. Pixel
            edges are at whole numbers: pixel 0 reaches from 0 to 1.
    """
    parts = [part for parts in objects for part in parts]
    points = np.concatenate([*parts, np.zeros(0)]).astype(np.float64).reshape(-1, 2)
    lengths = np.array([len(part) // 2 for part in parts], dtype=np.int64)
    # From each point to the next; from the last of a part to its first.
    ends = np.cumsum(lengths)
    following = np.arange(1, len(points) + 1)
    following[ends - 1] = ends - lengths
    owner = np.repeat(np.arange(len(objects)), [len(parts) for parts in objects])
    return Edges(points, points[following], np.repeat(np.arange(len(parts)), lengths), owner)


def rasterize(edges: Edges, areas: Floats) -> Iterator[CoveredBlock]:
    """Draws objects, each on a grid of cells of its own.

    The inside of a part is given by the even-odd rule, and an object is the union of its parts,
    both as in pycocotools. The shares are exact except in cells where an outline crosses itself or
    where outlines of two parts of an object meet.

    Args:
        edges: Of K objects, in units of cells.
        areas: [K, 4], the drawing area of each object, x0 y0 x1 y1 in cells, 0 or more, not
            necessarily whole numbers; what lies outside is clipped.

    Yields:
        The objects whose outlines reach into their areas, in order.
    """
    edges = _clip_edges(edges, areas)
    drawn, first = np.unique(edges.part, return_index=True)
    if len(drawn) == 0:
        return
    low = np.floor(np.minimum.reduceat(np.minimum(edges.start, edges.end), first)).astype(np.int64)
    high = np.ceil(np.maximum.reduceat(np.maximum(edges.start, edges.end), first)).astype(np.int64)
    # Edges that were moved to the right border lie in no column: give them the last one.
    owner = edges.owner[drawn]
    low = np.clip(low, 0, np.maximum(np.ceil(areas[owner, 2:]).astype(np.int64) - 1, 0))
    high = np.maximum(high, low + 1)
    objects, first_drawn = np.unique(owner, return_index=True)
    corner = np.minimum.reduceat(low, first_drawn)
    shape = np.maximum.reduceat(high, first_drawn) - corner
    shares = _part_coverages(edges, first, low=low, high=high)
    counts = np.diff(np.append(first_drawn, len(drawn)))
    for k, (left, top), (width, height), count in zip(
        objects.tolist(), corner.tolist(), shape.tolist(), counts.tolist(), strict=True
    ):
        if count == 1:
            yield CoveredBlock(k, top, left, next(shares)[1])
            continue
        joined = np.zeros((height, width))
        for _ in range(count):
            part, share = next(shares)
            x, y = (low[part] - (left, top)).tolist()
            joined[y : y + share.shape[0], x : x + share.shape[1]] += share
        yield CoveredBlock(k, top, left, np.minimum(joined, 1, out=joined))


@dataclass(frozen=True)
class MaskRuns:
    """The pixels of K masks as R vertical runs, sorted by mask, column and row."""

    mask: Ints  # [R], 0 to K - 1
    column: Ints  # [R] px, original frame
    top: Ints  # [R] the first pixel
    bottom: Ints  # [R] one past the last pixel

    def take(self, which: NDArray[np.bool_]) -> "MaskRuns":
        """Some of the runs."""
        return MaskRuns(*(values[which] for values in vars(self).values()))


def decode_runs(segmentations: Sequence[Any], size: tuple[int, int]) -> MaskRuns:
    """Draws K segmentations of an image at once; see `segmentation.decode_cropped`."""
    outlined = [item for item in segmentations if isinstance(item, list)]
    drawn = iter(draw_polygons(outlined, size) if outlined else [])
    rles = [next(drawn) if isinstance(item, list) else item for item in segmentations]
    counts = np.concatenate([np.zeros(0, dtype=np.int64), *(rle["counts"] for rle in rles)])
    lengths = np.array([len(rle["counts"]) for rle in rles], dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    mask = np.repeat(np.arange(len(rles)), lengths)
    # Where each run of equal pixels ends. Every second run is of the mask's pixels.
    ends = np.cumsum(counts)
    ends -= np.append(0, ends)[starts][mask]
    filled = ((np.arange(len(counts)) - starts[mask]) % 2 == 1) & (counts > 0)
    mask, ends, counts = mask[filled], ends[filled], counts[filled]
    rows = np.array([rle["size"][0] for rle in rles], dtype=np.int64)[mask]
    # Into runs within a column, and within the image.
    first, last = (ends - counts) // rows, (ends - 1) // rows
    spans = last - first + 1
    run = np.repeat(np.arange(len(mask)), spans)
    column = first[run] + np.arange(len(run)) - (np.cumsum(spans) - spans)[run]
    top = np.maximum((ends - counts)[run] - column * rows[run], 0)
    bottom = np.minimum(ends[run] - column * rows[run], np.minimum(rows[run], size[0]))
    return MaskRuns(mask[run], column, top, bottom).take((column < size[1]) & (top < bottom))


def rasterize_runs(
    runs: MaskRuns,
    owner: Ints,
    *,
    scale: Floats,
    shift: Floats,
    areas: Floats,
    is_binary: bool,
    out: NDArray[np.uint8],
) -> None:
    """Draws masks of whole pixels, each on a grid of cells of its own.

    Args:
        runs: The pixels of P masks.
        owner: [P], the object of each mask, 0 to K - 1, ascending.
        scale: [K, 2], cells per pixel along x and y; below 0 where the image is mirrored.
        shift: [K, 2], x and y of the image's corner in cells.
        areas: As for `rasterize`.
        is_binary: As for `round_shares`.
        out: [K, side, side], zeros; receives the rounded shares, see `round_shares`.
    """
    low, high, drawn = _place_runs(runs, owner, scale, shift, areas)
    if len(drawn) == 0:
        return
    objects, first = np.unique(drawn, return_index=True)
    corner = np.floor(np.minimum.reduceat(low, first, axis=1)).astype(np.int64)
    shape = np.ceil(np.maximum.reduceat(high, first, axis=1)).astype(np.int64) - corner
    sizes = shape[0] * (shape[1] + 1)
    last = np.append(first[1:], len(drawn))
    for boxes in _split_by_cells(sizes):
        chosen = slice(first[boxes[0]], last[boxes[-1]])
        flat = _accumulate_runs(
            low[:, chosen],
            high[:, chosen],
            np.repeat(np.arange(len(boxes)), (last - first)[boxes]),
            corner=corner[:, boxes],
            shape=shape[:, boxes],
        )
        levels = round_shares(flat, is_binary=is_binary)
        ends = np.cumsum(sizes[boxes])
        places = np.stack([objects[boxes], *corner[:, boxes], *shape[:, boxes], ends], axis=1)
        for k, left, top, width, height, end in places.tolist():
            columns = levels[end - width * (height + 1) : end].reshape(width, height + 1)
            out[k, top : top + height, left : left + width] = columns[:, :-1].T


def _place_runs(
    runs: MaskRuns, owner: Ints, scale: Floats, shift: Floats, areas: Floats
) -> tuple[Floats, Floats, Ints]:
    # The rectangles of the runs that lie in their areas, in cells: low and high corners, x and y
    # [2, R], and the object of each.
    drawn = owner.take(runs.mask)
    by, to, limits = (values.T.take(drawn, axis=1) for values in (scale, shift, areas))
    one = np.stack([runs.column, runs.top]) * by + to
    other = np.stack([runs.column + 1, runs.bottom]) * by + to
    low = np.maximum(np.minimum(one, other), limits[:2])
    high = np.minimum(np.maximum(one, other), limits[2:])
    visible = (high - low > _ROUNDING).all(axis=0)
    if visible.all():
        return low, high, drawn
    return low[:, visible], high[:, visible], drawn[visible]


def _accumulate_runs(low: Floats, high: Floats, box: Ints, *, corner: Ints, shape: Ints) -> Floats:
    # Rectangles of R runs in boxes of cells, each box column after column, with a spare cell below
    # each. A rectangle covers some width of each column of cells that it meets; it deposits that
    # width at its upper end and takes it away at its lower end, and the running sum down the column
    # is the covered share.
    first = low[0].astype(np.int64)
    met = np.ceil(high[0]).astype(np.int64) - first
    piece = np.repeat(np.arange(len(box)), met)
    column = np.arange(len(piece)) + (first - np.cumsum(met) + met).take(piece)
    width = np.minimum(high[0].take(piece), column + 1) - np.maximum(low[0].take(piece), column)
    stride = shape[1] + 1
    ends = np.cumsum(shape[0] * stride)
    start = ends - (shape[0] + corner[0]) * stride - corner[1]
    base = column * stride.take(box).take(piece) + start.take(box).take(piece)
    cells, shares = [], []
    for y, sign in ((low[1], 1), (high[1], -1)):
        row = y.astype(np.int64)
        beyond = (sign * (y - row)).take(piece) * width
        at = base + row.take(piece)
        cells += [at, at + 1]
        shares += [sign * width - beyond, beyond]
    # What is deposited past the end has no weight.
    deposits = np.bincount(np.concatenate(cells), np.concatenate(shares), ends[-1])[: ends[-1]]
    return np.cumsum(deposits, dtype=np.float64)


def _split_by_cells(cells: Ints) -> list[Ints]:
    # Numbers of boxes that are drawn together, each group of a bounded number of cells.
    chunk = np.cumsum(cells) // _CHUNK_CELLS
    return np.split(np.arange(len(cells)), np.flatnonzero(np.diff(chunk)) + 1)


def round_shares(share: Floats, *, is_binary: bool) -> NDArray[np.uint8]:
    """Covered shares as whole numbers, 0 to 255; binary: 255 from half of a cell on, else 0."""
    if is_binary:
        return np.where(share >= _HALF, np.uint8(255), np.uint8(0))
    levels = 255 * share
    levels += 0.5
    return levels.astype(np.uint8)


def _clip_edges(edges: Edges, areas: Floats) -> Edges:
    # Edges above and below the area are dropped. Those to the left and right are moved to its
    # border, for they still decide whether the cells to their right are covered.
    limits = areas.take(edges.object, axis=0)
    smallest, largest = np.minimum(edges.start, edges.end), np.maximum(edges.start, edges.end)
    beyond = (smallest < limits[:, :2] - _ROUNDING) | (largest > limits[:, 2:] + _ROUNDING)
    leaves = beyond[:, 0] | beyond[:, 1]
    if leaves.any():
        pieces = _split_at_lines(edges.take(leaves), limits[leaves])
        edges = edges.take(~leaves).merge(pieces)
        limits = areas.take(edges.object, axis=0)
        middle = (edges.start[:, 1] + edges.end[:, 1]) / 2
        inside = (middle > limits[:, 1]) & (middle < limits[:, 3])
        edges, limits = edges.take(inside), limits[inside]
    start = np.clip(edges.start, limits[:, :2], limits[:, 2:])
    end = np.clip(edges.end, limits[:, :2], limits[:, 2:])
    return Edges(start, end, edges.part, edges.owner).take(start[:, 1] != end[:, 1])


def _split_at_lines(edges: Edges, lines: Floats) -> Edges:
    # Each at its lines x0 y0 x1 y1, into five pieces, most of them of length zero.
    delta = edges.end - edges.start
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        at = (lines - np.tile(edges.start, 2)) / np.tile(delta, 2)
    at = np.pad(np.clip(np.nan_to_num(at), 0, 1), ((0, 0), (1, 1)), constant_values=(0, 1))
    at = np.sort(at, axis=1)[..., None]
    points = edges.start[:, None] * (1 - at) + edges.end[:, None] * at
    start, end = points[:, :-1].reshape(-1, 2), points[:, 1:].reshape(-1, 2)
    return Edges(start, end, np.repeat(edges.part, 5), edges.owner)


def _part_coverages(
    edges: Edges, first: Ints, *, low: Ints, high: Ints
) -> Iterator[tuple[int, NDArray[np.float64]]]:
    # For each part, given its first edge and its box in cells: its number, and the shares in the
    # box. Parts are drawn together in chunks of a bounded number of cells.
    width, height = (high - low).T
    stride = width + 1  # with a spare column for what the last column deposits to its right
    sizes = height * stride
    last = np.append(first[1:], len(edges.part))
    for parts in _split_by_cells(sizes):
        chosen = slice(first[parts[0]], last[parts[-1]])
        ends = np.cumsum(sizes[parts])
        box = np.repeat(parts, last[parts] - first[parts])
        flat = _accumulate_coverage(
            edges.start[chosen] - low[box],
            edges.end[chosen] - low[box],
            base=(ends - sizes[parts])[box - parts[0]],
            stride=stride[box],
            length=int(ends[-1]),
        )
        for part, end in zip(parts.tolist(), ends.tolist(), strict=True):
            rows = flat[end - sizes[part] : end].reshape(height[part], stride[part])
            yield part, rows[:, :-1]


def _accumulate_coverage(
    start: Floats, end: Floats, *, base: Ints, stride: Ints, length: int
) -> Floats:
    # Edges [E, 2] are in cells of their box, whose rows lie one after the other in a flat array,
    # from `base` on. Every outline is closed, so the deposits of a row sum to zero, and a single
    # running sum serves for all rows of all boxes.
    edge, at, until = _split_edges_at_cells(start, end)
    delta = end - start
    # `take` is twice as fast as an index here.
    middle = start.take(edge, axis=0) + ((at + until) / 2)[:, None] * delta.take(edge, axis=0)
    column = np.minimum(middle[:, 0].astype(np.int64), stride[edge] - 2)
    cell = base[edge] + middle[:, 1].astype(np.int64) * stride[edge] + column
    rise = (until - at) * delta[edge, 1]
    beyond = rise * (middle[:, 0] - column)
    deposits = np.bincount(
        np.concatenate([cell, cell + 1]), np.concatenate([rise - beyond, beyond]), length
    )
    # The running sum is the winding number, averaged over the cell; fold it by the even-odd rule.
    turns = np.abs(np.cumsum(deposits, dtype=np.float64))
    return turns if turns.max() <= 1 + _ROUNDING else np.abs(turns - 2 * np.rint(turns / 2))


def _split_edges_at_cells(start: Floats, end: Floats) -> tuple[Ints, Floats, Floats]:
    # Pieces that lie in one cell each, in the order of the edges: the edge that each belongs to,
    # and where on it the piece begins and ends, 0 to 1.
    number = np.arange(len(start))
    low, high = np.minimum(start, end), np.maximum(start, end)
    first = np.floor(low) + 1
    counts = np.maximum(np.ceil(high) - first, 0).astype(np.int64)  # [E, 2] lines between the ends
    keys = [number.astype(np.float64)]
    for axis in (0, 1):
        crossed = np.repeat(number, counts[:, axis])
        nth = np.arange(len(crossed)) - np.repeat(
            np.cumsum(counts[:, axis]) - counts[:, axis], counts[:, axis]
        )
        line = first[crossed, axis] + nth
        at = (line - start[crossed, axis]) / (end - start)[crossed, axis]
        keys.append(crossed + at)
    # One sort of edge number + position takes a tenth of the time of a sort by two keys, and loses
    # 1e-11 of an edge's length.
    pieces = counts.sum(axis=1) + 1
    edge = np.repeat(number, pieces)
    at = np.clip(np.sort(np.concatenate(keys)) - edge, 0, 1)
    until = np.append(at[1:], 1.0)
    until[np.cumsum(pieces) - 1] = 1.0
    return edge, at, until
