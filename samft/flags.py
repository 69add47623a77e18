"""A frozen dataclass as flags and YAML: how its fields are declared, typed, merged and checked.

Imports no torch.
"""

import argparse
import dataclasses
import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from samft.command_line import CommandParser
from samft.errors import ConfigError


class Checked(Protocol):
    """A dataclass that knows what is wrong with its values."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def check(self) -> list[str]:
        """All problems, one sentence each, beginning with the name of the field."""
        ...


Config = TypeVar("Config", bound=Checked)


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


def parse(cls: type[Config], argv: list[str], *, prog: str, description: str) -> Config:
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
