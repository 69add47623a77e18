"""Which rank is named when one fails or hangs, in groups that use a store as under torchrun."""

import json
import os
import signal
import subprocess
import threading
import time
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from helpers.gloo_pool import GlooPool
from samft import distributed
from samft.checkpoints.async_saver import BackgroundWriter
from samft.errors import CollectiveError, TrainingError
from samft.runtime import heartbeat
from samft.runtime.heartbeat import explain_distributed_errors
from samft.runtime.output_dir import write_status
from samft.runtime.signals import StopRequest

ANSWER_SECONDS = 240.0  # three processes import torch, maybe on one busy core


def start_store() -> dist.TCPStore:
    """The store of a group on a free port, in this process as in torchrun's agent."""
    return dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
    )


@pytest.fixture(autouse=True)
def _own_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "_HEARTBEAT", heartbeat._Heartbeat())


# One process


def test_the_position_is_the_step_and_the_activity() -> None:
    assert heartbeat.describe_position() == "step 0, starting"
    heartbeat.set_step(7)
    heartbeat.set_activity("saving")
    assert heartbeat.describe_position() == "step 7, saving"


def test_images_are_listed_for_a_message_only_and_at_most_eight() -> None:
    named: list[Any] = []
    heartbeat.set_activity("loading images", lambda: named)
    assert heartbeat.describe_position() == "step 0, loading images"
    named += [f"{n}.png" for n in range(8)]
    eight = "0.png, 1.png, 2.png, 3.png, 4.png, 5.png, 6.png, 7.png"
    assert heartbeat.describe_position() == f"step 0, loading images {eight}"
    named.append("8.png")
    assert heartbeat.describe_position() == f"step 0, loading images {eight}, ..."


def test_a_single_process_names_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    heartbeat.start_posting()
    heartbeat.report_failure("nobody reads it")
    assert heartbeat.find_failed_ranks() == "another process failed, or does not answer."
    heartbeat.stop_posting()


def test_other_errors_and_explained_ones_are_left_alone() -> None:
    for error in (
        RuntimeError("a bug in gloo, NCCL or elsewhere: Connection closed by peer"),
        KeyError("a"),
        TrainingError("full: runs/gloo/DataLoader"),
    ):
        with pytest.raises(type(error)) as caught, explain_distributed_errors():
            raise error
        assert caught.value is error


@pytest.mark.parametrize(
    "error",
    [
        CollectiveError("Application timeout caused pair closure"),
        dist.DistBackendError("timed out"),
        dist.DistNetworkError("no route"),
        dist.DistStoreError("gone"),
    ],
)
def test_a_failed_collective_is_explained_whatever_its_words(error: RuntimeError) -> None:
    heartbeat.set_step(3)
    with pytest.raises(TrainingError) as caught, explain_distributed_errors():
        raise error
    message = "another process failed, or does not answer. (This process was at step 3, starting.)"
    assert str(caught.value) == message and caught.value.__cause__ is error


# What a wait for others looks for, and what ends a process that does not look


@pytest.fixture
def beating(monkeypatch: pytest.MonkeyPatch) -> heartbeat._Heartbeat:
    """Of rank 0 of 2, with a store of its own and no thread."""
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    heartbeat._HEARTBEAT.store = dist.HashStore()
    return heartbeat._HEARTBEAT


