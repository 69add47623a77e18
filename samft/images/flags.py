"""The flags of commands that read images: which pixels they take. Imports no torch."""

import argparse
from collections.abc import Callable
from typing import Any

from samft.cli import parse_channels, parse_pixel_range
from samft.errors import ConfigError


def add_pixel_flags(add: Callable[..., Any], *, of: str = "") -> None:
    """Adds `--pixel_range`, `--channels` and `--page`; `images.pixels` says what they mean.

    Args:
        add: `add_argument` of a parser or of a group.
        of: Which checkpoints or images they are for, at the end of each help text.
    """
    add(
        "--pixel_range",
        type=_checked_text(parse_pixel_range),
        metavar="RANGE",
        help="values that become 0 to 255: auto (8 bits as they are, else percentiles 1 to 99), "
        f"percentile, full, or MIN,MAX; default auto{of}",
    )
    add(
        "--channels",
        type=_checked_text(parse_channels),
        metavar="R,G,B",
        help=f"bands of images of more than three to use, counted from 1{of}",
    )
    add(
        "--page",
        type=int,
        metavar="N",
        help=f"page of stacks and animations to use, counted from 1{of}",
    )


def pixel_flags(options: argparse.Namespace) -> dict[str, Any]:
    """Those of `add_pixel_flags` that were given, by name.

    Raises:
        ConfigError: The page is not from 1 on.
    """
    if options.page is not None and options.page < 1:
        raise ConfigError(f"--page: {options.page} must be at least 1.")
    names = ("pixel_range", "channels", "page")
    given = {name: getattr(options, name) for name in names}
    return {name: value for name, value in given.items() if value is not None}


def _checked_text(check: Callable[[str], object]) -> Callable[[str], str]:
    def check_text(text: str) -> str:
        try:
            check(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return text

    return check_text
