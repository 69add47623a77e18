"""The training loop: `train`, and `Trainer.train_step`. Read this page first, then `validation`.

A step is one optimizer update over `accumulate_steps` micro-batches on every rank. Its losses are
summed over masks and divided by the number of masks of the whole step, so one process or many,
accumulated or not, learn the same.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from samft.data.dataset import Batch
from samft.data.loaders import Waiting, fetch_batches
from samft.distributed import (
    all_reduce_sum,
    any_rank,
    backward,
    get_world_size,
    raise_on_all_ranks,
    wait_for_device,
    wrap_ddp,
)
from samft.errors import TrainingError, explain_out_of_memory
from samft.models.prompted_sam import PromptedSam
from samft.runtime import heartbeat
from samft.runtime.device import exact_float32, peak_memory_gib
from samft.training.anchor import Anchor
from samft.training.averaging import WeightAverage
from samft.training.losses import LossFunction, MaskLosses
from samft.training.optim import get_learning_rate, set_learning_rate
from samft.training.prompt_schedule import PromptSchedule

LOSS_NAMES = ("loss", "loss_focal", "loss_dice", "loss_iou", "per_mask_iou")
# With clicks, `LOSS_NAMES` are means over the rounds, weighted as the loss is. Besides, the IoU of
# the first and of the last round:
ROUND_NAMES = ("first_round_iou", "last_round_iou")
MEMORY_ADVICE = (
    "Lower batch_size (and raise accumulate_steps), max_masks_per_image, image_size or mask_chunk, "
    "or take `--activation_checkpointing blocks`."
)
OPTIMIZER_ADVICE = (
    "From its first step on, AdamW keeps two values beside each trained one: freeze a part of the "
    f"model, or share them among processes with `--optimizer_sharding`. {MEMORY_ADVICE}"
)
LOADING_ADVICE = f"Lower num_workers if it is the host's. {MEMORY_ADVICE}"


@dataclass
class Progress:
    """How far a run has come: counters that `last.ckpt` stores beside the weights.

    Plain values only, so `last.ckpt` can be loaded with `weights_only=True`.

    Attributes:
        step: Optimizer steps taken.
        position: Global batches consumed; more than `step` where a step was skipped.
        bad_steps: Steps skipped in a row, up to now.
        skipped_steps: Steps skipped in all.
        window: Sums over the masks since the last train line: `LOSS_NAMES`, with clicks
            `ROUND_NAMES`, then masks, images.
        window_seconds: Seconds of training since the last train line.
        train_seconds: Seconds of training in all, without validation and saving.
        train_images: Images trained on in all.
        wall_seconds: Seconds since the start, without the time between a stop and its resume.
        baseline: Validation metrics of the untouched checkpoint; empty until step 0 is validated.
        box_fill_iou: Mean IoU of filling each box of the validation set.
        bad_images: By split, the images that could not be read: file name to reason.
        pending: The train line of an interval whose validation was interrupted; else empty.
        best_score: The highest validation score so far, but for that of step 0.
        stale_validations: Validations since then.
        ended_early: Whether a callback has ended the run before its last step.
        general_set: Fingerprint of the general set, see `Splits`; empty: there is none.
        general_since: The first step that was validated on it; later than 0 where a resumed run was
            given another one.
    """

    step: int = 0
    position: int = 0
    bad_steps: int = 0
    skipped_steps: int = 0
    window: list[float] = field(default_factory=list)  # empty before the first step
    window_seconds: float = 0.0
    train_seconds: float = 0.0
    train_images: int = 0
    wall_seconds: float = 0.0
    baseline: dict[str, float] = field(default_factory=dict)
    box_fill_iou: float = math.nan
    bad_images: dict[str, dict[str, str]] = field(default_factory=dict)
    pending: dict[str, float] = field(default_factory=dict)
    best_score: float = -math.inf
    stale_validations: int = 0
    ended_early: bool = False
    general_set: str = ""
    general_since: int = 0

    def add_bad_images(self, split: str, bad_images: dict[str, str]) -> dict[str, str]:
        """Adds images that could not be read; returns those that were not known yet."""
        known = self.bad_images.setdefault(split, {})
        new = {name: reason for name, reason in bad_images.items() if name not in known}
        known.update(new)
        return new


def train(
    trainer: "Trainer",
    batches: Iterable[Batch],
    *,
    steps: int,
    accumulate_steps: int,
    interval: int,
    max_bad_steps: int = 5,
    should_stop: Callable[[], bool],
    waiting: Waiting = contextlib.nullcontext,
    on_step: Callable[[bool, list[int]], None],
    on_interval: Callable[[dict[str, float]], None],
) -> bool:
    """Trains until the last step, or until any rank is asked to stop. Collective.

    Args:
        trainer: Takes the steps; its progress says where to begin.
        batches: This rank's endless micro-batches, from that position on.
        steps: Optimizer steps of the whole run.
        accumulate_steps: Micro-batches per step.
        interval: Call `on_interval` every so many steps, and after the last.
        max_bad_steps: Skip no more steps in a row whose gradient is not finite.
        should_stop: Asked before each step on every rank; all stop if any says yes.
        waiting: Entered to wait for batches; raises `StopInterrupt` to end the wait.
        on_step: Called after each step with whether it was taken, and this rank's image ids.
        on_interval: Called with the metrics since its last call; validates, saves, logs.

    Returns:
        Whether the last step was reached.

    Raises:
        UserError: An image cannot be read, on any rank.
        TrainingError: The gradient was not finite too many times in a row.
    """
    progress, stream = trainer.progress, iter(batches)
    while progress.step < steps:
        start = time.monotonic()
        heartbeat.set_step(progress.step)
        # All micro-batches of the step at once: their masks are counted before the first forward
        with explain_out_of_memory(_describe_loading, advice=LOADING_ADVICE):
            micro_batches, error = fetch_batches(stream, accumulate_steps, waiting)
        # One rank cannot leave alone, the others would wait for it in the next all-reduce
        if any_rank(should_stop() or error is not None, in_step=True):
            raise_on_all_ranks(error)
            return False
        taken = trainer.train_step(micro_batches)
        seconds = time.monotonic() - start
        progress.window_seconds += seconds
        progress.train_seconds += seconds
        on_step(taken, [image_id for batch in micro_batches for image_id in batch.image_ids])
        if progress.bad_steps > max_bad_steps:
            raise TrainingError(
                f"the gradient was not finite {progress.bad_steps} times in a row after step "
                f"{progress.step}: lower learning_rate, or set amp to bf16 or off."
            )
        # A skipped step leaves `step` where it was, and must not repeat the interval's lines
        if taken and (progress.step % interval == 0 or progress.step == steps):
            on_interval(trainer.pop_metrics())
    return True


class Trainer:
    """A model with its optimizer, and how a step is taken with them.

    Attributes:
        model: The model itself, as it is validated and saved.
        ddp_model: The same, wrapped in DistributedDataParallel if there are several processes.
        optimizer: Over the trainable parameters.
        progress: How far the run has come.
        metric_sums: float64, this rank's part of `Progress.window`, on the device.
        bad_images: What this rank's batches could not read: file name to reason.
    """

    def __init__(
        self,
        model: PromptedSam,
        optimizer: torch.optim.Optimizer,
        *,
        learning_rate_at: Callable[[int], float],
        loss: LossFunction,
        prompts: PromptSchedule | None = None,
        amp_dtype: torch.dtype | None = None,
        clip_grad_norm: float = 1.0,
        ema_decay: float = 0.0,
        anchor_weight: float = 0.0,
        bf16_compress: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Wraps the model for data-parallel training. Collective: every rank must call.

        Args:
            model: On its device, with its frozen parts frozen.
            optimizer: Over the model's trainable parameters.
            learning_rate_at: The learning rate of a step, a pure function of the step.
            loss: `losses.mask_losses` with its weights set.
            prompts: What steps prompt with; None: with the boxes, once.
            amp_dtype: Autocast to this type; None: exact float32. float16 brings a gradient scaler.
            clip_grad_norm: Largest gradient norm; 0: off.
            ema_decay: See `WeightAverage`; 0: off.
            anchor_weight: See `Anchor`; 0: off.
            bf16_compress: Whether gradients travel between processes in bfloat16.
            progress: Of a run that is resumed; None for a fresh one.
        """
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self.prompts = prompts if prompts is not None and prompts.has_clicks else None
        self.names = (*LOSS_NAMES, *(ROUND_NAMES if self.prompts else ()))
        self.learning_rate_at = learning_rate_at
        self.amp_dtype, self.clip_grad_norm = amp_dtype, clip_grad_norm
        self.progress = progress or Progress()
        self.device = model.sam.device
        trained = {name: p for name, p in model.sam.named_parameters() if p.requires_grad}
        self.parameters = list(trained.values())
        self.average = WeightAverage(trained, decay=ema_decay) if ema_decay else None
        self.anchor = Anchor(trained, weight=anchor_weight) if anchor_weight else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp_dtype is torch.float16)
        self.bad_images: dict[str, str] = {}
        # On the device: reading the losses of every step would make the host wait for the GPU
        window = self.progress.window or [0.0] * (len(self.names) + 2)
        self.metric_sums = torch.tensor(window, dtype=torch.float64, device=self.device)
        # Where NCCL allocates its buffers
        with explain_out_of_memory(lambda: "to begin training", advice=MEMORY_ADVICE):
            self.ddp_model = wrap_ddp(model, warm_up=self._warmup_pass, bf16_compress=bf16_compress)

    @exact_float32()
    def train_step(self, micro_batches: list[Batch]) -> bool:
        """Takes one optimizer step. Collective: every rank must call.

        Args:
            micro_batches: This rank's share of the step.

        Returns:
            Whether the step was taken; False where the gradient was not finite, on all ranks alike.
        """
        # Normalise by the masks of the whole step, over micro-batches and ranks: a mean per
        # micro-batch would weigh the masks of crowded images less than those of sparse ones
        counts = torch.tensor([sum(b.num_masks for b in micro_batches)], dtype=torch.float64)
        num_masks = all_reduce_sum(counts, in_step=True).item()
        # DDP averages gradients over ranks, hence the world size; a step may have no mask at all.
        # Filled on the device: a number that is copied there would make the host wait for it.
        weight = torch.full((), get_world_size() / max(num_masks, 1), device=self.device)

        # The schedule is a function of the step, so a resumed run needs no state of it
        set_learning_rate(self.optimizer, self.learning_rate_at(self.progress.step))

        step_sums = torch.zeros_like(self.metric_sums)
        for number, batch in enumerate(micro_batches):
            heartbeat.set_activity("training on images", partial(list, batch.image_ids))
            self.bad_images.update(batch.bad_images)
            # Gradients are sent between processes in the last backward of the step only
            is_last = number == len(micro_batches) - 1
            with self._sync_gradients(is_last), _explain_batch_memory(batch):
                batch = batch.to(self.device, non_blocking=True)
                total, losses = self._forward(batch, weight, position=self.progress.position)
                backward(self.scaler.scale(total * weight))
            step_sums += _sum_columns(losses, num_images=len(batch.image_ids))

        with explain_out_of_memory(lambda: "for the optimizer's step", advice=OPTIMIZER_ADVICE):
            taken = self._update()
        self.progress.position += 1  # the batch is consumed either way
        if taken:
            self.metric_sums += step_sums
            self.progress.step += 1
            if self.average is not None:
                self.average.update(self.progress.step)
        return taken

    def validated_weights(self) -> contextlib.AbstractContextManager[dict[str, Tensor]]:
        """A block in which the model has the weights that are validated and saved.

        Yields:
            What is trained has other values outside of the block, by name: those that the next
            step goes on from. Empty without an average.
        """
        return self.average.applied() if self.average else contextlib.nullcontext({})

    def _forward(
        self, batch: Batch, weight: Tensor, *, position: int | None
    ) -> tuple[Tensor, list[Tensor]]:
        # Returns the sum of the loss, and what `self.names` are the means of, [M] each.
        rounds = None
        if self.prompts is not None:
            assert batch.click_draws is not None, "the dataset draws as many as num_clicks says"
            rounds = self.prompts.rounds_at(position, click_draws=batch.click_draws, loss=self.loss)
        # Through the wrapper, or DDP would not see the backward. The loss is computed inside of
        # the model, chunk by chunk, so it has to know what the total is multiplied by afterwards.
        with self._autocast():
            total, losses = self.ddp_model(
                batch.images,
                batch.boxes,
                batch.image_index,
                input_sizes=batch.input_sizes,
                embeddings=batch.embeddings,
                loss=self.loss,
                targets=batch.targets,
                windows=batch.windows,
                gradient=self.scaler.scale(weight),
                rounds=rounds,
            )
        return total, _columns_of(losses)

    def _update(self) -> bool:
        # Clips, steps, and drops the gradients; False if the step was skipped.
        self.scaler.unscale_(self.optimizer)  # before clipping, which means true gradients
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip_grad_norm or math.inf)
        wait_for_device(self.device)
        # The norm is not finite if any gradient is not. After DDP's averaging all ranks should see
        # the same; but if only some of them skipped a step, their weights would differ for good.
        finite = not any_rank(not bool(torch.isfinite(norm)), in_step=True)
        if finite:
            if self.anchor is not None:  # before the step, as AdamW decays
                self.anchor.pull(self.optimizer)
            self.scaler.step(self.optimizer)
            self.progress.bad_steps = 0
        else:
            self.progress.skipped_steps += 1
            # A scaler finds its scale by overflowing now and then: that is no bad step.
            settled = not self.scaler.is_enabled() or self.scaler.get_scale() <= 1
            self.progress.bad_steps += settled
        if self.scaler.is_enabled():
            self.scaler.update()
        # Free the gradients' memory before the next batch needs it.
        self.optimizer.zero_grad(set_to_none=True)
        return finite

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        enabled = self.amp_dtype is not None
        return torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=enabled)

    def _sync_gradients(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        # Both forward and backward must lie inside no_sync: a forward outside of it syncs.
        if last or not isinstance(self.ddp_model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.ddp_model.no_sync()

    def _warmup_pass(self, ddp_model: nn.Module) -> None:
        # One forward and backward on an empty image, with zero gradients, after which DDP has its
        # final gradient buckets: see `wrap_ddp`.
        size = self.model.frame_size
        images = torch.zeros(1, 3, *size, device=self.device)
        boxes = torch.tensor([[0.0, 0.0, size[1] / 2, size[0] / 2]], device=self.device)
        embeddings = None
        if self.model.frozen_shape is not None:  # if cached, what is frozen stays on the CPU
            embeddings = images.new_zeros(1, *self.model.frozen_shape)
        forward = partial(
            ddp_model, images, boxes, boxes.new_zeros(1, dtype=torch.int64), embeddings=embeddings
        )
        with self._autocast():
            if self.prompts is None:
                logits, iou = forward()
                total = logits.float().sum() + iou.float().sum()
            else:  # clicks reach other parameters, and these only in the loss
                draws = boxes.new_zeros(1, self.prompts.corrections + 1, 2)
                total, _ = forward(
                    input_sizes=torch.tensor([size], device=self.device),
                    loss=self.loss,
                    targets=torch.full((1, 1, 1), 255, dtype=torch.uint8, device=self.device),
                    windows=boxes,
                    rounds=self.prompts.rounds_at(0, click_draws=draws, loss=self.loss),
                )
        backward(total * 0)
        self.optimizer.zero_grad(set_to_none=True)

    @exact_float32()
    def probe_memory(self, batch: Batch) -> None:
        """One forward and backward pass that leaves nothing behind but the peak of memory.

        Collective: every rank must call.

        Args:
            batch: As large as any of the run.

        Raises:
            TrainingError: It does not fit.
        """
        weight = torch.tensor(1 / max(batch.num_masks, 1), device=self.device)
        with _explain_batch_memory(batch):
            # As much as AdamW's two moments, which the optimizer allocates in its first step.
            missing = [] if self.optimizer.state else self.parameters * 2
            moments = [torch.empty_like(parameter) for parameter in missing]
            total, _ = self._forward(batch.to(self.device), weight, position=None)
            backward(total * weight)
            wait_for_device(self.device)
            del moments
        self.optimizer.zero_grad(set_to_none=True)

    def pop_metrics(self) -> dict[str, float]:
        """Returns the metrics since the last call, and resets their sums. Collective.

        Returns:
            Means over the masks of all ranks of `LOSS_NAMES` and, with clicks, `ROUND_NAMES`; `lr`
            of the last step, `images_per_second`, `masks_per_second`, and `peak_memory_gib`.
        """
        wait_for_device(self.device)
        *sums, masks, images = all_reduce_sum(self.metric_sums.cpu()).tolist()
        seconds = max(self.progress.window_seconds, 1e-9)
        metrics = {name: s / max(masks, 1) for name, s in zip(self.names, sums, strict=True)}
        metrics["lr"] = get_learning_rate(self.optimizer)
        metrics["images_per_second"] = images / seconds
        metrics["masks_per_second"] = masks / seconds
        metrics["peak_memory_gib"] = peak_memory_gib(self.device)
        self.progress.train_images += int(images)
        self.metric_sums.zero_()
        self.progress.window_seconds = 0.0
        return metrics


def _describe_loading() -> str:
    return f"to load images {heartbeat.loading_images()}"


def _explain_batch_memory(batch: Batch) -> contextlib.AbstractContextManager[None]:
    def describe() -> str:
        named = ", ".join(str(image_id) for image_id in batch.image_ids)
        size = f"{len(batch.image_ids)} images with {batch.num_masks} objects"
        return f"for a batch of {size} (image ids {named})"

    return explain_out_of_memory(describe, advice=MEMORY_ADVICE)


def _columns_of(losses: Sequence[Tensor]) -> list[Tensor]:
    # In the order of LOSS_NAMES, and of ROUND_NAMES where the model had rounds.
    count = len(MaskLosses._fields)
    starts = range(0, len(losses), count)
    means, *of_rounds = (MaskLosses(*losses[start : start + count]) for start in starts)
    own = [means.total, means.focal, means.dice, means.iou, means.iou_actual]
    return own + [part.iou_actual for part in of_rounds]


def _sum_columns(columns: list[Tensor], *, num_images: int) -> Tensor:
    # float64, as `Progress.window`: the columns, number of masks, number of images.
    sums = [column.detach().sum(dtype=torch.float64) for column in columns]
    counts = [sums[0].new_full((), number) for number in (len(columns[0]), num_images)]
    return torch.stack([*sums, *counts])
