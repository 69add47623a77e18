"""The first step of a run: checks everything that can be refused, and builds what trains.

Nothing in the output folder is moved, written or opened here, so a run that is refused leaves an
earlier one in the same folder untouched.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from samft import distributed
from samft.checkpoints.async_saver import Checkpointer
from samft.checkpoints.top_k import Checkpoint, TopK
from samft.checkpoints.training_state import LAST_NAME
from samft.cli import EXTRAS, require_extra
from samft.config import TrainConfig
from samft.data.map_style import DatasetIndex
from samft.data.targets import WINDOW_CELLS
from samft.errors import ConfigError
from samft.images.pixels import PixelFormat
from samft.models.prompted_sam import PromptedSam
from samft.models.trainable import constant_names
from samft.recipes.build import build_model, disk_bytes, index_own_data, load_weights
from samft.recipes.datasets import Splits, load_splits
from samft.recipes.resume import (
    ResumePoint,
    find_resume_point,
    keep_images_per_step,
    keep_schedule,
)
from samft.runtime import host_checks
from samft.runtime.device import usable_cores
from samft.runtime.logs import LOGGER
from samft.runtime.output_dir import holds_previous_run, write_status
from samft.runtime.own_files import (
    CONFIG_NAME,
    foreign_files,
    is_checkpoint,
    is_config,
    own_names,
)
from samft.runtime.signals import StopRequest, job_deadline
from samft.settings import has_settings, split_names
from samft.training.custom import CustomParts
from samft.training.engine import Progress


@dataclass(frozen=True, kw_only=True)
class RunParts:
    """What a run is made of, before it writes anything.

    Attributes:
        config: The configuration to train with.
        requested_config: The configuration as the user gave it; it differs in `batch_size` and
            `accumulate_steps` where a run is resumed on another number of processes, and in
            `warmup_steps` where it was given more steps. This one goes into `last.ckpt`, so that
            the same command is recognised on any number of processes.
        output_dir: The output folder, locked by this run.
        device: This process's device.
        stop: Tells whether a signal has asked to stop.
        deadline: When to stop before the job's time limit, in seconds since 1970; inf: never.
        splits: The datasets.
        resume: The state to resume from; None for a fresh start. Its large entries are popped
            where they are loaded, which frees their memory.
        model: On its device, with its weights, its frozen parts frozen.
        progress: How far the run has come.
        checkpointer: Writes checkpoints into the output folder.
        custom: What the caller has brought along.
        started_at: Of `time.monotonic`, as if the run had never been stopped and resumed.
    """

    config: TrainConfig
    requested_config: TrainConfig
    output_dir: Path
    device: torch.device
    stop: StopRequest
    deadline: float
    splits: Splits
    resume: ResumePoint | None
    model: PromptedSam
    progress: Progress
    checkpointer: Checkpointer
    custom: CustomParts
    started_at: float

    @property
    def source_dir(self) -> Path:
        """The output folder of the run that is resumed; of a fresh run its own."""
        return self.resume.output_dir if self.resume else self.output_dir

    @property
    def resumes_in_place(self) -> bool:
        """Whether a run is resumed in its own output folder."""
        return _resumes_in_place(self.resume, self.output_dir)

    @property
    def logged_step(self) -> int:
        """The last step that has its lines in metrics.jsonl."""
        # A step whose validation was interrupted has none yet.
        return self.progress.step - bool(self.progress.pending)

    @property
    def is_out_of_patience(self) -> bool:
        """Whether the last validations were no better, as many as end the run."""
        return self.progress.stale_validations >= (self.config.patience or math.inf)

    @property
    def has_ended_early(self) -> bool:
        """Whether a callback, or `patience`, has ended the run before its last step."""
        return self.progress.ended_early or self.is_out_of_patience

    def stop_reason(self) -> str | None:
        """Why this process has to stop before the last step; None if it has not to."""
        stop_after = self.config.stop_after
        if self.stop:
            return self.stop.received[0]
        if self.has_ended_early:
            return "a callback, or patience"
        if time.time() >= self.deadline:
            return "the job's time limit"
        if stop_after is not None and self.progress.step >= stop_after:
            return f"stop_after {stop_after}"
        return None


def prepare(
    config: TrainConfig,
    output_dir: Path,
    device: torch.device,
    *,
    stop: StopRequest,
    custom: CustomParts | None = None,
) -> RunParts:
    """Checks everything that a user can get wrong and builds the model. Collective.

    Args:
        config: The checked configuration.
        output_dir: The output folder, locked by this run.
        device: This process's device.
        stop: Tells whether a signal has asked to stop.
        custom: What the caller brings along; the same on all ranks.

    Returns:
        The parts of the run; the output folder has not changed.

    Raises:
        UserError: The data, the weights, the state to resume from or the host cannot be used.
        RunStopped: The run was asked to stop while a caller's dataset was read.
    """
    custom = custom or CustomParts()
    own = index_own_data(config, custom, should_stop=lambda: bool(stop))
    parts = distributed.run_on_all_ranks(
        lambda: _check_and_build(config, output_dir, device, stop, custom, own)
    )
    if len(set(distributed.all_gather(parts.progress.step))) > 1:
        raise ConfigError(
            "output_dir: the processes do not see the same last.ckpt; put output_dir on a disk "
            "that all hosts share."
        )
    return parts


def _check_and_build(
    requested: TrainConfig,
    output_dir: Path,
    device: torch.device,
    stop: StopRequest,
    custom: CustomParts,
    own: Mapping[str, DatasetIndex],
) -> RunParts:
    # Cheapest first: a typing error should not take the minute that loading weights may take.
    deadline = job_deadline(requested.save_before_limit)
    for tracker in split_names(requested.trackers) if distributed.is_main() else ():
        if tracker in EXTRAS:
            require_extra(tracker, what=f"--trackers {tracker}")
    splits = load_splits(requested, own)
    resume = find_resume_point(
        requested,
        output_dir,
        splits.fingerprint,
        val_fingerprint=splits.val_fingerprint,
        custom=custom,
    )
    config = requested
    if resume:
        config = keep_schedule(keep_images_per_step(requested, resume), resume)
    if resume and (pixels := PixelFormat.from_json(resume.state.get("pixels"))):
        splits.use_pixels(pixels)
    if distributed.is_main():
        _check_names(output_dir, resume, config=config, requested=requested)
    for problem in resume.problems if resume else ():
        LOGGER.warning("resume: %s", problem)
    weights = _load_initial_weights(config, resume, stop)
    model = build_model(config, weights, device, own_loss=custom.loss is not None)
    progress = _restore_progress(resume)
    in_place = _resumes_in_place(resume, output_dir)
    is_finished = progress.step >= config.steps
    if not (in_place and is_finished):  # it writes nothing more
        _check_host(config, model, output_dir, in_place)
    best = _list_best(resume, with_missing=is_finished) if resume else []
    return RunParts(
        config=config,
        requested_config=requested,
        output_dir=output_dir,
        device=device,
        stop=stop,
        deadline=deadline,
        splits=splits,
        resume=resume,
        model=model,
        progress=progress,
        checkpointer=Checkpointer(
            output_dir,
            top_k=TopK(output_dir, k=config.save_top_k, best=best),
            constant=constant_names(model.sam),
            on_saved=partial(write_run_status, output_dir, "running"),
        ),
        custom=custom,
        started_at=time.monotonic() - progress.wall_seconds,
    )


def _list_best(resume: ResumePoint, *, with_missing: bool) -> list[Checkpoint]:
    # One that was moved or deleted would keep the ones after it, if not better, from being saved.
    listed = TopK.from_list(resume.state["best"])
    missing = [each for each in listed if not (resume.output_dir / each.name).is_file()]
    if with_missing or not missing:
        return listed
    if distributed.is_main():
        names = ", ".join(each.name for each in missing)
        LOGGER.info("resume: %s is not there any more, and counts no longer as a best one", names)
    return [each for each in listed if each not in missing]


def _check_names(
    output_dir: Path, resume: ResumePoint | None, *, config: TrainConfig, requested: TrainConfig
) -> None:
    # What a run would write must be free, or a run's own. In its own folder it is the run's own,
    # which wrote it; only config.yaml may be a file that the user has written for --config.
    in_place = _resumes_in_place(resume, output_dir)
    taken = [] if in_place else foreign_files(output_dir)
    path = output_dir / CONFIG_NAME
    if path.exists():
        # With nothing else of a run beside it, a configuration is a copy that the user has made.
        is_copy = not in_place and own_names(output_dir) == [CONFIG_NAME]
        is_own = is_config(path) and not is_copy
        taken = [name for name in taken if name != CONFIG_NAME]
        if not is_own and not any(has_settings(path, each) for each in (config, requested)):
            taken.append(CONFIG_NAME)
    if resume is not None and not in_place:
        best = [output_dir / each.name for each in TopK.from_list(resume.state["best"])]
        taken += [each.name for each in best if each.exists() and not is_checkpoint(each)]
    if taken:
        raise ConfigError(
            f"output_dir: {output_dir} holds {', '.join(taken)}, which a run would overwrite, and "
            "which no run has written (or which is damaged or was changed since). Nothing was "
            f"changed: move {'it' if len(taken) == 1 else 'them'} away, or name another output_dir."
        )


def _load_initial_weights(
    config: TrainConfig, resume: ResumePoint | None, stop: StopRequest
) -> dict[str, Tensor] | None:
    if resume is None:
        return load_weights(config, should_stop=lambda: bool(stop))
    weights: dict[str, Tensor] = resume.state.pop("model")
    return weights


def _restore_progress(resume: ResumePoint | None) -> Progress:
    if resume is None:
        return Progress()
    progress = Progress(**resume.state["progress"])
    if not distributed.is_main():
        # The saved sums are those of all ranks; rank 0 alone continues them.
        progress.window = Progress().window
    return progress


def _resumes_in_place(resume: ResumePoint | None, output_dir: Path) -> bool:
    return resume is not None and resume.output_dir.resolve() == output_dir.resolve()


def _check_host(config: TrainConfig, model: PromptedSam, output_dir: Path, in_place: bool) -> None:
    if not distributed.is_main():
        host_checks.check_open_files(config.num_workers)
        return
    height, width = model.frame_size
    cells = max(height, width) ** 2 if config.loss_resolution == "input" else WINDOW_CELLS**2
    host_checks.check_host(
        model.sam.device,
        output_dir,
        needed=disk_bytes(model, config),
        replaces_existing=in_place or not holds_previous_run(output_dir),
        num_workers=min(config.num_workers, usable_cores()),
        batch_bytes=config.batch_size * (3 * height * width + config.max_masks_per_image * cells),
    )


def write_run_status(
    output_dir: Path,
    state: str,
    step: int,
    *,
    exit_code: int | None = None,
    reason: str = "",
    is_own: bool = True,
) -> None:
    """Writes status.json on rank 0; see `write_status`.

    Args:
        output_dir: The output folder of the run.
        state: `running`, `done`, `failed` or `preempted`.
        step: Optimizer steps done.
        exit_code: What the process is about to exit with; None while it runs.
        reason: One sentence.
        is_own: Whether the folder is this run's; else its status.json is that of another run, and
            only launch.sh is told.
    """
    if distributed.is_main():
        last = output_dir / LAST_NAME
        write_status(
            output_dir if is_own else None,
            state=state,
            step=step,
            exit_code=exit_code,
            reason=reason,
            last_checkpoint=str(last) if last.exists() else None,
        )
