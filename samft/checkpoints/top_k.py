"""The best k checkpoints of a run: flat state dicts with SAM's own keys, and JSON sidecars."""

import errno
import json
import math
import shutil
import subprocess
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save
from torch import Tensor

import samft
from samft.runtime.files import (
    atomic_replacement,
    read_digests,
    sha256_of,
    write_atomically,
    write_json,
)
from samft.runtime.own_files import ADAPTER_SUFFIX, is_checkpoint
from samft.weights.saved_settings import record_image_size


def save_tensors(path: Path, state: dict[str, Any]) -> None:
    """Saves tensors and plain Python values with `torch.save`, atomically.

    Raises:
        OSError: The disk is full or the folder cannot be written; the old file is untouched.
    """
    write_atomically(path, partial(write_tensors, state))


def write_tensors(state: dict[str, Any], file: BinaryIO) -> None:
    """Calls `torch.save`, and raises what torch reports of a full disk as an `OSError`.

    Raises:
        OSError: The file cannot be written; usually the disk is full.
    """
    try:
        torch.save(state, file)
    except RuntimeError as error:
        # torch's archive writer knows only that a write failed, not why.
        raise OSError(f"the disk may be full ({error})") from error


# Entries of a sidecar that an adapter file has as well; those of an export.
_RECORDED = (
    *("image_size", "rectangle", "resize_mode", "pixels", "view"),
    *("prompts", "correction_rounds", "multimask", "step", "metrics"),
)
SCORE = "val_per_mask_iou"  # the metric of a sidecar that checkpoints are ranked by


@dataclass(frozen=True)
class Checkpoint:
    """One of the best k checkpoints of a run."""

    name: str  # of the file in the output folder
    step: int
    score: float  # higher is better


class TopK:
    """Keeps the best k checkpoints by validation score; among equal scores the earlier ones.

    A checkpoint is a flat state dict with SAM's own keys and nothing else, so that every SAM tool
    reads it. Its metadata are in its sidecar, the same name with `.json` for `.ckpt`.
    """

    def __init__(self, folder: Path, *, k: int, best: list[Checkpoint] | None = None) -> None:
        """Starts with the checkpoints of the run that is resumed, or with none.

        Args:
            folder: The output folder.
            k: How many to keep.
            best: From `from_list`.
        """
        self.folder, self.k = folder, k
        self.best = list(best or [])

    def save_if_better(
        self,
        state: dict[str, Tensor],
        *,
        score: float,
        sidecar: dict[str, Any],
        adapter: dict[str, Tensor] | None = None,
    ) -> bool:
        """Saves a checkpoint if it is one of the best k, then deletes the one that it displaced.

        Args:
            state: Tensors by SAM's own keys.
            score: Higher is better; nan never counts as one of the best.
            sidecar: Metadata to write beside it, with the `step`; the file's SHA-256 is added.
            adapter: From `lora.adapter_tensors`, for a file of its own; None or empty: no file.

        Returns:
            Whether it was saved.

        Raises:
            OSError: The disk is full, or another file has the checkpoint's name; nothing changed.
        """
        step = int(sidecar["step"])
        new = Checkpoint(f"{step}-{score:.2f}.ckpt", step, score)
        # After a resume a step may be validated again: it replaces its own earlier checkpoint.
        others = [checkpoint for checkpoint in self.best if checkpoint.step != step]
        ranked = sorted([*others, new], key=lambda each: (-each.score, each.step))[: self.k]
        if math.isnan(score) or new not in ranked:
            return False
        # Cloned, for a view would be saved with the whole of the storage that it is a part of.
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
        path = self.folder / new.name
        known = new.name in {each.name for each in self.best}
        if not known and (path.exists() or path.with_suffix(".json").exists()):
            _check_sidecar(path)
        if adapter:
            _write_adapter(path.with_suffix(ADAPTER_SUFFIX), adapter, sidecar)
        write_checkpoint(path, tensors, sidecar)
        # Only now, when the new one is on the disk with its sidecar, may others be deleted: a kill
        # or a full disk before this line leaves the k best that there were. A kill after it, before
        # `last.ckpt` lists the new one, is harmless: the resumed run takes the same steps again,
        # saves the same checkpoint over this one, and finds the displaced one deleted already.
        before, self.best = self.best, ranked
        for name in {each.name for each in before} - {each.name for each in self.best}:
            if is_checkpoint(self.folder / name):  # and not a file that has taken its place
                (self.folder / name).unlink()
                (self.folder / name).with_suffix(".json").unlink()
                (self.folder / name).with_suffix(ADAPTER_SUFFIX).unlink(missing_ok=True)
        return True

    def copy_from(self, folder: Path) -> None:
        """Copies the listed checkpoints from another folder; drops those whose files are missing.

        Args:
            folder: The output folder of the run that is resumed.
        """
        self.best = [each for each in self.best if (folder / each.name).is_file()]
        for checkpoint in self.best:
            path = Path(checkpoint.name)
            suffixes = (".json", ADAPTER_SUFFIX)
            for name in (path.name, *(path.with_suffix(suffix).name for suffix in suffixes)):
                if (folder / name).is_file():
                    shutil.copy2(folder / name, self.folder / name)

    def to_list(self) -> list[dict[str, Any]]:
        """The checkpoints as plain values, best first, for `last.ckpt`."""
        return [vars(checkpoint) for checkpoint in self.best]

    @staticmethod
    def from_list(entries: list[dict[str, Any]]) -> list[Checkpoint]:
        """Checkpoints from what `to_list` returned."""
        return [Checkpoint(**entry) for entry in entries]


