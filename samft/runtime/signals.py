"""Signals that ask a run to stop, the time limit of its job, and dying with the parent process.

A handler only records the signal. The training loop checks for it between steps, and code that may
wait for long (for a loader's batch, say) is interrupted.
"""

import ctypes
import math
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from samft.errors import ConfigError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1  # Source: linux/prctl.h


class StopInterrupt(Exception):
    """Raised out of a wait by a stop signal, or because all ranks have agreed to stop."""


class StopRequest:
    """Whether a signal has asked the run to stop; true if so.

    Attributes:
        received: The names of the signals received so far.
    """

    def __init__(self) -> None:
        self.received: list[str] = []
        self._waiting = False

    def __bool__(self) -> bool:
        return bool(self.received)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Marks a block that a stop signal may interrupt anywhere: a wait for a loader's batch.

        Raises:
            StopInterrupt: As soon as a signal asks to stop, or at once if one did before.
        """
        self._waiting = True
        try:
            # Only now: a signal that comes before this line is seen here, one that comes after it
            # interrupts the block.
            if self.received:
                raise StopInterrupt
            yield
        finally:
            self._waiting = False

    def record_signal(self, number: int, frame: Any = None) -> None:
        """The signal handler. A second SIGINT raises KeyboardInterrupt at once."""
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received.append(signal.Signals(number).name)
        if self._waiting:
            self._waiting = False  # what cleans up after the wait is not interrupted again
            raise StopInterrupt


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Installs handlers that record stop signals; restores the previous ones at the end.

    Yields:
        The request, which becomes true with the first signal.
    """
    request = StopRequest()
    try:
        previous = {number: signal.signal(number, request.record_signal) for number in STOP_SIGNALS}
    except ValueError:  # not the main thread, where Python allows no handlers
        previous = {}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def job_deadline(save_before_limit: float | None) -> float:
    """The time at which to stop before the time limit of a SLURM job.

    Args:
        save_before_limit: How long before the limit, in seconds; None: run into it.

    Returns:
        In seconds since 1970; infinite for None.

    Raises:
        ConfigError: The time limit of the job is not known.
    """
    if save_before_limit is None:
        return math.inf
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    if not end.isdigit():
        raise ConfigError(
            "save_before_limit: there is no SLURM_JOB_END_TIME in the environment, so the job's "
            "time limit is not known."
        )
    return int(end) - save_before_limit


def die_with_parent() -> None:
    """Has the kernel kill this process when its parent process ends, however that ends.

    Otherwise ranks survive a killed launcher, and loader workers a killed rank. Linux only.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
