"""objects.json: which validations it keeps, and what a resumed run reads from it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from samft.evaluation.object_scores import ObjectScores
from samft.reports.validation_images import FILE_NAME, PerObjectLog


def rows(iou: float) -> ObjectScores:
    ids = np.array([4, 5])
    areas, predicted, filled = np.array([9.0, 1.5]), np.array([0.1, 0.2]), np.array([0.7, 0.3])
    return ObjectScores(ids, ids, areas, np.array([iou, iou]), predicted, filled)


def open_log(folder: Path, start_step: int = 0, resumed_from: Path | None = None) -> PerObjectLog:
    return PerObjectLog(folder, resumed_from=resumed_from or folder, start_step=start_step)


def test_step_0_and_the_two_best_steps_are_kept(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    steps = [(0, 0.5), (10, 0.3), (20, 0.4), (30, 0.4), (40, 0.9), (50, 0.6)]
    assert [log.record_scores(*(step, rows(iou))) for step, iou in steps] == [
        False,  # step 0 is what the others are measured against
        True,
        True,
        False,  # of equals the earlier
        True,
        False,
    ]
    assert set(json.loads((tmp_path / FILE_NAME).read_text())) == {"0", "20", "40"}
    for step, iou in ((0, 0.5), (20, 0.4), (40, 0.9)):
        scores = log.read(step)
        assert scores is not None and scores.iou_actual.tolist() == [iou, iou]
    assert log.read(10) is None and log.read(None) is None


def test_a_resumed_run_keeps_the_entries_up_to_its_step(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    for step, iou in ((0, 0.5), (10, 0.6), (20, 0.8)):
        log.record_scores(step, rows(iou))
    again = open_log(tmp_path, start_step=10)
    assert again.read(20) is None
    best = again.read(10)
    assert best is not None and best.areas.tolist() == [9.0, 1.5]
    assert best.iou_box_fill.tolist() == [0.7, 0.3]
    assert best.image_ids.dtype == np.int64
    assert again.record_scores(20, rows(0.7)) and not again.record_scores(30, rows(0.65))


def test_a_run_resumed_from_another_folder_keeps_its_entries(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    open_log(tmp_path / "old").record_scores(0, rows(0.5))
    log = open_log(tmp_path, start_step=5, resumed_from=tmp_path / "old")
    log.record_scores(10, rows(0.6))
    assert set(json.loads((tmp_path / FILE_NAME).read_text())) == {"0", "10"}


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b'{"a": {}}', b'{"0": {"areas": [1]}}', b'{"0": 1}', b"[" * 100_000]
    + [bytes(30), b"\xff\xfe{}"],
)
def test_a_damaged_file_counts_as_none_and_is_named(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    log = open_log(tmp_path)
    assert log.read(0) is None
    assert f"{FILE_NAME} is damaged" in caplog.text
    assert log.record_scores(5, rows(0.5))


@pytest.mark.parametrize(
    "columns",
    [{"areas": [1.0]}, {"areas": "many"}, {"image_ids": [1e400, 2]}, {"object_ids": [[4], [5]]}],
)
def test_damaged_scores_of_a_step_cost_no_other(tmp_path: Path, columns: dict[str, Any]) -> None:
    log = open_log(tmp_path)
    for step in (0, 10):
        log.record_scores(step, rows(0.5))
    document = json.loads((tmp_path / FILE_NAME).read_text())
    document["0"].update(columns)
    (tmp_path / FILE_NAME).write_text(json.dumps(document))
    again = open_log(tmp_path, start_step=10)
    assert again.read(0) is None and again.read(10) is not None


def test_a_full_disk_is_logged_and_not_raised(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("samft.reports.validation_images.write_text", refuse)
    log = open_log(tmp_path)
    assert log.record_scores(5, rows(0.5)) and log.read(5) is not None
    assert "No space left on device" in caplog.text


def test_the_general_set_is_kept_with_the_steps_of_validation(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    for step, iou in ((0, 0.5), (10, 0.6), (20, 0.8), (30, 0.7), (40, 0.9)):
        log.record_scores(step, rows(iou), general=rows(1 - iou))  # which decides on nothing
    assert set(json.loads((tmp_path / FILE_NAME).read_text())) == {"0", "20", "40"}
    again = open_log(tmp_path, start_step=20)
    for kept in (log, again):
        scores = kept.read_general(20)
        assert scores is not None and scores.iou_actual.tolist() == pytest.approx([0.2, 0.2])
    assert log.read_general(10) is None and again.read_general(40) is None
    assert again.record_scores(30, rows(0.95)) and again.read_general(30) is None  # without one
    before = open_log(tmp_path, start_step=30).read_general(0)
    assert before is not None and before.iou_actual.tolist() == [0.5, 0.5]


def test_damaged_scores_of_the_general_set_cost_no_others(tmp_path: Path, caplog: Any) -> None:
    open_log(tmp_path).record_scores(0, rows(0.5), general=rows(0.4))
    document = json.loads((tmp_path / FILE_NAME).read_text())
    document["0"]["general"]["areas"] = [1.0]
    (tmp_path / FILE_NAME).write_text(json.dumps(document))
    log = open_log(tmp_path)
    assert log.read(0) is not None and log.read_general(0) is None
    assert "the scores of step 0 left out" in caplog.text