class Clock:
    """`time` for heartbeats."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(heartbeat.time, "monotonic", lambda: self.now)


def test_a_wait_ends_one_look_after_a_failure_was_seen(
    beating: heartbeat._Heartbeat, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    beating.check_wait(5.0)
    assert beating.store is not None
    beating.store.set("failure", "")
    beating.check_wait(5.1)  # a second has not passed since the last look
    clock.now += 1
    beating.check_wait(6.0)  # seen, but what ends all may be about to arrive
    clock.now += 1
    beating.check_wait(0.5)  # a wait that has just begun may be about to end
    with pytest.raises(CollectiveError, match="another process failed"):
        beating.check_wait(7.0)


def test_a_wait_after_a_signal_ends_before_the_launcher_kills(
    beating: heartbeat._Heartbeat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")
    clock, stop = Clock(monkeypatch), StopRequest()
    beating._request = stop
    beating.check_wait(1000.0)  # no signal: nothing ends it but the timeout of the collective
    stop.record_signal(signal.SIGTERM)
    clock.now += 111
    beating.check_wait(1111.0)
    clock.now += 2
    with pytest.raises(CollectiveError, match="stopped by SIGTERM while other processes"):
        beating.check_wait(1113.0)


def test_a_failure_is_posted_for_waits_to_see(beating: heartbeat._Heartbeat) -> None:
    assert beating.store is not None and beating.expects_posts()
    heartbeat.report_failure("ValueError: a\nb")
    assert beating.store.check(["failure"])
    record = beating.read("end", 0)
    assert record is not None and record["failed"] == "ValueError: a"
    beating.store.set("end/1", "{}")
    assert not beating.expects_posts()


class Exited(Exception):
    """Instead of the end of the process."""


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> None:
    def exit_with(code: int) -> None:
        raise Exited(code)

    monkeypatch.setattr(os, "_exit", exit_with)


@pytest.mark.usefixtures("exits")
def test_a_process_that_does_not_notice_is_ended_with_its_words(
    beating: heartbeat._Heartbeat,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SAMFT_STATUS_FILE", str(tmp_path / "status.json"))
    write_status(tmp_path, state="running", step=4, last_checkpoint="a.ckpt")
    heartbeat.set_step(7)
    assert beating.store is not None
    failed = {"step": 5, "doing": "saving", "failed": "ValueError: no"}
    beating.store.set("end/1", json.dumps(failed))
    with pytest.raises(Exited, match="1"):
        beating._end_unless_ending()
    sentence = (
        "process 1 failed at step 5, saving: ValueError: no. (This process did not notice, at "
        "step 7, starting.)"
    )
    assert capsys.readouterr().err == f"error: {sentence}\n"
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["step"]) == ("failed", 1, 4)
    assert (status["reason"], status["last_checkpoint"]) == (sentence, "a.ckpt")


@pytest.mark.usefixtures("exits")
def test_a_process_that_knows_or_saves_is_not_ended(beating: heartbeat._Heartbeat) -> None:
    writes, written = BackgroundWriter(), threading.Event()
    writes.start(lambda: assert_set(written))
    beating._end_unless_ending()
    written.set()
    writes.wait()
    with pytest.raises(Exited):
        beating._end_unless_ending()
    heartbeat.report_failure("ValueError: no")
    beating._end_unless_ending()


def assert_set(event: threading.Event) -> None:
    assert event.wait(60)


@pytest.mark.parametrize(
    ("node", "since", "parent", "is_killed"),
    [
        ("0", 100, "own", True),
        ("1", 100, "own", False),  # of another host, where the number means another process
        ("0", 1, "own", False),  # it may be computing
        ("0", 100, "another", False),  # not of this start
    ],
)
def test_a_hanging_process_of_this_host_is_killed(
    beating: heartbeat._Heartbeat,
    monkeypatch: pytest.MonkeyPatch,
    node: str,
    since: float,
    parent: str,
    is_killed: bool,
) -> None:
    monkeypatch.setenv("GROUP_RANK", "0")
    monkeypatch.setattr(distributed, "step_seconds", lambda: 60.0)
    if parent == "own":
        monkeypatch.setattr(os, "getppid", os.getpid)  # as if this were the launcher's child too
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        record = {"step": 5, "doing": "training", "since": time.time() - since}
        record |= {"pid": process.pid, "node": node}
        assert beating.store is not None
        beating.store.set("activity/1", json.dumps(record))
        assert f"process 1 does not answer; {since} s ago" in heartbeat._name_ranks()
        if not is_killed:
            assert process.poll() is None
            assert process.stdin is not None
            process.stdin.close()
        assert process.wait(60) == (-signal.SIGKILL if is_killed else 0)


# Two ranks that stay alive


def two_ranks(port: int, kind: str) -> str:
    """What rank 0 says of rank 1, which has done what `kind` says."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    heartbeat._HEARTBEAT = heartbeat._Heartbeat()
    heartbeat._GIVE_UP_SECONDS = 0.05
    heartbeat.start_posting()
    assert heartbeat._HEARTBEAT.store is not None
    rank = distributed.get_rank()
    heartbeat.set_step(10 + rank)
    heartbeat.set_activity("loading images", lambda: ["a.png", "b.png"])
    if kind == "silent from the start":
        heartbeat.stop_posting()
    if rank == 1:
        if kind == "silent":
            heartbeat._HEARTBEAT.post("activity")
        elif kind == "failed":
            heartbeat.report_failure("DataError: a.png is broken\nsecond line")
        elif kind == "gave up":
            heartbeat.find_failed_ranks()
            heartbeat.report_failure("TrainingError: process 0 does not answer")
    distributed.barrier()
    if rank == 0 and kind == "silent from the start":
        heartbeat.start_posting()
    message = heartbeat.find_failed_ranks() if rank == 0 else ""
    distributed.barrier()
    heartbeat.stop_posting()
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    return message


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            "failed",
            "process 1 failed at step 11, loading images a.png, b.png: DataError: a.png is broken.",
        ),
        (
            "silent",
            "process 1 does not answer; 0 s ago, at step 11, it was loading images a.png, b.png.",
        ),
        ("silent from the start", "process 1 does not answer."),
        # A failure that is a reaction to another rank's is not reported.
        ("gave up", "a connection between processes broke."),
    ],
)
def test_the_other_process_is_named(gloo2: GlooPool, kind: str, expected: str) -> None:
    store = start_store()
    message = gloo2.run(two_ranks, store.port, kind)[0]
    assert message.replace("; 1 s ago", "; 0 s ago") == expected


