from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as mask_utils

from helpers.broken_coco import rle
from helpers.segmentations import check_segmentation
from samft.annotations.mask_checks import RawMasks
from samft.annotations.notation import MaskError, check_rle
from samft.annotations.segmentation import CroppedMask, decode_cropped, encode_cropped

SQUARE = [2.0, 3, 8, 3, 8, 9, 2, 9]
NAN, INF = float("nan"), float("inf")
HUGE = [1e9, 1e9, 2e9, 1e9, 2e9, 2e9]

BAD = {
    "huge coordinates": ([HUGE], "polygon-far-outside"),
    "negative huge": ([[-v for v in HUGE]], "polygon-far-outside"),
    "not finite": ([[0, 0, NAN, 5, 5, 5]], "polygon-not-finite"),
    "infinite": ([[0, 0, INF, 5, 5, 5]], "polygon-not-finite"),
    "infinite and huge": ([[0, 0, -INF, 1e9, 5, 5]], "polygon-not-finite"),
    "integer too large": ([[0, 0, 10**400, 5, 5, 5]], "polygon-malformed"),
    "odd count": ([[1, 1, 5, 1, 5, 5, 2]], "polygon-odd"),
    "text": ([["a", "b", "c", "d", "e", "f"]], "polygon-malformed"),
    "flat text": (["a", "b"], "polygon-malformed"),
    "null part": ([None], "polygon-malformed"),
    "empty part": ([[]], "polygon-too-short"),
    "line": ([[1, 1, 5, 5]], "polygon-too-short"),
    "box": ([2, 3, 8, 9], "polygon-too-short"),
    "first of two reasons": ([[1, 1, 5, 5], [1, 1, 5, 1, 5, 5, 2]], "polygon-too-short"),
    "endless zigzag": ([[0, 0, 9e4, 9e4] * 100], "polygon-too-long"),
    "string": ("polygon", "mask-malformed"),
    "number": (7, "mask-malformed"),
    "null": (None, "mask-missing"),
    "empty list": ([], "mask-missing"),
    "no size": ({"counts": [0, 4]}, "rle-malformed"),
    "no counts": ({"size": [2, 2]}, "rle-malformed"),
    "huge size": ({"size": [10**6, 10**6], "counts": [0, 10**12]}, "rle-too-large"),
    "negative size": ({"size": [-2, -2], "counts": [0, 4]}, "rle-malformed"),
    "size of three": ({"size": [2, 2, 1], "counts": [0, 4]}, "rle-malformed"),
    "too short": ({"size": [2, 2], "counts": [1, 1]}, "rle-malformed"),
    "too long": ({"size": [2, 2], "counts": [1, 9]}, "rle-malformed"),
    "negative count": ({"size": [2, 2], "counts": [-1, 5]}, "rle-malformed"),
    "fraction": ({"size": [2, 2], "counts": [0.5, 3.5]}, "rle-malformed"),
    "wrong letters": ({"size": [2, 2], "counts": "\u00e9\u00e9"}, "rle-malformed"),
    "cut string": ({"size": [2, 2], "counts": "PP"}, "rle-malformed"),
    "endless number": ({"size": [2, 2], "counts": "o" * 40 + "1"}, "rle-malformed"),
    "empty counts": ({"size": [2, 2], "counts": []}, "rle-empty"),
    "empty text": ({"size": [2, 2], "counts": ""}, "rle-empty"),
    "all background": ({"size": [20, 30], "counts": [600]}, "rle-empty"),
}


@pytest.mark.parametrize(("raw", "code"), BAD.values(), ids=BAD)
def test_what_cannot_be_used_is_refused_with_its_code(raw: Any, code: str) -> None:
    with pytest.raises(MaskError) as error:
        check_segmentation(raw)
    assert error.value.code == code


