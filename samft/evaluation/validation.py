"""Validates a model on every mask of a split: `validate`, and the few masks kept for pictures.

The IoU is that of `SamPredictor` with the same weights, at each image's original resolution. All
masks are scored, but only those that a `MaskSelection` asks for are kept.
"""

import contextlib
import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from samft.annotations.segmentation import CroppedMask, decode_encoded, encode_cropped
from samft.data.dataset import Batch
from samft.data.loaders import Waiting, lockstep
from samft.distributed import all_gather
from samft.errors import ConfigError, explain_out_of_memory
from samft.evaluation.metrics import (
    MaskMean,
    PerMaskIoU,
    box_fill_ious,
    cropped_iou,
    whole_mask,
)
from samft.evaluation.object_scores import ObjectScores, gather_scores
from samft.models.prompted_sam import PromptedSam, original_masks
from samft.models.prompts import Prompts
from samft.runtime import heartbeat
from samft.runtime.device import exact_float32
from samft.runtime.metrics_file import GENERAL_PREFIX
from samft.training.custom import MaskMetric
from samft.training.engine import LOSS_NAMES
from samft.training.losses import LossFunction

MASK_CHUNK = 64  # masks decoded and scored at once
_MEMORY_ADVICE = "Lower mask_chunk or image_size, or take a smaller model_type."


@dataclass(frozen=True, order=True)
class SelectedMask:
    """A predicted mask that was kept; the lower its IoU, the earlier in order."""

    iou_actual: float
    key: tuple[int, int]  # image id, object id
    iou_predicted: float = field(compare=False)
    rle: dict[str, Any] = field(compare=False)  # COCO's compressed RLE, original frame

    @property
    def mask(self) -> CroppedMask:
        """The mask, cropped tightly, original frame."""
        return decode_encoded(self.rle)


class MaskSelection:
    """Keeps the masks of chosen objects and the worst ones; never holds more than those.

    Args:
        fixed: Objects whose masks are always kept, as (image id, object id).
        num_worst: How many of the masks with the lowest IoU are kept.
    """

    def __init__(self, fixed: Iterable[tuple[int, int]], *, num_worst: int) -> None:
        self._fixed_keys, self._num_worst = frozenset(fixed), num_worst
        self.fixed: dict[tuple[int, int], SelectedMask] = {}
        self.worst: list[SelectedMask] = []  # filled by `gather`
        # Negated, so that the heap's smallest is the best of the worst: the next to be replaced.
        self._heap: list[tuple[float, int, int]] = []
        self._worst_so_far: dict[tuple[int, int], SelectedMask] = {}

    def add(
        self,
        key: tuple[int, int],
        mask: CroppedMask,
        *,
        ious: tuple[float, float],
        size: tuple[int, int],
    ) -> None:
        """Keeps a mask if its object is among the fixed ones, or if it is among the worst so far.

        Args:
            key: Image id, object id.
            mask: In the original frame.
            ious: Actual and predicted.
            size: H, W of the image.
        """
        entry = (-ious[0], -key[0], -key[1])
        has_room = len(self._heap) < self._num_worst
        is_bad = has_room or (self._num_worst > 0 and entry > self._heap[0])
        if key not in self._fixed_keys and not is_bad:
            return  # most masks: they are not even encoded
        rle = encode_cropped(mask, size)
        selected = SelectedMask(ious[0], key, ious[1], rle)
        if key in self._fixed_keys:
            self.fixed[key] = selected
        if is_bad:
            heapq.heappush(self._heap, entry)
            self._worst_so_far[key] = selected
            if len(self._heap) > self._num_worst:
                _, image_id, object_id = heapq.heappop(self._heap)
                del self._worst_so_far[-image_id, -object_id]

    def gather(self) -> None:
        """Fills `fixed` and `worst` with the masks of all ranks. Collective: every rank must call.

        Afterwards they are the same on each rank, whatever the number of ranks.
        """
        by_rank = all_gather((self.fixed, list(self._worst_so_far.values())))
        self.fixed = {key: mask for fixed, _ in by_rank for key, mask in fixed.items()}
        self.worst = sorted(mask for _, worst in by_rank for mask in worst)[: self._num_worst]


