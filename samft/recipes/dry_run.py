"""`--dry_run`: what memory, time and disk a run takes, measured on a few steps.

All parts are built as for the run. Two steps on the largest batch show the peak memory. The time of
the run is extrapolated from one step on a batch with the median number of objects, from loading
that batch, from validating and encoding one image, and from one checkpoint that is written and
deleted. Nothing that is trained is kept.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from samft import distributed
from samft.checkpoints.async_saver import HostCopy
from samft.checkpoints.top_k import save_tensors
from samft.config import TrainConfig
from samft.data.dataset import Batch
from samft.data.loaders import batch_by_objects, masks_per_image
from samft.distributed import run_on_all_ranks
from samft.errors import ConfigError
from samft.evaluation.validation import validate
from samft.models.prompted_sam import PromptedSam
from samft.recipes.build import (
    build_model,
    build_trainer,
    disk_bytes,
    images_per_step,
    index_own_data,
    load_weights,
)
from samft.recipes.datasets import Splits, load_splits
from samft.recipes.embedding_cache import CacheEstimate, cache_dir_of, estimate_cache
from samft.runtime.device import (
    exact_float32,
    host_memory_gib,
    peak_memory_gib,
    pick_amp_dtype,
    synchronized_time,
    usable_cores,
)
from samft.runtime.logs import LOGGER, format_duration, format_gib
from samft.runtime.output_dir import create_writable_dir, write_status
from samft.training.custom import CustomParts
from samft.training.engine import MEMORY_ADVICE, Progress, Trainer
from samft.training.optim import gather_state

T = TypeVar("T")


@dataclass(frozen=True)
class Forecast:
    """What a run takes; durations are of all processes working at the same time.

    Attributes:
        peak_memory_gib: Of the process that takes most: allocated on its GPU, or resident.
        memory_gib: The total memory of that GPU, or of the host.
        largest_batch: Objects in a micro-batch of the images that have most.
        images_per_second: In training, all processes.
        masks_per_second: In training, all processes.
        encoding_seconds: For embeddings that are cached before the first step.
        training_seconds: For all steps.
        validation_seconds: For all validations, and for the test split at the end.
        saving_seconds: For all checkpoints.
        embedding_bytes: That will be added to the cache of embeddings.
        checkpoint_bytes: Of all checkpoints, see `build.disk_bytes`.
        free_bytes: Of the disk of output_dir.
    """

    peak_memory_gib: float
    memory_gib: float
    largest_batch: int
    images_per_second: float
    masks_per_second: float
    encoding_seconds: float
    training_seconds: float
    validation_seconds: float
    saving_seconds: float
    embedding_bytes: int
    checkpoint_bytes: int
    free_bytes: int

    @property
    def seconds(self) -> float:
        """The duration of the whole run."""
        work = self.encoding_seconds + self.training_seconds
        return work + self.validation_seconds + self.saving_seconds


def dry_run(
    config: TrainConfig,
    device: torch.device,
    *,
    custom: CustomParts | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Builds all parts of a run, takes a few steps, logs what the run will take. Collective.

    Args:
        config: The checked configuration.
        device: This process's device.
        custom: What the caller brings along.
        should_stop: Asked while a caller's dataset is read.

    Returns:
        The fields of a `Forecast`, and `seconds`.

    Raises:
        UserError: Whatever the run would refuse, or no room on the disk.
    """
    output_dir = Path(config.output_dir).expanduser()
    run_on_all_ranks(lambda: create_writable_dir(output_dir))
    custom = custom or CustomParts()
    own = index_own_data(config, custom, should_stop=should_stop)
    splits = run_on_all_ranks(lambda: load_splits(config, own))
    splits.log_counts()
    weights = run_on_all_ranks(lambda: load_weights(config))
    model = build_model(config, weights, device, own_loss=custom.loss is not None)
    trial = _TrialRun(config, model, output_dir, custom)
    forecast = _combine_ranks(_extrapolate(config, splits, trial))
    log_forecast(forecast, config)
    if distributed.is_main():
        write_status(None, state="done", exit_code=0, reason="a dry run: nothing was trained")
    return {**asdict(forecast), "seconds": forecast.seconds}


