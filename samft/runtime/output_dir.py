"""The output folder of a run: created, locked, an earlier run archived, status.json written."""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from samft.errors import ConfigError, RunStopped
from samft.runtime import own_files
from samft.runtime.files import try_lock, write_json

_LOCK_SECONDS = 10.0  # a run that has been told to end may take some seconds


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
def lock_output_dir(
    folder: Path,
    *,
    is_part: Callable[[str], bool] = own_files.is_part_of_run,
    subfolders: tuple[str, ...] = (own_files.PREVIOUS,),
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[None]:
    """Locks an output folder for this process, and deletes temporary files of a killed one.

    Args:
        folder: The folder.
        is_part: Whether a temporary file, named relative to the folder, is one of this command.
        subfolders: Where there may be such files too.
        should_stop: Asked while the lock is waited for.

    Raises:
        ConfigError: Another run holds the lock, also after `_LOCK_SECONDS`.
        RunStopped: `should_stop` said so.
    """
    deadline = time.monotonic() + _LOCK_SECONDS
    while (lock := try_lock(folder / ".lock")) is None:
        if should_stop():
            raise RunStopped(f"stopped while another run was writing into {folder}.")
        if time.monotonic() > deadline:
            raise ConfigError(
                f"output_dir: another run is writing into {folder}: wait for its end, or name "
                "another folder."
            )
        time.sleep(0.5)
    with lock:
        delete_partial_files(folder, is_part=is_part, subfolders=subfolders)
        yield


def delete_partial_files(
    folder: Path,
    *,
    is_part: Callable[[str], bool] = own_files.is_part_of_run,
    subfolders: tuple[str, ...] = (own_files.PREVIOUS,),
) -> None:
    """Deletes the temporary files of a killed process. No other process may write there.

    Args:
        folder: The output folder.
        is_part: Whether a temporary file, named relative to the folder, is one of this command.
        subfolders: Where there may be such files too.
    """
    for place in (folder, *(folder / name for name in subfolders)):
        for part in place.glob(".*.part"):
            if is_part(part.relative_to(folder).as_posix()) and part.is_file():
                part.unlink(missing_ok=True)


def holds_previous_run(folder: Path) -> bool:
    """Whether a folder holds a run that has measured something, which a fresh start archives."""
    return own_files.has_measured(folder, own_files.own_names(folder))


def archive_previous_run(folder: Path) -> Path | None:
    """Moves the files of an earlier run to a subfolder, so that a fresh start overwrites none.

    Files that no run can be shown to have written stay where they are.

    Args:
        folder: The output folder.

    Returns:
        The subfolder, `previous-1` or the next free number; None if there is no earlier run, or it
        was stopped before its first validation.
    """
    names = own_files.own_files(folder)
    if not own_files.has_measured(folder, names):
        return None
    number = 1
    while (archive := folder / f"previous-{number}").exists():
        number += 1
    for name in names:
        (archive / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).rename(archive / name)
    subfolders = {parent for name in names for parent in Path(name).parents[:-1]}
    for subfolder in sorted(subfolders, reverse=True):  # those within others first
        with contextlib.suppress(OSError):  # somebody else's files are in it
            (folder / subfolder).rmdir()
    return archive


# Of the run of this process, once it has written that it runs: folder, step, last checkpoint.
_running: tuple[Path | None, int, str | None] | None = None


def end_status(*, exit_code: int, reason: str) -> None:
    """Writes that this process's run has failed; of a run that has not begun, for launch.sh alone.

    Args:
        exit_code: See `write_status`.
        reason: See `write_status`.
    """
    folder, step, last = _running or (None, 0, None)
    write_status(
        folder,
        state="failed",
        step=step,
        exit_code=exit_code,
        reason=reason,
        last_checkpoint=last,
    )


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
        path = folder / "status.json"
        if not path.exists() or own_files.is_own(folder, path.name):
            write_json(path, status)
    global _running
    _running = (folder, step, last_checkpoint) if state == "running" else None
    launcher_file = os.environ.get("SAMFT_STATUS_FILE")
    if launcher_file and Path(launcher_file).parent.is_dir():
        write_json(Path(launcher_file), status)
