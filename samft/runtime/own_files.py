"""Which files of an output folder a run of samft has written, told from what is in them.

A run moves, replaces and deletes these and no others: its folder may be one in which a user keeps
files too, some by the names that a run uses. Imports no torch.
"""

import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from samft.runtime import metrics_file
from samft.runtime.files import read_digests, read_json, sha256_of

CHECKPOINT_NAME = re.compile(r"\d+--?\d+\.\d\d\.ckpt")  # {step}-{score:.2f}.ckpt
ADAPTER_SUFFIX = ".adapter.safetensors"  # instead of the checkpoint's, beside it
CONFIG_NAME = "config.yaml"
LAST_NAME, PREVIOUS, TENSORBOARD = "last.ckpt", "previous", "tensorboard"
TRACKERS_NAME = "trackers.json"
# What `OmegaConf.to_yaml` of a configuration has had since the first version.
_OLDEST_SETTINGS = {"data_root", "model_type", "checkpoint_path", "batch_size", "output_dir"}
_HEAD_BYTES = 1 << 20
_MARK = b"Software\0samft"
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
_PNG_START = 33  # bytes of the signature and of the first chunk, IHDR


def mark_picture(content: bytes) -> bytes:
    """A PNG or JPEG file with a note that samft wrote it, which pictures' viewers do not show.

    Args:
        content: The encoded picture.
    """
    if content.startswith(_PNG):
        chunk = b"tEXt" + _MARK
        note = struct.pack(">I", len(_MARK)) + chunk + struct.pack(">I", zlib.crc32(chunk))
        return content[:_PNG_START] + note + content[_PNG_START:]
    note = b"\xff\xfe" + struct.pack(">H", len(_MARK) + 2) + _MARK  # a comment
    return content[: len(_JPEG)] + note + content[len(_JPEG) :]


def is_marked_picture(path: Path) -> bool:
    """Whether a picture has the note of `mark_picture`."""
    return _MARK in _read_head(path, 2 * _PNG_START + len(_MARK))


def _read_head(path: Path, size: int = _HEAD_BYTES) -> bytes:
    # Empty for what is no file, or cannot be read.
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError:
        return b""


def _is_drawn(path: Path) -> bool:
    # Earlier versions did not mark their pictures: 8-bit RGB and nothing but pixels, beside the
    # metrics of a run, which had overwritten whatever had that name before.
    head = _read_head(path, _PNG_START + 8)
    plain = head[24:26] == b"\x08\x02" and head[_PNG_START + 4 :] == b"IDAT"
    return is_marked_picture(path) or (plain and _has_metrics(path.with_name("metrics.jsonl")))


def _has_metrics(path: Path) -> bool:
    try:
        return path.stat().st_size == 0 or bool(metrics_file.read_metrics_file(path).whole)
    except OSError:
        return False


def has_keys(*names: str) -> Callable[[Path], bool]:
    """A test of files: whether one is a JSON object with all of these keys."""

    def is_own(path: Path) -> bool:
        value = _read_json(path)
        return isinstance(value, dict) and value.keys() >= set(names)

    return is_own


