"""What each process is doing, told to all, so that one that fails or hangs can be named.

A process only notes what it is about to do. A thread posts the last note to the store through
which the processes found each other, which outlives them under `torchrun`. When a collective fails,
each process that is still there posts that it gave up; who has not is the one to be named.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from samft import distributed
from samft.errors import TrainingError
from samft.runtime import heartbeat

_POST_SECONDS = 1.0
_GIVE_UP_SECONDS = 3.0  # all whose collective fails find that out within this
_MOST_NAMED = 8


class _Heartbeat:
    # The notes of all processes; without a store, only this one's.
    def __init__(self) -> None:
        self.store: dist.Store | None = None
        self.step, self.since = 0, time.time()
        self.doing: Callable[[], str] = lambda: "starting"
        self.loading: Callable[[], list[Any]] = list
        self.gave_up = False
        self._stop = threading.Event()

    def open(self) -> None:
        """Connects to the store and begins to post."""
        address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        if distributed.get_world_size() == 1 or not address or not port:
            return
        with contextlib.suppress(RuntimeError):  # no store of this kind: nobody is named then
            server = dist.TCPStore(
                address, int(port), is_master=False, timeout=timedelta(seconds=10)
            )
            self.store = dist.PrefixStore(f"heartbeat/{distributed.start_id()}", server)
            self.gave_up = False
            self._stop.clear()
            threading.Thread(target=self._post_now_and_then, daemon=True).start()

    def close(self) -> None:
        """Posts no more, and lets go of the loader whose images were to be named."""
        self._stop.set()
        self.store = None
        self.doing, self.loading = lambda: "starting", list

    def _post_now_and_then(self) -> None:
        while not self._stop.wait(_POST_SECONDS):
            self.post()

    def post(self, **more: Any) -> None:
        """Tells what this process is doing."""
        store = self.store
        if store is None:
            return
        note = {"step": self.step, "doing": self.doing(), "since": self.since, **more}
        with contextlib.suppress(RuntimeError):
            if more:
                store.set(f"end/{distributed.get_rank()}", json.dumps(note))
            else:
                store.set(f"at/{distributed.get_rank()}", json.dumps(note))

    def read(self, kind: str, rank: int) -> dict[str, Any] | None:
        """The last note of a process, if there is one."""
        assert self.store is not None
        with contextlib.suppress(RuntimeError):
            key = f"{kind}/{rank}"
            if self.store.check([key]):
                found: dict[str, Any] = json.loads(self.store.get(key))
                return found
        return None


_HEARTBEAT = _Heartbeat()


def start() -> None:
    """Begins to tell the other processes what this one is doing. After `distributed.start`."""
    _HEARTBEAT.open()


def stop() -> None:
    """Ends telling."""
    _HEARTBEAT.close()


@contextlib.contextmanager
def posting() -> Iterator[None]:
    """Posts this process's activity to the other ranks while the block runs."""
    start()
    try:
        yield
    finally:
        stop()


def set_step(step: int) -> None:
    """Notes the optimizer step that this process is at."""
    _HEARTBEAT.step = step


def set_activity(what: str, samples: Callable[[], list[Any]] | None = None) -> None:
    """Notes what this process begins to do.

    Args:
        what: As in "loading".
        samples: Gives the images, if it comes to be told.
    """

    def describe() -> str:
        named = samples() if samples is not None else []
        shown = ", ".join(str(sample) for sample in named[:_MOST_NAMED])
        more = ", ..." if len(named) > _MOST_NAMED else ""
        return f"{what} {shown}{more}" if named else what

    _HEARTBEAT.doing, _HEARTBEAT.since = describe, time.time()


def set_loading(samples: Callable[[], list[Any]]) -> None:
    """Notes that this process waits for its loader, and what the workers are at from now on."""
    set_activity("loading images", samples)
    _HEARTBEAT.loading = samples


def loading_images() -> str:
    """The images that loader workers are at, whatever this process does itself."""
    return ", ".join(str(sample) for sample in _HEARTBEAT.loading()[:_MOST_NAMED])


def describe_position() -> str:
    """This process' note, for its own errors."""
    return f"step {_HEARTBEAT.step}, {_HEARTBEAT.doing()}"


def report_failure(reason: str) -> None:
    """Tells the others why this process is about to end, unless it was for one of them."""
    if _HEARTBEAT.gave_up:
        return
    _HEARTBEAT.post(failed=reason.splitlines()[0][:500] if reason else "unknown")


def is_collective_failure(error: BaseException) -> bool:
    """Whether an error says that another process did not answer, or is gone."""
    if isinstance(error, dist.DistError):
        return True
    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def find_failed_ranks() -> str:
    """After a collective has failed: which process failed or does not answer, and where it was.

    Returns:
        A sentence.
    """
    _HEARTBEAT.gave_up = True
    _HEARTBEAT.post(gave_up=True)
    if _HEARTBEAT.store is None:
        return "another process failed, or does not answer."
    time.sleep(_GIVE_UP_SECONDS)
    sentences: list[str] = []
    for rank in range(distributed.get_world_size()):
        if rank == distributed.get_rank():
            continue
        end, at = _HEARTBEAT.read("end", rank), _HEARTBEAT.read("at", rank)
        if end is not None and "failed" in end:
            sentences.insert(
                0, f"process {rank} failed at step {end['step']}, {end['doing']}: {end['failed']}"
            )
        elif end is None and at is not None:
            ago = time.time() - at["since"]
            sentences.append(
                f"process {rank} does not answer; {ago:.0f} s ago, at step {at['step']}, it was "
                f"{at['doing']}"
            )
        elif end is None:
            sentences.append(f"process {rank} does not answer")
    if not sentences:
        return "a connection between processes broke."
    return "; ".join(sentences).rstrip(".") + "."


@contextlib.contextmanager
def explain_distributed_errors() -> Iterator[None]:
    """Says which process or which sample is behind an error that PyTorch words in its own way.

    Raises:
        TrainingError: In the place of such an error.
    """
    try:
        yield
    except TrainingError:  # says it already, in words that may hold any path
        raise
    except RuntimeError as error:
        where = heartbeat.describe_position()
        if heartbeat.is_collective_failure(error):
            cause = heartbeat.find_failed_ranks()
            raise TrainingError(f"{cause} (This process was at {where}.)") from error
        if "DataLoader" in str(error):
            first = str(error).splitlines()[0].rstrip(". ")
            raise TrainingError(
                f"{first}, at {where}; its workers were at {heartbeat.loading_images()}."
            ) from error
        raise
