"""What the command lines of all entry points have in common. Imports no torch."""

import argparse
from pathlib import Path
from typing import Any, NoReturn

from samft.errors import ConfigError


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
