"""Runs of a second or two by the trainer's own command line, and readers of what they leave."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from helpers.coco_files import write_coco
from samft import evaluate
from samft.cli import run_command
from samft.config import TrainConfig, parse_config
from samft.train import main

STEPS, INTERVAL = 20, 5
COMMAND_SECONDS = 120  # what a command of these tests may take, however busy the machine is


def write_data(root: Path, *, num_train: int = 13, num_val: int = 5) -> Path:
    """A dataset of uneven images, the validation split with a crowd and things to leave out."""
    write_coco(root, num_train)
    annotations = write_coco(root, num_val, seed=1, split="val")
    document = json.loads(annotations.read_text())
    first = document["annotations"][0]
    document["annotations"] += [
        {**first, "id": 901, "iscrowd": 1},
        {**first, "id": 902, "segmentation": []},
        {**first, "id": 903, "image_id": 99},
    ]
    document["images"].append({"id": 98, "file_name": "none.png", "height": 9, "width": 9})
    annotations.write_text(json.dumps(document))
    return root


def arguments(data_root: Path, output_dir: Path, **changes: Any) -> list[str]:
    """The command line of a short run: image size 64, 20 steps, validation every 5."""
    settings = {
        "data_root": data_root,
        "output_dir": output_dir,
        "model_type": "vit_tiny",
        "checkpoint_path": "auto",
        "image_size": 64,
        "batch_size": 2,
        "steps": STEPS,
        "metrics_interval": INTERVAL,
        "learning_rate": 1e-3,
        "num_workers": 0,
        "device": "cpu",
        **changes,
    }
    argv = []
    for name, value in settings.items():
        if isinstance(value, bool):
            argv.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            argv += [f"--{name}", str(value)]
    return argv


def a_config(data_root: Path, output_dir: Path = Path("nowhere"), **changes: Any) -> TrainConfig:
    """The configuration of such a run."""
    return parse_config(arguments(data_root, output_dir, **changes))


def train_here(argv: list[str]) -> dict[str, Any]:
    """`samft.train.main` in this process."""
    return main(argv)


def evaluate_here(argv: list[str]) -> dict[str, Any]:
    """`samft.evaluate.main` in this process."""
    return evaluate.main(argv)


def command_here(argv: list[str]) -> int:
    """The command in this process; its exit code."""
    return run_command(main, argv)


def command_line(argv: list[str], *, processes: int = 1, module: str = "samft.train") -> list[str]:
    """`python -m samft.train`, or another command, under torchrun for more than one process."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable, *(launcher if processes > 1 else []), "-m", module, *argv]


def clean_environment(**changes: str) -> dict[str, str]:
    """The environment of a command that a test starts."""
    kept = ("SAMFT_CACHE",)  # the tests' own
    ours = {n: v for n, v in os.environ.items() if n in kept or not n.startswith("SAMFT_")}
    return {**ours, "OMP_NUM_THREADS": "1", **changes}


def command(argv: list[str]) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        command_line(argv),
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
        env=clean_environment(),
        check=False,
    )


def read_metrics(folder: Path, split: str = "") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, of one split or all."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if split in ("", line["split"])]


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The model's weights in last.ckpt."""
    weights: dict[str, torch.Tensor] = torch.load(folder / "last.ckpt", weights_only=True)["model"]
    return weights


def largest_difference(folder: Path, other: Path) -> float:
    """Between the weights of two runs; 0.0 says bit-identical, nan counts as infinite."""
    ours, theirs = read_weights(folder), read_weights(other)
    assert ours.keys() == theirs.keys()
    gaps = [(ours[name] - theirs[name]).abs().max().item() for name in ours]
    return max(float("inf") if gap != gap else gap for gap in gaps)
