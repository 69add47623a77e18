"""The output folder of a run: made writable, locked, its earlier run archived, its status."""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from samft.errors import ConfigError
from samft.runtime.files import try_lock, write_json


def delete_partial_files(folder: Path) -> None:
    """Deletes what a killed process left of files that it was writing. One process at a time."""
    for pattern in (".*.part", "*/.*.part"):
        for part in folder.glob(pattern):
            part.unlink(missing_ok=True)


def write_status(
    folder: Path | None,
    *,
    state: str,
    step: int = 0,
    exit_code: int | None = None,
    reason: str = "",
    last_checkpoint: str | None = None,
) -> None:
    """Writes status.json, and the same to the file that `SAMFT_STATUS_FILE` names (launch.sh's).

    Args:
        folder: The run's output folder, if it is known and exists.
        state: `running`, `done`, `failed` or `preempted`.
        step: Optimizer steps done.
        exit_code: What the process is about to exit with; None while it runs.
        reason: One sentence.
        last_checkpoint: The file to go on from.
    """
    status = {
        "state": state,
        "step": step,
        "exit_code": exit_code,
        "reason": reason,
        "last_checkpoint": last_checkpoint,
    }
    if folder is not None and folder.is_dir():
        write_json(folder / "status.json", status)
    told = os.environ.get("SAMFT_STATUS_FILE")
    if told and Path(told).parent.is_dir():
        write_json(Path(told), status)


RUN_FILES = (
    "config.yaml metrics.jsonl bad_steps.jsonl objects.json summary.json report.html train.log "
    "tensorboard previous".split()
)


_LOCK_SECONDS = 10.0  # a killed run's last processes may take some to be gone


def create_writable_dir(folder: Path, *, field: str = "output_dir") -> None:
    """Makes a folder and makes sure that files can be written there.

    Args:
        folder: The folder.
        field: What the configuration calls it.

    Raises:
        ConfigError: They cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"{field}: {folder} cannot be written ({error.strerror}): choose another folder."
        ) from error


@contextmanager
def lock_output_dir(folder: Path) -> Iterator[None]:
    """Keeps an output folder to this process, and clears what a killed one left half written.

    Raises:
        ConfigError: Another run writes into it.
    """
    deadline = time.monotonic() + _LOCK_SECONDS
    while (lock := try_lock(folder / ".lock")) is None:
        if time.monotonic() > deadline:
            raise ConfigError(
                f"output_dir: another run is writing into {folder}: wait for its end, or name "
                "another folder."
            )
        time.sleep(0.5)
    with lock:
        delete_partial_files(folder)
        yield


def holds_previous_run(folder: Path) -> bool:
    """Whether a folder holds a run that has measured something, which a fresh start archives."""
    metrics = folder / "metrics.jsonl"
    return metrics.exists() and metrics.stat().st_size > 0


def archive_previous_run(folder: Path) -> Path | None:
    """Moves an earlier run's files into a folder of their own, so that a fresh start loses none.

    Args:
        folder: The output folder.

    Returns:
        Where they are now, `previous-1` or the next free number; None if there were none, or that
        run was stopped before it had measured anything.
    """
    if not holds_previous_run(folder):
        return None
    found = [folder / name for name in RUN_FILES]
    for checkpoint in folder.glob("*.ckpt"):
        found += [checkpoint, checkpoint.with_suffix(".json")]
    found += folder.glob("*.png")
    number = 1
    while (aside := folder / f"previous-{number}").exists():
        number += 1
    aside.mkdir()
    for path in found:
        if path.exists():
            path.rename(aside / path.name)
    return aside
