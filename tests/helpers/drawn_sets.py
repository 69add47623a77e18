"""Small COCO sets of ellipses on dark paper, right ones and ones that went wrong in a known way."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from samft.images.orientation import inverse_orientation, turn_pixels


@dataclass
class DrawnSet:
    """Views of H x W as people see them, with outlines on them, before anything goes wrong."""

    views: list[np.ndarray] = field(default_factory=list)
    masks: list[list[np.ndarray]] = field(default_factory=list)
    polygons: list[list[list[float]]] = field(default_factory=list)


def draw_set(
    seed: int, *, num_images: int = 5, num_objects: int = 4, size: tuple[int, int] = (120, 90)
) -> DrawnSet:
    """Ellipses anywhere in images of about the given H, W."""
    rng = np.random.default_rng(seed)
    drawn = DrawnSet()
    for number in range(num_images):
        height, width = size[0] + 8 * (number % 2), size[1]
        view = rng.normal(40, 4, (height, width, 3))
        masks, polygons = [], []
        for _ in range(num_objects):
            axes = rng.uniform(8, 16, 2)
            centre = rng.uniform(axes.max(), [width - axes.max(), height - axes.max()])
            outline = cv2.ellipse2Poly(
                tuple(centre.astype(int).tolist()),
                tuple(axes.astype(int).tolist()),
                int(rng.integers(180)),
                0,
                360,
                10,
            )
            mask = cv2.fillPoly(np.zeros((height, width), np.uint8), [outline], 1)
            view[mask > 0] = rng.uniform(110, 230, 3)
            masks.append(mask)
            polygons.append(outline.astype(float).ravel().tolist())
        drawn.views.append(np.clip(view, 0, 255).astype(np.uint8))
        drawn.masks.append(masks)
        drawn.polygons.append(polygons)
    return drawn


@dataclass
class Change:
    """What goes wrong on the way from the views to the files and the JSON."""

    orientation: int = 1  # of the files that are not upright: every second one, or all
    all_turned: bool = True
    json_size: str = "view"  # or `file`, `swapped`, `none`
    factor: float = 1.0  # side of the files by side of the views
    fixed: tuple[int, int] | None = None  # W, H that all files are resized to
    border: str = ""  # around images that are fitted into `fixed`: `middle` or `corner`
    rle: str = ""  # `plain`, or a key of LAYOUTS
    noise: bool = False
    boxes: str = "xywh"


def write_set(folder: Path, drawn: DrawnSet, change: Change, *, seed: int = 0) -> Path:
    """Writes files and JSON; returns the JSON's path."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    for number, view in enumerate(drawn.views):
        orientation = change.orientation if change.all_turned or number % 2 else 1
        height, width = view.shape[:2]
        stored = turn_pixels(view, inverse_orientation(orientation))
        if change.fixed or change.factor != 1:
            sides = [round(side * change.factor) for side in stored.shape[1::-1]]
            stored = fit_into(stored, change.fixed or sides, change.border)
        exif = Image.Exif()
        if orientation != 1:
            exif[0x0112] = orientation
        name = f"{number}.png"
        Image.fromarray(stored).save(folder / name, exif=exif)
        sizes = {
            "view": {"height": height, "width": width},
            "file": {"height": stored.shape[0], "width": stored.shape[1]},
            "swapped": {"height": stored.shape[1], "width": stored.shape[0]},
            "none": {},
        }[change.json_size]
        images.append({"id": number + 1, "file_name": name, **sizes})
        pairs = zip(drawn.masks[number], drawn.polygons[number], strict=True)
        for mask, polygon in pairs:
            segmentation: Any = [polygon]
            if change.noise and rng.random() < 0.08:
                segmentation = [(np.array(polygon) - [30, 0] * (len(polygon) // 2)).tolist()]
            if change.rle:
                segmentation = encode(mask, change.rle)
            box = box_of(mask, change.boxes)
            if change.noise and rng.random() < 0.1:
                box = [1.0, 1.0, 5.0, 70.0]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number + 1,
                    "category_id": 1,
                    "iscrowd": 0,
                    "area": int(mask.sum()),
                    "bbox": box,
                    "segmentation": segmentation,
                }
            )
    document = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "ellipse"}],
    }
    path = folder / "_annotations.coco.json"
    path.write_text(json.dumps(document))
    return path


def fit_into(image: np.ndarray, sides: Sequence[int], border: str) -> np.ndarray:
    """An image or a mask in a frame of the given width and height: stretched, or with a border."""
    method = cv2.INTER_AREA if image.ndim == 3 else cv2.INTER_NEAREST
    if not border:
        return cv2.resize(image, tuple(sides), interpolation=method)
    factor = min(sides[0] / image.shape[1], sides[1] / image.shape[0])
    inner = [round(side * factor) for side in image.shape[1::-1]]
    left, top = (
        (a - b) // 2 if border == "middle" else 0 for a, b in zip(sides, inner, strict=True)
    )
    fitted = np.zeros((sides[1], sides[0], *image.shape[2:]), np.uint8)
    scaled = cv2.resize(image, tuple(inner), interpolation=method)
    fitted[top : top + inner[1], left : left + inner[0]] = scaled
    return fitted


def box_of(mask: np.ndarray, form: str) -> list[float]:
    """The box of a mask in one of the forms."""
    x, y, width, height = (float(side) for side in cv2.boundingRect(mask))
    rows, columns = mask.shape
    return {
        "xywh": [x, y, width, height],
        "xyxy": [x, y, x + width, y + height],
        "centre": [x + width / 2, y + height / 2, width, height],
        "shares": [x / columns, y / rows, width / columns, height / rows],
        "image": [0, 0, columns, rows],
        "none": [],
    }[form]


def encode(mask: np.ndarray, layout: str) -> dict[str, Any]:
    """Run lengths in one of the layouts."""
    flat = mask.ravel() if layout.startswith("by-rows") else mask.T.ravel()
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    size = list(mask.shape)
    if layout.endswith("size-swapped"):
        size = size[::-1]
    return {"size": size, "counts": [0, *counts] if flat[0] else counts}
