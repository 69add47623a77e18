"""metrics.jsonl, trackers and log lines; what a resumed run forgets; silence of other ranks."""

import json
import logging
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.damage import room_for
from helpers.terminal import terminal
from samft.runtime.logs import (
    LOGGER,
    WITH_COMMANDS,
    RunLog,
    Tracker,
    format_duration,
    logging_to_terminal,
    progress_bar,
)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    text = (folder / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def write_steps(folder: Path, steps: range, *, start_step: int = 0) -> None:
    with closing(RunLog(folder, main=True, steps=9, start_step=start_step)) as log:
        for step in steps:
            log.write_metrics(step, "train", {"loss": step / 4})
            log.write_metrics(step, "val", {"per_mask_iou": step / 8})


def test_one_line_a_record(tmp_path: Path) -> None:
    with closing(RunLog(tmp_path, main=True, steps=9)) as log:
        log.write_metrics(0, "val", {"per_mask_iou": 0.5, "loss": math.nan, "lr": math.inf})
        assert len(lines_of(tmp_path)) == 1  # written at once, not at the end
        log.write_metrics(3, "train", {"loss": 1e-7})
    assert lines_of(tmp_path) == [
        {"step": 0, "split": "val", "per_mask_iou": 0.5, "loss": None, "lr": None},
        {"step": 3, "split": "train", "loss": 1e-7},
    ]


def test_a_resumed_run_drops_the_lines_after_its_checkpoint(tmp_path: Path) -> None:
    write_steps(tmp_path, range(6))
    write_steps(tmp_path, range(4, 8), start_step=3)
    records = [(record["step"], record["split"]) for record in lines_of(tmp_path)]
    assert records == [(step, split) for step in range(8) for split in ("train", "val")]


@pytest.mark.parametrize("cut", [1, 20])
def test_a_line_that_a_crash_cut_short_is_dropped(tmp_path: Path, cut: int) -> None:
    write_steps(tmp_path, range(3))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 3, "split": "train", "loss": 0.5}'[:-cut])
    write_steps(tmp_path, range(3, 4), start_step=3)
    assert [record["step"] for record in lines_of(tmp_path)] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_whole_line_without_its_end_is_kept_apart_from_the_next(tmp_path: Path) -> None:
    write_steps(tmp_path, range(2))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().rstrip("\n"))
    write_steps(tmp_path, range(2, 3), start_step=1)
    assert [record["step"] for record in lines_of(tmp_path)] == [0, 0, 1, 1, 2, 2]


GARBAGE = {
    "a bit": b'{"step": 1, "split": "train", "lo\xf3s": 0.25}',
    "zeros": bytes(40),
    "half a line": b'{"step": 1, "spl',
    "two in one": b'{"step": 1, "split": "train"}{"step": 1, "split": "val"}',
    "nested": b"[" * 100_000,
    "no object": b"[1, 2]",
    "a text as step": b'{"step": "1", "split": "train"}',
    "a boolean as step": b'{"step": true, "split": "train"}',
    "a step below 0": b'{"step": -1, "split": "train"}',
    "a huge step": b'{"step": 1e400, "split": "train"}',
    "a huge number": b'{"step": 1, "split": "train", "loss": 1e400}',
    "a huge whole number": b'{"step": 1, "split": "train", "loss": 1' + b"0" * 400 + b"}",
    "no number": b'{"step": 1, "split": "train", "loss": NaN}',
    "a text as loss": b'{"step": 1, "split": "train", "loss": "low"}',
    "of something else": b'{"epoch": 3, "loss": 0.5}',
    "another split": b'{"step": 1, "split": ["train"]}',
}


