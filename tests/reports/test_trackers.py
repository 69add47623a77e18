"""MLflow, W&B and Trackio hold the curves of metrics.jsonl, and none ends or delays a run."""

import importlib
import json
import logging
import os
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from helpers.trackers import (
    Curves,
    check_same_curves,
    curves_of_metrics,
    mlflow_curves,
    trackio_curves,
    wandb_curves,
)
from samft.reports import trackers
from samft.reports.trackers import (
    BackgroundTracker,
    MLflow,
    ServerTracker,
    TrackedRun,
    has_wandb_login,
    open_trackers,
)
from samft.runtime.logs import RunLog


def write_steps(
    folder: Path, names: list[str], steps: range, *, start_step: int = 0, finish: bool = False
) -> None:
    """A run, from its start or a resume to its end."""
    with closing(RunLog(folder, main=True, steps=9, start_step=start_step)) as log:
        log.trackers = open_trackers(
            names,
            folder,
            name="vit_tiny-a set",
            is_resumed=start_step > 0,
            settings={"seed": 0, "amp": "off", "val_fraction": None},
            lines=log.read_metrics(),
            start_step=start_step,
        )
        for step in steps:
            if step:
                log.write_metrics(step, "train", {"loss": step / 3, "lr": 1e-4, "skipped_steps": 0})
            log.write_metrics(step, "val", {"per_mask_iou": 0.1 + step, "loss": float("nan")})
            log.add_pictures(step, {"same_objects": np.zeros((4, 5, 3), np.uint8)})
        if finish:
            log.add_results({"best_val_per_mask_iou": 0.75})


KINDS = {
    "mlflow": pytest.param("mlflow", mlflow_curves, marks=pytest.mark.run, id="mlflow"),
    "wandb": pytest.param("wandb", wandb_curves, id="wandb"),
    "trackio": pytest.param("trackio", trackio_curves, id="trackio"),
}


def need_package(name: str) -> None:
    pytest.importorskip(name, reason=f"no {name}: pip install '.[{name}]'")


@pytest.mark.parametrize(("kind", "curves_of"), KINDS.values())
def test_curves_are_those_of_the_file_whatever_ended_the_run(
    tmp_path: Path,
    kind: str,
    curves_of: Callable[[Path], Curves],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))  # before the only import in these tests
    need_package(kind)
    write_steps(tmp_path, [kind], range(3))
    check_same_curves(curves_of(tmp_path), curves_of_metrics(tmp_path), rel=0)
    first = json.loads((tmp_path / "trackers.json").read_text())
    # Steps 2 to 4 were not saved: they are taken, and written, again, with other values.
    path = tmp_path / "metrics.jsonl"
    write_steps(tmp_path, [kind], range(3, 5), start_step=2)
    path.write_text(path.read_text().replace("0.0001", "0.0002"))
    write_steps(tmp_path, [kind], range(2, 6), start_step=1)
    check_same_curves(curves_of(tmp_path), curves_of_metrics(tmp_path), rel=0)
    # For a while, the tracker was not asked for, or its server was gone.
    write_steps(tmp_path, [], range(6, 8), start_step=5)
    write_steps(tmp_path, [kind], range(8, 9), start_step=7, finish=True)
    check_same_curves(curves_of(tmp_path), curves_of_metrics(tmp_path), rel=0)
    # A finished run that is started again, which has nothing to add.
    write_steps(tmp_path, [kind], range(0), start_step=8, finish=True)
    check_same_curves(curves_of(tmp_path), curves_of_metrics(tmp_path), rel=0)
    last = json.loads((tmp_path / "trackers.json").read_text())
    assert last["name"] == first["name"] and first["name"].startswith("vit_tiny-a_set-")


@pytest.mark.run
def test_mlflow_has_settings_as_params_and_goes_on_in_the_same_run(tmp_path: Path) -> None:
    need_package("mlflow")
    from mlflow import MlflowClient

    write_steps(tmp_path, ["mlflow"], range(3))
    ids = json.loads((tmp_path / "trackers.json").read_text())["ids"]
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    run = client.get_run(ids["mlflow"])
    assert (run.data.params, run.info.status) == ({"seed": "0", "amp": "off"}, "KILLED")
    write_steps(tmp_path, ["mlflow"], range(3, 4), start_step=2, finish=True)
    run = client.get_run(ids["mlflow"])
    assert run.info.status == "FINISHED" and run.data.tags["best_val_per_mask_iou"] == "0.75"
    assert json.loads((tmp_path / "trackers.json").read_text())["ids"] == ids


class ServerError(Exception):
    """MLflow's, of a server that does not answer."""

    error_code = "INTERNAL_ERROR"


