"""The flags of commands that score a split: its data, its objects, the computation.

Imports no torch.
"""

import argparse
from collections.abc import Callable
from typing import Any

from samft.cli import add_links_flag, user_path
from samft.coco.layout import role_of
from samft.config_checks import pattern_problem
from samft.errors import CheckpointError, ConfigError
from samft.images.flags import add_pixel_flags
from samft.runtime.checkpoint_paths import find_weights_file
from samft.views.flags import add_view_flags


def add_split_flags(add: Callable[..., Any]) -> None:
    """Adds `--data_root` and the other flags that name a split, to a parser or a group."""
    add("--data_root", type=user_path, metavar="DIR", help="dataset folder, as for samft train")
    add(
        "--split",
        default="val",
        metavar="NAME",
        help="split of --data_root; valid and validation are tried for val (default: val)",
    )
    add("--annotations", type=user_path, metavar="FILE", help="a COCO file, instead of --data_root")
    add("--images", type=user_path, metavar="DIR", help="folder of the images of --annotations")
    add_pixel_flags(add, of="; a checkpoint of samft says it by itself")
    add_view_flags(add, default="default: as in training")


def add_selection_flags(add: Callable[..., Any]) -> None:
    """Adds the flags that choose objects of the split."""
    add(
        "--val_fraction",
        type=float,
        metavar="F",
        help="only the images that samft train --val_fraction F holds out of this split",
    )
    add(
        "--group_by",
        metavar="auto|folder|none|REGEX",
        help="as in training, for --val_fraction (default: that of the checkpoints, or auto)",
    )
    add("--category_names", metavar="A,B", help="only objects of these classes (default: all)")
    add(
        "--min_mask_area",
        type=float,
        default=0.0,
        metavar="PX",
        help="only masks of at least so many pixels of the original image (default: 0)",
    )
    add(
        "--crowds",
        choices=("auto", "leave_out", "use"),
        default="auto",
        help="objects with iscrowd 1: auto: leave out those that look like crowds; leave_out: "
        "leave out all; use: use all (default: auto)",
    )
    add(
        "--on_bad_image",
        choices=("error", "skip"),
        default="error",
        help="missing or unreadable images: end with an error, or skip and list them "
        "(default: error)",
    )
    add_links_flag(add)


def add_computation_flags(add: Callable[..., Any]) -> None:
    """Adds `--device`, `--num_workers` and `--debug`."""
    add(
        "--device",
        choices=("auto", "cuda", "cpu"),
        default="auto",
        help="where to evaluate; auto: on GPUs, or on the CPU of a host without (default: auto)",
    )
    add(
        "--num_workers",
        type=int,
        default=4,
        metavar="N",
        help="data loader workers per process (default: 4)",
    )
    add("--debug", action="store_true", help="print tracebacks of user errors, too")


def check_split_flags(options: argparse.Namespace, *, field: str | None = "--checkpoint") -> None:
    """Refuses flags of these that contradict each other, and checkpoints that are not there.

    Args:
        options: With the flags above, and `checkpoint`, the files.
        field: The flag that gave these files; None: they are given without one.

    Raises:
        ConfigError: The first of what is wrong.
    """
    if bool(options.annotations) != bool(options.images):
        raise ConfigError("--annotations and --images go together: give both, or --data_root.")
    if not (options.data_root or options.annotations):
        raise ConfigError(
            "nothing to evaluate on: give --data_root, or --annotations and --images."
        )
    if options.val_fraction is not None and not 0 < options.val_fraction < 1:
        raise ConfigError(f"--val_fraction: {options.val_fraction} must lie between 0 and 1.")
    is_other_split = not options.annotations and role_of(options.split) in ("val", "test")
    if options.val_fraction is not None and is_other_split:
        raise ConfigError(
            f"--val_fraction: samft train holds images out of the training split, and --split is "
            f"{options.split}: add --split train to score those, or leave --val_fraction out to "
            f"score all of {options.split}."
        )
    if options.group_by and (problem := pattern_problem(options.group_by)):
        raise ConfigError(f"--group_by: {problem}")
    if options.num_workers < 0:
        raise ConfigError(f"--num_workers: {options.num_workers} must be at least 0.")
    for path in options.checkpoint:
        try:
            find_weights_file(path, field=field)
        except CheckpointError as error:  # on every rank alike
            raise ConfigError(str(error)) from error
