"""The pictures of scattered defects, and the table that compares views."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from benchmarks.views import compare_views, draw_defects, write_defects
from samft.coco.subset import read_coco
from samft.views.windows import KINDS


def test_defects_are_drawn_where_their_outlines_are() -> None:
    image, outlines = draw_defects(np.random.default_rng(3), 400, 30)
    plain, _ = draw_defects(np.random.default_rng(3), 400, 0)
    changed, inside = np.abs(image.astype(int) - plain).max(axis=2) > 20, np.zeros((400, 400))
    for outline in outlines:
        assert 2 < np.ptp(outline, axis=0).max() <= 40
        cv2.fillPoly(inside, [np.round(outline).astype(np.int32)], 1)
    both, either = (changed & (inside > 0)).sum(), (changed | (inside > 0)).sum()
    assert len(outlines) == 30 and both / either > 0.8


def test_the_dataset_of_defects_can_be_read(tmp_path) -> None:
    write_defects(tmp_path, side=300, number=9)
    for split, images in (("train", 6), ("val", 4)):
        subset = read_coco(tmp_path / split / "_annotations.coco.json", tmp_path / split)
        assert (subset.num_images, subset.num_objects) == (images, 9 * images)


def write_run(folder: Path, ious: list[float], **counts: int) -> None:
    folder.mkdir()
    summary = {"best_step": 5, "best_val_per_mask_iou": np.mean(ious), "box_fill_iou": 0.25}
    summary |= {"baseline_val_per_mask_iou": 0.125, "data": {"val": {"images": 2, **counts}}}
    summary["wall_seconds"] = 10 * len(ious)
    (folder / "summary.json").write_text(json.dumps(summary))
    columns = {"image_ids": [1, 1, 2], "object_ids": [1, 2, 3], "iou_actual": ious}
    for name in ("areas", "iou_predicted", "iou_box_fill"):
        columns[name] = [0.0] * 3
    (folder / "objects.json").write_text(json.dumps({"5": columns}))


def test_the_table_compares_objects_over_seeds(tmp_path) -> None:
    for seed in (0, 1):
        for view in KINDS:
            gain = 0.0 if view == "image" else 0.25 + 0.5 * seed
            counts = {} if view == "image" else {"windows": 7}
            write_run(tmp_path / f"set-{view}-{seed}", [gain, gain, gain], **counts)
    for seed in (0, 1):
        write_run(tmp_path / f"set-image_9-{seed}", [0.125] * 3)
    image, tiles, _, longer = compare_views(tmp_path, "set", [0, 1], image_steps=9)
    assert image == "| `set` | `image` | 2 | 0.250 | 0.125 | 0.000 |  | 30 |"
    row = "| `set` | `tiles` | 7 | 0.250 | 0.125 | 0.500 | +0.500 (+0.500 to +0.500) | 30 |"
    assert tiles == row
    start = "| `set` | image, 9 steps | 2 | 0.250 | 0.125 | 0.125 | +0.125 (+0.125"
    assert longer.startswith(start)
    assert len(compare_views(tmp_path, "set", [0, 1])) == 3


@pytest.mark.parametrize("view", KINDS)
def test_runs_that_are_there_are_not_run_again(tmp_path, view, monkeypatch) -> None:
    from benchmarks import views

    def refuse(argv: list[str]) -> None:
        raise AssertionError(argv)

    monkeypatch.setattr(views, "train", refuse)
    write_run(tmp_path / "run", [0.5])
    views.train_view({}, tmp_path / "run", view=view, seed=0, steps=5)
    with pytest.raises(AssertionError, match=view):
        views.train_view({}, tmp_path / "other", view=view, seed=0, steps=5)
