"""Asynchronous saving: the training loop waits for a copy of the tensors, a thread writes it.

Writing, syncing and hashing take ten times as long as copying, and overlap with the next steps.
"""

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import KeyPath, tree_leaves_with_path, tree_map_with_path

from samft.checkpoints.page_locked import empty_page_locked
from samft.checkpoints.top_k import SCORE, TopK
from samft.checkpoints.training_state import LAST_NAME, save_last
from samft.models.lora import adapter_tensors
from samft.runtime import heartbeat
from samft.runtime.logs import LOGGER


class HostCopy:
    """Copies nested tensors into host memory that is allocated once and used again at each save.

    Fresh memory would cost more than the copying: the operating system hands it out page by page,
    and a GPU copies at a fraction of its speed into memory that is not page-locked.
    """

    def __init__(self) -> None:
        self._buffers: dict[KeyPath, Tensor] = {}

    def copy(self, tree: Any, *, constant: Collection[str] = ()) -> Any:
        """Copies all tensors of a tree of dicts, lists and tuples.

        Args:
            tree: Its leaves are tensors, and plain values, which are not copied.
            constant: Keys of tensors that never change. They are copied to the host once; on a CPU
                they are not copied at all.

        Returns:
            The same structure with tensors on the CPU. The next call overwrites them.
        """
        leaves = tree_leaves_with_path(tree)
        tensors = {path: leaf.detach() for path, leaf in leaves if isinstance(leaf, Tensor)}
        constants = {path for path in tensors if path and getattr(path[-1], "key", "") in constant}
        new = {p: t for p, t in tensors.items() if not _is_alike(self._buffers.get(p), t)}
        on_gpu = {path: tensor for path, tensor in new.items() if tensor.is_cuda}
        self._buffers.update(empty_page_locked(on_gpu))
        for path, tensor in tensors.items():
            if path in constants and not tensor.is_cuda:
                self._buffers[path] = tensor
            elif path in new and not tensor.is_cuda:
                self._buffers[path] = tensor.clone()
            elif path in new or path not in constants:
                self._buffers[path].copy_(tensor, non_blocking=True)
        # Copies into page-locked memory are asynchronous. Without one there is nothing to wait for,
        # and a run on a CPU must not make a CUDA context.
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        return tree_map_with_path(
            lambda path, leaf: self._buffers[path] if path in tensors else leaf, tree
        )


def _is_alike(buffer: Tensor | None, tensor: Tensor) -> bool:
    return buffer is not None and (buffer.shape, buffer.dtype) == (tensor.shape, tensor.dtype)


class BackgroundWriter:
    """Runs one piece of work at a time in a background thread."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Starts a piece of work in the background, once the one before it has ended.

        Args:
            work: Called in the thread; what it reads must not change meanwhile.

        Raises:
            BaseException: What the piece before it raised.
        """
        self.wait()
        # A daemon thread, so that a second Ctrl-C ends the process even in the middle of a write:
        # every file is written so that this leaves a whole one.
        self._thread = threading.Thread(
            target=self._run_work, args=(work,), name=heartbeat.SAVING, daemon=True
        )
        self._thread.start()

    @property
    def is_busy(self) -> bool:
        """Whether a piece of work has not ended."""
        return self._thread is not None and self._thread.is_alive()

    def _run_work(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # raised again by `wait`
            self._error = error

    def wait(self) -> None:
        """Waits until the work, if there is any, has ended.

        Raises:
            BaseException: What the work raised.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error


class Checkpointer:
    """Writes the best checkpoints and the state to resume from, in the background.

    Attributes:
        top_k: The best checkpoints so far. Only valid after `wait`: the thread changes it.
        unsaved: What the last save could not write, and why; empty if it wrote everything.
    """

    def __init__(
        self,
        folder: Path,
        *,
        top_k: TopK,
        constant: Collection[str] = (),
        on_saved: Callable[[int], None],
    ) -> None:
        """Prepares saving into a run's output folder; for rank 0 only.

        Args:
            folder: The output folder.
            top_k: The best checkpoints so far.
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
        sidecar: dict[str, Any] | None = None,
        before_writing: Callable[[], None] | None = None,
    ) -> None:
        """Waits until the previous state is written, copies this one, and starts to write it.

        Args:
            state: What `save_last` takes, except for the list of the best checkpoints. `model` maps
                SAM's own keys to tensors, `adapters` is from `lora.adapter_state`, and `progress`
                has the `step`.
            sidecar: From `top_k.make_sidecar`, where `model` was validated and may be one of the
                best; None: only the state is saved.
            before_writing: Called in the thread before anything is written, to write what a resume
                from this state has to find.

        Raises:
            BaseException: What ended the previous writing, other than an `OSError`.
        """
        self._writer.wait()
        copied = self._copy.copy(state, constant=self.constant)
        self._writer.start(partial(self._write_state, copied, sidecar, before_writing))

    @property
    def is_writing(self) -> bool:
        """Whether a state is being written."""
        return self._writer.is_busy

    def wait(self) -> None:
        """Waits until the state is written.

        Raises:
            BaseException: What ended the writing, other than an `OSError`.
        """
        self._writer.wait()

    def _write_state(
        self,
        state: dict[str, Any],
        sidecar: dict[str, Any] | None,
        before_writing: Callable[[], None] | None,
    ) -> None:
        # In the thread. Each of the three is tried, whether or not those before it succeeded.
        self.unsaved = ""
        if before_writing is not None:
            with self._logged_as("pictures and scores"):
                before_writing()
        if sidecar is not None:
            with self._logged_as("a checkpoint"):
                score = sidecar["metrics"][SCORE]
                adapter = adapter_tensors(
                    state["model"], state.get("adapters", {}), constant=self.constant
                )
                self.top_k.save_if_better(
                    state["model"], score=score, sidecar=sidecar, adapter=adapter
                )
        # After the checkpoints, so that a state never lists one that is not there.
        with self._logged_as(LAST_NAME):
            save_last(self.folder, {**state, "best": self.top_k.to_list()})
            self.on_saved(int(state["progress"]["step"]))

    @contextmanager
    def _logged_as(self, content: str) -> Iterator[None]:
        # A full disk must not end the training: the next save may find room.
        try:
            yield
        except OSError as error:
            self.unsaved = f"{content} could not be written into {self.folder}: {error}."
            LOGGER.error(
                "%s Files written before are whole. The run goes on and tries again at its next "
                "interval: make room until then",
                self.unsaved,
            )
