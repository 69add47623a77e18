"""A pool of processes in one gloo group: started once, it runs functions on all ranks."""

import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from torch import distributed

from helpers.preloaded import preloading_context, use_default_start_method

COLLECTIVE_TIMEOUT = timedelta(seconds=60)
# The time limit of a function, and of the other ranks once one has failed: they may be waiting for
# it in a collective, until that times out.
RUN_SECONDS = 120.0
GRACE_SECONDS = 3.0


class RankTraceback(Exception):
    """The cause that a re-raised exception carries: the traceback as its rank saw it."""

    def __str__(self) -> str:
        return "\n" + self.args[0]


class RankDied(RuntimeError):
    """The process of a rank ended instead of returning a result."""


class GlooPool:
    """Runs functions on every rank of a gloo group; starts its processes when first used.

    A run in which not all ranks end the same way leaves the group in no known state, so the next
    run gets new processes.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Runs `function(*args)` on every rank and returns the results in the order of the ranks.

        The function must be importable: at the top level of a module. If ranks fail, the exception
        of the first one is raised here (or of one whose process died, as the others may have
        failed because of that), with the traceback of its rank as the cause.
        """
        if not self._processes:
            self._start_processes()
        for pipe in self._pipes:
            pipe.send((function, args))
        answers = self._collect_answers()
        failed = [rank for rank in answers if answers[rank][0] is not None]
        failed.sort(key=lambda rank: not isinstance(answers[rank][0], RankDied))
        died = any(isinstance(answers[rank][0], RankDied) for rank in failed)
        if len(answers) < self.world_size or died or 0 < len(failed) < self.world_size:
            self.stop(kill=True)
        if failed:
            rank = failed[0]
            error, text = answers[rank]
            raise error from RankTraceback(f"rank {rank} of {self.world_size}:\n{text}")
        if len(answers) < self.world_size:
            missing = sorted(set(range(self.world_size)) - set(answers))
            raise TimeoutError(f"{function.__name__}: no answer from rank {missing}")
        return [answers[rank][1] for rank in range(self.world_size)]

    def stop(self, *, kill: bool = False) -> None:
        """Ends the processes: after what they are doing, or at once."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            if kill:
                process.kill()
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes, self._pipes = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start_processes(self) -> None:
        context = preloading_context()
        self._folder = tempfile.TemporaryDirectory()
        rendezvous = (Path(self._folder.name) / "rendezvous").as_uri()
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve_rank, args=(theirs, rendezvous, rank, self.world_size), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _collect_answers(self) -> dict[int, tuple[Exception | None, Any]]:
        """(None, result) or (error, traceback) by rank, in the order in which they arrive."""
        answers: dict[int, tuple[Exception | None, Any]] = {}
        deadline = time.monotonic() + RUN_SECONDS
        while len(answers) < self.world_size:
            waiting = {self._pipes[r]: r for r in range(self.world_size) if r not in answers}
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = waiting[pipe]  # type: ignore[index]
                answers[rank] = self._receive_answer(rank)
                if answers[rank][0] is not None:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return answers

    def _receive_answer(self, rank: int) -> tuple[Exception | None, Any]:
        try:
            return self._pipes[rank].recv()
        except (EOFError, ConnectionResetError):
            self._processes[rank].join(10)
            code = self._processes[rank].exitcode
            return RankDied(f"rank {rank} ended with exit code {code}"), ""


def _serve_rank(pipe: Connection, rendezvous: str, rank: int, world_size: int) -> None:
    use_default_start_method()
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=rendezvous,
        rank=rank,
        world_size=world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            break
        try:
            pipe.send((None, function(*args)))
        except Exception as error:
            pipe.send((_to_picklable(error), traceback.format_exc()))
    distributed.destroy_process_group()


def _to_picklable(error: Exception) -> Exception:
    # Exceptions whose arguments differ from those of their class do not survive pickling.
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
