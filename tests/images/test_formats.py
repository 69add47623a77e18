"""Files of every format and type: the check and the training read them alike, or refuse both."""

import io
from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from samft.images.decoder import open_image, read_image
from samft.images.files import ImageError, inspect_image
from samft.images.pixels import PixelFormat

HEIGHT, WIDTH = 24, 36
COLOURS = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
GREY = COLOURS[..., 0]
DEEP = GREY.astype(np.uint16) * 16
FIVE = np.stack([GREY + k for k in range(5)], axis=-1).astype(np.uint16)


def with_pillow(kind: str, *frames: NDArray[np.uint8], **options: Any) -> bytes:
    stream = io.BytesIO()
    first, *others = (Image.fromarray(frame) for frame in frames)
    more = {"save_all": True, "append_images": others} if others else {}
    first.save(stream, kind, **more, **options)
    return stream.getvalue()


def tiff(values: NDArray[Any], **options: Any) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, values, **options)
    return stream.getvalue()


def tiff_pages(*pages: tuple[NDArray[Any], dict[str, Any]]) -> bytes:
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream) as writer:
        for values, options in pages:
            writer.write(values, photometric="rgb", metadata=None, **options)
    return stream.getvalue()


def read_both(folder: Path, content: bytes, **chosen: Any) -> NDArray[np.uint8] | str:
    """The image, or the code of why it is refused, after checking that both agree."""
    path, pixels = folder / "image", PixelFormat(**{"pixel_range": "0,4080", **chosen})
    path.write_bytes(content)
    facts = inspect_image(path, pixels)
    if facts.problem is not None:
        with pytest.raises(ImageError):
            read_image(path, pixels=pixels)
        return facts.problem
    image = read_image(path, pixels=pixels)
    assert image.shape == (facts.height, facts.width, 3)
    assert open_image(path, pixels=pixels).size == (facts.height, facts.width)
    return image


@pytest.mark.parametrize("kind", ["TGA", "PCX", "BMP", "PPM", "SGI", "QOI", "DIB", "PNG"])
def test_formats_without_loss(tmp_path: Path, kind: str) -> None:
    np.testing.assert_array_equal(read_both(tmp_path, with_pillow(kind, COLOURS)), COLOURS)


@pytest.mark.parametrize("kind", ["WEBP", "JPEG2000", "AVIF", "GIF", "JPEG"])
def test_formats_with_loss_are_what_pillow_reads(tmp_path: Path, kind: str) -> None:
    content = with_pillow(kind, cv2.blur(COLOURS, (9, 9)))
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)
    assert np.abs(np.asarray(read_both(tmp_path, content)) - expected).max() <= 2


