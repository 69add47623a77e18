"""The loop: `train`, `train_step`, `validate`. Read this page first.

A step is one optimizer update over `accumulate_steps` micro-batches on every rank. Its losses are
summed over masks and divided by the number of masks of the whole step, so that one process or
many, accumulated or not, learn the same.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from samft.batch import Batch
from samft.distributed import agree, all_reduce_sum, get_world_size, raise_together, wrap
from samft.errors import TrainingError, UserError
from samft.losses import MaskLosses
from samft.metrics import MaskMean, PerMaskIoU, box_fill_ious, original_masks_iou, peak_memory_gib
from samft.progress import LOSS_NAMES, Progress
from samft.prompted import PromptedSam

MAX_BAD_STEPS = 5
MASK_CHUNK = 64


LossFunction = Callable[..., MaskLosses]


class Trainer:
    """A model, its optimizer, and how a step is taken with them."""

    def __init__(
        self,
        model: PromptedSam,
        optimizer: torch.optim.Optimizer,
        *,
        learning_rate_at: Callable[[int], float],
        loss: LossFunction,
        amp_dtype: torch.dtype | None = None,
        clip_grad_norm: float = 1.0,
        bf16_compress: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Wraps the model for data-parallel training. Collective: every rank must call.

        Args:
            model: On its device, with what is to stay frozen frozen.
            optimizer: Over the model's trainable parameters.
            learning_rate_at: The learning rate of a step, a pure function of the step.
            loss: `losses.mask_losses` with its weights and image size set.
            amp_dtype: Autocast to this type; None: float32. float16 brings a gradient scaler.
            clip_grad_norm: Largest gradient norm; 0: off.
            bf16_compress: Whether gradients travel between processes in bfloat16.
            progress: Where a resumed run goes on.
        """
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self.learning_rate_at = learning_rate_at
        self.amp_dtype, self.clip_grad_norm = amp_dtype, clip_grad_norm
        self.progress = progress or Progress()
        self.device = model.sam.device
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp_dtype is torch.float16)
        self.bad_images: dict[str, str] = {}  # that this rank's batches met: name, what is wrong
        self.window = torch.tensor(self.progress.window, dtype=torch.float64, device=self.device)
        self.wrapped = wrap(model, warm_up=self._throw_away_pass, bf16_compress=bf16_compress)

    def _throw_away_pass(self, wrapped: nn.Module) -> None:
        size = self.model.sam.image_encoder.img_size
        images = torch.zeros(1, 3, size, size, device=self.device)
        boxes = torch.tensor([[0.0, 0.0, size / 2, size / 2]], device=self.device)
        embeddings = None
        if self.model.encoder_is_frozen:  # it may be on another device, for good
            prompt_encoder = self.model.sam.prompt_encoder
            grid = prompt_encoder.image_embedding_size
            embeddings = images.new_zeros(1, prompt_encoder.embed_dim, *grid)
        with self._autocast():
            index = boxes.new_zeros(1, dtype=torch.int64)
            logits, iou = wrapped(images, boxes, index, embeddings=embeddings)
        (logits.float().sum() * 0 + iou.float().sum() * 0).backward()
        self.optimizer.zero_grad(set_to_none=True)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        enabled = self.amp_dtype is not None
        return torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=enabled)

    def train_step(self, micro_batches: list[Batch]) -> bool:
        """Takes one optimizer step. Collective: every rank must call.

        Args:
            micro_batches: This rank's share of the step.

        Returns:
            Whether the step was taken; False where the gradient was not finite, on all ranks alike.
        """
        counts = torch.tensor([sum(b.num_masks for b in micro_batches)], dtype=torch.float64)
        num_masks = all_reduce_sum(counts).item()
        learning_rate = self.learning_rate_at(self.progress.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        window = torch.zeros_like(self.window)
        # DDP averages over ranks, hence the world size.
        weight = torch.tensor(get_world_size() / max(num_masks, 1), device=self.device)
        for number, batch in enumerate(micro_batches):
            self.bad_images.update(batch.bad_images)
            with self._sync_gradients(number == len(micro_batches) - 1):
                total, losses = self._forward(batch.to(self.device, non_blocking=True), weight)
                self.scaler.scale(total * weight).backward()
            window += _sums(losses, num_images=len(batch.image_ids))
        taken = self._update()
        self.progress.position += 1
        if taken:
            self.window += window
            self.progress.step += 1
        return taken

    def _sync_gradients(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        # Both forward and backward must lie inside no_sync: a forward outside of it syncs.
        if last or not isinstance(self.wrapped, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.wrapped.no_sync()

    def _forward(self, batch: Batch, weight: Tensor) -> tuple[Tensor, MaskLosses]:
        with self._autocast():
            total, losses = self.wrapped(
                batch.images,
                batch.boxes,
                batch.image_index,
                input_sizes=batch.input_sizes,
                embeddings=batch.embeddings,
                loss=self.loss,
                targets=batch.targets,
                gradient=self.scaler.scale(weight),
            )
        return total, MaskLosses(*losses)

    def _update(self) -> bool:
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip_grad_norm or math.inf)
        finite = not agree(not bool(torch.isfinite(norm)))
        if finite:
            self.scaler.step(self.optimizer)
            self.progress.bad_steps = 0
        else:
            self.progress.skipped_steps += 1
            # A scaler finds its scale by overflowing now and then: that is no bad step.
            settled = not self.scaler.is_enabled() or self.scaler.get_scale() <= 1
            self.progress.bad_steps += settled
        if self.scaler.is_enabled():
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.progress.bad_steps >= MAX_BAD_STEPS:
            raise TrainingError(
                f"the gradient was not finite {MAX_BAD_STEPS} times in a row after step "
                f"{self.progress.step}: lower learning_rate, or set amp to bf16 or off. "
                "The checkpoints written so far are whole."
            )
        return finite

    def take_window(self) -> dict[str, float]:
        """Mean losses and IoU over the masks since the last call, and rates. Collective.

        Returns:
            `LOSS_NAMES`, `lr` of the last step, `images_per_second`, `masks_per_second`.
        """
        *sums, masks, images = all_reduce_sum(self.window.cpu()).tolist()
        seconds = max(self.progress.window_seconds, 1e-9)
        values = {name: s / max(masks, 1) for name, s in zip(LOSS_NAMES, sums, strict=True)}
        values["lr"] = self.optimizer.param_groups[0]["lr"]
        values["images_per_second"] = images / seconds
        values["masks_per_second"] = masks / seconds
        values["peak_memory_gib"] = peak_memory_gib(self.device)
        self.progress.train_images += int(images)
        self.window.zero_()
        self.progress.window_seconds = 0.0
        return values


def train(
    trainer: Trainer,
    batches: Iterable[Batch],
    *,
    steps: int,
    accumulate_steps: int,
    interval: int,
    should_stop: Callable[[], bool],
    on_step: Callable[[bool], None],
    on_interval: Callable[[dict[str, float]], None],
) -> bool:
    """Trains until the last step, or until any rank is asked to stop. Collective.

    Args:
        trainer: Knows how to take a step; its progress says where to begin.
        batches: This rank's endless micro-batches, from that position on.
        steps: Optimizer steps of the whole run.
        accumulate_steps: Micro-batches of a step.
        interval: Call `on_interval` every so many steps, and after the last.
        should_stop: Asked before each step on every rank; all stop if any says yes.
        on_step: Called after each step with whether it was taken.
        on_interval: Called with the window's metrics; validates, saves, logs.

    Returns:
        Whether the last step was reached.

    Raises:
        UserError: An image cannot be read, on any rank.
        TrainingError: The gradient was not finite too many times in a row.
    """
    progress, stream = trainer.progress, iter(batches)
    while progress.step < steps:
        started = time.monotonic()
        micro_batches, error = _fetch(stream, accumulate_steps)
        if agree(should_stop() or error is not None):
            raise_together(error)
            return False
        taken = trainer.train_step(micro_batches)
        seconds = time.monotonic() - started
        progress.window_seconds += seconds
        progress.train_seconds += seconds
        on_step(taken)
        if taken and (progress.step % interval == 0 or progress.step == steps):
            on_interval(trainer.take_window())
    return True


def _fetch(stream: Iterator[Batch], count: int) -> tuple[list[Batch], UserError | None]:
    try:
        return list(islice(stream, count)), None
    except UserError as error:  # say, a broken image: the other ranks must hear of it
        return [], error


@dataclass
class Validation:
    """What a validation pass found.

    Attributes:
        metrics: `LOSS_NAMES` and `iou_predicted`, means over all masks of all ranks;
            `per_mask_iou` is at the original resolution.
        box_fill_iou: What filling each box would score.
        shown: Rank 0's first images with their mask logits, for pictures.
        bad_images: This rank's images that could not be read: name, what is wrong.
    """

    metrics: dict[str, float]
    box_fill_iou: float
    shown: list[tuple[Batch, Tensor]]
    bad_images: dict[str, str] = field(default_factory=dict)


@torch.no_grad()
def validate(
    model: PromptedSam, batches: Iterable[Batch], *, loss: LossFunction, num_shown: int = 0
) -> Validation:
    """Scores the model on every mask of a split. Collective: every rank must call.

    Always in float32, and at the resolution of the original image: the IoU is the one that stock
    `SamPredictor` gets with the same weights.

    Args:
        model: Not wrapped; ranks may hold different numbers of images, or none.
        batches: This rank's images, one a batch, with their truths.
        loss: `losses.mask_losses` with its weights and image size set.
        num_shown: Images to keep for pictures.

    Returns:
        Means over all ranks.

    Raises:
        UserError: An image cannot be read, on any rank.
    """
    means = {name: MaskMean() for name in (*LOSS_NAMES[:-1], "iou_predicted", "box_fill_iou")}
    means["per_mask_iou"] = PerMaskIoU()
    for mean in means.values():
        mean.update(torch.zeros(0))  # or torchmetrics warns of a rank that has no image
    shown: list[tuple[Batch, Tensor]] = []
    bad_images: dict[str, str] = {}
    stream = iter(batches)
    fetched, error = _fetch(stream, 1)
    while fetched:
        batch = fetched[0]
        bad_images.update(batch.bad_images)
        if batch.num_masks:  # none if the image cannot be read
            logits = _score_image(model, batch, loss=loss, means=means)
            if len(shown) < num_shown:
                shown.append((batch, logits.cpu()))
        fetched, error = _fetch(stream, 1)
    raise_together(error)
    metrics = {name: mean.compute().item() for name, mean in means.items()}
    return Validation(metrics, metrics.pop("box_fill_iou"), shown, bad_images)


def _score_image(
    model: PromptedSam, batch: Batch, *, loss: LossFunction, means: dict[str, MaskMean]
) -> Tensor:
    moved = batch.to(model.sam.device, non_blocking=True)
    embedding = model.embed(moved.images, moved.input_sizes, cached=moved.embeddings)
    chunks = []
    for part in torch.arange(batch.num_masks).split(MASK_CHUNK):
        logits, scores = _score_masks(model, moved, embedding, part=part, loss=loss)
        for name, values in scores.items():
            means[name].update(values.cpu())
        chunks.append(logits)
    return torch.cat(chunks)


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


def _sums(losses: MaskLosses, *, num_images: int) -> Tensor:
    parts = (losses.total, losses.focal, losses.dice, losses.iou, losses.iou_actual)
    sums = torch.stack([part.detach().sum(dtype=torch.float64) for part in parts])
    return torch.cat([sums, sums.new_tensor([len(losses.total), num_images])])
