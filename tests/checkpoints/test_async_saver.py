"""The copy of a state in host memory, and the thread that writes it."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from samft.checkpoints import training_state
from samft.checkpoints.async_saver import BackgroundWriter, Checkpointer, HostCopy
from samft.checkpoints.top_k import SCORE, TopK
from samft.checkpoints.training_state import load_latest

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def a_state(step: int, weight: float) -> dict[str, Any]:
    model = {"w": torch.full((4,), weight), "frozen": torch.ones(3)}
    return {"model": model, "progress": {"step": step}}


def a_checkpointer(folder: Path, *, k: int = 1) -> tuple[Checkpointer, list[int]]:
    saved: list[int] = []
    top_k = TopK(folder, k=k)
    made = Checkpointer(folder, top_k=top_k, constant=["frozen"], on_saved=saved.append)
    return made, saved


def a_sidecar(step: int, score: float) -> dict[str, Any]:
    return {"step": step, "metrics": {SCORE: score}}


# A copy


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
def test_a_copy_keeps_tensors_structure_and_plain_values(device: str) -> None:
    weight = torch.arange(4.0, device=device)
    value = {"a": [weight, (weight + 1, "text")], "b": {"step": 3, "none": None}}
    copied = HostCopy().copy(value)
    weight.zero_()
    assert copied["a"][0].tolist() == [0, 1, 2, 3] and copied["a"][0].device.type == "cpu"
    assert copied["a"][1][0].tolist() == [1, 2, 3, 4] and copied["a"][1][1] == "text"
    assert copied["b"] == value["b"]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
def test_a_copy_is_made_in_the_same_place_unless_the_shape_changes(device: str) -> None:
    copy = HostCopy()
    first = copy.copy({"a": torch.zeros(4, device=device)})["a"]
    second = copy.copy({"a": torch.ones(4, device=device)})["a"]
    assert first.data_ptr() == second.data_ptr() and second.tolist() == [1, 1, 1, 1]
    assert copy.copy({"a": torch.ones(5, device=device)})["a"].shape == (5,)


def test_constant_tensors_are_not_copied_on_a_cpu() -> None:
    frozen = torch.ones(3)
    copied = HostCopy().copy({"frozen": frozen, "w": frozen}, constant=["frozen"])
    assert copied["frozen"].data_ptr() == frozen.data_ptr() != copied["w"].data_ptr()


# A thread


def test_one_piece_of_work_at_a_time_and_in_order() -> None:
    writer, may_end, events = BackgroundWriter(), threading.Event(), []

    def slow() -> None:
        may_end.wait(60)
        events.append("slow")

    writer.start(slow)
    assert events == []  # it is not waited for
    threading.Timer(0.05, may_end.set).start()
    writer.start(lambda: events.append("next"))
    writer.wait()
    assert events == ["slow", "next"]


def test_an_error_reaches_whoever_waits_once() -> None:
    writer = BackgroundWriter()
    writer.start(lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    with pytest.raises(ZeroDivisionError):
        writer.wait()
    writer.wait()


# Both


def test_the_state_of_the_moment_is_saved_whatever_training_does_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer, saved = a_checkpointer(tmp_path)
    may_write, stock = threading.Event(), training_state.write_tensors

    def late(*args: Any) -> None:
        may_write.wait(60)
        stock(*args)

    monkeypatch.setattr(training_state, "write_tensors", late)
    state = a_state(1, weight=5.0)
    checkpointer.save(state)
    state["model"]["w"].fill_(7.0)  # the next step
    assert saved == [] and not (tmp_path / "last.ckpt").exists()
    may_write.set()
    checkpointer.wait()
    latest = load_latest(tmp_path)
    assert saved == [1] and latest is not None
    assert latest.state["model"]["w"].tolist() == [5.0] * 4
    assert latest.state["model"]["frozen"].tolist() == [1.0] * 3


def test_the_state_knows_the_best_that_was_saved_with_it(tmp_path: Path) -> None:
    checkpointer, _ = a_checkpointer(tmp_path)
    for step, score in ((1, 0.5), (2, 0.4), (3, 0.6)):
        sidecar = a_sidecar(step, score)
        checkpointer.save(a_state(step, weight=float(step)), sidecar=sidecar)
    checkpointer.wait()
    latest = load_latest(tmp_path)
    assert latest is not None and [entry["step"] for entry in latest.state["best"]] == [3]
    assert torch.load(tmp_path / "3-0.60.ckpt", weights_only=True)["w"].tolist() == [3.0] * 4
    assert not list(tmp_path.glob("1-*"))


@pytest.mark.parametrize("what", ["last.ckpt", "1-0.50.ckpt"])
def test_a_full_disk_is_logged_and_the_next_save_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer, saved = a_checkpointer(tmp_path, k=2)
    stock = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).name == what:
            raise OSError(28, "No space left on device")
        stock(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        checkpointer.save(a_state(1, weight=1.0), sidecar=a_sidecar(1, 0.5))
        checkpointer.wait()
    assert "could not be written" in checkpointer.unsaved
    assert saved == ([] if what == "last.ckpt" else [1])
    checkpointer.save(a_state(2, weight=2.0), sidecar=a_sidecar(2, 0.4))
    checkpointer.wait()
    assert checkpointer.unsaved == "" and saved[-1] == 2
    assert not list(tmp_path.glob(".*.part"))


def test_before_writing_is_called_before_the_state_exists(tmp_path: Path) -> None:
    checkpointer, saved = a_checkpointer(tmp_path)
    seen: list[bool] = []
    first = lambda: seen.append((tmp_path / "last.ckpt").exists())  # noqa: E731
    checkpointer.save(a_state(1, weight=1.0), sidecar=a_sidecar(1, 0.5), before_writing=first)
    checkpointer.wait()
    assert seen == [False] and saved == [1]


def test_a_failure_before_writing_does_not_prevent_the_save(tmp_path: Path) -> None:
    checkpointer, saved = a_checkpointer(tmp_path)

    def full() -> None:
        raise OSError(28, "No space left on device")

    checkpointer.save(a_state(1, weight=1.0), before_writing=full)
    checkpointer.wait()
    assert saved == [1] and "pictures and scores could not be written" in checkpointer.unsaved
