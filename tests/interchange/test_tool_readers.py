"""The COCO dataset in other tools' own readers: their masks are the ones that were written.

Each test needs that tool's package, and is skipped without it.
"""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools import mask as mask_utils

from helpers.masks import awkward_masks, whole_mask
from samft.interchange.coco_writer import POLYGONS, RLE, DatasetWriter

SIZE = (20, 30)
CLASSES = {1: "leaf", 4: "stem"}


def write_dataset(folder: Path, *, segmentation: str) -> list[tuple[int, np.ndarray]]:
    """Writes dataset.json and images/; returns the class and the mask of each object, in order."""
    (folder / "images").mkdir(parents=True)
    objects, images = [], []
    with (folder / "dataset.json").open("wb") as file:
        writer = DatasetWriter(file, description="drawn", segmentation=segmentation)
        for number in range(1, 4):
            name = f"{number}.png"
            cv2.imwrite(str(folder / "images" / name), np.full((*SIZE, 3), 90, np.uint8))
            images.append({"id": number, "file_name": name, "height": SIZE[0], "width": SIZE[1]})
            for k, mask in enumerate(awkward_masks(SIZE, seed=number)):
                category = (1, 4)[k % 2]
                fields = {"score": 0.5}
                where = {"image_id": number, "category_id": category}
                writer.add(mask, size=SIZE, **where, fields=fields)
                objects.append((category, whole_mask(mask, SIZE)))
        writer.close(images, CLASSES)
    return objects


def test_supervision_reads_run_lengths(tmp_path: Path) -> None:
    supervision = pytest.importorskip("supervision", reason="no supervision")
    expected = write_dataset(tmp_path, segmentation=RLE)
    dataset = supervision.DetectionDataset.from_coco(
        str(tmp_path / "images"), str(tmp_path / "dataset.json"), force_masks=True
    )
    assert dataset.classes == ["leaf", "stem"]
    masks: list[tuple[str, np.ndarray]] = []
    for path in sorted(dataset.annotations):
        objects = dataset.annotations[path]
        pairs = zip(objects.class_id, objects.mask, strict=True)
        masks += [(dataset.classes[number], mask) for number, mask in pairs]
    assert len(masks) == len(expected)
    for (name, mask), (category, truth) in zip(masks, expected, strict=True):
        assert name == CLASSES[category]
        assert (mask == truth).all()


@pytest.mark.parametrize("segmentation", [RLE, POLYGONS])
def test_datumaro_reads_both(tmp_path: Path, segmentation: str) -> None:
    # CVAT imports COCO through datumaro.
    pytest.importorskip("datumaro", reason="no datumaro")
    from datumaro.components.dataset import Dataset

    root = tmp_path / "set"
    (root / "annotations").mkdir(parents=True)
    expected = write_dataset(tmp_path / "data", segmentation=segmentation)
    (tmp_path / "data" / "images").rename(root / "images")
    (tmp_path / "data" / "dataset.json").rename(root / "annotations" / "instances_train.json")
    dataset = Dataset.import_from(str(root), "coco_instances")
    masks: dict[int, np.ndarray] = {}
    for item in dataset:
        for one in item.annotations:
            kind = type(one).__name__
            if kind == "RleMask":
                part = np.asarray(one.image, bool)
            elif kind == "Polygon":
                part = drawn([one.points])
            else:
                continue
            masks[one.id] = masks.get(one.id, np.zeros(SIZE, bool)) | part
    assert len(masks) == len(expected)
    for number, (_, truth) in enumerate(expected, start=1):
        assert (masks[number] == truth).all()


def drawn(polygons: list[Any]) -> np.ndarray:
    rles = mask_utils.frPyObjects([np.asarray(one, float).tolist() for one in polygons], *SIZE)
    return np.asarray(mask_utils.decode(mask_utils.merge(rles)), dtype=bool)


def test_label_studio_converts_polygons(tmp_path: Path) -> None:
    importer = pytest.importorskip(
        "label_studio_sdk.converter.imports.coco", reason="no label-studio-sdk"
    )
    expected = write_dataset(tmp_path, segmentation=POLYGONS)
    tasks = tmp_path / "tasks.json"
    importer.convert_coco_to_ls(str(tmp_path / "dataset.json"), str(tasks), out_type="predictions")
    regions = [
        one["result"] for task in json.loads(tasks.read_text()) for one in task["predictions"]
    ]
    # Each object begins with its box, and each of its polygons is a region.
    objects: list[list[Any]] = []
    for region in (region for result in regions for region in result):
        if region["type"] == "rectanglelabels":
            objects.append([])
            continue
        percent = np.array(region["value"]["points"])
        objects[-1].append((percent * [SIZE[1], SIZE[0]] / 100).ravel())
    assert len(objects) == len(expected)
    for polygons, (_, truth) in zip(objects, expected, strict=True):
        assert (drawn(polygons) == truth).all()
