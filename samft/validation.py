"""Scores on every mask of a split: `validate`, the number that is deployed."""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from samft import whereabouts
from samft.batch import Batch
from samft.losses import LossFunction
from samft.metrics import MaskMean, PerMaskIoU, box_fill_ious, original_masks_iou
from samft.prefetch import Waiting, side_by_side
from samft.progress import LOSS_NAMES
from samft.prompted import PromptedSam
from samft.scores import ObjectScores, gather_scores

MASK_CHUNK = 64


@dataclass
class Validation:
    """What a validation pass found.

    Attributes:
        metrics: `LOSS_NAMES` and `iou_predicted`, means over all masks of all ranks;
            `per_mask_iou` is at the original resolution.
        box_fill_iou: What filling each box would score.
        shown: Rank 0's first images with their mask logits, for pictures.
        objects: One row for each mask of all ranks.
        bad_images: This rank's images that could not be read: name, what is wrong.
        rates: How fast it went, for the log.
    """

    metrics: dict[str, float]
    box_fill_iou: float
    shown: list[tuple[Batch, Tensor]]
    objects: ObjectScores = field(default_factory=lambda: ObjectScores.join([]))
    bad_images: dict[str, str] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def validate(
    model: PromptedSam,
    batches: Iterable[Batch],
    *,
    loss: LossFunction,
    num_shown: int = 0,
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
        num_shown: Images to keep for pictures.
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
    shown: list[tuple[Batch, Tensor]] = []
    objects: list[ObjectScores] = []
    bad_images: dict[str, str] = {}
    for batch in side_by_side(batches, should_stop=should_stop, waiting=waiting):
        whereabouts.doing("validating on image", partial(list, batch.image_ids))
        bad_images.update(batch.bad_images)
        if batch.num_masks:  # none if the image cannot be read
            logits = _score_image(model, batch, loss=loss, means=means, objects=objects)
            if len(shown) < num_shown:
                shown.append((batch, logits.cpu()))
    metrics = {name: mean.compute().item() for name, mean in means.items()}
    table = gather_scores(ObjectScores.join(objects))
    return Validation(metrics, metrics.pop("box_fill_iou"), shown, table, bad_images)


def _score_image(
    model: PromptedSam,
    batch: Batch,
    *,
    loss: LossFunction,
    means: dict[str, MaskMean],
    objects: list[ObjectScores],
) -> Tensor:
    moved = batch.to(model.sam.device, non_blocking=True)
    embedding = model.embed(moved.images, moved.input_sizes, cached=moved.embeddings)
    chunks = []
    for part in torch.arange(batch.num_masks).split(MASK_CHUNK):
        logits, scores = _score_masks(model, moved, embedding, part=part, loss=loss)
        for name, values in scores.items():
            means[name].update(values.cpu())
        objects.append(_rows(batch, part, scores))
        chunks.append(logits)
    return torch.cat(chunks)


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
    model: PromptedSam, batch: Batch, embedding: Tensor, *, part: Tensor, loss: LossFunction
) -> tuple[Tensor, dict[str, Tensor]]:
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
    height, width = batch.input_sizes[0].tolist()
    original_height, original_width = batch.original_sizes[0].tolist()
    original_size = (original_height, original_width)
    sizes = {"input_size": (height, width), "original_size": original_size}
    image_size = model.sam.image_encoder.img_size
    iou = original_masks_iou(logits, truths, image_size=image_size, **sizes)
    values = (losses.total, losses.focal, losses.dice, losses.iou, iou)
    scores = dict(zip(LOSS_NAMES, values, strict=True))
    scores["iou_predicted"] = iou_predicted
    scores["box_fill_iou"] = box_fill_ious(boxes, truths, **sizes)
    return logits, scores
