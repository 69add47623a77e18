"""Small COCO datasets for tests: a few seconds' worth of images with objects that can be seen."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

SIZES = ((48, 64), (64, 48), (40, 40))


def write_coco(
    folder: Path,
    num_images: int,
    *,
    objects: tuple[int, ...] = (1, 4, 2, 7, 3),
    sizes: tuple[tuple[int, int], ...] = SIZES,
    seed: int = 0,
    split: str = "train",
) -> Path:
    """Writes `SPLIT/_annotations.coco.json` beside PNG images of bright quadrilaterals.

    Args:
        folder: The dataset's root.
        num_images: N.
        objects: Objects in image i are `objects[i % len(objects)]`, so that counts are uneven.
        sizes: H, W of image i are `sizes[i % len(sizes)]`.
        seed: Of shapes, colours and noise.
        split: Name of the split.

    Returns:
        The annotation file.
    """
    generator = np.random.default_rng(seed)
    root = folder / split
    root.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i in range(num_images):
        height, width = sizes[i % len(sizes)]
        image = generator.integers(0, 80, (height, width, 3), dtype=np.uint8)
        name = f"image_{i}.png"
        for _ in range(objects[i % len(objects)]):
            quad = _quadrilateral(generator, height, width)
            colour = generator.integers(120, 256, 3).tolist()
            cv2.fillPoly(image, [quad.astype(np.int32)], colour)
            annotations.append(annotation(len(annotations) + 1, i + 10, quad.reshape(-1).tolist()))
        cv2.imwrite(str(root / name), image)
        images.append({"id": i + 10, "file_name": name, "height": height, "width": width})
    return write_json(root / "_annotations.coco.json", images, annotations)


def _quadrilateral(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    half = generator.uniform(4, min(height, width) / 4, 2)
    centre = generator.uniform(half + 1, np.array([width, height]) - half - 1)
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * generator.uniform(0.6, 1, (4, 2))
    return np.round(centre + half * corners, 2)


def annotation(
    object_id: int, image_id: int, polygon: list[float], **fields: Any
) -> dict[str, Any]:
    """An annotation of one polygon (x y x y ...), with its box."""
    x, y = polygon[::2], polygon[1::2]
    box = [min(x), min(y), max(x) - min(x), max(y) - min(y)]
    entry = {
        "id": object_id,
        "image_id": image_id,
        "category_id": 1,
        "iscrowd": 0,
        "bbox": box,
        "area": box[2] * box[3],
        "segmentation": [polygon],
    }
    return {**entry, **fields}


def write_json(path: Path, images: list[Any], annotations: list[Any]) -> Path:
    """Writes a COCO file of these entries."""
    document = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "thing"}],
    }
    path.write_text(json.dumps(document))
    return path
