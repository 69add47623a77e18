"""How every command parses its arguments, and how it ends. Imports no torch.

In this order: the argument parser of all commands, and flags that several have; the optional
packages of some; exit codes and error messages.
"""

import argparse
import contextlib
import math
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from samft.commands import shell_command, shell_program
from samft.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    EXIT_USAGE,
    ConfigError,
    ExportError,
    RunStopped,
    SharedError,
    TrainingError,
    UserError,
    escape_paragraph,
    explain_host_error,
    fold_for_terminal,
)
from samft.suggestions import suggest_nearest

_MOST = 2**53  # the largest value of a whole number in a flag
HELP_WIDTH = 80  # columns; the same in a terminal, a pipe and a test


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=HELP_WIDTH)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = textwrap.dedent(text).strip().split("\n\n")
        return "\n\n".join(
            _fold_commands(paragraph)
            if paragraph.startswith(" ")
            else textwrap.fill(paragraph, width)
            for paragraph in paragraphs
        )


def _fold_commands(example: str) -> str:
    # Commands are shown as this shell takes them, and go on in the next line where they are long.
    example = re.sub(r"^( +)samft (\w+)", lambda m: m[1] + shell_command(m[2]), example, flags=re.M)
    return "\n".join(
        " \\\n".join(
            textwrap.wrap(line, HELP_WIDTH - 2, subsequent_indent=" " * 8, break_on_hyphens=False)
        )
        for line in example.splitlines()
    )


def _parse_number(text: str) -> float:
    with contextlib.suppress(ValueError):
        if math.isfinite(number := float(text)):
            return number
    raise argparse.ArgumentTypeError(f"'{text}' is not a finite number")


def _parse_whole_number(text: str) -> int:
    with contextlib.suppress(ValueError):
        if abs(number := int(text)) <= _MOST:
            return number
    raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at most {_MOST:,}")


class CommandParser(argparse.ArgumentParser):
    """An argument parser that raises `ConfigError` instead of exiting with a usage message.

    Args:
        name: One of `COMMANDS`.
        description: For `--help`: paragraphs separated by empty lines; indented ones are kept,
            and each line `samft NAME ...` in them is shown as it can be copied.
        options: See `argparse.ArgumentParser`.
    """

    def __init__(self, name: str, description: str | None, **options: Any) -> None:
        super().__init__(
            prog=shell_command(name),
            description=description,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
            **options,
        )
        # Numbers that Python takes and no flag means: nan, inf, and more digits than arrays hold.
        self.register("type", float, _parse_number)
        self.register("type", int, _parse_whole_number)
        # So that --pixel_range -1000,400 is a flag and its value; argparse knows -1000 alone.
        self._negative_number_matcher = re.compile(r"-\.?\d[\d.,e+-]*$")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does it, but a wrong flag comes before flags that are missing because of it.

        Raises:
            ConfigError: The command line is wrong.
        """
        given = sys.argv[1:] if args is None else args
        flags = [argument.split("=")[0] for argument in given if argument.startswith("--")]
        known = self._option_string_actions
        wrong = [flag for flag in flags if flag not in known and flag != "--"]
        if wrong:
            named = (f"{flag}: no such flag.{suggest_nearest(flag, known)}" for flag in wrong)
            self.error(" ".join(named))
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Refuses the command line.

        Raises:
            ConfigError: Always.
        """
        end = "" if message.endswith((".", "?")) else "."
        raise ConfigError(f"{message}{end} `{self.prog} --help` lists every flag.")


PIXEL_RANGES = ("auto", "percentile", "full")


def parse_pixel_range(text: str) -> tuple[float, float] | None:
    """Low and high of `MIN,MAX`; None for one of `PIXEL_RANGES`.

    Raises:
        ValueError: It is neither.
    """
    if text in PIXEL_RANGES:
        return None
    try:
        low, high = (float(number) for number in text.split(","))
    except ValueError:
        low, high = 0.0, 0.0
    if not -math.inf < low < high < math.inf:
        raise ValueError(
            f"'{text}' is none of {', '.join(PIXEL_RANGES)}, nor MIN,MAX with MIN below MAX"
        )
    return low, high


def parse_channels(text: str) -> tuple[int, ...]:
    """Band numbers from `R,G,B`, or from one number.

    Raises:
        ValueError: It is neither, or a number is below 1.
    """
    try:
        channels = tuple(int(number) for number in text.split(","))
    except ValueError:
        channels = ()
    if len(channels) not in (1, 3) or min(channels) < 1:
        raise ValueError(f"'{text}' is not one or three band numbers from 1 on, such as 3,2,1")
    return channels


def parse_image_size(value: int | str) -> tuple[int, int]:
    """Height and width of the model's input: of its side, or of `WIDTHxHEIGHT` as cameras say it.

    Raises:
        ValueError: It is neither.

    Example:
        >>> parse_image_size(1024), parse_image_size("1024x768")
        ((1024, 1024), (768, 1024))
    """
    match = re.fullmatch(r"([0-9]{1,6})(?:x([0-9]{1,6}))?", str(value))
    if match is None:
        raise ValueError(
            f"'{value}' is neither a number of pixels, such as 1024, nor WIDTHxHEIGHT with a small "
            "x and no spaces, such as 1024x768"
        )
    return int(match[2] or match[1]), int(match[1])


def name_image_size(size: tuple[int, int]) -> int | str:
    """What `parse_image_size` reads as this height and width: one number of a square."""
    height, width = size
    return width if height == width else f"{width}x{height}"


