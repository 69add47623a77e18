"""The quality lab: which recipe gives the better masks? Recipes x datasets x seeds, in one process.

Each run trains the packaged `vit_tiny` for some steps, scores the weights of the last step on the
validation images, and adds a line to `OUTPUT_DIR/rows.jsonl`; a run that is there is not run again.
Labs of several processes may share the folder. `report` writes tables and a plot from the rows into
the documentation, in place of those of the same name.
"""

import argparse
import itertools
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.measure import describe_machine
from benchmarks.quality_datasets import DATASETS
from benchmarks.quality_recipes import DEFAULT, ORIGINAL, RECIPES, UNTOUCHED, Laboratory, RunRequest
from benchmarks.quality_report import Report, collect_results
from benchmarks.quality_rows import Row, RowStore
from benchmarks.quality_scores import Scorer
from samft.checkpoints.top_k import git_commit
from samft.cli import run_command
from samft.runtime.logs import LOGGER


def plan_requests(args: argparse.Namespace) -> Iterator[RunRequest]:
    """The runs that the arguments ask for: one dataset after the other, all recipes of a seed."""
    for dataset, seed, recipe in itertools.product(args.datasets, args.seeds, args.recipes):
        if recipe != UNTOUCHED:
            yield RunRequest(dataset, recipe, seed, args.steps, args.batch_size, not args.full)
        elif seed == args.seeds[0]:
            yield untouched_request(dataset)


def untouched_request(dataset: str) -> RunRequest:
    """The scores of the packaged weights, which no seed and no training changes."""
    return RunRequest(dataset, UNTOUCHED, seed=0, steps=0, batch_size=1, frozen=True)


class Runner:
    """Runs what is not in the rows yet.

    Args:
        store: Where results go.
        with_clicks: See `Scorer`.
        automatic: See `Scorer`.
    """

    def __init__(self, store: RowStore, *, with_clicks: bool = False, automatic: int = 0) -> None:
        self.store, self.lab = store, Laboratory(store.folder)
        self.with_clicks, self.automatic = with_clicks, automatic
        wanted = {"iou_clicks_box": with_clicks, "found_50": automatic > 0}
        self.wanted = [name for name, is_wanted in wanted.items() if is_wanted]
        self.scorers: dict[tuple[str, int], Scorer] = {}

    def run_missing(self, request: RunRequest) -> Row | None:
        """Runs a request and adds its row; None if there was one with all that is wanted."""
        row = self.store.find_row(request)
        if row is not None and all(name in row for name in self.wanted):
            return None
        config = request.config(self.store.folder)
        start = time.process_time()  # CPU seconds: the machine may have other work
        model = self.lab.train_recipe(request)
        train_seconds = time.process_time() - start
        key = request.dataset, int(config.image_size)
        if key not in self.scorers:
            val_subset = self.lab.read_splits(request, config).val.subset
            self.scorers[key] = Scorer(
                val_subset,
                image_size=int(config.image_size),
                with_clicks=self.with_clicks,
                automatic=self.automatic,
            )
        resize_mode = "squash" if request.recipe == ORIGINAL else config.resize_mode
        scores = self.scorers[key].score(model, resize_mode=resize_mode)
        return self.store.add_row(
            request,
            scores,
            train_seconds=round(train_seconds, 1),
            seconds=round(time.process_time() - start, 1),
            machine=describe_machine(torch.device("cpu")),
            commit=git_commit(),
        )


def run_requests(args: argparse.Namespace) -> None:
    """Runs all requests that have no row, and prints a line for each."""
    LOGGER.setLevel(logging.WARNING)  # not the start of each of hundreds of trainings
    runner = Runner(RowStore(args.output_dir), with_clicks=args.clicks, automatic=args.automatic)
    for request in plan_requests(args):
        row = runner.run_missing(request)
        if row is None:
            continue
        print(
            f"{request.dataset} {request.recipe} seed {request.seed}: IoU {row['iou']:.4f}, "
            f"boundary {row['boundary_iou']:.4f}, shaken {row['iou_shaken']:.4f}, "
            + (f"7 clicks {row['iou_clicks_point']:.4f}, " if args.clicks else "")
            + (f"automatic {row['found_50']:.4f}, " if args.automatic else "")
            + f"area "
            f"{row['area_ratio']:.2f}, {row['train_seconds']:.0f} + "
            f"{row['seconds'] - row['train_seconds']:.0f} CPU s",
            flush=True,
        )


def write_report(args: argparse.Namespace) -> None:
    """Writes the tables and the plot of the runs that the arguments name."""
    store = RowStore(args.output_dir)
    results = collect_results(store, plan_requests(args))
    report = Report(args.name, results, against=args.against)
    report.write(args.docs)
    print(report.to_markdown())


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the lab")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES[:3], metavar="R")
    parser.add_argument(
        "--datasets", nargs="+", choices=tuple(DATASETS), default=tuple(DATASETS), metavar="D"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--full", action="store_true", help="train the image encoder, too")
    parser.add_argument("--clicks", action="store_true", help="score points and corrections, too")
    parser.add_argument(
        "--automatic", type=int, default=0, metavar="N", help="score automatic masks of N images"
    )
    parser.add_argument("--name", default=DEFAULT, help="report: of its block in the page")
    parser.add_argument(
        "--against", choices=RECIPES, default=ORIGINAL, metavar="R", help="report: compare with"
    )
    parser.add_argument(
        "--docs", type=Path, default=Path("docs"), help="report: folder of experiments.md"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Runs what is missing, or writes a report."""
    args = parse_arguments(argv)
    {"run": run_requests, "report": write_report}[args.command](args)


if __name__ == "__main__":
    sys.exit(run_command(main))
