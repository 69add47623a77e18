import io
import subprocess
import sys
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from samft.errors import DataError
from samft.images.decoder import open_image, read_image
from samft.images.files import ImageError, ImageFacts, inspect_image
from samft.images.limits import MAX_PIXELS
from samft.images.pixels import PixelFormat


def _encode_image(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _photo() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    return Image.fromarray(cv2.blur(noise, (9, 9)))


def _inspect_file(path: Path) -> ImageFacts:
    facts = inspect_image(path)
    assert facts.num_bytes == path.stat().st_size
    return replace(facts, num_bytes=0)


def _broken_files() -> Iterator[tuple[str, bytes]]:
    for kind in ("JPEG", "PNG", "WEBP"):
        content = _encode_image(_photo(), kind)
        yield f"{kind} cut", content[: len(content) * 2 // 3]
        yield f"{kind} stub", content[:30]
    yield "progressive cut", _encode_image(_photo(), "JPEG", progressive=True)[:-200]
    yield "empty", b""
    yield "text", b"hello"


BROKEN = dict(_broken_files())


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_broken_images_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"broken\.jpg"):
        read_image(path)


def test_missing_images_and_bombs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.png"):
        read_image(tmp_path / "gone.png")
    side = int((2 * MAX_PIXELS) ** 0.5) + 9
    for name, height in (("bomb.png", side), ("large.png", side // 2 + 9)):
        _encode_header_only(tmp_path / name, side, height)
        with pytest.raises(DataError, match="scale it down"):
            read_image(tmp_path / name)


def _encode_header_only(path: Path, width: int, height: int) -> None:
    content = bytearray(_encode_image(Image.new("L", (1, 1)), "PNG"))
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "I;16", "1"])
def test_png_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    grey = np.full((9, 7), 255, np.uint8)
    grey[:, 3:] = 0
    image = Image.fromarray(grey)
    image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    (tmp_path / "a.png").write_bytes(_encode_image(image, "PNG"))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.stack([grey] * 3, axis=-1))


def test_colours_come_as_rgb(tmp_path: Path) -> None:
    red = Image.new("RGB", (16, 16), (250, 10, 20))
    (tmp_path / "a.jpg").write_bytes(_encode_image(red, "JPEG", quality=95))
    np.testing.assert_allclose(read_image(tmp_path / "a.jpg")[3, 3], [250, 10, 20], atol=4)


@pytest.mark.parametrize("kind", ["CMYK", "YCCK", "CMYK without a marker"])
def test_cmyk_is_what_pillow_makes_of_it(tmp_path: Path, kind: str) -> None:
    inks = np.random.default_rng(0).integers(0, 256, (12, 16, 4), dtype=np.uint8)
    smooth = Image.fromarray(cv2.resize(inks, (160, 120)), "CMYK")
    content = bytearray(_encode_image(smooth, "JPEG", quality=95))
    marker = content.index(b"Adobe")
    if kind == "YCCK":
        content[marker + 11] = 2
    elif kind != "CMYK":  # not inverted, then
        del content[marker - 4 : marker + 12]
    (tmp_path / "a.jpg").write_bytes(content)
    expected = np.asarray(Image.open(tmp_path / "a.jpg").convert("RGB"))
    np.testing.assert_allclose(read_image(tmp_path / "a.jpg"), expected.astype(int), atol=2)
    reduced = open_image(tmp_path / "a.jpg").decode(at_least=(60, 80))
    mean = expected.reshape(60, 2, 80, 2, 3).mean(axis=(1, 3))
    assert np.abs(reduced - mean).mean() < 2


