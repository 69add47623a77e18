"""Trains: `python -m samft.train`, or under `torchrun`. See `samft.recipes.train` for the run."""

import contextlib
import os
from functools import partial
from typing import Any

from samft.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_STOPPED, EXIT_USAGE, UserError
from samft.runtime.signals import (
    StopRequest,
    check_launch_environment,
    die_with_parent,
    stop_on_signal,
)


def main(argv: list[str], *, stop: StopRequest | None = None) -> dict[str, Any]:
    """Runs a training. Afterwards, the logging and the signal handlers are the caller's again.

    Args:
        argv: The arguments after the program's name; `--help` lists them.
        stop: Has its handlers installed already; None: they are installed here.

    Returns:
        What `summary.json` holds; of a dry run, the forecast.

    Raises:
        UserError: The configuration, the data or the checkpoint cannot be used.
        RunStopped: A signal, `stop_after` or the job's time limit ended the run; all is saved.
        TrainingError: The run cannot continue.
    """
    from samft.config import parse_config
    from samft.runtime.output_dir import write_status

    if "RANK" in os.environ:  # under torchrun; before the seconds that importing torch takes
        die_with_parent()
    try:
        check_launch_environment()
        config = parse_config(argv)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            write_status(None, state="failed", exit_code=EXIT_USAGE, reason=str(error))
        raise
    with contextlib.ExitStack() as handlers:
        # From here on, a signal has the run save and stop; a dry run has nothing to save.
        if config.dry_run:
            if stop is not None:
                stop.restore()
            stop = StopRequest()
        elif stop is None:
            stop = handlers.enter_context(stop_on_signal())
        # Only now: torch takes seconds to import, and --help and wrong flags must answer at once.
        from samft.recipes.train import run

        return run(config, stop)


def exit_code_for_launcher(code: int, *, is_stopping: bool = False) -> int:
    """The exit code of this process; under `launch.sh` 0 where a restart would be of no use.

    torchrun restarts all processes after any other exit code. But a wrong configuration would fail
    again, and a run that was stopped should stay stopped. `launch.sh` exits with the code in its
    status file, whatever torchrun returns.

    Args:
        code: How the run ended, see `cli.exit_code`.
        is_stopping: Whether a signal had asked it to stop, however it ended.
    """
    is_final = is_stopping or code in (EXIT_USAGE, EXIT_STOPPED, EXIT_INTERRUPTED)
    if not is_final or not os.environ.get("SAMFT_STATUS_FILE"):
        return code
    if os.environ.get("RANK", "0") != "0" and os.environ.get("LOCAL_RANK") == "0":
        # The first process of a host without rank 0, whose launch.sh has a status file of its own.
        from samft.runtime.output_dir import write_status

        state = "preempted" if code == EXIT_STOPPED else "failed"
        write_status(None, state=state, exit_code=code, reason="see the host of process 0")
    return EXIT_DONE


def end_at_once() -> None:
    """Ends the process at a second Ctrl-C, whatever it is doing: nothing is cleaned up.

    Every file is written so that this leaves a whole one, and loader workers end with the process.
    """
    with contextlib.suppress(OSError):
        from samft.runtime.output_dir import end_status

        if os.environ.get("RANK", "0") == "0":
            end_status(exit_code=EXIT_INTERRUPTED, reason="interrupted")
        os.write(2, b"stopped: interrupted\n")
    os._exit(exit_code_for_launcher(EXIT_INTERRUPTED))


if __name__ == "__main__":
    # Before anything else is imported, which takes a second: a signal is heard from here on.
    with stop_on_signal(end_at_once) as early_stop:
        from samft.cli import run_command
        from samft.ending import end_process

        code = run_command(partial(main, stop=early_stop))
        end_process(exit_code_for_launcher(code, is_stopping=bool(early_stop)))