@dataclass
class Validation:
    """The result of a validation pass.

    Attributes:
        metrics: `LOSS_NAMES` and `iou_predicted`, means over all masks of all ranks;
            `per_mask_iou` is at the original resolution.
        box_fill_iou: Mean IoU of filling each box, over the same masks.
        objects: One row for each mask of all ranks.
        selection: The masks that were kept for pictures, of all ranks.
        bad_images: This rank's images that could not be read: name, reason.
        rates: Speed, for the log.
        general: That of the same weights on the general set; None if there is none.
    """

    metrics: dict[str, float]
    box_fill_iou: float
    objects: ObjectScores = field(default_factory=lambda: ObjectScores.concatenate([]))
    selection: MaskSelection | None = None
    bad_images: dict[str, str] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    general: "Validation | None" = None

    @property
    def general_metrics(self) -> dict[str, float]:
        """The metrics of the general set, by names of their own; empty without one."""
        metrics = self.general.metrics if self.general else {}
        return {f"{GENERAL_PREFIX}{name}": value for name, value in metrics.items()}

    @property
    def named_metrics(self) -> dict[str, float]:
        """`metrics` and `general_metrics`."""
        return self.metrics | self.general_metrics


@torch.no_grad()
@exact_float32()
def validate(
    model: PromptedSam,
    batches: Iterable[Batch],
    *,
    loss: LossFunction,
    custom_metrics: Mapping[str, MaskMetric] | None = None,
    selection: MaskSelection | None = None,
    source: str = "",
    should_stop: Callable[[], bool] = lambda: False,
    waiting: Waiting = contextlib.nullcontext,
) -> Validation:
    """Scores the model on every mask of a split. Collective: every rank must call.

    Always in exact float32, and at the resolution of the original image: the IoU is the one that
    stock `SamPredictor` gets with the same weights. Of an image that is seen through a window, too,
    the true mask is whole: what the window does not show is missed.

    Args:
        model: Not wrapped in DDP.
        batches: This rank's images, one per batch, with their true masks; ranks may have different
            numbers of images, or none.
        loss: `losses.mask_losses` with its weights set.
        custom_metrics: By name, further numbers of each mask, whose means are among the metrics.
        selection: Every mask is added to it; it decides which to keep.
        source: What errors put before "image", "general " say: other images may have equal ids.
        should_stop: Called before each image on every rank; all stop if it is true on any.
        waiting: Entered to wait for batches; raises `StopInterrupt` to end the wait.

    Returns:
        The same means, rows and selection on every rank.

    Raises:
        StopInterrupt: Any rank was asked to stop.
        UserError: An image cannot be read, on any rank.
    """
    custom = dict(custom_metrics or {})
    names = (*LOSS_NAMES[:-1], "iou_predicted", "box_fill_iou", *custom)
    means = {name: MaskMean() for name in names}
    means["per_mask_iou"] = PerMaskIoU()
    for mean in means.values():
        mean.update(torch.zeros(0))  # else torchmetrics warns on a rank that has no image
    rows: list[ObjectScores] = []
    bad_images: dict[str, str] = {}
    for batch in lockstep(batches, should_stop=should_stop, waiting=waiting):
        heartbeat.set_activity(f"validating on {source}image", partial(list, batch.image_ids))
        bad_images.update(batch.bad_images)
        if batch.num_masks:  # 0 if the image cannot be read
            describe = partial(describe_image, batch, source)
            with explain_out_of_memory(describe, advice=_MEMORY_ADVICE):
                for scores, objects in score_image(
                    model, batch, loss=loss, custom_metrics=custom, selection=selection
                ):
                    rows.append(objects)
                    for name, values in scores.items():
                        means[name].update(values)
    metrics = {name: mean.compute().item() for name, mean in means.items()}
    table = gather_scores(ObjectScores.concatenate(rows))
    if selection is not None:
        selection.gather()
    return Validation(metrics, metrics.pop("box_fill_iou"), table, selection, bad_images)


def describe_image(batch: Batch, source: str = "") -> str:
    """The image of a batch of one, for an error that needs memory for it; see `validate`."""
    return f"for {source}image {batch.image_ids[0]} with {batch.num_masks} objects"