def image_size_problem(value: Any) -> str | None:
    """What is wrong with an image size, as a phrase; None if a model can have it."""
    try:
        size = parse_image_size(value)
    except ValueError as error:
        return str(error)
    height, width = (max(16, round(side / 16) * 16) for side in size)
    if (height, width) == size:
        return None
    problem = "is no multiple of 16" if size[0] == size[1] else "has a side of no multiple of 16"
    return f"{value} {problem}; the nearest is {name_image_size((height, width))}"


def simplest_image_size(value: Any) -> int | str:
    """An image size as `name_image_size` names it; of a value that is none, its text."""
    try:
        return name_image_size(parse_image_size(value))
    except ValueError:
        return str(value)


def user_path(text: str) -> Path:
    """The argparse type of a flag that names a file or folder; `~` is the home folder."""
    return Path(text).expanduser()


LINKS_HELP = (
    "open images behind symbolic links into these folders, such as the cache of Hugging Face or "
    "DVC, separated by commas; alone, or all: into any folder (default: only into the data folder)"
)
ALL_LINKS = "all"


def link_folders(text: str | None) -> tuple[Path, ...]:
    """The folders that `--allow_links` names, as `ImageFolder` takes them; `all` is the root."""
    if not text:
        return ()
    whole = user_path(text).is_dir()  # a name may hold a comma
    parts = [text] if whole else [part.strip() for part in text.split(",") if part.strip()]
    return (Path("/"),) if ALL_LINKS in parts else tuple(map(user_path, parts))


def add_links_flag(add: Callable[..., Any]) -> None:
    """Adds `--allow_links` to the parser whose `add_argument` is given."""
    add(
        "--allow_links",
        type=link_folders,
        nargs="?",
        const=link_folders(ALL_LINKS),
        default=(),
        metavar="DIR,DIR",
        help=LINKS_HELP,
    )


EXTRAS = {
    "fast-ap": ("faster_coco_eval",),
    "onnx": ("onnx", "onnxruntime"),
    "huggingface": ("transformers",),
    "mlflow": ("mlflow",),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
}


def require_extra(extra: str, *, what: str) -> None:
    """Makes sure that the packages of an extra are installed, without importing them.

    Args:
        extra: A key of `EXTRAS`, named as in `setup.cfg`.
        what: The feature that needs them, for the error message.

    Raises:
        ConfigError: Some are missing; the message has the command that installs them.
    """
    missing = [name for name in EXTRAS[extra] if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{what} needs {' and '.join(missing)}, which this Python does not have: "
            f"`{shell_program('pip', 'install', *missing)}` installs it."
        )


def exit_code(error: BaseException | None) -> int:
    """The exit code of a command.

    Args:
        error: What its `main` raised; None if it returned.

    Returns:
        0 done, 1 failed, 2 wrong usage or input, 75 stopped with everything saved, 130 interrupted.
    """
    if error is None:
        return EXIT_DONE
    if isinstance(error, UserError):
        return EXIT_USAGE
    if isinstance(error, RunStopped):
        return EXIT_STOPPED
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    return EXIT_FAILED


def run_command(main: Callable[[list[str]], object], argv: list[str] | None = None) -> int:
    """Runs a command's `main` and prints how it failed or stopped.

    Errors of the user, and stops, are one paragraph on standard error; with `--debug` the traceback
    comes before it. A bug is a traceback, also in the summary that `torchrun` prints.

    Args:
        main: Takes the arguments after the program's name.
        argv: Those arguments; `sys.argv[1:]` if None.

    Returns:
        The exit code, see `exit_code`.
    """
    arguments = sys.argv[1:] if argv is None else argv
    try:
        main(arguments)
    except (UserError, TrainingError, ExportError, RunStopped, KeyboardInterrupt) as error:
        if "--debug" in arguments:
            traceback.print_exc()
        print_error(error)
        return exit_code(error)
    except Exception as error:
        reason = explain_host_error(error)
        if reason is None or "--debug" in arguments:
            traceback.print_exc()
        if reason is not None:
            print_error(error, reason)
        else:
            _report_to_torchrun(error)
        return exit_code(error)
    return EXIT_DONE


def print_error(error: BaseException, reason: str = "") -> None:
    """Prints what ends this process, as one paragraph on standard error."""
    rank = os.environ.get("RANK", "0")
    # Every rank has the same one of these, so rank 0 alone prints it.
    if rank != "0" and isinstance(error, (ConfigError, RunStopped, SharedError)):
        return
    prefix = "" if rank == "0" else f"[rank {rank}] "
    kind = "stopped" if isinstance(error, (RunStopped, KeyboardInterrupt)) else "error"
    message = escape_paragraph(reason or str(error) or "interrupted")
    with contextlib.suppress(OSError):  # standard error may be a file on the disk that is full
        text = fold_for_terminal(f"{prefix}{kind}: {message}", sys.stderr)
        print(text, file=sys.stderr, flush=True)


def _report_to_torchrun(error: Exception) -> None:
    # torchrun's own decorator, applied to nothing but a bug: it writes the exception into the file
    # that torchrun reads, which then names the first rank that failed, its host and its traceback.
    # Applied to `main` itself, it would print a traceback of the user's errors too, and it would
    # import torch before `--help`.
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return
    from torch.distributed.elastic.multiprocessing.errors import record

    @record
    def raise_again() -> None:
        raise error

    with contextlib.suppress(Exception):
        raise_again()
