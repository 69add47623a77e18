from typing import Any

import numpy as np
import pytest
from pycocotools import mask as mask_utils

from helpers.segmentations import check_segmentation, decode_segmentation
from samft.annotations.mask_checks import RawMasks
from samft.annotations.notation import MaskError
from samft.annotations.segmentation import (
    CroppedMask,
    count_pixels,
    decode_cropped,
    encode_cropped,
)

SQUARE = [2.0, 3, 8, 3, 8, 9, 2, 9]


def _rle(mask: np.ndarray, *, compressed: bool) -> dict[str, Any]:
    if compressed:
        rle = mask_utils.encode(np.asfortranarray(mask))
        return {"size": rle["size"], "counts": rle["counts"].decode()}
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat, prepend=0, append=2))
    return {"size": list(mask.shape), "counts": np.diff(edges, prepend=0).tolist()}


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (200, 301)])
def test_rle_decodes_as_pycocotools_does(compressed: bool, shape: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    for density in (0.02, 0.5, 1.0):
        mask = (generator.random(shape) < density).astype(np.uint8)
        mask[-1, -1] = 1
        decoded = decode_segmentation(_rle(mask, compressed=compressed), shape)
        np.testing.assert_array_equal(decoded, mask)


def test_polygons_decode_as_pycocotools_does() -> None:
    generator = np.random.default_rng(0)
    for trial in range(100):
        parts = [
            generator.uniform(-10, 50, 2 * generator.integers(3, 9)) for _ in range(trial % 3 + 1)
        ]
        expected = mask_utils.decode(mask_utils.merge(mask_utils.frPyObjects(parts, 37, 41)))
        decoded = decode_segmentation([part.tolist() for part in parts], (37, 41))
        np.testing.assert_array_equal(decoded, expected)


def test_known_square_has_the_area_that_was_drawn() -> None:
    mask = decode_segmentation([SQUARE], (20, 30))
    assert mask.sum() == 36 and mask[3:9, 2:8].all()


def test_rle_of_another_size_keeps_its_place() -> None:
    mask = np.zeros((11, 8), np.uint8)
    mask[4:, 2:7] = 1
    rle = _rle(mask, compressed=True)
    np.testing.assert_array_equal(decode_segmentation(rle, (10, 8)), mask[:10])
    padded = np.pad(mask, ((0, 1), (0, 2)))
    np.testing.assert_array_equal(decode_segmentation(rle, (12, 10)), padded)
    assert decode_segmentation(rle, (3, 8)).sum() == 0


def test_a_flat_polygon_list_is_one_part() -> None:
    np.testing.assert_array_equal(
        decode_segmentation(SQUARE, (20, 30)), decode_segmentation([SQUARE], (20, 30))
    )


def test_a_box_of_four_numbers_is_not_drawn() -> None:
    with pytest.raises(MaskError):
        decode_segmentation([[2, 3, 8, 9]], (20, 30))


def test_pixels_are_counted_as_drawn() -> None:
    far = [[v + 25 for v in SQUARE]]
    mask = np.zeros((20, 30), np.uint8)
    mask[:4, 3:5] = 1
    for raw in ([SQUARE], [SQUARE, SQUARE], far, _rle(mask, compressed=True)):
        drawn = decode_segmentation(raw, (20, 30))
        assert count_pixels(check_segmentation(raw), (20, 30)) == drawn.sum()
    assert count_pixels(check_segmentation(far), (20, 30)) == 0
    assert decode_cropped(check_segmentation(far), (20, 30)).mask.shape == (0, 0)


@pytest.mark.parametrize("density", [0.0, 0.1, 0.6, 1.0])
@pytest.mark.parametrize("edge", ["inside", "top", "bottom", "all of it"])
def test_a_crop_is_encoded_as_pycocotools_encodes_the_whole(density: float, edge: str) -> None:
    height, width = 41, 53
    top, left, bottom, right = {
        "inside": (3, 5, 20, 30),
        "top": (0, 5, 20, 30),
        "bottom": (3, 0, height, 30),
        "all of it": (0, 0, height, width),
    }[edge]
    generator = np.random.default_rng(0)
    whole = np.zeros((height, width), dtype=np.uint8)
    whole[top:bottom, left:right] = generator.random((bottom - top, right - left)) < density
    crop = whole[top:bottom, left:right].astype(bool)
    encoded = encode_cropped(CroppedMask(top, left, crop), (height, width))
    assert encoded == _rle(whole, compressed=True)


def test_an_empty_crop_is_encoded_as_an_empty_mask() -> None:
    nothing = np.zeros((0, 0), dtype=bool)
    encoded = encode_cropped(CroppedMask(0, 0, nothing), (7, 5))
    assert encoded == _rle(np.zeros((7, 5), dtype=np.uint8), compressed=True)


@pytest.mark.parametrize("size", [(25, 34), (13, 61), (40, 18), (20, 30)])
@pytest.mark.parametrize("seed", [0, 1])
def test_an_rle_of_another_size_is_cut_or_padded(size: tuple[int, int], seed: int) -> None:
    mask = np.random.default_rng(seed).random(size) < 0.2 + 0.5 * seed
    rle = mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))
    drawn = decode_segmentation({"size": list(size), "counts": rle["counts"].decode()}, (20, 30))
    expected = np.zeros((60, 80), np.uint8)
    expected[: size[0], : size[1]] = mask
    assert (drawn == expected[:20, :30]).all()
    checked = RawMasks()
    checked.add({"size": list(size), "counts": rle["counts"].decode()})
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    extent = [xs[0], ys[0], xs[-1] + 1, ys[-1] + 1]
    assert checked.check().extents.tolist() == [extent]
