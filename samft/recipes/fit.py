"""The loop of a run: training steps, and at each interval a validation, a save and a log line."""

import math
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from samft import distributed
from samft.checkpoints.top_k import make_sidecar
from samft.data.loaders import BatchLoader, prefetch_to_device
from samft.errors import DataError, TrainingError
from samft.evaluation.object_scores import describe_against_box_fill
from samft.evaluation.validation import Validation, validate
from samft.models.lora import adapter_state, merged_state
from samft.recipes.build import describe_adapter, images_per_step
from samft.recipes.prepare import RunParts
from samft.reports.validation_images import ValidationImages
from samft.runtime import heartbeat
from samft.runtime.device import peak_memory_gib
from samft.runtime.logs import LOGGER, RunLog, format_duration
from samft.runtime.metrics_file import GENERAL_PREFIX
from samft.runtime.signals import StopInterrupt
from samft.training.engine import Trainer, train
from samft.training.optim import gather_state, get_learning_rate


@dataclass(frozen=True, kw_only=True)
class TrainingRun(RunParts):
    """A run that has started: its parts, its open files, and what takes its steps.

    Attributes:
        log: Its metrics and log lines; open.
        images: The pictures and the scores of single objects of its validations.
        trainer: Takes optimizer steps with its model.
        train_batches: This rank's endless micro-batches, from the next step on.
        val_batches: This rank's share of the validation images.
        general_batches: This rank's share of the general set; None if there is none.
    """

    log: RunLog
    images: ValidationImages
    trainer: Trainer
    train_batches: BatchLoader
    val_batches: BatchLoader
    general_batches: BatchLoader | None


def fit(run: TrainingRun) -> bool:
    """Trains until the last step, or until any rank has to stop. Collective.

    Args:
        run: A run that has started.

    Returns:
        Whether the last step was reached, or a callback has ended the run before. Everything is
        saved in any case.

    Raises:
        UserError: An image cannot be read, on any rank.
        TrainingError: The run cannot continue, or its last state could not be saved.
    """
    config, progress = run.config, run.progress
    try:
        # Loader workers are forked, and a thread that writes a checkpoint or draws does not survive
        # that: so they start before the first save, and load while step 0 is validated.
        run.train_batches.start_workers()
        _check_general_set(run)
        if not progress.baseline:
            _validate_initial_weights(run)
        if progress.pending:  # the run was stopped within the validation of this step
            _finish_interval(run)
        with torch.autograd.set_detect_anomaly(config.detect_anomaly):
            finished = train(
                run.trainer,
                prefetch_to_device(run.train_batches, run.device),
                steps=config.steps,
                accumulate_steps=config.accumulate_steps,
                interval=config.metrics_interval,
                max_bad_steps=config.max_bad_steps,
                should_stop=lambda: run.stop_reason() is not None,
                waiting=run.stop.waiting,
                on_step=partial(_log_step, run),
                on_interval=partial(_end_interval, run),
            )
    except StopInterrupt:  # in a wait for data, or within a validation
        finished = False
    if not finished:
        _save_state(run)
    finished = finished or run.has_ended_early
    run.checkpointer.wait()
    if unsaved := run.checkpointer.unsaved:
        raise TrainingError(
            f"all steps are done, but {unsaved} Make room, and run again."
            if finished
            else f"stopped, and steps are lost: {unsaved}"
        )
    return finished


def _check_general_set(run: TrainingRun) -> None:
    # A run that goes on with another general set has no scores of it at step 0.
    progress, fingerprint = run.progress, run.splits.general_fingerprint
    if progress.general_set == fingerprint:
        return
    if progress.baseline:
        progress.general_since = run.logged_step + 1
        own = {n: v for n, v in progress.baseline.items() if not n.startswith(GENERAL_PREFIX)}
        progress.baseline = own
        progress.bad_images.pop("general", None)
        if fingerprint and distributed.is_main():  # a warning is for the other ranks' logs, too
            LOGGER.warning(
                "general_data_root: these images are others than before: what metrics.jsonl has of "
                "steps up to %d is not of them. At the end of the run, the untouched and the best "
                "weights are scored on them",
                run.logged_step,
            )
    progress.general_set = fingerprint


