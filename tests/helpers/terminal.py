"""A terminal of any width, which remembers what is written to it."""

import fcntl
import os
import pty
import struct
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

_MARK = "-- end --"


class Terminal:
    """What a program writes to, and what a person sees.

    Attributes:
        stream: To write to.
    """

    def __init__(self, stream: TextIO, screen: int) -> None:
        self.stream, self._screen = stream, screen

    def lines(self) -> list[str]:
        """What was written since the last call; at most a few thousand characters."""
        # It arrives a little later than it is written, so what comes last is waited for.
        print(_MARK, file=self.stream, flush=True)
        shown = b""
        while _MARK.encode() not in shown:
            shown += os.read(self._screen, 1 << 16)
        return shown.decode().split(_MARK)[0].splitlines()


@contextmanager
def terminal(columns: int) -> Iterator[Terminal]:
    """Opens a terminal that is so many columns wide."""
    screen, program = pty.openpty()
    fcntl.ioctl(program, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    try:
        with os.fdopen(program, "w") as stream:
            yield Terminal(stream, screen)
    finally:
        os.close(screen)
