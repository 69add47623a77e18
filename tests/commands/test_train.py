import json
import logging
import multiprocessing
import shutil
import signal
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.coco_files import write_coco
from helpers.preloaded import run_preloaded
from helpers.short_runs import (
    COMMAND_SECONDS,
    arguments,
    clean_environment,
    command,
    command_here,
    command_line,
    largest_difference,
    read_metrics,
    train_here,
    write_data,
)
from samft.errors import DataError
from samft.recipes import build
from samft.train import exit_code_for_launcher, main
from samft.weights.download import PACKAGED_TINY

pytestmark = pytest.mark.run


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def read_status(folder: Path) -> dict[str, Any]:
    status: dict[str, Any] = json.loads((folder / "status.json").read_text())
    return status


# Stopped by a signal


def stop_when_trained(argv: list[str], folder: Path) -> tuple[int, str]:
    """Starts the command, sends SIGTERM after its first train line; exit code and stderr."""
    full_command, environment = command_line(argv), clean_environment()
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + COMMAND_SECONDS
    with subprocess.Popen(
        full_command, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            while not (metrics.exists() and '"train"' in metrics.read_text()):
                assert process.poll() is None, "it ended by itself"
                assert time.monotonic() < deadline, "it has not come to its first train line"
                time.sleep(0.01)
        finally:
            process.send_signal(signal.SIGTERM)
            stderr = process.communicate(timeout=COMMAND_SECONDS)[1]
    return process.returncode, stderr


# So many that the signal comes in time, with a constant rate, which lets `steps` change on resume.
MANY = {"steps": 100_000, "lr_schedule": "constant", "warmup_steps": 0, "num_workers": 1}


def test_sigterm_saves_and_the_same_command_resumes(data, tmp_path):
    stopped, straight = tmp_path / "stopped", tmp_path / "straight"
    code, stderr = stop_when_trained(arguments(data, stopped, **MANY), stopped)
    assert code == 75
    assert stderr.splitlines()[-1].startswith("stopped: SIGTERM: saved after step ")
    status = read_status(stopped)
    assert (status["state"], status["exit_code"]) == ("preempted", 75)
    steps = status["step"] + 3
    changes = {**MANY, "steps": steps, "num_workers": 0}
    train_here(arguments(data, stopped, **changes))
    train_here(arguments(data, straight, **changes))
    assert largest_difference(stopped, straight) == 0.0
    for split in ("train", "val"):
        lines, expected = read_metrics(stopped, split), read_metrics(straight, split)
        assert [line["step"] for line in lines] == [line["step"] for line in expected]
        losses = [line["loss"] for line in lines]
        assert losses == pytest.approx([line["loss"] for line in expected], rel=1e-6)


# Bad input


def missing_dataset(folder: Path, data: Path) -> dict[str, Any]:
    return {"data_root": folder / "nowhere"}


def missing_annotation_file(folder: Path, data: Path) -> dict[str, Any]:
    return {"train_annotations": folder / "gone.json", "train_images": data / "train"}


def broken_json(folder: Path, data: Path) -> dict[str, Any]:
    (folder / "broken.json").write_text('{"images": [{"id": 1,')
    return {"val_annotations": folder / "broken.json", "val_images": data / "val"}


def no_validation_split(folder: Path, data: Path) -> dict[str, Any]:
    write_coco(folder / "one", 2)
    return {"data_root": folder / "one"}


def missing_images(folder: Path, data: Path) -> dict[str, Any]:
    annotations = data / "train" / "_annotations.coco.json"
    return {"train_annotations": annotations, "train_images": folder}


def unknown_flag(folder: Path, data: Path) -> dict[str, Any]:
    return {"learning_rat": 1}


def wrong_type(folder: Path, data: Path) -> dict[str, Any]:
    return {"steps": "many"}


def all_frozen(folder: Path, data: Path) -> dict[str, Any]:
    parts = ("image_encoder", "prompt_encoder", "mask_decoder")
    return {f"freeze_{part}": True for part in parts}


def odd_image_size(folder: Path, data: Path) -> dict[str, Any]:
    return {"image_size": 100}


def missing_checkpoint(folder: Path, data: Path) -> dict[str, Any]:
    return {"checkpoint_path": folder / "gone.pth"}


def no_checkpoint(folder: Path, data: Path) -> dict[str, Any]:
    return {"checkpoint_path": None}


def unreadable_checkpoint(folder: Path, data: Path) -> dict[str, Any]:
    (folder / "cut.pth").write_bytes(b"PK\3\4 this was a checkpoint")
    return {"checkpoint_path": folder / "cut.pth"}


def checkpoint_of_other_type(folder: Path, data: Path) -> dict[str, Any]:
    shutil.copy(PACKAGED_TINY, folder / "tiny.pth")
    return {"checkpoint_path": folder / "tiny.pth", "model_type": "vit_b"}


def no_sam(folder: Path, data: Path) -> dict[str, Any]:
    torch.save({"layer.weight": torch.zeros(3)}, folder / "other.pth")
    return {"checkpoint_path": folder / "other.pth"}


def output_is_a_file(folder: Path, data: Path) -> dict[str, Any]:
    (folder / "file").write_text("mine")
    return {"output_dir": folder / "file"}


def broken_resume(folder: Path, data: Path) -> dict[str, Any]:
    (folder / "last.ckpt").write_bytes(b"PK\3\4")
    return {"resume": folder / "last.ckpt"}


BAD_INPUT: list[tuple[Callable[[Path, Path], dict[str, Any]], tuple[str, ...]]] = [
    (missing_dataset, ("nowhere", "--data_root")),
    (missing_annotation_file, ("gone.json",)),
    (broken_json, ("broken.json", "not valid JSON")),
    (no_validation_split, ("no split val", "val_fraction")),
    (missing_images, ("image-missing, 13", "image_0.png", "--on_bad_image skip")),
    (unknown_flag, ("--learning_rat", "Did you mean --learning_rate?")),
    (wrong_type, ("--steps: 'many'", "a whole number")),
    (all_frozen, ("freeze_", "nothing would be trained")),
    (odd_image_size, ("image_size", "100", "96")),
    (missing_checkpoint, ("gone.pth", "auto")),
    (no_checkpoint, ("checkpoint_path is missing", "auto", "random")),
    (unreadable_checkpoint, ("cut.pth", "not a readable checkpoint")),
    (checkpoint_of_other_type, ("tiny.pth", "vit_b", "vit_tiny")),
    (no_sam, ("other.pth", "no SAM")),
    (output_is_a_file, ("output_dir", "choose another folder")),
    (broken_resume, ("last.ckpt", "cannot be read")),
]


def the_paragraph(stderr: str) -> str:
    """The one error in what was printed, which must not contain a traceback or empty lines."""
    assert "Traceback" not in stderr
    assert stderr.count("error: ") == 1
    paragraph = stderr.split("error: ")[1]
    assert paragraph.endswith("\n") and "\n\n" not in paragraph
    return paragraph


@pytest.mark.parametrize(
    ("prepare", "expected"), BAD_INPUT, ids=lambda v: getattr(v, "__name__", "")
)
def test_bad_input_is_one_paragraph_before_any_model(
    prepare, expected, data, tmp_path, monkeypatch, capsys
):
    def refuse_to_build(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr(build, "build_sam", refuse_to_build)
    changes = prepare(tmp_path, data)
    argv = arguments(changes.pop("data_root", data), changes.pop("output_dir", tmp_path / "run"))
    for name, value in changes.items():
        before = argv.index(f"--{name}") if f"--{name}" in argv else len(argv)
        new = [f"--{name}"] if value is True else [] if value is None else [f"--{name}", str(value)]
        argv[before : before + 2] = new
    assert command_here(argv) == 2
    paragraph = the_paragraph(capsys.readouterr().err)
    assert all(text in paragraph for text in expected), paragraph


def test_no_model_is_built_is_a_test_that_can_fail(data, tmp_path, monkeypatch, capsys):
    def refuse_to_build(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr(build, "build_sam", refuse_to_build)
    assert command_here(arguments(data, tmp_path / "run")) == 1
    assert "a model was built" in capsys.readouterr().err


def test_status_of_bad_input_is_left_for_the_launcher(data, tmp_path, monkeypatch, capsys):
    launcher_status = tmp_path / "launcher_status.json"
    monkeypatch.setenv("SAMFT_STATUS_FILE", str(launcher_status))
    assert command_here(arguments(data, tmp_path / "run", steps="many")) == 2
    status = json.loads(launcher_status.read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 2)
    assert command_here(arguments(tmp_path / "nowhere", tmp_path / "run")) == 2
    assert json.loads(launcher_status.read_text()) == read_status(tmp_path / "run")
    assert read_status(tmp_path / "run")["exit_code"] == 2


def test_command_ends_with_2_and_one_paragraph(tmp_path):
    ended = command(arguments(tmp_path / "nowhere", tmp_path / "run"))
    assert ended.returncode == 2
    assert the_paragraph(ended.stderr) and not ended.stdout


def test_two_processes_print_an_error_once(tmp_path):
    line = command_line(arguments(tmp_path / "nowhere", tmp_path / "run"), processes=2)
    code, output = run_preloaded(line, clean_environment(), timeout=COMMAND_SECONDS)
    assert code != 0
    assert output.count("error: There is no dataset folder") == 1
    assert output.count("check --data_root") == 1
    assert read_status(tmp_path / "run")["exit_code"] == 2


def test_broken_image_ends_the_run_with_its_name(data, tmp_path, capsys):
    write_coco(tmp_path, 3)
    (tmp_path / "train" / "image_1.png").write_bytes(b"\x89PNG\r\n")
    val = {"val_annotations": data / "val" / "_annotations.coco.json", "val_images": data / "val"}
    argv = arguments(tmp_path, tmp_path / "run", num_workers=1, **val)
    assert command_here(argv) == 2
    assert "image_1.png" in the_paragraph(capsys.readouterr().err)
    assert read_status(tmp_path / "run")["exit_code"] == 2


# Failures, and tracebacks


def test_run_that_is_not_finite_fails_with_1(data, tmp_path, capsys):
    assert command_here(arguments(data, tmp_path, learning_rate=1e30)) == 1
    assert "lower learning_rate" in the_paragraph(capsys.readouterr().err)
    status = read_status(tmp_path)
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert status["last_checkpoint"] == str(tmp_path / "last.ckpt")


def test_bug_fails_with_1_and_its_traceback(data, tmp_path, monkeypatch, capsys):
    def refuse_to_build(*_: Any, **__: Any) -> None:
        raise IndexError("a bug")

    monkeypatch.setattr(build, "build_sam", refuse_to_build)
    assert command_here(arguments(data, tmp_path)) == 1
    assert "Traceback" in capsys.readouterr().err
    status = read_status(tmp_path)
    assert (status["state"], status["exit_code"], status["reason"]) == ("failed", 1, "a bug")


@pytest.mark.parametrize("debug", [True, False])
def test_debug_shows_the_traceback_of_a_users_error(debug, tmp_path, capsys):
    assert command_here(arguments(tmp_path / "nowhere", tmp_path / "run", debug=debug)) == 2
    assert ("Traceback" in capsys.readouterr().err) is debug


def test_main_raises_what_the_command_reports(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        main(arguments(tmp_path / "nowhere", tmp_path / "run"))


def process_state() -> dict[str, Any]:
    """What a library must not change for the program that calls it."""
    root, ours = logging.getLogger(), logging.getLogger("samft")
    # PyTorch installs a handler of SIGCHLD with its first loader worker, once per process.
    numbers = signal.valid_signals() - {signal.SIGCHLD}
    return {
        "handlers": root.handlers[:],
        "levels": (root.level, ours.level),
        "warnings": warnings.showwarning,
        "signals": {number: signal.getsignal(number) for number in numbers},
    }


@pytest.mark.parametrize("learning_rate", [1e-3, 1e30], ids=["done", "failed"])
def test_main_leaves_the_callers_process_as_it_was(learning_rate, data, tmp_path, capsys):
    handler = logging.FileHandler(tmp_path / "mine.log")
    logging.getLogger().addHandler(handler)
    try:
        before, children = process_state(), multiprocessing.active_children()
        changes = {"steps": 6, "num_workers": 1, "learning_rate": learning_rate}
        code = command_here(arguments(data, tmp_path / "run", **changes))
        assert code == int(learning_rate > 1)
        assert process_state() == before
        # Those of other tests may have ended meanwhile
        assert not set(multiprocessing.active_children()) - set(children)
        logging.getLogger("mine").warning("the caller's own line")
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
    lines = (tmp_path / "mine.log").read_text().splitlines()
    assert any(line.startswith("step 0: val_per_mask_iou") for line in lines)
    assert lines[-1] == "the caller's own line"


# Exit codes under launch.sh


@pytest.mark.parametrize("code", [0, 1, 2, 75, 130])
def test_without_the_launcher_the_exit_code_is_that_of_the_run(code, monkeypatch):
    monkeypatch.delenv("SAMFT_STATUS_FILE", raising=False)
    assert exit_code_for_launcher(code) == code


@pytest.mark.parametrize(("code", "returned"), [(0, 0), (1, 1), (2, 0), (75, 0), (130, 0)])
def test_torchrun_restarts_only_what_may_succeed(code, returned, tmp_path, monkeypatch):
    status = tmp_path / "status.json"
    monkeypatch.setenv("SAMFT_STATUS_FILE", str(status))
    for rank, local_rank in (("0", "0"), ("1", "1")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert exit_code_for_launcher(code) == returned
        assert exit_code_for_launcher(code, is_stopping=True) == 0
    assert not status.exists()  # process 0 has written it, in more detail


@pytest.mark.parametrize(
    ("code", "state"), [(2, "failed"), (75, "preempted"), (130, "failed"), (1, None), (0, None)]
)
def test_the_launcher_of_another_host_gets_a_status_too(code, state, tmp_path, monkeypatch):
    status = tmp_path / "status.json"
    for name, value in {"SAMFT_STATUS_FILE": str(status), "RANK": "8", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert exit_code_for_launcher(code) == (code if state is None else 0)
    written = json.loads(status.read_text()) if status.exists() else {"state": None}
    assert written["state"] == state
    if state is not None:
        assert (written["exit_code"], written["reason"]) == (code, "see the host of process 0")