@pytest.mark.parametrize("kind", GARBAGE)
@pytest.mark.parametrize("place", [0, 3])
def test_a_damaged_line_costs_no_other_and_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, place: int
) -> None:
    write_steps(tmp_path, range(4))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes().splitlines(keepends=True)
    before = b"".join([*whole[:place], GARBAGE[kind] + b"\n", *whole[place:]])
    path.write_bytes(before)
    write_steps(tmp_path, range(4, 5), start_step=3)
    assert path.read_bytes().startswith(b"".join(whole))  # to the letter
    assert [record["step"] for record in lines_of(tmp_path)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert f"line {place + 1} is damaged or repeated" in caplog.text
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == before


def test_a_line_that_stands_there_twice_counts_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_steps(tmp_path, range(3))
    path = tmp_path / "metrics.jsonl"
    path.write_text("\ufeff" + path.read_text().replace("\n", "\r\n\n") * 2, newline="")
    write_steps(tmp_path, range(0), start_step=2)
    assert [record["step"] for record in lines_of(tmp_path)] == [0, 0, 1, 1, 2, 2]
    assert "lines 13, 15, 17 and 3 more are damaged or repeated" in caplog.text


@pytest.mark.parametrize("fault", ["flip", "step", "cut"])
def test_a_changed_line_that_is_whole_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    write_steps(tmp_path, range(3))
    with closing(RunLog(tmp_path, main=True, steps=5, start_step=2)) as log:
        saved = log.metrics_state
        log.write_metrics(3, "train", {"loss": 3.0})  # after the checkpoint
    path = tmp_path / "metrics.jsonl"
    before = path.read_text()
    for text in (before, damage_line(before, fault)):
        path.write_text(text)
        caplog.clear()
        RunLog(tmp_path, main=True, steps=5, start_step=2, metrics_state=saved).close()
        assert ("not as this run has written them" in caplog.text) == (text != before)


def damage_line(text: str, fault: str) -> str:
    lines = text.splitlines(keepends=True)
    if fault == "cut":
        return "".join(lines[:3])
    old, new = ('"step": 1', '"step": 9') if fault == "step" else (": 0.25", ": 0.75")
    assert old in lines[2]
    return "".join([*lines[:2], lines[2].replace(old, new), *lines[3:]])


def test_whole_metrics_are_not_written_anew(tmp_path: Path) -> None:
    write_steps(tmp_path, range(3))
    with room_for(0):  # a run that is finished can be started again on a full disk
        with closing(RunLog(tmp_path, main=True, steps=3, start_step=2)) as log:
            assert [record["step"] for record in log.read_metrics()] == [0, 0, 1, 1, 2, 2]


class Recorder(Tracker):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def add_scalars(self, step: int, split: str, values: dict[str, float]) -> None:
        self.calls.append((step, split, values))

    def add_pictures(self, step: int, pictures: dict[str, np.ndarray]) -> None:
        self.calls.append((step, sorted(pictures)))

    def add_results(self, results: dict[str, float]) -> None:
        self.calls.append((results,))

    def close(self) -> None:
        self.calls.append(("closed",))


def test_trackers_get_the_finite_numbers_of_each_line(tmp_path: Path) -> None:
    recorder = Recorder()
    with closing(RunLog(tmp_path, main=True, steps=9)) as log:
        log.trackers = [recorder]
        log.write_metrics(0, "val", {"per_mask_iou": 0.5, "loss": math.nan})
        log.add_pictures(0, {"masks": np.zeros((4, 5, 3), np.uint8)})
        log.write_metrics(3, "train", {"loss": 1e-7, "skipped_steps": 0})
        log.add_results({"best": 0.5})
    assert recorder.calls == [
        (0, "val", {"per_mask_iou": 0.5}),
        (0, ["masks"]),
        (3, "train", {"loss": 1e-7, "skipped_steps": 0}),
        ({"best": 0.5},),
        ("closed",),
    ]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with closing(RunLog(tmp_path, main=False, steps=9)) as log:
        log.write_metrics(1, "train", {"loss": 1.0})
        log.add_pictures(1, {"masks": np.zeros((4, 5, 3), np.uint8)})
        log.add_results({"best": 0.5})
        log.advance_bar(loss="1.0")
        LOGGER.warning("printed, not written")
    assert os.listdir(tmp_path) == []


def test_the_log_file_has_what_was_logged_since_logging_began(tmp_path: Path) -> None:
    LOGGER.warning("too early")
    with logging_to_terminal(0):
        LOGGER.info("before the file was opened")
        with closing(RunLog(tmp_path, main=True, steps=9)):
            LOGGER.info("in time")
            LOGGER.debug("too fine")
        LOGGER.info("too late")
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line[24:] for line in lines] == ["before the file was opened", "in time"]


