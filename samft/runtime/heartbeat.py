"""Per-rank heartbeats in the rendezvous store, to name the rank that crashed or hangs.

Each process notes what it is about to do, which costs an assignment. A thread posts the last note
to the store through which the processes found each other; under `torchrun` the store outlives them.
When a collective fails, each process that is alive posts that it gave up. The ranks that have not,
or have posted a failure of their own, are the cause.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

from samft import distributed
from samft.errors import TrainingError, is_out_of_memory

_POST_SECONDS = 1.0
_GIVE_UP_SECONDS = 3.0  # within this time, a failed collective fails on all ranks that are alive
_MOST_NAMED = 8  # images in a message


def _no_images() -> list[Any]:
    return []


class _Activity(NamedTuple):
    # One object, so that the thread never posts an activity with the images of the next.
    name: str
    since: float
    list_images: Callable[[], list[Any]]  # called for a record or message only

    def __str__(self) -> str:
        images = self.list_images()
        more = ", ..." if len(images) > _MOST_NAMED else ""
        return f"{self.name} {_join_images(images)}{more}" if images else self.name


def _join_images(images: list[Any]) -> str:
    return ", ".join(str(image) for image in images[:_MOST_NAMED])


class _Heartbeat:
    # What this process is doing, and what the store says of the others. Without a store (a single
    # process, or no torchrun) only the former.
    def __init__(self) -> None:
        self.store: dist.Store | None = None
        self.step = 0
        self.activity = _Activity("starting", time.time(), _no_images)
        self.list_loading: Callable[[], list[Any]] = _no_images
        self.gave_up = False
        self._stop = threading.Event()

    def start_posting(self) -> None:
        """Connects to the store and starts the thread."""
        address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        if distributed.get_world_size() == 1 or not address or not port:
            return
        with contextlib.suppress(RuntimeError):  # another kind of store: no rank can be named then
            server = dist.TCPStore(
                address, int(port), is_master=False, timeout=timedelta(seconds=10)
            )
            self.store = dist.PrefixStore(f"heartbeat/{distributed.start_id()}", server)
            self.gave_up = False
            self._stop.clear()
            threading.Thread(target=self._post_regularly, daemon=True).start()

    def stop_posting(self) -> None:
        """Stops the thread, and drops its reference to the data loader."""
        self._stop.set()
        self.store = None
        self.activity = _Activity("starting", time.time(), _no_images)
        self.list_loading = _no_images

    def _post_regularly(self) -> None:
        while not self._stop.wait(_POST_SECONDS):
            self.post("activity")

    def post(self, kind: str, **outcome: Any) -> None:
        """Writes a record of this rank: its `activity`, or its `end` with the outcome."""
        store = self.store
        if store is None:
            return
        activity = self.activity
        record = {"step": self.step, "doing": str(activity), "since": activity.since, **outcome}
        with contextlib.suppress(RuntimeError):
            store.set(f"{kind}/{distributed.get_rank()}", json.dumps(record))

    def read(self, kind: str, rank: int) -> dict[str, Any] | None:
        """Reads the last record of a rank, if there is one."""
        assert self.store is not None
        with contextlib.suppress(RuntimeError):
            key = f"{kind}/{rank}"
            if self.store.check([key]):
                record: dict[str, Any] = json.loads(self.store.get(key))
                return record
        return None


# Of this process: what it does is said by code that has no other object in common.
_HEARTBEAT = _Heartbeat()


def start_posting() -> None:
    """Starts to post what this process does. To be called after `distributed.start`."""
    _HEARTBEAT.start_posting()


def stop_posting() -> None:
    """Stops posting heartbeats."""
    _HEARTBEAT.stop_posting()


@contextlib.contextmanager
def posting() -> Iterator[None]:
    """Posts this process's activity to the other ranks while the block runs."""
    start_posting()
    try:
        yield
    finally:
        stop_posting()


def set_step(step: int) -> None:
    """Notes the optimizer step that this process is at."""
    _HEARTBEAT.step = step


def set_activity(activity: str, list_images: Callable[[], list[Any]] = _no_images) -> None:
    """Notes what this process begins to do.

    Args:
        activity: As in "training on images".
        list_images: Returns the names or ids of those images; called for a message only.
    """
    _HEARTBEAT.activity = _Activity(activity, time.time(), list_images)


def set_loading(list_images: Callable[[], list[Any]]) -> None:
    """Notes that this process waits for its data loader.

    Args:
        list_images: Returns the images that the loader's workers are at, now and later on.
    """
    set_activity("loading images", list_images)
    _HEARTBEAT.list_loading = list_images


def loading_images() -> str:
    """The images that the data loader's workers are at, whatever this process does itself."""
    return _join_images(_HEARTBEAT.list_loading())


def describe_position() -> str:
    """The step and the activity of this process, for its error messages."""
    return f"step {_HEARTBEAT.step}, {_HEARTBEAT.activity}"


def report_failure(reason: str) -> None:
    """Posts this rank's failure, unless it is only a reaction to another rank's."""
    if _HEARTBEAT.gave_up:
        return
    _HEARTBEAT.post("end", failed=reason.splitlines()[0][:500] if reason else "unknown")


def is_collective_failure(error: BaseException) -> bool:
    """Whether an error means that another process is gone, or did not respond."""
    if isinstance(error, dist.DistError):
        return True
    signs = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def find_failed_ranks() -> str:
    """Names the ranks that failed, or do not respond, after a collective has failed on this one.

    Takes `_GIVE_UP_SECONDS`, in which the ranks that are alive post that they gave up.

    Returns:
        A sentence with the rank, its step, its activity and its error.
    """
    _HEARTBEAT.gave_up = True
    _HEARTBEAT.post("end", gave_up=True)
    if _HEARTBEAT.store is None:
        return "another process failed, or does not answer."
    time.sleep(_GIVE_UP_SECONDS)
    failed, silent = [], []
    for rank in range(distributed.get_world_size()):
        end, activity = _HEARTBEAT.read("end", rank), _HEARTBEAT.read("activity", rank)
        if end is not None and "failed" in end:
            failed.append(
                f"process {rank} failed at step {end['step']}, {end['doing']}: {end['failed']}"
            )
        elif end is None and activity is not None:
            silent.append(
                f"process {rank} does not answer; {time.time() - activity['since']:.0f} s ago, at "
                f"step {activity['step']}, it was {activity['doing']}"
            )
        elif end is None:
            silent.append(f"process {rank} does not answer")
    if not failed and not silent:
        return "a connection between processes broke."
    return "; ".join(failed + silent).rstrip(".") + "."


@contextlib.contextmanager
def explain_distributed_errors() -> Iterator[None]:
    """Turns PyTorch's errors of collectives and loader workers into ones that name rank and images.

    Raises:
        TrainingError: Instead of such an error.
    """
    try:
        yield
    except TrainingError:  # already explained, and its message may hold any path
        raise
    except RuntimeError as error:
        if is_out_of_memory(error):  # also NCCL's: it is this process that cannot go on
            raise
        position = describe_position()
        if is_collective_failure(error):
            cause = find_failed_ranks()
            raise TrainingError(f"{cause} (This process was at {position}.)") from error
        if "DataLoader" in str(error):
            first = str(error).splitlines()[0].rstrip(". ")
            raise TrainingError(
                f"{first}, at {position}; its workers were at {loading_images()}."
            ) from error
        raise
