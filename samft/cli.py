"""How every command parses its arguments, fails and exits. Imports no torch.

The parser that all commands share, a frozen dataclass read from flags and YAML, the extras that
some commands need, and the exit codes.
"""

import argparse
import dataclasses
import difflib
import os
import sys
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
)


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are a sentence, as all errors of users are.

    Args:
        prog: As a user starts it.
        description: For `--help`, shown as it is.
        options: As `argparse.ArgumentParser`.
    """

    def __init__(self, prog: str, description: str | None, **options: Any) -> None:
        super().__init__(
            prog=prog,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **options,
        )

    def error(self, message: str) -> NoReturn:
        """Refuses the command line.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(f"{message}. `{self.prog} --help` lists every flag.")


def user_path(text: str) -> Path:
    """The type of a flag that names a file or folder; `~` is the home folder."""
    return Path(text).expanduser()


class CheckedSettings(Protocol):
    """A dataclass that knows what is wrong with its values."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def check(self) -> list[str]:
        """All problems, one sentence each, beginning with the name of the field."""
        ...


Config = TypeVar("Config", bound=CheckedSettings)


def setting(default: Any, help: str, *, choices: tuple[str, ...] = (), at_least: Any = None) -> Any:
    """A field of such a dataclass.

    Args:
        default: Its value if nothing is given.
        help: For `--help`.
        choices: What it may be; empty: anything of its type.
        at_least: The lowest number that it may be.
    """
    metadata = {"help": help, "choices": choices, "at_least": at_least}
    return dataclasses.field(default=default, metadata=metadata)


def check_fields(config: Any) -> list[str]:
    """The fields whose value is none of their choices, or too low: one sentence each."""
    problems = []
    for field in dataclasses.fields(config):
        value, choices = getattr(config, field.name), field.metadata["choices"]
        at_least = field.metadata["at_least"]
        if choices and value is not None and value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            options = ", ".join(choices)
            problems.append(f"{field.name}: '{value}' is none of {options}.{hint}")
        if isinstance(value, (int, float)) and at_least is not None:
            if not at_least <= value < float("inf"):
                problems.append(f"{field.name}: {value} must be at least {at_least}.")
    return problems


def parse_settings(cls: type[Config], argv: list[str], *, prog: str, description: str) -> Config:
    """Merges defaults < the YAML file that `--config` names < flags, and checks the result.

    Args:
        cls: A dataclass made of `setting`s.
        argv: The arguments after the program's name; `--help` prints the flags and exits.
        prog: What the command is called.
        description: What it does.

    Returns:
        The checked configuration.

    Raises:
        ConfigError: Listing every unknown key, wrong type and wrong value at once.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    parser = _argument_parser(fields.values(), prog=prog, description=description)
    known, unknown = parser.parse_known_args(argv)
    flags = vars(known)
    problems: list[str] = []
    options = [f"--{name}" for name in ("config", "help", *fields)]
    # A value that follows an unknown flag is reported with it, not as a problem of its own.
    for word in [word for word in unknown if word.startswith("-")] or unknown[:1]:
        problems.append(f"{word}: no such flag.{_nearest(word.split('=')[0], options)}")
    file = flags.pop("config", None)
    merged = OmegaConf.structured(cls)
    OmegaConf.set_readonly(merged, False)  # it inherits the dataclass's frozenness
    for key, value in _read_yaml(Path(file)).items() if file is not None else ():
        if key in fields:
            problems += _assign(merged, fields[key], value, source=f"{file}: ")
        else:
            problems.append(f"{file}: {key}: no such key.{_nearest(str(key), fields)}")
    for key, value in flags.items():
        problems += _assign(merged, fields[key], value, source="--")
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:  # ${...} that leads nowhere, or its ??? for "missing"
        text = str(error).splitlines()[0]
        raise ConfigError(f"the configuration cannot be resolved: {text}.") from error
    assert isinstance(config, cls)
    problems += config.check()
    if problems:
        raise ConfigError(
            "the configuration has "
            + (f"{len(problems)} problems" if len(problems) > 1 else "a problem")
            + "".join(f"\n  - {problem}" for problem in problems)
            + f"\n`{prog} --help` lists every flag."
        )
    return config


