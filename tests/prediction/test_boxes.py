"""Boxes from the command line, from annotations with and without masks, and from detectors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.coco_files import write_coco
from samft.annotations.entries import NO_ID
from samft.data.dataset import Coco2MaskDataset
from samft.data.transforms import boxes_to_original
from samft.errors import DataError
from samft.prediction.images import ImageList, read_coco_images
from samft.prediction.inputs import (
    annotated_boxes,
    build_task,
    detected_boxes,
    repeat_boxes,
)


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Three images of 48 x 64, 64 x 48 and 40 x 40 with 1, 4 and 2 objects."""
    return write_coco(tmp_path, 3)


def write_annotations(path: Path, entries: list[dict[str, Any]]) -> Path:
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "annotations": entries}))
    return path


def images_of(path: Path) -> ImageList:
    return read_coco_images(path, path.parent)[0]


def write_results(folder: Path, entries: Any) -> Path:
    path = folder / "results.json"
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return path


def detection(image_id: int = 10, **fields: Any) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": 3, "bbox": [4, 5, 6, 7], "score": 0.5, **fields}


def test_annotated_boxes_are_those_of_validation(coco: Path) -> None:
    task = build_task([coco.parent], annotations=coco)
    dataset = Coco2MaskDataset(coco.parent, coco, image_size=64)
    for row, sample in enumerate(dataset):  # type: ignore[arg-type]
        frame = dataset.full_frame(sample.original_size)
        expected = boxes_to_original(sample.boxes.numpy(), frame)
        np.testing.assert_allclose(task.boxes_of(row), expected, atol=1e-4)
        ids = [task.result_fields(row, k)["annotation_id"] for k in range(len(expected))]
        assert ids == sample.object_ids.tolist()


def test_objects_without_masks_have_their_bbox(coco: Path) -> None:
    whole = json.loads(coco.read_text())["annotations"]
    bare = [{k: v for k, v in entry.items() if k != "segmentation"} for entry in whole]
    bare += [
        {**bare[0], "id": 50, "iscrowd": 1},
        {**bare[0], "id": 51, "bbox": [500, 500, 5, 5]},
        {**bare[0], "id": 52, "bbox": [1, 1, 0, 5]},
        {**bare[0], "id": 53, "bbox": "no box"},
        {**bare[0], "id": 54, "image_id": 99},
        {**bare[0]},  # the same id again
        {**whole[1], "id": 60, "segmentation": []},
    ]
    _, index = read_coco_images(write_annotations(coco, [whole[0], *bare[1:]]), coco.parent)
    boxes = annotated_boxes(coco, index)
    assert boxes.annotation_ids.tolist() == [1, 2, 3, 4, 5, 60, 6, 7]
    assert boxes.rows.tolist() == [0, 1, 1, 1, 1, 1, 2, 2]
    assert boxes.category_ids.tolist() == [1] * 8
    assert boxes.left_out == {"neither a mask nor a usable bbox": 3}
    x, y, width, height = whole[6]["bbox"]
    np.testing.assert_allclose(boxes.boxes_original[7], [x, y, x + width, y + height])


def test_an_object_without_an_id_has_none(coco: Path) -> None:
    entry = {"image_id": 10, "category_id": 1, "bbox": [1, 2, 3, 4]}
    _, index = read_coco_images(write_annotations(coco, [entry]), coco.parent)
    boxes = annotated_boxes(coco, index)
    assert (boxes.annotation_ids.tolist(), len(boxes)) == ([NO_ID], 1)


def test_objects_without_mask_and_id_are_all_used(coco: Path) -> None:
    whole = json.loads(coco.read_text())["annotations"]
    bare = [{"image_id": 11, "category_id": "thing", "bbox": [k, 2, 3, 4]} for k in range(4)]
    # The object without an id gets 1, which is no reason to leave the last one out.
    mask = {key: value for key, value in whole[0].items() if key != "id"}
    _, index = read_coco_images(
        write_annotations(coco, [mask, *bare, {**bare[0], "id": 1}]), coco.parent
    )
    boxes = annotated_boxes(coco, index)
    assert boxes.annotation_ids.tolist() == [1, *[NO_ID] * 4, 1]
    assert boxes.category_ids.tolist() == [1] * 6 and boxes.left_out == {}


def test_given_boxes_are_repeated_in_every_image(coco: Path) -> None:
    boxes = repeat_boxes([[1, 2, 30, 40], [0, 0, 40, 40.5]], images_of(coco), 1)
    assert boxes.rows.tolist() == [0, 0, 1, 1, 2, 2]
    assert boxes.boxes_original[4:].tolist() == [[1, 2, 30, 40], [0, 0, 40, 40.5]]


