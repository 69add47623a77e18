"""The flags of commands that see images through windows. Imports no torch."""

import argparse
from collections.abc import Callable
from typing import Any

from samft.config_checks import MAX_OVERLAP
from samft.errors import ConfigError
from samft.views.windows import KINDS


def add_view_flags(add: Callable[..., Any], *, default: str) -> None:
    """Adds `--view`, `--tile_size`, `--tile_overlap` and `--view_context`; see `windows.View`.

    Args:
        add: `add_argument` of a parser or of a group.
        default: What is used where they are not given, at the end of the help text.
    """
    add(
        "--view",
        choices=KINDS,
        help="see images as a whole (image), through a grid of windows (tiles), or through windows "
        f"around objects (objects); {default}",
    )
    add("--tile_size", type=int, metavar="PX", help=f"side of a window, px of the image; {default}")
    add(
        "--tile_overlap",
        type=float,
        metavar="SHARE",
        help=f"overlap of tiles, as a share of tile_size; {default}",
    )
    add(
        "--view_context",
        type=float,
        metavar="FACTOR",
        help=f"with objects, how many times as large as its object a window is; {default}",
    )


def view_flags(options: argparse.Namespace) -> dict[str, Any]:
    """Those of `add_view_flags` that were given, by name.

    Raises:
        ConfigError: A value is out of its range.
    """
    ranges = {
        "tile_size": (16, float("inf")),
        "tile_overlap": (0, MAX_OVERLAP),
        "view_context": (1, float("inf")),
    }
    given = {name: getattr(options, name) for name in ("view", *ranges)}
    for name, (low, high) in ranges.items():
        if given[name] is not None and not low <= given[name] <= high:
            limits = f"at least {low}" if high == float("inf") else f"from {low} to {high}"
            raise ConfigError(f"--{name}: {given[name]} must be {limits}.")
    return {name: value for name, value in given.items() if value is not None}
