"""How every command parses its arguments, and how it ends. Imports no torch.

In this order: the argument parser of all commands; a dataclass of settings filled from defaults, a
YAML file and flags; the optional packages of some commands; exit codes and error messages.
"""

import argparse
import contextlib
import dataclasses
import difflib
import math
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Protocol, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

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
    explain_os_error,
)

HELP_WIDTH = 80  # columns; the same in a terminal, a pipe and a test
MOST_USED = "most used"


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
    # Commands that are too long for a line go on in the next, as a shell reads them.
    return "\n".join(
        " \\\n".join(
            textwrap.wrap(line, HELP_WIDTH - 2, subsequent_indent=" " * 8, break_on_hyphens=False)
        )
        for line in example.splitlines()
    )


class CommandParser(argparse.ArgumentParser):
    """An argument parser that raises `ConfigError` instead of exiting with a usage message.

    Args:
        prog: The command as a user types it.
        description: For `--help`: paragraphs separated by empty lines; indented ones are kept.
        options: See `argparse.ArgumentParser`.
    """

    def __init__(self, prog: str, description: str | None, **options: Any) -> None:
        super().__init__(
            prog=prog,
            description=description,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
            **options,
        )
        # So that --pixel_range -1000,400 is a flag and its value; argparse knows -1000 alone.
        self._negative_number_matcher = re.compile(r"-\.?\d[\d.,e+-]*$")

    def error(self, message: str) -> NoReturn:
        """Refuses the command line.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(f"{message}. `{self.prog} --help` lists every flag.")


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


class CheckedSettings(Protocol):
    """A dataclass of `setting`s that can check its values."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def check(self) -> list[str]:
        """All problems, one sentence each, beginning with the name of the field."""
        ...


Config = TypeVar("Config", bound=CheckedSettings)


def setting(
    default: Any,
    help: str,
    *,
    group: str,
    most_used: bool = False,
    choices: tuple[str, ...] = (),
    at_least: Any = None,
    metavar: str | None = None,
    value_alone: str | None = None,
) -> Any:
    """A field of a dataclass of settings: one attribute, YAML key and flag.

    Args:
        default: The value if none is given.
        help: One sentence for `--help`.
        group: The section of `--help` that lists the flag.
        most_used: Whether `--help` lists it in its first section instead.
        choices: The allowed values; empty: any value of the field's type.
        at_least: The lowest number allowed.
        metavar: What `--help` shows for the value; None: by the field's type.
        value_alone: The value of the flag if none follows it; None: one has to.
    """
    metadata = {
        "help": help,
        "section": MOST_USED if most_used else f"{group} (advanced)",
        "group": group,
        "choices": choices,
        "at_least": at_least,
        "metavar": metavar,
        "value_alone": value_alone,
    }
    return dataclasses.field(default=default, metadata=metadata)


def help_sections(cls: type[CheckedSettings]) -> dict[str, list[dataclasses.Field[Any]]]:
    """The settings of a dataclass as `--help` lists them: the most used ones, then by group."""
    sections: dict[str, list[dataclasses.Field[Any]]] = {MOST_USED: []}
    for field in dataclasses.fields(cls):
        sections.setdefault(field.metadata["section"], []).append(field)
    return sections


def default_text(field: dataclasses.Field[Any]) -> str:
    """The default of a setting as one writes it in YAML; empty for None."""
    if isinstance(field.default, bool):
        return str(field.default).lower()
    return "" if field.default is None else str(field.default)


def check_fields(config: Any) -> list[str]:
    """One sentence for each setting that is none of its choices, too low, or not UTF-8."""
    problems = []
    for field in dataclasses.fields(config):
        value, choices = getattr(config, field.name), field.metadata["choices"]
        at_least = field.metadata["at_least"]
        if choices and value is not None and value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            options = ", ".join(choices)
            problems.append(f"{field.name}: '{value}' is none of {options}.{hint}")
        if isinstance(value, str) and value.encode(errors="replace").decode() != value:
            problems.append(
                f"{field.name}: '{value}' is not UTF-8, so config.yaml and TensorBoard cannot hold "
                "it: rename it, or give a symbolic link to it."
            )
        if isinstance(value, (int, float)) and at_least is not None:
            if not at_least <= value < float("inf"):
                problems.append(f"{field.name}: {value} must be at least {at_least}.")
    return problems


