"""The study of how much to train on how many images: its splits, its rows, its table."""

import json
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import data_sizes
from benchmarks.data_sizes import UNTOUCHED, Run, Study, make_rows
from benchmarks.quality_scores import RunScores


@pytest.fixture
def tiny_study(tmp_path, monkeypatch) -> Study:
    monkeypatch.setattr(data_sizes, "_NUM_DRAWN", 7)
    monkeypatch.setattr(data_sizes, "_EVERYDAY", "filaments")
    return Study(tmp_path, steps=1)


@pytest.mark.parametrize(("images", "in_val", "in_train"), [(5, 1, 4), (7, 1, 6), (0, 1, 6)])
def test_a_fifth_of_the_chosen_images_stops_the_run(tiny_study, images, in_val, in_train) -> None:
    def ids(path: str) -> list[int]:
        document: dict[str, Any] = json.loads(Path(path).read_text())
        kept = {one["id"] for one in document["images"]}
        assert kept == {one["image_id"] for one in document["annotations"]}
        return sorted(kept)

    drawn = []
    for seed in (0, 1, 0):
        run = Run("cells", images, "decoder", seed)
        (tiny_study.folder / run.name).mkdir(exist_ok=True)
        data, number = tiny_study._write_data(run, tiny_study.folder / run.name)
        val, train = ids(data["val_annotations"]), ids(data["train_annotations"])
        assert (len(val), len(train)) == (in_val, in_train) and number == in_val + in_train
        assert not set(val) & set(train)
        drawn.append((val, train))
    assert drawn[0] == drawn[2] != drawn[1]


def write_row(folder: Path, run: Run, ious: list[float], **row: Any) -> None:
    columns = {one.name: np.zeros(len(ious)) for one in fields(RunScores)}
    columns |= {"iou": np.array(ious), "iou_box_fill": np.full(len(ious), 0.5)}
    columns |= {name: np.arange(len(ious)) for name in ("image_ids", "object_ids")}
    for part in ("test", "general"):
        RunScores(**columns).write(folder / run.name / f"{part}.npz")
    facts = {"test": float(np.mean(ious)), "best_step": 3, "images": 5, **row}
    (folder / run.name / "row.json").write_text(json.dumps(facts))


def test_the_table_has_the_gain_and_the_share_of_objects_harmed(tmp_path) -> None:
    write_row(tmp_path, Run("cells", 0, UNTOUCHED, 0), [0.5, 0.5, 0.5, 0.5])
    for seed in (0, 1):
        write_row(tmp_path, Run("cells", 5, "decoder", seed), [0.7, 0.7, 0.7, 0.3])
    write_row(tmp_path, Run("cells", 5, "lora_8", 0), [0.7, 0.7, 0.7, 0.3])  # seed 1 has not run
    args = SimpleNamespace(
        output_dir=tmp_path,
        datasets=["cells"],
        images=[5],
        recipes=["decoder", "lora_8"],
        seeds=[0, 1],
    )
    (row,) = make_rows(args)
    start, gain, harmed, general, step = row.strip("| ").rsplit(" | ", 4)
    assert start == "`cells` | 5 | `decoder` | .500 | .500 | .600"
    assert gain.startswith("+.100") and general == gain
    assert (harmed, step) == ("25%", "3")


@pytest.mark.smoke
def test_a_run_is_scored_on_both_sets_and_not_run_again(tiny_study, monkeypatch) -> None:
    for recipe in (UNTOUCHED, "everything_average"):
        run = Run("cells", 5, recipe, 0)
        row = tiny_study.perform(run)
        assert row is not None and 0 < row["test"] < 1 and 0 < row["general"] < 1
        folder = tiny_study.folder / run.name
        assert json.loads((folder / "row.json").read_text()) == row
        assert not (folder / "run").exists()  # its checkpoints
        assert tiny_study.perform(run) is None
    assert row["images"] == 5 and row["best_step"] in (0, 1)
