"""Outlines along the edges of pixels: what pycocotools and samft draw of them is the mask."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_utils

from samft.annotations.segmentation import CroppedMask, decode_cropped
from samft.interchange.outlines import trace_outlines

RING = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1]], bool)


def drawn(polygons: list[list[float]], size: tuple[int, int]) -> np.ndarray:
    return np.asarray(mask_utils.decode(mask_utils.merge(mask_utils.frPyObjects(polygons, *size))))


def test_a_rectangle_has_its_four_corners() -> None:
    (polygon,) = trace_outlines(CroppedMask(3, 5, np.ones((2, 4), bool)))
    assert {tuple(polygon[k : k + 2]) for k in range(0, 8, 2)} == {(5, 3), (9, 3), (9, 5), (5, 5)}
    assert len(polygon) == 8


def test_no_pixel_has_no_outline() -> None:
    assert trace_outlines(CroppedMask(0, 0, np.zeros((0, 0), bool))) == []
    assert trace_outlines(CroppedMask(2, 2, np.zeros((3, 3), bool))) == []


def test_a_hole_stays_a_hole() -> None:
    polygons = trace_outlines(CroppedMask(0, 0, RING))
    assert len(polygons) == 2
    assert (drawn(polygons, (3, 3)) == RING).all()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    share=st.floats(0.05, 0.95),
    block=st.integers(1, 3),
)
def test_any_mask_is_drawn_back(seed: int, size: tuple[int, int], share: float, block: int) -> None:
    pixels = np.random.default_rng(seed).random(size) < share
    mask = np.repeat(np.repeat(pixels, block, 0), block, 1)
    whole = np.pad(mask, ((2, 3), (4, 1)))
    polygons = trace_outlines(CroppedMask(2, 4, mask))
    if not mask.any():
        assert polygons == []
        return
    assert (drawn(polygons, whole.shape) == whole).all()
    crop = decode_cropped(polygons, whole.shape)
    ours = np.zeros_like(whole)
    x0, y0, x1, y1 = crop.extent
    ours[y0:y1, x0:x1] = crop.mask
    assert (ours == whole).all()


@pytest.mark.parametrize("count", [1, 40])
def test_many_holes_need_no_deep_recursion(count: int) -> None:
    mask = np.ones((2 * count + 1, 2 * count + 1), bool)
    mask[1::2, 1::2] = False
    polygons = trace_outlines(CroppedMask(0, 0, mask))
    assert (drawn(polygons, mask.shape) == mask).all()