def test_closing_twice_is_no_error(tmp_path: Path) -> None:
    before = list(logging.getLogger().handlers)
    log = RunLog(tmp_path, main=True, steps=9)
    log.close()
    log.close()
    log.write_metrics(1, "train", {"loss": 1.0})
    assert lines_of(tmp_path) == []
    assert logging.getLogger().handlers == before


def test_the_bar_is_off_without_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(RunLog(tmp_path, main=True, steps=9)) as log:
        log.advance_bar(loss="1.0")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "rank, lines",
    [(0, ["note", "careful", "broken"]), (1, ["[rank 1] careful", "[rank 1] broken"])],
)
def test_other_ranks_only_warn_and_fail(
    rank: int, lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with logging_to_terminal(rank):
        LOGGER.info("note")
        LOGGER.warning("careful")
        LOGGER.error("broken")
        logging.getLogger("another.library").info("chatter")
    assert [line[9:] for line in capsys.readouterr().err.splitlines()] == lines


def test_warnings_are_logged(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with logging_to_terminal(1):
            warnings.warn("mind the step", stacklevel=1)
    assert "[rank 1] " in (text := capsys.readouterr().err) and "mind the step" in text


def logging_state() -> tuple[Any, ...]:
    root = logging.getLogger()
    return root.handlers[:], root.level, LOGGER.handlers[:], LOGGER.level, warnings.showwarning


@pytest.mark.parametrize("rank", [0, 1])
def test_logging_is_restored_when_the_block_ends_or_fails(tmp_path: Path, rank: int) -> None:
    before = logging_state()
    with logging_to_terminal(rank), closing(RunLog(tmp_path, main=rank == 0, steps=9)):
        assert logging_state() != before
    assert logging_state() == before
    with pytest.raises(KeyError), logging_to_terminal(rank):
        raise KeyError
    assert logging_state() == before


@pytest.fixture
def root_handlers() -> Iterator[list[logging.Handler]]:
    """The handlers of the root logger, which are as before after the test."""
    root = logging.getLogger()
    before = root.handlers[:]
    yield root.handlers
    root.handlers = before


def test_handlers_of_the_caller_stay_and_get_the_lines(
    tmp_path: Path, root_handlers: list[logging.Handler]
) -> None:
    own_log = logging.FileHandler(tmp_path / "own.log")
    root_handlers.append(own_log)
    with logging_to_terminal(0), closing(RunLog(tmp_path, main=True, steps=9)):
        LOGGER.info("for both")
    LOGGER.warning("afterwards")
    own_log.close()
    assert (tmp_path / "own.log").read_text() == "for both\nafterwards\n"
    assert (tmp_path / "train.log").read_text().endswith(" for both\n")


def test_a_caller_who_logs_to_the_terminal_sees_each_line_once(
    capsys: pytest.CaptureFixture[str], root_handlers: list[logging.Handler]
) -> None:
    root_handlers.append(logging.StreamHandler())
    with logging_to_terminal(0):
        LOGGER.info("once")
    assert capsys.readouterr().err == "once\n"


def test_warnings_that_the_caller_logs_are_logged_afterwards_too() -> None:
    logging.captureWarnings(True)
    try:
        captured = warnings.showwarning
        with logging_to_terminal(0):
            pass
        assert warnings.showwarning is captured
    finally:
        logging.captureWarnings(False)


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0:00"), (5.4, "0:05"), (59.6, "1:00"), (3599.4, "59:59"), (3600, "1:00:00")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
    assert format_duration(100 * 3600 + 62) == "100:01:02"


def test_a_bad_step_is_written_with_its_images(tmp_path: Path) -> None:
    with closing(RunLog(tmp_path, main=True, steps=9)) as log:
        log.write_bad_step(3, position=4, image_ids=[[1, 2], [3]])
        log.write_bad_step(3, position=5, image_ids=[[7], []])
    lines = [json.loads(line) for line in (tmp_path / "bad_steps.jsonl").read_text().splitlines()]
    assert lines == [
        {"after_step": 3, "position": 4, "image_ids": [[1, 2], [3]]},
        {"after_step": 3, "position": 5, "image_ids": [[7], []]},
    ]


def test_other_ranks_write_no_bad_step(tmp_path: Path) -> None:
    with closing(RunLog(tmp_path, main=False, steps=9)) as log:
        log.write_bad_step(3, position=4, image_ids=[[1]])
    assert os.listdir(tmp_path) == []


# More and less than half of the line fits: what is left of it would fit, too, or would not.
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 0.9])
def test_lines_that_a_full_disk_refuses_are_written_later_and_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, share: float
) -> None:
    with closing(RunLog(tmp_path, main=True, steps=9)) as log:
        log.write_bad_step(1, position=1, image_ids=[[1]])
        path = tmp_path / "bad_steps.jsonl"
        before = path.read_text()
        with room_for(len(before) + int(share * len(before))):
            log.write_bad_step(2, position=2, image_ids=[[2]])
            assert path.read_text() == before
            log.write_bad_step(3, position=3, image_ids=[[3]])
            assert path.read_text() == before
        log.write_bad_step(4, position=4, image_ids=[[4]])
        log.write_bad_step(5, position=5, image_ids=[[5]])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["position"] for line in lines] == [1, 2, 3, 4, 5]
    errors = [text for text in caplog.messages if "bad_steps.jsonl cannot be written" in text]
    assert len(errors) == 2