def parse_settings(cls: type[Config], argv: list[str], *, prog: str, description: str) -> Config:
    """Merges defaults < the YAML file named by `--config` < flags, and checks the result.

    Args:
        cls: A dataclass of `setting`s.
        argv: The arguments after the program's name; `--help` prints the flags and exits.
        prog: The command as a user types it.
        description: For `--help`.

    Returns:
        The checked configuration.

    Raises:
        ConfigError: Listing every unknown key, wrong type and wrong value at once.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    parser = _settings_parser(cls, prog=prog, description=description)
    known, unknown = parser.parse_known_args(argv)
    flags = vars(known)
    problems = _unknown_flags(unknown, ["config", "help", *fields])
    file = flags.pop("config", None)
    merged = OmegaConf.structured(cls)
    OmegaConf.set_readonly(merged, False)  # it inherits the dataclass's frozenness
    for key, value in _read_yaml(Path(file)).items() if file is not None else ():
        if key in fields:
            problems += _assign_value(merged, fields[key], value, source=f"{file}: ")
        else:
            problems.append(f"{file}: {key}: no such key.{_suggest_nearest(str(key), fields)}")
    for key, value in flags.items():
        problems += _assign_value(merged, fields[key], value, source="--")
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:  # ${...} that leads nowhere, or its ??? for "missing"
        message = str(error).splitlines()[0]
        raise ConfigError(f"the configuration cannot be resolved: {message}.") from error
    assert isinstance(config, cls)
    problems += config.check()
    if problems:
        count = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise ConfigError(
            f"the configuration has {count}{listed}\n`{prog} --help` lists every flag."
        )
    return config


def _settings_parser(
    cls: type[CheckedSettings], *, prog: str, description: str
) -> argparse.ArgumentParser:
    # Values stay text, and absent flags stay absent: `parse_settings` converts and merges them.
    parser = CommandParser(
        prog,
        description,
        argument_default=argparse.SUPPRESS,
        usage=f"{prog} [--config FILE.yaml] [--FLAG VALUE ...]",
        add_help=False,
    )
    for title, fields in help_sections(cls).items():
        section = parser.add_argument_group(title)
        if title == MOST_USED:
            section.add_argument("-h", "--help", action="help", help="print this help and exit")
            section.add_argument(
                "--config", metavar="FILE.yaml", help="YAML file of `flag: value` lines"
            )
        for field in fields:
            default = default_text(field)
            help = field.metadata["help"] + (f" (default: {default})" if default else "")
            names = [f"--{field.name}"]
            options: dict[str, Any] = {"metavar": _value_name(field)}
            if field.metadata["value_alone"]:
                options |= {"nargs": "?", "const": field.metadata["value_alone"]}
            if isinstance(field.default, bool):
                names, options = [*names, f"--no-{field.name}"], {"action": _SwitchAction}
            section.add_argument(*names, help=help.replace("%", "%%"), **options)
    return parser


def _value_name(field: dataclasses.Field[Any]) -> str:
    if field.metadata["metavar"] or field.metadata["choices"]:
        return field.metadata["metavar"] or "{" + ",".join(field.metadata["choices"]) + "}"
    return next((name for kind, name in _VALUE_NAMES.items() if kind in str(field.type)), "TEXT")


_VALUE_NAMES = {"int": "N", "float": "X"}


class _SwitchAction(argparse.Action):
    """`--x` is true, `--no-x` is false."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **kwargs)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, not option_string.startswith("--no-"))


def _unknown_flags(unknown: list[str], known: Iterable[str]) -> list[str]:
    # A value that follows an unknown flag belongs to it, and is not a problem of its own.
    options = [f"--{name}" for name in known]
    flags = [argument for argument in unknown if argument.startswith("-")] or unknown[:1]
    return [
        f"{flag}: no such flag.{_suggest_nearest(flag.split('=')[0], options)}" for flag in flags
    ]


def _assign_value(
    merged: Any, field: dataclasses.Field[Any], value: Any, *, source: str
) -> list[str]:
    # Sets one field of the merged configuration; the problem, if the value has the wrong type.
    annotation = str(field.type)
    if "None" in annotation and str(value).lower() in ("none", "null", ""):
        value = None
    if isinstance(value, bool) and "off" in field.metadata["choices"]:
        value = "on" if value else "off"  # YAML reads a bare off as false
    try:
        OmegaConf.update(merged, field.name, value)
    except OmegaConfBaseException:
        kinds = {"bool": "yes or no", "int": "a whole number", "float": "a number"}
        expected = next((text for kind, text in kinds.items() if kind in annotation), "text")
        return [f"{source}{field.name}: '{value}' is not {expected}."]
    return []


def _read_yaml(path: Path) -> dict[Any, Any]:
    if not path.is_file():
        raise ConfigError(f"--config: there is no file {path}.")
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except Exception as error:  # OmegaConf passes on what the YAML parser raises
        message = " ".join(str(error).split())
        raise ConfigError(f"--config: {path} is not readable as YAML: {message}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"--config: {path} must hold `key: value` lines.")
    return loaded


def _suggest_nearest(name: str, options: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(options), n=1)
    return f" Did you mean {near[0]}?" if near else ""


EXTRAS = {
    "onnx": ("onnx", "onnxruntime"),
    "huggingface": ("transformers",),
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
            f"pip install 'samft[{extra}]'."
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
        _print_error(error)
        return exit_code(error)
    except Exception as error:
        reason = explain_os_error(error)
        if reason is None or "--debug" in arguments:
            traceback.print_exc()
        if reason is not None:
            _print_error(error, reason)
        else:
            _report_to_torchrun(error)
        return exit_code(error)
    return EXIT_DONE


def _print_error(error: BaseException, reason: str = "") -> None:
    rank = os.environ.get("RANK", "0")
    # Every rank has the same one of these, so rank 0 alone prints it.
    if rank != "0" and isinstance(error, (ConfigError, RunStopped, SharedError)):
        return
    prefix = "" if rank == "0" else f"[rank {rank}] "
    kind = "stopped" if isinstance(error, (RunStopped, KeyboardInterrupt)) else "error"
    message = escape_paragraph(reason or str(error) or "interrupted")
    with contextlib.suppress(OSError):  # standard error may be a file on the disk that is full
        print(f"{prefix}{kind}: {message}", file=sys.stderr, flush=True)


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
