"""How much of SAM to train on how many images: the gain, the objects harmed, what is forgotten.

    python -m benchmarks.data_sizes run --output_dir DIR [--datasets D ...] [--images N ...]
    python -m benchmarks.data_sizes report --output_dir DIR

Takes N training images by the seed, holds a fifth of them out for early stopping, and trains as
`samft train` does. The checkpoint that was best on those is scored on the dataset's own validation
images, which have chosen nothing, and on a general set that was not trained on. Runs whose row is
in the folder are not run again. `--images 0` is all of them.
"""

import argparse
import itertools
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import describe_machine
from benchmarks.quality_datasets import DATASETS, drawn_dataset
from benchmarks.quality_report import format_difference, format_score
from benchmarks.quality_scenes import Image, Masks, draw_cells, draw_filaments, write_scenes
from benchmarks.quality_scores import RunScores, Scorer, paired_difference, read_scores
from benchmarks.tables import markdown_table
from samft import average
from samft.api import finetune
from samft.coco.layout import find_split
from samft.coco.subset import CocoSubset
from samft.config import TrainConfig
from samft.models.prompted_sam import PromptedSam
from samft.models.sam import load_sam
from samft.recipes.datasets import load_splits
from samft.runtime.files import write_text
from samft.runtime.logs import LOGGER
from samft.weights.download import PACKAGED_TINY

IMAGE_SIZE = 256
UNTOUCHED = "untouched"
_DECODER = {"freeze_image_encoder": True, "learning_rate": 3e-4}
_EVERYTHING = {"learning_rate": 1e-4}
RECIPES: dict[str, dict[str, Any]] = {
    "decoder": _DECODER,
    "last_2": {"train_blocks": 2, "learning_rate": 3e-4},
    "lora_8": {"lora_rank": 8, "learning_rate": 3e-4},
    "everything": _EVERYTHING,
    "decoder_ema": {**_DECODER, "ema_decay": 0.98},
    "everything_ema": {**_EVERYTHING, "ema_decay": 0.98},
    "decoder_anchor": {**_DECODER, "anchor_weight": 30.0},
    "everything_anchor": {**_EVERYTHING, "anchor_weight": 30.0},
    "decoder_average": _DECODER,
    "everything_average": _EVERYTHING,
}
_AVERAGES = ("decoder_average", "everything_average")
_POINTS = "0.25,0.5,0.75"  # of `samft average`, which adds both ends
SETS = ("hbn_flakes", "coco_open104", "cells", "filaments")
_NUM_DRAWN = 100  # training images of the sets that the lab draws
_DRAW: dict[str, Callable[[np.random.Generator], tuple[Image, Masks]]] = {
    "cells": draw_cells,
    "filaments": draw_filaments,
}
_GENERAL = {"coco_open104": "hbn_flakes"}  # for all others:
_EVERYDAY = "coco_open104"


@dataclass(frozen=True)
class Run:
    """One run: `images` of the training images of `dataset`, 0 for all, by a recipe."""

    dataset: str
    images: int
    recipe: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        images = "" if self.recipe == UNTOUCHED else f"-{self.images or 'all'}"
        seed = "" if self.recipe == UNTOUCHED else f"-{self.seed}"
        return f"{self.dataset}{images}-{self.recipe}{seed}"

    def baseline(self) -> "Run":
        """The untouched model on the same test images."""
        return Run(self.dataset, 0, UNTOUCHED, 0)


