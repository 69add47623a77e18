"""Flags and YAML as they are typed: a parser of any dataclass's fields, its errors sentences.

Imports no torch.
"""

import argparse
import dataclasses
import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import OmegaConf

from samft.errors import ConfigError


def argument_parser(
    fields: Iterable[dataclasses.Field[Any]], *, prog: str, description: str
) -> argparse.ArgumentParser:
    """A parser with a flag for each field, `--x` and `--no-x` for booleans, and `--config`.

    Values stay text and absent flags stay absent: what they mean is decided when they are merged.

    Args:
        fields: With `help` and `choices` in their metadata.
        prog: What the command is called.
        description: What it does.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )

    def fail(message: str) -> NoReturn:
        raise ConfigError(f"{message}. `{prog} --help` lists every flag.")

    parser.error = fail  # type: ignore[method-assign]
    parser.add_argument("--config", metavar="FILE.yaml", help="YAML file of the fields below")
    for setting in fields:
        choices, default = setting.metadata["choices"], setting.default
        text = setting.metadata["help"].replace("%", "%%")
        if choices:
            text += f" ({', '.join(choices)})"
        text += "" if default is None else f" [{default}]"
        if isinstance(default, bool):
            names = (f"--{setting.name}", f"--no-{setting.name}")
            parser.add_argument(*names, action=_Switch, help=text)
        else:
            parser.add_argument(f"--{setting.name}", metavar="VALUE", help=text)
    return parser


class _Switch(argparse.Action):
    """`--x` is true, `--no-x` is false."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **kwargs)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, not option_string.startswith("--no-"))


def read_yaml(path: Path) -> dict[Any, Any]:
    """The keys and values of a YAML file, as they stand there.

    Raises:
        ConfigError: There is no such file, or it holds no `key: value` lines.
    """
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


def nearest(word: str, options: Iterable[str]) -> str:
    """A question to add to an error: whether the option most like the word was meant, if any is."""
    near = difflib.get_close_matches(word, list(options), n=1)
    return f" Did you mean {near[0]}?" if near else ""
