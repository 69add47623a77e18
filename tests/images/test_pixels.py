"""How values of any type become 8 bits: ranges, bands, pages, and what is kept of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from samft.errors import ConfigError
from samft.images.limits import UnusableImage
from samft.images.pixels import PLAIN, PixelFormat, measure_range, sample_values
from samft.images.ranges import NUM_SAMPLED, measure_ranges

RAMP = np.arange(0, 4096, dtype=np.uint16).reshape(64, 64)


def test_a_range_becomes_0_to_255_and_is_clipped() -> None:
    rgb = PixelFormat("1000,3000").to_rgb(RAMP)
    expected = np.rint(np.clip((RAMP.astype(float) - 1000) / 2000, 0, 1) * 255)
    assert rgb.shape == (64, 64, 3) and rgb.dtype == np.uint8 and rgb.flags.writeable
    np.testing.assert_array_equal(rgb, np.repeat(expected[..., None], 3, axis=2))


@pytest.mark.parametrize("dtype", ["int16", "int32", "uint32", "int64", "float32", "float64"])
def test_every_type_is_mapped_as_uint16_is(dtype: str) -> None:
    pixels = PixelFormat("1000,3000")
    np.testing.assert_array_equal(pixels.to_rgb(RAMP.astype(dtype)), pixels.to_rgb(RAMP))


def test_full_is_the_range_of_the_type() -> None:
    for values, expected in (
        (np.array([[0, 65535]], np.uint16), [0, 255]),
        (np.array([[-32768, 32767]], np.int16), [0, 255]),
        (np.array([[0.0, 0.2, 1.0, 7.0]], np.float32), [0, 51, 255, 255]),
        (np.array([[7, 200]], np.uint8), [7, 200]),
    ):
        assert PixelFormat("full").to_rgb(values)[0, :, 0].tolist() == expected


def test_8_bits_stay_as_they_are_unless_a_range_is_asked_for() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for pixels in (PLAIN, PixelFormat("full"), PixelFormat("0,4095")):
        np.testing.assert_array_equal(pixels.to_rgb(values)[..., 0], values)
        assert not pixels.maps_8_bits
    mapped = PixelFormat("100,200").to_rgb(values)[..., 0].reshape(-1)
    assert PixelFormat("100,200").maps_8_bits
    assert mapped[[0, 100, 150, 200, 255]].tolist() == [0, 0, 128, 255, 255]
    stretched = PixelFormat("percentile").with_ranges({"uint8": (100, 200)})
    np.testing.assert_array_equal(stretched.to_rgb(values)[..., 0].reshape(-1), mapped)


def test_values_that_are_not_finite_do_not_count_and_become_0() -> None:
    values = np.linspace(0, 100, 101, dtype=np.float32).reshape(1, -1)
    spoilt = np.concatenate([values, [[np.nan, np.inf, -np.inf]]], axis=1, dtype=np.float32)
    assert measure_range([sample_values(spoilt)]) == (1.0, 99.0)
    assert PLAIN.to_rgb(spoilt)[0, -3:].tolist() == [[0, 0, 0]] * 3
    np.testing.assert_array_equal(PLAIN.to_rgb(spoilt)[:, :-3], PLAIN.to_rgb(values))


def test_constant_sparse_and_empty_images_are_black_or_stretched() -> None:
    assert not PLAIN.to_rgb(np.full((4, 4), 700, np.uint16)).any()
    assert not PLAIN.to_rgb(np.full((4, 4), np.nan, np.float32)).any()
    sparse = np.zeros((40, 40), np.uint16)
    sparse[3, 5] = 900  # less than a percent: percentiles 1 and 99 are both 0
    assert PLAIN.to_rgb(sparse)[3, 5].tolist() == [255] * 3


def _write_ramps(folder: Path, number: int, *, dtype: str = "uint16") -> list[Path]:
    import tifffile

    paths = [folder / f"{dtype}_{k}.tif" for k in range(number)]
    for k, path in enumerate(paths):
        tifffile.imwrite(path, (np.arange(101).reshape(1, -1) + k).astype(dtype))
    return paths


def test_a_dataset_has_one_range_for_each_type(tmp_path: Path) -> None:
    paths = _write_ramps(tmp_path, 3) + _write_ramps(tmp_path, 1, dtype="float32")
    types = ["uint16"] * 3 + ["float32"]
    pixels = measure_ranges(PLAIN, types, path=lambda k: paths[k])
    pooled = np.concatenate([np.arange(101) + k for k in range(3)])
    low, high = np.percentile(pooled, (1, 99))
    assert pixels.ranges == (("float32", 1.0, 99.0), ("uint16", low, high))
    # What is known is not measured again, and 8 bits need no range.
    more = measure_ranges(pixels, [*types, "uint8"], path=lambda k: pytest.fail("read again"))
    assert more == pixels
    assert any("uint16 values from" in line for line in pixels.lines())


def test_a_large_dataset_is_sampled_evenly(tmp_path: Path) -> None:
    (path,) = _write_ramps(tmp_path, 1)
    opened: list[int] = []
    measure_ranges(PLAIN, ["uint16"] * 1000, path=lambda k: opened.append(k) or path)  # type: ignore[func-returns-value]
    assert sorted(opened) == np.linspace(0, 999, NUM_SAMPLED).round().astype(int).tolist()


@pytest.mark.parametrize(
    "pixels",
    [
        PLAIN,
        PixelFormat("auto", (3, 2, 1), 4, (("uint16", 1.5, 9.0), ("float32", 0.25, 0.5))),
        PixelFormat("0,4095", (2,)),
    ],
)
def test_it_survives_json(pixels: PixelFormat) -> None:
    assert PixelFormat.from_json(json.loads(json.dumps(pixels.to_json()))) == pixels


@pytest.mark.parametrize("saved", [None, 3, {}, {"pixel_range": "auto"}, {"ranges": [1]}])
def test_anything_else_is_no_format(saved: Any) -> None:
    assert PixelFormat.from_json(saved) is None


def test_bands_are_counted_from_1_and_chosen_where_there_are_more_than_three() -> None:
    bands = np.arange(5, dtype=np.uint16) * np.ones((2, 3, 1), np.uint16)
    assert PixelFormat(channels=(3, 2, 1)).choose_bands(bands)[0, 0].tolist() == [2, 1, 0]
    assert PixelFormat(channels=(5,)).choose_bands(bands).tolist() == [[4] * 3] * 2
    assert PixelFormat(channels=(3, 2, 1)).choose_bands(bands[..., :3])[0, 0].tolist() == [0, 1, 2]
    for pixels, what in ((PLAIN, "5 bands"), (PixelFormat(channels=(1, 2, 6)), "1,2,6")):
        with pytest.raises(UnusableImage) as error:
            pixels.choose_bands(bands)
        assert error.value.code == "image-bands" and what in error.value.detail


def test_a_page_is_chosen_where_there_are_several() -> None:
    assert PLAIN.choose_page(1) == 0 == PixelFormat(page=7).choose_page(1)
    assert PixelFormat(page=7).choose_page(7) == 6
    for pixels in (PLAIN, PixelFormat(page=8)):
        with pytest.raises(UnusableImage, match="image-pages"):
            pixels.choose_page(7)


def test_flags_add_to_what_a_checkpoint_says_and_never_contradict_it() -> None:
    saved = PixelFormat("auto", (3, 2, 1), None, (("uint16", 1.0, 9.0),))
    same = saved.completed({"channels": "3,2,1", "page": 2}, flags_of="best.ckpt")
    assert same == PixelFormat("auto", (3, 2, 1), 2, saved.ranges)
    for given in ({"channels": "1,2,3"}, {"pixel_range": "full"}):
        with pytest.raises(ConfigError, match=r"best\.ckpt was trained with"):
            saved.completed(given, flags_of="best.ckpt")
    assert PLAIN.completed({"pixel_range": "0,9"}, flags_of="x") == PixelFormat("0,9")
