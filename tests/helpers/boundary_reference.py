"""Boundary IoU as its paper defines it, in plain loops."""

import cv2
import numpy as np


def paper_boundary(mask: np.ndarray, dilation_ratio: float = 0.02) -> np.ndarray:
    """The paper's `mask_to_boundary`, of its public code, on the whole image."""
    height, width = mask.shape
    dilation = max(1, int(round(dilation_ratio * np.sqrt(height**2 + width**2))))
    padded = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    eroded = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=dilation)
    return mask - eroded[1 : height + 1, 1 : width + 1]


def paper_boundary_iou(truth: np.ndarray, mask: np.ndarray) -> float:
    ours, other = paper_boundary(truth), paper_boundary(mask)
    return float(((ours * other) > 0).sum() / ((ours + other) > 0).sum())
