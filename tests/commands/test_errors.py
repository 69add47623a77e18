"""Endings of a command: exit codes, one paragraph, and which rank speaks."""

import pytest

from samft.cli import exit_code, run_command
from samft.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    RunStopped,
    SharedError,
    TrainingError,
    UserError,
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
    "error, said",
    [
        (ConfigError("x"), ""),  # every rank finds the same: rank 0 says it
        (RunStopped("x"), ""),
        (SharedError("x"), ""),
        (DataError("x"), "[rank 1] error: x\n"),
        (TrainingError("x"), "[rank 1] error: x\n"),
    ],
)
def test_what_ranks_other_than_zero_say(
    error: Exception, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run_command(command(error), []) == exit_code(error)
    assert capsys.readouterr().err == said


def test_arguments_reach_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    run_command(seen.append, ["--a", "1"])
    monkeypatch.setattr("sys.argv", ["program", "--b"])
    run_command(seen.append)
    assert seen == [["--a", "1"], ["--b"]]