# Three ranks, of which one dies and one hangs


def serve_rank(pipe: Connection, port: int, rank: int) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        WORLD_SIZE="3",
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    torch.set_num_threads(1)
    heartbeat._GIVE_UP_SECONDS = 0.2
    heartbeat._POST_SECONDS = 0.01
    distributed.start(torch.device("cpu"), step_seconds=30)
    heartbeat.start_posting()
    heartbeat.set_step(rank)
    heartbeat.set_activity("counting")
    while (heartbeat._HEARTBEAT.read("activity", rank) or {}).get("doing") != "counting":
        time.sleep(0.01)  # until the thread has posted it
    distributed.barrier()
    if rank == 1:
        heartbeat.report_failure("ValueError: one and one is three")
        pipe.send("failed")
        os._exit(1)
    if rank == 2:
        pipe.send("hangs")
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        with explain_distributed_errors():
            distributed.any_rank(False, in_step=True)
    except TrainingError as error:
        pipe.send((str(error), str(error.__cause__)))


def test_a_rank_that_failed_is_named_before_one_that_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context = torch.multiprocessing.get_context("spawn")
    store, pipes, processes = start_store(), [], []
    try:
        for rank in range(3):
            ours, theirs = context.Pipe()
            processes.append(context.Process(target=serve_rank, args=(theirs, store.port, rank)))
            processes[-1].start()
            theirs.close()
            pipes.append(ours)
        assert wait([pipes[0]], timeout=ANSWER_SECONDS)
        message, cause = pipes[0].recv()
        assert [pipes[1].recv(), pipes[2].recv()] == ["failed", "hangs"]
    finally:
        for process in processes:
            process.kill()
            process.join()
    # Gloo's own words; or rank 1's post, where the end of its process takes longer.
    assert "peer" in cause or cause == "another process failed"
    first, second = message.split(" (This process was at ")[0].split("; ", 1)
    assert first == "process 1 failed at step 1, counting: ValueError: one and one is three"
    assert second.startswith("process 2 does not answer; ")
    assert second.endswith(" s ago, at step 2, it was counting.")
    assert message.endswith("(This process was at step 0, counting.)")
