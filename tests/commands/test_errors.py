"""How a command ends: its exit code, its message, and which rank prints it."""

import argparse
import errno
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.short_runs import COMMAND_SECONDS, clean_environment
from helpers.terminal import terminal
from samft.cli import CommandParser, exit_code, run_command
from samft.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    RunStopped,
    SharedError,
    TrainingError,
    UserError,
    fold_for_terminal,
)

ENDINGS = [
    (None, 0),
    (ConfigError("c"), 2),
    (DataError("d"), 2),
    (CheckpointError("k"), 2),
    (SharedError("s"), 2),
    (UserError("u"), 2),
    (TrainingError("t"), 1),
    (RunStopped("w"), 75),
    (KeyboardInterrupt(), 130),
    (RuntimeError("bug"), 1),
]


def command(error: BaseException | None):
    def main(argv: list[str]) -> None:
        if error is not None:
            raise error

    return main


@pytest.fixture(autouse=True)
def _rank_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)


@pytest.mark.parametrize("error, code", ENDINGS)
def test_each_ending_has_its_exit_code(error: BaseException | None, code: int) -> None:
    assert exit_code(error) == code
    assert run_command(command(error), []) == code


def test_user_errors_are_value_errors() -> None:
    assert issubclass(UserError, ValueError)
    assert all(issubclass(e, UserError) for e in (ConfigError, DataError, CheckpointError))
    assert not issubclass(TrainingError, UserError)


