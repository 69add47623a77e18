"""A command of samft that is killed at a chosen write, or tells how many there were.

    watched_command.py MODULE ARGUMENTS...

`SAMFT_TEST_KILL_AT` is the number, from 1, of the call that changes the disk while embeddings are
cached, at which the process kills itself: a write is half done then, any other call not begun.
`SAMFT_TEST_REPORT` names a file for the number of such calls and the peak of memory, in kB.
"""

import importlib
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from samft.cli import run_command
from samft.embeddings.precompute import EncodingPass
from samft.recipes.embedding_cache import EmbeddingCache

_WRITES = "mkdir open fsync rename replace rmdir unlink utime truncate pwrite".split()


def _watch_writes(kill_at: int, calls: list[str]) -> None:
    for method in ("open", "fill"):
        _watch_method(method, kill_at=kill_at, calls=calls)
    # Each image is a round, with records of its own.
    EncodingPass.__init__.__kwdefaults__["sync_seconds"] = 0.0


def _watch_method(method: str, *, kill_at: int, calls: list[str]) -> None:
    stock_method = getattr(EmbeddingCache, method)

    def watched(*args: Any, **options: Any) -> Any:
        stock = {name: getattr(os, name) for name in _WRITES}
        for name in _WRITES:
            setattr(os, name, _watched(name, stock[name], calls=calls, kill_at=kill_at))
        try:
            return stock_method(*args, **options)
        finally:
            for name in _WRITES:
                setattr(os, name, stock[name])

    setattr(EmbeddingCache, method, watched)


def _watched(
    name: str, stock: Callable[..., Any], *, calls: list[str], kill_at: int
) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        if name == "open" and not args[1] & (os.O_WRONLY | os.O_RDWR):
            return stock(*args, **options)
        calls.append(name)
        if len(calls) == kill_at:
            if name == "pwrite":
                file, content, offset = args
                stock(file, content[: len(content) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return stock(*args, **options)

    return call


if __name__ == "__main__":
    calls: list[str] = []
    _watch_writes(int(os.environ.get("SAMFT_TEST_KILL_AT", "0")), calls)
    module = importlib.import_module(sys.argv[1])
    sys.argv = sys.argv[1:]
    code = run_command(module.main, sys.argv[1:])
    if report := os.environ.get("SAMFT_TEST_REPORT"):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        Path(report).write_text(json.dumps({"calls": calls, "peak": peak}))
    sys.exit(code)
