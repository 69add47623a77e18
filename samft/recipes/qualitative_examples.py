"""A few objects of the validation set, with the masks of the initial and of the best weights.

After a training with clicks, some are corrected by clicks, too.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from samft.annotations.segmentation import CroppedMask, decode_cropped
from samft.config import TrainConfig
from samft.data.dataset import Coco2MaskDataset, collate
from samft.errors import UserError
from samft.evaluation.clicks import ClickExamples
from samft.evaluation.evaluator import Clicking, EvaluatedObjects, PromptedObjects
from samft.evaluation.metrics import cropped_iou
from samft.evaluation.object_scores import Comparison
from samft.images.files import ImageError
from samft.models.prompted_sam import PromptedSam, original_masks
from samft.models.prompts import Prompts
from samft.models.sam import load_state, read_state
from samft.recipes import build
from samft.reports.click_pictures import ExampleMasks
from samft.reports.drawing import annotate_crop, crop_around, image_row_of
from samft.reports.page import ObjectPair
from samft.reports.validation_images import choose_fixed, find_objects
from samft.runtime import heartbeat
from samft.runtime.device import exact_float32
from samft.weights.saved_settings import saved_prompts

NUM_EXAMPLES = 6  # of each kind
# Corrected by clicks: images, objects of each at most, clicks on each; and clicks in the pictures.
_CLICKED_IMAGES, _CLICKED_OBJECTS, _NUM_CLICKS, _CLICKS_SHOWN = 16, 4, 7, 3
_TILE = 288  # px: sharp where it is shown at half the size
_IOU_TOLERANCE = 0.02  # by how much a mask's IoU may change with the precision of the model


@dataclass
class QualitativeExamples:
    """Objects with both models' masks, by kind: `improved`, `worst`, `harmed`.

    Attributes:
        pairs: The objects of each kind.
        why_none: Why there are no pairs, in a sentence; empty if there are.
        clicked: Other objects, corrected by clicks with both; empty after a training without.
    """

    pairs: dict[str, list[ObjectPair]] = field(default_factory=dict)
    why_none: str = ""
    clicked: list["ClickedObjects"] = field(default_factory=list)


@dataclass(frozen=True)
class ClickedObjects:
    """Objects that one model's masks were corrected of by clicks: their scores, and a few masks."""

    scores: EvaluatedObjects
    masks: ExampleMasks


def draw_examples(
    config: TrainConfig,
    model: PromptedSam,
    dataset: Coco2MaskDataset,
    *,
    comparison: Comparison | None,
    checkpoint: Path | None,
    should_stop: Callable[[], bool] = lambda: False,
) -> QualitativeExamples:
    """Chooses objects, predicts their masks with the initial and the best weights, draws both.

    Only the images of those objects are encoded, or read from the cache of embeddings. Afterwards
    the model has the weights of the checkpoint.

    Args:
        config: The run's configuration.
        model: On its device; not wrapped.
        dataset: The validation split.
        comparison: Of all its objects; None if the scores of one of the two models are unknown.
        checkpoint: The best one; None if there is none.
        should_stop: Asked before each image.
    """
    if comparison is None or checkpoint is None or not len(comparison.before):
        return QualitativeExamples(
            why_none="The scores of each object before and after training are not known."
        )
    rows_by_kind = comparison.choose_examples(NUM_EXAMPLES)
    rows = np.concatenate(list(rows_by_kind.values()))
    positions = find_objects(dataset.subset.index, comparison.before.keys()[rows])
    objects = dict(zip(rows.tolist(), positions.tolist(), strict=True))
    try:
        masks, clicked = _predict_with_both(
            config, model, dataset, list(objects.values()), checkpoint, should_stop=should_stop
        )
    except UserError as error:
        return QualitativeExamples(
            why_none=f"The initial or the best weights cannot be loaded any more: {error}"
        )
    if should_stop():
        return QualitativeExamples(why_none="The run was asked to stop while they were drawn.")
    # The file of the initial weights, say, may have been replaced since the run began.
    for which, predicted, table in zip(
        ("initial", "best"), masks, (comparison.before, comparison.after), strict=True
    ):
        scored = {k: float(table.iou_actual[row]) for row, k in objects.items()}
        if not score_as_before(dataset, predicted, scored):
            return QualitativeExamples(
                why_none=f"The {which} weights of this run do not score as they did: the file has "
                "changed since."
            )
    drawn = _draw_pairs(dataset, comparison, objects, masks)
    return QualitativeExamples(
        {kind: [drawn[r] for r in of.tolist() if r in drawn] for kind, of in rows_by_kind.items()},
        clicked=clicked,
    )


