"""What a run resumes from: the newest undamaged state, checked against the configuration."""

import dataclasses
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from samft import distributed
from samft.checkpoints.top_k import TopK
from samft.checkpoints.training_state import LAST_NAME, load_latest, load_state_file, run_dir_of
from samft.commands import shell_command
from samft.config import TrainConfig
from samft.config_checks import effective_value
from samft.errors import ConfigError
from samft.recipes.build import images_per_step
from samft.runtime.logs import LOGGER
from samft.training.custom import CustomParts
from samft.training.optim import cut_warmup, learning_rate_factor

# Settings that may differ when a run is resumed, because they do not change what is learnt. Of
# batch_size and accumulate_steps, the product with the number of processes is kept.
FREE_ON_RESUME = frozenset(
    """data_root train_split val_split test_split train_annotations train_images val_annotations
    val_images test_annotations test_images general_data_root batch_size accumulate_steps
    metrics_interval patience output_dir num_workers cache_embeddings cache_dir cache_dtype
    cache_max_gib save_top_k resume device stop_after debug on_bad_image allow_links attention
    decoder deterministic mask_chunk compile cuda_graphs activation_checkpointing
    optimizer_sharding trackers dry_run max_bad_steps detect_anomaly hang_timeout
    save_before_limit probe_memory""".split()
)
# Settings that may differ as long as they change the rate of no step that was taken.
_OF_SCHEDULE = frozenset({"steps", "lr_schedule", "warmup_steps", "decay_fraction"})


@dataclass(frozen=True)
class ResumePoint:
    """A state to resume from.

    Attributes:
        state: What `save_last` was given; whoever loads tensors from it pops them, so that their
            memory is freed.
        path: The file that it was read from.
        problems: Newer files that could not be used, each with the reason.
    """

    state: dict[str, Any]
    path: Path
    problems: list[str]

    @property
    def output_dir(self) -> Path:
        """The output folder of the run that saved it."""
        return run_dir_of(self.path)


def find_resume_point(
    config: TrainConfig,
    output_dir: Path,
    fingerprint: str,
    *,
    val_fingerprint: str | None = None,
    custom: CustomParts | None = None,
) -> ResumePoint | None:
    """Reads the state to resume from and checks that it is of the same configuration.

    Args:
        config: The configuration as the user gave it.
        output_dir: The output folder.
        fingerprint: Of the training data, see `Splits`.
        val_fingerprint: Of the validation data, on which the baseline and the best checkpoints were
            scored; None: not compared.
        custom: What a caller of `finetune` brings along; None: nothing.

    Returns:
        The state; None for a fresh start.

    Raises:
        CheckpointError: There are states, but all are damaged; or `resume` names no good file.
        ConfigError: The run in the folder differs in a way that matters; a table says how.
    """
    custom = custom or CustomParts()
    point = _read_resume_point(config, output_dir)
    if point is None:
        return None
    rows = changed_settings(point.state["config"], config)
    rows += _changed_data("training data", point.state["fingerprint"], fingerprint)
    # Of a state that is older than this entry, nothing is known.
    rows += _changed_data("validation data", point.state.get("val_fingerprint"), val_fingerprint)
    saved_loss = point.state.get("loss")  # of a caller, which no setting names
    if saved_loss != custom.loss_name:
        names = [name or "samft's own" for name in (saved_loss, custom.loss_name)]
        rows.append(f"{'loss':24} {names[0]:24} {names[1]}")
    changed = {row.split()[0] for row in rows}
    if rows and changed <= _OF_SCHEDULE and _kept_schedule(config, point):
        return point
    if changed == {"steps"}:
        _refuse_more_steps(point, config, custom)
    if rows:
        raise _other_configuration(point.path, rows)
    return point


