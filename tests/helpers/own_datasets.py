"""A dataset of a caller's own, as `samft.finetune` takes it, and the same as a COCO file."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_utils

from helpers.coco_files import write_json

SIZES = ((48, 64), (64, 48), (40, 40))


class Discs:
    """Bright discs on noise: an image uint8 [H, W, 3], and masks, bool [K, H, W]."""

    def __init__(self, length: int, *, seed: int = 0, objects: tuple[int, ...] = (1, 3, 2)) -> None:
        self.length, self.seed, self.objects = length, seed, objects

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> tuple[Any, Any]:
        generator = np.random.default_rng((self.seed, i))
        height, width = SIZES[i % len(SIZES)]
        image = generator.integers(0, 80, (height, width, 3), dtype=np.uint8)
        ys, xs = np.mgrid[:height, :width]
        masks = []
        for _ in range(self.objects[i % len(self.objects)]):
            radius = generator.uniform(4, 9)
            y, x = generator.uniform(10, (height - 10, width - 10))
            masks.append((ys - y) ** 2 + (xs - x) ** 2 < radius**2)
            image[masks[-1]] = generator.integers(120, 256, 3)
        return image, np.array(masks)


def write_as_coco(dataset: Any, root: Path, *, split: str = "train") -> Path:
    """Writes PNG files and RLE with the ids that samft gives to the items of a dataset."""
    (root / split).mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i in range(len(dataset)):
        image, masks = dataset[i]
        name = f"{i}.png"
        cv2.imwrite(str(root / split / name), image[..., ::-1])
        height, width = image.shape[:2]
        images.append({"id": i, "file_name": name, "height": height, "width": width})
        annotations += [
            {**_annotation_of(mask), "id": len(annotations) + 1 + k, "image_id": i}
            for k, mask in enumerate(masks)
        ]
    return write_json(root / split / "_annotations.coco.json", images, annotations)


def _annotation_of(mask: NDArray[np.bool_]) -> dict[str, Any]:
    rle = mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {
        "category_id": 1,
        "iscrowd": 0,
        "bbox": mask_utils.toBbox(rle).tolist(),
        "area": int(mask.sum()),
        "segmentation": {"size": list(mask.shape), "counts": rle["counts"].decode()},
    }