def _predict_with_both(
    config: TrainConfig,
    model: PromptedSam,
    dataset: Coco2MaskDataset,
    objects: list[int],
    checkpoint: Path,
    *,
    should_stop: Callable[[], bool],
) -> tuple[list[dict[int, CroppedMask]], list[ClickedObjects]]:
    shared: dict[int, Tensor] = {}  # the same for both weights if the encoder is frozen
    masks: list[dict[int, CroppedMask]] = []
    clicked: list[ClickedObjects] = []
    clicks_trained = config.prompts != "box" or config.num_corrections > 0
    initial = partial(build.load_initial_state, config)
    for load_weights in (initial, partial(read_state, checkpoint, quiet=True)):
        load_state(model.sam, load_weights(), source="the weights of this run")
        embeddings = shared if model.encoder_is_frozen else {}
        masks.append(
            predict_objects(model, dataset, objects, embeddings=embeddings, should_stop=should_stop)
        )
        if clicks_trained:
            saved = saved_prompts(Path(str(config.checkpoint_path)))  # `auto`: None
            of_initial = saved is None or saved.three_masks
            multimask = config.multimask == "best" if clicked else of_initial
            clicked.append(
                correct_objects(
                    model,
                    dataset,
                    embeddings=embeddings,
                    multimask=multimask,
                    should_stop=should_stop,
                )
            )
    return masks, clicked


