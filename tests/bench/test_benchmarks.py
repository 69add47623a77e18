"""The COCO-like dataset is valid COCO; the benchmarks of index and loader run to their tables."""

import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from benchmarks import coco_like, index, loader

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

NUM_IMAGES, NUM_OBJECTS = 60, 500


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coco_like")
    coco_like.write_dataset(folder, num_images=NUM_IMAGES, num_objects=NUM_OBJECTS)
    return folder


@pytest.fixture(scope="module")
def coco(drawn: Path) -> COCO:
    return COCO(drawn / "annotations" / "instances_train2017.json")


def test_numbers_of_images_and_objects(coco: COCO) -> None:
    assert len(coco.imgs) == len(coco.dataset["images"]) == NUM_IMAGES
    assert len(coco.anns) == len(coco.dataset["annotations"]) == NUM_OBJECTS
    assert sum(entry["iscrowd"] for entry in coco.anns.values()) == round(0.0122 * NUM_OBJECTS)
    assert len(coco.imgToAnns) == NUM_IMAGES - 1  # one has no objects
    assert len(coco.cats) == 80 and max(coco.cats) == 90
    assert {entry["category_id"] for entry in coco.anns.values()} <= set(coco.cats)


@pytest.mark.parametrize(("num_images", "num_objects"), [(1, 1), (2, 1), (1, 9), (50, 3)])
def test_numbers_hold_for_tiny_datasets(num_images: int, num_objects: int, tmp_path: Path) -> None:
    path, folder = coco_like.write_dataset(tmp_path, num_images=num_images, num_objects=num_objects)
    document = json.loads(path.read_text())
    assert len(document["images"]) == len(os.listdir(folder)) == num_images
    assert len(document["annotations"]) == num_objects


def test_boxes_and_areas_are_those_of_the_polygons(coco: COCO) -> None:
    for entry in coco.anns.values():
        if entry["iscrowd"]:
            continue
        parts = [np.array(part).reshape(-1, 2) for part in entry["segmentation"]]
        points = np.concatenate(parts)
        low, high = points.min(axis=0), points.max(axis=0)
        np.testing.assert_allclose(entry["bbox"], [*low, *(high - low)], atol=1e-6)
        image = coco.imgs[entry["image_id"]]
        assert (low >= 0).all() and (high <= [image["width"], image["height"]]).all()
        twice = [np.cross(part, np.roll(part, -1, axis=0)) for part in map(_with_zero_z, parts)]
        assert entry["area"] == pytest.approx(sum(abs(part[:, 2].sum()) / 2 for part in twice))


def _with_zero_z(points: np.ndarray) -> np.ndarray:
    return np.pad(points, ((0, 0), (0, 1)))


def test_masks_fill_their_boxes(coco: COCO) -> None:
    for entry in coco.anns.values():
        mask = coco.annToMask(entry)
        rows, columns = np.nonzero(mask)
        tight = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        x, y, width, height = entry["bbox"]
        # A tip narrower than a pixel is in the polygon's box, not in the mask's.
        slack = 0 if entry["iscrowd"] else 8
        assert np.abs(tight - [x, y, x + width, y + height]).max() <= slack
        if entry["iscrowd"]:
            assert mask.sum() == entry["area"]


def test_every_file_has_the_size_that_the_json_says(drawn: Path, coco: COCO) -> None:
    sizes = Counter()
    for image in coco.imgs.values():
        with Image.open(drawn / "train2017" / image["file_name"]) as file:
            assert file.size == (image["width"], image["height"])
            sizes[file.size] += 1
    assert len(sizes) > 5


def test_the_dataset_depends_only_on_the_seed(drawn: Path, tmp_path: Path) -> None:
    texts = [(drawn / "annotations" / "instances_train2017.json").read_bytes()]
    for seed in (0, 1):
        path, _ = coco_like.write_dataset(
            tmp_path / str(seed), num_images=NUM_IMAGES, num_objects=NUM_OBJECTS, seed=seed
        )
        texts.append(path.read_bytes())
    assert texts[0] == texts[1] != texts[2]


def test_files_are_copied_if_links_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, number = os.link, itertools.count()

    def link_or_refuse(source: Path, target: Path) -> None:
        if next(number) % 3 == 0:
            raise OSError(31, "Too many links")
        link(source, target)

    monkeypatch.setattr(os, "link", link_or_refuse)
    _, folder = coco_like.write_dataset(tmp_path, num_images=NUM_IMAGES, num_objects=60)
    files = list(folder.iterdir())
    assert len(files) == NUM_IMAGES
    assert all(file.stat().st_size for file in files)


@pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="memory is measured as Linux counts it"
)
def test_the_index_benchmark_prints_its_tables(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    options = ["--reads", "5", "--rounds", "1", "--ranks", "1", "--json", str(file)]
    index.main(["--data_root", str(drawn), *options])
    table = capsys.readouterr().out
    for name in ("samft, first index", "samft, later start", "pycocotools", "nothing"):
        assert f"| {name} |" in table
    figures = json.loads(file.read_text())
    for runs in figures["openings"].values():
        assert all(run["peak_rss"] > 1 and run["objects"] > 0 for run in runs)
    for reports in figures["sharing"].values():
        roles = Counter(report["role"] for report in reports)
        assert roles == {"rank": 1, "worker": 2}
        assert all(0 < report["private_dirty"] <= report["uss"] for report in reports)


def test_the_loader_benchmark_prints_its_tables(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    options = ["--image_size", "256", "--rounds", "1", "--images", "2", "--json", str(file)]
    loader.main(["--data_root", str(drawn), "--split", "train2017", *options])
    table = capsys.readouterr().out
    for name in (
        "samft",
        "samft, augment flip",
        "baseline, uint8 masks",
        "baseline, float32 masks",
    ):
        assert f"| 256 | {name} |" in table
    (figures,) = json.loads(file.read_text())
    assert all(len(seconds) == 1 for seconds in figures["seconds_per_image"].values())
    mask_ious = np.array(figures["mask_ious"])
    assert len(mask_ious) > 10
    assert mask_ious[:, 0].mean() > 0.99
    assert mask_ious[:, 1].mean() > 0.8  # pixels of the input are coarse in a small window


def test_the_index_benchmark_does_not_import_torch() -> None:
    # Its processes compare memory and start-up time, and torch would be most of both.
    source = "import sys, benchmarks.index; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60)
    assert run.stdout == "False\n", run.stderr
