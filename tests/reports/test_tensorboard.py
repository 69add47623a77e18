"""TensorBoard's files: curves of a resumed run, groups of charts, and a disk that is full."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from tensorboard.summary.writer import event_file_writer

from helpers.damage import room_for
from helpers.trackers import a_board, check_same_curves, curves_of_metrics, read_events
from helpers.trackers import tensorboard_curves as curves_of_board
from samft.runtime.logs import RunLog


@pytest.fixture(autouse=True)
def _ordered_files(monkeypatch: pytest.MonkeyPatch) -> None:
    # Files of one second are read in the order of this number as text: 10 would precede 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def write_steps(folder: Path, steps: range, *, start_step: int = 0) -> None:
    with closing(RunLog(folder, main=True, steps=9, start_step=start_step)) as log:
        log.trackers = [a_board(folder, start_step=start_step, lines=log.read_metrics())]
        for step in steps:
            log.write_metrics(step, "train", {"loss": step / 4, "lr": 0.5, "skipped_steps": 0})
            log.write_metrics(step, "val", {"per_mask_iou": step / 8, "loss": step / 3})


def test_curves_are_those_of_the_file_also_after_a_crash(tmp_path: Path) -> None:
    write_steps(tmp_path, range(6))
    write_steps(tmp_path, range(4, 7), start_step=3)  # as if nothing after step 3 had been saved
    check_same_curves(curves_of_board(tmp_path), curves_of_metrics(tmp_path))


def test_a_run_that_had_no_board_shows_its_lines_from_the_first(tmp_path: Path) -> None:
    with closing(RunLog(tmp_path, main=True, steps=9)) as log:
        log.write_metrics(0, "val", {"per_mask_iou": 0.5})
        log.write_metrics(2, "train", {"loss": 0.25})
    write_steps(tmp_path, range(3, 5), start_step=2)
    check_same_curves(curves_of_board(tmp_path), curves_of_metrics(tmp_path))


def test_train_and_val_share_charts_and_iou_and_losses_come_first(tmp_path: Path) -> None:
    write_steps(tmp_path, range(2))
    tags = {split: read_events(tmp_path, split).Tags()["scalars"] for split in ("train", "val")}
    assert set(tags["train"]) == {"loss/loss", "run/lr", "run/skipped_steps"}
    assert set(tags["val"]) == {"iou/per_mask_iou", "loss/loss"}
    groups = sorted({tag.split("/")[0] for tag in (*tags["train"], *tags["val"])})
    assert groups == ["iou", "loss", "run"]  # TensorBoard unfolds the first two


def test_the_general_set_has_charts_among_those_of_iou_and_losses(tmp_path: Path) -> None:
    with closing(a_board(tmp_path)) as board:
        board.add_scalars(5, "val", {"general_per_mask_iou": 0.5, "general_loss_dice": 0.25})
    tags = read_events(tmp_path, "val").Tags()["scalars"]
    assert set(tags) == {"iou/general_per_mask_iou", "loss/general_loss_dice"}


def test_what_is_no_curve_makes_no_chart(tmp_path: Path) -> None:
    settings = {"seed": 0, "val_fraction": None, "amp": "off"}
    with closing(a_board(tmp_path, settings=settings)) as board:
        board.add_scalars(5, "val", {"loss": 0.5})
        board.add_pictures(5, {"same_objects": np.zeros((4, 5, 3), np.uint8)})
        board.add_results({"best_step": 5.0})
    events = read_events(tmp_path)
    assert events.Tags()["scalars"] == []
    config, results = (events.Tensors(f"{name}/text_summary") for name in ("config", "results"))
    assert b"    seed: 0" in config[0].tensor_proto.string_val[0]
    assert results[0].tensor_proto.string_val == [b"    best_step: 5.0"]
    assert "_hparams_/session_start_info" in events.summary_metadata
    picture = read_events(tmp_path, "val").Images("masks/same_objects")[0]
    assert (picture.step, picture.height, picture.width) == (5, 4, 5)


def test_a_full_disk_is_one_line_and_no_failure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(a_board(tmp_path)) as board, room_for(0):
        for step in range(3):
            board.add_scalars(step, "val", {"loss": 0.5})
    assert caplog.text.count("tensorboard/ cannot be written") == 1
