"""The output folder of a run: created, locked, an earlier run archived, status.json written."""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from samft.errors import ConfigError
from samft.runtime.files import try_lock, write_json

RUN_FILES = (
    "config.yaml metrics.jsonl bad_steps.jsonl objects.json summary.json report.html train.log "
    "tensorboard previous".split()
)
_LOCK_SECONDS = 10.0  # the last processes of a killed run may take some seconds to end


def create_writable_dir(folder: Path, *, field: str = "output_dir") -> None:
    """Creates a folder, and checks that files can be written there.

    Args:
        folder: The folder; may exist.
        field: The setting that names it, for the error message.

    Raises:
        ConfigError: No file can be written there.
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
    """Locks an output folder for this process, and deletes temporary files of a killed one.

    Raises:
        ConfigError: Another run holds the lock, also after `_LOCK_SECONDS`.
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


def delete_partial_files(folder: Path) -> None:
    """Deletes the temporary files of a killed process. No other process may write there."""
    for pattern in (".*.part", "*/.*.part"):
        for part in folder.glob(pattern):
            part.unlink(missing_ok=True)


def holds_previous_run(folder: Path) -> bool:
    """Whether a folder holds a run that has measured something, which a fresh start archives."""
    metrics = folder / "metrics.jsonl"
    return metrics.exists() and metrics.stat().st_size > 0


def archive_previous_run(folder: Path) -> Path | None:
    """Moves the files of an earlier run to a subfolder, so that a fresh start overwrites none.

    Args:
        folder: The output folder.

    Returns:
        The subfolder, `previous-1` or the next free number; None if there is no earlier run, or it
        was stopped before its first validation.
    """
    if not holds_previous_run(folder):
        return None
    paths = [folder / name for name in RUN_FILES]
    for checkpoint in folder.glob("*.ckpt"):
        paths += [checkpoint, checkpoint.with_suffix(".json")]
    paths += folder.glob("*.png")
    number = 1
    while (archive := folder / f"previous-{number}").exists():
        number += 1
    archive.mkdir()
    for path in paths:
        if path.exists():
            path.rename(archive / path.name)
    return archive


def write_status(
    folder: Path | None,
    *,
    state: str,
    step: int = 0,
    exit_code: int | None = None,
    reason: str = "",
    last_checkpoint: str | None = None,
) -> None:
    """Writes status.json, and a copy to the file named by `SAMFT_STATUS_FILE` (of launch.sh).

    Args:
        folder: The run's output folder; None, or absent, if it is not known or made yet.
        state: `running`, `done`, `failed` or `preempted`.
        step: Optimizer steps done.
        exit_code: The exit code of the process; None while it runs.
        reason: Why it ended, in one sentence.
        last_checkpoint: The file to resume from.
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
    launcher_file = os.environ.get("SAMFT_STATUS_FILE")
    if launcher_file and Path(launcher_file).parent.is_dir():
        write_json(Path(launcher_file), status)