def _assign(merged: Any, field: dataclasses.Field[Any], value: Any, *, source: str) -> list[str]:
    annotation = str(field.type)
    if "None" in annotation and str(value).lower() in ("none", "null", ""):
        value = None
    if isinstance(value, bool) and "off" in field.metadata["choices"]:
        value = "on" if value else "off"  # YAML reads a bare off as false
    try:
        OmegaConf.update(merged, field.name, value)
    except OmegaConfBaseException:
        words = {"bool": "yes or no", "int": "a whole number", "float": "a number"}
        wanted = next((word for kind, word in words.items() if kind in annotation), "text")
        return [f"{source}{field.name}: '{value}' is not {wanted}."]
    return []


def _argument_parser(
    fields: Iterable[dataclasses.Field[Any]], *, prog: str, description: str
) -> argparse.ArgumentParser:
    # Values stay text and absent flags stay absent: what they mean is decided in merging.
    parser = CommandParser(prog, description, argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", metavar="FILE.yaml", help="YAML file of the fields below")
    for field in fields:
        choices, default = field.metadata["choices"], field.default
        text = field.metadata["help"].replace("%", "%%")
        if choices:
            text += f" ({', '.join(choices)})"
        text += "" if default is None else f" [{default}]"
        if isinstance(default, bool):
            names = (f"--{field.name}", f"--no-{field.name}")
            parser.add_argument(*names, action=_Switch, help=text)
        else:
            parser.add_argument(f"--{field.name}", metavar="VALUE", help=text)
    return parser


class _Switch(argparse.Action):
    """`--x` is true, `--no-x` is false."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **kwargs)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, not option_string.startswith("--no-"))


def _read_yaml(path: Path) -> dict[Any, Any]:
    if not path.is_file():
        raise ConfigError(f"--config: there is no file {path}.")
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except Exception as error:  # OmegaConf passes on what the YAML parser raises
        text = " ".join(str(error).split())
        raise ConfigError(f"--config: {path} is not readable as YAML: {text}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"--config: {path} must hold `key: value` lines.")
    return loaded


def _nearest(word: str, options: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(options), n=1)
    return f" Did you mean {near[0]}?" if near else ""


EXTRAS = {
    "safetensors": ("safetensors",),
    "onnx": ("onnx", "onnxruntime"),
    "huggingface": ("safetensors", "transformers"),
}


def require_extra(extra: str, *, what: str) -> None:
    """Makes sure that an extra's packages are installed, without importing them.

    Args:
        extra: A key of `EXTRAS`, which is what `setup.cfg` calls it.
        what: What needs them, for the error.

    Raises:
        ConfigError: Some are missing; the command that installs them is named.
    """
    missing = [name for name in EXTRAS[extra] if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{what} needs {' and '.join(missing)}, which this Python does not have: "
            f"pip install 'samft[{extra}]'."
        )


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
    if isinstance(error, RunStopped):
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
    except (UserError, TrainingError, ExportError, RunStopped, KeyboardInterrupt) as error:
        if "--debug" in arguments:
            traceback.print_exc()
        word = "stopped" if isinstance(error, (RunStopped, KeyboardInterrupt)) else "error"
        rank = os.environ.get("RANK", "0")
        if rank == "0" or not isinstance(error, (ConfigError, RunStopped, SharedError)):
            name = "" if rank == "0" else f"[rank {rank}] "
            words = escape_paragraph(str(error) or "interrupted")
            print(f"{name}{word}: {words}", file=sys.stderr, flush=True)
        return exit_code(error)
    except Exception as error:
        traceback.print_exc()
        return exit_code(error)
    return EXIT_DONE
