"""What stock `SamPredictor` scores with a checkpoint: what is deployed."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools.coco import COCO

import samft  # first: torchvision then imports beside a CPU-only torch

from segment_anything import SamPredictor  # isort: skip


def deployed_iou(checkpoint: Path, annotations: Path, images: Path) -> float:
    """The mean IoU of `SamPredictor`, box by box on the original images, on a CPU."""
    return predictor_iou(SamPredictor(samft.load_sam(checkpoint)), annotations, images)


def predictor_iou(predictor: Any, annotations: Path, images: Path) -> float:
    """The mean IoU of any predictor with the calls of `SamPredictor`, box by box."""
    coco = COCO(annotations)
    ious = []
    for image_id, image in coco.imgs.items():
        annotated = coco.imgToAnns[image_id]
        objects = [one for one in annotated if one["segmentation"] and not one.get("iscrowd")]
        if not objects:
            continue
        predictor.set_image(cv2.imread(str(images / image["file_name"]), cv2.IMREAD_COLOR_RGB))
        for entry in objects:
            x, y, width, height = entry["bbox"]
            box = np.array([x, y, x + width, y + height])
            mask = predictor.predict(box=box, multimask_output=False)[0][0]
            truth = coco.annToMask(entry).astype(bool)
            ious.append((mask & truth).sum() / (mask | truth).sum())
    return float(np.mean(ious))
