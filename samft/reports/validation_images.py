"""What a run keeps of its validations for people: pictures, and the scores of each object.

Each validation draws the same few objects and the worst ones, for trackers and as before.png and
after.png. The scores of every object at step 0 and at the best steps are kept in objects.json, so
that the report can compare them.
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
from samft.runtime.files import read_json, write_text
from samft.runtime.logs import LOGGER, RunLog

FILE_NAME = "objects.json"
_GENERAL = "general"  # of each step, beside the columns: those of the general set
BEFORE, AFTER, BEFORE_AFTER = "before.png", "after.png", "before_after.png"
NUM_FIXED = NUM_WORST = 16  # objects on a picture
GOOD_IOU = 0.75  # masks from here on are positives in the precision-recall curve of predicted IoU
_NUM_BEST = 2  # the best, and the second best, to which a resume from an older state may return
_COLUMNS = 4  # TensorBoard shows pictures in narrow columns
_MAX_CROPS = 256  # in memory, 0.1 MB each: the worst objects of validations are often the same
_NUM_SIZE_GROUPS = 4
_CELLS, _CELL, _MARGIN = 20, 16, 44  # of the calibration picture: cells along a side, px, px
_INK, _SHADE = (40, 40, 40), np.array([20, 100, 90])


class PerObjectLog:
    """The scores of each object at step 0 and at the best steps, kept in objects.json.

    Only the report and pictures depend on it: what cannot be read of the file is left out, and one
    that cannot be written is logged as an error.
    """

    def __init__(self, folder: Path, *, resumed_from: Path, start_step: int) -> None:
        """Reads the file of the run that is resumed, up to the step of its checkpoint.

        Args:
            folder: The output folder.
            resumed_from: The folder of the run that is resumed; `folder` for a new one.
            start_step: The step at which the run starts; later entries are dropped.
        """
        self.path = folder / FILE_NAME
        steps, general = _read_steps(resumed_from / FILE_NAME)
        self._steps = {step: scores for step, scores in steps.items() if step <= start_step}
        self._general = {step: general[step] for step in general if step in self._steps}

    def record_scores(
        self, step: int, objects: ObjectScores, *, general: ObjectScores | None = None
    ) -> bool:
        """Writes the scores of a validation if it is that of step 0 or the best after it.

        Args:
            step: Optimizer steps done.
            objects: Of the validation split, which alone decides.
            general: Of the general set, if there is one.

        Returns:
            Whether it is the best after step 0; of equal ones the earlier is.
        """
        self._steps.pop(step, None)  # a resumed run may repeat a step
        self._general.pop(step, None)
        steps = {**self._steps, step: objects}
        best_steps = self._rank_steps(steps)
        is_best = bool(best_steps) and best_steps[0] == step
        if not is_best and step != 0:
            return False
        kept = {0, *best_steps[:_NUM_BEST]}
        self._steps = {number: steps[number] for number in sorted(steps) if number in kept}
        tables = {**self._general, **({} if general is None else {step: general})}
        self._general = {n: scores for n, scores in tables.items() if n in kept}
        document: dict[int, Any] = {n: scores.to_json() for n, scores in self._steps.items()}
        for number, scores in self._general.items():
            document[number][_GENERAL] = scores.to_json()
        try:
            write_text(self.path, json.dumps(document) + "\n")
        except OSError as error:
            LOGGER.error("%s cannot be written: %s", self.path, error.strerror)
        return is_best

    def _rank_steps(self, steps: dict[int, ObjectScores]) -> list[int]:
        # Those after step 0, the best mean IoU first.
        means = {n: float(rows.iou_actual.mean()) for n, rows in steps.items() if n and len(rows)}
        return sorted(means, key=lambda n: (-means[n], n))

    def read(self, step: int | None) -> ObjectScores | None:
        """The scores at a step; None if they were not kept."""
        return None if step is None else self._steps.get(step)

    def read_general(self, step: int | None) -> ObjectScores | None:
        """Those of the general set at a step; None if they were not kept."""
        return None if step is None else self._general.get(step)


def _read_steps(path: Path) -> tuple[dict[int, ObjectScores], dict[int, ObjectScores]]:
    # The scores of each step that are whole, and of the general set; what is not is logged.
    steps: dict[int, ObjectScores] = {}
    general: dict[int, ObjectScores] = {}
    if not path.exists():
        return steps, general
    damaged = []
    try:
        for step, columns in read_json(path).items():
            try:
                steps[int(step)] = ObjectScores.from_json(columns)
                if _GENERAL in columns:
                    general[int(step)] = ObjectScores.from_json(columns[_GENERAL])
            except ValueError:
                damaged.append(f"the scores of step {step[:20]}")
    except (OSError, ValueError, AttributeError):
        damaged = ["all of it"]
    if damaged:
        LOGGER.warning(
            "%s is damaged and %s left out: the report will not compare objects with those",
            path,
            " and ".join(damaged),
        )
    return steps, general


def choose_fixed(subset: CocoSubset, num: int = NUM_FIXED) -> NDArray[np.int64]:
    """Chooses objects spread over sizes, classes and images; the same ones each time.

    Args:
        subset: The validation split.
        num: How many, if there are so many.

    Returns:
        int64, as rows of the arrays of `subset.index`, the smallest object first.
    """
    index = subset.index
    objects = subset.objects[np.random.default_rng(0).permutation(subset.num_objects)]
    ranks = np.argsort(np.argsort(index.areas[objects], kind="stable"))
    traits = [
        ranks * _NUM_SIZE_GROUPS // max(len(objects), 1),
        np.unique(index.categories[objects], return_inverse=True)[1],
        np.searchsorted(index.first_object, objects, side="right"),  # the image
    ]
    # Greedy: the next object is the one that shares the fewest traits with those chosen so far.
    num_shared = np.zeros(len(objects))
    chosen = []
    for _ in range(min(num, len(objects))):
        place = int(num_shared.argmin())
        chosen.append(objects[place])
        num_shared[place] = np.inf
        for trait in traits:
            num_shared += trait == trait[place]
    rows = np.array(chosen, dtype=np.int64)
    return rows[np.argsort(index.areas[rows], kind="stable")]


class ValidationImages:
    """Draws the validations of a run and keeps their scores; on rank 0 only.

    Args:
        folder: The output folder.
        subset: The validation split.
        log: Shows the pictures in the trackers.
        resumed_from: The folder of the run that is resumed; `folder` for a new one.
        start_step: The step at which the run starts.
    """

    def __init__(
        self, folder: Path, subset: CocoSubset, log: RunLog, *, resumed_from: Path, start_step: int
    ) -> None:
        self.folder, self.log, self.index = folder, log, subset.index
        self.fixed = choose_fixed(subset)
        self.per_object_log = PerObjectLog(folder, resumed_from=resumed_from, start_step=start_step)
        self.has_validation = False  # of this process, not of the run that is resumed
        self._crops: dict[int, ObjectCrop] = {}

    def new_selection(self) -> MaskSelection:
        """The masks that the next `validate` is to keep; every rank needs one."""
        return MaskSelection(
            [self._object_key(k) for k in self.fixed.tolist()], num_worst=NUM_WORST
        )

    def _object_key(self, k: int) -> tuple[int, int]:
        return int(self.index.image_ids[image_row_of(self.index, k)]), int(self.index.object_ids[k])

    def record_validation(self, step: int, validation: Validation) -> None:
        """Draws a validation; keeps its scores and picture if it is the first or the best.

        Args:
            step: Optimizer steps done.
            validation: With a selection from `new_selection`.
        """
        if not self.log.main or validation.selection is None:
            return
        self.has_validation = True
        objects, selection = validation.objects, validation.selection
        general = validation.general.objects if validation.general else None
        is_best = self.per_object_log.record_scores(step, objects, general=general)
        masks = (selection.fixed.get(self._object_key(k)) for k in self.fixed.tolist())
        fixed = self._draw_masks(filter(None, masks), f"step {step}: the same objects each time")
        worst = self._draw_masks(selection.worst, f"step {step}: the worst of all, by IoU")
        is_good = objects.iou_actual >= GOOD_IOU
        name = f"predicted_iou_finds_masks_of_iou_{GOOD_IOU}"
        self.log.add_pr_curve(step, name, labels=is_good, scores=objects.iou_predicted)
        sheets = {"same_objects": fixed, "worst_objects": worst}
        pictures = {name: sheet for name, sheet in sheets.items() if sheet is not None}
        self.log.add_pictures(step, {**pictures, "calibration": draw_calibration(objects)})
        if fixed is not None and (step == 0 or is_best):
            _write_picture(self.folder / (AFTER if step else BEFORE), fixed)

    def _draw_masks(self, masks: Iterable[SelectedMask], title: str) -> NDArray[np.uint8] | None:
        masks = list(masks)
        if not masks:
            return None
        objects = find_objects(self.index, np.array([mask.key for mask in masks]))
        entries = [
            SheetEntry(
                k,
                f"IoU {mask.iou_actual:.2f}, pred. {mask.iou_predicted:.2f}",
                predicted=mask.mask,
            )
            for k, mask in zip(objects.tolist(), masks, strict=True)
        ]
        for k in list(self._crops)[:-_MAX_CROPS]:  # the oldest ones
            del self._crops[k]
        return draw_sheet(self.index, entries, title=title, columns=_COLUMNS, crops=self._crops)


def find_objects(index: CocoIndex, keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """Finds objects by their image id and object id; object ids alone need not be unique.

    Args:
        index: The checked annotation file; all objects are in it.
        keys: int64 [K, 2], image id and object id.

    Returns:
        int64 [K], rows of the arrays of `index`.
    """
    image_ids = np.repeat(index.image_ids, np.diff(index.first_object))
    candidates = np.flatnonzero(np.isin(image_ids, keys[:, 0]))
    candidate_keys = np.stack([image_ids[candidates], index.object_ids[candidates]], axis=1)
    # One number for each key, so that an object is looked up by the number of its key.
    unique_keys, numbers = np.unique(
        np.concatenate([candidate_keys, keys]), axis=0, return_inverse=True
    )
    rows = np.zeros(len(unique_keys), dtype=np.int64)
    rows[numbers[: len(candidates)]] = candidates
    return rows[numbers[len(candidates) :]]


def draw_before_and_after(folder: Path, *, before: float, after: float | None) -> None:
    """Writes before_after.png: the pictures of step 0 and of the best step next to each other.

    Args:
        folder: The output folder; without both pictures in it, nothing is written.
        before: Mean IoU at step 0.
        after: Mean IoU at the best step, if there is one.
    """
    paths = (folder / BEFORE, folder / AFTER)
    if after is None or not all(path.exists() for path in paths):
        return
    titles = (f"before: mean IoU {before:.3f}", f"after: mean IoU {after:.3f}")
    try:
        columns = list(zip(titles, map(read_png, paths), strict=True))
    except (OSError, ValueError) as error:  # a damaged file: no reason to end a run
        LOGGER.error("%s was not drawn: %s", BEFORE_AFTER, error)
        return
    picture = stack_horizontally([stack_with_titles([column]) for column in columns])
    _write_picture(folder / BEFORE_AFTER, picture)


def _write_picture(path: Path, picture: NDArray[np.uint8]) -> None:
    try:
        write_png(path, picture)
    except OSError as error:  # say, a full disk: no reason to end a run
        LOGGER.error("%s cannot be written: %s", path, error.strerror)


def draw_calibration(objects: ObjectScores) -> NDArray[np.uint8]:
    """Draws a histogram of predicted IoU (x) and actual IoU (y), darker where there are more masks.

    Args:
        objects: One row for each mask.

    Returns:
        uint8 [H, W, 3]; both axes go from 0 to 1. On the diagonal the prediction is right; above it
        the model underestimates itself.
    """
    columns, rows = (
        np.clip((values * _CELLS).astype(int), 0, _CELLS - 1)
        for values in (np.nan_to_num(objects.iou_predicted), objects.iou_actual)
    )
    counts = np.zeros((_CELLS, _CELLS))
    np.add.at(counts, (_CELLS - 1 - rows, columns), 1)
    darkness = np.sqrt(counts / max(counts.max(), 1))[..., None]
    cells = (255 - darkness * (255 - _SHADE)).astype(np.uint8)
    plot = cells.repeat(_CELL, axis=0).repeat(_CELL, axis=1)
    side = len(plot)
    cv2.line(plot, (0, side - 1), (side - 1, 0), _INK, 1, cv2.LINE_AA)
    cv2.rectangle(plot, (0, 0), (side - 1, side - 1), _INK, 1)
    paper = np.pad(plot, ((30, 24), (_MARGIN, 24), (0, 0)), constant_values=255)
    picture = Image.fromarray(paper)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for number in range(0, 6):
        offset, label = round(number / 5 * side), f"{number / 5:.1f}"
        draw.text((_MARGIN + offset, 34 + side), label, fill=_INK, font=font, anchor="mt")
        draw.text((_MARGIN - 6, 30 + side - offset), label, fill=_INK, font=font, anchor="rm")
    title = "actual IoU (up) by predicted IoU (right)"
    draw.text((_MARGIN, 8), title, fill=_INK, font=font)
    return np.asarray(picture, dtype=np.uint8)
