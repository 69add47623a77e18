"""Scores on every mask of a split: `validate`, the number that is deployed."""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from samft.data.batch import Batch
from samft.data.prefetch import Waiting, side_by_side
from samft.evaluation.kept_masks import MaskKeeper
from samft.evaluation.metrics import (
    MaskMean,
    PerMaskIoU,
    box_fill_ious,
    cropped_iou,
    original_masks,
)
from samft.evaluation.scores import ObjectScores, gather_scores
from samft.models.prompted_sam import PromptedSam
from samft.runtime import heartbeat as whereabouts
from samft.training.losses import LossFunction
from samft.training.progress import LOSS_NAMES

MASK_CHUNK = 64


@dataclass
class Validation:
    """What a validation pass found.

    Attributes:
        metrics: `LOSS_NAMES` and `iou_predicted`, means over all masks of all ranks;
            `per_mask_iou` is at the original resolution.
        box_fill_iou: What filling each box would score.
        objects: One row for each mask of all ranks.
        kept: The masks that were kept to be looked at, of all ranks.
        bad_images: This rank's images that could not be read: name, what is wrong.
        rates: How fast it went, for the log.
    """

    metrics: dict[str, float]
    box_fill_iou: float
    objects: ObjectScores = field(default_factory=lambda: ObjectScores.join([]))
    kept: MaskKeeper | None = None
    bad_images: dict[str, str] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def validate(
    model: PromptedSam,
    batches: Iterable[Batch],
    *,
    loss: LossFunction,
    keep: MaskKeeper | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    waiting: Waiting = contextlib.nullcontext,
) -> Validation:
    """Scores the model on every mask of a split. Collective: every rank must call.

    Always in float32, and at the resolution of the original image: the IoU is the one that stock
    `SamPredictor` gets with the same weights.

    Args:
        model: Not wrapped; ranks may hold different numbers of images, or none.
        batches: This rank's images, one a batch, with their truths.
        loss: `losses.mask_losses` with its weights and image size set.
        keep: Is offered every mask, for pictures.
        should_stop: Asked before each image on every rank; all stop if any says yes.
        waiting: Entered to wait for batches; raises `Interrupted` to end the wait.

    Returns:
        Means over all ranks.

    Raises:
        Interrupted: Any rank was asked to stop.
        UserError: An image cannot be read, on any rank.
    """
    means = {name: MaskMean() for name in (*LOSS_NAMES[:-1], "iou_predicted", "box_fill_iou")}
    means["per_mask_iou"] = PerMaskIoU()
    for mean in means.values():
        mean.update(torch.zeros(0))  # or torchmetrics warns of a rank that has no image
    objects: list[ObjectScores] = []
    bad_images: dict[str, str] = {}
    for batch in side_by_side(batches, should_stop=should_stop, waiting=waiting):
        whereabouts.doing("validating on image", partial(list, batch.image_ids))
        bad_images.update(batch.bad_images)
        if batch.num_masks:  # none if the image cannot be read
            objects += _score_image(model, batch, loss=loss, means=means, keep=keep)
    metrics = {name: mean.compute().item() for name, mean in means.items()}
    table = gather_scores(ObjectScores.join(objects))
    if keep is not None:
        keep.gather()
    return Validation(metrics, metrics.pop("box_fill_iou"), table, keep, bad_images)


def _score_image(
    model: PromptedSam,
    batch: Batch,
    *,
    loss: LossFunction,
    means: dict[str, MaskMean],
    keep: MaskKeeper | None,
) -> list[ObjectScores]:
    moved = batch.to(model.sam.device, non_blocking=True)
    embedding = model.embed(moved.images, moved.input_sizes, cached=moved.embeddings)
    rows = []
    for part in torch.arange(batch.num_masks).split(MASK_CHUNK):
        scores = _score_masks(model, moved, embedding, part=part, loss=loss, keep=keep)
        for name, values in scores.items():
            means[name].update(values.cpu())
        rows.append(_rows(batch, part, scores))
    return rows


def _rows(batch: Batch, part: Tensor, scores: dict[str, Tensor]) -> ObjectScores:
    (image_id,) = batch.image_ids
    return ObjectScores(
        image_ids=np.full(len(part), image_id),
        object_ids=batch.object_ids[part].numpy(),
        areas=np.array([float(batch.truths[k].mask.sum()) for k in part.tolist()]),
        iou_actual=scores["per_mask_iou"].double().cpu().numpy(),
        iou_predicted=scores["iou_predicted"].double().cpu().numpy(),
    )


def _score_masks(
    model: PromptedSam,
    batch: Batch,
    embedding: Tensor,
    *,
    part: Tensor,
    loss: LossFunction,
    keep: MaskKeeper | None,
) -> dict[str, Tensor]:
    boxes, index = batch.boxes[part], batch.image_index[part]
    logits, iou_predicted = model.decode(embedding, boxes, index)
    losses = loss(
        logits,
        iou_predicted,
        targets=batch.targets[part],
        image_index=index,
        input_sizes=batch.input_sizes,
    )
    truths = [batch.truths[number] for number in part.tolist()]
    image_size = model.sam.image_encoder.img_size
    masks = original_masks(logits, image_size=image_size, **sizes_of(batch))
    ious = []
    for k, mask in zip(part.tolist(), masks, strict=True):
        ious.append(cropped_iou(mask, batch.truths[k]))
        if keep is not None:
            key = batch.image_ids[0], int(batch.object_ids[k])
            both = ious[-1], float(iou_predicted[k - int(part[0])])
            keep.offer(key, mask, ious=both, size=sizes_of(batch)["original_size"])
    iou = torch.tensor(ious, dtype=torch.float64)
    values = (losses.total, losses.focal, losses.dice, losses.iou, iou)
    scores = dict(zip(LOSS_NAMES, values, strict=True))
    scores["iou_predicted"] = iou_predicted
    scores["box_fill_iou"] = box_fill_ious(boxes, truths, **sizes_of(batch))
    return scores


def sizes_of(batch: Batch) -> dict[str, tuple[int, int]]:
    """H and W of a batch's one image, in the model frame and as it is, as the metrics take them."""
    (height, width), (original_height, original_width) = (
        sizes[0].tolist() for sizes in (batch.input_sizes, batch.original_sizes)
    )
    return {
        "input_size": (height, width),
        "original_size": (original_height, original_width),
    }
