"""Signals that ask a run to stop; the loop looks between steps."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


@contextmanager
def stop_on_signal() -> Iterator[list[str]]:
    """Notes signals instead of dying of them; a second SIGINT interrupts at once.

    Yields:
        The names of the signals received so far.
    """
    received: list[str] = []

    def note(number: int, frame: Any) -> None:
        if number == signal.SIGINT and received:
            raise KeyboardInterrupt
        received.append(signal.Signals(number).name)

    try:
        before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    except ValueError:  # not the main thread, where Python allows no handlers
        before = {}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