@pytest.mark.parametrize("error", [DataError("no folder x."), TrainingError("no folder x.")])
def test_an_expected_error_is_one_line_without_a_traceback(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    run_command(command(error), ["--steps", "3"])
    captured = capsys.readouterr()
    assert captured.err == "error: no folder x.\n"
    assert captured.out == ""


def test_debug_adds_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    run_command(command(DataError("no folder x.")), ["--debug"])
    text = capsys.readouterr().err
    assert text.startswith("Traceback")
    assert text.endswith("error: no folder x.\n")


def test_a_bug_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    run_command(command(ZeroDivisionError("oops")), [])
    text = capsys.readouterr().err
    assert text.startswith("Traceback")
    assert "ZeroDivisionError: oops" in text


def test_being_stopped_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    run_command(command(RunStopped("saved at step 7.")), [])
    run_command(command(KeyboardInterrupt()), [])
    assert capsys.readouterr().err == "stopped: saved at step 7.\nstopped: interrupted\n"


@pytest.mark.parametrize(
    "error, printed",
    [
        (ConfigError("x"), ""),  # the same on every rank: rank 0 prints it
        (RunStopped("x"), ""),
        (SharedError("x"), ""),
        (DataError("x"), "[rank 1] error: x\n"),
        (TrainingError("x"), "[rank 1] error: x\n"),
    ],
)
def test_what_ranks_other_than_zero_print(
    error: Exception,
    printed: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run_command(command(error), []) == exit_code(error)
    assert capsys.readouterr().err == printed


def test_arguments_reach_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    run_command(seen.append, ["--a", "1"])
    monkeypatch.setattr("sys.argv", ["program", "--b"])
    run_command(seen.append)
    assert seen == [["--a", "1"], ["--b"]]


@pytest.fixture
def error_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which torchrun looks for the exception of this process."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setattr("faulthandler.enable", lambda **_: None)  # pytest has enabled its own
    return tmp_path / "error.json"


def test_a_bug_is_reported_to_torchrun(error_file: Path) -> None:
    assert run_command(command(ZeroDivisionError("oops")), []) == 1
    reported = json.loads(error_file.read_text())["message"]
    assert reported["message"] == "ZeroDivisionError: oops"
    assert "in main" in reported["extraInfo"]["py_callstack"]


@pytest.mark.parametrize("error", [e for e, _ in ENDINGS if type(e) is not RuntimeError])
def test_no_other_ending_is_reported_to_torchrun(
    error: BaseException | None, error_file: Path
) -> None:
    run_command(command(error), [])
    assert not error_file.exists()


def test_a_bug_is_reported_even_if_the_file_cannot_be_written(
    error_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error_file.mkdir()
    assert run_command(command(ZeroDivisionError("oops")), []) == 1
    assert capsys.readouterr().err.endswith("ZeroDivisionError: oops\n")


BUGGY_COMMAND = """
import sys
from samft.cli import run_command

def main(argv):
    return 1 / 0

sys.exit(run_command(main))
"""


def test_torchrun_names_the_rank_and_the_exception_of_a_bug(tmp_path: Path) -> None:
    (tmp_path / "buggy.py").write_text(BUGGY_COMMAND)
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", str(tmp_path / "buggy.py")],
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
        env=clean_environment(),
        check=False,
    )
    assert ended.returncode == 1
    summary = ended.stderr.partition("Root Cause (first observed failure)")[2]
    assert "rank      : 0 " in summary and "host      : " in summary
    assert "in main" in summary and "ZeroDivisionError: division by zero" in summary


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.ENOSPC, "make room"), (errno.EFBIG, "make room"), (errno.EMFILE, "ulimit -n")],
)
def test_an_error_of_the_host_is_one_sentence(
    number: int, advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(argv: list[str]) -> None:
        raise OSError(number, os.strerror(number), "run/summary.json")

    assert run_command(fail, []) == 1
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ") and stderr.count("\n") == 1
    assert os.strerror(number) in stderr and advice in stderr


LONG = (
    "The folder /data/photographs/of/some/butterflies/in/a/garden holds no split: run "
    "`samft check --data_root /data/photographs` or rename 'a split' in it."
)


def test_a_terminal_breaks_lines_between_words() -> None:
    with terminal(columns=60) as screen:
        assert fold_for_terminal(LONG, screen.stream).split("\n") == [
            "The folder /data/photographs/of/some/butterflies/in/a/garden",
            "  holds no split: run",
            "  `samft check --data_root /data/photographs` or rename",
            "  'a split' in it.",
        ]
        short = "x" * 29 + " " + "y" * 30
        assert fold_for_terminal(short, screen.stream) == short
        assert fold_for_terminal(f"{short}z", screen.stream).count("\n") == 1
        # More than fits into a line is left to the terminal, whole.
        path = "/" + "p" * 80
        assert fold_for_terminal(f"See {path} there.", screen.stream).split("\n") == [
            "See",
            f"  {path}",
            "  there.",
        ]


def test_further_lines_of_a_paragraph_keep_their_margin() -> None:
    text = f"two problems:\n  - {'word ' * 12}\n  - b    c"
    with terminal(columns=40) as screen:
        lines = fold_for_terminal(text, screen.stream, indent=9).split("\n")
    folded = ["  - word word word word word word word", "    word word word word word"]
    assert lines == ["two problems:", *folded, "  - b    c"]


def test_files_pipes_and_narrow_terminals_get_whole_lines(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file, terminal(columns=39) as narrow:
        streams = [None, file, io.StringIO(), narrow.stream]
        assert [fold_for_terminal(LONG, stream) for stream in streams] == [LONG] * 4
    assert fold_for_terminal(LONG, file) == LONG  # closed


def test_errors_are_printed_for_the_terminal_that_they_go_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with terminal(columns=60) as screen:
        monkeypatch.setattr(sys, "stderr", screen.stream)
        run_command(command(DataError(LONG)), [])
        lines = screen.lines()
    assert lines[0] == "error: The folder" and lines[-1] == "  rename 'a split' in it."


@pytest.mark.parametrize("flag", ["--side", "--share"])
@pytest.mark.parametrize("value", ["nan", "inf", "1e999", "1" + 30 * "0", "two"])
def test_flags_take_finite_numbers(flag: str, value: str) -> None:
    parser = CommandParser("predict", "")
    parser.add_argument("--side", type=int)
    parser.add_argument("--share", type=float)
    if (flag, value) == ("--share", "1" + 30 * "0"):
        assert parser.parse_args([flag, value]).share == 1e30
        return
    with pytest.raises(ConfigError, match=f"^argument {flag}: '?{re.escape(value)}"):
        parser.parse_args([flag, value])
    assert parser.parse_args(["--side", "-3", "--share", "-1e3"]) == argparse.Namespace(
        side=-3, share=-1000.0
    )