def _read_json(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def _is_scores(path: Path) -> bool:
    value = _read_json(path)
    return isinstance(value, dict) and all(
        step.isdigit() and isinstance(columns, dict) and "iou_actual" in columns
        for step, columns in value.items()
    )


def is_config(path: Path) -> bool:
    """Whether a file is the configuration of a run, to the letter: nobody has edited it."""
    try:
        text = path.read_bytes().decode()
        settings = OmegaConf.create(text)
        return bool(settings.keys() >= _OLDEST_SETTINGS) and OmegaConf.to_yaml(settings) == text
    except Exception:  # OmegaConf passes on what the YAML parser raises
        return False


def _is_log(path: Path) -> bool:
    # What is logged before the file is opened is its beginning.
    pattern = rb"\d\d:\d\d:\d\d,\d{3} (device \S+, \d+ process|.*M parameters are trained)"
    is_empty = path.is_file() and path.stat().st_size == 0
    return is_empty or re.search(pattern, _read_head(path)) is not None


def _is_event_file(path: Path) -> bool:
    head = _read_head(path)
    return "tfevents" in path.name and (b"config/text_summary" in head or b"per_mask_iou" in head)


def _is_state(path: Path) -> bool:
    # A state is proven by the sidecar beside it; a damaged one is, too, and must not be in the way.
    if not path.exists():
        return False
    return _is_state_sidecar(path.with_suffix(".json")) or b"global_batch" in _read_head(path)


def _is_state_sidecar(path: Path) -> bool:
    value = _read_json(path)
    return isinstance(value, dict) and value.keys() == {"format", "sha256"}


def is_checkpoint(path: Path) -> bool:
    """Whether a file is one of the best checkpoints of a run: its SHA-256 is in its sidecar."""
    if not CHECKPOINT_NAME.fullmatch(path.name):
        return False
    digests = read_digests(path.with_suffix(".json"))
    return bool(digests) and path.is_file() and sha256_of(path) in digests


_IS_OWN: dict[str, Callable[[Path], bool]] = {
    CONFIG_NAME: is_config,
    metrics_file.FILE_NAME: _has_metrics,
    "bad_steps.jsonl": lambda path: b'{"after_step": ' in _read_head(path, 15),
    "objects.json": _is_scores,
    "summary.json": has_keys("baseline_val_per_mask_iou", "best_checkpoint"),
    "status.json": has_keys("state", "step", "exit_code", "reason", "last_checkpoint"),
    TRACKERS_NAME: has_keys("name", "ids"),
    "report.html": lambda path: b"IoU by step" in _read_head(path, 1 << 26),
    "train.log": _is_log,
    "before.png": _is_drawn,
    "after.png": _is_drawn,
    "before_after.png": _is_drawn,
    LAST_NAME: _is_state,
    "last.json": _is_state_sidecar,
    f"{PREVIOUS}/{LAST_NAME}": _is_state,
    f"{PREVIOUS}/last.json": _is_state_sidecar,
}
# Present also if a run was stopped before it has measured anything, and then written anew.
_LEFT_BY_ANY_START = (CONFIG_NAME, "status.json", "train.log", TENSORBOARD, TRACKERS_NAME)


def is_own(folder: Path, name: str) -> bool:
    """Whether a file by a name that a run uses was written by a run; False if it is absent."""
    return _IS_OWN[name](folder / name)


def own_names(folder: Path) -> list[str]:
    """The files of a run in a folder that have a fixed name, relative to the folder."""
    return [name for name in _IS_OWN if is_own(folder, name)]


def own_files(folder: Path) -> list[str]:
    """All files of a run in a folder: also its best checkpoints, which are hashed."""
    names = own_names(folder)
    for path in sorted(folder.glob("*.ckpt")):
        if is_checkpoint(path):
            names += [path.name, path.with_suffix(".json").name]
            adapter = path.with_suffix(ADAPTER_SUFFIX)
            names += [adapter.name] if adapter.is_file() else []
    events = sorted((folder / TENSORBOARD).rglob("*tfevents*"))
    return names + [str(path.relative_to(folder)) for path in events if _is_event_file(path)]


def has_measured(folder: Path, names: list[str]) -> bool:
    """Whether files of a run are worth keeping: more than any start leaves.

    Args:
        folder: The output folder.
        names: From `own_names` or `own_files`.
    """
    metrics = folder / metrics_file.FILE_NAME
    return any(
        name.split("/")[0] not in _LEFT_BY_ANY_START
        and (name != metrics.name or metrics.stat().st_size > 0)
        for name in names
    )


def foreign_files(folder: Path) -> list[str]:
    """What has a name that a run would write to, and was written by no run, or is damaged.

    Args:
        folder: The output folder; may be absent.
    """
    taken = [
        name for name in _IS_OWN if os.path.lexists(folder / name) and not is_own(folder, name)
    ]
    folders = (TENSORBOARD, PREVIOUS)
    return taken + [name for name in folders if (folder / name).is_file()]


_PART_NAME = re.compile(r"\.(.+?)(\.[a-z0-9_]{8})?\.part")  # see `files.atomic_replacement`


def is_part_of_run(name: str) -> bool:
    """Whether this is a temporary file that a run may leave when it is killed.

    Args:
        name: Relative to the output folder.
    """
    match = _PART_NAME.fullmatch(name.removeprefix(f"{PREVIOUS}/"))
    if match is None:
        return False
    if match[2] is None:
        return match[1] == LAST_NAME
    stem, _, kind = match[1].removesuffix(ADAPTER_SUFFIX).rpartition(".")
    if match[1].endswith(ADAPTER_SUFFIX):
        stem, kind = f"{stem}.{kind}", "ckpt"
    is_best = kind in ("ckpt", "json") and CHECKPOINT_NAME.fullmatch(f"{stem}.ckpt")
    return match[1] in _IS_OWN or bool(is_best)


def is_part_of(name: str, *outputs: str) -> bool:
    """Whether this is a temporary file of one of some outputs.

    Args:
        name: Relative to the output folder.
        outputs: Regular expressions of the outputs' names, relative to the folder.
    """
    folder, slash, base = name.rpartition("/")
    match = _PART_NAME.fullmatch(base)
    if match is None or match[2] is None:
        return False
    return any(re.fullmatch(output, f"{folder}{slash}{match[1]}") for output in outputs)
