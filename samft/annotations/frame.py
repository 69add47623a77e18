"""Decides in which frame the outlines of a COCO file are drawn, from all that it and its files say.

Outlines belong on the pixels as they are stored. In some files they are drawn on the view that EXIF
gives, or on images that were resized afterwards; in others the run lengths of RLE are written
another way. Each of these is a hypothesis. The plain one is kept wherever it explains the objects,
so a right file is never changed; another one is taken only if it explains clearly more of them.
Imports no torch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from samft.annotations.boxes import (
    SAME_SHARE,
    Evidence,
    Numbers,
    box_forms,
    boxes_agree,
    have_y_first,
    leaves_image,
    scale_corners,
    share_units,
    sizes_differ,
    spread,
    tell_of_masks,
    to_corners,
    ways_to_fit,
)
from samft.annotations.image_entries import Images
from samft.annotations.json_reader import UNSET, ObjectEntry, Raw, read_entries
from samft.annotations.mask_checks import RawMasks
from samft.annotations.problems import Problems
from samft.annotations.segmentation import (
    LAYOUTS,
    PLAIN,
    CroppedMask,
    decode_cropped,
    relayout,
    resample,
)
from samft.images.decoder import open_image
from samft.images.files import ImageError
from samft.images.folder import ImageFolder
from samft.images.orientation import (
    EDGE_SIDE,
    UPRIGHT,
    find_placement,
    points_along_mask,
    points_along_polygon,
    turn_back_points,
    turned_size,
)

_UNSCALED = np.array([1.0, 1, 0, 0])  # a row of `OutlineFrame.scales`
ReadObjects = TypeVar("ReadObjects")

_FEW = 0.1  # share of the objects that no hypothesis has to explain
_MANY = 0.2  # share of outlines outside of their images from which on a file is refused
_MOST = 0.75  # share of boxes unlike their masks from which on a file is refused
_FEWEST = 3  # objects that a refusal takes
_FEWEST_RLE, _MOST_RLE = 2, 200  # RLE objects with boxes from which their layout is told
_MOST_PICTURES, _MOST_EDGES = 16, 48  # images and objects in which edges are looked for


@dataclass(frozen=True)
class OutlineFrame:
    """How the outlines of a file become outlines on its pixels.

    Attributes:
        turned: Whether they are drawn on the view that EXIF gives: those images are turned.
        scales: float64 [N, 4], by image: factors for x and y, and px then added; None: no scaling.
        scaled_boxes: Whether the boxes are in the frame of the outlines, and scaled with them.
        unit: What a side of an image is in the numbers of outlines that are shares; 0: they are px.
        layout: How run lengths are written, a key of `LAYOUTS`.
        reasons: By code of `problems.KINDS`, how much a hypothesis explains, as a phrase.
    """

    turned: bool = False
    scales: NDArray[np.float64] | None = None
    scaled_boxes: bool = True
    unit: int = 0
    layout: str = PLAIN
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """Whether outlines are taken as they are."""
        return not self.turned and self.scales is None and self.layout == PLAIN

    def turn_images(self, images: Images) -> None:
        """Sets the orientations and the sizes of the images, which are those of the files."""
        if self.turned:
            images.sizes = images.view_sizes(turned=True)
            images.orientations = images.exif.copy()

    def move_outlines(
        self,
        masks: RawMasks,
        boxes_xywh: NDArray[np.float64],
        *,
        rows: NDArray[np.int64],
        sizes: NDArray[np.int32],
    ) -> None:
        """Moves outlines and boxes onto the pixels, in place.

        Args:
            masks: Of n objects.
            boxes_xywh: float64 [n, 4], x y width height.
            rows: int64 [n], rows of their images.
            sizes: int32 [N, 2], H, W of all images, px, turned.
        """
        if self.layout != PLAIN:
            for owner, rle in masks.rles.items():
                masks.rles[owner] = relayout(rle, self.layout)
        if self.scales is not None:
            factors = self.scales[rows]
            _scale_polygons(masks, factors)
            for owner, rle in masks.rles.items():
                size = tuple(sizes[rows[owner]].tolist())
                if _moves(factors[owner]) and tuple(rle["size"]) != size:
                    masks.rles[owner] = resample(rle, size, factors[owner])
            if self.scaled_boxes:
                boxes_xywh *= np.tile(factors[:, :2], 2)
                boxes_xywh[:, :2] += factors[:, 2:]

    def box_scales(self, num_images: int) -> NDArray[np.float64]:
        """As `scales`, for the file's boxes, float64 [N, 4]."""
        if self.scales is None or not self.scaled_boxes:
            return np.tile(_UNSCALED, (num_images, 1))
        return self.scales

    def to_json(self) -> dict[str, Any]:
        """Plain values for reports; empty for a plain frame."""
        if self.is_plain:
            return {}
        fields: dict[str, Any] = {"turned_by_exif": self.turned, "rle": self.layout}
        if self.scales is not None:
            low, high = self.scales.min(axis=0).tolist(), self.scales.max(axis=0).tolist()
            fields |= {"scale_x_y": [low[:2], high[:2]], "shift_x_y": [low[2:], high[2:]]}
        return {**fields, "reasons": list(self.reasons.values())}


