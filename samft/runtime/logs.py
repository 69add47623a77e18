"""Log lines, metrics.jsonl, trackers and the progress bar of a run. Imports no torch.

Files are written by rank 0 only. Other ranks log warnings and errors, with their rank in front.
"""

import contextlib
import json
import logging
import math
import os
import shutil
import sys
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from samft.errors import escape_paragraph, fold_for_terminal
from samft.runtime.files import unused_path, write_text
from samft.runtime.metrics_file import (
    FILE_NAME,
    describe_damage,
    read_metrics_file,
    scalars_of,
)

LOGGER = logging.getLogger("samft")
GIB = 1 << 30
# `extra` of log lines: one that the terminal gets in another way; one of which each line is a
# command, to be copied whole.
FILES_ONLY = {"is_for_files": True}
WITH_COMMANDS = {"has_commands": True}
_LINE_SECONDS = 60.0  # between two lines of progress in a log


class _Formatter(logging.Formatter):
    # A file name from outside must not forge a line of the log, or send codes to a terminal.
    def format(self, record: logging.LogRecord) -> str:
        return escape_paragraph(super().format(record))


class _TerminalFormatter(_Formatter):
    # Where a line goes on, it begins below the text of its first one.
    def __init__(self, template: str, stream: TextIO) -> None:
        super().__init__(template, "%H:%M:%S")
        self._stream, self._indent = stream, len("00:00:00 ")

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if hasattr(record, "has_commands"):
            return text
        return fold_for_terminal(text, self._stream, indent=self._indent)


class _StartupBuffer(MemoryHandler):
    # Holds what is logged before `RunLog` opens train.log: the folder may still hold the files of
    # an earlier run then, which are archived first.
    def __init__(self) -> None:
        super().__init__(10_000, flushLevel=sys.maxsize, flushOnClose=False)

    def move_to(self, handler: logging.Handler) -> None:
        """Hands everything held over to a handler, and holds no more."""
        self.setTarget(handler)
        self.flush()
        logging.getLogger().removeHandler(self)


@contextlib.contextmanager
def logging_to_terminal(rank: int) -> Iterator[None]:
    """Sends log lines and Python's warnings to standard error; undone when the block ends.

    Ranks other than 0 show warnings and errors only, with their rank in front. The handlers of a
    caller who has set up logging stay; if one of them writes to the terminal, none is added.

    Args:
        rank: This process's rank.
    """
    root, level, showwarning = logging.getLogger(), LOGGER.level, warnings.showwarning
    name = "" if rank == 0 else f"[rank {rank}] "
    terminal = logging.StreamHandler(sys.stderr)
    terminal.setFormatter(_TerminalFormatter(f"%(asctime)s {name}%(message)s", sys.stderr))
    terminal.addFilter(lambda record: not hasattr(record, "is_for_files"))
    handlers: list[logging.Handler] = [] if _logs_to_terminal(root) else [terminal]
    if rank == 0:
        handlers.append(_StartupBuffer())
    for handler in handlers:
        root.addHandler(handler)
    LOGGER.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        if warnings.showwarning is not showwarning:
            logging.captureWarnings(False)
        LOGGER.setLevel(level)
        for handler in handlers:
            root.removeHandler(handler)


def _logs_to_terminal(logger: logging.Logger) -> bool:
    streams = (getattr(handler, "stream", None) for handler in logger.handlers)
    return any(stream and stream in (sys.stdout, sys.stderr) for stream in streams)