def test_mlflow_makes_no_second_run_where_the_server_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(run_id: str) -> None:
        raise ServerError("busy")

    client = SimpleNamespace(get_run=fail)  # it has no method that makes a run
    mlflow = SimpleNamespace(
        is_tracking_uri_set=lambda: True,
        get_tracking_uri=lambda: "http://host",
        MlflowClient=lambda uri: client,
        MlflowException=ServerError,
    )
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    with pytest.raises(ServerError):
        MLflow(TrackedRun(tmp_path, "run", {}, [], {"mlflow": "1"})).open()
    assert mlflow.MlflowClient("") is client and not (tmp_path / "trackers.json").exists()


def test_packages_are_imported_without_telemetry_unless_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def note(name: str, *arguments: Any, **options: Any) -> Any:
        if name in VARIABLES:
            seen.append(os.environ.get(VARIABLES[name]))
            raise ImportError("not now")
        return importlib.__import__(name, *arguments, **options)

    monkeypatch.setattr("builtins.__import__", note)
    for value in (None, "by the user"):
        for variable in VARIABLES.values():
            monkeypatch.delenv(variable, raising=False)
            if value is not None:
                monkeypatch.setenv(variable, value)
        write_steps(tmp_path, list(VARIABLES), range(0))
        assert [os.environ.get(variable) for variable in VARIABLES.values()] == [value] * 2
    assert seen == ["true", "false", "by the user", "by the user"]


VARIABLES = {"mlflow": "MLFLOW_DISABLE_TELEMETRY", "wandb": "WANDB_ERROR_REPORTING"}


def test_without_a_login_wandb_is_not_asked_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SimpleNamespace(
        api_key=None, identity_token_file=None, base_url="https://wandb.host:8080/"
    )
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not has_wandb_login(settings)
    (tmp_path / "netrc").write_text("machine another.host login user password key\n")
    assert not has_wandb_login(settings)
    (tmp_path / "netrc").write_text("machine wandb.host:8080 login user password key\n")
    assert has_wandb_login(settings)
    (tmp_path / "netrc").write_text("machine")
    assert not has_wandb_login(settings)
    monkeypatch.setenv("WANDB_API_KEY", "key")
    assert has_wandb_login(settings)


class Slow(ServerTracker):
    """Answers when it is let."""

    label = "Slow"
    gate = threading.Event()

    def open(self) -> None:
        self.gate.wait(60)


class Gone(ServerTracker):
    """Fails in a call."""

    label = "Gone"
    fails_in = "open"

    def open(self) -> None:
        self.fail_in("open")

    def add_scalars(self, *arguments: Any) -> None:
        self.fail_in("add_scalars")

    def close(self) -> None:
        self.fail_in("close")

    def fail_in(self, method: str) -> None:
        logging.getLogger("urllib3.connectionpool").warning("retrying")
        if method == self.fails_in:
            raise ConnectionError("refused by host:\n a traceback")


@pytest.mark.parametrize("method", ["open", "add_scalars", "close"])
def test_an_error_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(Gone, "fails_in", method)
    tracker = BackgroundTracker(Gone, TrackedRun(tmp_path, "run", {}, []))
    with closing(tracker):
        for step in range(3):
            tracker.add_scalars(step, "val", {"loss": 0.5})
            tracker.add_pictures(step, {})
    assert [text.split(". ")[0] for text in caplog.messages] == ["Gone: refused by host"]


def test_one_that_does_not_answer_is_not_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "_CLOSE_SECONDS", 0.01)
    monkeypatch.setattr(trackers, "_MAX_WAITING", 5)
    for num_calls, reason in ((3, "it has not taken everything"), (9, "it does not answer")):
        caplog.clear()
        with closing(BackgroundTracker(Slow, TrackedRun(tmp_path, "run", {}, []))) as tracker:
            for step in range(num_calls):
                tracker.add_scalars(step, "val", {"loss": 0.5})
        (message,) = caplog.messages
        assert reason in message and "metrics.jsonl has it all" in message
    Slow.gate.set()


def test_a_package_that_cannot_be_imported_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "wandb":
            raise ImportError("wandb is broken")
        return importlib.__import__(name, *arguments, **options)

    monkeypatch.setattr("builtins.__import__", fail)
    write_steps(tmp_path, ["wandb"], range(3))
    assert caplog.text.count("W&B: wandb is broken") == 1
    assert len(curves_of_metrics(tmp_path)["val/per_mask_iou"]) == 3


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"name": "../x", "ids": 5}', b"\xff"])
def test_a_damaged_file_of_ids_is_made_anew(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "trackers.json").write_bytes(content)
    write_steps(tmp_path, [], range(0), start_step=1)
    document = json.loads((tmp_path / "trackers.json").read_text())
    assert document["name"].startswith("vit_tiny-a_set-") and document["ids"] == {}