def test_alpha_is_ignored_and_the_stored_colours_are_used(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 4), dtype=np.uint8)
    pixels[:4, :, 3] = 0
    (tmp_path / "a.png").write_bytes(_encode_image(Image.fromarray(pixels), "PNG"))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), pixels[..., :3])
    palette = Image.fromarray(pixels[..., :3]).convert("P")
    (tmp_path / "b.png").write_bytes(
        _encode_image(palette, "PNG", transparency=palette.getpixel((2, 2)))
    )
    expected = np.asarray(palette.convert("RGB"))
    np.testing.assert_array_equal(read_image(tmp_path / "b.png"), expected)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_full_range_of_16_bits_becomes_8(tmp_path: Path, channels: int) -> None:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 2**16, (9, 7, channels), dtype=np.uint16)
    cv2.imwrite(str(tmp_path / "a.png"), pixels)
    order = [2, 1, 0] if channels > 1 else [0, 0, 0]
    image = read_image(tmp_path / "a.png", pixels=PixelFormat("full"))
    np.testing.assert_array_equal(image, np.rint(pixels[..., order] / 257))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_reported_but_not_applied(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name, kind in (("a.jpg", "JPEG"), ("a.png", "PNG")):
        (tmp_path / name).write_bytes(_encode_image(_photo(), kind, exif=exif))
        assert open_image(tmp_path / name).size == (90, 120)
        assert _inspect_file(tmp_path / name) == ImageFacts(90, 120, orientation)
        difference = read_image(tmp_path / name) - np.asarray(_photo()).astype(int)
        assert np.abs(difference).mean() < 5
    reduced = open_image(tmp_path / "a.jpg").decode(at_least=(45, 60))
    assert reduced.shape == (45, 60, 3)


def test_a_thumbnails_end_does_not_stand_for_the_images(tmp_path: Path) -> None:
    thumbnail = _encode_image(_photo().resize((12, 9)), "JPEG")
    content = _encode_image(_photo(), "JPEG", exif=b"Exif\0\0" + thumbnail)
    (tmp_path / "a.jpg").write_bytes(content + b"trailing")
    assert read_image(tmp_path / "a.jpg").shape == (90, 120, 3)
    (tmp_path / "a.jpg").write_bytes(content[:-300])
    with pytest.raises(DataError, match="cut short"):
        read_image(tmp_path / "a.jpg")


REDUCTIONS = [
    ((90, 120), (120, 90)),
    ((45, 60), (60, 45)),
    ((46, 60), (120, 90)),
    ((45, 61), (120, 90)),
    ((23, 30), (30, 23)),
    ((12, 15), (15, 12)),
    ((1, 1), (15, 12)),
    ((200, 300), (120, 90)),
]


@pytest.mark.parametrize(("at_least", "expected"), REDUCTIONS)
def test_a_jpeg_is_reduced_as_far_as_it_stays_large_enough(
    tmp_path: Path, at_least: tuple[int, int], expected: tuple[int, int]
) -> None:
    (tmp_path / "a.jpg").write_bytes(_encode_image(_photo(), "JPEG", quality=95))
    encoded = open_image(tmp_path / "a.jpg")
    image = encoded.decode(at_least=at_least)
    assert encoded.size == (90, 120) and image.shape == (*expected[::-1], 3)
    averaged = cv2.resize(encoded.decode(), expected, interpolation=cv2.INTER_AREA)
    assert np.abs(image - averaged.astype(int)).mean() < 3


def test_odd_sizes_are_rounded_up_and_other_formats_are_not_reduced(tmp_path: Path) -> None:
    odd = _photo().crop((0, 0, 101, 67))
    (tmp_path / "a.jpg").write_bytes(_encode_image(odd, "JPEG"))
    assert open_image(tmp_path / "a.jpg").decode(at_least=(17, 26)).shape == (17, 26, 3)
    for kind in ("PNG", "WEBP", "BMP"):
        (tmp_path / "a").write_bytes(_encode_image(odd, kind))
        assert open_image(tmp_path / "a").decode(at_least=(1, 1)).shape == (67, 101, 3)


FACTS = {
    "whole": ("JPEG", lambda content: content, ImageFacts(90, 120)),
    "whole png": ("PNG", lambda content: content, ImageFacts(90, 120)),
    "webp": ("WEBP", lambda content: content, ImageFacts(90, 120)),
    "padded": ("JPEG", lambda content: content + bytes(9000), ImageFacts(90, 120)),
    "trailer": ("JPEG", lambda content: content + b"more" * 3000, ImageFacts(90, 120)),
    "png trailer": ("PNG", lambda content: content + b"more", ImageFacts(90, 120)),
    "cut": ("JPEG", lambda content: content[:-300], "image-truncated"),
    "cut in the end marker": ("JPEG", lambda content: content[:-1], "image-truncated"),
    "filled up": ("JPEG", lambda content: content[:-300] + bytes(300), "image-truncated"),
    "cut png": ("PNG", lambda content: content[:-300], "image-truncated"),
    "jpeg stub": ("JPEG", lambda content: content[:100], "image-truncated"),
    "png stub": ("PNG", lambda content: content[:20], "image-truncated"),
    "two bytes": ("JPEG", lambda content: content[:2], "image-truncated"),
    "empty": ("PNG", lambda content: b"", "image-empty"),
    "web page": ("PNG", lambda content: b"<html>404</html>", "image-not-an-image"),
}


@pytest.mark.parametrize(("kind", "change", "expected"), FACTS.values(), ids=FACTS)
def test_inspection_names_what_is_wrong_and_reading_agrees(
    tmp_path: Path, kind: str, change: Any, expected: ImageFacts | str
) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(change(_encode_image(_photo(), kind)))
    facts = _inspect_file(path)
    if isinstance(expected, ImageFacts):
        assert facts == expected and read_image(path).shape == (90, 120, 3)
    else:
        assert facts.problem == expected
        with pytest.raises(ImageError, match=r"a\.jpg"):
            read_image(path)


def test_inspection_of_what_is_not_a_file_or_too_large(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.jpg", tmp_path, Path("a\0b")):
        assert inspect_image(path).problem == "image-unreadable"
    side = int(MAX_PIXELS**0.5) + 9
    _encode_header_only(tmp_path / "large.png", side, side)
    assert _inspect_file(tmp_path / "large.png") == ImageFacts(side, side, 1, "image-too-large")


def test_inspection_looks_past_large_headers(tmp_path: Path) -> None:
    profile = bytes(range(256)) * 40
    (tmp_path / "a.jpg").write_bytes(_encode_image(_photo(), "JPEG", icc_profile=profile))
    assert _inspect_file(tmp_path / "a.jpg") == ImageFacts(90, 120)
    thumbnail = _encode_image(_photo().resize((12, 9)), "JPEG")
    content = _encode_image(_photo(), "JPEG", exif=b"Exif\0\0" + thumbnail)
    (tmp_path / "a.jpg").write_bytes(content[: content.index(thumbnail) + len(thumbnail) + 40])
    assert inspect_image(tmp_path / "a.jpg").problem == "image-truncated"


def test_inspection_never_raises(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
        content = np.frombuffer(_encode_image(_photo(), kind), np.uint8)[:3000]
        for _ in range(60):
            changed = content[: generator.integers(1, len(content))].copy()
            places = generator.integers(0, min(len(changed), 200), 5)
            changed[places] = generator.integers(0, 256, 5)
            (tmp_path / "a").write_bytes(changed.tobytes())
            assert isinstance(inspect_image(tmp_path / "a"), ImageFacts)


BOMB = """
import resource, sys
from pathlib import Path
from samft.images.decoder import open_image
from samft.images.files import inspect_image
from samft.errors import DataError
path = Path(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    open_image(path)
    print("opened")
except DataError as error:
    print("scale it down" in str(error), inspect_image(path).problem)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_bomb_is_refused_without_being_unpacked(tmp_path: Path) -> None:
    side = 30_000  # 900 megapixels of one bit: 112 MB of zeros in a file of 109 KB
    header = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    packer, rows = zlib.compressobj(9), bytes(side // 8 + 1)
    pixels = b"".join(packer.compress(rows) for _ in range(side)) + packer.flush()
    chunks = [
        len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")
        for name, data in ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    ]
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    assert path.stat().st_size < 150_000
    ended = subprocess.run(
        [sys.executable, "-c", BOMB, str(path)], capture_output=True, text=True, timeout=120
    )
    verdict, growth = ended.stdout.splitlines()
    assert verdict == "True image-too-large", ended.stderr
    assert int(growth) < 100_000  # KiB
