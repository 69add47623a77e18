"""Windows of files have the pixels of the whole image, and memory goes with the window."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from samft.images.decoder import read_image
from samft.images.files import ImageError, inspect_image
from samft.images.pixels import PixelFormat
from samft.images.ranges import measure_ranges
from samft.views.regions import SourceCache, open_source

HEIGHT, WIDTH = 150, 210
RNG = np.random.default_rng(0)
COLOURS = cv2.resize(RNG.integers(0, 256, (15, 21, 3), dtype=np.uint8), (WIDTH, HEIGHT))
DEEP = COLOURS[..., 0].astype(np.uint16) * 16 + RNG.integers(0, 16, (HEIGHT, WIDTH)).astype(
    np.uint16
)
FIVE = np.stack([DEEP + 100 * k for k in range(5)], -1)
IN_WINDOWS = PixelFormat(in_windows=True)
WINDOWS = [(0, 0, WIDTH, HEIGHT), (50, 30, 114, 94), (130, 100, 210, 150), (0, 149, 1, 150)]


def tiff(values: NDArray[Any], **options: Any) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, values, **options)
    return stream.getvalue()


def with_pillow(kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(COLOURS).save(stream, kind, **options)
    return stream.getvalue()


TILE = {"tile": (64, 48)}
PLANES = COLOURS.transpose(2, 0, 1).copy()
NO_DATA = [(42113, 2, 6, "-9999", True)]
IN_PARTS = {
    "tiles": tiff(COLOURS, photometric="rgb", **TILE),
    "compressed tiles": tiff(COLOURS, photometric="rgb", compression="zlib", predictor=2, **TILE),
    "tiled planes": tiff(PLANES, photometric="rgb", planarconfig="separate", **TILE),
    "strips": tiff(COLOURS, photometric="rgb", compression="lzw", rowsperstrip=17),
    "plain strips": tiff(COLOURS, photometric="rgb", rowsperstrip=17),
    "plain planes": tiff(PLANES, photometric="rgb", planarconfig="separate"),
    "one strip": tiff(COLOURS, photometric="rgb"),
    "jpeg tiles": tiff(
        COLOURS, photometric="ycbcr", compression="jpeg", subsampling=(2, 2), tile=(64, 64)
    ),
    "16 bits": tiff(DEEP, compression="zlib", **TILE),
    "16 bits, other byte order": tiff(DEEP, byteorder=">"),
    "16 bits, white is zero": tiff(DEEP, photometric="miniswhite", **TILE),
    "floats": tiff(DEEP.astype(np.float32), compression="zlib", predictor=3, **TILE),
    "no data, floats": tiff(
        np.where(DEEP < 900, -9999, DEEP).astype(np.float32), extratags=NO_DATA, **TILE
    ),
    "no data": tiff(np.where(DEEP < 900, -9999, DEEP).astype(np.int16), extratags=NO_DATA, **TILE),
    "alpha": tiff(
        np.dstack([COLOURS, COLOURS[..., 0]]),
        photometric="rgb",
        extrasamples=["unassalpha"],
        **TILE,
    ),
    "palette": tiff(
        COLOURS[..., 0],
        photometric="palette",
        colormap=np.arange(768, dtype=np.uint16).reshape(3, 256) * 85,
        **TILE,
    ),
    "five bands": tiff(FIVE, photometric="minisblack", planarconfig="contig", **TILE),
    "BigTIFF": tiff(COLOURS, photometric="rgb", bigtiff=True, **TILE),
    "OME": tiff(DEEP, ome=True, **TILE),
}
WHOLE = {
    "bits": tiff(COLOURS[..., 0] > 90, photometric="minisblack"),
    "planes of ImageJ": tiff(PLANES, imagej=True, metadata={"axes": "CYX"}),
    **{kind: with_pillow(kind) for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "AVIF")},
    "16-bit PNG": cv2.imencode(".png", DEEP)[1].tobytes(),
}


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("pixel_range", ["auto", "percentile", "100,200"])
@pytest.mark.parametrize("name", [*IN_PARTS, *WHOLE])
def test_windows_have_the_pixels_of_the_whole_image(
    tmp_path: Path, name: str, pixel_range: str, orientation: int
) -> None:
    path = tmp_path / "image"
    path.write_bytes((IN_PARTS | WHOLE)[name])
    pixels = PixelFormat(pixel_range, channels=(4, 2, 1), in_windows=True)
    whole = read_image(path, orientation=orientation, pixels=pixels)
    source, cache = open_source(path, orientation=orientation, pixels=pixels), SourceCache()
    assert source.size == whole.shape[:2]
    for x0, y0, x1, y1 in WINDOWS:
        corners = [x0, y0, x1, y1] if orientation == 1 else [y0, x0, y1, x1]
        window = np.array(corners)
        expected = whole[corners[1] : corners[3], corners[0] : corners[2]]
        np.testing.assert_array_equal(source.read(window), expected)
        cached = cache.read(path, window, orientation=orientation, pixels=pixels)
        np.testing.assert_array_equal(cached, expected)


@pytest.mark.parametrize("name", IN_PARTS)
def test_a_file_that_is_read_in_parts_is_inspected_as_one_that_is_decoded(
    tmp_path: Path, name: str
) -> None:
    path = tmp_path / "image.tif"
    path.write_bytes(IN_PARTS[name])
    pixels = PixelFormat(channels=(4, 2, 1), in_windows=True)
    assert inspect_image(path, pixels) == inspect_image(path, PixelFormat(channels=(4, 2, 1)))


def test_the_range_of_a_dataset_is_the_same_in_parts(tmp_path: Path) -> None:
    path = tmp_path / "image.tif"
    large = cv2.resize(DEEP, (600, 700))
    path.write_bytes(tiff(large, compression="zlib", tile=(64, 48)))
    ranges = [
        measure_ranges(pixels, ["uint16"], path=lambda _: path).ranges
        for pixels in (PixelFormat(), IN_WINDOWS)
    ]
    assert ranges[0] == ranges[1] and len(ranges[0]) == 1


def test_a_damaged_part_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "image.tif"
    content = bytearray(tiff(COLOURS, photometric="rgb", compression="zlib", **TILE))
    with tifffile.TiffFile(io.BytesIO(content)) as opened:
        first = opened.pages[0].dataoffsets[-1]
    content[first : first + 40] = bytes(40)
    path.write_bytes(content)
    source = open_source(path, pixels=IN_WINDOWS)
    np.testing.assert_array_equal(source.read(np.array([0, 0, 48, 64])), COLOURS[:64, :48])
    with pytest.raises(ImageError, match=r"image\.tif is damaged"):
        source.read(np.array([0, 0, WIDTH, HEIGHT]))


def test_more_pixels_than_run_lengths_can_count_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "image.tif"
    path.write_bytes(tiff(COLOURS, photometric="rgb", **TILE))
    with tifffile.TiffFile(path, mode="r+b") as opened:
        opened.pages[0].tags["ImageWidth"].overwrite(1 << 17)
        opened.pages[0].tags["ImageLength"].overwrite(1 << 17)
    assert inspect_image(path, IN_WINDOWS).problem == "image-too-large"


def test_a_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "image.tif"
    path.write_bytes(tiff(COLOURS, photometric="rgb", **TILE)[:-5000])
    assert inspect_image(path, IN_WINDOWS).problem == "image-truncated"
    with pytest.raises(ImageError, match="cut short"):
        open_source(path, pixels=IN_WINDOWS)


def test_only_as_many_bytes_are_kept_as_allowed(tmp_path: Path) -> None:
    cache = SourceCache(max_bytes=3 * COLOURS.nbytes)
    for number in range(8):
        path = tmp_path / f"{number}.png"
        path.write_bytes(WHOLE["PNG"])
        cache.read(path, np.array([0, 0, 9, 9]))
        assert cache.num_bytes == min(number + 1, 3) * COLOURS.nbytes


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path, window = tmp_path / "image.bmp", np.array([0, 0, 9, 9])
    cache = SourceCache()
    path.write_bytes(WHOLE["BMP"])
    assert (cache.read(path, window) == COLOURS[:9, :9]).all()
    path.write_bytes(cv2.imencode(".png", np.zeros((9, 9, 3), np.uint8))[1].tobytes())
    assert not cache.read(path, window).any()


_READ_WINDOW = """
import sys
from pathlib import Path
import numpy as np
from samft.images.files import inspect_image
from samft.images.pixels import PixelFormat
from samft.views.regions import open_source
import tifffile, imagecodecs
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
before = peak()
pixels = PixelFormat(in_windows=True)
facts = inspect_image(Path(sys.argv[1]), pixels)
part = open_source(Path(sys.argv[1]), pixels=pixels).read(np.array([15000, 15000, 15256, 15256]))
print(facts.height, facts.width, facts.problem, part.shape[0], peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize("options", [{"tile": (256, 256), "compression": "zlib"}, {}])
def test_a_window_of_a_very_large_image_takes_little_memory(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    side, path = 16384, tmp_path / "large.tif"
    if options:
        blank = (np.zeros((256, 256), np.uint8) for _ in range((side // 256) ** 2))
        tifffile.imwrite(path, blank, shape=(side, side), dtype=np.uint8, **options)
    else:
        tifffile.memmap(path, shape=(side, side), dtype=np.uint8).flush()  # a file with a hole
    command = [sys.executable, "-c", _READ_WINDOW, str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    *facts, grown = done.stdout.split()
    assert facts == [str(side), str(side), "None", "256"]
    assert int(grown) < 64 * 1024  # KiB; all of the image takes 268 MB