@torch.no_grad()
@exact_float32()
def correct_objects(
    model: PromptedSam,
    dataset: Coco2MaskDataset,
    *,
    embeddings: dict[int, Tensor],
    multimask: bool,
    should_stop: Callable[[], bool] = lambda: False,
) -> ClickedObjects:
    """Corrects a few objects of each of some images of a validation split by clicks.

    Args:
        model: On its device.
        dataset: The split; its cached embeddings are used if it has any.
        embeddings: By row, those of these weights that are known; the others are added.
        multimask: Whether a first click gives the best of three masks.
        should_stop: Asked before each image.

    Returns:
        The same objects each time, without those of images that cannot be read any more.
    """
    index, subset = dataset.subset.index, dataset.subset
    chosen = choose_fixed(subset, _CLICKED_IMAGES).tolist()
    by_image = {image_row_of(index, k): k for k in reversed(chosen)}
    drawn = sorted(by_image.values(), key=chosen.index)[:: -(-len(by_image) // NUM_EXAMPLES)]
    image_ids = [int(index.image_ids[image_row_of(index, k)]) for k in drawn]
    keys = zip(image_ids, index.object_ids[drawn].tolist(), strict=True)
    examples = ClickExamples(keys, num_masks=_CLICKS_SHOWN)
    clicking, parts = Clicking(_NUM_CLICKS, multimask, examples), []
    for k in by_image.values():
        if should_stop():
            break
        row = subset.row_of(k)
        heartbeat.set_activity("clicking on image", partial(list, [subset.file_name(row)]))
        try:
            batch = collate([dataset[row]])
        except ImageError:
            continue
        on_device = batch.to(model.sam.device)
        if row not in embeddings:
            embeddings[row] = model.embed(
                on_device.images, on_device.input_sizes, cached=on_device.embeddings
            )
        # A few neighbours in the file, the chosen one among them.
        place = batch.object_ids.tolist().index(int(index.object_ids[k]))
        start = max(0, min(place, batch.num_masks - _CLICKED_OBJECTS))
        part = slice(start, start + _CLICKED_OBJECTS)
        objects = PromptedObjects(
            model, embeddings[row], batch.take_objects(part), on_device.boxes[part]
        )
        parts.append(objects.evaluate(seed=0, clicking=clicking))
    return ClickedObjects(EvaluatedObjects.concatenate(parts), examples.masks)


@torch.no_grad()
@exact_float32()
def predict_objects(
    model: PromptedSam,
    dataset: Coco2MaskDataset,
    objects: list[int],
    *,
    embeddings: dict[int, Tensor],
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[int, CroppedMask]:
    """Predicts the masks of some objects of a validation split, at the original resolution.

    Args:
        model: On its device.
        dataset: The split; its cached embeddings are used if it has any.
        objects: As indices into the arrays of the dataset's `CocoIndex`.
        embeddings: By row of the split, those of this encoder that are known; the others are added.
        should_stop: Asked before each image.

    Returns:
        By object; objects of an image that cannot be read any more are missing.
    """
    masks: dict[int, CroppedMask] = {}
    index, device = dataset.subset.index, model.sam.device
    objects_by_row: dict[int, list[int]] = {}
    for k in objects:
        objects_by_row.setdefault(dataset.subset.row_of(k), []).append(k)
    for row, wanted in objects_by_row.items():
        if should_stop():
            break
        heartbeat.set_activity("drawing image", partial(list, [dataset.subset.file_name(row)]))
        try:
            batch = collate([dataset[row]]).to(device)
        except ImageError:
            continue
        ids = batch.object_ids.tolist()
        wanted = [k for k in wanted if int(index.object_ids[k]) in ids]
        if not wanted:
            continue
        part = torch.tensor([ids.index(int(index.object_ids[k])) for k in wanted], device=device)
        known = batch.embeddings if batch.embeddings is not None else embeddings.get(row)
        embeddings[row] = model.embed(batch.images, batch.input_sizes, cached=known)
        prompts = Prompts(boxes=batch.boxes[part])
        logits, _ = model.decode(embeddings[row], prompts, batch.image_index[part])
        predicted = original_masks(logits, **batch.image_sizes)
        masks.update(zip(wanted, predicted, strict=True))
    return masks


def score_as_before(
    dataset: Coco2MaskDataset, predicted: dict[int, CroppedMask], scored: dict[int, float]
) -> bool:
    """Whether predicted masks of objects have the IoU that they had earlier, by object."""
    index = dataset.subset.index
    for k, mask in predicted.items():
        size = index.sizes[image_row_of(index, k)].tolist()
        truth = decode_cropped(index.segmentations[k], size)
        if abs(cropped_iou(mask, truth) - scored[k]) > _IOU_TOLERANCE:
            return False
    return True


def _draw_pairs(
    dataset: Coco2MaskDataset,
    comparison: Comparison,
    objects: dict[int, int],
    masks: list[dict[int, CroppedMask]],
) -> dict[int, ObjectPair]:
    # By row of the comparison; without objects of images that cannot be read any more.
    index = dataset.subset.index
    names = index.category_names
    pairs = {}
    for row, k in objects.items():
        image_row = image_row_of(index, k)
        try:
            image = index.open_image(image_row).decode()
        except ImageError:
            continue
        if any(k not in predicted for predicted in masks):
            continue
        view = crop_around(index.boxes[k], image, tile=_TILE)
        before, after = (
            annotate_crop(index, k, view, predicted=predicted[k]) for predicted in masks
        )
        ious = [float(t.iou_actual[row]) for t in (comparison.before, comparison.after)]
        pairs[row] = ObjectPair(
            file_name=index.file_name(image_row),
            class_name=names[int(index.categories[k])],
            object_id=int(index.object_ids[k]),
            area=float(comparison.before.areas[row]),
            ious=(ious[0], ious[1]),
            tiles=(before, after),
        )
    return pairs