def keep_schedule(config: TrainConfig, point: ResumePoint) -> TrainConfig:
    """Goes on with the warm-up that a run has begun with, where it was given more steps.

    The warm-up is cut to a tenth of a run. With more steps it would have been longer, and the run
    not the same as one of as many steps from the start; so it stays as it was, which is logged.

    Args:
        config: The configuration as the user gave it.
        point: The state to resume from, which `find_resume_point` has accepted.

    Returns:
        The configuration to train with.
    """
    kept = _kept_schedule(config, point) or config
    if kept != config:
        LOGGER.info(
            "warm-up: %d steps, as the run has begun with, not %d",
            kept.warmup_steps,
            config.warmup_steps,
        )
    return kept


def _kept_schedule(config: TrainConfig, point: ResumePoint) -> TrainConfig | None:
    # The configuration that has all steps of a run at the rates at which they were taken: as it was
    # given, or with the run's own warm-up. None if both would have had another rate somewhere.
    saved, taken = point.state["config"], _steps_taken(point)
    warmup = cut_warmup(
        point.state.get("warmup_steps", saved["warmup_steps"]), steps=saved["steps"]
    )
    alternatives = [config]
    if config.warmup_steps == saved["warmup_steps"]:
        alternatives.append(replace(config, warmup_steps=warmup))
    before = [_rate_factor({**saved, "warmup_steps": warmup}, step) for step in range(taken)]
    for each in alternatives:
        now = dataclasses.asdict(each)
        if each.steps >= taken and before == [_rate_factor(now, step) for step in range(taken)]:
            return each
    return None


def _steps_taken(point: ResumePoint) -> int:
    return int(point.state["progress"]["step"])


def _rate_factor(settings: dict[str, Any], step: int) -> float:
    # Without a setting, a version of samft did what its default does.
    return learning_rate_factor(
        step,
        steps=settings["steps"],
        schedule=settings["lr_schedule"],
        warmup_steps=cut_warmup(settings["warmup_steps"], steps=settings["steps"]),
        decay_fraction=settings.get("decay_fraction", TrainConfig.decay_fraction),
    )


def _refuse_more_steps(point: ResumePoint, config: TrainConfig, custom: CustomParts) -> None:
    # The rates of the steps that were taken are not those of a longer run: more steps are another.
    saved_steps, best, taken = (
        point.state["config"]["steps"],
        point.state["best"],
        _steps_taken(point),
    )
    if not (saved_steps < config.steps and best):
        return
    folder = point.output_dir
    is_finished = taken == saved_steps
    state = "is finished: it has taken its" if is_finished else f"has taken {taken} of its"
    finish = "" if is_finished else f", or finish it with `--steps {saved_steps}`"
    changes = {
        "checkpoint_path": str(folder / TopK.from_list(best)[0].name),
        "steps": config.steps - taken,
        "output_dir": str(_folder_beside(Path(config.output_dir))),
    }
    flags = [part for name, value in changes.items() for part in (f"--{name}", value)]
    command = shell_command("train", "--config", folder / "config.yaml", *flags)
    if custom.has_any:  # which only the caller's program has
        values = ", ".join(f"{name}={value!r}" for name, value in changes.items())
        command = f"config = dataclasses.replace(config, {values})"
    raise ConfigError(
        f"the run in {folder} {state} {saved_steps} steps, and its learning rate "
        f"({config.lr_schedule}) was scheduled for them. To go on from its best checkpoint, start "
        f"another run:\n  {command}\nor repeat it with {config.steps} steps in another "
        f"output_dir, or with `--resume never`{finish}. A run with `--lr_schedule constant` can be "
        "given more steps at any time, and one with wsd before its rate falls."
    )


def _folder_beside(folder: Path) -> Path:
    # "run-more" beside "run", but "more" in ".", "..", "~" and "/", which have no name to add to.
    has_name = folder.name not in ("", "..", "~")
    return folder.with_name(f"{folder.name}-more") if has_name else folder / "more"


