"""Measures how much a checkpoint slows training down, waited for or written in the background.

    python -m benchmarks.saving --models vit_tiny:full vit_b:frozen vit_b:full

Each round takes the same steps three times: without a save; with a save that the loop waits for;
with a save that a thread writes meanwhile. The cost of a save is the difference to the first.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import MeasureOptions, now, time_interleaved
from benchmarks.tables import format_spread
from samft.checkpoints.async_saver import Checkpointer
from samft.checkpoints.top_k import SCORE, TopK
from samft.models.prompted_sam import PromptedSam
from samft.models.sam import build_sam
from samft.models.trainable import constant_names, freeze
from samft.training.optim import build_optimizer

IMAGE_SIZE = 256  # of the steps; the size of a checkpoint hardly depends on it


class SavingTrial:
    """A model in training on one blank image, with its checkpointer."""

    def __init__(
        self, model_type: str, trained: str, *, folder: Path, device: torch.device
    ) -> None:
        sam = build_sam(model_type, IMAGE_SIZE, attention="fast").to(device)
        freeze(sam, ["image_encoder"] if trained == "frozen" else [])
        self.model = PromptedSam(sam)
        self.optimizer = build_optimizer(self.model, learning_rate=1e-5, weight_decay=0.0)
        self.images = torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
        self.boxes = torch.tensor([[0.0, 0.0, 128.0, 128.0]] * 8, device=device)
        names = constant_names(sam)
        top_k = TopK(folder, k=1)
        self.checkpointer = Checkpointer(
            folder, top_k=top_k, constant=names, on_saved=lambda step: None
        )
        self.folder, self.device, self.saves = folder, device, 0

    def step(self) -> None:
        """Takes one training step."""
        index = torch.zeros(len(self.boxes), dtype=torch.int64, device=self.device)
        logits, iou = self.model(self.images, self.boxes, index)
        (logits.mean() + iou.mean()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def save(self) -> float:
        """Saves a state as the best so far; returns the seconds until it is copied."""
        self.saves += 1
        state: dict[str, Any] = {
            "model": self.model.sam.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": {"step": self.saves},
        }
        sidecar = {"step": self.saves, "metrics": {SCORE: float(self.saves)}}
        start = now(self.device)
        self.checkpointer.save(state, sidecar=sidecar)
        return now(self.device) - start

    def take_steps(self, number: int, *, save: str) -> None:
        """Takes steps, with a save before them: `none`, `waited for`, or `background`."""
        if save != "none":
            self.save()
        if save == "waited for":
            self.checkpointer.wait()
        for _ in range(number):
            self.step()
        now(self.device)


def seconds_of(function: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure_saving(trial: SavingTrial, *, rounds: int) -> list[str]:
    """Cells of a table row: size, seconds to copy and to write, cost to the loop of both kinds."""
    trial.step()
    trial.save()
    trial.checkpointer.wait()
    copying, writing = [], []
    for _ in range(rounds):
        copying.append(trial.save())
        writing.append(copying[-1] + seconds_of(trial.checkpointer.wait))
    # Enough steps to finish writing during them, as between two saves of a run.
    number = round(1.5 * max(writing) / seconds_of(trial.step)) + 2
    kinds = ("none", "waited for", "background")
    steps = {kind: partial(trial.take_steps, number, save=kind) for kind in kinds}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        options = MeasureOptions(rounds=1, warm_up=0)
        timed = time_interleaved(steps, options=options, device=trial.device)
        trial.checkpointer.wait()
        for kind in kinds:
            seconds[kind] += timed[kind]
    costs = [
        [
            with_save - without
            for with_save, without in zip(seconds[kind], seconds["none"], strict=True)
        ]
        for kind in kinds[1:]
    ]
    size = sum(path.stat().st_size for path in trial.folder.glob("*.ckpt")) / 1e9
    cells = [
        format_spread(copying),
        format_spread(writing),
        *(format_spread(cost) for cost in costs),
    ]
    return [f"{size:.2f}", *cells]


def main() -> None:
    """Measures each model and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--models", nargs="+", default=["vit_tiny:full", "vit_b:frozen"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", help="on the disk to measure; default: the temporary folder")
    args = parser.parse_args()
    torch.manual_seed(0)
    print(
        "| | GB written | until copied, s | until written, s | cost to the loop, waited for, s "
        "| cost to the loop, in the background, s |\n|---|---|---|---|---|---|"
    )
    for name in args.models:
        model_type, _, trained = name.partition(":")
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            trial = SavingTrial(
                model_type, trained, folder=Path(folder), device=torch.device(args.device)
            )
            row = measure_saving(trial, rounds=args.rounds)
        print(f"| {model_type}, {trained} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
