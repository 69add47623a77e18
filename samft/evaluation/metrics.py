"""Per-mask IoU, at the resolution of the original image, as `SamPredictor` would give it."""

import resource
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from samft.data.targets import CroppedMask


class MaskMean(Metric):
    """The mean of one number per mask, exact over any number of ranks and batches.

    States are a float64 sum and count, summed over ranks: a mean of means would weigh images with
    few masks too much.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        """Passes keyword arguments on to `torchmetrics.Metric`."""
        super().__init__(**kwargs)
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
            float64 scalar; nan where there were none.
        """
        return self.total / self.count


class PerMaskIoU(MaskMean):
    """`per_mask_iou`: the mean over masks of each mask's IoU with its truth."""


@lru_cache(maxsize=64)
def upsampling_matrix(low: int, frame: int, inside: int, original: int) -> Tensor:
    """`Sam.postprocess_masks` along one axis, as a matrix.

    SAM upsamples logits bilinearly to the model frame, cuts the padding off, and resizes bilinearly
    to the original image. Each step is linear and separable, so on one axis the whole is a matrix,
    and any rectangle of the result can be had without the rest.

    Args:
        low: Logits along the axis, S/4.
        frame: S.
        inside: Pixels of the frame that are image.
        original: Pixels of the original image.

    Returns:
        float32 [original, low].

    Source: `segment_anything/modeling/sam.py`, `postprocess_masks`.
    """
    to_frame = F.interpolate(torch.eye(low)[None], size=frame, mode="linear")[0]
    to_original = F.interpolate(to_frame[None, :, :inside], size=original, mode="linear")[0]
    return to_original.T.contiguous()


def original_masks(
    mask_logits: Tensor,
    *,
    input_size: tuple[int, int],
    original_size: tuple[int, int],
    image_size: int,
) -> Iterator[CroppedMask]:
    """The masks of one image at its original resolution.

    Equal to thresholding `Sam.postprocess_masks` at 0, but only the rectangle that can hold
    positive logits is computed: bilinear resizing makes no positive value out of negative ones.

    Args:
        mask_logits: float [M, S/4, S/4], masks of one image.
        input_size: Height and width of the image in the model frame.
        original_size: Height and width of the original image.
        image_size: S.

    Yields:
        M masks, cropped, if not tightly; [0, 0] where the mask is empty.
    """
    low = mask_logits.shape[-1]
    device = mask_logits.device
    rows, columns = (
        upsampling_matrix(low, image_size, input_size[axis], original_size[axis]).to(device)
        for axis in (0, 1)
    )
    positive = mask_logits > 0
    spans = torch.stack([_span(positive.any(2), rows), _span(positive.any(1), columns)], dim=1)
    for logits, span in zip(mask_logits.float(), spans.tolist(), strict=True):
        (top, bottom), (left, right) = span
        mask = (rows[top:bottom] @ logits @ columns[left:right].T > 0).cpu().numpy()
        yield CroppedMask(top, left, mask)


def _span(positive: Tensor, matrix: Tensor) -> Tensor:
    # Outputs that draw on at least one positive cell: first and one past the last; 0, 0 if none.
    touched = (positive.float() @ (matrix != 0).float().T) > 0
    numbers = torch.arange(1, touched.shape[1] + 1, device=touched.device)
    last = (touched * numbers).amax(1)
    first = (touched * numbers.flip(0)).amax(1)
    return torch.stack([torch.where(last > 0, touched.shape[1] - first, 0), last], dim=1)


def cropped_iou(mask: CroppedMask, truth: CroppedMask) -> float:
    """IoU of two masks of one image; 1 where both are empty."""
    top, left = max(mask.top, truth.top), max(mask.left, truth.left)
    bottom = min(mask.top + mask.mask.shape[0], truth.top + truth.mask.shape[0])
    right = min(mask.left + mask.mask.shape[1], truth.left + truth.mask.shape[1])
    intersection = 0
    if bottom > top and right > left:
        ours = mask.mask[top - mask.top : bottom - mask.top, left - mask.left : right - mask.left]
        other = truth.mask[
            top - truth.top : bottom - truth.top, left - truth.left : right - truth.left
        ]
        intersection = int(np.count_nonzero(ours & other))
    union = int(np.count_nonzero(mask.mask)) + int(np.count_nonzero(truth.mask)) - intersection
    return intersection / union if union else 1.0


def box_fill_ious(
    boxes: Tensor,
    truths: list[CroppedMask],
    *,
    input_size: tuple[int, int],
    original_size: tuple[int, int],
) -> Tensor:
    """IoU that filling each box of one image would score: the least that a model has to beat.

    Args:
        boxes: float [M, 4], x0 y0 x1 y1 in pixels of the model frame, neither flipped nor moved.
        truths: M tight crops of the true masks, original frame.
        input_size: Height and width of the image in the model frame.
        original_size: Height and width of the original image.

    Returns:
        float64 [M]; a pixel is inside a box where its centre is.
    """
    (height, width), (input_height, input_width) = original_size, input_size
    scale = torch.tensor([width / input_width, height / input_height] * 2, dtype=torch.float64)
    largest = torch.tensor([width, height] * 2)
    edges = (boxes.cpu().double() * scale).round().long()
    edges = edges.clamp(min=torch.zeros_like(largest), max=largest)
    ious = []
    for (left, top, right, bottom), truth in zip(edges.tolist(), truths, strict=True):
        filled = np.ones((max(0, bottom - top), max(0, right - left)), dtype=bool)
        ious.append(cropped_iou(CroppedMask(top, left, filled), truth))
    return torch.tensor(ious, dtype=torch.float64)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: allocated on the GPU, or resident on the CPU; in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