class Study:
    """The data, read once, and the runs of a folder.

    Args:
        folder: Created if it is missing.
        steps: Of a run at most.
    """

    def __init__(self, folder: Path, *, steps: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.steps = folder, steps
        self.test_subset = cache(partial(self._load_subset, split="val"))
        self.frozen_scorer = cache(self._scorer)

    def _settings(self, dataset: str) -> dict[str, Any]:
        if dataset not in _DRAW:
            return DATASETS[dataset].settings(self.folder)
        write = partial(write_scenes, draw=_DRAW[dataset], num_train=_NUM_DRAWN)
        locate = drawn_dataset(f"{dataset}_{_NUM_DRAWN}", write)
        return {**locate(self.folder), "image_size": IMAGE_SIZE}

    def _load_subset(self, dataset: str, *, split: str) -> CocoSubset:
        splits = load_splits(TrainConfig(model_type="vit_tiny", **self._settings(dataset)))
        subset: CocoSubset = getattr(splits, split).subset
        return subset

    def _scorer(self, dataset: str) -> Scorer:
        return Scorer(self.test_subset(dataset), image_size=IMAGE_SIZE)

    def general_set(self, dataset: str) -> str:
        """The set that a model tuned on a dataset should not forget."""
        return _GENERAL.get(dataset, _EVERYDAY)

    def perform(self, run: Run) -> dict[str, Any] | None:
        """Trains and scores; the row, or None where it is there already."""
        folder = self.folder / run.name
        if (folder / "row.json").exists():
            return None
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        start = time.process_time()
        checkpoint, best_step, images = PACKAGED_TINY, 0, 0
        if run.recipe != UNTOUCHED:
            checkpoint, best_step, images = self._train(run, folder)
        row: dict[str, Any] = {"best_step": best_step, "images": images}
        row["seconds"] = round(time.process_time() - start, 1)
        encoder_is_kept = run.recipe == UNTOUCHED or run.recipe.startswith("decoder")
        model = PromptedSam(load_sam(checkpoint).eval())
        for part, dataset in (("test", run.dataset), ("general", self.general_set(run.dataset))):
            scorer = self.frozen_scorer(dataset) if encoder_is_kept else self._scorer(dataset)
            model.sam.image_encoder.requires_grad_(not encoder_is_kept)
            scores = scorer.score(model, resize_mode="pad")
            scores.write(folder / f"{part}.npz")
            row[part] = float(scores.iou.mean())
        shutil.rmtree(folder / "run", ignore_errors=True)
        write_text(folder / "row.json", json.dumps(row))
        return row

    def _train(self, run: Run, folder: Path) -> tuple[Path, int, int]:
        data, images = self._write_data(run, folder)
        config = TrainConfig(
            **data,
            **RECIPES[run.recipe],
            model_type="vit_tiny",
            checkpoint_path="auto",
            image_size=IMAGE_SIZE,
            batch_size=min(2, images),
            steps=self.steps,
            patience=2,
            metrics_interval=max(1, self.steps // 6),
            save_top_k=1,
            seed=run.seed,
            num_workers=0,
            device="cpu",
            trackers="none",
            test_split="none",
            output_dir=str(folder / "run"),
        )
        result = finetune(config)
        assert result.best_checkpoint is not None
        best = result.best_checkpoint
        if run.recipe in _AVERAGES:
            best = folder / "run" / "average.pth"
            files = ["--annotations", data["val_annotations"], "--images", data["val_images"]]
            ends = [str(PACKAGED_TINY), str(result.best_checkpoint)]
            average.main([*ends, *files, "--points", _POINTS, "--output", str(best)])
        return best, int(result.summary["best_step"]), images

    def _write_data(self, run: Run, folder: Path) -> tuple[dict[str, Any], int]:
        # Two COCO files, to train on and to stop by; the number of images in both.
        subset = self._load_subset(run.dataset, split="train")
        ids = np.array([subset.image_id(i) for i in range(subset.num_images)])
        chosen = np.random.default_rng(run.seed).permutation(ids)[: run.images or None]
        held_out = max(1, round(len(chosen) / 5))
        settings = self._settings(run.dataset)
        root, split = Path(settings["data_root"]), settings.get("train_split", "train")
        document = json.loads(find_split(root, split)[0].read_text())
        data: dict[str, Any] = {}
        for split, part in (("val", chosen[:held_out]), ("train", chosen[held_out:])):
            kept = set(part.tolist())
            document_of_part = {
                **document,
                "images": [one for one in document["images"] if one["id"] in kept],
                "annotations": [one for one in document["annotations"] if one["image_id"] in kept],
            }
            path = folder / f"{split}.json"
            write_text(path, json.dumps(document_of_part))
            data[f"{split}_annotations"] = str(path)
            data[f"{split}_images"] = str(subset.index.image_folder)
        return data, len(chosen)


def plan_runs(args: argparse.Namespace) -> Iterator[Run]:
    """All runs that the arguments ask for; untouched models first."""
    for dataset in args.datasets:
        yield Run(dataset, 0, UNTOUCHED, 0)
    for seed, images, dataset, recipe in itertools.product(
        args.seeds, args.images, args.datasets, args.recipes
    ):
        yield Run(dataset, images, recipe, seed)


def run_missing(args: argparse.Namespace) -> None:
    """Runs what has no row, and prints a line for each."""
    LOGGER.setLevel(logging.ERROR)
    study = Study(args.output_dir, steps=args.steps)
    for run in plan_runs(args):
        row = study.perform(run)
        if row is not None:
            numbers = f"test {row['test']:.4f}, general {row['general']:.4f}"
            print(f"{run.name}: {numbers}, step {row['best_step']}, {row['seconds']} s", flush=True)


def compare_with_untouched(runs: Sequence[Run], folder: Path, part: str) -> tuple[str, float]:
    """The difference to the untouched model over seeds and objects, and the share of harmed ones.

    Args:
        runs: Of one cell, one for each seed.
        folder: Of the study.
        part: `test` or `general`.

    Returns:
        The difference with its interval, and the share of objects that lost more than .1 IoU.
    """
    before = read_scores(folder / runs[0].baseline().name / f"{part}.npz")
    after = [read_scores(folder / run.name / f"{part}.npz") for run in runs]
    assert all((one.object_ids == before.object_ids).all() for one in after)
    tuned = np.stack([one.iou for one in after])
    untouched = np.stack([before.iou] * len(runs))
    difference = paired_difference(untouched, tuned, before.image_ids)
    return format_difference(difference), float((tuned - untouched < -0.1).mean())


def make_rows(args: argparse.Namespace) -> list[str]:
    """A row for each dataset, number of images and recipe of which all seeds have run."""
    rows = []
    for dataset, images in itertools.product(args.datasets, args.images):
        for recipe in args.recipes:
            runs = [Run(dataset, images, recipe, seed) for seed in args.seeds]
            paths = [args.output_dir / run.name / "row.json" for run in runs]
            if not all(path.exists() for path in paths):
                continue
            facts = [json.loads(path.read_text()) for path in paths]
            before: RunScores = read_scores(args.output_dir / runs[0].baseline().name / "test.npz")
            gain, harmed = compare_with_untouched(runs, args.output_dir, "test")
            lost, _ = compare_with_untouched(runs, args.output_dir, "general")
            scores = [before.iou_box_fill.mean(), before.iou.mean()]
            scores.append(float(np.mean([row["test"] for row in facts])))
            cells = [f"`{dataset}`", str(facts[0]["images"]), f"`{recipe}`"]
            cells += [format_score(float(score)) for score in scores]
            cells += [gain, f"{harmed:.0%}", lost]
            cells += [f"{np.median([row['best_step'] for row in facts]):.0f}"]
            rows.append(f"| {' | '.join(cells)} |")
    return rows


def write_report(args: argparse.Namespace) -> None:
    """Prints the table of what has run."""
    head = (
        "| data | images | trained | box fill | untouched | test IoU | gain | harmed "
        "| general set | best step |"
    )
    print(markdown_table(head, make_rows(args)))
    print(describe_machine(torch.device("cpu")))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing, or prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--datasets", nargs="+", default=SETS, choices=SETS, metavar="D")
    parser.add_argument("--images", nargs="+", type=int, default=[5, 20, 0], metavar="N")
    parser.add_argument(
        "--recipes", nargs="+", default=tuple(RECIPES)[:4], choices=RECIPES, metavar="R"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args(argv)
    {"run": run_missing, "report": write_report}[args.command](args)


if __name__ == "__main__":
    main()
