"""What a run is made of before it writes anything, and when it has to stop."""

import logging
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers.short_runs import a_config, arguments, command_here, train_here, write_data
from samft.errors import EXIT_STOPPED
from samft.recipes.prepare import RunParts, prepare
from samft.runtime.signals import StopRequest

pytestmark = pytest.mark.run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), num_train=2, num_val=1)


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of two steps."""
    folder = tmp_path_factory.mktemp("run")
    train_here(arguments(data, folder, steps=2, metrics_interval=2))
    return folder


def prepare_here(data: Path, folder: Path, **changes: object) -> RunParts:
    config = a_config(data, folder, **{"steps": 2, "metrics_interval": 2, **changes})
    return prepare(config, folder, torch.device("cpu"), stop=StopRequest())


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_it_changes_nothing_in_the_folder_and_opens_no_log(
    resume: str, data: Path, finished: Path
) -> None:
    def content() -> dict[Path, bytes | None]:
        return {p: p.read_bytes() if p.is_file() else None for p in finished.rglob("*")}

    before, handlers = content(), logging.getLogger().handlers[:]
    parts = prepare_here(data, finished, resume=resume)
    assert content() == before
    assert logging.getLogger().handlers == handlers
    assert parts.resumes_in_place is (resume == "auto")
    assert parts.progress.step == (2 if resume == "auto" else 0)


def test_a_resumed_model_has_the_saved_weights_and_the_state_no_longer_holds_them(
    data: Path, finished: Path
) -> None:
    saved = torch.load(finished / "last.ckpt", weights_only=True)
    parts = prepare_here(data, finished)
    weights = parts.model.sam.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in saved["model"].items())
    assert parts.resume is not None and parts.source_dir == finished
    assert parts.resume.state.keys() == saved.keys() - {"model"}


def test_a_best_checkpoint_that_is_gone_keeps_no_later_one_from_being_saved(
    data: Path, tmp_path: Path
) -> None:
    # Scores stay what they were, and of equal ones the earlier is kept, as long as it is there.
    settings = {"steps": 4, "metrics_interval": 2, "learning_rate": 1e-12}
    argv = arguments(data, tmp_path, **settings)
    assert command_here([*argv, "--stop_after", "2"]) == EXIT_STOPPED
    (best,) = tmp_path.glob("2-*.ckpt")
    best.unlink()
    summary = train_here(argv)
    assert summary["best_step"] == 4 and Path(summary["best_checkpoint"]).is_file()


def test_the_first_reason_to_stop_is_given(data: Path, tmp_path: Path) -> None:
    parts = prepare_here(data, tmp_path, stop_after=1)
    assert parts.stop_reason() is None
    parts.progress.step = 1
    assert parts.stop_reason() == "stop_after 1"
    parts = replace(parts, deadline=time.time())
    assert parts.stop_reason() == "the job's time limit"
    parts.stop.received.append("SIGTERM")
    assert parts.stop_reason() == "SIGTERM"


def test_an_interrupted_validation_has_no_lines_yet(data: Path, tmp_path: Path) -> None:
    parts = prepare_here(data, tmp_path)
    parts.progress.step = 5
    assert parts.logged_step == 5
    parts.progress.pending = {"loss": 1.0}
    assert parts.logged_step == 4
