"""Turned views: the pixels are Pillow's, for every orientation of EXIF, and points follow them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from samft.images.decoder import open_image, read_image
from samft.images.orientation import (
    EdgeMap,
    inverse_orientation,
    turn_back_points,
    turn_pixels,
    turned_size,
)

ORIENTATIONS = range(1, 9)


def _save_image(path: Path, pixels: np.ndarray, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif, quality=95)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_the_view_is_what_pillow_shows(orientation: int, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    _save_image(tmp_path / "a.png", pixels, orientation)
    with Image.open(tmp_path / "a.png") as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    encoded = open_image(tmp_path / "a.png", orientation=orientation)
    assert encoded.size == turned_size((5, 7), orientation) == expected.shape[:2]
    np.testing.assert_array_equal(encoded.decode(), expected)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), pixels)
    back = turn_pixels(expected, inverse_orientation(orientation))
    np.testing.assert_array_equal(back, pixels)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_points_of_the_view_are_found_in_the_stored_image(orientation: int) -> None:
    stored = np.arange(5 * 7, dtype=np.uint8).reshape(5, 7)
    view = turn_pixels(stored, orientation)
    rows, columns = np.indices(view.shape)
    centres = np.stack([columns.ravel(), rows.ravel()], axis=1) + 0.5
    x, y = np.floor(turn_back_points(centres, orientation, size=view.shape[:2])).astype(int).T
    np.testing.assert_array_equal(stored[y, x], view.ravel())


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_reduced_jpeg_is_turned_too(orientation: int, tmp_path: Path) -> None:
    pixels = np.zeros((60, 101, 3), dtype=np.uint8)
    pixels[:30, :50] = 200
    _save_image(tmp_path / "a.jpg", pixels, orientation)
    encoded = open_image(tmp_path / "a.jpg", orientation=orientation)
    reduced = encoded.decode(at_least=turned_size((15, 26), orientation))
    expected = turn_pixels(pixels[::4, ::4], orientation)
    assert reduced.shape == expected.shape == (*turned_size((15, 26), orientation), 3)
    assert np.abs(reduced.astype(int) - expected).mean() < 12  # but for the blurred border


@pytest.mark.parametrize("shape", [(1, 3000), (3000, 1), (1, 1)])
def test_edges_are_looked_for_in_pictures_of_any_shape(shape: tuple[int, int]) -> None:
    edges = EdgeMap(np.full((*shape, 3), 9, dtype=np.uint8))
    assert np.isnan(edges.along(np.full((20, 2), 0.5)))  # all of it is border
