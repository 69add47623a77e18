"""Masks without prompts: stock's generator, also where torchvision lacks its operators."""

from typing import Any

import torch
from segment_anything import SamAutomaticMaskGenerator, automatic_mask_generator
from segment_anything.modeling import Sam
from torch import Tensor

from samft.runtime.torchvision_compat import LIBRARY

_POINTS = 64  # decoded at once, as is stock's default
_PIXELS = 1024 * 1024  # of an image that they are decoded at once for


def build_mask_generator(sam: Sam, **options: Any) -> SamAutomaticMaskGenerator:
    """The stock generator, with run lengths as its output.

    Args:
        sam: The model, at any image size.
        options: Of `SamAutomaticMaskGenerator`: `points_per_side`, `pred_iou_thresh`, ...
    """
    if LIBRARY is not None:  # torchvision's own operators did not load, see `torchvision_compat`
        automatic_mask_generator.batched_nms = _one_class_nms
    return SamAutomaticMaskGenerator(sam, output_mode="uncompressed_rle", **options)


def points_at_once(size: tuple[int, int]) -> int:
    """How many points to decode at once, so that memory does not grow with the image.

    The generator holds three masks a point at the image's own resolution. What it finds does not
    depend on this number.

    Args:
        size: H, W of the image, px.
    """
    return max(1, min(_POINTS, _POINTS * _PIXELS // (size[0] * size[1])))


def non_maximum_suppression(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Which boxes to keep: from the best score on, those that no kept one overlaps too much.

    Args:
        boxes: float [K, 4], x0 y0 x1 y1.
        scores: float [K].
        iou_threshold: The largest IoU of two boxes that are both kept.

    Returns:
        int64, the kept ones in the order of falling scores.

    Source: `torchvision.ops.nms`, which it equals.
    """
    order = torch.argsort(scores, descending=True, stable=True)
    sorted_boxes = boxes[order]
    areas = (sorted_boxes[:, 2:] - sorted_boxes[:, :2]).prod(1)
    alive = torch.ones(len(order), dtype=torch.bool, device=boxes.device)
    for k in range(len(order)):
        if alive[k]:
            low = torch.maximum(sorted_boxes[k, :2], sorted_boxes[k + 1 :, :2])
            high = torch.minimum(sorted_boxes[k, 2:], sorted_boxes[k + 1 :, 2:])
            common = (high - low).clamp(min=0).prod(1)
            alive[k + 1 :] &= ~(common / (areas[k] + areas[k + 1 :] - common) > iou_threshold)
    return order[alive]


def _one_class_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    # In the place of `batched_nms`: the generator has one class only.
    assert not idxs.any()
    return non_maximum_suppression(boxes, scores, iou_threshold)
