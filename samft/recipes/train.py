"""The parts of a run, and what happens at its start, its steps, its intervals and its end.

One run from start to end: processes, the folder's lock, signals, and every ending told.
"""

import contextlib
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from samft import distributed
from samft.checkpoints.async_saver import Checkpoint, Checkpointer
from samft.checkpoints.top_k import TopK, make_sidecar
from samft.checkpoints.training_state import LAST_NAME, quarantine_damaged
from samft.cli import exit_code
from samft.config import TrainConfig, to_yaml
from samft.data.loaders import batch_by_objects, on_device
from samft.errors import EXIT_STOPPED, ConfigError, RunStopped, TrainingError
from samft.evaluation.validation import Validation, validate
from samft.models.sam import constant_names
from samft.recipes import build
from samft.recipes.datasets import load_splits
from samft.recipes.dry_run import dry_run
from samft.recipes.embedding_cache import prepare_cache
from samft.recipes.report import Ending
from samft.recipes.resume import find_resume, keep_images_per_step
from samft.reports.validation_images import ValidationImages
from samft.runtime import heartbeat, host_checks
from samft.runtime.device import peak_memory_gib
from samft.runtime.files import write_json, write_text
from samft.runtime.heartbeat import explain_distributed_errors
from samft.runtime.logs import LOGGER, RunLog, format_duration, start_logging
from samft.runtime.output_dir import (
    archive_previous_run,
    create_writable_dir,
    lock_output_dir,
    write_status,
)
from samft.runtime.signals import StopInterrupt, StopRequest, job_deadline
from samft.training.engine import Progress, train
from samft.training.optim import gather_state


