"""A workspace with what the pages name: a small dataset, checkpoints, a finished run."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from helpers import REPOSITORY
from helpers.coco_files import write_coco
from helpers.documentation import SMALL_FLAGS, Runner, smaller_exports, smaller_trainings
from helpers.tiny_checkpoint import tiny_sam
from samft.checkpoints.top_k import save_tensors
from samft.cli import run_command
from samft.demo import main as demo
from samft.images.decoder import read_image
from samft.train import main as train

SIZE = 64
SMALL_YAML = f"""
model_type: vit_tiny
checkpoint_path: auto
image_size: {SIZE}
steps: 2
metrics_interval: 2
num_workers: 0
device: cpu
"""


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the pages name."""
    folder = tmp_path_factory.mktemp("material")
    data, run = folder / "DATASET", folder / "runs" / "mine"
    assert run_command(demo, ["--output_dir", str(data), "--images", "12"]) == 0
    flags = [*SMALL_FLAGS["train"].split(), "--freeze_image_encoder", "--cache_embeddings", "on"]
    assert run_command(train, ["--data_root", str(data), "--output_dir", str(run), *flags]) == 0
    summary = json.loads((run / "summary.json").read_text())
    best = Path(summary["best_checkpoint"])
    save_tensors(folder / "sam_vit_b_01ec64.pth", tiny_sam(image_size=SIZE).state_dict())
    for path in (folder / "FILE", run / "1500-0.83.ckpt"):
        shutil.copy(best, path)
    shutil.copy(best.with_suffix(".json"), run / "1500-0.83.json")
    shutil.copy(next((data / "val").glob("*.jpg")), folder / "PHOTO.jpg")
    write_coco(folder / "PHOTOS", 2, split="val")
    shutil.copytree(data / "val", folder / "FOLDER")
    (folder / "FOLDER" / "_annotations.coco.json").rename(folder / "COCO.json")
    (folder / "results.json").write_text(json.dumps(detections(folder / "COCO.json")))
    points = [{"image": "PHOTO.jpg", "points": [[120, 90], [30, 200]], "labels": [1, 0]}]
    (folder / "POINTS.json").write_text(json.dumps(points))
    (folder / "small.yaml").write_text(SMALL_YAML)
    shutil.copytree(REPOSITORY / "configs", folder / "configs")
    shutil.copy(REPOSITORY / "launch.sh", folder)
    return folder


def detections(annotations: Path) -> list[dict[str, object]]:
    """A detector's results: the boxes of the objects, with scores."""
    document = json.loads(annotations.read_text())
    keys = ("image_id", "category_id", "bbox")
    return [{**{k: entry[k] for k in keys}, "score": 0.9} for entry in document["annotations"]]


@pytest.fixture
def runner(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runner]:
    """Runs blocks in a copy of the material."""
    workspace = tmp_path / "workspace"
    shutil.copytree(material, workspace)
    monkeypatch.chdir(workspace)
    image = read_image(workspace / "PHOTO.jpg")
    box = np.array([40.0, 60.0, 310.0, 280.0])
    with smaller_exports(monkeypatch, SIZE), smaller_trainings(monkeypatch):
        yield Runner(workspace, given={"image": image, "box": box})
