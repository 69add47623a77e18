"""The COCO dataset: what is written, and that pycocotools and samft read the same masks."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO

from helpers.masks import awkward_masks, whole_mask
from samft.annotations.segmentation import CroppedMask
from samft.interchange.coco_writer import (
    POLYGONS,
    RLE,
    DatasetWriter,
    category_without_class,
    dataset_head,
)

SIZE = (20, 30)


def write(masks: list[CroppedMask], *, segmentation: str = RLE) -> tuple[bytes, DatasetWriter]:
    file = io.BytesIO()
    writer = DatasetWriter(file, description="drawn", segmentation=segmentation)
    for mask in masks:
        writer.add(mask, size=SIZE, image_id=7, category_id=2, fields={"score": 0.5})
    image = {"id": 7, "file_name": "a.png", "height": SIZE[0], "width": SIZE[1]}
    writer.close([image], {2: "leaf", 1: "stem"})
    return file.getvalue(), writer


def test_an_object_has_the_box_and_area_of_its_mask() -> None:
    loose = np.zeros((6, 9), bool)
    loose[1:3, 2:7] = True
    content, _ = write([CroppedMask(4, 10, loose)])
    assert content.startswith(dataset_head("drawn"))
    document: dict[str, Any] = json.loads(content)
    (entry,) = document["annotations"]
    del entry["segmentation"]
    assert entry == {
        "id": 1,
        "image_id": 7,
        "category_id": 2,
        "iscrowd": 0,
        "area": 10,
        "bbox": [12, 5, 5, 2],
        "score": 0.5,
    }
    assert document["info"] == {"description": "drawn"} and document["licenses"] == []
    assert document["categories"] == [{"id": 1, "name": "stem"}, {"id": 2, "name": "leaf"}]


def test_a_mask_without_a_pixel_is_counted_and_left_out() -> None:
    empty = CroppedMask(0, 0, np.zeros((0, 0), bool))
    content, writer = write([empty, CroppedMask(0, 0, np.ones((1, 1), bool)), empty])
    assert (writer.num_objects, writer.num_empty) == (1, 2)
    assert [entry["id"] for entry in json.loads(content)["annotations"]] == [1]


@pytest.mark.parametrize("segmentation", [RLE, POLYGONS])
def test_pycocotools_reads_the_same_masks(tmp_path: Path, segmentation: str) -> None:
    masks = awkward_masks(SIZE)
    content, _ = write(masks, segmentation=segmentation)
    (tmp_path / "dataset.json").write_bytes(content)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(tmp_path / "dataset.json"))
    assert len(coco.anns) == len(masks)
    for entry, mask in zip(coco.anns.values(), masks, strict=True):
        assert (coco.annToMask(entry) == whole_mask(mask, SIZE)).all()


def test_a_dataset_may_be_empty() -> None:
    document = json.loads(write([])[0])
    assert document["annotations"] == [] and len(document["images"]) == 1


@pytest.mark.parametrize(
    ("categories", "expected"),
    [({}, 1), ({1: "a", 5: "b"}, 6), ({0: "a"}, 1), ({3: "object", 9: "b"}, 3)],
)
def test_objects_without_a_class_get_one_that_is_free(
    categories: dict[int, str], expected: int
) -> None:
    assert category_without_class(categories) == expected
