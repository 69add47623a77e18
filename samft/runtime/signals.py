"""Signals that ask a run to stop, the time limit of its job, and dying with the parent process.

A handler only records the signal: an exception out of it would come up in any line of any library,
one that holds a lock, say. The training loop asks for it between steps. Code that may wait for long
(for a loader's batch, say) asks several times a second, and raises `StopInterrupt` by itself.
"""

import ctypes
import math
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from samft.errors import ConfigError, UserError

T = TypeVar("T")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
POLL_SECONDS = 0.1  # between two looks for a signal in a wait
_PR_SET_PDEATHSIG, _PR_GET_PDEATHSIG = 1, 2  # Source: linux/prctl.h
_SIGACTION_BYTES = 1024  # more than `struct sigaction` takes anywhere


class StopInterrupt(Exception):
    """Raised out of a wait after a stop signal, or because all ranks have agreed to stop."""


# Whether to stop, in a block that may be interrupted; only `check_wait` looks at it.
_SHOULD_STOP: ContextVar[Callable[[], bool] | None] = ContextVar("should_stop", default=None)


@contextmanager
def interruptible(should_stop: Callable[[], bool]) -> Iterator[None]:
    """Marks a block whose waits end when the process is to stop.

    Args:
        should_stop: Asked several times a second.

    Raises:
        StopInterrupt: From a wait in the block, or at once.
    """
    token = _SHOULD_STOP.set(should_stop)
    try:
        check_wait()
        yield
    finally:
        _SHOULD_STOP.reset(token)


def check_wait() -> None:
    """To be called again and again by what waits.

    Raises:
        StopInterrupt: In an `interruptible` block, if the process is to stop.
    """
    should_stop = _SHOULD_STOP.get()
    if should_stop is not None and should_stop():
        raise StopInterrupt


def call_interruptibly(call: Callable[[], T]) -> T:
    """Calls a function that may not return for long, such as a read from a disk far away.

    In an `interruptible` block it is called in a thread, which is left to itself after a stop.

    Args:
        call: The function.

    Returns:
        What it returns.

    Raises:
        StopInterrupt: The process is to stop.
        BaseException: What the function raises.
    """
    if _SHOULD_STOP.get() is None:
        return call()
    answer = _HELPER.start(call)
    while True:
        check_wait()
        try:
            result, error = answer.get(timeout=POLL_SECONDS)
        except queue.Empty:
            continue
        _HELPER.is_busy = False
        if error is not None:
            raise error
        return result


class _Helper:
    # A thread that stays, as OpenMP has threads of its own for each that calls it.
    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._process, self.is_busy = 0, True

    def start(self, call: Callable[[], Any]) -> "queue.Queue[Any]":
        """Calls a function in the thread; the queue gets what it returns, and its error or None."""
        if self.is_busy or self._process != os.getpid():  # no thread survives a fork
            self._calls, self._process = queue.SimpleQueue(), os.getpid()
            threading.Thread(
                target=_answer_calls, args=(self._calls,), name="loading", daemon=True
            ).start()
        self.is_busy = True
        # Not a SimpleQueue, whose `get` waits forever, not until its timeout, where a signal comes
        # within it and the handler ends after it, as on a busy host (seen with Python 3.11).
        answer: queue.Queue[Any] = queue.Queue()
        self._calls.put((call, answer))
        return answer

    def stop(self) -> None:
        """Ends the thread, unless it is in a call that may never return."""
        if not self.is_busy and self._process == os.getpid():
            self._calls.put(None)
            self._process = 0


_HELPER = _Helper()


def end_helper_thread() -> None:
    """Ends the thread of `call_interruptibly`; the next call starts another."""
    _HELPER.stop()


def _answer_calls(calls: "queue.SimpleQueue[Any]") -> None:
    while (pair := calls.get()) is not None:
        call, answer = pair
        try:
            answer.put((call(), None))
        except BaseException as error:  # raised again by `call_interruptibly`
            answer.put((None, error))
        del pair, call, answer