def test_all_at_once_is_each_alone() -> None:
    good = [[SQUARE], SQUARE, [SQUARE, [1.0, 1, 4, 1, 4, 5.25]], rle(compressed=True)]
    everything = [raw for raw, _ in BAD.values()]
    mixed = [item for pair in zip(good * 9, everything, strict=False) for item in pair]
    masks = RawMasks()
    for raw in mixed:
        masks.add(raw)
    checked = masks.check()
    for k, raw in enumerate(mixed):
        if checked.codes[k]:
            with pytest.raises(MaskError) as error:
                check_segmentation(raw)
            assert error.value.code == checked.codes[k] and checked.segmentations.starts[k] == -1
        else:
            alone, batched = check_segmentation(raw), checked.segmentations[k]
            for one, other in zip(_arrays(alone), _arrays(batched), strict=True):
                np.testing.assert_array_equal(one, other)


def _arrays(checked: Any) -> list[Any]:
    return [checked["size"], checked["counts"]] if isinstance(checked, dict) else checked


def test_measures_of_known_shapes() -> None:
    masks = RawMasks()
    triangle = [10.0, 0, 14, 0, 10, 3]
    for raw in ([SQUARE], [SQUARE, triangle], [SQUARE, [1, 2]], rle(compressed=False), SQUARE):
        masks.add(raw)
    checked = masks.check()
    assert checked.areas.tolist() == [36, 42, 36, 36, 36]
    assert checked.extents.tolist() == [[2, 3, 8, 9], [2, 0, 14, 9]] + [[2, 3, 8, 9]] * 3
    assert checked.perimeters.tolist() == [24, 24 + 4 + 4 + 3, 24, 0, 24]
    assert checked.num_parts.tolist() == [1, 2, 1, 1, 1]
    assert checked.part_left_out.tolist() == [False, False, True, False, False]
    assert checked.rle_sizes == {3: (20, 30)} and masks.flat == [4]


POLYGON = st.lists(st.floats(-1e4, 1e4), min_size=6, max_size=20).filter(lambda p: len(p) % 2 == 0)
POLYGONS = st.lists(st.lists(POLYGON, min_size=1, max_size=4), min_size=1, max_size=6)


@given(objects=POLYGONS)
def test_polygons_come_back_to_the_last_bit(objects: list[list[list[float]]]) -> None:
    masks = RawMasks()
    for raw in objects:
        masks.add(raw)
    packed = masks.check().segmentations.take(np.arange(len(objects))[::-1])
    for k, raw in enumerate(objects[::-1]):
        assert [part.tolist() for part in packed[k]] == raw
    with pytest.raises(IndexError):
        packed[len(objects)]


@pytest.mark.parametrize("compressed", [True, False])
def test_rle_comes_back(compressed: bool) -> None:
    raw = rle(compressed=compressed)
    checked = check_segmentation(raw)
    assert checked["size"] == [20, 30] and checked["counts"].sum() == 600
    crop = decode_cropped(checked, (20, 30))
    assert (crop.top, crop.left) == (3, 2)


def test_every_character_of_compressed_rle_is_read() -> None:
    rng = np.random.default_rng(0)
    seen: set[str] = set()
    for _ in range(60):
        mask = cv2.blur(rng.random((90, 70)), (9, 9)) > 0.5
        rle = mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))
        text = rle["counts"].decode()
        seen |= set(text)
        checked = check_rle({"size": list(mask.shape), "counts": text})
        drawn = np.repeat(np.arange(len(checked["counts"])) % 2, checked["counts"])
        np.testing.assert_array_equal(drawn.reshape(70, 90).T, mask)
    assert seen >= set(";[]")


def test_a_small_mask_of_a_very_large_image_is_read() -> None:
    size = (20000, 20000)
    crop = CroppedMask(19900, 19950, np.ones((30, 40), bool))
    decoded = decode_cropped(check_segmentation(encode_cropped(crop, size)), size)
    assert (decoded.top, decoded.left, decoded.mask.shape) == (19900, 19950, (30, 40))
    assert decoded.mask.all()
