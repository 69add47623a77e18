"""The trackers of a run: TensorBoard, and MLflow, W&B and Trackio, which may be on servers.

They hold the curves of metrics.jsonl, also after a kill and a resume: each start of a run brings
them to what the file holds, however much of it they had been given, or more.
"""

import contextlib
import logging
import netrc
import os
import queue
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from samft.ending import end_in_background
from samft.errors import first_sentence
from samft.reports.tensorboard import TensorBoard
from samft.runtime.files import read_json, write_json
from samft.runtime.logs import LOGGER, Tracker
from samft.runtime.metrics_file import scalars_of
from samft.runtime.own_files import TRACKERS_NAME

_PROJECT = "samft"
_CLOSE_SECONDS = 20.0  # for what a server still has to be given when the run ends
_MAX_WAITING = 10_000  # calls for a tracker that is slow; pictures take much more memory
_MAX_WAITING_WITH_PICTURES = 32


@dataclass
class TrackedRun:
    """A run as trackers know it, kept in trackers.json.

    Attributes:
        folder: The output folder.
        name: The run's name in each of them; a file name.
        settings: The configuration.
        lines: Of metrics.jsonl, up to the step at which the run starts.
        ids: The run's id in each tracker that has given it one.
    """

    folder: Path
    name: str
    settings: dict[str, Any]
    lines: list[dict[str, Any]]
    ids: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Makes the lock: each tracker has a thread."""
        self._lock = threading.Lock()

    def keep_id(self, tracker: str, run_id: str) -> None:
        """Has a resumed run find its id in a tracker."""
        with self._lock:
            self.ids[tracker] = run_id
            self.write()

    def write(self) -> None:
        """Writes trackers.json."""
        try:
            write_json(self.folder / TRACKERS_NAME, {"name": self.name, "ids": self.ids})
        except OSError as error:
            LOGGER.error("%s cannot be written: %s", TRACKERS_NAME, error.strerror or error)

    def read(self) -> None:
        """Takes the name and the ids that trackers.json has, if it has any."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            content = read_json(self.folder / TRACKERS_NAME)
            name, ids = str(content["name"]), dict(content["ids"])
            self.name, self.ids = _file_name(name), {str(k): str(v) for k, v in ids.items()}


def open_trackers(
    names: list[str],
    folder: Path,
    *,
    name: str,
    is_resumed: bool,
    settings: dict[str, Any],
    lines: list[dict[str, Any]],
    start_step: int,
) -> list[Tracker]:
    """Opens the trackers of a run; on rank 0 only.

    A tracker that cannot be opened is a warning. Packages are imported here, but servers are first
    called in threads.

    Args:
        names: Of `tensorboard`, `mlflow`, `wandb` and `trackio`; others are ignored.
        folder: The output folder.
        name: Model and data of the run; the date is added.
        is_resumed: Whether the run in the folder goes on.
        settings: The configuration.
        lines: Of metrics.jsonl, up to the step at which the run starts.
        start_step: That step.
    """
    run = TrackedRun(
        folder, _file_name(f"{name}-{time.strftime('%Y-%m-%d-%H%M')}"), settings, lines
    )
    if is_resumed:
        run.read()
    run.write()
    trackers: list[Tracker] = []
    if "tensorboard" in names:
        board = TensorBoard(
            folder, name=run.name, settings=settings, lines=lines, start_step=start_step
        )
        trackers.append(board)
    kinds = {"mlflow": MLflow, "wandb": WandB, "trackio": Trackio}
    return trackers + [BackgroundTracker(kinds[name], run) for name in names if name in kinds]


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text).lstrip(".")[:100] or "run"