def _check_sidecar(path: Path) -> None:
    # A kill may have left a checkpoint that no state lists; its sidecar tells it from other files.
    if not read_digests(path.with_suffix(".json")):
        reason = "another file has the name of a checkpoint: move it away"
        raise FileExistsError(errno.EEXIST, reason, str(path))


def write_checkpoint(path: Path, tensors: dict[str, Tensor], sidecar: dict[str, Any]) -> None:
    """Writes a checkpoint and its sidecar, in place of an earlier one of samft.

    Args:
        path: The file.
        tensors: By SAM's own keys.
        sidecar: Metadata; the file's SHA-256 is added.

    Raises:
        OSError: The disk is full or the folder cannot be written; nothing changed.
    """
    # The sidecar first, with the digests of the old file and of the new: however this ends, each
    # file that is there has a sidecar which proves whose it is.
    sidecar_path = path.with_suffix(".json")
    earlier = read_digests(sidecar_path) if path.exists() else []
    with atomic_replacement(path, partial(write_tensors, tensors)) as part:
        digest = sha256_of(part)
        listed = [digest, *earlier] if earlier else digest
        write_json(sidecar_path, {**sidecar, "sha256": listed})
    if earlier:
        write_json(sidecar_path, {**sidecar, "sha256": digest})


def _write_adapter(path: Path, tensors: dict[str, Tensor], sidecar: dict[str, Any]) -> None:
    # With what an export records of the training, since the file travels without its sidecar.
    recorded = {**sidecar["adapter"], **{name: sidecar.get(name) for name in _RECORDED}}
    text = {
        name: json.dumps(value) if isinstance(value, dict) else str(value)
        for name, value in recorded.items()
        if value is not None
    }
    content = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, text)
    write_atomically(path, lambda file: file.write(content))


def make_sidecar(
    config: dict[str, Any],
    *,
    step: int,
    metrics: dict[str, float],
    pixels: dict[str, Any] | None = None,
    view: dict[str, Any] | None = None,
    adapter: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The metadata of a checkpoint, as plain values.

    Args:
        config: The run's configuration.
        step: Optimizer steps taken.
        metrics: Of the validation at that step, without the prefix `val_`.
        pixels: How the values of images became 8 bits, see `PixelFormat.to_json`.
        view: How images were seen, see `View.to_json`.
        adapter: Of a run that trains adapters, their settings and the base's SHA-256.

    Returns:
        The content of the sidecar, except the SHA-256 that `TopK.save_if_better` adds.
    """
    return {
        "model_type": config["model_type"],
        **record_image_size(config["image_size"]),
        "resize_mode": config["resize_mode"],
        **{name: config[name] for name in ("prompts", "correction_rounds", "multimask")},
        "pixels": pixels,
        "view": view,
        "step": step,
        "metrics": {f"val_{name}": value for name, value in metrics.items()},
        **({"adapter": adapter} if adapter else {}),
        "config": config,
        "samft_version": samft.__version__,
        "torch_version": torch.__version__,
        "git_commit": git_commit(),
    }


def git_commit() -> str | None:
    """The git commit of the source tree that samft runs from; None if that is no repository."""
    folder = Path(samft.__file__).parent
    try:
        completed = subprocess.run(
            # The second name fails where the folder merely lies in another project's repository.
            ["git", "-C", str(folder), "rev-parse", "HEAD", "HEAD:./__init__.py"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return completed.stdout.split()[0] if completed.returncode == 0 else None
