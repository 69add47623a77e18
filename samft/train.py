"""Trains: `python -m samft.train`, or under `torchrun`. Parses, then calls `samft.run`."""

import os
import sys
from typing import Any

from samft.config import parse_config
from samft.errors import EXIT_USAGE, ConfigError, run_command
from samft.files import write_status


def main(argv: list[str]) -> dict[str, Any]:
    """Runs a training.

    Args:
        argv: The arguments after the program's name; `--help` lists them.

    Returns:
        What `summary.json` holds.

    Raises:
        UserError: The configuration, the data or the checkpoint cannot be used.
        Stopped: A signal or `stop_after` ended the run, and everything is saved.
        TrainingError: The run cannot go on.
    """
    try:
        config = parse_config(argv)
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":
            write_status(None, state="failed", exit_code=EXIT_USAGE, reason=str(error))
        raise
    # Only now: torch takes seconds to import, and --help and wrong flags must answer at once.
    from samft.run import run

    return run(config)


if __name__ == "__main__":
    sys.exit(run_command(main))
