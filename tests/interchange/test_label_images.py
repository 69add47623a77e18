"""The numbers of a label image, whatever its format and shape."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from samft.errors import DataError
from samft.interchange.labelled import find_images, objects_of_numbers, read_numbers


@pytest.mark.parametrize("shape", [(5, 7), (1, 7), (7, 1), (1, 1), (1, 3), (3, 1)])
def test_an_image_of_one_pixel_across_keeps_its_shape(shape: tuple[int, int], tmp_path) -> None:
    numbers = np.arange(1, 1 + np.prod(shape), dtype=np.uint16).reshape(shape)
    small = numbers.astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", numbers, compression="zlib")
    tifffile.imwrite(tmp_path / "b.tif", numbers, imagej=True)
    Image.fromarray(small).save(tmp_path / "c.png")
    Image.fromarray(np.repeat(small[..., None], 3, axis=2)).save(tmp_path / "d.png")
    for name in ("a.tif", "b.tif", "c.png", "d.png"):
        np.testing.assert_array_equal(read_numbers(tmp_path / name), numbers, err_msg=name)


@pytest.mark.parametrize("shape", [(4, 5, 7), (2, 1, 7)])
def test_a_stack_is_no_label_image(shape: tuple[int, ...], tmp_path: Path) -> None:
    numbers = np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)
    tifffile.imwrite(tmp_path / "a.tif", numbers, photometric="minisblack")
    with pytest.raises(DataError, match="holds colours or fractions"):
        read_numbers(tmp_path / "a.tif")


def test_a_jpeg_is_no_label_image(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.jpg")
    with pytest.raises(DataError, match="a JPEG, which changes numbers"):
        read_numbers(tmp_path / "a.jpg")


def test_negative_numbers_are_no_objects() -> None:
    numbers = np.array([[-1, 0, 3], [-1, 3, 7]])
    objects = objects_of_numbers(numbers, name="a", source=Path("b"))
    assert [one.source for one in objects] == ["b, value 3", "b, value 7"]


def test_files_that_a_system_hides_are_no_images(tmp_path: Path) -> None:
    for name in ("a.png", "._a.png"):
        (tmp_path / name).write_bytes(b"")
    assert list(find_images(tmp_path)) == ["a"]
