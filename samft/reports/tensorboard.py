"""TensorBoard's files of a run. Tags are groups of charts; train and val share each chart."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from samft.runtime.logs import LOGGER, Tracker
from samft.runtime.metrics_file import GENERAL_PREFIX, scalars_of
from samft.runtime.own_files import TENSORBOARD


class TensorBoard(Tracker):
    """Writes `tensorboard/NAME`, and below it `train` and `val`: three runs to TensorBoard.

    Curves of the same tag in several runs are drawn into one chart. TensorBoard sorts the groups of
    charts by name and unfolds the first two: IoU and losses.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        name: str,
        settings: dict[str, Any],
        lines: list[dict[str, Any]],
        start_step: int,
    ) -> None:
        """Opens new files, in the folder of the run if it is resumed.

        Args:
            output_dir: The output folder.
            name: Of the run, a file name.
            settings: The configuration.
            lines: Of metrics.jsonl, which a folder that is new gets, too.
            start_step: What earlier files have of later steps is not shown.
        """
        self._folder, self._start_step = output_dir / TENSORBOARD / name, start_step
        self._writers: dict[str, Any] = {}
        self._error: OSError | None = None
        self._hook = threading.excepthook
        threading.excepthook = self._ignore_thread_error
        is_new = not self._folder.exists()
        self._add_settings(settings)
        for line in lines if is_new else ():
            self.add_scalars(line["step"], line["split"], scalars_of(line))

    def _ignore_thread_error(self, args: threading.ExceptHookArgs) -> None:
        # A writer's thread raises what its next call raises again, which is logged there.
        of_writer = type(args.thread).__module__.startswith("tensorboard.")
        if not (of_writer and issubclass(args.exc_type, OSError)):
            self._hook(args)

    @contextlib.contextmanager
    def _logging_error(self) -> Iterator[None]:
        # Says once why the files end where they do, such as a full disk.
        try:
            yield
        except OSError as error:
            if self._error is None:
                LOGGER.error(
                    "%s/ cannot be written: %s. metrics.jsonl has it all",
                    TENSORBOARD,
                    error.strerror or error,
                )
            self._error = error

    def _record(self, split: str, *writes: Callable[[Any], object]) -> None:
        # Files are made when there is something to write: an empty one would be an empty run.
        if self._error is not None:
            return
        with self._logging_error():
            if split not in self._writers:
                # It imports torch, which takes a second.
                from torch.utils.tensorboard import SummaryWriter

                folder = self._folder / split
                self._writers[split] = SummaryWriter(folder, purge_step=self._start_step + 1)
            for write in writes:
                write(self._writers[split])

    def _add_settings(self, settings: dict[str, Any]) -> None:
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb

        given = {name: value for name, value in settings.items() if value is not None}
        self._add_text("config", OmegaConf.to_yaml(OmegaConf.create(settings)))
        # TensorBoard itself puts the last values of the curves beside them.
        self._record("", lambda writer: writer.file_writer.add_summary(hparams_pb(given)))

    def _add_text(self, name: str, text: str) -> None:
        verbatim = "    " + text.replace("\n", "\n    ")
        self._record("", methodcaller("add_text", name, verbatim, 0))

    def add_scalars(self, step: int, split: str, values: dict[str, float]) -> None:
        """See `Tracker`; they are on the disk afterwards."""
        tags = {f"{_group_of(name)}/{name}": value for name, value in values.items()}
        adds = [methodcaller("add_scalar", tag, value, step) for tag, value in tags.items()]
        self._record(split, *adds, methodcaller("flush"))

    def add_pictures(self, step: int, pictures: dict[str, np.ndarray]) -> None:
        """See `Tracker`."""
        for name, picture in pictures.items():
            add = methodcaller("add_image", f"masks/{name}", picture, step, dataformats="HWC")
            self._record("val", add)

    def add_pr_curve(self, step: int, name: str, *, labels: np.ndarray, scores: np.ndarray) -> None:
        """See `Tracker`."""
        clipped = np.clip(np.nan_to_num(scores), 0, 1)  # TensorBoard takes nothing else
        self._record("val", methodcaller("add_pr_curve", f"masks/{name}", labels, clipped, step))

    def add_results(self, results: dict[str, float]) -> None:
        """See `Tracker`: a text, as a curve of one point is an empty chart."""
        self._add_text("results", "\n".join(f"{n}: {value}" for n, value in results.items()))

    def close(self) -> None:
        """See `Tracker`."""
        for writer in self._writers.values():
            with self._logging_error():
                writer.close()
        self._writers = {}
        if threading.excepthook == self._ignore_thread_error:
            threading.excepthook = self._hook


def _group_of(name: str) -> str:
    # Of charts. What is validated comes first, what only tells of the machine last.
    if name.removeprefix(GENERAL_PREFIX).startswith("loss"):
        return "loss"
    return "iou" if "iou" in name else "run"
