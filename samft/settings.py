"""A dataclass of settings, filled from defaults < a YAML file < flags. Imports no torch."""

import argparse
import dataclasses
import difflib
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from samft.cli import CommandParser
from samft.errors import ConfigError, escape_unprintable
from samft.suggestions import suggest_nearest

MOST_USED = "most used"
_COMMENT_WIDTH = 100  # characters
_TOO_LARGE = 2**63  # for whole numbers of NumPy and PyTorch


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
    many: bool = False,
    at_least: Any = None,
    metavar: str | None = None,
    value_alone: str | None = None,
    convert: Callable[[Any], Any] | None = None,
) -> Any:
    """A field of a dataclass of settings: one attribute, YAML key and flag.

    Args:
        default: The value if none is given.
        help: One sentence for `--help`.
        group: The section of `--help` that lists the flag.
        most_used: Whether `--help` lists it in its first section instead.
        choices: The allowed values; empty: any value of the field's type.
        many: Whether a value may be several of them, separated by commas; see `split_names`.
        at_least: The lowest number allowed.
        metavar: What `--help` shows for the value; None: by the field's type.
        value_alone: The value of the flag if none follows it; None: one has to.
        convert: Makes a value of what was given, where the field's type alone does not say how; it
            leaves what it does not understand for `check`.
    """
    metadata = {
        "help": help,
        "section": MOST_USED if most_used else f"{group} (advanced)",
        "group": group,
        "choices": choices,
        "many": many,
        "at_least": at_least,
        "metavar": metavar,
        "value_alone": value_alone,
        "convert": convert,
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


def split_names(value: str) -> list[str]:
    """The names of a setting of several, each once, in the order given."""
    return list(dict.fromkeys(name.strip() for name in value.split(",")))


def check_fields(config: Any) -> list[str]:
    """One sentence for each setting that is none of its choices, out of range, or not UTF-8."""
    problems = []
    for field in dataclasses.fields(config):
        value, choices = getattr(config, field.name), field.metadata["choices"]
        at_least = field.metadata["at_least"]
        chosen = split_names(value) if field.metadata["many"] else [value]
        for name in chosen if choices and value is not None else ():
            if name not in choices:
                near = difflib.get_close_matches(str(name), choices, n=1)
                hint = f" Did you mean '{near[0]}'?" if near else ""
                options = ", ".join(choices)
                problems.append(f"{field.name}: '{name}' is none of {options}.{hint}")
        if isinstance(value, str) and value.encode(errors="replace").decode() != value:
            problems.append(
                f"{field.name}: '{value}' is not UTF-8, so config.yaml and TensorBoard cannot hold "
                "it: rename it, or give a symbolic link to it."
            )
        if isinstance(value, (int, float)) and at_least is not None:
            if not at_least <= value < float("inf"):
                problems.append(f"{field.name}: {value} must be at least {at_least}.")
            elif isinstance(value, int) and value >= _TOO_LARGE:
                problems.append(f"{field.name}: {value} must be below 2^63.")
    return problems


def parse_settings(cls: type[Config], argv: list[str], *, command: str, description: str) -> Config:
    """Merges defaults < the YAML file named by `--config` < flags, and checks the result.

    Args:
        cls: A dataclass of `setting`s.
        argv: The arguments after the program's name; `--help` prints the flags and exits.
        command: The command whose settings they are, one of `COMMANDS`.
        description: For `--help`.

    Returns:
        The checked configuration.

    Raises:
        ConfigError: Listing every unknown key, wrong type and wrong value at once.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    parser = _settings_parser(cls, command=command, description=description)
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
            problems.append(f"{file}: {key}: no such key.{suggest_nearest(str(key), fields)}")
    for key, value in flags.items():
        problems += _assign_value(merged, fields[key], _literal(value), source="--")
    config = _resolve(merged, cls, source=file or "the configuration")
    raise_for_problems(
        problems + config.check(), hint=f"\n`{parser.prog} --help` lists every flag."
    )
    return config


def to_yaml(config: CheckedSettings) -> str:
    """The configuration as YAML; `--config` of it gives the same configuration back."""
    values = {each.name: getattr(config, each.name) for each in dataclasses.fields(config)}
    literal = {name: _literal(value) for name, value in values.items()}
    return OmegaConf.to_yaml(OmegaConf.structured(type(config)(**literal)))


def commented_yaml(comment: str, settings: Mapping[str, Any] = MappingProxyType({})) -> str:
    """Lines of YAML under a comment, in which characters that would end a line are escaped.

    Args:
        comment: One line or more; empty: none.
        settings: By name.
    """
    plain = escape_unprintable(comment).replace("\n", r"\n")
    lines = textwrap.wrap(plain, _COMMENT_WIDTH - len("# "), break_on_hyphens=False)
    literal = {name: _literal(value) for name, value in settings.items()}
    values = OmegaConf.to_yaml(literal) if settings else ""
    return "".join(f"# {line}\n" for line in lines) + values


class _TextLoader(yaml.SafeLoader):
    # Knows no type of plain values but null.
    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def read_yaml(text: str) -> Any:
    """What a YAML document holds: plain values as they are written, but for null, which is None.

    Else YAML 1.1 would take 010 for 8, 0x768 for 1896, 1:30 for 90, and a class named no for False.

    Raises:
        Exception: It is no YAML, or has a key twice.

    Example:
        >>> read_yaml("{steps: 010, image_size: 0x768, names: [on, no], seed: null}")
        {'steps': '010', 'image_size': '0x768', 'names': ['on', 'no'], 'seed': None}
    """
    as_typed = OmegaConf.to_container(OmegaConf.create(text), resolve=False)  # refuses keys twice
    return _TextLoader(text).get_single_data() or as_typed


def has_settings(path: Path, config: CheckedSettings) -> bool:
    """Whether `--config` of a file, which may be anything, gives this configuration."""
    argv = ["--config", str(path)]
    try:
        return parse_settings(type(config), argv, command="train", description="") == config
    except ConfigError:
        return False


def convert_values(config: Config) -> tuple[Config, list[str]]:
    """A configuration that was made in Python, with each value converted to its field's type.

    Args:
        config: May hold a path where text belongs, say.

    Returns:
        The configuration, and one sentence for each value that cannot be converted.
    """
    merged = OmegaConf.structured(type(config))
    OmegaConf.set_readonly(merged, False)
    problems = []
    for field in dataclasses.fields(config):
        value = _literal(getattr(config, field.name))
        problems += _assign_value(merged, field, value, source="")
    return _resolve(merged, type(config), source="the configuration"), problems


def _literal(value: Any) -> Any:
    # To OmegaConf, ${...} refers to a setting or a variable. In a file it may; else it is text.
    text = str(value) if isinstance(value, Path) else value
    if not isinstance(text, str):
        return value
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)


def _resolve(merged: Any, cls: type[Config], *, source: str) -> Config:
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:  # ${...} that leads nowhere, or its ??? for "missing"
        message = str(error).splitlines()[0]
        raise ConfigError(f"{source} cannot be resolved: {message}.") from error
    assert isinstance(config, cls)
    return config


def raise_for_problems(problems: list[str], *, hint: str = "") -> None:
    """Refuses a configuration.

    Args:
        problems: What is wrong with it, one sentence each.
        hint: The end of the message.

    Raises:
        ConfigError: There is a problem.
    """
    if problems:
        count = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise ConfigError(f"the configuration has {count}{listed}{hint}")


def _settings_parser(
    cls: type[CheckedSettings], *, command: str, description: str
) -> argparse.ArgumentParser:
    # Values stay text, and absent flags stay absent: `parse_settings` converts and merges them.
    parser = CommandParser(
        command,
        description,
        argument_default=argparse.SUPPRESS,
        usage="%(prog)s [--config FILE.yaml] [--FLAG VALUE ...]",
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
            if field.metadata["value_alone"] == "on":  # as a switch, which it once was
                off: dict[str, Any] = {
                    "action": "store_const",
                    "const": "off",
                    "help": argparse.SUPPRESS,
                }
                section.add_argument(f"--no-{field.name}", dest=field.name, **off)
    return parser


def _value_name(field: dataclasses.Field[Any]) -> str:
    if field.metadata["metavar"] or field.metadata["choices"]:
        names = ",".join(field.metadata["choices"])
        return field.metadata["metavar"] or (names if field.metadata["many"] else f"{{{names}}}")
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
        f"{flag}: no such flag.{suggest_nearest(flag.split('=')[0], options)}" for flag in flags
    ]


_SWITCHES = {**dict.fromkeys(("true", "yes"), "on"), **dict.fromkeys(("false", "no"), "off")}


def _assign_value(
    merged: Any, field: dataclasses.Field[Any], value: Any, *, source: str
) -> list[str]:
    # Sets one field of the merged configuration; the problem, if the value has the wrong type.
    annotation = str(field.type)
    if "None" in annotation and str(value).lower() in ("none", "null", ""):
        value = None
    if "off" in field.metadata["choices"]:  # a switch, or once was one
        value = _SWITCHES.get(str(value).lower(), value)
    if field.metadata["convert"]:
        value = field.metadata["convert"](value)
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
        loaded = read_yaml(path.read_text(encoding="utf-8"))
    except Exception as error:  # OmegaConf passes on what the YAML parser raises
        message = " ".join(str(error).split())
        raise ConfigError(f"--config: {path} is not readable as YAML: {message}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"--config: {path} must hold `key: value` lines.")
    return loaded
