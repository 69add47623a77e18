"""Boundary IoU on crops: equal to the paper's computation on the whole image."""

import cv2
import numpy as np
import pytest

from helpers.boundary_reference import paper_boundary_iou
from samft.annotations.segmentation import CroppedMask
from samft.evaluation.metrics import boundary_iou, boundary_width, mask_boundary


def crop(mask: np.ndarray, margin: int = 0) -> CroppedMask:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, left = max(0, rows[0] - margin), max(0, columns[0] - margin)
    part = mask[top : rows[-1] + 1 + margin, left : columns[-1] + 1 + margin]
    return CroppedMask(int(top), int(left), part.astype(bool))


def blob(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A smooth shape with holes and parts, which often reaches the image's edge."""
    noise = generator.normal(size=(height // 8 + 3, width // 8 + 3)).astype(np.float32)
    smooth = cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    return (smooth > generator.uniform(-0.5, 0.8)).astype(np.uint8)


@pytest.mark.parametrize("size", [(480, 640), (333, 121), (40, 40), (600, 17), (9, 12)])
@pytest.mark.parametrize("margin", [0, 3])
def test_crops_give_the_boundary_iou_of_whole_images(size: tuple[int, int], margin: int) -> None:
    generator = np.random.default_rng(size[0])
    values = []
    for _ in range(8):
        mask, truth = blob(generator, *size), blob(generator, *size)
        # One inside of the other's reach, so that boundaries meet.
        truth = np.where(generator.random(size) < 0.98, mask, truth).astype(np.uint8)
        if not mask.any() or not truth.any():
            continue
        iou = boundary_iou(crop(mask, margin), crop(truth, margin), original_size=size)
        assert iou == pytest.approx(paper_boundary_iou(truth, mask), abs=1e-12)
        values.append(iou)
    assert len(values) >= 4 and 0 < np.mean(values) < 1


def test_a_rectangle_in_closed_form() -> None:
    size = (300, 400)  # the diagonal is 500: ten pixels
    assert boundary_width(size) == 10
    whole = CroppedMask(100, 100, np.ones((60, 80), dtype=bool))
    ring = mask_boundary(whole, width=10)
    assert ring.mask.sum() == 60 * 80 - 40 * 60
    # Ten columns less: 60 x 70, whose ring reaches ten pixels in from its own right side.
    less = CroppedMask(100, 100, np.ones((60, 70), dtype=bool))
    common = 10 * 70 * 2 + 10 * 40
    union = (60 * 80 - 40 * 60) + 40 * 10
    assert boundary_iou(less, whole, original_size=size) == common / union


def test_the_images_edge_is_a_boundary() -> None:
    corner = CroppedMask(0, 0, np.ones((5, 5), dtype=bool))
    assert mask_boundary(corner, width=1).mask.sum() == 16


def test_equal_masks_and_empty_ones() -> None:
    size = (50, 50)
    full = CroppedMask(3, 4, np.ones((20, 9), dtype=bool))
    empty = CroppedMask(0, 0, np.zeros((0, 0), dtype=bool))
    assert boundary_iou(full, full, original_size=size) == 1
    assert boundary_iou(empty, full, original_size=size) == 0
    assert boundary_iou(empty, empty, original_size=size) == 1
    assert boundary_width((2, 3)) == 1
