"""The program `samft`, also `python -m samft`: runs one command, or lists them."""

import runpy
import sys

from samft import __version__
from samft.commands import COMMANDS, shell_command
from samft.errors import EXIT_DONE, EXIT_USAGE, escape_unprintable, fold_for_terminal
from samft.suggestions import suggest_nearest

_HELP = ("help", "-h", "--help")
_VERSION = ("--version", "-V", "version")


def main() -> int:
    """Runs `samft NAME ...` as `python -m samft.NAME ...` is run, with `sys.argv`.

    Returns:
        The exit code, where no command was run: 0, or 2 for a wrong name.
    """
    arguments = sys.argv[1:]
    if len(arguments) > 1 and arguments[0] == "help":
        arguments = [arguments[1], "--help"]
    name = arguments[0] if arguments else "help"
    if name in COMMANDS:
        sys.argv = [f"samft {name}", *arguments[1:]]
        # By its name, so that signals, workers and exit codes are those of `python -m`.
        runpy.run_module(f"samft.{name}", run_name="__main__", alter_sys=True)
        return EXIT_DONE
    if name in _VERSION:
        print(f"samft {__version__}")
    elif name in _HELP:
        print(_overview())
    else:
        print(fold_for_terminal(f"error: {_wrong_name(name)}", sys.stderr), file=sys.stderr)
        return EXIT_USAGE
    return EXIT_DONE


def _overview() -> str:
    rows = "\n".join(f"  {name:10} {meaning}" for name, meaning in COMMANDS.items())
    command = shell_command("COMMAND")
    return (
        f"samft {__version__}: fine-tunes Segment Anything on a COCO dataset.\n\n"
        f"usage: {command} [--FLAG VALUE ...]\n\n{rows}\n\n"
        f"`{command} --help` lists the flags of each.\n\n"
        "Next, to try it out:\n"
        f"  {shell_command('demo', '--output_dir', 'demo-data')}\n"
        "or, with a dataset of your own:\n"
        f"  {shell_command('check', '--data_root', 'DATASET')}"
    )


def _wrong_name(name: str) -> str:
    # A flag is that of a command, and near to none of the words here.
    options = ("--help", "--version") if name.startswith("-") else COMMANDS
    hint = suggest_nearest(name.removeprefix("samft."), options)
    if name.startswith("-") and not hint:
        hint = f" Flags follow a command, as in `{shell_command('train', name)}`."
    return (
        f"samft has no command '{escape_unprintable(name)}'.{hint} "
        f"The commands are {', '.join(COMMANDS)}."
    )


if __name__ == "__main__":
    sys.exit(main())