def score_image(
    model: PromptedSam,
    batch: Batch,
    *,
    loss: LossFunction,
    custom_metrics: Mapping[str, MaskMetric] = MappingProxyType({}),
    selection: MaskSelection | None = None,
) -> Iterator[tuple[dict[str, Tensor], ObjectScores]]:
    """Scores a model on the objects of an image, `MASK_CHUNK` at a time; see `validate`.

    Args:
        model: On its device.
        batch: One image with objects, on the host; its embedding is used if it has any.
        loss: See `validate`.
        custom_metrics: See `validate`.
        selection: See `validate`.

    Yields:
        The values of each mask by name, [m] on the host, and a row for each.
    """
    on_device = batch.to(model.sam.device, non_blocking=True)
    embedding = model.embed(on_device.images, on_device.input_sizes, cached=on_device.embeddings)
    for start in range(0, batch.num_masks, MASK_CHUNK):
        part = slice(start, start + MASK_CHUNK)
        objects, on_device_part = batch.take_objects(part), on_device.take_objects(part)
        scores, masks = _score_logits(model, on_device_part, embedding, loss=loss, batch=objects)
        scores |= _score_masks(
            objects, masks, scores["iou_predicted"], custom=custom_metrics, selection=selection
        )
        yield scores, _score_rows(objects, scores)


def _score_logits(
    model: PromptedSam, on_device: Batch, embedding: Tensor, *, loss: LossFunction, batch: Batch
) -> tuple[dict[str, Tensor], Iterator[CroppedMask]]:
    # The losses and the predicted IoU of objects that are on the device and in a batch on the host,
    # and their masks. All numbers come to the host in one copy, which waits for the device.
    index = on_device.image_index
    logits, iou_predicted = model.decode(embedding, Prompts(boxes=on_device.boxes), index)
    losses = loss(
        logits,
        iou_predicted,
        targets=on_device.targets,
        windows=on_device.windows,
        image_index=index,
        input_sizes=on_device.input_sizes,
    )
    # A generator: one mask of the original resolution is in memory at a time.
    masks = original_masks(logits, **batch.image_sizes)
    values = torch.stack([losses.total, losses.focal, losses.dice, losses.iou, iou_predicted]).cpu()
    names = (*LOSS_NAMES[:-1], "iou_predicted")
    return dict(zip(names, values, strict=True)), masks


def _score_masks(
    batch: Batch,
    masks: Iterable[CroppedMask],
    iou_predicted: Tensor,
    *,
    custom: Mapping[str, MaskMetric],
    selection: MaskSelection | None,
) -> dict[str, Tensor]:
    ious, sizes = [], batch.image_sizes
    others: dict[str, list[float]] = {name: [] for name in custom}
    for row, (mask, truth) in enumerate(zip(masks, batch.truths, strict=True)):
        ious.append(cropped_iou(mask, truth))
        if custom:
            size = batch.file_size
            whole = whole_mask(mask, size), whole_mask(truth, size)
            for name, value in _measure_mask(*whole, custom).items():
                others[name].append(value)
        if selection is not None:
            key = batch.image_ids[0], int(batch.object_ids[row])
            both = ious[row], float(iou_predicted[row])
            selection.add(key, mask, ious=both, size=batch.file_size)
    return {
        "per_mask_iou": torch.tensor(ious, dtype=torch.float64),
        "box_fill_iou": box_fill_ious(batch.boxes, batch.truths, **sizes),
        **{name: torch.tensor(values, dtype=torch.float64) for name, values in others.items()},
    }


def _measure_mask(
    mask: NDArray[np.bool_], truth: NDArray[np.bool_], custom: Mapping[str, MaskMetric]
) -> dict[str, float]:
    values = {}
    for name, metric in custom.items():
        value = metric(mask, truth)
        try:
            values[name] = float(value)
        except (TypeError, ValueError) as error:
            kind = type(value).__name__
            raise ConfigError(f"metrics: '{name}' returned {kind}, not a number.") from error
    return values


def _score_rows(batch: Batch, scores: dict[str, Tensor]) -> ObjectScores:
    (image_id,) = batch.image_ids
    return ObjectScores(
        image_ids=np.full(batch.num_masks, image_id),
        object_ids=batch.object_ids.numpy(),
        areas=np.array([float(truth.mask.sum()) for truth in batch.truths]),
        iou_actual=scores["per_mask_iou"].numpy(),
        iou_predicted=scores["iou_predicted"].double().numpy(),
        iou_box_fill=scores["box_fill_iou"].numpy(),
    )
