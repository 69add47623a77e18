"""Corrections by clicks, simulated: where the next click goes, and the masks after each of them.

An annotator clicks into the middle of what is most wrong, looks at the new mask, and clicks again.
The model is asked as users of `SamPredictor.predict` ask it: with all clicks so far, the box if
there is one, and its own last logits as `mask_input`. All objects of an image are decoded at once.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from samft.annotations.segmentation import CroppedMask
from samft.data.transfers import send_to
from samft.data.transforms import Frame
from samft.distributed import all_gather
from samft.evaluation.metrics import boundary_width, cropped_iou, mask_boundary
from samft.models.prompted_sam import original_masks
from samft.models.prompts import NOT_THIS, OBJECT, Prompts

_NOTHING = CroppedMask(0, 0, np.zeros((0, 0), dtype=bool))


class Click(NamedTuple):
    """A click on a pixel of the original image; `label` is `OBJECT` or `NOT_THIS`."""

    x: int
    y: int
    label: int


def next_click(
    mask: CroppedMask, truth: CroppedMask, clicked: Iterable[Click] = ()
) -> Click | None:
    """The click that corrects a mask: into the middle of its largest error.

    Of all pixels that the mask misses, and of all that it has wrongly, the one that is farthest
    from the border of its own kind of error; the first of several. Where both are as far, one that
    is wrong. The edge of the image is a border. A pixel is clicked once.

    Args:
        mask: Original frame.
        truth: The same.
        clicked: Earlier clicks on this object.

    Returns:
        None where no pixel is wrong that was not clicked before.

    Source: Sofiiuk et al., Reviving Iterative Training with Mask Guidance for Interactive
    Segmentation, 2021, `isegm/inference/clicker.py`, by which SimpleClick and SAM 2 are evaluated
    as well: the largest error is the one into which the largest circle fits, not the one of the
    largest area.
    """
    window = _union(mask.extent, truth.extent)
    predicted, true = _pixels_within(mask, window), _pixels_within(truth, window)
    missed, wrong = (_squared_distances(error) for error in (true & ~predicted, predicted & ~true))
    left, top = window[:2]
    for click in clicked:
        # One inside of the window: outside of both masks nothing is wrong, now and later.
        if left <= click.x < window[2] and top <= click.y < window[3]:
            missed[click.y - top, click.x - left] = wrong[click.y - top, click.x - left] = 0
    label = OBJECT if missed.max(initial=0) > wrong.max(initial=0) else NOT_THIS
    distances = missed if label == OBJECT else wrong
    if not distances.any():
        return None
    y, x = np.unravel_index(int(np.argmax(distances)), distances.shape)
    return Click(left + int(x), top + int(y), label)


def centre_point(mask: CroppedMask) -> tuple[int, int]:
    """The pixel of a mask that is farthest from its border; the first of several.

    Args:
        mask: Not empty, in the original frame.

    Returns:
        x, y of the pixel, as `SamPredictor` takes them.

    Source: where SAM's paper puts the first point (Kirillov et al., Segment Anything, 2023, D.1).
    """
    click = next_click(_NOTHING, mask)
    assert click is not None  # the mask is not empty
    return click.x, click.y


def _union(
    first: tuple[int, int, int, int], second: tuple[int, int, int, int]
) -> tuple[int, int, int, int]:
    # Around two rectangles x0 y0 x1 y1; one of no pixel does not count.
    boxes = [box for box in (first, second) if box[2] > box[0] and box[3] > box[1]] or [first]
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return min(x0), min(y0), max(x1), max(y1)


def _pixels_within(mask: CroppedMask, window: tuple[int, int, int, int]) -> NDArray[np.bool_]:
    # A mask within a window that holds all of it.
    left, top, right, bottom = window
    pixels = np.zeros((bottom - top, right - left), dtype=bool)
    height, width = mask.mask.shape
    if mask.mask.size:
        y, x = mask.top - top, mask.left - left
        pixels[y : y + height, x : x + width] = mask.mask
    return pixels


def _squared_distances(region: NDArray[np.bool_]) -> NDArray[np.float64]:
    # Of each pixel from the nearest that is not in the region, or is outside of the window. These
    # are whole numbers; OpenCV's roots differ in their last bits by where in memory the mask lies,
    # and which of several pixels is the first would differ with them.
    squares = np.zeros(region.shape)
    rows, columns = (np.flatnonzero(region.any(axis)) for axis in (1, 0))
    if len(rows):
        # Of the rectangle around the region alone: the transform is what takes long.
        part = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        padded = np.pad(region[part].view(np.uint8), 1)
        transformed = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        squares[part] = np.rint(transformed[1:-1, 1:-1].astype(np.float64) ** 2)
    return squares


def points_to_input(points: NDArray[np.integer], frame: Frame) -> NDArray[np.float64]:
    """Maps points [..., 2], x y, of the original frame to the input frame: not flipped or cropped.

    Source: `ResizeLongestSide.apply_coords` of segment_anything.
    """
    shown = np.asarray(points, dtype=np.float64) - frame.origin[::-1]
    return np.asarray(shown * (frame.scale_x, frame.scale_y))


class CorrectedMask(NamedTuple):
    """A mask of one of M objects, and the clicks that led to it.

    Attributes:
        row: Of the object, 0 to M - 1.
        clicks: So far.
        mask: Original frame.
    """

    row: int
    clicks: tuple[Click, ...]
    mask: CroppedMask


@dataclass(frozen=True)
class ClickSession:
    """The objects of one image that are corrected together.

    Attributes:
        decode: Prompts of m objects to their mask logits [m, H/4, W/4], with one mask for each.
        boxes: float [M, 4], input frame, given with all clicks; None: clicks alone.
        truths: M true masks, original frame, as far as a window shows them.
        frame: Of the image.
    """

    decode: Callable[[Prompts], Tensor]
    boxes: Tensor | None
    truths: Sequence[CroppedMask]
    frame: Frame

    def correct(
        self, logits: Tensor, *, clicks: Sequence[Sequence[Click]], most: int
    ) -> Iterator[CorrectedMask]:
        """Clicks again and again, until no pixel is wrong.

        Args:
            logits: float [M, H/4, W/4], of the first masks.
            clicks: Of each object, those that led to its first mask; as many for each.
            most: Clicks on an object, these included.

        Yields:
            The first mask of each object; then the mask after each further click.
        """
        rows, so_far = list(range(len(logits))), [tuple(own) for own in clicks]
        while rows:
            corrected, places = [], []
            masks = original_masks(
                logits,
                input_size=self.frame.input_size,
                original_size=self.frame.original_size,
                origin=self.frame.origin,
            )
            for place, (row, mask) in enumerate(zip(rows, masks, strict=True)):
                yield CorrectedMask(row, so_far[row], mask)
                click = next_click(mask, self.truths[row], so_far[row])
                if click is not None and len(so_far[row]) < most:
                    so_far[row] += (click,)
                    corrected.append(row)
                    places.append(place)
            if corrected:
                device = logits.device
                prompts = click_prompts([so_far[row] for row in corrected], self.frame, device)
                previous = logits[send_to(device, torch.tensor(places))]
                boxes = self.boxes
                if boxes is not None:
                    boxes = boxes[send_to(device, torch.tensor(corrected))]
                logits = self.decode(replace(prompts, boxes=boxes, masks=previous))
            rows = corrected


def click_prompts(clicks: Sequence[Sequence[Click]], frame: Frame, device: torch.device) -> Prompts:
    """The prompts of M objects with P clicks each, in the input frame, on a device."""
    numbers = np.array(clicks)  # [M, P, 3]
    points = torch.from_numpy(points_to_input(numbers[..., :2], frame)).float()
    labels = torch.from_numpy(numbers[..., 2])
    return Prompts(points=send_to(device, points), labels=send_to(device, labels))


class ClickExamples:
    """Keeps the first masks of chosen objects, with the clicks that led to them, for pictures.

    Args:
        keys: Of the objects, image id and object id.
        num_masks: Kept of each.
    """

    def __init__(self, keys: Iterable[tuple[int, int]], *, num_masks: int) -> None:
        self._num_masks = num_masks
        self.masks: dict[tuple[int, int], list[CorrectedMask]] = {key: [] for key in keys}

    def watch(
        self, masks: Iterable[CorrectedMask], keys: Sequence[tuple[int, int]]
    ) -> Iterator[CorrectedMask]:
        """Passes masks on, those of M objects with these keys."""
        for corrected in masks:
            own = self.masks.get(keys[corrected.row])
            if own is not None and len(own) < self._num_masks:
                own.append(corrected)
            yield corrected

    def gather(self) -> None:
        """Makes `masks` those of all ranks. Collective: every rank must call."""
        by_rank = all_gather(self.masks)
        self.masks = {
            key: [corrected for of_rank in by_rank for corrected in of_rank[key]]
            for key in self.masks
        }


@dataclass(frozen=True)
class ClickScores:
    """What M objects score with their clicks, from the first mask on.

    A mask that no click could improve keeps its score.

    Attributes:
        iou: float64 [M, R].
        iou_boundary: float64 [M, R], see `metrics.boundary_iou`.
    """

    iou: NDArray[np.float64]
    iou_boundary: NDArray[np.float64]


def score_clicks(
    masks: Iterable[CorrectedMask],
    truths: Sequence[CroppedMask],
    *,
    num_rounds: int,
    original_size: tuple[int, int],
) -> ClickScores:
    """Scores the masks that `ClickSession.correct` yields.

    Args:
        masks: Of M objects; the first of each is the one in the first column.
        truths: M true masks.
        num_rounds: R, the masks of an object to which the most clicks were made.
        original_size: H, W of the image.
    """
    width = boundary_width(original_size)
    boundaries = [mask_boundary(truth, width=width) for truth in truths]
    shape = (len(truths), num_rounds)
    scores, columns = ClickScores(np.zeros(shape), np.zeros(shape)), [0] * len(truths)
    for row, _, mask in masks:
        rest = slice(columns[row], None)
        scores.iou[row, rest] = cropped_iou(mask, truths[row])
        boundary = mask_boundary(mask, width=width)
        scores.iou_boundary[row, rest] = cropped_iou(boundary, boundaries[row])
        columns[row] += 1
    return scores


def clicks_needed(
    ious: NDArray[np.float64], iou: float, *, first: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Number of clicks (NoC) after which each object reaches an IoU, and whether it does.

    Args:
        ious: float64 [K, R], after `first` clicks, one more, and so on.
        iou: To be reached.
        first: Clicks that led to the first column.

    Returns:
        int64 [K]; for an object that never reaches it, the number of all clicks. bool [K].

    Source: Sofiiuk et al., see `next_click`; NoC@85 and NoC@90 of the literature allow 20 clicks.
    """
    reached = ious >= iou
    ever = np.asarray(reached.any(1))
    return np.where(ever, reached.argmax(1), ious.shape[1] - 1) + first, ever
