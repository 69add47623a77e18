"""Trains: `python -m samft.train`, or under `torchrun`. Parses, then calls `samft.guard`."""

import contextlib
import os
import sys
from typing import Any

from samft.cli import run_command
from samft.config import parse_config
from samft.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_STOPPED, EXIT_USAGE, ConfigError
from samft.runtime.output_dir import write_status
from samft.runtime.signals import StopRequest, die_with_parent, stop_on_signal


def main(argv: list[str]) -> dict[str, Any]:
    """Runs a training.

    Args:
        argv: The arguments after the program's name; `--help` lists them.

    Returns:
        What `summary.json` holds.

    Raises:
        UserError: The configuration, the data or the checkpoint cannot be used.
        RunStopped: A signal or `stop_after` ended the run, and everything is saved.
        TrainingError: The run cannot go on.
    """
    if "RANK" in os.environ:  # before the seconds that importing torch takes
        die_with_parent()
    try:
        config = parse_config(argv)
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":
            write_status(None, state="failed", exit_code=EXIT_USAGE, reason=str(error))
        raise
    # From here on, a signal ends the run in good order; but of a dry run there is nothing to save.
    with contextlib.nullcontext(StopRequest()) if config.dry_run else stop_on_signal() as stop:
        # Only now: torch takes seconds to import, and --help and wrong flags must answer at once.
        from samft.recipes.train import run

        return run(config, stop)


def exit_code_for_launcher(code: int) -> int:
    """What this process exits with: under `launch.sh`, 0 where starting again is no use.

    torchrun starts all processes again after any failure. A wrong configuration would fail again,
    and what was stopped is to stay so; `launch.sh` exits with the code in its status file.

    Args:
        code: What stands for how the run ended.
    """
    is_final = code in (EXIT_USAGE, EXIT_STOPPED, EXIT_INTERRUPTED)
    if not is_final or not os.environ.get("SAMFT_STATUS_FILE"):
        return code
    if os.environ.get("RANK", "0") != "0" and os.environ.get("LOCAL_RANK") == "0":
        # Of another host than rank 0's, whose own launch.sh looks at its own file.
        state = "preempted" if code == EXIT_STOPPED else "failed"
        write_status(None, state=state, exit_code=code, reason="see the host of process 0")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(exit_code_for_launcher(run_command(main)))
