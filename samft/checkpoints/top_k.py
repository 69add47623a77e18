"""The best k checkpoints with their sidecars."""

import shutil
import subprocess
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

import samft
from samft.runtime.files import sha256_of, write_atomically, write_json


def save_tensors(path: Path, state: dict[str, Any]) -> None:
    """Saves tensors and plain Python values with `torch.save`, atomically.

    Raises:
        OSError: The disk is full or the folder cannot be written; the old file is untouched.
    """
    write_atomically(path, partial(write_tensors, state))


def write_tensors(state: dict[str, Any], file: BinaryIO) -> None:
    """`torch.save`, with a full disk as an `OSError`.

    Raises:
        OSError: The disk is full, say.
    """
    try:
        torch.save(state, file)
    except RuntimeError as error:
        # torch reports a full disk as a failed write of its own archive, and says no more.
        raise OSError(f"the disk may be full ({error})") from error


SCORE = "val_per_mask_iou"  # the metric of a sidecar that checkpoints are ranked by


@dataclass(frozen=True)
class Checkpoint:
    """One of the best k checkpoints of a run."""

    name: str  # of the file in the output folder
    step: int
    score: float  # higher is better


class TopK:
    """Keeps the best k checkpoints by validation score; ties keep the earlier.

    A checkpoint is a flat state dict with SAM's own keys and nothing else; what is to be known
    about it stands in its sidecar, the same name with `.json` for `.ckpt`.
    """

    def __init__(self, folder: Path, *, k: int, best: list[Checkpoint] | None = None) -> None:
        """Starts from the list that an earlier run left, or empty.

        Args:
            folder: Where the files are.
            k: How many to keep.
            best: From `to_list` of the run that is resumed.
        """
        self.folder, self.k = folder, k
        self.best = list(best or [])

    def save_if_better(
        self, state: dict[str, Tensor], *, score: float, sidecar: dict[str, Any]
    ) -> bool:
        """Saves a checkpoint if it is among the best, then deletes the one that it pushed out.

        Args:
            state: SAM's own keys to tensors.
            score: Higher is better; nan is never good enough.
            sidecar: What to write beside it; its file's SHA-256 is added.

        Returns:
            Whether it was saved.
        """
        step = int(sidecar["step"])
        others = [entry for entry in self.best if entry.step != step]  # a step may be repeated
        ranked = sorted(
            [*others, Checkpoint(f"{step}-{score:.2f}.ckpt", step, score)],
            key=lambda entry: (-entry.score, entry.step),
        )
        if not score == score or all(entry.step != step for entry in ranked[: self.k]):
            return False
        path = self.folder / f"{step}-{score:.2f}.ckpt"
        save_tensors(path, {name: tensor.detach().cpu().clone() for name, tensor in state.items()})
        write_json(path.with_suffix(".json"), {**sidecar, "sha256": sha256_of(path)})
        before, self.best = self.best, ranked[: self.k]
        for name in {entry.name for entry in before} - {entry.name for entry in self.best}:
            (self.folder / name).unlink(missing_ok=True)
            (self.folder / name).with_suffix(".json").unlink(missing_ok=True)
        return True

    def copy_from(self, folder: Path) -> None:
        """Copies the best checkpoints of a run in another folder; forgets those that are gone.

        Args:
            folder: Where the run that is resumed left them.
        """
        self.best = [entry for entry in self.best if (folder / entry.name).is_file()]
        for entry in self.best:
            for name in (entry.name, Path(entry.name).with_suffix(".json").name):
                if (folder / name).is_file():
                    shutil.copy2(folder / name, self.folder / name)

    def to_list(self) -> list[dict[str, Any]]:
        """The list as plain values, best first, for `last.ckpt`."""
        return [vars(entry) for entry in self.best]

    @staticmethod
    def from_list(entries: list[dict[str, Any]]) -> list[Checkpoint]:
        """The list that `to_list` gave."""
        return [Checkpoint(**entry) for entry in entries]


def make_sidecar(config: dict[str, Any], *, step: int, metrics: dict[str, float]) -> dict[str, Any]:
    """What is to be known about a checkpoint, as plain values.

    Args:
        config: The run's configuration.
        step: Optimizer steps done.
        metrics: Of the validation at that step.

    Returns:
        The sidecar's content, without the SHA-256 that `TopK.save_if_better` adds.
    """
    return {
        **{name: config[name] for name in ("model_type", "image_size", "resize_mode")},
        "step": step,
        "metrics": {f"val_{name}": value for name, value in metrics.items()},
        "config": config,
        "samft_version": samft.__version__,
        "torch_version": torch.__version__,
        "git_commit": git_commit(),
    }


def git_commit() -> str | None:
    """The commit of the source tree that samft runs from; None where there is none."""
    folder = Path(samft.__file__).parent
    try:
        answer = subprocess.run(
            # The second name fails where the folder merely lies inside someone else's repository.
            ["git", "-C", str(folder), "rev-parse", "HEAD", "HEAD:./__init__.py"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.split()[0] if answer.returncode == 0 else None
