"""Runs a training: prepare, start, fit, finish, and status.json however it ends."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from samft import distributed
from samft.checkpoints.async_saver import Checkpointer
from samft.checkpoints.training_state import LAST_NAME, quarantine_damaged
from samft.cli import exit_code
from samft.config import TrainConfig
from samft.data.loaders import batch_by_objects
from samft.errors import EXIT_STOPPED, RunStopped, TrainingError, explain_host_error
from samft.models.lora import load_adapter_state, merge_adapters
from samft.recipes.build import build_loaders, build_trainer, images_per_step
from samft.recipes.dry_run import dry_run
from samft.recipes.embedding_cache import EmbeddingCache, open_cache
from samft.recipes.final_test import SUMMARY_NAME, score_general_set, score_test_split
from samft.recipes.fit import TrainingRun, fit
from samft.recipes.prepare import RunParts, prepare, write_run_status
from samft.recipes.report import RunReport, dataset_name
from samft.reports.trackers import open_trackers
from samft.reports.validation_images import ValidationImages
from samft.runtime import heartbeat
from samft.runtime.device import (
    check_device,
    deterministic_algorithms,
    freed_memory_kept,
    pick_amp_dtype,
    pick_device,
)
from samft.runtime.files import write_json, write_text
from samft.runtime.heartbeat import explain_distributed_errors
from samft.runtime.logs import FILES_ONLY, LOGGER, RunLog, logging_to_terminal
from samft.runtime.output_dir import (
    archive_previous_run,
    create_writable_dir,
    lock_output_dir,
)
from samft.runtime.own_files import CONFIG_NAME
from samft.runtime.signals import StopRequest
from samft.settings import has_settings, split_names, to_yaml
from samft.training.custom import CustomParts
from samft.training.optim import load_state


def run(
    config: TrainConfig, stop: StopRequest, custom: CustomParts | None = None
) -> dict[str, Any]:
    """Trains as configured. Collective: every rank must call.

    Args:
        config: The checked configuration.
        stop: Tells whether a signal has asked to stop.
        custom: What a caller of `finetune` brings along; the same on all ranks.

    Returns:
        What `summary.json` holds; of a dry run, see `dry_run`.

    Raises:
        UserError: The configuration, the data or the checkpoint cannot be used.
        RunStopped: A signal, `stop_after` or the job's time limit ended the run; all is saved.
        TrainingError: The run cannot continue.
    """
    output_dir = Path(config.output_dir).expanduser()
    with (
        deterministic_algorithms(config.deterministic),
        _joined_group(config, output_dir, stop) as device,
        freed_memory_kept(device),
        logging_to_terminal(distributed.get_rank()),
        heartbeat.posting(stop),
        contextlib.ExitStack() as open_until_end,
    ):
        with _record_failure(output_dir, is_locked=False):
            distributed.run_on_all_ranks(lambda: check_device(device))
            if config.dry_run:
                return dry_run(config, device, custom=custom, should_stop=lambda: bool(stop))
            open_until_end.enter_context(_hold_output_dir(output_dir, stop))
        with _record_failure(output_dir):
            parts = prepare(config, output_dir, device, stop=stop, custom=custom)
            # An earlier run's files have not been touched until here; now they are archived.
            cache = open_until_end.enter_context(_open_cache(parts))
            if distributed.any_rank(bool(stop)):
                raise _record_early_stop(parts)
            log = open_until_end.enter_context(contextlib.closing(_open_log(parts)))
        with _record_failure(output_dir, parts):
            training = start(parts, log, cache)
            if training is None:
                raise _record_stop(parts, "the embeddings encoded so far are kept")
            if not fit(training):
                step = training.progress.step
                raise _record_stop(parts, f"saved after step {step} of {config.steps}")
            return finish(training)


def start(parts: RunParts, log: RunLog, cache: EmbeddingCache) -> TrainingRun | None:
    """Starts a new run, or continues the one that is resumed. Collective.

    Args:
        parts: From `prepare`.
        log: The open log of the run.
        cache: Of the embeddings; it is filled.

    Returns:
        The run, ready for its next step; None if it was asked to stop while images were encoded.

    Raises:
        UserError: The cache of embeddings cannot be used.
        TrainingError: With `probe_memory`: the largest batch does not fit into memory.
    """
    config, model, splits, resume = parts.config, parts.model, parts.splits, parts.resume
    if distributed.is_main() and resume is not None:
        if not parts.resumes_in_place:
            parts.checkpointer.top_k.copy_from(resume.output_dir)
        if resume.problems:
            quarantine_damaged(parts.output_dir, used=resume.path)
    _log_setup(parts)
    if distributed.is_main():
        _write_config(parts)
        write_run_status(parts.output_dir, "running", parts.progress.step)
    if not cache.fill():
        return None
    trainer = build_trainer(config, model, progress=parts.progress, loss=parts.custom.loss)
    if resume is not None:
        load_state(trainer.optimizer, resume.state.pop("optimizer"))
        trainer.scaler.load_state_dict(resume.state.pop("scaler"))
        load_adapter_state(model.sam, resume.state.pop("adapters", {}))
        if trainer.average is not None:
            trainer.average.restore(resume.state.pop("own_values"))
        if trainer.anchor is not None:
            trainer.anchor.restore(resume.state.pop("start_values"))
    train_batches, val_batches, general_batches = build_loaders(
        config, splits, start_step=parts.progress.position, device=parts.device
    )
    if config.probe_memory:
        trainer.probe_memory(batch_by_objects(splits.train, config.batch_size, share=1.0))
    images = ValidationImages(
        parts.output_dir,
        splits.val.subset,
        log,
        resumed_from=parts.source_dir,
        start_step=parts.logged_step,
    )
    return TrainingRun(
        **vars(parts),
        log=log,
        images=images,
        trainer=trainer,
        train_batches=train_batches,
        val_batches=val_batches,
        general_batches=general_batches,
    )


def finish(training: TrainingRun) -> dict[str, Any]:
    """Writes the summary and the report of a run that has taken its last step. Collective.

    Args:
        training: The run, with everything saved.

    Returns:
        What `summary.json` holds.

    Raises:
        TrainingError: `summary.json` cannot be written.
    """
    config, progress = training.config, training.progress
    merge_adapters(training.model.sam)  # it gets other weights below, by SAM's own keys
    test, has_new_test = score_test_split(training)
    general, has_new_general = score_general_set(training)
    ranked = training.checkpointer.top_k.best
    progress.wall_seconds = time.monotonic() - training.started_at
    report = RunReport(
        config=config,
        output_dir=training.output_dir,
        splits=training.splits,
        images=training.images,
        best=ranked[0] if ranked else None,
        custom=training.custom,
        test=test,
        general=general,
        has_news=training.images.has_validation or has_new_test or has_new_general,
    )
    summary: dict[str, Any] = distributed.broadcast(report.summarise(progress))
    if distributed.is_main():
        try:
            write_json(training.output_dir / SUMMARY_NAME, summary)
        except OSError as error:
            raise TrainingError(
                f"all steps are done and saved, but {error.filename} could not be written "
                f"({error.strerror}): make room, and run again."
            ) from error
        results = {name: value for name, value in summary.items() if isinstance(value, float)}
        training.log.add_results(results)
        write_run_status(training.output_dir, "done", progress.step, exit_code=0, reason="finished")
        report.write(summary, training.model, should_stop=lambda: bool(training.stop))
    return summary


@contextlib.contextmanager
def _joined_group(
    config: TrainConfig, output_dir: Path, stop: StopRequest
) -> Iterator[torch.device]:
    # Collective. Also gives launch.sh the reason why there is none.
    with contextlib.ExitStack() as joined:
        with _record_failure(output_dir, is_locked=False):
            group = distributed.process_group(
                partial(pick_device, config.device),
                step_seconds=config.hang_timeout,
                should_stop=lambda: bool(stop),
            )
            device = joined.enter_context(group)
        yield device


@contextlib.contextmanager
def _hold_output_dir(output_dir: Path, stop: StopRequest) -> Iterator[None]:
    # Collective. Makes the folder, and keeps other runs out of it.
    with contextlib.ExitStack() as held:

        def make_and_lock() -> None:
            create_writable_dir(output_dir)
            if distributed.is_main():
                held.enter_context(lock_output_dir(output_dir, should_stop=lambda: bool(stop)))

        distributed.run_on_all_ranks(make_and_lock)
        yield


def _open_cache(parts: RunParts) -> contextlib.AbstractContextManager[EmbeddingCache]:
    return open_cache(
        parts.config,
        parts.model,
        parts.splits,
        progress=parts.progress,
        should_stop=lambda: bool(parts.stop),
    )


def _open_log(parts: RunParts) -> RunLog:
    if distributed.is_main() and not parts.resumes_in_place:
        archive = archive_previous_run(parts.output_dir)
        if archive is not None:
            LOGGER.warning("an earlier run's files were moved to %s", archive)
    resume = parts.resume if parts.resumes_in_place else None
    log = RunLog(
        parts.output_dir,
        main=distributed.is_main(),
        steps=parts.config.steps,
        start_step=parts.logged_step,
        metrics_state=resume.state.get("metrics") if resume else None,
    )
    if distributed.is_main():
        log.trackers = open_trackers(
            split_names(parts.config.trackers),
            parts.output_dir,
            name=f"{parts.config.model_type}-{dataset_name(parts.config, parts.custom)}",
            is_resumed=parts.resumes_in_place,
            settings=asdict(parts.config),
            lines=log.read_metrics(),
            start_step=parts.logged_step,
        )
    return log


def _write_config(parts: RunParts) -> None:
    path = parts.output_dir / CONFIG_NAME
    # A file with these settings is left as it is: it may be the user's own, with comments in it.
    if not any(has_settings(path, config) for config in (parts.config, parts.requested_config)):
        write_text(path, to_yaml(parts.config))


def _log_setup(parts: RunParts) -> None:
    config = parts.config
    parts.splits.log_counts()
    LOGGER.info(
        "device %s, %d process(es), %d images a step, amp %s",
        parts.device,
        distributed.get_world_size(),
        images_per_step(config),
        pick_amp_dtype(config.amp, parts.device) or "off",
    )
    if parts.custom.loss_name is not None:
        LOGGER.info("loss: %s, the caller's own", parts.custom.loss_name)
    if parts.resume is not None:
        LOGGER.info("resuming from step %d", parts.progress.step)
    if parts.is_out_of_patience:
        LOGGER.info(
            "patience: the run has ended after step %d; a larger number, or `--patience 0`, "
            "continues it",
            parts.progress.step,
        )


def _record_stop(parts: RunParts, saved: str) -> RunStopped:
    # Collective. Without a reason of its own, this rank stops because all ranks agreed to.
    why = parts.stop_reason() or "another process was asked to stop"
    reason = f"{why}: {saved} in {parts.output_dir}; run the same command again to resume."
    step = parts.progress.step
    write_run_status(parts.output_dir, "preempted", step, exit_code=EXIT_STOPPED, reason=reason)
    distributed.barrier()  # torchrun kills the other processes when the first one exits
    return RunStopped(reason)


def _record_early_stop(parts: RunParts) -> RunStopped:
    # Collective. An earlier run that a fresh start would have archived keeps its files and status.
    why = parts.stop_reason() or "another process was asked to stop"
    reason = f"{why}: before the first step; run the same command again to start."
    write_run_status(
        parts.output_dir,
        "preempted",
        parts.progress.step,
        exit_code=EXIT_STOPPED,
        reason=reason,
        is_own=parts.resumes_in_place or not (parts.output_dir / LAST_NAME).exists(),
    )
    distributed.barrier()  # torchrun kills the other processes when the first one exits
    return RunStopped(reason)


@contextlib.contextmanager
def _record_failure(
    output_dir: Path, parts: RunParts | None = None, *, is_locked: bool = True
) -> Iterator[None]:
    """Posts the error that ends the run to the other ranks, and writes it to status.json.

    Args:
        output_dir: The output folder of the run.
        parts: Of the run; None while its start may still be refused.
        is_locked: Whether this run holds the lock of the folder.
    """
    try:
        with explain_distributed_errors():
            yield
    except BaseException as error:
        # Before anything that takes long: the other ranks wait a few seconds for it.
        heartbeat.report_failure(f"{type(error).__name__}: {error}")
        reason = explain_host_error(error) or str(error) or type(error).__name__
        if not isinstance(error, RunStopped):
            # The command prints it, but only after a save that may take minutes.
            is_late = parts is not None and parts.checkpointer.is_writing
            LOGGER.error("the run ends: %s", reason, extra={} if is_late else FILES_ONLY)
        if parts is not None and not isinstance(error, KeyboardInterrupt):
            _finish_saving(parts.checkpointer)
        if not isinstance(error, RunStopped):
            with contextlib.suppress(OSError):  # the full disk, say, that ended the run
                # A refused start must not overwrite the status of the run that the folder holds,
                # or that is writing into it.
                is_first = parts is not None or not (output_dir / LAST_NAME).exists()
                write_run_status(
                    output_dir,
                    "failed",
                    parts.progress.step if parts else 0,
                    exit_code=exit_code(error),
                    reason=reason,
                    is_own=is_locked and is_first,
                )
        raise


def _finish_saving(checkpointer: Checkpointer) -> None:
    try:
        checkpointer.wait()
    except Exception:  # the run ends with another error, which is the one to raise
        LOGGER.exception("the last state was not saved")
