"""Boundary IoU: how well the outlines of two masks agree, which IoU hardly sees on large objects.

Source: Cheng et al., Boundary IoU: Improving Object-Centric Image Segmentation Evaluation, 2021,
and its code, which takes as the boundary what an erosion with a square takes away.
"""

import cv2
import numpy as np

from samft.data.targets import CroppedMask
from samft.evaluation.metrics import cropped_iou

BOUNDARY_SHARE = 0.02  # of the image's diagonal, as in the paper for COCO


def boundary_width(original_size: tuple[int, int]) -> int:
    """Pixels that the boundary reaches into a mask, for an image of size H, W; at least 1."""
    height, width = original_size
    return max(1, int(round(BOUNDARY_SHARE * float(np.hypot(height, width)))))


def boundary_of(mask: CroppedMask, *, width: int) -> CroppedMask:
    """The pixels of a mask that are at most so far from what is not the mask.

    The far side of the image's edge is not the mask. So a crop that holds the whole mask gives what
    the whole image does.

    Args:
        mask: Cropped, if not tightly; [0, 0] where it is empty.
        width: Pixels, counted along rows, columns and diagonals alike.

    Returns:
        The boundary, in the same crop.
    """
    if not mask.mask.size:
        return mask
    padded = np.pad(mask.mask.astype(np.uint8), 1)
    inner = cv2.erode(padded, np.ones((3, 3), dtype=np.uint8), iterations=width)[1:-1, 1:-1]
    return CroppedMask(mask.top, mask.left, mask.mask & (inner == 0))


def boundary_iou(mask: CroppedMask, truth: CroppedMask, *, original_size: tuple[int, int]) -> float:
    """IoU of the boundaries of two masks of one image; 1 where both are empty.

    Args:
        mask: In the original frame.
        truth: In the original frame.
        original_size: H, W of the image, whose diagonal says how wide a boundary is.
    """
    width = boundary_width(original_size)
    return cropped_iou(boundary_of(mask, width=width), boundary_of(truth, width=width))
