"""Which rank is named when one fails or hangs, in groups that use a store as under torchrun."""

import os
import signal
import time
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from helpers.gloo_pool import GlooPool
from samft import distributed
from samft.errors import DataError, TrainingError
from samft.runtime import heartbeat
from samft.runtime.heartbeat import explain_distributed_errors

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


GLOO_GONE = "[.../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:12345"
NCCL_LATE = "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1) timed out"


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (RuntimeError(GLOO_GONE), True),
        (RuntimeError(NCCL_LATE), True),
        (RuntimeError("writev: Broken pipe"), True),
        (RuntimeError("read: Connection reset by peer"), True),
        (dist.DistBackendError("timed out"), True),
        (dist.DistNetworkError("no route"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed."), False),
        (DataError("gloo/image.png cannot be read"), False),
        (KeyboardInterrupt("NCCL"), False),
    ],
)
def test_collective_failures_are_recognised(error: BaseException, is_one: bool) -> None:
    assert heartbeat.is_collective_failure(error) is is_one


def test_other_errors_and_explained_ones_are_left_alone() -> None:
    for error in (
        RuntimeError("a bug"),
        KeyError("a"),
        TrainingError("full: runs/gloo/DataLoader"),
    ):
        with pytest.raises(type(error)) as caught, explain_distributed_errors():
            raise error
        assert caught.value is error


def test_a_collective_failure_is_explained() -> None:
    heartbeat.set_step(3)
    with pytest.raises(TrainingError) as caught, explain_distributed_errors():
        raise RuntimeError(GLOO_GONE)
    message = "another process failed, or does not answer. (This process was at step 3, starting.)"
    assert str(caught.value) == message


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
    assert "peer" in cause  # gloo's own words
    first, second = message.split(" (This process was at ")[0].split("; ", 1)
    assert first == "process 1 failed at step 1, counting: ValueError: one and one is three"
    assert second.startswith("process 2 does not answer; ")
    assert second.endswith(" s ago, at step 2, it was counting.")
    assert message.endswith("(This process was at step 0, counting.)")
