"""After tuning on small objects, masks are neither too small nor too large."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from benchmarks.quality_recipes import train_with_samft
from benchmarks.quality_scores import Scorer
from helpers.short_runs import a_config
from samft.recipes.datasets import load_splits

pytestmark = pytest.mark.run

SIZE = 256  # px of the images; the model sees half of it
RADII = (4, 9)  # of the discs, so that they are 1 to 2.25 cells of the decoder wide


def write_discs(root: Path, split: str, *, num_images: int, seed: int) -> None:
    """Bright discs on a dark ground, nine in each image."""
    generator = np.random.default_rng(seed)
    images, annotations = [], []
    (root / split).mkdir(parents=True)
    for number in range(num_images):
        picture = generator.normal(60, 8, (SIZE, SIZE, 3))
        for place in range(9):
            radius = generator.uniform(*RADII)
            centre = 43 + 85 * np.array(divmod(place, 3)) + generator.uniform(-20, 20, 2)
            angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
            outline = centre + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
            fine = np.rint(outline * 16).astype(np.int32)
            cv2.fillPoly(picture, [fine], (190, 200, 210), lineType=cv2.LINE_AA, shift=4)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number + 1,
                    "category_id": 1,
                    "iscrowd": 0,
                    "area": float(np.pi * radius**2),
                    "bbox": [*(centre - radius + 0.5).tolist(), 2 * radius, 2 * radius],
                    "segmentation": [(outline + 0.5).ravel().tolist()],
                }
            )
        name = f"{number}.png"
        cv2.imwrite(str(root / split / name), picture.clip(0, 255).astype(np.uint8))
        images.append({"id": number + 1, "file_name": name, "height": SIZE, "width": SIZE})
    categories = [{"id": 1, "name": "disc"}]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (root / split / "_annotations.coco.json").write_text(json.dumps(document))


@pytest.fixture(scope="module")
def discs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("discs")
    write_discs(root, "train", num_images=12, seed=0)
    write_discs(root, "val", num_images=6, seed=1)
    return root


def test_masks_of_small_objects_have_their_area(discs: Path, tmp_path: Path) -> None:
    config = a_config(
        discs,
        tmp_path,
        image_size=SIZE // 2,
        freeze_image_encoder=True,
        steps=150,
        batch_size=4,
    )
    scorer = Scorer(load_splits(config).val.subset, image_size=SIZE // 2)
    scores = scorer.score(train_with_samft(config), resize_mode="pad")
    assert scores.iou.mean() > 0.75
    assert 0.95 <= np.median(scores.area_ratio) <= 1.05