def _scale_polygons(masks: RawMasks, factors: NDArray[np.float64]) -> None:
    lengths = np.maximum(np.array(masks.lengths, dtype=np.int64), 0)
    numbers = np.frombuffer(masks.numbers) if masks.numbers else np.zeros(0)
    place = np.arange(len(numbers)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    owners = np.repeat(np.array(masks.owners, dtype=np.int64), lengths)
    numbers *= factors[owners, place % 2]
    numbers += factors[owners, 2 + place % 2]


def _moves(factors: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.asarray((factors != _UNSCALED).any(-1))


def read_in_frame(
    read: Callable[..., ReadObjects],
    images: Images,
    *,
    entries: list[Raw],
    folder: ImageFolder,
    problems: Problems,
) -> tuple[ReadObjects, OutlineFrame]:
    """Reads the objects of a file in the frame that explains them.

    Args:
        read: Reads the objects, given `problems`, `frame` and `evidence`.
        images: Of the file; they are turned where the outlines are.
        entries: The list 'annotations', of which samples are read.
        folder: The images, of which samples are decoded where numbers cannot tell.
        problems: Problems are added to it, also what no frame explains.

    Returns:
        What `read` returned, and the frame.
    """
    frame: OutlineFrame | None = OutlineFrame()
    while frame is not None:
        noted, evidence, chosen = Problems(), Evidence(), frame
        chosen.turn_images(images)
        objects = read(problems=noted, frame=chosen, evidence=evidence)
        numbers = evidence.numbers()
        frame = _improve_frame(chosen, numbers, images, entries, folder)
    problems.merge(noted)
    _judge_frame(chosen, numbers, images, problems=problems)
    return objects, chosen


def _improve_frame(
    frame: OutlineFrame, numbers: Numbers, images: Images, entries: list[Raw], folder: ImageFolder
) -> OutlineFrame | None:
    # One that explains the objects of a file better than the frame that it was read in.
    if frame.turned or frame.scales is not None:
        return None
    layout = None if frame.layout != PLAIN else _find_layout(frame, numbers, images, entries)
    return layout or _find_place(frame, numbers, images, entries, folder)


def _find_layout(
    frame: OutlineFrame, numbers: Numbers, images: Images, entries: list[Raw]
) -> OutlineFrame | None:
    # Another layout of RLE that explains the masks where the plain one does not.
    clear = numbers.is_rle & tell_of_masks(numbers, images.sizes)
    if clear.sum() < _FEWEST_RLE:
        return _find_layout_without_boxes(frame, numbers, images, entries)
    some = numbers.take(spread(np.flatnonzero(clear), _MOST_RLE))
    forms = box_forms(some, images.sizes)

    def share(extents: NDArray[np.float64]) -> float:
        return max(float(boxes_agree(extents, form).mean()) for form in forms)

    if share(some.extents) >= 1 - _MANY:
        return None
    rles = _read_segmentations(some, entries).rles
    shares = {
        layout: share(
            np.array([_decode_in(layout, rle).extent for rle in rles.values()], dtype=float)
        )
        for layout in LAYOUTS
    }
    best = max(shares, key=lambda layout: shares[layout])
    plain, explained = (round(shares[layout] * len(rles)) for layout in (PLAIN, best))
    if shares[best] < 1 - 2.5 * _FEW or explained - plain < max(2, 0.2 * len(rles)):
        return None
    reason = f"explains {explained} of {len(rles)} masks and boxes, plain {plain}"
    return _with_layout(frame, best, reason)


def _with_layout(frame: OutlineFrame, layout: str, reason: str) -> OutlineFrame:
    code = {"size-swapped": "rle-size-swapped"}.get(layout, "rle-by-rows")
    return replace(frame, layout=layout, reasons={**frame.reasons, code: reason})


def _find_layout_without_boxes(
    frame: OutlineFrame, numbers: Numbers, images: Images, entries: list[Raw]
) -> OutlineFrame | None:
    # With a wrong number of rows, a mask falls apart into stripes over all of the image.
    oblong = numbers.is_rle & (numbers.rle_sizes[:, 0] != numbers.rle_sizes[:, 1])
    if oblong.sum() < _FEWEST:
        return None
    some = numbers.take(spread(np.flatnonzero(oblong), _MOST_EDGES))
    rles = list(_read_segmentations(some, entries).rles.values())
    plain, other = (
        np.array([np.append(_decode_in(layout, rle).mask, False).mean() for rle in rles])
        for layout in (PLAIN, "size-swapped")
    )
    better = int((other > 1.5 * plain).sum())
    if better < (1 - _MANY) * len(rles):
        return None
    is_size_right = (some.rle_sizes == images.sizes[some.rows]).all(1).mean() > 0.5
    reason = f"as COCO writes it, {better} of {len(rles)} masks are stripes"
    return _with_layout(frame, "by-rows" if is_size_right else "size-swapped", reason)


def _decode_in(layout: str, rle: dict[str, Any]) -> CroppedMask:
    read = relayout(rle, layout)
    return decode_cropped(read, read["size"])


def _read_segmentations(numbers: Numbers, entries: list[Raw]) -> RawMasks:
    masks = RawMasks()
    chosen = [entries[position] for position in numbers.positions.tolist()]
    for entry in read_entries(chosen, ObjectEntry):
        raw = UNSET if entry is None else entry.segmentation
        masks.add(None if raw is UNSET else raw)
    return masks


@dataclass(frozen=True)
class _Proposal:
    # A hypothesis about all images, and which objects speak against it.
    frame: OutlineFrame
    sizes: NDArray[np.int32]  # [N, 2], H, W
    factors: NDArray[np.float64]  # [N, 4], as `OutlineFrame.scales`
    against: NDArray[np.bool_]  # [K]


def _find_place(
    frame: OutlineFrame,
    numbers: Numbers,
    images: Images,
    entries: list[Raw],
    folder: ImageFolder,
) -> OutlineFrame | None:
    # Another place of the outlines on the images that explains them better.
    candidates = list(_list_candidates(frame, numbers, images))
    moved = np.zeros(len(numbers.rows), dtype=bool)
    for one in candidates:
        turned = one.frame.turned & (images.exif > UPRIGHT)
        moved |= (turned | _moves(one.factors))[numbers.rows]
    n = int(moved.sum())
    if n == 0:
        return None
    against = [int(one.against[moved].sum()) for one in candidates]
    margin = max(3, int(np.ceil(0.05 * n))) if n >= 5 else 2
    viable = [k for k, number in enumerate(against) if number < min(against) + margin]
    if viable == [0]:
        return None
    chosen, why = min(viable, key=lambda k: against[k]), ""
    if len(viable) > 1:
        some = [candidates[k] for k in viable]
        by_pixels = _compare_on_pixels(some, numbers.take(moved), images, entries, folder)
        if by_pixels is not None:
            chosen, why = viable[by_pixels], ", and the edges of the pictures follow the outlines"
        else:
            by_sizes = _choose_by_sizes(some, numbers.take(moved), images)
            chosen = 0 if 0 in viable else chosen
            if by_sizes is not None:
                chosen, why = viable[by_sizes], ", and the sizes say so"
    if chosen == 0 or against[chosen] > 2.5 * _FEW * n:
        return None
    phrase = f"explains {n - against[chosen]} of {n} objects, plain {n - against[0]}{why}"
    return _with_reasons(candidates[chosen], phrase, images)


def _with_reasons(hypothesis: _Proposal, phrase: str, images: Images) -> OutlineFrame:
    reasons = dict(hypothesis.frame.reasons)
    if hypothesis.frame.turned:
        reasons["frame-exif-turned"] = f"{int((images.exif > UPRIGHT).sum())} images; {phrase}"
    if hypothesis.frame.scales is not None:
        used = hypothesis.factors[_moves(hypothesis.factors), :2]
        low, high = used.min(axis=0), used.max(axis=0)
        texts = [
            f"{a:.4g}" if np.isclose(a, b, rtol=SAME_SHARE) else f"{a:.4g} to {b:.4g}"
            for a, b in zip(low, high, strict=True)
        ]
        factor = texts[0] if texts[0] == texts[1] else f"{texts[0]} (x) and {texts[1]} (y)"
        border = " and into a border" if hypothesis.factors[:, 2:].any() else ""
        code = "frame-shares" if hypothesis.frame.unit else "frame-scaled"
        reasons[code] = f"by {factor}{border}; {phrase}"
    return replace(hypothesis.frame, reasons=reasons)


def _list_candidates(frame: OutlineFrame, numbers: Numbers, images: Images) -> Iterator[_Proposal]:
    used = np.unique(numbers.rows)
    for turned in (False, True) if (images.exif[used] > UPRIGHT).any() else (False,):
        sizes = images.view_sizes(turned=turned)
        same = replace(frame, turned=turned)
        yield _weigh(same, numbers, sizes, np.tile(_UNSCALED, (len(sizes), 1)))
        stretched = _factors_of_sizes(numbers, images, sizes)
        ways = [(0, each) for each in ways_to_fit(stretched, sizes)]
        ways = ways if _moves(stretched[used]).any() else []
        for unit in share_units(numbers, sizes):
            ways.append((unit, np.pad(sizes[:, ::-1] / unit, ((0, 0), (0, 2)))))
        for unit, factors in ways:
            scaled = replace(same, scales=factors, unit=unit)
            both = [
                _weigh(replace(scaled, scaled_boxes=with_boxes), numbers, sizes, factors)
                for with_boxes in (True, False)
            ]
            yield min(both, key=lambda one: int(one.against.sum()))


def _weigh(
    frame: OutlineFrame,
    numbers: Numbers,
    sizes: NDArray[np.int32],
    factors: NDArray[np.float64],
) -> _Proposal:
    mine = factors[numbers.rows]
    extents, boxes = scale_corners(numbers.extents, mine), numbers.boxes
    if frame.scaled_boxes:
        boxes = boxes * np.tile(mine[:, :2], 2) + np.pad(mine[:, 2:], ((0, 0), (0, 2)))
    placed = replace(numbers, extents=extents, boxes=boxes)
    clear = tell_of_masks(placed, sizes)
    agree = [boxes_agree(extents, form) for form in box_forms(placed, sizes)]
    agrees = max(agree, key=lambda one: int(one[clear].sum()))
    against = leaves_image(extents, sizes[numbers.rows]) | (clear & ~agrees)
    return _Proposal(frame, sizes, factors, against)


def _factors_of_sizes(
    numbers: Numbers, images: Images, sizes: NDArray[np.int32]
) -> NDArray[np.float64]:
    # As `OutlineFrame.scales`, from sizes that the JSON, or else RLE, says to those of the files.
    stated = images.sizes_json.astype(np.int64).copy()
    says_more = sizes_differ(numbers.rle_sizes, sizes[numbers.rows]) & numbers.is_rle
    says_more &= ~sizes_differ(stated, sizes)[numbers.rows] | (stated[numbers.rows] == 0).any(1)
    stated[numbers.rows[says_more]] = numbers.rle_sizes[says_more]
    known = (stated > 0).all(1) & ~np.array([code != "" for code in images.codes], dtype=bool)
    # Swapped sizes are an exporter's mistake, and harmless.
    moved = known & sizes_differ(stated, sizes) & sizes_differ(stated, sizes[:, ::-1])
    factors = np.tile(_UNSCALED, (len(stated), 1))
    factors[moved, :2] = (sizes[moved] / stated[moved])[:, ::-1]
    if moved.any() and np.ptp(factors[known], axis=0).max() < SAME_SHARE:
        factors[~known] = np.median(factors[known], axis=0)
    return factors


def _choose_by_sizes(candidates: list[_Proposal], numbers: Numbers, images: Images) -> int | None:
    # The position of a hypothesis that the sizes in the JSON speak for, all else being equal.
    rows = np.unique(numbers.rows)
    oblong = rows[images.sizes[rows, 0] != images.sizes[rows, 1]]
    for k, one in enumerate(candidates):
        if one.frame.unit > 1:  # what lies in the corner of all images may belong there
            continue
        if one.frame.scales is not None:
            # All outlines lie in the corner of the image that they would fill if it was enlarged:
            # a chance of 1 : 20 at most.
            if np.log(one.factors[numbers.rows, :2]).sum() > 3:
                return k
        elif one.frame.turned and (images.exif[oblong] > 4).any():
            if (images.sizes_json[oblong] == one.sizes[oblong]).all():
                return k
    return None


def _compare_on_pixels(
    candidates: list[_Proposal],
    numbers: Numbers,
    images: Images,
    entries: list[Raw],
    folder: ImageFolder,
) -> int | None:
    # The position of the hypothesis whose outlines the edges of the pictures follow, if one does.
    some = numbers.take(numbers.has_mask)
    rows = spread(np.unique(some.rows), _MOST_PICTURES)
    some = some.take(spread(np.flatnonzero(np.isin(some.rows, rows)), _MOST_EDGES))
    outlines = _read_outlines(some, candidates[0].frame.layout, entries)

    def pictures() -> Iterator[tuple[NDArray[np.uint8], list[list[NDArray[np.float64]]]]]:
        for row in rows.tolist():
            mine = np.flatnonzero(some.rows == row).tolist()
            try:
                image = open_image(folder.folder / images.names[row])
                yield (
                    image.decode(at_least=(EDGE_SIDE, EDGE_SIDE)),
                    [[_in_file(outlines[k], one, row, images) for one in candidates] for k in mine],
                )
            except ImageError:
                continue

    return find_placement(pictures())


def _in_file(
    points: NDArray[np.float64], candidate: _Proposal, row: int, images: Images
) -> NDArray[np.float64]:
    # Points of an outline as shares of the stored image's width and height.
    orientation = int(images.exif[row]) if candidate.frame.turned else UPRIGHT
    size = tuple(candidate.sizes[row].tolist())
    placed = points * candidate.factors[row, :2] + candidate.factors[row, 2:]
    stored = turn_back_points(placed, orientation, size=size)
    return stored / turned_size(size, orientation)[::-1]


def _read_outlines(numbers: Numbers, layout: str, entries: list[Raw]) -> list[NDArray[np.float64]]:
    # Points along the outlines of each object, [n, 2], x y, in the numbers of the file.
    masks = _read_segmentations(numbers, entries)
    masks.rles = {owner: relayout(rle, layout) for owner, rle in masks.rles.items()}
    checked = masks.check()
    return [
        _points_along(checked.segmentations[k]) if code == "" else np.zeros((0, 2))
        for k, code in enumerate(checked.codes)
    ]


def _points_along(segmentation: Any) -> NDArray[np.float64]:
    if isinstance(segmentation, dict):
        crop = decode_cropped(segmentation, segmentation["size"])
        return points_along_mask(crop.mask) + [crop.left, crop.top]
    return np.concatenate([points_along_polygon(part.reshape(-1, 2)) for part in segmentation])


def _judge_frame(
    frame: OutlineFrame, numbers: Numbers, images: Images, *, problems: Problems
) -> None:
    # Says in which frame the outlines are, and refuses what the frame does not explain.
    images.report_sizes(problems, explained=frame.turned or frame.scales is not None)
    for code, reason in frame.reasons.items():
        problems.add(code, reason)
    numbers = numbers.take(numbers.has_mask)
    sizes, n = images.sizes[numbers.rows], len(numbers.rows)
    if not numbers.is_rle.any() and have_y_first(numbers.extents, sizes):
        problems.add("frame-y-first", f"{n:,} objects")
    centres = numbers.extents.reshape(-1, 2, 2).mean(axis=1)
    beyond = int((centres > sizes[:, ::-1]).any(1).sum())
    # Outlines that were not cut when an image was cut into tiles leave it on all sides.
    before = int((centres < 0).any(1).sum())
    if beyond >= max(_FEWEST, _MANY * n) and 4 * before < beyond:
        problems.add("frame-unknown", f"{beyond:,} of {n:,} objects")
        return
    some = numbers.take(tell_of_masks(numbers, images.sizes))
    groups = {"objects": some, "RLE": some.take(some.is_rle), "polygons": some.take(~some.is_rle)}
    for noun, group in groups.items():
        unlike = _count_unlike(group, images)
        if unlike >= max(_FEWEST, _MOST * len(group.rows)):
            problems.add("boxes-unlike-masks", f"{unlike:,} of {len(group.rows):,} {noun}")
            return


def _count_unlike(numbers: Numbers, images: Images) -> int:
    # How many boxes are not where their masks are, in the form that explains most of them.
    forms = box_forms(numbers, images.sizes)
    factors = _factors_of_sizes(numbers, images, images.sizes)[numbers.rows]
    forms += [scale_corners(to_corners(numbers.boxes), factors)]
    return min(int((~boxes_agree(numbers.extents, form)).sum()) for form in forms)
