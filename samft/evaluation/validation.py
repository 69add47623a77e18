"""The few masks of a validation that are kept to be looked at; the others are scored and let go.

Scores on every mask of a split: `validate`, the number that is deployed.
"""

import contextlib
import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samft.coco.segmentation import CroppedMask, decode_encoded, encode_cropped
from samft.data.dataset import Batch
from samft.data.loaders import Waiting, lockstep
from samft.distributed import all_gather
from samft.evaluation.metrics import MaskMean, PerMaskIoU, box_fill_ious, cropped_iou
from samft.evaluation.object_scores import ObjectScores, gather_scores
from samft.models.prompted_sam import PromptedSam, original_masks
from samft.runtime import heartbeat
from samft.training.engine import LOSS_NAMES
from samft.training.losses import LossFunction

Key = tuple[int, int]  # the ids of an image and of one of its objects


@dataclass(frozen=True, order=True)
class SelectedMask:
    """A mask that a model predicted; ordered by how bad it is."""

    iou_actual: float
    key: Key
    iou_predicted: float = field(compare=False)
    rle: dict[str, Any] = field(compare=False)  # at the original resolution

    @property
    def mask(self) -> CroppedMask:
        """The mask, cropped tightly."""
        return decode_encoded(self.rle)


class MaskSelection:
    """Keeps the masks of certain objects, and the worst; in memory never more than those.

    Args:
        fixed: The objects whose masks are kept whatever they are.
        num_worst: How many of the worst.
    """

    def __init__(self, fixed: Iterable[Key], *, num_worst: int) -> None:
        self._wanted, self._num_worst = frozenset(fixed), num_worst
        self.fixed: dict[Key, SelectedMask] = {}
        self.worst: list[SelectedMask] = []
        # The best of the worst first: what a worse one pushes out.
        self._heap: list[tuple[float, int, int]] = []
        self._encoded: dict[Key, SelectedMask] = {}

    def add(
        self, key: Key, mask: CroppedMask, *, ious: tuple[float, float], size: tuple[int, int]
    ) -> None:
        """Keeps a mask if it is to be kept.

        Args:
            key: Of its object.
            mask: At the original resolution.
            ious: Actual and predicted.
            size: H, W of the image.
        """
        entry = (-ious[0], -key[0], -key[1])
        has_room = len(self._heap) < self._num_worst
        is_bad = has_room or (self._num_worst > 0 and entry > self._heap[0])
        if key not in self._wanted and not is_bad:
            return
        height, width = size
        rle = encode_cropped(mask, height=height, width=width)
        kept = SelectedMask(ious[0], key, ious[1], rle)
        if key in self._wanted:
            self.fixed[key] = kept
        if is_bad:
            heapq.heappush(self._heap, entry)
            self._encoded[key] = kept
            if len(self._heap) > self._num_worst:
                _, image_id, object_id = heapq.heappop(self._heap)
                del self._encoded[-image_id, -object_id]

    def gather(self) -> None:
        """Puts those of all ranks into `fixed` and `worst`, the same on each. Collective."""
        found = all_gather((self.fixed, list(self._encoded.values())))
        self.fixed = {key: kept for fixed, _ in found for key, kept in fixed.items()}
        self.worst = sorted(kept for _, some in found for kept in some)[: self._num_worst]


MASK_CHUNK = 64


@dataclass
class Validation:
    """What a validation pass found.

    Attributes:
        metrics: `LOSS_NAMES` and `iou_predicted`, means over all masks of all ranks;
            `per_mask_iou` is at the original resolution.
        box_fill_iou: What filling each box would score.
        objects: One row for each mask of all ranks.
        selection: The masks that were kept to be looked at, of all ranks.
        bad_images: This rank's images that could not be read: name, what is wrong.
        rates: How fast it went, for the log.
    """

    metrics: dict[str, float]
    box_fill_iou: float
    objects: ObjectScores = field(default_factory=lambda: ObjectScores.concatenate([]))
    selection: MaskSelection | None = None
    bad_images: dict[str, str] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def validate(
    model: PromptedSam,
    batches: Iterable[Batch],
    *,
    loss: LossFunction,
    selection: MaskSelection | None = None,
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
        selection: Is offered every mask, for pictures.
        should_stop: Asked before each image on every rank; all stop if any says yes.
        waiting: Entered to wait for batches; raises `StopInterrupt` to end the wait.

    Returns:
        Means over all ranks.

    Raises:
        StopInterrupt: Any rank was asked to stop.
        UserError: An image cannot be read, on any rank.
    """
    means = {name: MaskMean() for name in (*LOSS_NAMES[:-1], "iou_predicted", "box_fill_iou")}
    means["per_mask_iou"] = PerMaskIoU()
    for mean in means.values():
        mean.update(torch.zeros(0))  # or torchmetrics warns of a rank that has no image
    objects: list[ObjectScores] = []
    bad_images: dict[str, str] = {}
    for batch in lockstep(batches, should_stop=should_stop, waiting=waiting):
        heartbeat.set_activity("validating on image", partial(list, batch.image_ids))
        bad_images.update(batch.bad_images)
        if batch.num_masks:  # none if the image cannot be read
            objects += _score_image(model, batch, loss=loss, means=means, selection=selection)
    metrics = {name: mean.compute().item() for name, mean in means.items()}
    table = gather_scores(ObjectScores.concatenate(objects))
    if selection is not None:
        selection.gather()
    return Validation(metrics, metrics.pop("box_fill_iou"), table, selection, bad_images)


def _score_image(
    model: PromptedSam,
    batch: Batch,
    *,
    loss: LossFunction,
    means: dict[str, MaskMean],
    selection: MaskSelection | None,
) -> list[ObjectScores]:
    moved = batch.to(model.sam.device, non_blocking=True)
    embedding = model.embed(moved.images, moved.input_sizes, cached=moved.embeddings)
    rows = []
    for part in torch.arange(batch.num_masks).split(MASK_CHUNK):
        scores = _score_masks(model, moved, embedding, part=part, loss=loss, selection=selection)
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
    selection: MaskSelection | None,
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
    masks = original_masks(logits, image_size=image_size, **batch.image_sizes)
    ious = []
    for k, mask in zip(part.tolist(), masks, strict=True):
        ious.append(cropped_iou(mask, batch.truths[k]))
        if selection is not None:
            key = batch.image_ids[0], int(batch.object_ids[k])
            both = ious[-1], float(iou_predicted[k - int(part[0])])
            selection.add(key, mask, ious=both, size=batch.image_sizes["original_size"])
    iou = torch.tensor(ious, dtype=torch.float64)
    values = (losses.total, losses.focal, losses.dice, losses.iou, iou)
    scores = dict(zip(LOSS_NAMES, values, strict=True))
    scores["iou_predicted"] = iou_predicted
    scores["box_fill_iou"] = box_fill_ious(boxes, truths, **batch.image_sizes)
    return scores
