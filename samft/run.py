"""One training run from its first line to its summary."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch

from samft import assemble, distributed, pictures
from samft.caching import prepare_cache
from samft.checkpoint import FORMAT_VERSION, LAST_NAME, TopK, make_sidecar, save_tensors
from samft.config import TrainConfig, to_yaml
from samft.dry_run import dry_run
from samft.engine import Validation, train, validate
from samft.errors import EXIT_STOPPED, ConfigError, Stopped, exit_code
from samft.files import make_writable, set_aside, write_json, write_status, write_text
from samft.logs import LOGGER, RunLog, format_duration, start_logging
from samft.metrics import peak_memory_gib
from samft.optim import gather_state
from samft.prefetch import on_device
from samft.progress import Progress
from samft.report import AFTER, BEFORE, draw_masks, report, summarise
from samft.signals import stop_on_signal
from samft.splits import load_splits

NUM_SHOWN = 4


def run(config: TrainConfig) -> dict[str, Any]:
    """Trains as configured. Collective: every rank must call.

    Args:
        config: The checked configuration.

    Returns:
        What `summary.json` holds; of a dry run, see `dry_run`.

    Raises:
        UserError: The configuration, the data or the checkpoint cannot be used.
        Stopped: A signal or `stop_after` ended the run, and everything is saved.
        TrainingError: The run cannot go on.
    """
    folder = Path(config.output_dir).expanduser()
    this_run: Run | None = None
    device = distributed.start(config.device)
    start_logging(distributed.get_rank())
    try:
        if config.dry_run:
            return dry_run(config, device)
        with stop_on_signal() as stop:
            this_run = assemble.together(lambda: Run(config, folder, device, stop))
            return this_run.execute()
    except BaseException as error:
        if distributed.is_main() and not isinstance(error, Stopped):
            step = this_run.progress.step if this_run else 0
            last = folder / LAST_NAME
            # A refused start says nothing about the run that the folder holds.
            holds_other = this_run is None and last.exists()
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
        distributed.shutdown()


class Run:
    """The parts of one run, and what happens at its start, its intervals and its end."""

    def __init__(
        self, config: TrainConfig, folder: Path, device: torch.device, stop: list[str]
    ) -> None:
        """Checks everything that a user can get wrong, cheapest first, then builds the parts.

        Args:
            config: The checked configuration.
            folder: The output folder, made if absent.
            device: This process's device.
            stop: Names of the signals received so far.

        Raises:
            UserError: The folder, data, weights or state to resume cannot be used.
        """
        self.config, self.folder, self.device, self.stop = config, folder, device, stop
        self.main = distributed.is_main()
        self.world_size = distributed.get_world_size()
        make_writable(folder)
        self.splits = load_splits(config)
        resumed = assemble.find_resume(config, folder, self.splits.fingerprint)
        weights = resumed["model"] if resumed else assemble.load_weights(config)
        elsewhere = resumed is not None and resumed["folder"].resolve() != folder.resolve()
        if self.main and (resumed is None or elsewhere):
            aside = set_aside(folder)
            if aside is not None:
                LOGGER.warning("an earlier run's files were moved to %s", aside)
        self.progress = Progress(**resumed["progress"]) if resumed else Progress()
        if not self.main:
            self.progress.window = Progress().window  # rank 0 goes on with the sums of all
        self.log = RunLog(folder, main=self.main, steps=config.steps, start_step=self.progress.step)
        self.model = assemble.build_model(config, weights, device)
        self.resumed = resumed
        best = TopK.from_list(resumed["best"]) if resumed else []
        self.top_k = TopK(folder, k=config.save_top_k, best=best)
        if resumed is not None and elsewhere and self.main:
            self.top_k.adopt(resumed["folder"])
        self.clock = time.monotonic() - self.progress.wall_seconds

    def execute(self) -> dict[str, Any]:
        """Trains from where the run stands to its end. Collective: every rank must call.

        Returns:
            What `summary.json` holds.

        Raises:
            Stopped: Before the last step; everything is saved.
        """
        config, progress = self.config, self.progress
        if len(set(distributed.all_gather(progress.step))) > 1:
            raise ConfigError(
                "output_dir: the processes do not see the same last.ckpt; put output_dir on a disk "
                "that all hosts share."
            )
        self._announce()
        fresh = self.resumed is None
        if not prepare_cache(
            config,
            self.model,
            self.splits,
            progress=progress,
            should_stop=lambda: bool(self.stop),
        ):
            self._stopped("the embeddings encoded so far are kept")
        self.trainer = assemble.build_trainer(
            config, self.model, progress=progress, state=self.resumed
        )
        self.resumed = None  # several times the size of the model
        batches, self.val_batches = assemble.build_loaders(
            config, self.splits, start_step=progress.position
        )
        if fresh:
            self._validate_untouched()
        finished = train(
            self.trainer,
            on_device(batches, self.device),
            steps=config.steps,
            accumulate_steps=config.accumulate_steps,
            interval=config.metrics_interval,
            should_stop=self._should_stop,
            on_step=self._on_step,
            on_interval=self._on_interval,
        )
        if not finished:
            self._save_last()
            self._stopped(f"saved after step {progress.step} of {config.steps}")
        return self._finish()

    def _should_stop(self) -> bool:
        limit = self.config.stop_after
        return bool(self.stop) or (limit is not None and self.progress.step >= limit)

    def _announce(self) -> None:
        config = self.config
        self.splits.announce()
        LOGGER.info(
            "device %s, %d process(es), %d images a step, amp %s",
            self.device,
            self.world_size,
            assemble.images_per_step(config),
            assemble.pick_amp_dtype(config.amp, self.device) or "off",
        )
        if self.main:
            write_text(self.folder / "config.yaml", to_yaml(config))
            self.log.text("config", to_yaml(config))
            self._status("running")
        if self.resumed is not None:
            LOGGER.info("going on from step %d", self.progress.step)

    def _validate(self) -> Validation:
        num_shown = NUM_SHOWN if self.main else 0
        started = time.monotonic()
        found = validate(self.model, self.val_batches, loss=self.trainer.loss, num_shown=num_shown)
        seconds = time.monotonic() - started
        found.shown = [
            (self.splits.val.with_pixels(batch), logits) for batch, logits in found.shown
        ]
        step, counts = self.progress.step, self.splits.counts["val"]
        rates = {
            "lr": self.trainer.optimizer.param_groups[0]["lr"],
            "images_per_second": counts["images"] / seconds,
            "masks_per_second": counts["masks"] / seconds,
            "peak_memory_gib": peak_memory_gib(self.device),
        }
        self.log.metrics(step, "val", {**found.metrics, **rates})
        self._note_bad_images("val", found.bad_images)
        if self.main:
            self.log.picture(step, "val/masks", draw_masks(found))
        return found

    def _validate_untouched(self) -> None:
        found = self._validate()
        self.progress.baseline = found.metrics
        self.progress.box_fill_iou = found.box_fill_iou
        LOGGER.info(
            "step 0: val_per_mask_iou %.4f before training (filling each box: %.4f)",
            found.metrics["per_mask_iou"],
            found.box_fill_iou,
        )
        if self.main:
            pictures.write_png(self.folder / BEFORE, draw_masks(found))
        self._save_last()

    def _on_step(self, taken: bool) -> None:
        if taken:
            self.log.progress()
        else:
            LOGGER.warning(
                "after step %d: the gradient was not finite, so the step was skipped",
                self.progress.step,
            )

    def _note_bad_images(self, split: str, met: dict[str, str]) -> None:
        # Every image that any rank could not read, once.
        if self.config.on_bad_image == "skip":
            for found in distributed.all_gather(met):
                for why in self.progress.note_bad_images(split, found).values():
                    LOGGER.info("%s, left out: %s", split, why)

    def _on_interval(self, window: dict[str, float]) -> None:
        step, steps = self.progress.step, self.config.steps
        self.log.metrics(step, "train", {**window, "skipped_steps": self.progress.skipped_steps})
        self._note_bad_images("train", self.trainer.bad_images)
        found = self._validate()
        score = found.metrics["per_mask_iou"]
        sidecar = make_sidecar(asdict(self.config), step=step, metrics=found.metrics)
        weights = self.model.sam.state_dict()
        if self.main and self.top_k.offer(weights, score=score, sidecar=sidecar):
            if self.top_k.best[0].step == step:
                pictures.write_png(self.folder / AFTER, draw_masks(found))
        self._save_last()
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

    def _save_last(self) -> None:
        self.progress.wall_seconds = time.monotonic() - self.clock
        sums = distributed.all_reduce_sum(self.trainer.window.cpu().clone()).tolist()
        optimizer = gather_state(self.trainer.optimizer)
        if not self.main:
            return
        state = {
            "format": FORMAT_VERSION,
            "config": asdict(self.config),
            "global_batch": assemble.images_per_step(self.config),
            "fingerprint": self.splits.fingerprint,
            "model": self.model.sam.state_dict(),
            "optimizer": optimizer,
            "scaler": self.trainer.scaler.state_dict(),
            "progress": {**asdict(self.progress), "window": sums},
            "best": self.top_k.to_list(),
        }
        save_tensors(self.folder / LAST_NAME, state)
        self._status("running")

    def _status(self, state: str, *, code: int | None = None, reason: str = "") -> None:
        if self.main:
            last = self.folder / LAST_NAME
            write_status(
                self.folder,
                state=state,
                step=self.progress.step,
                exit_code=code,
                reason=reason,
                last_checkpoint=str(last) if last.exists() else None,
            )

    def _stopped(self, done: str) -> NoReturn:
        why = self.stop[0] if self.stop else f"stop_after {self.config.stop_after}"
        if not self.stop and self.config.stop_after is None:
            why = "another process was asked to stop"
        reason = f"{why}: {done} in {self.folder}; the same command goes on from there."
        self._status("preempted", code=EXIT_STOPPED, reason=reason)
        distributed.barrier()  # torchrun ends all that run when the first one has ended
        raise Stopped(reason)

    def _finish(self) -> dict[str, Any]:
        progress, best = self.progress, self.top_k.best[0] if self.top_k.best else None
        progress.wall_seconds = time.monotonic() - self.clock
        counts = self.splits.counts
        summary = summarise(progress, best, folder=self.folder, counts=counts)
        summary = distributed.broadcast(summary)
        if self.main:
            write_json(self.folder / "summary.json", summary)
            scores = {name: v for name, v in summary.items() if isinstance(v, float)}
            self.log.hparams(asdict(self.config), scores)
            self._status("done", code=0, reason="finished")
            report(summary, self.folder)
        return summary