@pytest.mark.parametrize(
    "box", [[1, 2, 49.5, 40], [-2, 2, 20, 20], [1, -2, 20, 20], [1, 2, 20, 42], [70, 1, 80, 9]]
)
def test_a_given_box_outside_is_refused(coco: Path, box: list[float]) -> None:
    with pytest.raises(DataError, match=r"lies outside of image_\d.png, which is \d+ x \d+ px"):
        repeat_boxes([box], images_of(coco), 1)


def test_detections_are_grouped_by_image_and_filtered_by_score(coco: Path) -> None:
    detections = [
        detection(12, score=0.9),
        detection(10, score=0.1),
        detection(10, score=0.3, bbox=[-2, 1.5, 10, 10]),
        detection(10, bbox=[1, 1, 0, 4]),
        {"image_id": "12", "bbox": [1, 2, 3, 4]},
    ]
    boxes = detected_boxes(write_results(coco.parent, detections), images_of(coco), min_score=0.2)
    assert boxes.rows.tolist() == [0, 2, 2]
    assert boxes.boxes_original[0].tolist() == [-2, 1.5, 8, 11.5]
    assert boxes.category_ids.tolist() == [3, 3, 0]
    assert boxes.scores[:2].tolist() == [0.3, 0.9] and np.isnan(boxes.scores[2])
    assert boxes.left_out == {"no usable bbox": 1, "score below --min_score": 1}
    assert list(boxes.of_image(2)) == [1, 2] and list(boxes.of_image(1)) == []


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([detection(), detection(99)], "of the 2 boxes in .*, 1 are of images that the annotation"),
        ([detection(bbox=[64, 1, 5, 5])], "places outside of their images .*image_0.png"),
        ([detection(bbox=[1, 2, 3])], r"no COCO results file .*length 4.*bbox"),
        ([{"image_id": 10, "segmentation": {}}], "missing required field `bbox`"),
        ({"annotations": []}, "Expected `array`, got `object`"),
        ("[{", "no COCO results file"),
        ([detection(2**70)], f"images that the annotation file .*image_id {2**70}"),
        ([detection([10])], "images that the annotation file"),
        ([detection(bbox=[1e6, 1, 5, 5])], "places outside of their images"),
        ([detection(category_id="dog")], "classes that the annotation file does not name .*dog"),
        ([detection(category_id=2**70)], "classes that the annotation file does not name"),
    ],
)
def test_other_files_and_results_of_other_images_are_refused(
    coco: Path, entries: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        detected_boxes(write_results(coco.parent, entries), images_of(coco))


def test_unusable_detections_are_left_out_and_counted(coco: Path) -> None:
    sides = (float("nan"), float("inf"), 1e308, 10**400, None, "wide", -3)
    detections = [detection(bbox=[1, 2, side, 1e308]) for side in sides]
    detections += [detection(score=one) for one in ("high", [], float("nan"), 10**400)]
    detections += [detection(score="0.75"), detection(score=None), detection(category_id="thing")]
    boxes = detected_boxes(
        write_results(coco.parent, detections), images_of(coco), categories={"thing": 7}
    )
    assert boxes.category_ids.tolist() == [3, 3, 7]
    np.testing.assert_array_equal(boxes.scores, [0.75, np.nan, 0.5])
    assert boxes.left_out == {
        "no usable bbox": 7,
        "a score that is no number": 4,
    }


def test_images_with_ids_of_text_are_found(coco: Path) -> None:
    document = json.loads(coco.read_text())
    names = {image["id"]: f"photo_{image['id']}" for image in document["images"]}
    for image in document["images"]:
        image["id"] = names[image["id"]]
    for entry in document["annotations"]:
        entry["image_id"] = names[entry["image_id"]]
    coco.write_text(json.dumps(document))
    results = write_results(coco.parent, [detection("photo_12")])
    task = build_task([coco.parent], annotations=coco, results=results)
    assert task.rows == [2] and task.result_fields(2, 0)["image_id"] == "photo_12"
    with pytest.raises(DataError, match="image_id 3"):  # their numbers are samft's own
        detected_boxes(write_results(coco.parent, [detection(3)]), images_of(coco))


def test_a_missing_results_file_is_refused(coco: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        detected_boxes(coco.parent / "absent.json", images_of(coco))


def test_all_boxes_of_a_real_dataset_are_read(data_root: Path) -> None:
    folder = data_root / "hbn_flakes" / "test"
    annotations = folder / "_annotations.coco.json"
    task = build_task([folder], annotations=annotations)
    entries = json.loads(annotations.read_text())["annotations"]
    assert task.prompts is not None
    assert len(task.prompts) == len(entries) == 88  # one object has no mask
    assert sorted(task.prompts.annotation_ids.tolist()) == sorted(entry["id"] for entry in entries)
