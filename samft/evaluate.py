"""Scores checkpoints on every object of a split, at the images' original resolution.

    samft evaluate --checkpoint FILE --data_root D --split val --output scores.json
    samft evaluate --checkpoint BEFORE AFTER --data_root D
    torchrun --nproc_per_node=8 -m samft.evaluate --checkpoint FILE --data_root D

Prints IoU, Dice and boundary IoU, also by size of the object and by class; the IoU with other
prompts (jittered boxes, a single point); the calibration of the predicted IoU; COCO AP; and, with
--clicks, the IoU after each of a number of correcting clicks; with --automatic, which objects the
automatic mask generator finds. Each further checkpoint is compared with the first, object by
object. Each is run at the image size and resize mode that it was tuned for.
"""

import argparse
import os
from typing import Any

from samft.cli import CommandParser, run_command, user_path
from samft.ending import end_process
from samft.errors import ConfigError, escape_unprintable
from samft.prediction.flags import add_generator_flags, generator_settings
from samft.prediction.split_flags import (
    add_computation_flags,
    add_selection_flags,
    add_split_flags,
    check_split_flags,
)
from samft.runtime.signals import check_launch_environment, die_with_parent

USUAL_CLICKS, MOST_CLICKS = 7, 100  # the literature allows 20
USUAL_IMAGES = 50  # of automatic masks, which take a thousand points each


def main(argv: list[str]) -> dict[str, Any]:
    """Parses the command line, evaluates, and prints a table.

    Args:
        argv: The arguments after the program's name; `--help` lists them.

    Returns:
        What `--output` writes; empty on ranks other than 0.

    Raises:
        UserError: The flags, the checkpoints, the data or the output cannot be used.
        TrainingError: Another process failed.
    """
    if "RANK" in os.environ:  # before the seconds that importing torch takes
        die_with_parent()
    check_launch_environment()
    options = _parse_options(argv)
    # Imported late: torch takes seconds, and --help and wrong flags must answer at once.
    from samft.recipes.evaluate import run

    report, lines = run(options)
    for line in lines:
        print(escape_unprintable(line), flush=True)
    return report


def _parse_options(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser(
        "evaluate",
        __doc__,
        usage="%(prog)s --checkpoint FILE [FILE ...] [--FLAG VALUE ...]",
    )
    _add_data_flags(parser)
    _add_prompt_flags(parser)
    _add_output_flags(parser)
    options = parser.parse_args(argv)
    _check_options(options)
    return options


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("checkpoints and data")
    group.add_argument(
        "--checkpoint",
        type=user_path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="checkpoints of samft (.ckpt) or Meta's (.pth); the first is the one that others are "
        "compared with",
    )
    add_split_flags(group.add_argument)
    add_selection_flags(parser.add_argument_group("which objects").add_argument)


def _add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--clicks",
        type=int,
        nargs="?",
        const=USUAL_CLICKS,
        default=0,
        metavar="N",
        help="also correct each object by up to N simulated clicks, from its box and from a point "
        f"(default: 0, none; --clicks alone: {USUAL_CLICKS})",
    )
    group.add_argument(
        "--automatic",
        type=int,
        nargs="?",
        const=USUAL_IMAGES,
        default=0,
        metavar="N",
        help="also generate automatic masks in a random sample of N images, and score them "
        f"whatever the class of an object (default: 0, none; --automatic alone: {USUAL_IMAGES})",
    )
    add_generator_flags(parser.add_argument_group("automatic masks").add_argument)


def _add_output_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output and computation")
    group.add_argument(
        "--output",
        type=user_path,
        metavar="FILE",
        help="write all scores to this JSON file, and those of each object to a CSV file beside it",
    )
    group.add_argument(
        "--ap_backend",
        choices=("pycocotools", "faster_coco_eval"),
        default="pycocotools",
        help="package that computes COCO AP; both give the same numbers (default: pycocotools)",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of jittered boxes, of the sample of --automatic and of intervals (default: 0)",
    )
    add_computation_flags(group.add_argument)


def _check_options(options: argparse.Namespace) -> None:
    check_split_flags(options)
    _check_prompts(options)


def _check_prompts(options: argparse.Namespace) -> None:
    if not 0 <= options.clicks <= MOST_CLICKS:
        raise ConfigError(
            f"--clicks: {options.clicks} is no number of clicks from 0, for none, to {MOST_CLICKS}."
        )
    if options.automatic < 0:
        raise ConfigError(f"--automatic: {options.automatic} is no number of images.")
    settings = generator_settings(options)
    if settings and not options.automatic:
        raise ConfigError(f"--{next(iter(settings))} is for automatic masks: add --automatic.")


if __name__ == "__main__":
    end_process(run_command(main))