def _extrapolate(config: TrainConfig, splits: Splits, trial: "_TrialRun") -> Forecast:
    world_size, steps = distributed.get_world_size(), config.steps
    measured = trial.measure(splits)
    # Workers load batches while a step is taken; without workers, one comes after the other.
    cores = max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    workers = min(config.num_workers, cores)
    loading = measured.load_seconds * config.batch_size * config.accumulate_steps
    computing = measured.step_seconds
    step = max(computing, loading / workers) if workers else computing + loading
    num_validations = -(-steps // config.metrics_interval) + 1
    masks = masks_per_image(splits.train).mean()
    images = images_per_step(config)
    cache = measured.cache
    return Forecast(
        peak_memory_gib=peak_memory_gib(trial.device),
        memory_gib=_total_memory_gib(trial.device),
        largest_batch=measured.largest_batch,
        images_per_second=images / step,
        masks_per_second=float(images * masks / step),
        encoding_seconds=cache.num_images * measured.encode_seconds / world_size if cache else 0.0,
        training_seconds=steps * step,
        validation_seconds=num_validations * _validation_images(splits) * measured.val_seconds
        + _test_seconds(splits, measured),
        saving_seconds=num_validations * measured.save_seconds,
        embedding_bytes=cache.num_bytes if cache else 0,
        checkpoint_bytes=disk_bytes(trial.model, config),
        free_bytes=shutil.disk_usage(trial.output_dir).free,
    )


def _validation_images(splits: Splits) -> int:
    # Of the process that has most.
    datasets = [splits.val, *([splits.general] if splits.general else [])]
    return sum(-(-len(dataset) // distributed.get_world_size()) for dataset in datasets)


def _test_seconds(splits: Splits, measured: "_Measurements") -> float:
    # Two models; without cached embeddings, the time of a validation has the encoder's in it.
    num_images = len(splits.test) if splits.test else 0
    seconds = 2 * measured.val_seconds + measured.encode_seconds
    return -(-num_images // distributed.get_world_size()) * seconds


def _combine_ranks(forecast: Forecast) -> Forecast:
    # All wait for the slowest rank, and the run fails where one rank runs out of memory.
    forecasts = distributed.all_gather(forecast)
    slowest = max(forecasts, key=lambda one: one.training_seconds)
    fullest = max(forecasts, key=lambda one: one.peak_memory_gib)
    return replace(
        slowest,
        peak_memory_gib=fullest.peak_memory_gib,
        memory_gib=fullest.memory_gib,
        largest_batch=fullest.largest_batch,
    )


def _total_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1] / 2**30
    return host_memory_gib()


@dataclass
class _Measurements:
    cache: CacheEstimate | None
    largest_batch: int  # objects
    load_seconds: float  # an image, by one worker
    encode_seconds: float  # an image
    step_seconds: float
    val_seconds: float  # an image
    save_seconds: float


class _TrialRun:
    """The parts of a run on this process, and how long each takes."""

    def __init__(
        self, config: TrainConfig, model: PromptedSam, output_dir: Path, custom: CustomParts
    ) -> None:
        self.config, self.model, self.output_dir = config, model, output_dir
        self.custom = custom
        self.device = model.sam.device

    def measure(self, splits: Splits) -> _Measurements:
        """Runs every part once or twice. Collective: every rank must call."""
        config = self.config
        cache = estimate_cache(config, self.model, splits, progress=Progress())
        load = partial(batch_by_objects, splits.train, config.batch_size)
        load_seconds, median = self._time(lambda: run_on_all_ranks(lambda: load(share=0.5)))
        largest = run_on_all_ranks(lambda: load(share=1.0))
        val_batch = run_on_all_ranks(lambda: batch_by_objects(splits.val, 1, share=0.5))
        encode_seconds = 0.0
        if cache:
            encode_seconds = self._time_encoding(median)
            self.model.unload_encoder()
            median, largest, val_batch = (
                self._with_embeddings(batch) for batch in (median, largest, val_batch)
            )
        trainer = build_trainer(config, self.model, progress=Progress(), loss=self.custom.loss)
        # Twice the largest: the optimizer allocates its state in the first step. And once with the
        # prompts that take most memory, which these steps need not draw.
        if trainer.prompts is not None:
            trainer.probe_memory(largest)
        for batch in (largest, largest, median):
            self._take_step(trainer, batch)
        step_seconds, _ = self._time(lambda: self._take_step(trainer, median))
        validate_one = partial(
            validate,
            self.model,
            [val_batch],
            loss=trainer.loss,
            custom_metrics=self.custom.metrics,
        )
        return _Measurements(
            cache=cache,
            largest_batch=largest.num_masks,
            load_seconds=0.0 if cache else load_seconds / config.batch_size,
            encode_seconds=encode_seconds,
            step_seconds=step_seconds,
            val_seconds=self._time(validate_one)[0],
            save_seconds=self._time_saving(trainer),
        )

    def _time(self, work: Callable[[], T]) -> tuple[float, T]:
        start = synchronized_time(self.device)
        result = work()
        return synchronized_time(self.device) - start, result

    def _take_step(self, trainer: Trainer, batch: Batch) -> None:
        trainer.train_step([batch] * self.config.accumulate_steps)

    @torch.no_grad()
    @exact_float32()
    def _time_encoding(self, batch: Batch) -> float:
        image = batch.images[:1].to(self.device), batch.input_sizes[:1].to(self.device)
        amp_dtype = pick_amp_dtype(self.config.amp, self.device)
        with torch.autocast(self.device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
            self.model.encode_frozen(*image)  # the first is slower
            return self._time(lambda: self.model.encode_frozen(*image))[0]

    def _with_embeddings(self, batch: Batch) -> Batch:
        assert self.model.frozen_shape is not None
        shape = (len(batch.image_ids), *self.model.frozen_shape)
        embeddings = torch.zeros(shape, dtype=getattr(torch, self.config.cache_dtype))
        return replace(batch, embeddings=embeddings)

    def _time_saving(self, trainer: Trainer) -> float:
        optimizer = gather_state(trainer.optimizer)
        state = {"model": self.model.sam.state_dict(), "optimizer": optimizer}
        seconds = run_on_all_ranks(lambda: self._save_and_delete(state))
        return float(distributed.broadcast(seconds))

    def _save_and_delete(self, state: dict[str, Any]) -> float:
        if not distributed.is_main():
            return 0.0
        path = self.output_dir / f"dry_run-{os.getpid()}.ckpt"
        try:
            # By way of the host's memory, as a run saves it
            return self._time(lambda: save_tensors(path, HostCopy().copy(state)))[0]
        except OSError as error:
            raise ConfigError(f"output_dir: a checkpoint cannot be written: {error}.") from error
        finally:
            path.unlink(missing_ok=True)


def log_forecast(forecast: Forecast, config: TrainConfig) -> None:
    """Logs a forecast, with a warning where memory or disk will not be enough."""
    LOGGER.info("dry run: nothing was trained, and nothing is kept; the run would take about")
    LOGGER.info(
        "  memory  %.2f of %.1f GiB a process, on a batch of %d objects",
        forecast.peak_memory_gib,
        forecast.memory_gib,
        forecast.largest_batch,
    )
    LOGGER.info(
        "  time    %s: %s for %d steps at %.3g images/s (%.3g masks/s)%s, %s for validation, %s "
        "for saving",
        format_duration(forecast.seconds),
        format_duration(forecast.training_seconds),
        config.steps,
        forecast.images_per_second,
        forecast.masks_per_second,
        f", {format_duration(forecast.encoding_seconds)} for encoding before"
        if forecast.encoding_seconds
        else "",
        format_duration(forecast.validation_seconds),
        format_duration(forecast.saving_seconds),
    )
    LOGGER.info(
        "  disk    %s for checkpoints%s; %s are free",
        format_gib(forecast.checkpoint_bytes),
        f", {format_gib(forecast.embedding_bytes)} for embeddings in {cache_dir_of(config)}"
        if forecast.embedding_bytes
        else "",
        format_gib(forecast.free_bytes),
    )
    if forecast.checkpoint_bytes > forecast.free_bytes:
        LOGGER.warning("THE DISK IS TOO SMALL: make room, or name another output_dir")
    if forecast.peak_memory_gib > 0.9 * forecast.memory_gib:
        LOGGER.warning(
            "MEMORY IS SHORT, and other programs on this host may use the rest. %s", MEMORY_ADVICE
        )
