"""`objects.json`: how good each validated object was at step 0 and at the best steps.

Pictures of validations: the same few objects each time, and the worst of each.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from samft.coco.index import CocoIndex
from samft.coco.subset import CocoSubset
from samft.evaluation.object_scores import ObjectScores
from samft.evaluation.validation import MaskSelection, SelectedMask, Validation
from samft.reports.contact_sheets import SheetEntry, draw_sheet
from samft.reports.drawing import (
    ObjectCrop,
    image_row_of,
    read_png,
    stack_horizontally,
    stack_with_titles,
    write_png,
)
from samft.runtime.files import write_text
from samft.runtime.logs import LOGGER, RunLog

FILE_NAME = "objects.json"
_NUM_BEST = 2  # the best, and the one before it, which a resume from an older state may go back to


class PerObjectLog:
    """The rows of step 0 and of the best validations, in a file that a resumed run goes on with."""

    def __init__(self, folder: Path, *, resumed_from: Path, start_step: int) -> None:
        """Reads what an earlier start left, and forgets what came after its checkpoint.

        Args:
            folder: The output folder.
            resumed_from: The folder of the run that is resumed; `folder` of a fresh one.
            start_step: The step that the run goes on from.
        """
        self.path = folder / FILE_NAME
        self._steps: dict[int, ObjectScores] = {}
        try:
            known = json.loads((resumed_from / FILE_NAME).read_text()).items()
            rows = {int(step): ObjectScores.from_json(columns) for step, columns in known}
            self._steps = {step: scores for step, scores in rows.items() if step <= start_step}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            pass  # as good as none: only pictures and comparisons hang on it

    def record_scores(self, step: int, objects: ObjectScores) -> bool:
        """Writes the rows of a validation if it is the first, or the best of those that followed.

        Returns:
            Whether it is the best after step 0 so far; of equals the earlier.
        """
        self._steps.pop(step, None)  # a step may be repeated
        ranked = self._ranked({**self._steps, step: objects})
        is_best = bool(ranked) and ranked[0] == step
        if not is_best and step != 0:
            return False
        kept = {0, *ranked[:_NUM_BEST]}
        known = {**self._steps, step: objects}
        self._steps = {number: known[number] for number in sorted(known) if number in kept}
        document: dict[int, Any] = {n: scores.to_json() for n, scores in self._steps.items()}
        try:
            write_text(self.path, json.dumps(document) + "\n")
        except OSError as error:
            LOGGER.error("%s cannot be written: %s", self.path, error.strerror)
        return is_best

    def _ranked(self, steps: dict[int, ObjectScores]) -> list[int]:
        scores = {n: float(rows.iou_actual.mean()) for n, rows in steps.items() if n and len(rows)}
        return sorted(scores, key=lambda n: (-scores[n], n))

    def read(self, step: int | None) -> ObjectScores | None:
        """The rows of a step; None if they are not known."""
        return None if step is None else self._steps.get(step)


BEFORE, AFTER, BEFORE_AFTER = "before.png", "after.png", "before_after.png"
NUM_FIXED = NUM_WORST = 16
GOOD_IOU = 0.75  # what the precision and recall of the predicted IoU are taken against
_COLUMNS = 4  # TensorBoard shows pictures in narrow columns
_MAX_VIEWS = 256  # kept in memory, 0.1 MB each: the worst objects are often the same ones
_NUM_SIZES = 4
_CELLS, _CELL, _MARGIN = 20, 16, 44  # of the picture of calibration: cells a side, px, px
_INK, _SHADE = (40, 40, 40), np.array([20, 100, 90])


def choose_fixed(subset: CocoSubset, num: int = NUM_FIXED) -> NDArray[np.int64]:
    """Chooses objects evenly over sizes, classes and images; the same ones each time.

    Args:
        subset: Of the validation split.
        num: How many, if there are so many.

    Returns:
        int64, as indices into the arrays of `subset.index`, the smallest object first.
    """
    index = subset.index
    objects = subset.objects[np.random.default_rng(0).permutation(subset.num_objects)]
    ranks = np.argsort(np.argsort(index.areas[objects], kind="stable"))
    traits = [
        ranks * _NUM_SIZES // max(len(objects), 1),
        np.unique(index.categories[objects], return_inverse=True)[1],
        np.searchsorted(index.first_object, objects, side="right"),
    ]
    # Each time the one that has least in common with those that were taken before.
    in_common = np.zeros(len(objects))
    chosen = []
    for _ in range(min(num, len(objects))):
        place = int(in_common.argmin())
        chosen.append(objects[place])
        in_common[place] = np.inf
        for trait in traits:
            in_common += trait == trait[place]
    picked = np.array(chosen, dtype=np.int64)
    return picked[np.argsort(index.areas[picked], kind="stable")]


class ValidationImages:
    """What the validations of a run leave to be looked at; pictures are drawn by rank 0 only.

    Args:
        folder: The output folder.
        subset: Of the validation split.
        log: Whose TensorBoard gets the pictures.
        resumed_from: The folder of the run that is resumed; `folder` of a fresh one.
        start_step: The step that the run goes on from.
    """

    def __init__(
        self, folder: Path, subset: CocoSubset, log: RunLog, *, resumed_from: Path, start_step: int
    ) -> None:
        self.folder, self.log, self.index = folder, log, subset.index
        self.fixed = choose_fixed(subset)
        self.objects = PerObjectLog(folder, resumed_from=resumed_from, start_step=start_step)
        self.has_validation = False  # whether there was any validation since the start
        self._views: dict[int, ObjectCrop] = {}

    def new_selection(self) -> MaskSelection:
        """What `validate` is to keep, on every rank."""
        return MaskSelection([self._key(k) for k in self.fixed.tolist()], num_worst=NUM_WORST)

    def _key(self, k: int) -> tuple[int, int]:
        return int(self.index.image_ids[image_row_of(self.index, k)]), int(self.index.object_ids[k])

    def record_validation(self, step: int, found: Validation) -> None:
        """Draws a validation, and keeps its rows if it is the first or the best.

        Args:
            step: Optimizer steps done.
            found: With the masks that `new_selection` kept.
        """
        if not self.log.main or found.selection is None:
            return
        self.has_validation = True
        is_best = self.objects.record_scores(step, found.objects)
        ordered = (found.selection.fixed.get(self._key(k)) for k in self.fixed.tolist())
        fixed = self._draw(filter(None, ordered), f"step {step}: the same objects each time")
        worst = self._draw(found.selection.worst, f"step {step}: the worst of all, by IoU")
        for name, sheet in (("val/same_objects", fixed), ("val/worst_objects", worst)):
            if sheet is not None:
                self.log.add_image(step, name, sheet)
        self.log.add_image(step, "val/calibration", draw_calibration(found.objects))
        good = found.objects.iou_actual >= GOOD_IOU
        name = f"val/predicted_iou_finds_masks_of_iou_{GOOD_IOU}"
        scores = found.objects.iou_predicted
        self.log.add_pr_curve(step, name, labels=good, scores=scores)
        if fixed is not None and (step == 0 or is_best):
            _write(self.folder / (AFTER if step else BEFORE), fixed)

    def _draw(self, kept: Iterable[SelectedMask], title: str) -> NDArray[np.uint8] | None:
        kept = list(kept)
        if not kept:
            return None
        objects = find_objects(self.index, np.array([one.key for one in kept]))
        entries = [
            SheetEntry(
                k,
                f"IoU {one.iou_actual:.2f}, said {one.iou_predicted:.2f}",
                predicted=one.mask,
            )
            for k, one in zip(objects.tolist(), kept, strict=True)
        ]
        for k in list(self._views)[:-_MAX_VIEWS]:
            del self._views[k]
        return draw_sheet(self.index, entries, title=title, columns=_COLUMNS, views=self._views)


def find_objects(index: CocoIndex, keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """Objects by the ids of their images and their own, as indices into the arrays of `index`.

    Args:
        index: The checked file, which holds them all.
        keys: int64 [K, 2].

    Returns:
        int64 [K].
    """
    image_ids = np.repeat(index.image_ids, np.diff(index.first_object))
    near = np.flatnonzero(np.isin(image_ids, keys[:, 0]))
    known = np.stack([image_ids[near], index.object_ids[near]], axis=1)
    both, places = np.unique(np.concatenate([known, keys]), axis=0, return_inverse=True)
    found = np.zeros(len(both), dtype=np.int64)
    found[places[: len(near)]] = near
    return found[places[len(near) :]]


def draw_before_and_after(folder: Path, *, before: float, after: float) -> None:
    """Sets the pictures of step 0 and of the best step side by side, in one file.

    Args:
        folder: Holds both, and gets `before_after.png`.
        before: Mean IoU at step 0.
        after: Mean IoU at the best step.
    """
    titles = (f"before: mean IoU {before:.3f}", f"after: mean IoU {after:.3f}")
    files = (folder / BEFORE, folder / AFTER)
    if all(file.exists() for file in files):
        sheets = zip(titles, map(read_png, files), strict=True)
        _write(
            folder / BEFORE_AFTER,
            stack_horizontally([stack_with_titles([sheet]) for sheet in sheets]),
        )


def _write(path: Path, picture: NDArray[np.uint8]) -> None:
    try:
        write_png(path, picture)
    except OSError as error:  # a full disk, say: no reason to end a run
        LOGGER.error("%s cannot be written: %s", path, error.strerror)


def draw_calibration(objects: ObjectScores) -> NDArray[np.uint8]:
    """How the predicted IoU goes with the actual one: the darker, the more masks.

    Args:
        objects: A row for each mask.

    Returns:
        uint8 [H, W, 3]; predicted from left to right, actual from below, both from 0 to 1. On the
        diagonal the model is right about itself, above it too modest.
    """
    columns, rows = (
        np.clip((values * _CELLS).astype(int), 0, _CELLS - 1)
        for values in (np.nan_to_num(objects.iou_predicted), objects.iou_actual)
    )
    counts = np.zeros((_CELLS, _CELLS))
    np.add.at(counts, (_CELLS - 1 - rows, columns), 1)
    share = np.sqrt(counts / max(counts.max(), 1))[..., None]
    cells = (255 - share * (255 - _SHADE)).astype(np.uint8)
    plot = cells.repeat(_CELL, axis=0).repeat(_CELL, axis=1)
    side = len(plot)
    cv2.line(plot, (0, side - 1), (side - 1, 0), _INK, 1, cv2.LINE_AA)
    cv2.rectangle(plot, (0, 0), (side - 1, side - 1), _INK, 1)
    paper = np.pad(plot, ((30, 24), (_MARGIN, 24), (0, 0)), constant_values=255)
    picture = Image.fromarray(paper)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for number in range(0, 6):
        at, text = round(number / 5 * side), f"{number / 5:.1f}"
        draw.text((_MARGIN + at, 34 + side), text, fill=_INK, font=font, anchor="mt")
        draw.text((_MARGIN - 6, 30 + side - at), text, fill=_INK, font=font, anchor="rm")
    title = "actual IoU (up) by predicted IoU (right)"
    draw.text((_MARGIN, 8), title, fill=_INK, font=font)
    return np.asarray(picture, dtype=np.uint8)
