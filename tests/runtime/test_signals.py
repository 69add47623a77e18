"""Signals: when they wait for the end of a step, when they end a wait, and who dies of whom."""

import ctypes
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from samft.errors import ConfigError, UserError
from samft.runtime.signals import (
    POLL_SECONDS,
    STOP_SIGNALS,
    StopInterrupt,
    StopRequest,
    call_interruptibly,
    check_launch_environment,
    check_wait,
    job_deadline,
    stop_on_signal,
)

WAIT_SECONDS = 30.0  # what no signal may take, however busy the machine is


def send_signal(number: signal.Signals) -> None:
    """A real signal to this process, handled before this returns."""
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_recorded_and_interrupts_no_step(number: signal.Signals) -> None:
    with stop_on_signal() as stop:
        assert not stop
        send_signal(number)
        assert stop and stop.received == [number.name]


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_ends_a_wait_at_once(number: signal.Signals) -> None:
    released = threading.Event()
    with stop_on_signal() as stop:
        start = time.monotonic()
        timer = threading.Timer(0.05, send_signal, [number])
        with pytest.raises(StopInterrupt), stop.waiting():
            timer.start()
            call_interruptibly(lambda: released.wait(WAIT_SECONDS))
        timer.join()
        assert time.monotonic() - start < WAIT_SECONDS / 2
        assert stop.received == [number.name]
        assert call_interruptibly(lambda: 3) == 3  # by another thread: the first still waits
    released.set()


def test_a_signal_ends_a_wait_however_late_its_handler_ends() -> None:
    released = threading.Event()
    with stop_on_signal() as stop:

        def handle_late(number: int, frame: Any) -> None:
            end = time.monotonic() + 2 * POLL_SECONDS  # as where others have the processor
            while time.monotonic() < end:
                pass
            stop.record_signal(number)

        signal.signal(signal.SIGTERM, handle_late)
        timer = threading.Timer(POLL_SECONDS / 2, send_signal, [signal.SIGTERM])
        with pytest.raises(StopInterrupt), stop.waiting():
            timer.start()
            call_interruptibly(lambda: released.wait(WAIT_SECONDS))
        timer.join()
        assert stop.received == ["SIGTERM"]
    released.set()


def test_a_handler_raises_nothing_whatever_it_interrupts() -> None:
    lock = threading.Lock()
    with stop_on_signal() as stop, pytest.raises(StopInterrupt), stop.waiting():
        with lock:
            for number in STOP_SIGNALS:
                if number != signal.SIGINT:
                    send_signal(number)
        assert stop.received == ["SIGTERM", "SIGUSR1", "SIGUSR2"]
        check_wait()
    assert not lock.locked()
    check_wait()  # outside of such a block, nothing is raised


def test_calls_give_what_they_return_and_raise() -> None:
    def fail() -> None:
        raise KeyError("here")

    threads = set()
    with stop_on_signal() as stop, stop.waiting():
        for number in range(3):
            assert call_interruptibly(lambda number=number: number) == number  # type: ignore[misc]
            threads.add(call_interruptibly(threading.get_ident))
        with pytest.raises(KeyError, match="here"):
            call_interruptibly(fail)
    assert len(threads) == 1 and threads != {threading.get_ident()}
    assert call_interruptibly(threading.get_ident) == threading.get_ident()


def test_a_second_ctrl_c_ends_the_process_of_a_command() -> None:
    ended = []
    with stop_on_signal(lambda: ended.append(True)) as stop:
        send_signal(signal.SIGTERM)
        assert not ended
        send_signal(signal.SIGINT)
        assert ended and stop.received[0] == "SIGTERM"


def test_a_handler_that_python_does_not_know_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    libc = ctypes.CDLL(None)

    def handler_of(number: signal.Signals) -> bytes:
        action = ctypes.create_string_buffer(1024)
        libc.sigaction(int(number), None, action)
        return action.raw[: ctypes.sizeof(ctypes.c_void_p)]

    known = signal.signal(signal.SIGUSR2, signal.SIG_DFL)
    before = handler_of(signal.SIGUSR2)
    stock = signal.getsignal
    monkeypatch.setattr(
        signal, "getsignal", lambda number: None if number == signal.SIGUSR2 else stock(number)
    )
    try:
        with stop_on_signal() as stop:
            send_signal(signal.SIGUSR2)
            assert stop.received == ["SIGUSR2"]
            assert handler_of(signal.SIGUSR2) != before
        assert handler_of(signal.SIGUSR2) == before
    finally:
        signal.signal(signal.SIGUSR2, known)


