"""COCO results and images files as pycocotools reads them; names of pictures; the pictures."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

from samft.annotations.segmentation import CroppedMask
from samft.prediction import outputs
from samft.prediction.images import ImageList
from samft.prediction.outputs import (
    PictureWriter,
    ResultsWriter,
    overlay_labels,
    picture_names,
    result_row,
    write_images_json,
)
from samft.views.regions import DecodedImage

SIZE = (20, 30)
CROP = CroppedMask(3, 5, np.tril(np.ones((6, 8), bool)))


def example_row(image_id: int = 4) -> dict[str, Any]:
    fields = {"image_id": image_id, "category_id": 1, "annotation_id": 9}
    box = (5.5, 3.25, 13.75, 9.0)
    return result_row(CROP, box_original=box, size=SIZE, score=0.5, fields=fields)


def write_rows(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    writer = ResultsWriter(file)
    for row in rows:
        writer.add(row)
    writer.close()
    assert writer.num_rows == len(rows)
    return file.getvalue()


def test_a_result_has_box_mask_score_and_fields() -> None:
    row = example_row()
    segmentation = row.pop("segmentation")
    assert row == {
        "image_id": 4,
        "category_id": 1,
        "annotation_id": 9,
        "bbox": [5.5, 3.25, 8.25, 5.75],
        "score": 0.5,
    }
    whole = np.zeros(SIZE, bool)
    whole[3:9, 5:13] = CROP.mask
    assert (mask_utils.decode(segmentation) == whole).all()


def test_bbox_is_rounded_back_to_the_given_numbers() -> None:
    x, width = 10.1, 20.2
    row = result_row(CROP, box_original=(x, 0, x + width, 1), size=SIZE, score=0, fields={})
    assert row["bbox"] == [10.1, 0, 20.2, 1]  # and not 20.200000000000003


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_file_is_a_json_list(count: int) -> None:
    rows = [example_row(k) for k in range(count)]
    assert json.loads(write_rows(rows)) == rows


def test_pycocotools_reads_results_of_listed_images(tmp_path: Path) -> None:
    images = ImageList(
        names=["a.png", "bad.png", "c.png"],
        paths=[],
        ids=np.array([4, 5, 6]),
        sizes=np.array([SIZE, (0, 0), (7, 8)], np.int32),
        orientations=np.ones(3, np.uint8),
        bad={},
    )
    write_images_json(tmp_path / "images.json", images, [0, 2])
    (tmp_path / "results.json").write_bytes(write_rows([example_row(4), example_row(6)]))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(tmp_path / "images.json"))
        results = coco.loadRes(str(tmp_path / "results.json"))
    assert [coco.imgs[key]["file_name"] for key in coco.getImgIds()] == ["a.png", "c.png"]
    assert [(one["image_id"], one["annotation_id"]) for one in results.anns.values()] == [
        (4, 9),
        (6, 9),
    ]
    assert results.annToMask(results.anns[1]).sum() == CROP.mask.sum()


def test_picture_names_are_unique_and_stay_in_the_folder() -> None:
    names = ["a.png", "a.jpg", "A.bmp", "sub/b.x.png", "/else/where/c.png", "../d.png", "e\n.png"]
    unique = picture_names(names, np.arange(1, 8))
    assert unique == ["a-1", "a-2", "A-3", "sub/b.x", "c", "d", "e_"]
    assert picture_names(["a-2.png", "a.png", "a.jpg"], np.array([1, 2, 3])) == [
        "a-2",
        "a-2_",
        "a-3",
    ]


@pytest.mark.parametrize("num_masks", [0, 2, 300])
def test_label_images_are_read_back(tmp_path: Path, num_masks: int) -> None:
    masks = [CroppedMask(k // 20, k % 20, np.ones((1, 1), bool)) for k in range(num_masks)]
    image = np.full((20, 30, 3), 90, np.uint8)
    pictures = PictureWriter(tmp_path, masks=True, overlays=True)
    pictures.write("sub/a", DecodedImage(image), masks, boxes=np.zeros((0, 4)))
    labels = np.array(Image.open(tmp_path / "masks" / "sub" / "a.png"))
    assert labels.dtype == (np.uint16 if num_masks > 255 else np.uint8)
    expected = np.zeros((20, 30), int)
    for k in range(num_masks):
        expected[k // 20, k % 20] = k + 1
    assert (labels == expected).all()
    assert cv2.imread(str(tmp_path / "overlays" / "sub" / "a.jpg")).shape == image.shape


def test_the_overlay_of_a_huge_image_is_scaled_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "LONGEST_OVERLAY", 100)
    image = np.full((150, 301, 3), 90, np.uint8)
    image[80:120, 200:280] = 250
    mask = CroppedMask(80, 200, np.ones((40, 80), bool))
    pictures = PictureWriter(tmp_path, masks=True, overlays=True)
    pictures.write("a", DecodedImage(image), [mask], boxes=np.array([[200.0, 80, 280, 120]]))
    drawn = cv2.imread(str(tmp_path / "overlays" / "a.jpg")).astype(int)
    assert drawn.shape == (38, 76, 3)
    coloured = np.ptp(drawn, axis=2) > 30
    assert coloured[22:28, 52:68].all() and not coloured[:, :45].any()
    assert np.array(Image.open(tmp_path / "masks" / "a.png")).sum() == 40 * 80


def test_overlays_say_class_id_and_score() -> None:
    rows = [{"category_id": 3, "score": 0.934, "annotation_id": 71}, {"category_id": 0, "score": 1}]
    assert overlay_labels(rows, {3: "leaf"}) == [
        ["leaf 71  0.93", "71  0.93", "71"],
        ["object 2  1.00", "2  1.00", "2"],
    ]


def test_no_pictures_by_default(tmp_path: Path) -> None:
    pictures = PictureWriter(tmp_path)
    pictures.write("a", DecodedImage(np.zeros((4, 4, 3), np.uint8)), [CROP], boxes=np.zeros((0, 4)))
    assert not pictures and not list(tmp_path.iterdir())