def test_a_full_disk_does_not_make_logging_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with logging_to_terminal(0), closing(RunLog(tmp_path, main=True, steps=9)) as log:
        with room_for(0):
            log.write_metrics(1, "train", {"loss": 0.5})
            LOGGER.info("a line that only the terminal gets")
            LOGGER.info("and another")
            log.write_metrics(1, "val", {"per_mask_iou": 0.25})
        log.write_metrics(2, "train", {"loss": 0.25})
    assert [(line["step"], line["split"]) for line in lines_of(tmp_path)] == [
        (1, "train"),
        (1, "val"),
        (2, "train"),
    ]
    stderr = capsys.readouterr().err
    assert "Traceback" not in stderr and "Logging error" not in stderr
    assert stderr.count("train.log cannot be written") == 1
    assert "a line that only the terminal gets" in stderr and "and another" in stderr


def test_modules_that_only_log_import_no_torch() -> None:
    code = "import sys, samft.runtime.logs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Progress


class Clock:
    seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("tqdm.std.time", clock)
    return clock


def test_without_a_terminal_progress_is_a_line_every_minute(clock: Clock, capfd) -> None:
    with progress_bar(total=400, unit="image", desc="looking") as bar:
        for _ in range(200):  # one a second
            bar.update()
            clock.seconds += 1
    lines = capfd.readouterr().err.splitlines()
    assert lines == [
        "looking: 61 of 400 images after 01:00, 05:33 left",
        "looking: 121 of 400 images after 02:00, 04:37 left",
        "looking: 181 of 400 images after 03:00, 03:38 left",
    ]


def test_what_takes_less_than_a_minute_or_is_hidden_prints_nothing(clock: Clock, capfd) -> None:
    for item in progress_bar(range(59), unit="image"):
        clock.seconds += item >= 0
    with progress_bar(total=9, unit="image", hidden=True) as bar:
        clock.seconds += 300
        bar.update()
    assert capfd.readouterr().err == ""


def test_lines_of_the_log_do_not_bring_the_progress_again(clock: Clock, tmp_path, capfd) -> None:
    with logging_to_terminal(0), closing(RunLog(tmp_path, main=True, steps=100)) as log:
        for step in range(100):
            clock.seconds += 10
            log.advance_bar()
            LOGGER.info("step %d", step)
    lines = capfd.readouterr().err.splitlines()
    assert sum("of 100 steps" in line for line in lines) == 1000 // 60
    assert len(lines) == 100 + 1000 // 60


def test_a_line_for_a_terminal_goes_on_below_its_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sentence = "a line of more than sixty columns in all goes on, in a second line"
    with terminal(columns=60) as screen:
        monkeypatch.setattr(sys, "stderr", screen.stream)
        with logging_to_terminal(0), closing(RunLog(tmp_path, main=True, steps=9)):
            LOGGER.info(sentence)
            LOGGER.info("commands:\n%s", sentence, extra=WITH_COMMANDS)
        lines = [line for line in screen.lines() if "line" in line]
    assert [line.split(" ", 1)[1] for line in lines] == [
        "a line of more than sixty columns in all goes on,",
        "        in a second line",
        f" {sentence}",
    ]
    assert (tmp_path / "train.log").read_text().count(sentence) == 2