GROUP = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"RANK": "0"}, "RANK is set, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set, but not RANK"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK is set, but not RANK"),
        ({**GROUP, "MASTER_ADDR": ""}, "not MASTER_ADDR"),
        ({**GROUP, "RANK": "2"}, "RANK=2 with WORLD_SIZE=2"),
        ({**GROUP, "RANK": "-1"}, "RANK='-1'"),
        ({**GROUP, "LOCAL_RANK": "first"}, "LOCAL_RANK='first'"),
        ({**GROUP, "WORLD_SIZE": "9" * 5000}, "WORLD_SIZE="),
        ({**GROUP, "MASTER_PORT": "70000"}, "MASTER_PORT='70000'"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
        ({"TORCHELASTIC_RESTART_COUNT": "x"}, "TORCHELASTIC_RESTART_COUNT='x'"),
    ],
)
def test_an_environment_of_half_a_group_is_refused(
    environment: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*GROUP, "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    check_launch_environment()
    for good in (GROUP, {"WORLD_SIZE": "1"}, {"MASTER_ADDR": "host"}):
        with monkeypatch.context() as patch:
            for name, value in good.items():
                patch.setenv(name, value)
            check_launch_environment()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=re.escape(named)):
        check_launch_environment()


def test_a_wait_does_not_begin_after_a_signal() -> None:
    entered = []
    with stop_on_signal() as stop:
        send_signal(signal.SIGUSR1)
        with pytest.raises(StopInterrupt), stop.waiting():
            entered.append(True)
        assert entered == []
        send_signal(signal.SIGUSR2)
        assert stop.received == ["SIGUSR1", "SIGUSR2"]


def test_after_a_wait_that_failed_signals_are_only_recorded() -> None:
    with stop_on_signal() as stop:
        with pytest.raises(KeyError), stop.waiting():
            raise KeyError
        send_signal(signal.SIGTERM)
        assert stop.received == ["SIGTERM"]


def test_a_second_ctrl_c_is_the_callers_own() -> None:
    with stop_on_signal() as stop:
        send_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send_signal(signal.SIGINT)
        assert stop.received == ["SIGINT"]
        send_signal(signal.SIGTERM)  # other signals are recorded however often they come
        send_signal(signal.SIGTERM)


def test_handlers_are_restored_however_it_ends() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    for error in (None, KeyError):
        with pytest.raises(KeyError), stop_on_signal() as stop:
            assert [signal.getsignal(number) for number in STOP_SIGNALS] == [stop.record_signal] * 4
            raise error or KeyError
        assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_outside_of_the_main_thread_there_are_no_handlers() -> None:
    before, states = signal.getsignal(signal.SIGTERM), []

    def run() -> None:
        with stop_on_signal() as stop:
            states.append((bool(stop), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert states == [(False, before)]


def test_a_stop_reason_that_is_no_signal_counts() -> None:
    stop = StopRequest()
    stop.received.append("the job's time limit")
    with pytest.raises(StopInterrupt), stop.waiting():
        raise AssertionError("the wait was begun")


def test_the_deadline_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1800000000")
    assert job_deadline(120) == 1799999880
    assert job_deadline(0) == 1800000000
    assert job_deadline(None) == math.inf


@pytest.mark.parametrize("value", [None, "", "tomorrow", "-1"])
def test_a_job_whose_end_is_not_known_is_refused(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    if value is not None:
        monkeypatch.setenv("SLURM_JOB_END_TIME", value)
    assert job_deadline(None) == math.inf
    with pytest.raises(ConfigError, match="save_before_limit: there is no SLURM_JOB_END_TIME"):
        job_deadline(60)


CHILD = """
import sys, time
from samft.runtime.signals import die_with_parent
if sys.argv[1] == "bound":
    die_with_parent()
print("ready", flush=True)
time.sleep(600)
"""
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
@pytest.mark.parametrize("kind", ["bound", "free"])
def test_a_process_bound_to_its_parent_dies_with_it(kind: str) -> None:
    command: Any = [sys.executable, "-c", PARENT, CHILD, kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        grandchild = int(parent.stdout.readline())  # type: ignore[union-attr]
        assert is_alive(grandchild)
        parent.kill()
    try:
        deadline = time.monotonic() + (WAIT_SECONDS if kind == "bound" else 0.2)
        while is_alive(grandchild) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert is_alive(grandchild) == (kind == "free")
    finally:
        if is_alive(grandchild):
            os.kill(grandchild, signal.SIGKILL)
