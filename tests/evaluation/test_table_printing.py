"""The tables on the terminal, of one model and of two side by side."""

from typing import Any

import numpy as np

from helpers.score_rows import rows_of as objects
from samft.evaluation.tables import (
    MAX_CLASSES_SHOWN,
    format_tables,
    summarise_comparison,
    summarise_scores,
)

COCO = {"ap": 0.5, "ap50": 0.7, "ap75": 0.4, "ap_small": 0.1, "ap_medium": None, "ap_large": 1.0}


def one(ious: list[float], *, classes: list[int], max_dets: int = 100) -> dict[str, Any]:
    names = {key: f"class {key}" for key in classes}
    return {
        "checkpoint": "a.pth",
        "model_type": "vit_b",
        "image_size": 1024,
        "resize_mode": "pad",
        **summarise_scores(objects(ious), np.array(classes), names=names),
        "coco": {**COCO, "max_dets": max_dets},
    }


def test_one_model() -> None:
    lines = format_tables([one([0.25, 0.75], classes=[1, 2])], data="birds val")
    assert lines[0] == "birds val: 2 images, 2 masks"
    assert lines[2:5] == [
        "a.pth (vit_b, 1024 px, pad)",
        "IoU 0.5000, 0.5000 above filling each box (0.0000)",
        "better than their filled boxes are 2 of 2 objects (100%)",
    ]
    rows = {line[:36].strip(): line[36:].split() for line in lines}
    assert rows["IoU, mean over masks"] == ["0.5000"]
    assert rows["AP medium"] == ["-"]
    assert rows["class 1 (1)"] == ["0.2500"]
    assert rows["0.0 to 0.1 (2)"] == ["0.0000", "0.5000"]
    assert all(line == line.rstrip() and len(line) <= 100 for line in lines)


def test_two_models_side_by_side() -> None:
    first, second = objects([0.25, 0.75]), objects([0.5, 0.25])
    other = one([0.5, 0.25], classes=[1, 2])
    comparison = summarise_comparison(first, second)
    for row in comparison["most_improved"] + comparison["most_harmed"]:
        row |= {"category": "bird", "file_name": "x.jpg"}
    lines = format_tables(
        [one([0.25, 0.75], classes=[1, 2]), {**other, "comparison": comparison}], data="birds"
    )
    assert "B  a.pth (vit_b, 1024 px, pad)" in lines
    rows = {line[:36].strip(): line[36:].split() for line in lines}
    assert rows["IoU, mean over masks"] == ["0.5000", "0.3750", "-0.1250"]
    assert rows["AP medium"] == ["-", "-", "-"]
    text = "\n".join(lines)
    assert "B against A" in text and "95 % interval -0.5000 to +0.2500" in text
    assert "better 1, worse 1, within 0.01: 0; lost over 0.1: 1" in text
    assert "0.750 -> 0.250   object 101 (bird) in x.jpg" in text


def test_each_model_is_compared_with_filling_each_box() -> None:
    other = {**one([0.5, 0.25], classes=[1, 2]), "box_fill_iou": 0.4, "masks_above_box_fill": 1}
    comparison = summarise_comparison(objects([0.5]), objects([0.5]))
    first = one([0.5, 0.5], classes=[1, 2])
    lines = format_tables([first, {**other, "comparison": comparison}], data="birds")
    place = lines.index("B  a.pth (vit_b, 1024 px, pad)")
    assert lines[place + 1 : place + 3] == [
        "   IoU 0.3750, 0.0250 below filling each box (0.4000)",
        "   better than their filled boxes are 1 of 2 objects (50%)",
    ]


def test_many_classes_are_cut_to_the_worst() -> None:
    ious = [k / 100 for k in range(40)]
    lines = format_tables([one(ious, classes=list(range(40)))], data="d")
    shown = [line for line in lines if line.startswith("  class ")]
    assert len(shown) == MAX_CLASSES_SHOWN
    assert shown[0].startswith("  class 0 (1)")
    assert "IoU by class, the 12 worst of 40" in lines


def test_a_raised_max_dets_is_printed() -> None:
    lines = format_tables([one([0.5], classes=[1], max_dets=318)], data="d")
    assert "COCO AP of masks from boxes, 318 of a class in an image" in lines
