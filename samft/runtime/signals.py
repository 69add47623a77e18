"""Signals that ask a run to stop; the loop looks between steps and images, and in waits."""

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
    """A stop was asked for in a wait, or all ranks have agreed to stop."""


class StopRequest:
    """Whether a signal has asked to stop, and which.

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
        """Around a wait that may be long and may be broken off anywhere, as for a loader's batch.

        Raises:
            StopInterrupt: At once, when a signal asks to stop.
        """
        self._waiting = True
        try:
            if self.received:
                raise StopInterrupt
            yield
        finally:
            self._waiting = False

    def note(self, number: int, frame: Any = None) -> None:
        """The handler: remembers the signal. A second SIGINT interrupts at once."""
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received.append(signal.Signals(number).name)
        if self._waiting:
            self._waiting = False
            raise StopInterrupt


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Notes signals instead of dying of them.

    Yields:
        What to ask whether to stop.
    """
    request = StopRequest()
    try:
        before = {number: signal.signal(number, request.note) for number in STOP_SIGNALS}
    except ValueError:  # not the main thread, where Python allows no handlers
        before = {}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def job_deadline(save_before_limit: float | None) -> float:
    """When to stop before a SLURM job is ended, in seconds since 1970; without a limit, never.

    Args:
        save_before_limit: Seconds before its end.

    Raises:
        ConfigError: The job's end is not known.
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
    """Has the kernel kill this process when the one that started it is gone, however it ended.

    Otherwise ranks outlive a killed launcher, and loader workers a killed rank. Linux only.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