class BackgroundTracker(Tracker):
    """Calls a tracker in a thread, so that a server that is slow or gone never delays a run.

    The first error ends it, and is one warning. A resume gives the tracker what it lacks.
    """

    def __init__(self, kind: "type[ServerTracker]", run: TrackedRun) -> None:
        self._label, self._has_ended, self._lock = kind.label, False, threading.Lock()
        self._calls: queue.Queue[tuple[str, Any, Any] | None] = queue.Queue(_MAX_WAITING)
        try:
            # Not in the thread: loader workers are forked, and none may inherit a half-done import.
            tracker = kind(run)
        except Exception as error:
            self._warn_and_end(error)
            return
        self._thread = threading.Thread(
            target=self._work, args=(tracker,), name=self._label, daemon=True
        )
        self._thread.start()

    def _work(self, tracker: "ServerTracker") -> None:
        # What a package logs here, such as each try to reach a server, is in the one warning.
        logging.getLogger("urllib3.connectionpool").addFilter(self._is_of_others)
        try:
            tracker.open()
            while (call := self._calls.get()) is not None:
                method, arguments, options = call
                getattr(tracker, method)(*arguments, **options)
            tracker.close()
        except BaseException as error:  # also of packages that end a program themselves
            self._warn_and_end(error)
        finally:
            logging.getLogger("urllib3.connectionpool").removeFilter(self._is_of_others)

    def _is_of_others(self, record: logging.LogRecord) -> bool:
        return record.threadName != self._label

    def _warn_and_end(self, error: BaseException | str) -> None:
        with self._lock:
            if not self._has_ended:
                reason = first_sentence(str(error)) or type(error).__name__
                LOGGER.warning(
                    "%s: %s. The run goes on without it: metrics.jsonl has it all, and the same "
                    "command, run again, gives it what it lacks",
                    self._label,
                    reason,
                )
            self._has_ended = True

    def _call(self, method: str, *arguments: Any, **options: Any) -> None:
        if not self._has_ended:
            try:
                self._calls.put_nowait((method, arguments, options))
            except queue.Full:
                self._warn_and_end("it does not answer")

    def add_scalars(self, step: int, split: str, values: dict[str, float]) -> None:
        """See `Tracker`."""
        self._call("add_scalars", step, split, values)

    def add_pictures(self, step: int, pictures: dict[str, np.ndarray]) -> None:
        """See `Tracker`; they are left out where the tracker is far behind."""
        if self._calls.qsize() < _MAX_WAITING_WITH_PICTURES:
            self._call("add_pictures", step, pictures)

    def add_results(self, results: dict[str, float]) -> None:
        """See `Tracker`."""
        self._call("add_results", results)

    def close(self) -> None:
        """See `Tracker`; waits some seconds for what is not sent."""
        if self._has_ended:
            return
        with contextlib.suppress(queue.Full):
            self._calls.put_nowait(None)
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            self._warn_and_end(f"it has not taken everything within {_CLOSE_SECONDS:.0f} s")
            end_in_background(self._thread.join)  # the process does not wait for it any longer


@contextlib.contextmanager
def _without_telemetry(variable: str, value: str) -> Iterator[None]:
    # A package reports its use to its makers only where the user has set the variable so.
    is_set = variable in os.environ
    os.environ.setdefault(variable, value)
    try:
        yield
    finally:
        if not is_set:
            os.environ.pop(variable, None)


class ServerTracker(Tracker):
    """A tracker that may be on a server: its methods take their time, and raise.

    Attributes:
        label: What it is called.
        run: The run that it shows.
    """

    label: str

    def __init__(self, run: TrackedRun) -> None:
        """Imports the package; calls no server."""
        self.run = run

    def open(self) -> None:
        """Makes or finds the run, and has it hold `run.lines`, and nothing else."""
        raise NotImplementedError

    def add_lines(self) -> None:
        """Adds all of `run.lines`."""
        for line in self.run.lines:
            self.add_scalars(line["step"], line["split"], scalars_of(line))