class Run:
    """The parts of one run, and what happens at its start, its intervals and its end."""

    def __init__(
        self, config: TrainConfig, folder: Path, device: torch.device, stop: StopRequest
    ) -> None:
        """Checks everything that a user can get wrong, cheapest first, then builds the parts.

        Args:
            config: The checked configuration.
            folder: The output folder, which is this run's alone.
            device: This process's device.
            stop: Says whether a signal has asked to stop.

        Raises:
            UserError: The folder, data, weights or state to resume cannot be used.
        """
        self.folder, self.device, self.stop = folder, device, stop
        self.main = distributed.is_main()
        self.ends_at = job_deadline(config.save_before_limit)
        self.splits = load_splits(config)
        found = find_resume(config, folder, self.splits.fingerprint)
        self.asked = config  # what is saved, to tell the same command on yet other processes
        self.config = config = keep_images_per_step(config, found) if found else config
        resumed = found.state if found else None
        self.found = found  # until the optimizer has its state: it is as large as the model
        for problem in found.passed_over if found else ():
            LOGGER.warning("resume: %s", problem)
        weights = resumed["model"] if resumed else build.load_weights(config)
        elsewhere = found is not None and found.folder.resolve() != folder.resolve()
        if self.main and (found is None or elsewhere):
            aside = archive_previous_run(folder)
            if aside is not None:
                LOGGER.warning("an earlier run's files were moved to %s", aside)
        self.progress = Progress(**resumed["progress"]) if resumed else Progress()
        if not self.main:
            self.progress.window = Progress().window  # rank 0 goes on with the sums of all
        # A step whose validation was broken off has no lines yet.
        start_step = self.progress.step - bool(self.progress.pending)
        self.log = RunLog(folder, main=self.main, steps=config.steps, start_step=start_step)
        source = found.folder if found else folder
        self.gallery = ValidationImages(
            folder, self.splits.val.subset, self.log, found=source, start_step=start_step
        )
        self.model = build.build_model(config, weights, device)
        best = TopK.from_list(resumed["best"]) if resumed else []
        top_k = TopK(folder, k=config.save_top_k, best=best)
        if found is not None and elsewhere and self.main:
            top_k.copy_from(found.folder)
        self.checkpointer = Checkpointer(
            folder,
            top_k=top_k,
            constant=constant_names(self.model.sam),
            on_saved=lambda step: self._status("running", step=step),
        )
        self.clock = time.monotonic() - self.progress.wall_seconds

    def execute(self) -> dict[str, Any]:
        """Trains from where the run stands to its end. Collective: every rank must call.

        Returns:
            What `summary.json` holds.

        Raises:
            RunStopped: Before the last step; everything is saved.
        """
        config, progress = self.config, self.progress
        if len(set(distributed.all_gather(progress.step))) > 1:
            raise ConfigError(
                "output_dir: the processes do not see the same last.ckpt; put output_dir on a disk "
                "that all hosts share."
            )
        if self.main and self.found is not None and self.found.passed_over:
            quarantine_damaged(self.folder, used=self.found.path)
        self._announce()
        distributed.run_on_all_ranks(self._check_host)
        stops = {"should_stop": lambda: bool(self.stop)}
        if not prepare_cache(config, self.model, self.splits, progress=progress, **stops):
            self._stopped("the embeddings encoded so far are kept")
        self.trainer = build.build_trainer(
            config, self.model, progress=progress, state=self.found.state if self.found else None
        )
        self.found = None
        batches, self.val_batches = build.build_loaders(
            config, self.splits, start_step=progress.position
        )
        if config.probe_memory:
            largest = batch_by_objects(self.splits.train, config.batch_size, share=1.0)
            self.trainer.probe_memory(largest)
        try:
            if not progress.baseline:
                self._validate_untouched()
            if progress.pending:
                self._finish_interval()
            self.checkpointer.wait()  # workers are forked next, which threads do not survive
            with torch.autograd.set_detect_anomaly(config.detect_anomaly):
                finished = train(
                    self.trainer,
                    on_device(batches, self.device),
                    steps=config.steps,
                    accumulate_steps=config.accumulate_steps,
                    interval=config.metrics_interval,
                    max_bad_steps=config.max_bad_steps,
                    should_stop=self._should_stop,
                    waiting=self.stop.waiting,
                    on_step=self._on_step,
                    on_interval=self._on_interval,
                )
        except StopInterrupt:
            finished = False
        if not finished:
            self._save()
            self.checkpointer.wait()
            if self.checkpointer.unsaved:
                raise TrainingError(f"stopped, and steps are lost: {self.checkpointer.unsaved}")
            self._stopped(f"saved after step {progress.step} of {config.steps}")
        return self._finish()

    def _check_host(self) -> None:
        if not self.main:
            host_checks.raise_open_file_limit()
            return
        config, side = self.config, self.config.image_size
        cells = side**2 // (16 if config.loss_resolution == "low" else 1)
        host_checks.check_host(
            self.device,
            self.folder,
            needed=build.disk_bytes(self.model, save_top_k=config.save_top_k),
            num_workers=config.num_workers,
            batch_bytes=config.batch_size * (3 * side**2 + config.max_masks_per_image * cells),
        )

    def _should_stop(self) -> bool:
        limit = self.config.stop_after
        if time.time() >= self.ends_at and not self.stop:
            self.stop.received.append("the job's time limit")
        return bool(self.stop) or (limit is not None and self.progress.step >= limit)

    def _announce(self) -> None:
        config = self.config
        self.splits.announce()
        LOGGER.info(
            "device %s, %d process(es), %d images a step, amp %s",
            self.device,
            distributed.get_world_size(),
            build.images_per_step(config),
            build.pick_amp_dtype(config.amp, self.device) or "off",
        )
        if self.main:
            write_text(self.folder / "config.yaml", to_yaml(config))
            self.log.text("config", to_yaml(config))
            self._status("running")
        if self.found is not None:
            LOGGER.info("going on from step %d", self.progress.step)

    def _validate(self) -> Validation:
        started = time.monotonic()
        found = validate(
            self.model,
            self.val_batches,
            loss=self.trainer.loss,
            keep=self.gallery.keeper(),
            should_stop=lambda: bool(self.stop),
            waiting=self.stop.waiting,
        )
        seconds = time.monotonic() - started
        counts = self.splits.counts["val"]
        found.rates = {
            "lr": self.trainer.optimizer.param_groups[0]["lr"],
            "images_per_second": counts["images"] / seconds,
            "masks_per_second": counts["masks"] / seconds,
            "peak_memory_gib": peak_memory_gib(self.device),
        }
        self._note_bad_images("val", found.bad_images)
        return found

    def _log_validation(self, found: Validation) -> None:
        self.log.metrics(self.progress.step, "val", {**found.metrics, **found.rates})

    def _validate_untouched(self) -> None:
        found = self._validate()
        self._log_validation(found)
        self.progress.baseline = found.metrics
        self.progress.box_fill_iou = found.box_fill_iou
        LOGGER.info(
            "step 0: val_per_mask_iou %.4f before training (filling each box: %.4f)",
            found.metrics["per_mask_iou"],
            found.box_fill_iou,
        )
        self._save(found)

    def _on_step(self, taken: bool, image_ids: list[int]) -> None:
        if taken:
            self.log.progress()
            return
        progress = self.progress
        words = "the gradient was not finite, so the step was skipped: see bad_steps.jsonl"
        LOGGER.warning("after step %d: %s", progress.step, words)
        ids = distributed.all_gather(image_ids)
        self.log.bad_step(progress.step, position=progress.position, image_ids=ids)

    def _note_bad_images(self, split: str, met: dict[str, str]) -> None:
        # Every image that any rank could not read, once.
        if self.config.on_bad_image == "skip":
            for found in distributed.all_gather(met):
                for why in self.progress.note_bad_images(split, found).values():
                    LOGGER.info("%s, left out: %s", split, why)

    def _on_interval(self, window: dict[str, float]) -> None:
        self.progress.pending = {**window, "skipped_steps": self.progress.skipped_steps}
        self._finish_interval()

    def _finish_interval(self) -> None:
        step, steps, window = self.progress.step, self.config.steps, self.progress.pending
        self._note_bad_images("train", self.trainer.bad_images)
        found = self._validate()
        self.log.metrics(step, "train", window)
        self._log_validation(found)
        score = found.metrics["per_mask_iou"]
        sidecar = make_sidecar(asdict(self.config), step=step, metrics=found.metrics)
        self.progress.pending = {}
        self._save(found, Checkpoint(score, sidecar))
        left = (steps - step) * (time.monotonic() - self.clock) / max(step, 1)
        LOGGER.info(
            "step %d/%d: loss %.4f, train IoU %.4f, val IoU %.4f (%+.4f since step 0), "
            "%.1f images/s, %s left",
            step,
            steps,
            window["loss"],
            window["per_mask_iou"],
            score,
            score - self.progress.baseline["per_mask_iou"],
            window["images_per_second"],
            format_duration(left),
        )

    def _save(self, found: Validation | None = None, candidate: Checkpoint | None = None) -> None:
        self.progress.wall_seconds = time.monotonic() - self.clock
        sums = distributed.all_reduce_sum(self.trainer.window.cpu().clone()).tolist()
        optimizer = gather_state(self.trainer.optimizer)
        if self.main:
            heartbeat.set_activity("saving")
            state = {
                "config": asdict(self.asked),
                "global_batch": build.images_per_step(self.config),
                "fingerprint": self.splits.fingerprint,
                "model": self.model.sam.state_dict(),
                "optimizer": optimizer,
                "scaler": self.trainer.scaler.state_dict(),
                "progress": {**asdict(self.progress), "window": sums},
            }
            show = partial(self.gallery.show, self.progress.step, found) if found else None
            self.checkpointer.save(state, candidate=candidate, first=show)
        distributed.barrier()  # with the long timeout, or the others would give up on rank 0

    def _status(
        self, state: str, *, step: int | None = None, code: int | None = None, reason: str = ""
    ) -> None:
        if self.main:
            last = self.folder / LAST_NAME
            write_status(
                self.folder,
                state=state,
                step=self.progress.step if step is None else step,
                exit_code=code,
                reason=reason,
                last_checkpoint=str(last) if last.exists() else None,
            )

    def _stopped(self, done: str) -> NoReturn:
        why = self.stop.received[0] if self.stop else f"stop_after {self.config.stop_after}"
        if not self.stop and self.config.stop_after is None:
            why = "another process was asked to stop"
        reason = f"{why}: {done} in {self.folder}; the same command goes on from there."
        self._status("preempted", code=EXIT_STOPPED, reason=reason)
        distributed.barrier()  # torchrun ends all that run when the first one has ended
        raise RunStopped(reason)

    def _finish(self) -> dict[str, Any]:
        self.checkpointer.wait()
        if unsaved := self.checkpointer.unsaved:
            raise TrainingError(f"all steps are done, but {unsaved} Make room, and run again.")
        ranked = self.checkpointer.top_k.best
        progress, best = self.progress, ranked[0] if ranked else None
        progress.wall_seconds = time.monotonic() - self.clock
        ending = Ending(self.config, self.folder, self.splits, self.gallery, best)
        summary = distributed.broadcast(ending.summarise(progress))
        if self.main:
            write_json(self.folder / "summary.json", summary)
            scores = {name: v for name, v in summary.items() if isinstance(v, float)}
            self.log.hparams(asdict(self.config), scores)
            self._status("done", code=0, reason="finished")
            ending.tell(summary, self.model, should_stop=lambda: bool(self.stop))
        return summary


