"""Errors that are the user's to mend, and how a command turns any ending into an exit code."""

import os
import sys
import traceback
from collections.abc import Callable

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_STOPPED = 75
EXIT_INTERRUPTED = 130


def printable(text: str) -> str:
    """Text that may hold a name from outside, with escapes for what could steer a terminal.

    Args:
        text: Of any characters; line ends and tabs stay.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def paragraph(text: str) -> str:
    """Text of which only the first line begins at the margin, so that it cannot forge others."""
    return printable(text).replace("\n", "\n  ")


class _Told(Exception):
    # Its words are printed and written to status.json, and may hold a file's name.
    def __str__(self) -> str:
        return printable(super().__str__())


class UserError(_Told, ValueError):
    """Wrong usage, configuration, data or checkpoint: what, where, what to do, in a sentence."""


class ConfigError(UserError):
    """A command line or YAML file that cannot be used; every rank finds the same."""


class DataError(UserError):
    """A dataset, annotation file or image that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read, or that does not fit."""


class SharedError(UserError):
    """A user's error that one rank found and all were told, so that all end and one speaks."""


class TrainingError(_Told, RuntimeError):
    """The run cannot go on (say, the loss is not finite); a sentence, shown without a traceback."""


class ExportError(_Told, RuntimeError):
    """A file that was written does not do what it should; a sentence, without a traceback."""


class Stopped(Exception):
    """The run was asked to stop and has saved everything; running it again goes on from there."""


def exit_code(error: BaseException | None) -> int:
    """The exit code that stands for how a command ended.

    Args:
        error: What it raised, or None if it returned.

    Returns:
        0 done, 1 failed, 2 wrong usage or input, 75 stopped with everything saved, 130 interrupted.
    """
    if error is None:
        return EXIT_DONE
    if isinstance(error, UserError):
        return EXIT_USAGE
    if isinstance(error, Stopped):
        return EXIT_STOPPED
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    return EXIT_FAILED


def run_command(main: Callable[[list[str]], object], argv: list[str] | None = None) -> int:
    """Runs a command's `main` and reports how it ended.

    Expected endings are one paragraph on standard error; a traceback appears for bugs and with
    `--debug`.

    Args:
        main: Takes the arguments after the program's name.
        argv: Those arguments; `sys.argv[1:]` if None.

    Returns:
        The exit code, see `exit_code`.
    """
    arguments = sys.argv[1:] if argv is None else argv
    try:
        main(arguments)
    except (UserError, TrainingError, ExportError, Stopped, KeyboardInterrupt) as error:
        if "--debug" in arguments:
            traceback.print_exc()
        word = "stopped" if isinstance(error, (Stopped, KeyboardInterrupt)) else "error"
        rank = os.environ.get("RANK", "0")
        if rank == "0" or not isinstance(error, (ConfigError, Stopped, SharedError)):
            name = "" if rank == "0" else f"[rank {rank}] "
            words = paragraph(str(error) or "interrupted")
            print(f"{name}{word}: {words}", file=sys.stderr, flush=True)
        return exit_code(error)
    except Exception as error:
        traceback.print_exc()
        return exit_code(error)
    return EXIT_DONE