class MLflow(ServerTracker):
    """A run of MLflow's, in `MLFLOW_TRACKING_URI`, else in mlflow.db in the output folder."""

    label = "MLflow"

    def __init__(self, run: TrackedRun) -> None:
        """Imports the package; calls no server."""
        super().__init__(run)
        with _without_telemetry("MLFLOW_DISABLE_TELEMETRY", "true"):
            import mlflow

        folder = run.folder.resolve()
        is_set = mlflow.is_tracking_uri_set()
        self._artifacts = None if is_set else (folder / "mlruns").as_uri()
        uri = mlflow.get_tracking_uri() if is_set else f"sqlite:///{folder / 'mlflow.db'}"
        self._mlflow: Any = mlflow
        self._uri, self._status = uri, "KILLED"

    def open(self) -> None:
        """See `ServerTracker`: MLflow keeps what it has, so a run that has more is replaced."""
        self._client: Any = self._mlflow.MlflowClient(self._uri)
        self._id = self._find_run()
        held = self._read_history() if self._id else []
        wanted = {
            (f"{line['split']}/{name}", line["step"]): value
            for line in self.run.lines
            for name, value in scalars_of(line).items()
        }
        is_beginning = len(held) == len(dict(held)) and dict(held).items() <= wanted.items()
        if self._id and not is_beginning:
            self._client.delete_run(self._id)
            self._id = None
        if self._id:
            self._client.update_run(self._id, status="RUNNING")
            wanted = dict(wanted.items() - held)
        else:
            self._id = self._make_run()
        self._log([(name, step, value) for (name, step), value in wanted.items()])
        LOGGER.info("MLflow: run %s in %s", self.run.name, self._uri)

    def _find_run(self) -> str | None:
        run_id = self.run.ids.get("mlflow")
        try:
            run = self._client.get_run(run_id) if run_id else None
        except self._mlflow.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            run = None  # it is in another store
        return run_id if run and run.info.lifecycle_stage == "active" else None

    def _read_history(self) -> list[tuple[tuple[str, int], float]]:
        names = self._client.get_run(self._id).data.metrics
        histories = [self._client.get_metric_history(self._id, name) for name in names]
        return [((m.key, m.step), m.value) for history in histories for m in history]

    def _make_run(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = (
            experiment.experiment_id
            if experiment is not None
            else self._client.create_experiment(name, artifact_location=self._artifacts)
        )
        run_id: str = self._client.create_run(experiment_id, run_name=self.run.name).info.run_id
        self.run.keep_id("mlflow", run_id)
        params = [
            self._mlflow.entities.Param(name, str(value)[:500])
            for name, value in self.run.settings.items()
            if value is not None
        ]
        for start in range(0, len(params), 100):  # more are refused
            self._client.log_batch(run_id, params=params[start : start + 100])
        return run_id

    def _log(self, points: list[tuple[str, int, float]]) -> None:
        now = int(time.time() * 1000)
        metrics = [
            self._mlflow.entities.Metric(name, value, now, step) for name, step, value in points
        ]
        for start in range(0, len(metrics), 1000):  # more are refused
            self._client.log_batch(self._id, metrics=metrics[start : start + 1000])

    def add_scalars(self, step: int, split: str, values: dict[str, float]) -> None:
        """See `Tracker`."""
        self._log([(f"{split}/{name}", step, value) for name, value in values.items()])

    def add_results(self, results: dict[str, float]) -> None:
        """See `Tracker`: tags, as metrics are curves."""
        self._status = "FINISHED"
        for name, value in results.items():
            self._client.set_tag(self._id, name, f"{value:.6g}")

    def close(self) -> None:
        """See `Tracker`."""
        self._client.set_terminated(self._id, self._status)


class WandB(ServerTracker):
    """A run of Weights & Biases; on the disk if `WANDB_MODE` says so, or nobody is logged in."""

    label = "W&B"

    def __init__(self, run: TrackedRun) -> None:
        """Imports the package; calls no server."""
        super().__init__(run)
        with _without_telemetry("WANDB_ERROR_REPORTING", "false"):
            import wandb

        self._wandb, self._exit_code, self._step = wandb, 1, -1

    def open(self) -> None:
        """See `ServerTracker`: a run that is started anew by its id overwrites what it had."""
        run_id = self.run.ids.get("wandb") or secrets.token_hex(4)
        self.run.keep_id("wandb", run_id)
        settings = self._wandb.setup().settings
        offline = settings.mode == "online" and not has_wandb_login(settings)
        with _without_telemetry("WANDB_ERROR_REPORTING", "false"):
            self._run: Any = self._wandb.init(
                project=settings.project or _PROJECT,
                id=run_id,
                name=self.run.name,
                dir=os.environ.get("WANDB_DIR", str(self.run.folder)),
                config=self.run.settings,
                mode="offline" if offline else None,
                reinit="create_new",
                settings={"silent": True, "console": "off", "disable_git": True},
            )
        self.add_lines()
        folder = Path(self._run.dir).parent
        for earlier in folder.parent.glob(f"offline-run-*-{run_id}*"):
            if earlier.name != folder.name:
                shutil.rmtree(earlier, ignore_errors=True)
        where = f"{folder} (`wandb sync` uploads it)" if self._run.offline else self._run.url
        LOGGER.info("W&B: run %s in %s", self.run.name, where)

    def add_scalars(self, step: int, split: str, values: dict[str, float]) -> None:
        """See `Tracker`."""
        self._step = step
        self._run.log({f"{split}/{name}": value for name, value in values.items()}, step=step)

    def add_pictures(self, step: int, pictures: dict[str, np.ndarray]) -> None:
        """See `Tracker`; W&B refuses those of a step that is over."""
        if step == self._step:
            images = {f"val/{n}": self._wandb.Image(p) for n, p in pictures.items()}
            self._run.log(images, step=step, commit=True)

    def add_results(self, results: dict[str, float]) -> None:
        """See `Tracker`."""
        self._exit_code = 0
        self._run.summary.update(results)

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish(exit_code=self._exit_code)


def has_wandb_login(settings: Any) -> bool:
    """Whether W&B has a key; without one, it asks for it, if there is a terminal.

    Args:
        settings: Of `wandb.setup`.
    """
    if settings.api_key or os.environ.get("WANDB_API_KEY") or settings.identity_token_file:
        return True
    host = re.sub(r"^https?://", "", settings.base_url).split("/")[0]
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return host in netrc.netrc(path).hosts
    return False


class Trackio(ServerTracker):
    """A run of Trackio, in `TRACKIO_DIR` or where Trackio keeps them by itself."""

    label = "Trackio"

    def __init__(self, run: TrackedRun) -> None:
        """Imports the package; calls no server."""
        super().__init__(run)
        import trackio

        self._trackio = trackio

    def open(self) -> None:
        """See `ServerTracker`: a run that goes on is made anew."""
        with contextlib.suppress(ValueError):  # there is no such project yet
            for earlier in self._trackio.Api().runs(_PROJECT):
                if earlier.id == self.run.ids.get("trackio"):
                    earlier.delete()
        self._run: Any = self._trackio.init(
            project=_PROJECT,
            name=self.run.name,
            config=self.run.settings,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self.run.keep_id("trackio", self._run.id)
        self.add_lines()

    def add_scalars(self, step: int, split: str, values: dict[str, float]) -> None:
        """See `Tracker`."""
        self._run.log({f"{split}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()
