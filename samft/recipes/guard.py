"""One run from start to end: processes, the folder's lock, signals, and every ending told."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from samft import distributed
from samft.checkpoints.training_state import LAST_NAME
from samft.config import TrainConfig
from samft.errors import Stopped, TrainingError, exit_code
from samft.recipes import build as assemble
from samft.recipes.dry_run import dry_run
from samft.recipes.run import Run
from samft.runtime import heartbeat as whereabouts
from samft.runtime.files import make_writable, sole_use, write_status
from samft.runtime.logs import LOGGER, start_logging
from samft.runtime.signals import StopRequest


def run(config: TrainConfig, stop: StopRequest) -> dict[str, Any]:
    """Trains as configured. Collective: every rank must call.

    Args:
        config: The checked configuration.
        stop: Says whether a signal has asked to stop.

    Returns:
        What `summary.json` holds; of a dry run, see `dry_run`.

    Raises:
        UserError: The configuration, the data or the checkpoint cannot be used.
        Stopped: A signal or `stop_after` ended the run, and everything is saved.
        TrainingError: The run cannot go on.
    """
    folder = Path(config.output_dir).expanduser()
    this_run: Run | None = None
    device = distributed.start(config.device, step_seconds=config.hang_timeout)
    start_logging(distributed.get_rank())
    whereabouts.start()
    try:
        if config.dry_run:
            return dry_run(config, device)
        with contextlib.ExitStack() as held:
            assemble.together(lambda: _take(folder, held))
            this_run = assemble.together(lambda: Run(config, folder, device, stop))
            with naming_the_cause():
                return this_run.execute()
    except BaseException as error:
        whereabouts.tell_failure(f"{type(error).__name__}: {error}")
        if this_run is not None and not isinstance(error, KeyboardInterrupt):
            _end_saving(this_run)
        if distributed.is_main() and not isinstance(error, Stopped):
            step = this_run.progress.step if this_run else 0
            last = folder / LAST_NAME
            # A refused start says nothing about the run that the folder holds.
            holds_other = this_run is None and last.exists()
            with contextlib.suppress(OSError):  # the full disk, say, that ended the run
                write_status(
                    None if holds_other else folder,
                    state="failed",
                    step=step,
                    exit_code=exit_code(error),
                    reason=str(error) or type(error).__name__,
                    last_checkpoint=str(last) if last.exists() else None,
                )
        raise
    finally:
        if this_run is not None:
            this_run.log.close()
        whereabouts.stop()
        distributed.shutdown()


def _end_saving(this_run: Run) -> None:
    try:
        this_run.checkpointer.wait()
    except Exception:  # the run ends of something else already
        LOGGER.exception("the last state was not saved")


def _take(folder: Path, held: contextlib.ExitStack) -> None:
    make_writable(folder)
    if distributed.is_main():
        held.enter_context(sole_use(folder))


@contextlib.contextmanager
def naming_the_cause() -> Iterator[None]:
    """Says which process or which sample is behind an error that PyTorch words in its own way.

    Raises:
        TrainingError: In the place of such an error.
    """
    try:
        yield
    except TrainingError:  # says it already, in words that may hold any path
        raise
    except RuntimeError as error:
        where = whereabouts.here()
        if whereabouts.is_collective_failure(error):
            cause = whereabouts.who_is_missing()
            raise TrainingError(f"{cause} (This process was at {where}.)") from error
        if "DataLoader" in str(error):
            first = str(error).splitlines()[0].rstrip(". ")
            raise TrainingError(
                f"{first}, at {where}; its workers were at {whereabouts.being_loaded()}."
            ) from error
        raise