def format_duration(seconds: float) -> str:
    """Formats seconds as h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_gib(num_bytes: int) -> str:
    """Formats a number of bytes in GiB, or MiB below 0.1 GiB."""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:.1f} MiB"


def progress_bar(
    items: Iterable[Any] | None = None, *, unit: str, hidden: bool = False, **options: Any
) -> "tqdm[Any]":
    """A progress bar on standard error; where that is no terminal, a line every minute.

    Args:
        items: What to iterate over; None: the bar is updated by its `update`.
        unit: What is counted, in the singular.
        hidden: Whether to show nothing, on ranks other than 0 say.
        options: Of `tqdm`.
    """
    if sys.stderr.isatty():
        return _ProgressBar(items, unit=unit, disable=hidden, dynamic_ncols=True, **options)
    what = f"{options['desc']}: " if options.get("desc") else ""
    units = unit if unit.isupper() else f"{unit}s"
    return _ProgressLines(
        items,
        disable=hidden,
        bar_format=f"{what}{{n_fmt}} of {{total_fmt}} {units}"
        " after {elapsed}, {remaining} left",
        miniters=1,
        **options | dict.fromkeys(("delay", "mininterval", "maxinterval"), _LINE_SECONDS),
    )


class _ProgressBar(tqdm):
    # Without tqdm's thread, which outlives the bars, for those that are updated too rarely: none is
    # updated between two looks at the clock here.
    monitor_interval = 0


class _ProgressLines(_ProgressBar):
    disable: bool

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """What prints the state: a whole line."""
        return lambda text: print(text, file=file, flush=True)

    def clear(self, *arguments: Any, **options: Any) -> None:
        """Nothing: what is printed between two lines does not share a line with them."""

    def refresh(self, nolock: bool = False, lock_args: Any = None) -> None:
        """Prints the state, but not again after each line of others."""
        if not nolock:
            super().refresh(lock_args=lock_args)

    def close(self) -> None:
        """Ends it without a last line: the command says what it has done."""
        if not self.disable:
            self.disable = True
            self._decr_instances(self)


class _LogFile(logging.FileHandler):
    # train.log. Where it cannot be written, the terminal still has every line: said once, instead
    # of a traceback for each.
    has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.has_failed:
            self.has_failed = True
            LOGGER.error("%s cannot be written: %s", self.baseFilename, error.strerror)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what it could not write before, it tries again
            super().close()


class Tracker:
    """What shows the curves of a run, such as TensorBoard. Rank 0 has them, the others have none.

    They show what metrics.jsonl holds: none is worth failing a run, or delaying it. So no method
    raises anything or waits, and each may do nothing.
    """

    def add_scalars(self, step: int, split: str, values: dict[str, float]) -> None:
        """Adds a line of metrics.jsonl; see `RunLog.write_metrics`."""

    def add_pictures(self, step: int, pictures: dict[str, np.ndarray]) -> None:
        """Adds pictures of a validation; see `RunLog.add_pictures`."""

    def add_pr_curve(self, step: int, name: str, *, labels: np.ndarray, scores: np.ndarray) -> None:
        """Adds a precision-recall curve; see `RunLog.add_pr_curve`."""

    def add_results(self, results: dict[str, float]) -> None:
        """Adds the results of a run that is finished, by name."""

    def close(self) -> None:
        """Closes it; without results before, the run was stopped."""


class RunLog:
    """The log files, trackers and progress bar of one run.

    On ranks other than 0, every method does nothing.

    Attributes:
        metrics_state: Length and checksum of metrics.jsonl, for `last.ckpt`: whoever resumes from
            it can tell whether a line was changed since.
    """

    def __init__(
        self,
        folder: Path,
        *,
        main: bool,
        steps: int,
        start_step: int = 0,
        metrics_state: dict[str, int] | None = None,
    ) -> None:
        """Opens the files; a resumed run drops the metrics written after its checkpoint.

        Args:
            folder: The output folder, which must exist.
            main: Whether this is rank 0.
            steps: Optimizer steps of the whole run.
            start_step: The step that the run resumes from.
            metrics_state: What `metrics_state` was then; None: unknown.
        """
        self.folder, self.main, self.steps = folder, main, steps
        self.trackers: list[Tracker] = []  # they get what is written from then on
        self._is_open = False
        self.metrics_state = {"bytes": 0, "crc32": 0}
        self._unwritten: dict[str, list[str]] = {}
        self.bar = progress_bar(total=steps, initial=start_step, hidden=not main, unit="step")
        if not main:
            return
        self._file = _LogFile(folder / "train.log")
        self._file.setFormatter(_Formatter("%(asctime)s %(message)s"))
        self._drop_records_after(start_step, metrics_state)
        # Last, as nothing that follows can fail: a log that was not opened installs no handlers.
        for handler in logging.getLogger().handlers[:]:
            if isinstance(handler, _StartupBuffer):
                handler.move_to(self._file)
        self._redirect = logging_redirect_tqdm([logging.getLogger()])
        self._redirect.__enter__()
        logging.getLogger().addHandler(self._file)
        self._is_open = True

    def _drop_records_after(self, step: int, saved: dict[str, int] | None) -> None:
        # Lines that stay are not written anew, letter for letter; damaged ones are put aside.
        path = self.folder / FILE_NAME
        lines = read_metrics_file(path)
        if lines.damaged:
            aside = unused_path(path.with_name(f"{FILE_NAME}.damaged"))
            try:
                shutil.copyfile(path, aside)
            except OSError as error:
                LOGGER.error("%s cannot be written: %s", aside, error.strerror)
            LOGGER.warning(
                "%s: %s damaged or repeated, and left out; all others are kept. The file as it "
                "was is now %s",
                path,
                describe_damage(lines.damaged),
                aside.name,
            )
        raw = path.read_bytes() if path.is_file() else b""
        if saved and not lines.damaged and zlib.crc32(raw[: saved["bytes"]]) != saved["crc32"]:
            LOGGER.warning("%s: some lines are missing, or not as this run has written them", path)
        text = "".join(f"{line.text}\n" for line in lines.whole if line.record["step"] <= step)
        kept = text.encode()
        if raw != kept or not path.is_file():
            write_text(path, text)
        self.metrics_state = {"bytes": len(kept), "crc32": zlib.crc32(kept)}

    def read_metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl; damaged lines are left out."""
        return [line.record for line in read_metrics_file(self.folder / FILE_NAME).whole]

    def write_bad_step(self, step: int, *, position: int, image_ids: list[list[int]]) -> None:
        """Writes the images of a skipped step, by rank, to bad_steps.jsonl."""
        if self._is_open:
            record = {"after_step": step, "position": position, "image_ids": image_ids}
            self._append_record("bad_steps.jsonl", record)

    def _append_record(self, name: str, record: dict[str, Any]) -> None:
        # What a full disk refuses is kept in memory and written with the next record.
        self._unwritten.setdefault(name, []).append(json.dumps(record) + "\n")
        try:
            # Unbuffered: after a failed write, closing a buffered file would try again.
            with (self.folder / name).open("ab", buffering=0) as file:
                start, unwritten = file.tell(), "".join(self._unwritten[name]).encode()
                try:
                    while unwritten:
                        unwritten = unwritten[file.write(unwritten) :]
                    # The checkpoint that is saved next relies on the line being on disk.
                    os.fsync(file.fileno())
                    written = "".join(self._unwritten[name]).encode()
                except OSError:
                    os.ftruncate(file.fileno(), start)  # no part of a line stays
                    raise
            del self._unwritten[name]
            if name == FILE_NAME:
                self.metrics_state = {
                    "bytes": self.metrics_state["bytes"] + len(written),
                    "crc32": zlib.crc32(written, self.metrics_state["crc32"]),
                }
        except OSError as error:
            LOGGER.error("%s cannot be written: %s", self.folder / name, error.strerror)

    def write_metrics(self, step: int, split: str, values: dict[str, float]) -> None:
        """Writes one line to metrics.jsonl and shows the same scalars in the trackers.

        Args:
            step: Optimizer steps done.
            split: `train` or `val`.
            values: Numbers by name; NaN and infinities become null, which JSON does not have.
        """
        if not self._is_open:
            return
        finite = {name: v if math.isfinite(v) else None for name, v in values.items()}
        record = {"step": step, "split": split, **finite}
        self._append_record(FILE_NAME, record)
        for tracker in self.trackers:
            tracker.add_scalars(step, split, scalars_of(record))

    def add_pictures(self, step: int, pictures: dict[str, np.ndarray]) -> None:
        """Shows all pictures of a validation in the trackers.

        Args:
            step: Optimizer steps done.
            pictures: By name; uint8 [H, W, 3], RGB.
        """
        for tracker in self.trackers:
            tracker.add_pictures(step, pictures)

    def add_pr_curve(self, step: int, name: str, *, labels: np.ndarray, scores: np.ndarray) -> None:
        """Shows a precision-recall curve of a validation in the trackers.

        Args:
            step: Optimizer steps done.
            name: The curve's name.
            labels: bool [K], the positives.
            scores: float [K], predicted, in 0..1.
        """
        for tracker in self.trackers:
            tracker.add_pr_curve(step, name, labels=labels, scores=scores)

    def add_results(self, results: dict[str, float]) -> None:
        """Shows the results of a finished run in the trackers, by name."""
        for tracker in self.trackers:
            tracker.add_results(results)

    def advance_bar(self, **postfix: str) -> None:
        """Advances the progress bar by one step."""
        self.bar.update(1)
        if postfix:
            self.bar.set_postfix(postfix, refresh=False)

    def close(self) -> None:
        """Closes the bar, the trackers and the files."""
        self.bar.close()
        for tracker in self.trackers:
            tracker.close()
        self.trackers = []
        if self._is_open:
            self._redirect.__exit__(None, None, None)  # restores the handlers it has replaced
            logging.getLogger().removeHandler(self._file)
            self._file.close()
            self._is_open = False
