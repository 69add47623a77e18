"""Curves as trackers hold them, and as metrics.jsonl does."""

import json
import sqlite3
import struct
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers.short_runs import read_metrics
from samft.reports.tensorboard import TensorBoard

Curves = dict[str, list[tuple[int, float]]]  # by "split/name": step and value, in order


def curves_of_metrics(folder: Path) -> Curves:
    """Those of metrics.jsonl."""
    curves: Curves = defaultdict(list)
    for line in read_metrics(folder):
        for name, value in line.items():
            if name not in ("step", "split") and value is not None:
                curves[f"{line['split']}/{name}"].append((line["step"], value))
    return dict(curves)


def a_board(folder: Path, *, start_step: int = 0, **changes: Any) -> TensorBoard:
    """TensorBoard's files of a run called `run`."""
    options: dict[str, Any] = {"name": "run", "settings": {"seed": 0}, "lines": [], **changes}
    return TensorBoard(folder, start_step=start_step, **options)


def read_events(folder: Path, split: str = "") -> EventAccumulator:
    """What TensorBoard reads of the only run in an output folder."""
    everything = {"scalars": 0, "images": 0, "tensors": 0}  # no thinning out
    (run,) = (folder / "tensorboard").iterdir()
    return EventAccumulator(str(run / split), everything).Reload()


def tensorboard_curves(folder: Path) -> Curves:
    """Those that TensorBoard shows, in single precision."""
    curves: Curves = {}
    for split in ("train", "val"):
        events = read_events(folder, split)
        for tag in events.Tags()["scalars"]:
            points = [(event.step, event.value) for event in events.Scalars(tag)]
            curves[f"{split}/{tag.split('/')[1]}"] = points
    return curves


def mlflow_curves(folder: Path) -> Curves:
    """Those of the only run in the MLflow store of an output folder."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("samft").experiment_id])
    return {
        name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }


def trackio_curves(folder: Path) -> Curves:
    """Those of all runs of the project, in the database in `folder`."""
    curves: Curves = defaultdict(list)
    with closing(sqlite3.connect(folder / "samft.db")) as database:
        for step, metrics in database.execute("SELECT step, metrics FROM metrics ORDER BY id"):
            for name, value in json.loads(metrics).items():
                curves[name].append((step, value))
    return dict(curves)


def wandb_curves(folder: Path) -> Curves:
    """Those of all offline runs of W&B in an output folder, one after the other."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # its process has written everything then, as at the end of a command
    curves: Curves = defaultdict(list)
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for content in _read_chunks(path.read_bytes()):
            record = Record()
            record.ParseFromString(content)
            for item in record.history.item:
                keys, value = list(item.nested_key) or [item.key], json.loads(item.value_json)
                if len(keys) == 1 and not keys[0].startswith("_"):  # else of a picture, or W&B's
                    curves[keys[0]].append((record.history.step.num, value))
    return dict(curves)


def _read_chunks(content: bytes) -> Iterator[bytes]:
    # Of LevelDB's log format: blocks of 32 KiB, chunks with a head of 7 bytes, none across blocks.
    # Source: https://github.com/google/leveldb/blob/main/doc/log_format.md
    position, whole, (full, last) = 7, b"", (1, 4)  # W&B's own head comes first
    while position + 7 <= len(content):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        whole += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (full, last):
            yield whole
            whole = b""


def check_same_curves(curves: Curves, expected: Curves, *, rel: float = 1e-6) -> None:
    """The same names, steps and values, no step twice."""
    assert curves.keys() == expected.keys()
    for name, points in expected.items():
        assert [step for step, _ in curves[name]] == [step for step, _ in points], name
        values = [value for _, value in curves[name]]
        assert values == pytest.approx([value for _, value in points], rel=rel), name
