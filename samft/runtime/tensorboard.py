"""TensorBoard's files of a run, which may fail without failing the run."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = "tensorboard"


class TensorBoard:
    """What `SummaryWriter` writes. It repeats metrics.jsonl: not worth failing a run.

    Attributes:
        error: Why nothing is written any more, such as a full disk; None as long as it is.
    """

    def __init__(self, folder: Path, *, start_step: int) -> None:
        """Opens a new file in the folder.

        Args:
            folder: It is made if it is absent.
            start_step: What earlier files have of later steps is not shown.
        """
        # It imports torch, which modules that only log, such as those of samft.coco, do without.
        from torch.utils.tensorboard import SummaryWriter

        self.error: OSError | None = None
        self._writer: Any = None
        self._hook = threading.excepthook
        threading.excepthook = self._ignore_thread_error
        with self._recording():
            self._writer = SummaryWriter(folder, purge_step=start_step + 1)

    def _ignore_thread_error(self, args: threading.ExceptHookArgs) -> None:
        # The writer's thread raises what the next call raises again, which is recorded there.
        of_writer = type(args.thread).__module__.startswith("tensorboard.")
        if not (of_writer and issubclass(args.exc_type, OSError)):
            self._hook(args)

    @contextlib.contextmanager
    def _recording(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = self.error or error

    def add_scalars(self, step: int, values: dict[str, float]) -> None:
        """Adds numbers by name, and sees to it that they are on the disk."""
        with self._recording():
            for name, value in values.items():
                self._call("add_scalar", name, value, step)
            self._call("flush")

    def add_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Adds an image, uint8 [H, W, 3] RGB."""
        self._call("add_image", name, image, step, dataformats="HWC")

    def add_pr_curve(self, step: int, name: str, *, labels: np.ndarray, scores: np.ndarray) -> None:
        """Adds a precision-recall curve; see `RunLog.add_pr_curve`."""
        clipped = np.clip(np.nan_to_num(scores), 0, 1)  # TensorBoard takes nothing else
        self._call("add_pr_curve", name, labels, clipped, step)

    def add_text(self, name: str, text: str) -> None:
        """Adds a text, indented so that it is shown verbatim."""
        self._call("add_text", name, "    " + text.replace("\n", "\n    "), 0)

    def add_hparams(self, hparams: dict[str, Any], results: dict[str, float]) -> None:
        """Adds hyper-parameters and final results, without a subfolder of theirs."""
        given = {name: value for name, value in hparams.items() if value is not None}
        self._call("add_hparams", given, results, run_name=".")

    def _call(self, method: str, *arguments: Any, **options: Any) -> None:
        if self._writer is not None and self.error is None:
            with self._recording():
                getattr(self._writer, method)(*arguments, **options)

    def close(self) -> None:
        """Closes the file."""
        if self._writer is not None:
            with self._recording():
                self._writer.close()
            self._writer = None
        if threading.excepthook == self._ignore_thread_error:
            threading.excepthook = self._hook