def _validate_initial_weights(run: TrainingRun) -> None:
    # Step 0: what the untouched checkpoint scores, which every later validation is compared with.
    validation = _validate_model(run)
    if not math.isfinite(validation.metrics["per_mask_iou"]):
        raise DataError(
            "the validation before the first step gives no number, so nothing would tell which "
            f"checkpoint is best: {_why_no_number(run, 'val')}. Check the validation split."
        )
    if validation.general and not math.isfinite(validation.general.metrics["per_mask_iou"]):
        raise DataError(
            f"general_data_root: the untouched weights have no score on it: "
            f"{_why_no_number(run, 'general')}. Check these images, or leave it out."
        )
    _log_validation(run, validation)
    run.progress.baseline = validation.named_metrics
    run.progress.box_fill_iou = validation.box_fill_iou
    LOGGER.info(
        "step 0: val_per_mask_iou %.4f before training, %s, which takes the box as the mask and "
        "needs no model",
        validation.metrics["per_mask_iou"],
        describe_against_box_fill(validation.metrics["per_mask_iou"], validation.box_fill_iou),
    )
    if validation.general:
        LOGGER.info(
            "step 0: general_per_mask_iou %.4f before training, on the data of general_data_root",
            validation.general.metrics["per_mask_iou"],
        )
    _save_state(run, validation)
    _call_callbacks(run, {}, validation)


def _why_no_number(run: TrainingRun, split: str) -> str:
    reasons = list(run.progress.bad_images.get(split, {}).values())
    return "; ".join(reasons[:3]) or "no object was scored"


def _log_step(run: TrainingRun, taken: bool, image_ids: list[int]) -> None:
    if taken:
        run.log.advance_bar()
        return
    LOGGER.warning(
        "after step %d: the gradient was not finite, so the step was skipped: see bad_steps.jsonl",
        run.progress.step,
    )
    ids_by_rank = distributed.all_gather(image_ids)
    run.log.write_bad_step(run.progress.step, position=run.progress.position, image_ids=ids_by_rank)


def _end_interval(run: TrainingRun, train_metrics: dict[str, float]) -> None:
    # Kept in `progress` until the validation is done: a stop within it must not lose them.
    run.progress.pending = {**train_metrics, "skipped_steps": run.progress.skipped_steps}
    _finish_interval(run)


def _finish_interval(run: TrainingRun) -> None:
    step, train_metrics = run.progress.step, run.progress.pending
    _collect_bad_images(run, "train", run.trainer.bad_images)
    validation = _validate_model(run)
    run.log.write_metrics(step, "train", train_metrics)
    _log_validation(run, validation)
    score = validation.metrics["per_mask_iou"]
    sidecar = make_sidecar(
        {**asdict(run.config), "correction_rounds": run.config.num_corrections},
        step=step,
        metrics=validation.metrics,
        pixels=run.splits.pixels.to_json(),
        view=run.splits.view.to_json(),
        adapter=describe_adapter(run.config),
    )
    sidecar["metrics"] |= validation.general_metrics
    if run.custom.loss_name is not None:
        sidecar["loss"] = run.custom.loss_name
    run.progress.pending = {}
    _count_stale(run, score)
    _save_state(run, validation, sidecar)
    _call_callbacks(run, train_metrics, validation)
    seconds_left = (run.config.steps - step) * (time.monotonic() - run.started_at) / max(step, 1)
    LOGGER.info(
        "step %d/%d: loss %.4f, train IoU %.4f, val IoU %.4f (%+.4f since step 0), "
        "%s%.1f images/s, %s left",
        step,
        run.config.steps,
        train_metrics["loss"],
        train_metrics["per_mask_iou"],
        score,
        score - run.progress.baseline["per_mask_iou"],
        _describe_general(run, validation),
        train_metrics["images_per_second"],
        format_duration(seconds_left),
    )


def _describe_general(run: TrainingRun, validation: Validation) -> str:
    if validation.general is None:
        return ""
    name = f"{GENERAL_PREFIX}per_mask_iou"
    score, before = validation.general_metrics[name], run.progress.baseline.get(name)
    since = "" if before is None else f" ({score - before:+.4f})"
    return f"general IoU {score:.4f}{since}, "


def _count_stale(run: TrainingRun, score: float) -> None:
    # Before the state is saved: a run that has ended is not gone on with by a later start.
    progress = run.progress
    improved = score > progress.best_score
    progress.best_score = max(progress.best_score, score)
    progress.stale_validations = 0 if improved else progress.stale_validations + 1
    if run.is_out_of_patience:
        LOGGER.info(
            "patience: the run ends after step %d, as %d validations in a row were no better than "
            "%.4f",
            progress.step,
            progress.stale_validations,
            progress.best_score,
        )


