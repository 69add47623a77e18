"""Per-rank heartbeats in the rendezvous store, to name the rank that crashed or hangs.

Each process notes what it is about to do, which costs an assignment. A thread posts the last note
to the store through which the processes found each other; under `torchrun` the store outlives them.
When a collective fails, each process that is alive posts that it gave up. The ranks that have not,
or have posted a failure of their own, are the cause.

A process that waits for others looks into the store every second: on a GPU, nothing else would tell
it that the rank it waits for has failed. One that hangs does not notice how the run ends: its own
thread ends it, or another process of its host kills it.
"""

import contextlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from samft import distributed
from samft.cli import print_error
from samft.errors import EXIT_FAILED, CollectiveError, TrainingError, is_out_of_memory
from samft.runtime.output_dir import end_status
from samft.runtime.signals import StopRequest

_POST_SECONDS = 1.0  # between two posts, and between two looks for failures of others
_FAILURE = "failure"  # set in the store by any rank that fails
_NOTICE_SECONDS = 8.0  # within this time, a process that does not hang notices that another failed
_GIVE_UP_SECONDS = 3.0  # within this time, a failed collective fails on all ranks that are alive
SAVING = "saving"  # the name of a thread that is not to be ended
_MOST_NAMED = 8  # images in a message


def _seconds_to_stop() -> float:
    # From a signal until torchrun kills its processes, less what giving up takes.
    # Source: the default in torch/distributed/launcher/api.py
    return max(1.0, float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")) - 8.0)


def _other_ranks() -> list[int]:
    own = distributed.get_rank()
    return [rank for rank in range(distributed.get_world_size()) if rank != own]


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
        self.is_ending = False  # the main thread knows that the run has failed
        self._stop, self._starts = threading.Event(), 0
        self._request: StopRequest | None = None
        self._next_look = 0.0
        self._failed_since = math.inf  # when a failure of another rank was seen first

    def start_posting(self, request: StopRequest | None = None) -> None:
        """Connects to the store and starts the thread."""
        address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        if distributed.get_world_size() == 1 or not address or not port:
            return
        with contextlib.suppress(RuntimeError):  # another kind of store: no rank can be named then
            server = dist.TCPStore(
                address, int(port), is_master=False, timeout=timedelta(seconds=10)
            )
            # Numbered: another run in the same group must not see how this one ended.
            self._starts += 1
            prefix = f"heartbeat/{distributed.start_id()}/{self._starts}"
            self.store = dist.PrefixStore(prefix, server)
            self.gave_up, self.is_ending, self._request = False, False, request
            self._next_look, self._failed_since = 0.0, math.inf
            self._stop.clear()
            distributed.set_wait_check(self.check_wait)
            threading.Thread(target=self._post_regularly, daemon=True).start()

    def stop_posting(self) -> None:
        """Stops the thread, and drops its reference to the data loader."""
        self._stop.set()
        distributed.set_wait_check(None)
        self.store, self._request = None, None
        self.activity = _Activity("starting", time.time(), _no_images)
        self.list_loading = _no_images

    def _post_regularly(self) -> None:
        while not self._stop.wait(_POST_SECONDS):
            self.post("activity")
            self._look_for_failure()
            if time.monotonic() - self._failed_since > _NOTICE_SECONDS:
                self._end_unless_ending()

    def _look_for_failure(self) -> None:
        store = self.store
        if store is not None:
            with contextlib.suppress(RuntimeError):  # the store is gone with its launcher
                if store.check([_FAILURE]):
                    self._failed_since = min(self._failed_since, time.monotonic())

    def _end_unless_ending(self) -> None:
        # In the thread: the main one waits where nobody looks for failures, or hangs.
        saves = any(thread.name == SAVING for thread in threading.enumerate())
        if self.is_ending or saves or self._stop.is_set():
            return
        cause, position = _name_ranks(), describe_position()
        error = TrainingError(f"{cause} (This process did not notice, at {position}.)")
        print_error(error)
        if distributed.is_main():
            with contextlib.suppress(OSError):
                end_status(exit_code=EXIT_FAILED, reason=str(error))
        os._exit(EXIT_FAILED)

    def post(self, kind: str, **outcome: Any) -> None:
        """Writes a record of this rank: its `activity`, or its `end` with the outcome."""
        store = self.store
        if store is None:
            return
        activity = self.activity
        record = {
            "step": self.step,
            "doing": str(activity),
            "since": activity.since,
            "pid": os.getpid(),
            "node": os.environ.get("GROUP_RANK"),  # from torchrun
            **outcome,
        }
        with contextlib.suppress(RuntimeError):
            store.set(f"{kind}/{distributed.get_rank()}", json.dumps(record))

    def post_end(self, **outcome: Any) -> None:
        """Writes this rank's `end`, and that there is a failure at all."""
        self.is_ending = True
        self.post("end", **outcome)
        if self.store is not None:
            with contextlib.suppress(RuntimeError):
                self.store.set(_FAILURE, "")

    def expects_posts(self) -> bool:
        """Whether another rank has not posted how it ends."""
        return any(self.read("end", rank) is None for rank in _other_ranks())

    def check_wait(self, seconds: float) -> None:
        """Ends a wait for other ranks that is in vain.

        Args:
            seconds: How long the wait has lasted.

        Raises:
            CollectiveError: A rank has failed; or this one was asked to stop so long ago that the
                launcher is about to kill it.
        """
        now, store = time.monotonic(), self.store
        if store is None or seconds < _POST_SECONDS or now < self._next_look:
            return
        self._next_look = now + _POST_SECONDS
        if self._request is not None and self._request.age() > _seconds_to_stop():
            names = ", ".join(self._request.received)
            raise CollectiveError(f"stopped by {names} while other processes did not answer")
        self._look_for_failure()
        # One look later: what all ranks end with together, this one may be about to hear.
        if now - self._failed_since >= _POST_SECONDS:
            raise CollectiveError("another process failed")

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


def start_posting(stop: StopRequest | None = None) -> None:
    """Starts to post what this process does. To be called after `distributed.start`.

    Args:
        stop: Ends a wait for ranks that do not answer, shortly before the launcher kills them all.
    """
    _HEARTBEAT.start_posting(stop)


def stop_posting() -> None:
    """Stops posting heartbeats."""
    _HEARTBEAT.stop_posting()


@contextlib.contextmanager
def posting(stop: StopRequest | None = None) -> Iterator[None]:
    """Posts this process's activity to the other ranks while the block runs.

    Args:
        stop: See `start_posting`.
    """
    start_posting(stop)
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
    _HEARTBEAT.post_end(failed=reason.splitlines()[0][:500] if reason else "unknown")


def find_failed_ranks() -> str:
    """Names the ranks that failed, or do not respond, after a collective has failed on this one.

    Takes up to `_GIVE_UP_SECONDS`, in which the ranks that are alive post that they gave up.

    Returns:
        A sentence with the rank, its step, its activity and its error.
    """
    _HEARTBEAT.gave_up = True
    _HEARTBEAT.post_end(gave_up=True)
    if _HEARTBEAT.store is None:
        return "another process failed, or does not answer."
    if _HEARTBEAT.read("end", distributed.get_rank()) is None:
        return "process 0, which holds what is known of the others, does not answer."
    deadline = time.monotonic() + _GIVE_UP_SECONDS
    while _HEARTBEAT.expects_posts() and (left := deadline - time.monotonic()) > 0:
        time.sleep(min(left, _GIVE_UP_SECONDS / 10))
    return _name_ranks()


def _name_ranks() -> str:
    # A sentence on the ranks that failed or are silent. Kills those that hang on this host.
    failed, silent = [], []
    for rank in _other_ranks():
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
            _kill_if_hanging(activity)
        elif end is None:
            silent.append(f"process {rank} does not answer")
    if not failed and not silent:
        return "a connection between processes broke."
    return "; ".join(failed + silent).rstrip(".") + "."


def _kill_if_hanging(activity: dict[str, Any]) -> None:
    # A process that was stopped handles no signal. Its launcher would kill it too, but only after
    # the time that it leaves a process for saving. Linux only.
    hangs = time.time() - activity["since"] >= distributed.step_seconds()
    if hangs and activity["node"] is not None and activity["node"] == os.environ.get("GROUP_RANK"):
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{activity['pid']}/stat").read_text()
            if int(stat.rpartition(")")[2].split()[1]) == os.getppid():
                os.kill(activity["pid"], signal.SIGKILL)


@contextlib.contextmanager
def explain_distributed_errors() -> Iterator[None]:
    """Turns PyTorch's errors of collectives and loader workers into ones that name rank and images.

    Raises:
        TrainingError: Instead of such an error.
    """
    try:
        yield
    except (CollectiveError, dist.DistError) as error:
        if is_out_of_memory(error):  # NCCL's: it is this process that cannot go on
            raise
        position, cause = describe_position(), find_failed_ranks()
        raise TrainingError(f"{cause} (This process was at {position}.)") from error
    except TrainingError:  # already explained, and its message may hold any path
        raise
    except RuntimeError as error:
        if "DataLoader" in str(error) and not is_out_of_memory(error):
            position = describe_position()
            first = str(error).splitlines()[0].rstrip(". ")
            if "signal: Killed" in first:
                first += ", as the system does where memory runs out: lower num_workers if it did"
            raise TrainingError(
                f"{first}, at {position}; its workers were at {loading_images()}."
            ) from error
        raise
