"""Prompts of points: which are refused, which image they are of, and masks equal stock's."""

import json
import re
from pathlib import Path
from typing import Any, Literal
from unicodedata import normalize

import cv2
import numpy as np
import pytest
import torch
from segment_anything import SamPredictor
from segment_anything.modeling import Sam

from helpers.tiny_checkpoint import mask_finding_sam
from samft.annotations.segmentation import decode_cropped, uncompressed_rle
from samft.errors import DataError
from samft.images.synthetic import draw_scene
from samft.models.prompted_sam import PromptedSam
from samft.models.sam import build_sam
from samft.prediction.inputs import build_task
from samft.prediction.points import PointPrompt
from samft.prediction.predictors import PointPredictor

NONE = [np.nan] * 4
Form = Literal["NFC", "NFD"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """a.png and b.png of 30 x 20 px."""
    for name in ("a.png", "b.png"):
        cv2.imwrite(str(tmp_path / name), np.full((20, 30, 3), 90, np.uint8))
    return tmp_path


def write_points(folder: Path, content: Any) -> Path:
    path = folder / "points.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def entry(**fields: Any) -> dict[str, Any]:
    return {"image": "a.png", "points": [[3, 4]], **fields}


def test_objects_of_a_file_belong_to_their_images(folder: Path) -> None:
    entries = [
        entry(image="b.png", points=[[1, 2], [29.5, 19.9]], labels=[1, 0], id=7),
        entry(box=[2, 3, 10, 11]),
        entry(image="b.png", points=[[5, 6]], labels=[0], box=[-1, 0, 31, 21], id=0),
    ]
    task = build_task([folder], points_file=write_points(folder, entries))
    assert task.rows == [0, 1]
    (first,) = task.prompts_of(0)
    assert first.points.tolist() == [[3, 4, 1]] and first.box.tolist() == [2, 3, 10, 11]
    assert task.result_fields(0, 0) == {"image_id": 1, "category_id": 1}
    prompts = task.prompts_of(1)
    assert [one.points.tolist() for one in prompts] == [[[1, 2, 1], [29.5, 19.9, 0]], [[5, 6, 0]]]
    assert [one.has_box for one in prompts] == [False, True]
    ids = [task.result_fields(1, k)["annotation_id"] for k in range(2)]
    assert ids == [7, 0]


def test_images_without_objects_are_not_predicted_on(folder: Path) -> None:
    task = build_task([folder], points_file=write_points(folder, [entry(image="b.png")]))
    assert task.rows == [1]
    # Where several paths are given, names have folders, which may be left out.
    paths = [folder / "a.png", folder / "b.png"]
    assert build_task(paths, points_file=folder / "points.json").rows == [1]
    write_points(folder, [entry(image=str(folder / "b.png"))])
    assert build_task(paths, points_file=folder / "points.json").rows == [1]


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_are_found_in_either_unicode_form(tmp_path: Path, on_disk: Form, form: Form) -> None:
    for name in ("a.png", "z\u00e9bre.png"):
        cv2.imwrite(str(tmp_path / normalize(on_disk, name)), np.full((20, 30, 3), 90, np.uint8))
    entries = [entry(image=normalize(form, "z\u00e9bre.png"))]
    assert build_task([tmp_path], points_file=write_points(tmp_path, entries)).rows == [1]


def test_names_that_differ_in_their_unicode_form_alone_are_two(tmp_path: Path) -> None:
    names = sorted(normalize(form, "z\u00e9bre.png") for form in ("NFC", "NFD"))
    for name in names:
        cv2.imwrite(str(tmp_path / name), np.full((20, 30, 3), 90, np.uint8))
    for row, name in enumerate(names):
        points = write_points(tmp_path, [entry(image=name)])
        assert build_task([tmp_path], points_file=points).rows == [row]


def test_points_of_the_command_line_are_of_one_object_in_every_image(folder: Path) -> None:
    points = [[3, 4, 1], [5, 6, 0]]
    task = build_task([folder], points=points, boxes=[[1, 2, 9, 8]])
    for row in (0, 1):
        (prompt,) = task.prompts_of(row)
        assert prompt.points.tolist() == points and prompt.box.tolist() == [1, 2, 9, 8]


def test_unreadable_images_are_not_measured(folder: Path) -> None:
    (folder / "a.png").write_bytes(b"no image")
    task = build_task([folder], points=[[25, 4, 1]])
    assert list(task.images.bad) == [0] and task.prompts_of(0) is not None
    task = build_task([folder], points_file=write_points(folder, [entry(points=[[9999, 4]])]))
    assert task.rows == [0]


REFUSED = {
    "outside to the right": ([entry(points=[[3, 4], [30, 4]])], "point 30,4 lies outside of a.png"),
    "outside above": ([entry(points=[[3, -0.5]])], "point 3,-0.5 lies outside"),
    "of another image": ([entry(), entry(image="c.png")], "object 2 is of c.png, which is none of"),
    "label": ([entry(labels=[2])], "neither 1, for a point of the object, nor 0"),
    "negative label": ([entry(labels=[-1])], "neither 1"),
    "label that is true": ([entry(labels=[True])], "Expected `int`, got `bool`"),
    "too few labels": ([entry(points=[[1, 2], [3, 4]], labels=[1])], "1 labels for 2 points"),
    "no label": ([entry(labels=[])], "0 labels for 1 points"),
    "no point": ([entry(points=[], box=[1, 2, 3, 4])], "object 1 has no point"),
    "no object": ([], "lists no object: it should be [{"),
    "not this alone": ([entry(labels=[0])], "nothing says which object is meant"),
    "text": ([entry(points=[["3", 4]])], "Expected `float`, got `str` - at `$[0].points[0][0]`"),
    "three numbers": ([entry(points=[[3, 4, 1]])], "Expected `array` of length 2"),
    "flat": ([entry(points=[3, 4])], "Expected `array`, got `int`"),
    "no image": ([{"points": [[1, 2]]}], "missing required field `image`"),
    "no list": (entry(), "Expected `array`, got `object`"),
    "misspelt": ([entry(label=[0])], "unknown field `label`"),
    "no number": ('[{"image": "a.png", "points": [[NaN, 4]]}]', "has another form"),
    "infinite": ('[{"image": "a.png", "points": [[1e999, 4]]}]', "has another form"),
    "no JSON": ("x,y\n3,4\n", "has another form"),
    "deep": ("[" * 100_000, "has another form"),
    "box without width": ([entry(box=[5, 2, 5, 9])], "a box without width or height"),
    "box outside": ([entry(box=[1, 2, 32, 9])], "box 1,2,32,9 lies, or reaches out, outside of"),
    "box of three": ([entry(box=[1, 2, 3])], "Expected `array` of length 4"),
    "id": ([entry(id="x")], "Expected `int | null`, got `str`"),
    "negative id": ([entry(id=-1)], "give a whole number from 0 on"),
    "large id": ([entry(id=2**63)], "whole number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_files_are_refused_in_a_sentence(folder: Path, case: str) -> None:
    content, message = REFUSED[case]
    with pytest.raises(DataError, match=re.escape(message)) as refusal:
        build_task([folder], points_file=write_points(folder, content))
    text = str(refusal.value)
    assert text.startswith("--points: ") and "\n" not in text and len(text) < 500


def test_a_missing_file_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="absent.json cannot be read"):
        build_task([folder], points_file=folder / "absent.json")


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([[30, 4, 1]], "point 30,4 lies outside of a.png, which is 30 x 20 px"),
        ([[3, 20, 1]], "point 3,20 lies outside"),
        ([[3, 4, 0]], "nothing says which object is meant"),
    ],
)
def test_wrong_points_of_the_command_line_are_refused(
    folder: Path, points: list[list[float]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        build_task([folder], points=points)


@pytest.fixture(scope="module")
def sam() -> Sam:
    """Random weights, which answer points with masks of some sort; `vit_tiny` answers with none."""
    torch.manual_seed(3)
    return build_sam("vit_tiny", 64)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return draw_scene(np.random.default_rng(3), 96)[0][:72]


PROMPTS = {
    "one point": ([[40, 30, 1]], NONE),
    "both labels": ([[40, 30, 1], [10.5, 60.25, 0], [50, 20, 1]], NONE),
    "box and point": ([[40, 30, 1]], [20, 10, 70, 60]),
    "box and not this": ([[40, 30, 0]], [20, 10, 70, 60]),
}


@pytest.mark.parametrize("three_masks", [True, False])
def test_masks_equal_sam_predictors(sam: Sam, image: np.ndarray, three_masks: bool) -> None:
    predictor = PointPredictor(PromptedSam(sam), three_masks=three_masks)
    prompts = [PointPrompt(*map(np.array, pair)) for pair in PROMPTS.values()]
    predicted = predictor.predict(predictor.prepare(image), prompts)
    stock = SamPredictor(sam)
    stock.set_image(image)
    size = (image.shape[0], image.shape[1])
    for name, prompt, one in zip(PROMPTS, prompts, predicted, strict=True):
        best_of_three = three_masks and name == "one point"
        masks, scores, _ = stock.predict(
            point_coords=prompt.points[:, :2],
            point_labels=prompt.points[:, 2],
            box=prompt.box if prompt.has_box else None,
            multimask_output=best_of_three,
        )
        assert len(masks) == (3 if best_of_three else 1)
        expected, score = masks[scores.argmax()], scores.max()
        cropped = decode_cropped(uncompressed_rle(one.mask, size), size)
        top, left, shown = cropped.top, cropped.left, np.zeros(size, bool)
        height, width = cropped.mask.shape
        shown[top : top + height, left : left + width] = cropped.mask
        assert (shown == expected).mean() > 0.999 and expected.any(), name
        assert one.iou_predicted == pytest.approx(float(score), abs=1e-5)
        box = prompt.box.tolist() if prompt.has_box else cropped.extent
        assert list(one.box_original) == list(box)


def test_the_best_of_three_is_that_of_the_highest_predicted_iou(image: np.ndarray) -> None:
    sam = mask_finding_sam(steepness=1.0)
    head = sam.mask_decoder.iou_prediction_head.layers[-1]
    head.bias.data[:] = head.bias.new_tensor([0.9, 0.1, 0.2, 0.8])  # of masks 0 to 3
    prompt = PointPrompt(np.array([[40.0, 30, 1]]), np.array(NONE))
    for three_masks, score in ((True, 0.8), (False, 0.9)):
        predictor = PointPredictor(PromptedSam(sam), three_masks=three_masks)
        (one,) = predictor.predict(predictor.prepare(image), [prompt])
        assert one.iou_predicted == pytest.approx(score)


def test_an_empty_mask_has_an_empty_box(image: np.ndarray) -> None:
    sam = mask_finding_sam(steepness=0.0)  # logits of 0
    predictor = PointPredictor(PromptedSam(sam), three_masks=True)
    prompt = PointPrompt(np.array([[40.0, 30, 1]]), np.array(NONE))
    (one,) = predictor.predict(predictor.prepare(image), [prompt])
    assert list(one.box_original) == [0, 0, 0, 0]
