"""What a run goes on from: the newest whole state, checked against what is asked for now."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from samft import distributed
from samft.checkpoints.training_state import LAST_NAME, load_latest, read_state_file, run_dir_of
from samft.config import TrainConfig, changed_settings
from samft.errors import ConfigError
from samft.recipes.build import images_per_step
from samft.runtime.logs import LOGGER


@dataclass(frozen=True)
class Resume:
    """A state to go on from.

    Attributes:
        state: What `save_last` was given.
        path: Where it lies.
        passed_over: Newer files that could not be used, each with the reason.
    """

    state: dict[str, Any]
    path: Path
    passed_over: list[str]

    @property
    def folder(self) -> Path:
        """The output folder of the run."""
        return run_dir_of(self.path)


def find_resume(config: TrainConfig, output_dir: Path, fingerprint: str) -> Resume | None:
    """The state to go on from, checked against the configuration.

    Returns:
        It; None for a fresh start.

    Raises:
        CheckpointError: There are states, but all are damaged; or `resume` names no good file.
        ConfigError: The run in the folder differs in a way that matters; a table says how.
    """
    # Started again by torchrun after a failure, the run itself is what is to be gone on with.
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if config.resume == "auto" or (again and (output_dir / LAST_NAME).exists()):
        newest = load_latest(output_dir)
        if newest is None:
            return None
        found = Resume(*newest)
    elif config.resume == "never":
        return None
    else:
        path = Path(config.resume).expanduser()
        found = Resume(read_state_file(path), path, [])
    rows = changed_settings(found.state["config"], config)
    saved = found.state["fingerprint"]
    if saved != fingerprint:
        rows.append(f"{'training data':24} {saved[:12]:24} {fingerprint[:12]}")
    if rows:
        _refuse(found.path, rows)
    return found


def _refuse(path: Path, rows: list[str]) -> None:
    header = f"{'field':24} {'the run has':24} asked for"
    table = "\n  ".join([header, *rows])
    raise ConfigError(
        f"{path} holds a run of another configuration:\n  {table}\nGive the run's own values "
        "to go on with it, or another output_dir, or `--resume never` to start afresh."
    )


def keep_images_per_step(config: TrainConfig, found: Resume) -> TrainConfig:
    """Divides a step as before, but among the processes that there are now.

    A run that was started on other processes, with the same command, goes on with as many images a
    step as it had; `accumulate_steps`, or then `batch_size`, change to that end, and say so.

    Args:
        config: What is asked for.
        found: What is gone on from.

    Returns:
        The configuration to train with.

    Raises:
        ConfigError: The step cannot be divided among so many processes, or other values of
            `batch_size` and `accumulate_steps` were given that make up another step.
    """
    wanted, world_size = found.state["global_batch"], distributed.get_world_size()
    if images_per_step(config) == wanted:
        return config
    saved = found.state["config"]
    as_saved = config.batch_size * config.accumulate_steps == (
        saved["batch_size"] * saved["accumulate_steps"]
    )
    per_process, rest = divmod(wanted, world_size)
    if rest:
        fitting = [n for n in range(1, wanted + 1) if wanted % n == 0]
        near = sorted(sorted(fitting, key=lambda n: abs(n - world_size))[:3])
        raise ConfigError(
            f"{found.path} holds a run with {wanted} images per step, which {world_size} "
            f"processes cannot share evenly: start {' or '.join(str(n) for n in near)} of them, or "
            "take another output_dir."
        )
    batch_size = max(n for n in range(1, config.batch_size + 1) if per_process % n == 0)
    fit = {"batch_size": batch_size, "accumulate_steps": per_process // batch_size}
    words = " and ".join(f"{name} {value}" for name, value in fit.items())
    if not as_saved:
        _refuse(
            found.path,
            [f"{'images per step':24} {wanted!s:24} {images_per_step(config)}, not {words}"],
        )
    LOGGER.info("going on with %d images per step on %d process(es): %s", wanted, world_size, words)
    return replace(config, **fit)
