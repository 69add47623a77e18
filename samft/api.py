"""A training from Python: `samft.finetune`, with a caller's own data, loss, metrics, callbacks."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from samft.config import TrainConfig
from samft.data.loaders import ending_workers
from samft.data.map_style import MapStyleDataset
from samft.errors import ConfigError
from samft.recipes.train import run
from samft.runtime.device import process_settings_restored
from samft.runtime.files import read_json
from samft.runtime.metrics_file import FILE_NAME, GENERAL_PREFIX, read_metrics_file
from samft.runtime.signals import (
    StopRequest,
    check_launch_environment,
    dying_with_parent,
    end_helper_thread,
    stop_on_signal,
)
from samft.settings import convert_values, raise_for_problems
from samft.training.custom import Callback, CustomParts, MaskMetric
from samft.training.losses import LossFunction

# Settings that a dataset from Python makes meaningless: of its own split, and of both splits.
_OF_SPLIT = ("split", "annotations", "images")
_OF_FILES = ("data_root", "allow_links", "pixel_range", "channels", "page")


@dataclass(frozen=True)
class FinetuneResult:
    """What a run has come to.

    Attributes:
        best_checkpoint: For `samft.load_sam`, and whatever reads SAM's checkpoints; None if no
            validation gave a number, and of a dry run.
        scores: Validation metrics of that checkpoint, a caller's own among them, and those of a
            general set, which begin with `general_`.
        baseline: The same of the untouched checkpoint, at step 0.
        summary: What `summary.json` holds; of a dry run, the forecast.
    """

    best_checkpoint: Path | None
    scores: dict[str, float]
    baseline: dict[str, float]
    summary: dict[str, Any]


def finetune(
    config: TrainConfig,
    *,
    train_data: MapStyleDataset | None = None,
    val_data: MapStyleDataset | None = None,
    loss: LossFunction | None = None,
    metrics: Mapping[str, MaskMetric] | None = None,
    callbacks: Sequence[Callback] = (),
) -> FinetuneResult:
    """Fine-tunes as `samft train` does, and with parts of the caller's. Collective.

    Called again with the same configuration, it resumes the run in `config.output_dir`, or returns
    the result of a finished one. Under `torchrun`, every process calls it. While it runs, Ctrl-C
    and SIGTERM save and stop; afterwards, signal handlers, logging, and the settings and random
    state of PyTorch are the caller's again.

    Args:
        config: As `samft.TrainConfig(data_root="DATASET", model_type="vit_b", ...)`.
        train_data: Instead of the configuration's training split, see `MapStyleDataset`.
        val_data: Instead of its validation split. With neither, `val_fraction` of `train_data` is
            held out.
        loss: Instead of samft's: takes what `samft.training.losses.mask_losses` takes, without the
            weights, and returns a `MaskLosses` of one number for each mask. It is called for a few
            masks at a time, and sums are taken by samft.
        metrics: By name, functions of a predicted and a true mask, bool [H, W] in the pixels of the
            original image, that return a number. Means over all masks are logged.
        callbacks: Called on rank 0 with the step and its metrics, after each validation. One that
            returns True ends the run, which is then finished.

    Returns:
        The result, the same in each process.

    Raises:
        UserError: The configuration, the data, the checkpoint or what was brought along cannot be
            used.
        RunStopped: A signal, `stop_after` or the job's time limit ended the run; all is saved.
        TrainingError: The run cannot continue.

    Example:
        >>> import samft
        >>> samft.finetune(samft.TrainConfig(model_type="vit_tiny", checkpoint_path="auto"))
        Traceback (most recent call last):
            ...
        samft.errors.ConfigError: the configuration has a problem
          - data_root is missing: give the dataset's folder, or train_annotations and train_images.
    """
    if not isinstance(config, TrainConfig):
        kind = type(config).__name__
        raise ConfigError(f"config: give a samft.TrainConfig(...), not a {kind}.")
    custom = CustomParts(train_data, val_data, loss, metrics or {}, callbacks)
    config, problems = convert_values(config)
    problems += config.check(own=custom.datasets) + custom.check()
    raise_for_problems(problems + _check_unused(config, custom))
    check_launch_environment()
    with _process_restored() as stop:
        summary = run(config, stop, custom)
    return _read_result(config, summary)


@contextlib.contextmanager
def _process_restored() -> Iterator[StopRequest]:
    # What a run sets in its process, or starts, is as before at the end.
    with contextlib.ExitStack() as until_end:
        until_end.enter_context(dying_with_parent())
        until_end.enter_context(process_settings_restored())
        until_end.enter_context(ending_workers())
        until_end.callback(end_helper_thread)
        yield until_end.enter_context(stop_on_signal())


def _check_unused(config: TrainConfig, custom: CustomParts) -> list[str]:
    # What would be ignored is refused, so that config.yaml says nothing that was not so.
    own, default = custom.datasets, {each.name: each.default for each in fields(config)}
    why = {f"{split}_{part}": f"{split}_data" for split in own for part in _OF_SPLIT}
    has_test_files = config.test_annotations is not None or config.test_split not in (
        "auto",
        "none",
    )
    holds_out = "val" not in own and config.data_root is None and config.val_annotations is None
    if "train" in own and ("val" in own or holds_out) and not has_test_files:
        unused = _OF_FILES[:1] if config.general_data_root is not None else _OF_FILES
        why |= dict.fromkeys(unused, " and ".join(f"{split}_data" for split in own))
    if "train" in own:
        why["group_by"] = "train_data"
    if custom.loss is not None:
        weights = ("loss_focal_weight", "loss_dice_weight", "loss_iou_weight")
        why |= dict.fromkeys((*weights, "cuda_graphs"), "loss")
    return [
        f"{name}: has no effect with {by}: leave it out."
        for name, by in why.items()
        if getattr(config, name) != default[name]
    ]


def _read_result(config: TrainConfig, summary: dict[str, Any]) -> FinetuneResult:
    best = summary.get("best_checkpoint")
    scores: dict[str, float] = {}
    if best is not None:
        scores = _to_numbers(read_json(Path(best).with_suffix(".json"))["metrics"])
    baseline: dict[str, float] = {}
    if not config.dry_run:
        lines = read_metrics_file(Path(config.output_dir).expanduser() / FILE_NAME).whole
        first = next((one.record for one in lines if one.record["split"] == "val"), {})
        baseline = _to_numbers({name: first[name] for name in first if name in scores})
    if (general := summary.get("general")) and general["since_step"]:
        # Other images than at first: what both have in common is scored at the end.
        for numbers, name in ((scores, "after"), (baseline, "before")):
            for metric in [each for each in numbers if each.startswith(GENERAL_PREFIX)]:
                del numbers[metric]
            numbers[f"{GENERAL_PREFIX}per_mask_iou"] = general[name]
    return FinetuneResult(None if best is None else Path(best), scores, baseline, summary)


def _to_numbers(values: dict[str, float | None]) -> dict[str, float]:
    # JSON has null for what is no number.
    return {
        name.removeprefix("val_"): math.nan if value is None else value
        for name, value in values.items()
    }
