"""The state to resume from: `last.ckpt` and the one before it, both verified by SHA-256 sidecars.

A flipped bit in a checkpoint loads without an error, so beside each file there is a JSON sidecar
with its SHA-256. Two files cannot be replaced at once; so the sidecar is written first, and lists
two digests: of the content that is there, and of the content that is about to replace it. Whenever
the process is killed, `last.ckpt` is the old state or the new one, `previous/last.ckpt` is the
state before it, and each has a digest that its sidecar lists.
"""

import contextlib
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from samft.checkpoints.top_k import write_tensors
from samft.errors import CheckpointError, is_out_of_memory
from samft.runtime import own_files
from samft.runtime.files import (
    atomic_replacement,
    read_digests,
    sha256_of,
    unused_path,
    write_json,
)
from samft.runtime.logs import LOGGER

FORMAT_VERSION = 1
LAST_NAME = own_files.LAST_NAME
_PREVIOUS = own_files.PREVIOUS  # the folder of the state before it


def save_last(folder: Path, state: dict[str, Any]) -> None:
    """Saves the state to resume from, and keeps the one before it.

    Args:
        folder: The output folder.
        state: Tensors and plain Python values.

    Raises:
        OSError: The disk is full or the folder cannot be written. What was there is whole.
    """
    last, previous = folder / LAST_NAME, folder / _PREVIOUS / LAST_NAME
    content = {"format": FORMAT_VERSION, **state}
    # Every line below is one atomic change. In the comments O is the old last state, P the one
    # before it, N the new one; "file | sidecar" shows what a process that is killed right after
    # the line leaves. An interrupted save may have left two digests in a sidecar: then P stands for
    # both. The next save starts from any of these and needs no clean-up.
    with atomic_replacement(last, partial(write_tensors, content)) as part:
        # N is whole and synced under a temporary name. last: O | O   previous: P | P
        new_digest = sha256_of(part)
        digests = [new_digest]
        if last.exists():
            old_digest = _listed_digest(last)
            previous.parent.mkdir(exist_ok=True)
            _write_sidecar(previous, old_digest, *_read_sidecar(previous))  # previous: P | O P
            _replace_with_link(previous, last)  # previous: O | O P
            _write_sidecar(previous, old_digest)  # previous: O | O
            digests.append(old_digest)
        _write_sidecar(last, *digests)  # last: O | N O
    # The end of the block moved N into place. last: N | N O   previous: O | O
    with contextlib.suppress(OSError):  # N is saved, and a sidecar with two digests verifies it
        _write_sidecar(last, new_digest)  # last: N | N


def _sidecar_of(path: Path) -> Path:
    return path.with_suffix(".json")


def _read_sidecar(path: Path) -> list[str]:
    # The digests that the file may have; none without a readable sidecar.
    return read_digests(_sidecar_of(path))


def _write_sidecar(path: Path, *digests: str) -> None:
    distinct = list(dict.fromkeys(digests))
    write_json(_sidecar_of(path), {"format": FORMAT_VERSION, "sha256": distinct})


def _listed_digest(path: Path) -> str:
    # What the sidecar says, not what the file has now: a file that has rotted on the disk since it
    # was written must not get a fresh digest that vouches for it.
    listed = _read_sidecar(path)
    if len(listed) == 1:
        return listed[0]
    # An interrupted save left two, of which the file has one; an early version left none.
    digest = sha256_of(path)
    return digest if digest in listed or not listed else listed[0]


def _replace_with_link(path: Path, target: Path) -> None:
    # A second name for the target's content costs no space and no time. `os.link` cannot replace a
    # file, so it makes a temporary name, which is then moved into place.
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    try:
        os.link(target, part)
    except OSError:  # the file system has no hard links
        shutil.copyfile(target, part)
    os.replace(part, path)


class LatestState(NamedTuple):
    """The newest usable training state of a folder.

    Attributes:
        state: What `save_last` was given.
        path: The file that it was read from.
        passed_over: For each newer file that cannot be used, the reason. If this one could not be
            verified, that, too.
    """

    state: dict[str, Any]
    path: Path
    passed_over: list[str]