class StopRequest:
    """Whether a signal has asked the run to stop; true if so.

    Attributes:
        received: The names of the signals received so far.
    """

    def __init__(self, on_interrupt: Callable[[], None] | None = None) -> None:
        """Prepares handlers.

        Args:
            on_interrupt: Called for a SIGINT after any signal; ends the process. None: the handler
                that was there before gets it, Python's own say, which raises KeyboardInterrupt.
        """
        self.received: list[str] = []
        self._first = math.inf
        self._on_interrupt = on_interrupt
        self._previous: dict[signal.Signals, Any] = {}

    def __bool__(self) -> bool:
        return bool(self.received)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Marks a block whose waits a stop signal ends: see `interruptible`."""
        with interruptible(self.__bool__):
            yield

    def record_signal(self, number: int, frame: Any = None) -> None:
        """The signal handler, which raises nothing."""
        if number == signal.SIGINT and self.received and self._on_interrupt:
            self._on_interrupt()
        if self._on_interrupt is None and signal.SIGINT in self._previous:
            _restore_handler(signal.SIGINT, self._previous.pop(signal.SIGINT))
        self._first = min(self._first, time.monotonic())
        self.received.append(signal.Signals(number).name)

    def age(self) -> float:
        """Seconds since the first signal; negative without one."""
        return time.monotonic() - self._first

    def install(self) -> None:
        """Installs the handlers; not outside of the main thread, where Python allows none."""
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                previous = signal.getsignal(number)  # SIG_DFL is false
                self._previous[number] = _read_action(number) if previous is None else previous
                signal.signal(number, self.record_signal)

    def restore(self) -> None:
        """Installs the handlers again that were there before."""
        while self._previous:
            _restore_handler(*self._previous.popitem())


def _read_action(number: signal.Signals) -> "ctypes.Array[ctypes.c_char]":
    # A handler that was not installed from Python, of a program around it, say.
    action = ctypes.create_string_buffer(_SIGACTION_BYTES)
    ctypes.CDLL(None, use_errno=True).sigaction(int(number), None, action)
    return action


def _restore_handler(number: signal.Signals, previous: Any) -> None:
    if isinstance(previous, ctypes.Array):
        ctypes.CDLL(None, use_errno=True).sigaction(int(number), previous, None)
    else:
        signal.signal(number, previous)


@contextmanager
def stop_on_signal(on_interrupt: Callable[[], None] | None = None) -> Iterator[StopRequest]:
    """Installs handlers that record stop signals; restores the previous ones at the end.

    Args:
        on_interrupt: See `StopRequest`.

    Yields:
        The request, which becomes true with the first signal.
    """
    request = StopRequest(on_interrupt)
    request.install()
    try:
        yield request
    finally:
        request.restore()


# By variable: the lowest and the highest number. `torchrun` sets them all.
_LAUNCH_NUMBERS = {
    "RANK": (0, 2**31),
    "WORLD_SIZE": (1, 2**31),
    "LOCAL_RANK": (0, 2**31),
    "LOCAL_WORLD_SIZE": (1, 2**31),
    "MASTER_PORT": (1, 65535),
    "TORCHELASTIC_RESTART_COUNT": (0, 2**31),
}
_NEEDED_IN_A_GROUP = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def check_launch_environment() -> None:
    """Checks the variables by which processes of a group find each other, before torch reads them.

    Raises:
        UserError: Some are set and others are not, or one has a value that it cannot have.
    """
    given = {name: os.environ[name] for name in _LAUNCH_NUMBERS if name in os.environ}
    is_group = "RANK" in given or "LOCAL_RANK" in given or given.get("WORLD_SIZE", "1") != "1"
    missing = [name for name in _NEEDED_IN_A_GROUP if is_group and not os.environ.get(name)]
    wrong = [
        f"{name}={text!r}"
        for name, text in given.items()
        if not (text.isascii() and text.isdigit() and len(text) < 11)
        or not _LAUNCH_NUMBERS[name][0] <= int(text) <= _LAUNCH_NUMBERS[name][1]
    ]
    if not wrong and not missing and is_group and int(given["RANK"]) >= int(given["WORLD_SIZE"]):
        wrong = [f"RANK={given['RANK']} with WORLD_SIZE={given['WORLD_SIZE']}"]
    if not wrong and not missing:
        return
    complaints = [f"{', '.join(wrong)} cannot be"] if wrong else []
    if missing:
        partner = ", ".join(name for name in given if name != "MASTER_PORT")
        complaints.append(f"{partner} is set, but not {', '.join(missing)}")
    raise UserError(
        f"the environment is not that of a process of torchrun: {'; '.join(complaints)}. Start "
        "with torchrun or launch.sh, which set these variables, or unset them for a single process."
    )


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


@contextmanager
def dying_with_parent() -> Iterator[None]:
    """Within, `die_with_parent` holds for a process of `torchrun`; then what held before."""
    if sys.platform != "linux" or "RANK" not in os.environ:
        yield
        return
    libc, before = ctypes.CDLL(None, use_errno=True), ctypes.c_int()
    libc.prctl(_PR_GET_PDEATHSIG, ctypes.byref(before))
    die_with_parent()
    try:
        yield
    finally:
        libc.prctl(_PR_SET_PDEATHSIG, before.value)


def die_with_parent() -> None:
    """Has the kernel kill this process when its parent process ends, however that ends.

    Otherwise ranks survive a killed launcher, and loader workers a killed rank. Linux only.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
