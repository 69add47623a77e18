"""Saving beside the training: a copy of the tensors, and a thread that writes it.

The loop waits for the copy only. Writing, syncing and hashing take ten times as long, and happen
while the next steps are taken.
"""

import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samft.checkpoints.top_k import TopK
from samft.checkpoints.training_state import LAST_NAME, save_last
from samft.runtime.logs import LOGGER


class HostCopy:
    """A copy of nested tensors in host memory, made anew at each save, in the same place.

    Fresh memory would cost more than the copying: the system hands it out page by page, and a GPU
    copies at a fraction of its speed into memory that is not page-locked.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], Tensor] = {}

    def of(self, value: Any, *, constant: Collection[str] = ()) -> Any:
        """Copies all tensors of a value.

        Args:
            value: Dicts, lists and tuples of tensors and of anything else, which is not copied.
            constant: Keys of tensors that never change, and are copied once; on a CPU not at all.

        Returns:
            The same structure, with tensors on the CPU, which change with the next call.
        """
        copied = self._of(value, frozenset(constant), ())
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # copies into page-locked memory are not waited for
        return copied

    def _of(self, value: Any, constant: frozenset[str], path: tuple[Any, ...]) -> Any:
        if isinstance(value, Tensor):
            is_constant = bool(path) and path[-1] in constant
            return self._tensor(value.detach(), path, is_constant=is_constant)
        if isinstance(value, dict):
            return {key: self._of(item, constant, (*path, key)) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            items = (self._of(item, constant, (*path, k)) for k, item in enumerate(value))
            return type(value)(items)
        return value

    def _tensor(self, tensor: Tensor, path: tuple[Any, ...], *, is_constant: bool) -> Tensor:
        buffer = self._buffers.get(path)
        if is_constant and not tensor.is_cuda:
            return tensor
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._buffers[path] = buffer
        elif is_constant:
            return buffer
        return buffer.copy_(tensor, non_blocking=True)


class BackgroundWriter:
    """One piece of work at a time, in a thread of its own."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begins a piece of work, when the one before it has ended.

        Args:
            work: Called in the thread; what it reads must not change meanwhile.

        Raises:
            BaseException: What the piece before it raised.
        """
        self.wait()
        # A second Ctrl-C ends the process at once, whatever is being written: hence a daemon.
        self._thread = threading.Thread(target=self._run, args=(work,), name="saving", daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # for whoever waits
            self._error = error

    def wait(self) -> None:
        """Waits for the end of the work, if there is any.

        Raises:
            BaseException: What it raised.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error


@dataclass(frozen=True)
class Checkpoint:
    """A validated state that may be among the best.

    Attributes:
        score: Higher is better.
        sidecar: See `checkpoint.make_sidecar`.
    """

    score: float
    sidecar: dict[str, Any]


class Checkpointer:
    """Writes the best checkpoints and the state to resume from, in the background.

    Attributes:
        top_k: The best so far; to be read after `wait` only.
        unsaved: What the last attempt could not write, and why; empty if it could.
    """

    def __init__(
        self,
        folder: Path,
        *,
        top_k: TopK,
        constant: Collection[str] = (),
        on_saved: Callable[[int], None],
    ) -> None:
        """Of one run, on the one process that writes.

        Args:
            folder: The output folder.
            top_k: The best so far.
            constant: Names of the tensors that are not trained.
            on_saved: Called in the thread with the step of each state that was saved.
        """
        self.folder, self.top_k, self.on_saved = folder, top_k, on_saved
        self.constant = frozenset(constant)
        self.unsaved = ""
        self._copy, self._writer = HostCopy(), BackgroundWriter()

    def save(
        self,
        state: dict[str, Any],
        *,
        candidate: Checkpoint | None = None,
        first: Callable[[], None] | None = None,
    ) -> None:
        """Copies a state and begins to write it, once the one before it is written.

        Args:
            state: What `save_last` takes, but for the list of the best; `model` are SAM's own keys
                to tensors, and `progress` has the step.
            candidate: Where `model` may be among the best.
            first: Called in the thread before anything is written, to write what a resume from
                this state has to find.

        Raises:
            BaseException: What ended the writing of the one before it, other than `OSError`.
        """
        self._writer.wait()
        copied = self._copy.of(state, constant=self.constant)
        self._writer.start(partial(self._write, copied, candidate, first))

    def wait(self) -> None:
        """Waits until all is written.

        Raises:
            BaseException: What ended the writing, other than `OSError`.
        """
        self._writer.wait()

    def _write(
        self,
        state: dict[str, Any],
        candidate: Checkpoint | None,
        first: Callable[[], None] | None,
    ) -> None:
        self.unsaved = ""
        if first is not None:
            try:
                first()
            except OSError as error:
                self._could_not_write("pictures and scores", error)
        if candidate is not None:
            self._offer(state["model"], candidate)
        try:
            save_last(self.folder, {**state, "best": self.top_k.to_list()})
            self.on_saved(int(state["progress"]["step"]))
        except OSError as error:
            self._could_not_write(LAST_NAME, error)

    def _offer(self, weights: dict[str, Tensor], candidate: Checkpoint) -> None:
        try:
            self.top_k.save_if_better(weights, score=candidate.score, sidecar=candidate.sidecar)
        except OSError as error:
            self._could_not_write("a checkpoint", error)

    def _could_not_write(self, what: str, error: OSError) -> None:
        self.unsaved = f"{what} could not be written into {self.folder}: {error}."
        LOGGER.error(
            "%s Files written before are whole; the run goes on and tries again at its next "
            "interval. Make room until then",
            self.unsaved,
        )
