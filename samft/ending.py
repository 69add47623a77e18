"""The end of a process, also where something in it waits for ever for other processes."""

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

END_SECONDS = 3.0  # for what has to be ended before the process is

_ENDINGS: list[threading.Thread] = []


def end_in_background(end: Callable[[], object], *, wait: bool = False) -> None:
    """Ends something in a thread, as it may wait for other processes and never return.

    Args:
        end: Called in the thread, which `end_process` gives `END_SECONDS`.
        wait: Whether to wait as long here.
    """
    thread = threading.Thread(target=end, name="ending", daemon=True)
    thread.start()
    _ENDINGS.append(thread)
    if wait:
        thread.join(END_SECONDS)


def wait_for_endings() -> bool:
    """Waits up to `END_SECONDS` for what is being ended; returns whether all of it has been."""
    deadline = time.monotonic() + END_SECONDS
    for thread in _ENDINGS:
        thread.join(max(0.0, deadline - time.monotonic()))
    return not any(thread.is_alive() for thread in _ENDINGS)


def end_process(code: int) -> NoReturn:
    """Ends this process.

    Args:
        code: Its exit code.
    """
    if not wait_for_endings():
        # Not by the way of the interpreter, which calls destructors that wait for the same.
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # a full disk, or closed
                stream.flush()
        os._exit(code)
    sys.exit(code)
