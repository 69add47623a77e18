"""The objects of a run that are worth a look, as its first and its best weights see them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from samft.coco.images import ImageError, read_image
from samft.coco.masks import decode_cropped
from samft.coco.repair import class_names
from samft.config import TrainConfig
from samft.data.batch import collate
from samft.data.data import Coco2MaskDataset
from samft.data.targets import CroppedMask
from samft.errors import UserError
from samft.evaluation.comparison import Comparison
from samft.evaluation.metrics import cropped_iou, original_masks
from samft.evaluation.validation import sizes_of
from samft.models.prompted_sam import PromptedSam
from samft.models.sam import build_sam, load_state, read_state
from samft.recipes import build as assemble
from samft.reports.cutouts import mark, owner_of, view_of
from samft.reports.gallery import find_objects
from samft.reports.report_page import Pair
from samft.runtime import heartbeat as whereabouts

NUM_SHOWN = 6  # of each kind
_TILE = 288  # px: sharp where it is shown at half the size
_SAME_IOU = 0.02  # a model is scored like this again, in whatever precision


@dataclass
class Pairs:
    """The objects of each kind (`improved`, `worst`, `harmed`); or why there are none."""

    groups: dict[str, list[Pair]] = field(default_factory=dict)
    why_none: str = ""


def draw_pairs(
    config: TrainConfig,
    model: PromptedSam,
    dataset: Coco2MaskDataset,
    *,
    comparison: Comparison | None,
    checkpoint: Path | None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Pairs:
    """Runs both models on a few images, and draws what they make of a few objects.

    Only those images are encoded, or read from the cache of embeddings. Afterwards the model has
    the weights of the checkpoint.

    Args:
        config: The run's configuration.
        model: On its device; not wrapped.
        dataset: Of the validation split.
        comparison: Of all its objects; None if the rows of one of the two models are lost.
        checkpoint: The best one.
        should_stop: Asked before each image.
    """
    if comparison is None or checkpoint is None or not len(comparison.before):
        return Pairs(why_none="It is not known how each object was scored before and after.")
    rows = comparison.choose(NUM_SHOWN)
    chosen = np.concatenate(list(rows.values()))
    found = find_objects(dataset.index.file, comparison.before.keys()[chosen])
    objects = dict(zip(chosen.tolist(), found.tolist(), strict=True))
    masks: list[dict[int, CroppedMask]] = []
    embeddings: dict[int, Tensor] = {}
    try:
        for weights in (lambda: _first_weights(config), lambda: read_state(checkpoint)):
            load_state(model.sam, weights(), source="the weights of this run")
            masks.append(
                predict(
                    model,
                    dataset,
                    list(objects.values()),
                    embeddings=embeddings if model.encoder_is_frozen else {},
                    should_stop=should_stop,
                )
            )
    except UserError as error:
        return Pairs(why_none=f"The weights of before or after cannot be loaded any more: {error}")
    if should_stop():
        return Pairs(why_none="The run was asked to stop while they were drawn.")
    ious = comparison.before.iou_actual, comparison.after.iou_actual
    for predicted, wanted, when in zip(masks, ious, ("first", "best"), strict=True):
        for row, k in objects.items():
            if k in predicted and abs(_iou(dataset, k, predicted[k]) - wanted[row]) > _SAME_IOU:
                return Pairs(
                    why_none=f"The weights that are loaded as the {when} ones of this run score "
                    "otherwise than they did: the file has changed since."
                )
    drawn = _draw(dataset, comparison, objects, masks)
    return Pairs({kind: [drawn[r] for r in rows[kind].tolist() if r in drawn] for kind in rows})


def _first_weights(config: TrainConfig) -> dict[str, Tensor]:
    weights = assemble.load_weights(config, quiet=True)
    if weights is not None:
        return weights
    torch.manual_seed(config.seed)  # as `build_model` does
    assert config.model_type is not None
    return build_sam(config.model_type, config.image_size, attention=config.attention).state_dict()


@torch.no_grad()
def predict(
    model: PromptedSam,
    dataset: Coco2MaskDataset,
    objects: list[int],
    *,
    embeddings: dict[int, Tensor],
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[int, CroppedMask]:
    """A model's masks of some objects of a validation split, at the original resolution.

    Args:
        model: On its device.
        dataset: The split; its cached embeddings are used if it has any.
        objects: As indices into the arrays of the dataset's file.
        embeddings: By image, those of this encoder that are known; the others are added.
        should_stop: Asked before each image.

    Returns:
        By object; without those whose image cannot be read any more.
    """
    found: dict[int, CroppedMask] = {}
    file, device = dataset.index.file, model.sam.device
    by_owner: dict[int, list[int]] = {}
    for k in objects:
        by_owner.setdefault(owner_of(file, k), []).append(k)
    for owner, own in by_owner.items():
        if should_stop():
            break
        (place,) = np.flatnonzero(dataset.index.rows == owner).tolist()
        whereabouts.doing("drawing image", partial(list, [dataset.index.file_name(place)]))
        try:
            batch = collate([dataset[place]]).to(device)
        except ImageError:
            continue
        ids = batch.object_ids.tolist()
        own = [k for k in own if int(file.object_ids[k]) in ids]
        part = torch.tensor([ids.index(int(file.object_ids[k])) for k in own], device=device)
        if not own:
            continue
        known = batch.embeddings if batch.embeddings is not None else embeddings.get(owner)
        embeddings[owner] = model.embed(batch.images, batch.input_sizes, cached=known)
        logits, _ = model.decode(embeddings[owner], batch.boxes[part], batch.image_index[part])
        size = model.sam.image_encoder.img_size
        masks = original_masks(logits, image_size=size, **sizes_of(batch))
        found.update(zip(own, masks, strict=True))
    return found


def _iou(dataset: Coco2MaskDataset, k: int, mask: CroppedMask) -> float:
    file = dataset.index.file
    size = file.sizes[owner_of(file, k)].tolist()
    top, left, crop = decode_cropped(file.segmentations[k], *size)
    return cropped_iou(mask, CroppedMask(top, left, crop.astype(bool)))


def _draw(
    dataset: Coco2MaskDataset,
    comparison: Comparison,
    objects: dict[int, int],
    masks: list[dict[int, CroppedMask]],
) -> dict[int, Pair]:
    file = dataset.index.file
    names = class_names(file)
    drawn = {}
    for row, k in objects.items():
        owner = owner_of(file, k)
        try:
            view = view_of(
                file.boxes[k], read_image(file.image_folder / file.file_name(owner)), tile=_TILE
            )
        except ImageError:
            continue
        if any(k not in found for found in masks):
            continue
        before, after = (mark(file, k, view, predicted=found[k]) for found in masks)
        scores = comparison.before.iou_actual[row], comparison.after.iou_actual[row]
        drawn[row] = Pair(
            file_name=file.file_name(owner),
            class_name=names[int(file.categories[k])],
            object_id=int(file.object_ids[k]),
            area=float(comparison.before.areas[row]),
            ious=(float(scores[0]), float(scores[1])),
            tiles=(before, after),
        )
    return drawn