def _call_callbacks(
    run: TrainingRun, train_metrics: dict[str, float], validation: Validation
) -> None:
    # Collective, if there are any. On rank 0, as what writes files; what a callback raises ends the
    # run on all ranks.
    if not run.custom.callbacks:
        return
    lines = {"train": train_metrics, "val": {**validation.named_metrics, **validation.rates}}
    numbers = {
        f"{split}/{name}": value for split, line in lines.items() for name, value in line.items()
    }
    answers = [
        callback(run.progress.step, dict(numbers))
        for callback in (run.custom.callbacks if distributed.is_main() else ())
    ]
    if distributed.broadcast(any(answer is True for answer in answers)):
        run.progress.ended_early = True
        LOGGER.info("a callback ends the run after step %d", run.progress.step)


def _validate_model(run: TrainingRun) -> Validation:
    start = time.monotonic()
    validate_on = partial(
        validate,
        run.model,
        loss=run.trainer.loss,
        custom_metrics=run.custom.metrics,
        should_stop=lambda: bool(run.stop),
        waiting=run.stop.waiting,
    )
    with run.trainer.validated_weights():
        validation = validate_on(run.val_batches, selection=run.images.new_selection())
        seconds = time.monotonic() - start
        if run.general_batches is not None:
            validation.general = validate_on(run.general_batches, source="general ")
    _collect_bad_images(run, "val", validation.bad_images)
    if validation.general:
        _collect_bad_images(run, "general", validation.general.bad_images)
    counts = run.splits.counts["val"]
    rates = {
        "lr": get_learning_rate(run.trainer.optimizer),
        "images_per_second": counts["images"] / seconds,
        "masks_per_second": counts["masks"] / seconds,
        "peak_memory_gib": peak_memory_gib(run.device),
    }
    return replace(validation, rates=rates)


def _log_validation(run: TrainingRun, validation: Validation) -> None:
    line = {**validation.named_metrics, **validation.rates}
    run.log.write_metrics(run.progress.step, "val", line)


def _collect_bad_images(run: TrainingRun, split: str, bad_images: dict[str, str]) -> None:
    # Collective. Every image that any rank could not read is logged once.
    if run.config.on_bad_image == "skip":
        for bad_of_rank in distributed.all_gather(bad_images):
            for reason in run.progress.add_bad_images(split, bad_of_rank).values():
                LOGGER.info("%s, left out: %s", split, reason)


def _save_state(
    run: TrainingRun, validation: Validation | None = None, sidecar: dict[str, Any] | None = None
) -> None:
    # Collective: the sums of the current window and the optimizer's state are spread over ranks.
    run.progress.wall_seconds = time.monotonic() - run.started_at
    sums = distributed.all_reduce_sum(run.trainer.metric_sums.cpu().clone()).tolist()
    optimizer = gather_state(run.trainer.optimizer)
    if distributed.is_main():
        heartbeat.set_activity("saving")
        # The pictures come before the state: a run that resumes from it must find them.
        draw = (
            partial(run.images.record_validation, run.progress.step, validation)
            if validation
            else None
        )
        with run.trainer.validated_weights() as own_values:
            state = {
                "config": asdict(run.requested_config),
                "warmup_steps": run.config.warmup_steps,  # see `keep_schedule`
                "global_batch": images_per_step(run.config),
                "fingerprint": run.splits.fingerprint,
                "val_fingerprint": run.splits.val_fingerprint,
                "loss": run.custom.loss_name,
                "pixels": run.splits.pixels.to_json(),
                "view": run.splits.view.to_json(),
                "model": merged_state(run.model.sam),
                "adapters": adapter_state(run.model.sam),
                "own_values": own_values,
                "start_values": run.trainer.anchor.start_values() if run.trainer.anchor else {},
                "optimizer": optimizer,
                "scaler": run.trainer.scaler.state_dict(),
                "progress": {**asdict(run.progress), "window": sums},
                "metrics": run.log.metrics_state,
            }
            run.checkpointer.save(state, sidecar=sidecar, before_writing=draw)
    # With the long timeout: in the next step, the others would give up on a rank 0 that copies.
    distributed.barrier()
