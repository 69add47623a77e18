"""IoU and boundary IoU of single masks at the image's original resolution, and their means.

The masks are those of `SamPredictor`: thresholded at the original resolution. IoUs are computed on
crops, which give the same numbers as whole images in a fraction of the time.
"""

from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from samft import distributed
from samft.annotations.segmentation import CroppedMask
from samft.evaluation.metric_base import Metric

BOUNDARY_SHARE = 0.02  # of the image's diagonal, as in the paper for COCO


def cropped_iou(mask: CroppedMask, truth: CroppedMask) -> float:
    """IoU of two masks of one image; 1 where both are empty.

    Example:
        >>> square = np.ones((2, 2), dtype=bool)
        >>> cropped_iou(CroppedMask(0, 0, square), CroppedMask(0, 1, square))  # 2 of 6 px
        0.3333333333333333
    """
    top, left = max(mask.top, truth.top), max(mask.left, truth.left)
    bottom = min(mask.top + mask.mask.shape[0], truth.top + truth.mask.shape[0])
    right = min(mask.left + mask.mask.shape[1], truth.left + truth.mask.shape[1])
    intersection = 0
    if bottom > top and right > left:
        # Both masks, cut to the rectangle that their crops share.
        predicted, true = (
            crop.mask[top - crop.top : bottom - crop.top, left - crop.left : right - crop.left]
            for crop in (mask, truth)
        )
        intersection = int(np.count_nonzero(predicted & true))
    union = int(np.count_nonzero(mask.mask)) + int(np.count_nonzero(truth.mask)) - intersection
    return intersection / union if union else 1.0


def whole_mask(crop: CroppedMask, size: tuple[int, int]) -> NDArray[np.bool_]:
    """A mask in its image of size H, W: bool [H, W]."""
    (left, top, right, bottom), mask = crop.extent, np.zeros(size, dtype=bool)
    mask[top:bottom, left:right] = crop.mask
    return mask


def visible_part(
    mask: CroppedMask, *, origin: tuple[int, int], original_size: tuple[int, int]
) -> CroppedMask:
    """What a window shows of a mask, which may be nothing.

    Args:
        mask: In the original frame.
        origin: y, x of the window in the image, px.
        original_size: H, W of the window, px.
    """
    left, top, right, bottom = mask.extent
    y0, x0 = max(top, origin[0]), max(left, origin[1])
    y1 = max(y0, min(bottom, origin[0] + original_size[0]))
    x1 = max(x0, min(right, origin[1] + original_size[1]))
    return CroppedMask(y0, x0, mask.mask[y0 - top : y1 - top, x0 - left : x1 - left])


def _gather_state(state: Tensor, group: Any = None) -> list[Tensor]:
    # In place of torchmetrics' own, which waits for other ranks without a look for signals.
    return distributed.all_gather(state)


class MaskMean(Metric):
    """The mean of one number per mask, exact over any number of ranks and batches.

    States are a float64 sum and count, summed over ranks: a mean of batch means would weight
    images with few masks too much.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        """Passes keyword arguments on to `torchmetrics.Metric`."""
        super().__init__(dist_sync_fn=_gather_state, **kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Adds one number per mask.

        Args:
            values: float [M]; M may be 0.
        """
        self.total += values.sum(dtype=torch.float64)
        self.count += values.numel()

    def compute(self) -> Tensor:
        """The mean over all masks so far.

        Returns:
            float64 scalar; nan if there were none.
        """
        return self.total / self.count


class PerMaskIoU(MaskMean):
    """`per_mask_iou`: the mean over masks of each mask's IoU with its truth."""


def box_fill_ious(
    boxes: Tensor,
    truths: list[CroppedMask],
    *,
    input_size: tuple[int, int],
    original_size: tuple[int, int],
    origin: tuple[int, int] = (0, 0),
) -> Tensor:
    """IoU of each box of one image, filled, with the true mask: the score of using no model at all.

    Args:
        boxes: float [M, 4], x0 y0 x1 y1 in pixels of the input frame, neither flipped nor jittered.
        truths: M tight crops of the true masks, original frame.
        input_size: Height and width of the image in the input frame.
        original_size: Height and width of the original image, or of a window of it.
        origin: y, x of the window in the image, px.

    Returns:
        float64 [M]; a pixel is inside a box if its centre is.
    """
    (height, width), (input_height, input_width) = original_size, input_size
    scale = torch.tensor([width / input_width, height / input_height] * 2, dtype=torch.float64)
    largest = torch.tensor([width, height] * 2)
    edges = (boxes.cpu().double() * scale).round().long()
    edges = edges.clamp(min=torch.zeros_like(largest), max=largest)
    ious = []
    for (left, top, right, bottom), truth in zip(edges.tolist(), truths, strict=True):
        filled = np.ones((max(0, bottom - top), max(0, right - left)), dtype=bool)
        box = CroppedMask(origin[0] + top, origin[1] + left, filled)
        ious.append(cropped_iou(box, truth))
    return torch.tensor(ious, dtype=torch.float64)


def boundary_iou(mask: CroppedMask, truth: CroppedMask, *, original_size: tuple[int, int]) -> float:
    """IoU of the boundaries of two masks of one image; 1 where both are empty.

    It measures how well outlines agree, to which the IoU of large objects is nearly blind.

    Args:
        mask: In the original frame.
        truth: In the original frame.
        original_size: H, W of the image, whose diagonal sets the width of a boundary.

    Source: Cheng et al., Boundary IoU: Improving Object-Centric Image Segmentation Evaluation,
    2021, and its code, where the boundary is what an erosion by a square removes.
    """
    width = boundary_width(original_size)
    return cropped_iou(mask_boundary(mask, width=width), mask_boundary(truth, width=width))


def boundary_width(original_size: tuple[int, int]) -> int:
    """Width of a boundary in an image of size H, W: 2 % of its diagonal, at least 1 px."""
    height, width = original_size
    return max(1, int(round(BOUNDARY_SHARE * float(np.hypot(height, width)))))


def mask_boundary(mask: CroppedMask, *, width: int) -> CroppedMask:
    """The band of mask pixels within `width` px of the mask's border.

    The edge of the image counts as border. So a crop that holds the whole mask has the same
    boundary as the whole image.

    Args:
        mask: A crop, not necessarily tight; [0, 0] if empty.
        width: Pixels, counted along rows, columns and diagonals alike.

    Returns:
        The boundary, in the same crop.
    """
    if not mask.mask.size:
        return mask
    padded = np.pad(mask.mask.astype(np.uint8), 1)
    inner = cv2.erode(padded, np.ones((3, 3), dtype=np.uint8), iterations=width)[1:-1, 1:-1]
    return CroppedMask(mask.top, mask.left, mask.mask & (inner == 0))