def run(config: TrainConfig, stop: StopRequest) -> dict[str, Any]:
    """Trains as configured. Collective: every rank must call.

    Args:
        config: The checked configuration.
        stop: Says whether a signal has asked to stop.

    Returns:
        What `summary.json` holds; of a dry run, see `dry_run`.

    Raises:
        UserError: The configuration, the data or the checkpoint cannot be used.
        RunStopped: A signal or `stop_after` ended the run, and everything is saved.
        TrainingError: The run cannot go on.
    """
    folder = Path(config.output_dir).expanduser()
    this_run: Run | None = None
    device = distributed.start(config.device, step_seconds=config.hang_timeout)
    start_logging(distributed.get_rank())
    heartbeat.start()
    try:
        if config.dry_run:
            return dry_run(config, device)
        with contextlib.ExitStack() as held:
            distributed.run_on_all_ranks(lambda: _take(folder, held))
            this_run = distributed.run_on_all_ranks(lambda: Run(config, folder, device, stop))
            with explain_distributed_errors():
                return this_run.execute()
    except BaseException as error:
        heartbeat.report_failure(f"{type(error).__name__}: {error}")
        if this_run is not None and not isinstance(error, KeyboardInterrupt):
            _end_saving(this_run)
        if distributed.is_main() and not isinstance(error, RunStopped):
            step = this_run.progress.step if this_run else 0
            last = folder / LAST_NAME
            # A refused start says nothing about the run that the folder holds.
            holds_other = this_run is None and last.exists()
            with contextlib.suppress(OSError):  # the full disk, say, that ended the run
                write_status(
                    None if holds_other else folder,
                    state="failed",
                    step=step,
                    exit_code=exit_code(error),
                    reason=str(error) or type(error).__name__,
                    last_checkpoint=str(last) if last.exists() else None,
                )
        raise
    finally:
        if this_run is not None:
            this_run.log.close()
        heartbeat.stop()
        distributed.shutdown()


def _end_saving(this_run: Run) -> None:
    try:
        this_run.checkpointer.wait()
    except Exception:  # the run ends of something else already
        LOGGER.exception("the last state was not saved")


def _take(folder: Path, held: contextlib.ExitStack) -> None:
    create_writable_dir(folder)
    if distributed.is_main():
        held.enter_context(lock_output_dir(folder))
