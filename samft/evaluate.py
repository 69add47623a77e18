"""Scores checkpoints on every object of a split, at the images' original resolution.

    python -m samft.evaluate --checkpoint FILE --data_root D --split val --output scores.json
    python -m samft.evaluate --checkpoint BEFORE AFTER --data_root D
    torchrun --nproc_per_node=8 -m samft.evaluate --checkpoint FILE --data_root D

IoU, Dice and boundary IoU; by size, class and prompt (boxes that are off, a single point); how far
the predicted IoU can be believed; COCO AP. With more than one checkpoint, each is compared with the
first, object by object. Image size and resize mode are those that a checkpoint was tuned for.
"""

import argparse
import os
import sys
from typing import Any

from samft.cli import CommandParser, run_command, user_path
from samft.errors import ConfigError, escape_unprintable
from samft.runtime.signals import die_with_parent


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
    options = _parse(argv)
    # Only now: torch takes seconds to import, and --help and wrong flags must answer at once.
    from samft.recipes.evaluate import run

    report, lines = run(options)
    for line in lines:
        print(escape_unprintable(line), flush=True)
    return report


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser("python -m samft.evaluate", __doc__)
    add = parser.add_argument
    add(
        "--checkpoint",
        type=user_path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="ours (.ckpt) or Meta's (.pth); of several, each is compared with the first",
    )
    add("--data_root", type=user_path, metavar="DIR", help="dataset folder, as for samft.train")
    add("--split", default="val", metavar="NAME", help="default val, or valid or validation")
    add("--annotations", type=user_path, metavar="FILE", help="this COCO file, over --data_root")
    add("--images", type=user_path, metavar="DIR", help="its images")
    add(
        "--val_fraction",
        type=float,
        metavar="F",
        help="only the images that samft.train holds out of this split with the same F",
    )
    add("--category_names", metavar="A,B", help="these classes only")
    add(
        "--min_mask_area",
        type=float,
        default=0.0,
        metavar="PX",
        help="leave out masks of fewer pixels than this, in the original image",
    )
    add(
        "--on_bad_image",
        choices=("error", "skip"),
        default="error",
        help="skip: missing and broken images are left out and named; default error",
    )
    add("--output", type=user_path, metavar="FILE", help="write all numbers there as JSON")
    add(
        "--ap_backend",
        choices=("pycocotools", "faster_coco_eval"),
        default="pycocotools",
        help="what computes COCO AP; the numbers are the same",
    )
    add("--seed", type=int, default=0, metavar="N", help="of box jitter and intervals; default 0")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default auto")
    add("--num_workers", type=int, default=4, metavar="N", help="loaders per process; default 4")
    add("--debug", action="store_true", help="show tracebacks of user errors too")
    options = parser.parse_args(argv)
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    if bool(options.annotations) != bool(options.images):
        raise ConfigError("--annotations and --images go together: give both, or --data_root.")
    if not (options.data_root or options.annotations):
        raise ConfigError(
            "nothing to evaluate on: give --data_root, or --annotations and --images."
        )
    if options.val_fraction is not None and not 0 < options.val_fraction < 1:
        raise ConfigError(f"--val_fraction: {options.val_fraction} must lie between 0 and 1.")
    if options.num_workers < 0:
        raise ConfigError(f"--num_workers: {options.num_workers} must be at least 0.")
    for path in options.checkpoint:
        if path.is_dir():
            raise ConfigError(f"--checkpoint: {path} is a folder: name a .ckpt or .pth file in it.")
        if not path.is_file():
            raise ConfigError(f"--checkpoint: there is no file {path}: check the path.")


if __name__ == "__main__":
    sys.exit(run_command(main))