def _read_resume_point(config: TrainConfig, output_dir: Path) -> ResumePoint | None:
    # Restarted by torchrun after a failure, a run continues itself, whatever `resume` said.
    is_restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if config.resume == "auto" or (is_restarted and (output_dir / LAST_NAME).exists()):
        latest = load_latest(output_dir)
        return ResumePoint(*latest) if latest is not None else None
    if config.resume == "never":
        return None
    path = Path(config.resume).expanduser()
    return ResumePoint(load_state_file(path), path, [])


def _changed_data(name: str, saved: str | None, now: str | None) -> list[str]:
    # Lines of a table, as of `changed_settings`.
    if saved is None or now is None or saved == now:
        return []
    return [f"{name:24} {saved[:12]:24} {now[:12]}"]


def _other_configuration(path: Path, rows: list[str]) -> ConfigError:
    header = f"{'field':24} {'the run has':24} asked for"
    table = "\n  ".join([header, *rows])
    return ConfigError(
        f"{path} holds a run of another configuration:\n  {table}\nGive the run's own values "
        "to resume it, or another output_dir, or `--resume never` to start a new run."
    )


def keep_images_per_step(config: TrainConfig, point: ResumePoint) -> TrainConfig:
    """Divides the images of a step among the processes that there are now.

    A run that is resumed on another number of processes keeps its number of images per step:
    `accumulate_steps`, and if need be `batch_size`, change accordingly, which is logged.

    Args:
        config: The configuration as the user gave it.
        point: The state to resume from.

    Returns:
        The configuration to train with.

    Raises:
        ConfigError: The step cannot be divided among so many processes, or other values of
            `batch_size` and `accumulate_steps` were given that make up another step.
    """
    wanted, world_size = point.state["global_batch"], distributed.get_world_size()
    if images_per_step(config) == wanted:
        return config
    per_process, rest = divmod(wanted, world_size)
    if rest:
        divisors = [n for n in range(1, wanted + 1) if wanted % n == 0]
        nearest = sorted(sorted(divisors, key=lambda n: abs(n - world_size))[:3])
        raise ConfigError(
            f"{point.path} holds a run with {wanted} images per step, which {world_size} "
            f"processes cannot share evenly: start {' or '.join(str(n) for n in nearest)} of them, "
            "or take another output_dir."
        )
    # The largest batch that divides the share of a process and is not above the one given, which
    # is known to fit into memory.
    batch_size = max(n for n in range(1, config.batch_size + 1) if per_process % n == 0)
    division = {"batch_size": batch_size, "accumulate_steps": per_process // batch_size}
    described = " and ".join(f"{name} {value}" for name, value in division.items())
    saved = point.state["config"]
    saved_share = saved["batch_size"] * saved["accumulate_steps"]
    if config.batch_size * config.accumulate_steps != saved_share:
        row = f"{'images per step':24} {wanted!s:24} {images_per_step(config)}, not {described}"
        raise _other_configuration(point.path, [row])
    LOGGER.info(
        "resuming with %d images per step on %d process(es): %s", wanted, world_size, described
    )
    return replace(config, **division)


def changed_settings(saved: dict[str, Any], config: TrainConfig) -> list[str]:
    """The settings that forbid to resume a run, because they change what is learnt.

    One that has no effect, such as `decay_fraction` without wsd, forbids nothing; nor does one that
    is only spelled out, such as a `lora_alpha` as large as the rank.

    Args:
        saved: The configuration of the saved run, as plain values.
        config: The configuration to resume it with.

    Returns:
        Lines of a table: setting, its value in the saved run, its value now.
    """
    # A version of samft without a setting did what its default does.
    names = [field.name for field in dataclasses.fields(config)]
    before = TrainConfig(**{name: saved[name] for name in names if name in saved})
    return [
        f"{name:24} {getattr(before, name)!s:24} {getattr(config, name)}"
        for name in names
        if name not in FREE_ON_RESUME
        and getattr(before, name) != getattr(config, name)
        and effective_value(name, before) != effective_value(name, config)
    ]