DEEP_FILES = {
    "PNG": cv2.imencode(".png", DEEP)[1].tobytes(),
    "PPM": cv2.imencode(".pgm", DEEP)[1].tobytes(),
    "big-endian": tiff(DEEP, byteorder=">"),
    **{name: tiff(DEEP, compression=name) for name in ("lzw", "deflate", "zstd", "packbits")},
    **{
        kind: tiff(DEEP.astype(kind)) for kind in ("int16", "int32", "uint32", "float32", "float64")
    },
    "float16": tiff((DEEP / 2).astype(np.float16)),
    "ImageJ": tiff(DEEP, imagej=True),
    "OME": tiff(DEEP, ome=True),
    "white is zero": tiff(65535 - DEEP, photometric="miniswhite"),
    "with alpha": tiff(
        np.stack([DEEP, DEEP // 2], -1), photometric="minisblack", extrasamples=["unassalpha"]
    ),
}


@pytest.mark.parametrize("name", DEEP_FILES)
def test_12_bits_of_any_type_give_the_8_that_they_were_made_of(tmp_path: Path, name: str) -> None:
    most = "0,2040" if name == "float16" else "0,4080"
    image = read_both(tmp_path, DEEP_FILES[name], pixel_range=most)
    np.testing.assert_allclose(image, np.stack([GREY] * 3, -1), atol=name == "float16")


def test_colours_of_16_bits_keep_their_order(tmp_path: Path) -> None:
    deep = COLOURS.astype(np.uint16) * 16
    planar = deep.transpose(2, 0, 1).copy()
    for content in (
        cv2.imencode(".png", deep[..., ::-1])[1].tobytes(),
        tiff(deep, photometric="rgb"),
        tiff(planar, photometric="rgb", planarconfig="separate"),
        tiff(planar, imagej=True, metadata={"axes": "CYX"}),
    ):
        np.testing.assert_array_equal(read_both(tmp_path, content), COLOURS)


@pytest.mark.parametrize("compression", [None, "lzw", "jpeg2000", "webp", "zstd"])
def test_8_bit_tiff(tmp_path: Path, compression: str | None) -> None:
    content = tiff(COLOURS, photometric="rgb", compression=compression)
    np.testing.assert_array_equal(read_both(tmp_path, content), COLOURS)


def test_no_data_of_gdal_is_dark(tmp_path: Path) -> None:
    values = np.where(GREY < 50, np.float32(-9999), GREY.astype(np.float32))
    content = tiff(values, extratags=[(42113, 2, 6, "-9999", True)])
    image = np.asarray(read_both(tmp_path, content, pixel_range="auto"))
    low, high = np.percentile(values[values >= 0], (1, 99))
    expected = np.rint(np.clip((values - low) / (high - low), 0, 1) * 255)
    np.testing.assert_array_equal(image[..., 0], expected)


@pytest.mark.parametrize("dtype", ["int16", "uint16"])
def test_no_data_of_whole_numbers_is_the_least_value(tmp_path: Path, dtype: str) -> None:
    mark = {"int16": -9999, "uint16": 65535}[dtype]
    values = np.where(GREY < 50, mark, GREY.astype(int) + 50).astype(dtype)
    text = str(mark)
    content = tiff(values, extratags=[(42113, 2, len(text) + 1, text, True)])
    image = np.asarray(read_both(tmp_path, content, pixel_range="100,305"))[..., 0]
    assert not image[GREY < 50].any()
    np.testing.assert_array_equal(
        image[GREY >= 50], np.rint((GREY[GREY >= 50] - 50.0) / 205 * 255).astype(np.uint8)
    )


BANDS = {
    "contiguous": tiff(FIVE, photometric="minisblack", planarconfig="contig"),
    "separate": tiff(
        FIVE.transpose(2, 0, 1).copy(), photometric="minisblack", planarconfig="separate"
    ),
    "ImageJ": tiff(FIVE.transpose(2, 0, 1).copy(), imagej=True, metadata={"axes": "CYX"}),
    "OME": tiff(FIVE.transpose(2, 0, 1).copy(), ome=True, metadata={"axes": "CYX"}),
}


@pytest.mark.parametrize("name", BANDS)
def test_bands_have_to_be_chosen(tmp_path: Path, name: str) -> None:
    assert read_both(tmp_path, BANDS[name]) == "image-bands"
    assert read_both(tmp_path, BANDS[name], channels=(1, 2, 6)) == "image-bands"
    image = read_both(tmp_path, BANDS[name], channels=(3, 2, 1), pixel_range="0,255")
    np.testing.assert_array_equal(image, FIVE[..., [2, 1, 0]].clip(0, 255))
    image = read_both(tmp_path, BANDS[name], channels=(4,), pixel_range="0,255")
    np.testing.assert_array_equal(image, FIVE[..., [3, 3, 3]].clip(0, 255))


STACKS = {
    "TIFF": tiff_pages((COLOURS[::-1], {}), (COLOURS, {})),
    "ImageJ": tiff(
        np.stack([GREY[::-1], GREY]).astype(np.uint16), imagej=True, metadata={"axes": "ZYX"}
    ),
    **{kind: with_pillow(kind, COLOURS[::-1].copy(), COLOURS) for kind in ("PNG", "GIF")},
    "WEBP": with_pillow("WEBP", COLOURS[::-1].copy(), COLOURS, lossless=True),
}


@pytest.mark.parametrize("name", STACKS)
def test_a_page_has_to_be_chosen(tmp_path: Path, name: str) -> None:
    assert read_both(tmp_path, STACKS[name]) == "image-pages"
    assert read_both(tmp_path, STACKS[name], page=3) == "image-pages"
    first, second = (
        np.asarray(read_both(tmp_path, STACKS[name], page=page, pixel_range="0,255")).astype(int)
        for page in (1, 2)
    )
    assert np.abs(first[::-1] - second).mean() < 12  # GIF has a palette for each frame


SINGLE = {
    "thumbnail": tiff_pages((COLOURS, {}), (COLOURS[::4, ::4].copy(), {"subfiletype": 1})),
    "unmarked thumbnail": tiff_pages((COLOURS, {}), (COLOURS[::4, ::4].copy(), {})),
    "pyramid": tiff_pages(
        (COLOURS, {"subifds": 1, "tile": (16, 16)}), (COLOURS[::2, ::2].copy(), {"subfiletype": 1})
    ),
}


@pytest.mark.parametrize("name", SINGLE)
def test_thumbnails_and_pyramids_are_no_pages(tmp_path: Path, name: str) -> None:
    np.testing.assert_array_equal(read_both(tmp_path, SINGLE[name]), COLOURS)


def spoil(content: bytes, *, at: float = 0.5, length: int = 60) -> bytes:
    start = int(len(content) * at)
    return content[:start] + bytes(length) + content[start + length :]


DAMAGED = {
    "PNG": (spoil(with_pillow("PNG", COLOURS)), "image-damaged"),
    "PNG cut at its end": (with_pillow("PNG", COLOURS)[:-20], "image-truncated"),
    "16-bit PNG cut at its end": (DEEP_FILES["PNG"][:-20], "image-truncated"),
    "16-bit PNG": (spoil(DEEP_FILES["PNG"]), "image-damaged"),
    "deflated TIFF": (spoil(DEEP_FILES["deflate"]), "image-damaged"),
    "cut TIFF": (DEEP_FILES["float32"][:1500], "image-damaged"),
    "cut BMP": (with_pillow("BMP", COLOURS)[:1000], "image-truncated"),
    "cut TGA": (with_pillow("TGA", COLOURS)[:1000], "image-truncated"),
    "cut GIF": (with_pillow("GIF", COLOURS)[:900], "image-truncated"),
    "cut AVIF": (with_pillow("AVIF", COLOURS)[:200], "image-damaged"),
    "12-bit JPEG": (imagecodecs.jpeg_encode(DEEP, bitspersample=12), "image-format"),
    "JPEG-LS": (imagecodecs.jpegls_encode(GREY), "image-format"),
    "TIFF header": (b"II*\0\x08\0\0\0", "image-damaged"),
    "HEIC": (b"\0\0\0\x18ftypheic" + bytes(300), "image-format"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "image-format"),
    "complex": (tiff(GREY.astype(np.complex64)), "image-format"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_cannot_be_decoded_is_refused_when_it_is_inspected(tmp_path: Path, name: str) -> None:
    content, code = DAMAGED[name]
    assert read_both(tmp_path, content) == code


def test_a_whole_file_is_never_called_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(DAMAGED["PNG"][0])
    with pytest.raises(ImageError, match="checksum of bytes") as error:
        read_image(path)
    assert "cut short" not in str(error.value)
    path.write_bytes(BANDS["contiguous"])
    with pytest.raises(ImageError, match=r"5 bands.*channels, such as 3,2,1"):
        read_image(path)


def test_on_request_a_jpeg_is_decoded_too(tmp_path: Path) -> None:
    content = with_pillow("JPEG", COLOURS)
    start = len(content) // 2
    path = tmp_path / "a.jpg"
    path.write_bytes(content[:start] + b"\xff\x85" * 20 + content[start + 40 :])
    assert inspect_image(path).problem is None
    assert inspect_image(path, decode=True).problem == "image-damaged"
    path.write_bytes(content)
    assert inspect_image(path, decode=True) == inspect_image(path)


def test_a_png_with_a_wrong_checksum_that_decodes_is_used(tmp_path: Path) -> None:
    content = bytearray(with_pillow("PNG", COLOURS, dpi=(72, 72)))
    start = content.index(b"pHYs")
    content[start + 4] ^= 1  # of a chunk that no pixel depends on
    np.testing.assert_array_equal(read_both(tmp_path, bytes(content)), COLOURS)
