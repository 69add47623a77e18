"""The state to resume from: `last.ckpt`, the one before it, and how to know that they are whole.

A flipped bit in a checkpoint loads without an error, so beside each file stands a sidecar with the
SHA-256 that it may have. File and sidecar cannot be replaced in one go; so the sidecar comes first,
and names the content that is about to come as well as the one that is there. Killed at any moment,
`last.ckpt` is one of the two, and `previous/last.ckpt` the one before it.
"""

import contextlib
import logging
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from samft.checkpoints.top_k import write_tensors
from samft.errors import CheckpointError
from samft.runtime.files import atomic_replacement, read_digests, sha256_of, write_json

FORMAT_VERSION = 1
LAST_NAME = "last.ckpt"
_PREVIOUS = "previous"  # the folder of the one before it

logger = logging.getLogger(__name__)


def save_last(folder: Path, state: dict[str, Any]) -> None:
    """Saves the state to resume from, and keeps the one before it.

    Args:
        folder: The output folder.
        state: Tensors and plain Python values.

    Raises:
        OSError: The disk is full or the folder cannot be written; what was there is whole.
    """
    last, previous = folder / LAST_NAME, folder / _PREVIOUS / LAST_NAME
    content = {"format": FORMAT_VERSION, **state}
    with atomic_replacement(last, partial(write_tensors, content)) as part:
        digest = sha256_of(part)
        coming = [digest]
        if last.exists():
            there = _digest_of(last)
            previous.parent.mkdir(exist_ok=True)
            _note(previous, there, *_known(previous))
            _link(last, previous)
            _note(previous, there)
            coming.append(there)
        _note(last, *coming)
    with contextlib.suppress(OSError):  # it is saved; a sidecar that names two is right, too
        _note(last, digest)


def _sidecar(path: Path) -> Path:
    return path.with_suffix(".json")


def _known(path: Path) -> list[str]:
    return read_digests(_sidecar(path))


def _digest_of(path: Path) -> str:
    # The sidecar names one, but for a save that was broken off, of which it names two.
    known = _known(path)
    if len(known) == 1:
        return known[0]
    found = sha256_of(path)
    return found if found in known or not known else known[0]


def _note(path: Path, *digests: str) -> None:
    known = list(dict.fromkeys(digests))
    write_json(_sidecar(path), {"format": FORMAT_VERSION, "sha256": known})


def _link(path: Path, other: Path) -> None:
    part = other.with_name(f".{other.name}.part")
    part.unlink(missing_ok=True)
    try:
        os.link(path, part)
    except OSError:  # a file system without links
        shutil.copyfile(path, part)
    os.replace(part, other)


class LatestState(NamedTuple):
    """What `load_latest` found.

    Attributes:
        state: What `save_last` was given.
        path: Where it was.
        passed_over: For each newer file that could not be used, why; also why this one could not be
            checked, if so.
    """

    state: dict[str, Any]
    path: Path
    passed_over: list[str]


def run_dir_of(path: Path) -> Path:
    """The output folder that a state lies in, or in whose `previous` it lies."""
    # An output folder may be called previous, too; but that one has more in it.
    is_kept = path.parent.name == _PREVIOUS and not (path.parent / "metrics.jsonl").exists()
    return path.parent.parent if is_kept else path.parent


def load_latest(folder: Path) -> LatestState | None:
    """Reads the newest state of a folder that is whole.

    Args:
        folder: The output folder of a run.

    Returns:
        The state, with what had to be passed over; None if the folder holds no state at all.

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
            return LatestState(read_checked(path), path, problems)
        except _NoSidecar as error:
            problems.append(str(error))
            unchecked.append(path)
        except CheckpointError as error:
            problems.append(str(error))
    # Better a state that cannot be checked, as versions before the sidecar left them, than none.
    for path in unchecked:
        try:
            return LatestState(_read(path), path, problems)
        except CheckpointError as error:
            problems.append(str(error))
    listed = "".join(f"\n  - {problem}" for problem in problems)
    raise CheckpointError(
        f"resume: {folder} holds a run, but none of its states can be used:{listed}\nPut a good "
        "copy in the place of one, or start afresh with another output_dir or `--resume never`."
    )


class _NoSidecar(CheckpointError):
    pass


def read_checked(path: Path) -> dict[str, Any]:
    """Reads a state after it was compared with the SHA-256 in its sidecar.

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
    known = _known(path)
    if not known:
        raise _NoSidecar(f"{path} has no {_sidecar(path).name} beside it to be checked against.")
    if sha256_of(path) not in known:
        raise CheckpointError(
            f"{path} is damaged: its SHA-256 is not the one in {_sidecar(path).name}."
        )
    return _read(path)


def read_state_file(path: Path) -> dict[str, Any]:
    """Reads a state that a person named; without a sidecar it is taken as it is, which is said.

    Raises:
        CheckpointError: It is absent, damaged, or of another format.
    """
    try:
        return read_checked(path)
    except _NoSidecar as error:
        logger.warning("resume: %s It is taken as it is.", error)
        return _read(path)
    except CheckpointError as error:
        raise CheckpointError(f"resume: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen types for a damaged or hostile file
        raise CheckpointError(f"{path} cannot be read: it is damaged, or no checkpoint.") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} is not the training state of a run (a last.ckpt of format {FORMAT_VERSION}); "
            "weights alone go into checkpoint_path."
        )
    return state


def quarantine_damaged(folder: Path, *, used: Path) -> None:
    """Renames a `last.ckpt` that was passed over, or saving would put it in the place of the good.

    Args:
        folder: The output folder. One process at a time.
        used: The state that is gone on from.
    """
    last = folder / LAST_NAME
    if used == last:
        return
    if last.exists():
        last.rename(folder / f"{LAST_NAME}.damaged")
    _sidecar(last).unlink(missing_ok=True)
