"""COCO AP equals plain COCOeval, and is right where plain COCOeval is not."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from helpers.coco_files import annotation
from samft import cli
from samft.annotations.segmentation import CroppedMask
from samft.coco.subset import CocoSubset, read_coco
from samft.data.dataset import Coco2MaskDataset
from samft.data.loaders import val_loader
from samft.errors import ConfigError
from samft.evaluation.coco_ap import (
    BACKENDS,
    average_precision,
    category_ids_of,
    coco_results,
    coco_truth,
    load_backend,
)
from samft.evaluation.evaluator import OTHER_PROMPTS, EvaluatedObjects, score_masks

NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


def worsened(truth: CroppedMask, generator: np.random.Generator) -> CroppedMask:
    """A mask that lacks some of the truth's rows and columns: IoU anywhere from 0.2 to 1."""
    rows, columns = (max(1, int(n * generator.uniform(0.5, 1))) for n in truth.mask.shape)
    return CroppedMask(truth.top, truth.left, truth.mask[:rows, :columns])


def worsened_rows(subset: CocoSubset) -> EvaluatedObjects:
    generator = np.random.default_rng(0)
    parts = []
    dataset = Coco2MaskDataset(subset.index.image_folder, subset=subset, image_size=64)
    for batch in val_loader(dataset):
        masks = [worsened(truth, generator) for truth in batch.truths]
        others = {name: batch.truths for name in OTHER_PROMPTS}
        scores = torch.from_numpy(generator.random(batch.num_masks))
        parts.append(score_masks(batch, {"box": masks, **others}, scores))
    return EvaluatedObjects.concatenate(parts)


def numbers_of(subset: CocoSubset, rows: EvaluatedObjects, **options: Any) -> dict[str, Any]:
    results = coco_results(rows, category_ids_of(subset, rows.object_ids))
    return average_precision(coco_truth(rows, subset), results, **options)


