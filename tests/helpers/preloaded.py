"""Commands in processes that are forked with torch imported, instead of started without.

`python -m samft.train` takes five seconds of a core to import its libraries, and under torchrun
every rank does, at every restart. Here a fork server imports them once. A command then begins in a
fork of it, as `__main__`, with its own arguments, environment, session and output; ranks are forked
by their torchrun. Process ids, parents, signals and exit codes are those of real processes. Tests
of what happens while libraries are imported, and of launch.sh, start real commands.
"""

import atexit
import contextlib
import ctypes
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PRELOADED = ["samft.train", "samft.recipes.train", "samft.recipes.evaluate"]
PRELOADED += ["torch.distributed.run", "torch.utils.tensorboard"]
PRELOADED += ["tensorboard.plugins.hparams.summary_v2"]


def preloading_context() -> Any:
    """Where processes come from: the server, which the first of them starts."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers.preloaded", *PRELOADED])
    return context


def use_default_start_method() -> None:
    """Has a process of the server start its own as any would: loaders' workers are its forks."""
    multiprocessing.set_start_method(None, force=True)  # type: ignore[arg-type]


class PreloadedCommand:
    """A command that runs in a fork of the server.

    Args:
        command: `sys.executable`, `-u` or not, then `-m` and a module or a script, then arguments.
        environment: All of it.
        output: The file that its standard output and error are appended to.
    """

    def __init__(
        self, command: Sequence[str], environment: dict[str, str], *, output: Path
    ) -> None:
        self.process = preloading_context().Process(
            target=_become, args=(list(command), environment, os.getcwd(), str(output))
        )
        self.process.start()
        self.output = output

    def wait(self, timeout: float) -> int:
        """Waits for its end; the exit code, or the negative number of the signal that ended it."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("preloaded", timeout, self.output.read_bytes())
        return self.process.exitcode

    def kill(self) -> None:
        """Ends it at once, if it still runs."""
        self.process.kill()
        self.process.join()


def run_preloaded(
    command: Sequence[str], environment: dict[str, str], *, timeout: float
) -> tuple[int, str]:
    """A command to its end: its exit code (negative: a signal), and what it wrote."""
    with tempfile.NamedTemporaryFile() as file:
        running = PreloadedCommand(command, environment, output=Path(file.name))
        try:
            code = running.wait(timeout)
        finally:
            running.kill()
        return code, Path(file.name).read_text(errors="replace")


def _become(command: list[str], environment: dict[str, str], folder: str, output: str) -> None:
    with open(output, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    _run_as_main(command)


def _run_as_main(command: list[str]) -> None:
    """Runs a Python command as the whole of this process, and never returns."""
    os.setsid()
    _set_command_line(command)
    use_default_start_method()
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    arguments = [argument for argument in command[1:] if argument != "-u"]
    code: Any = 0
    try:
        if arguments[0] == "-m":
            _run_module(arguments[1], arguments[2:])
        else:
            sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).parent)
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        os.kill(os.getpid(), signal.SIGKILL)
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    # What was inherited from torchrun, its store say, is not to be torn down twice.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def _run_module(name: str, argv: list[str]) -> None:
    if name == "torch.distributed.run":
        from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

        subprocess_handler.SubprocessHandler._popen = _fork_rank  # type: ignore[method-assign]
    sys.argv, sys.path[0] = [name, *argv], os.getcwd()
    with warnings.catch_warnings():
        # Its imports have it in sys.modules; as `__main__` it is run once more, all the same.
        warnings.filterwarnings("ignore", message=".*found in sys.modules")
        runpy.run_module(name, run_name="__main__", alter_sys=True)


class _Rank:
    """What torchrun needs of `subprocess.Popen`, for a fork of itself."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.args, self.returncode = command, None
        self.pid = os.fork()
        if self.pid == 0:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGUSR1, signal.SIG_DFL)
            signal.signal(signal.SIGUSR2, signal.SIG_DFL)
            os.environ.clear()
            os.environ.update(environment)
            _run_as_main(command)

    def poll(self) -> int | None:
        if self.returncode is None:
            with contextlib.suppress(ChildProcessError):
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            time.sleep(0.02)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def _fork_rank(handler: Any, args: tuple[str, ...], env: dict[str, str]) -> _Rank:
    assert handler._stdout is None and handler._stderr is None, "ranks write to torchrun's output"
    return _Rank(list(args), env)


def _set_command_line(command: list[str]) -> None:
    """Lets /proc show this command: tests find processes by the folder in their command line."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # arg_start, arg_end: 48 and 49 of all
    text = b"\0".join(word.encode() for word in command)[: end - start - 1]
    ctypes.memmove(start, text + b"\0" * (end - start - len(text)), end - start)