def run_dir_of(path: Path) -> Path:
    """The output folder of the run that a `last.ckpt`, or `previous/last.ckpt`, belongs to."""
    # An output folder may itself be called `previous`; but then it has a log of metrics.
    is_previous = path.parent.name == _PREVIOUS and not (path.parent / "metrics.jsonl").exists()
    return path.parent.parent if is_previous else path.parent


def load_latest(folder: Path) -> LatestState | None:
    """Loads the newest state of a folder that is whole.

    Args:
        folder: The output folder of a run.

    Returns:
        The state, and why newer ones were passed over; None if the folder has no state at all.

    Raises:
        CheckpointError: There are states, but none can be used; each is listed with its reason.
    """
    last, previous = folder / LAST_NAME, folder / _PREVIOUS / LAST_NAME
    paths = [last, previous] if previous.exists() else [last]
    if not any(path.exists() for path in paths):
        return None
    problems: list[str] = []
    unchecked: list[Path] = []
    for path in paths:
        try:
            return LatestState(load_verified_state(path), path, problems)
        except _NoSidecarError as error:
            problems.append(str(error))
            unchecked.append(path)
        except CheckpointError as error:
            problems.append(str(error))
    # A state that cannot be verified, as the first version left them, is better than none.
    for path in unchecked:
        try:
            return LatestState(_load_state(path), path, problems)
        except CheckpointError as error:
            problems.append(str(error))
    listed = "".join(f"\n  - {problem}" for problem in problems)
    raise CheckpointError(
        f"resume: {folder} holds a run, but none of its states can be used:{listed}\nReplace one "
        "by a good copy, or start a new run with another output_dir or `--resume never`."
    )


class _NoSidecarError(CheckpointError):
    pass


def load_verified_state(path: Path) -> dict[str, Any]:
    """Loads a state whose SHA-256 is one of those in its sidecar.

    Args:
        path: A `last.ckpt`; loaded with `weights_only=True`.

    Returns:
        What `save_last` was given.

    Raises:
        CheckpointError: It is absent, damaged, of another format, or has no sidecar.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}.")
    if not path.stat().st_size:
        raise CheckpointError(f"{path} is empty.")
    digests = _read_sidecar(path)
    if not digests:
        name = _sidecar_of(path).name
        raise _NoSidecarError(f"{path} has no {name} beside it to be checked against.")
    if sha256_of(path) not in digests:
        raise CheckpointError(
            f"{path} is damaged: its SHA-256 is not the one in {_sidecar_of(path).name}."
        )
    return _load_state(path)


def load_state_file(path: Path) -> dict[str, Any]:
    """Loads a state that the user named; one without a sidecar is used, with a warning.

    Raises:
        CheckpointError: It is absent, damaged, or of another format.
    """
    try:
        return load_verified_state(path)
    except _NoSidecarError as error:
        LOGGER.warning("resume: %s It is used without this check.", error)
        return _load_state(path)
    except CheckpointError as error:
        raise CheckpointError(f"resume: {error}") from error


def _load_state(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen types for a damaged or hostile file
        if is_out_of_memory(error):  # a whole file must not be passed over as a damaged one
            raise
        raise CheckpointError(
            f"{path} cannot be read: it is damaged, or no last.ckpt of samft; weights of other "
            "programs go into checkpoint_path."
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} is not the training state of a run (a last.ckpt of format {FORMAT_VERSION}); "
            "weights alone go into checkpoint_path."
        )
    return state


def quarantine_damaged(folder: Path, *, used: Path) -> None:
    """Renames a damaged `last.ckpt`, which the next save would keep instead of the good previous.

    For one process at a time.

    Args:
        folder: The output folder.
        used: The state that the run resumes from. Nothing is renamed if this is `last.ckpt`.
    """
    last = folder / LAST_NAME
    if used == last:
        return
    # The file first: its sidecar alone would vouch for nothing, while the damaged file alone would
    # count as a state that cannot be verified.
    if last.exists():
        last.rename(unused_path(folder / f"{LAST_NAME}.damaged"))
    _sidecar_of(last).unlink(missing_ok=True)