def plain_cocoeval(annotations: Path, results: list[dict[str, Any]]) -> list[float]:
    """AP, AP50, AP75, S, M, L as anyone would get them from the two files."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(annotations))
        evaluation = COCOeval(coco, coco.loadRes(results), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[:6].tolist()


@pytest.fixture(scope="module")
def photos(data_root: Path) -> tuple[Path, CocoSubset, EvaluatedObjects]:
    """Everyday photos of 80 classes, with crowds: the file, what is used of it, worsened masks."""
    root = data_root / "coco_open104"
    annotations = root / "annotations" / "instances_val2017.json"
    subset = read_coco(annotations, root / "val2017")
    return annotations, subset, worsened_rows(subset)


def test_same_as_plain_cocoeval_on_the_annotation_file(
    photos: tuple[Path, CocoSubset, EvaluatedObjects], tmp_path: Path
) -> None:
    annotations, subset, rows = photos
    scores = numbers_of(subset, rows)
    # With the areas of masks, as here, and not those of polygons.
    document = json.loads(annotations.read_text())
    areas = dict(zip(rows.object_ids.tolist(), rows.areas.tolist(), strict=True))
    for entry in document["annotations"]:
        entry["area"] = areas.get(entry["id"], entry["area"])
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps(document))
    results = coco_results(rows, category_ids_of(subset, rows.object_ids))
    expected = plain_cocoeval(file, json.loads(json.dumps(results)))
    assert [scores[name] for name in NAMES] == pytest.approx(expected, abs=1e-12)
    assert scores["max_dets"] == 100
    assert 0.2 < scores["ap"] < 0.9
    untouched = plain_cocoeval(annotations, results)
    assert untouched[:3] == pytest.approx(expected[:3], abs=1e-12)  # areas decide nothing there


def write_squares(root: Path, *, count: int, first_id: int = 0) -> CocoSubset:
    """One image of so many squares of 4 x 4 px, ids counted from 0, and a second with two."""
    side = max(20, 5 * int(np.ceil(np.sqrt(count))))
    annotations = []
    for k in range(count):
        x, y = 5 * (k % (side // 5)), 5 * (k // (side // 5))
        square = [x, y, x + 4, y, x + 4, y + 4, x, y + 4]
        annotations.append(annotation(first_id + k, 1, square))
    for k in range(2):
        square = [10 * k, 0, 10 * k + 6, 0, 10 * k + 6, 6, 10 * k, 6]
        annotations.append(annotation(first_id + count + k, 2, square, category_id=2))
    root.mkdir(exist_ok=True)
    images = []
    for number in (1, 2):
        cv2.imwrite(str(root / f"{number}.png"), np.zeros((side, side, 3), np.uint8))
        images.append({"id": number, "file_name": f"{number}.png", "height": side, "width": side})
    categories = [{"id": 1, "name": "square"}, {"id": 2, "name": "other"}]
    document = {"images": images, "annotations": annotations, "categories": categories}
    file = root / "_annotations.coco.json"
    file.write_text(json.dumps(document))
    return read_coco(file, root)


def test_images_with_over_100_objects_are_not_truncated(tmp_path: Path) -> None:
    subset = write_squares(tmp_path / "dense", count=150)
    rows = worsened_rows(subset)
    perfect = EvaluatedObjects(**{**vars(rows), "rle_predicted": rows.rle_true})
    scores = numbers_of(subset, perfect)
    assert (scores["ap"], scores["max_dets"]) == (pytest.approx(1, abs=1e-12), 150)
    # What plain COCOeval makes of them: of 150 it looks at 100.
    results = coco_results(perfect, category_ids_of(subset, perfect.object_ids))
    truth = tmp_path / "truth.json"
    truth.write_text(json.dumps(coco_truth(perfect, subset)))
    assert plain_cocoeval(truth, results)[0] < 0.9


def test_an_object_whose_id_is_0_counts(tmp_path: Path) -> None:
    subset = write_squares(tmp_path / "one", count=1)
    rows = worsened_rows(subset)
    assert rows.object_ids.tolist() == [0, 1, 2]
    perfect = EvaluatedObjects(**{**vars(rows), "rle_predicted": rows.rle_true})
    truth = coco_truth(perfect, subset)
    assert [entry["id"] for entry in truth["annotations"]] == [1, 2, 3]
    assert [entry["area"] for entry in truth["annotations"]] == rows.areas.tolist()
    scores = numbers_of(subset, perfect)
    assert (scores["ap"], scores["ap_small"]) == (1, 1)
    assert (scores["ap_medium"], scores["ap_large"]) == (None, None)


def test_results_are_not_modified(tmp_path: Path) -> None:
    subset = write_squares(tmp_path / "some", count=3)
    rows = worsened_rows(subset)
    category_ids = category_ids_of(subset, rows.object_ids)
    assert category_ids.tolist() == [1, 1, 1, 2, 2]
    results = coco_results(rows, category_ids)
    before = json.dumps(results)
    average_precision(coco_truth(rows, subset), results)
    assert json.dumps(results) == before
    assert set(results[0]) == {"image_id", "category_id", "segmentation", "score"}


@pytest.mark.parametrize("set_name", ["dense", "coco_open104"])
def test_the_faster_backend_gives_the_same(
    set_name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    pytest.importorskip("faster_coco_eval", reason="the extra fast-ap is not installed")
    if set_name == "dense":
        subset = write_squares(tmp_path / "dense", count=150)
        rows = worsened_rows(subset)
    else:
        _, subset, rows = request.getfixturevalue("photos")
    slower, faster = (numbers_of(subset, rows, backend=backend) for backend in BACKENDS)
    assert (slower.pop("backend"), faster.pop("backend")) == BACKENDS
    assert faster.keys() == slower.keys()
    for name, value in slower.items():
        assert faster[name] == (value if value is None else pytest.approx(value, abs=1e-9)), name


def test_a_missing_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.EXTRAS, "fast-ap", ("no_such_package",))
    with pytest.raises(ConfigError, match="pip install no_such_package"):
        load_backend("faster_coco_eval")
