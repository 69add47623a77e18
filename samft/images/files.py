"""What an image file shows when it is looked at once: size, type, EXIF, whether it is whole.

8-bit JPEG and PNG, most of all datasets, are not decoded for that: a JPEG is judged by its header
and its end, a PNG by its checksums too. Any other file is decoded as training will decode it, so
that what passes here can be trained on. Imports no torch.
"""

import io
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from numpy.typing import NDArray
from PIL import Image

from samft.errors import DataError
from samft.images.formats import explain_errors, read_values, to_native
from samft.images.limits import MAX_PIXELS, UnusableImage
from samft.images.pixels import PLAIN, PixelFormat
from samft.images.tiff import TiffWindows, is_tiff, open_tiff_windows
from samft.runtime.files import NotAFileError, open_file
from samft.runtime.logs import progress_bar

JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_PNG, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
_PNG_DEPTH = 24  # position of the number of bits
_APP1, _START_OF_SCAN = 0xE1, 0xDA
_STARTS_OF_FRAME = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive; others need Pillow
_JPEG_LS = 0xF7
_NO_FRAMES = {0xC4, 0xC8, 0xCC}  # among the markers of frames
_JPEG_EXIF, _PNG_EXIF = b"Exif\0\0", b"eXIf"
_ORIENTATION = 0x0112  # EXIF's tag
_GLANCE = 4096  # bytes
_LONG_HEADER = 1 << 17  # bytes of metadata before a JPEG's size
_THREADS = 8  # a network disk answers many requests at once
_PART = 64  # files that a thread inspects in one task: a task costs as much as an inspection


class ImageError(DataError):
    """An image file that cannot be used: missing, cut short, not an image, or too large."""


@dataclass(frozen=True)
class ImageFacts:
    """What an image file shows when it is looked at once.

    Attributes:
        height: px, before any EXIF rotation; 0 if unknown.
        width: px, as `height`.
        orientation: EXIF's, 1..8; 1 is upright.
        problem: None, `image-not-a-file` (a pipe), or a key of `limits.SENTENCES`.
        num_bytes: Size of the file.
        pixel_type: One of `pixels.PIXEL_TYPES`.
        detail: About the problem, in a few words; may be empty.
    """

    height: int = 0
    width: int = 0
    orientation: int = 1
    problem: str | None = None
    num_bytes: int = 0
    pixel_type: str = "uint8"
    detail: str = ""


def inspect_image(path: Path, pixels: PixelFormat = PLAIN, *, decode: bool = False) -> ImageFacts:
    """Looks at a file; never raises, whatever is wrong with it.

    Of a JPEG, only the first and last 4 KiB are read, and all of it only if these do not suffice.

    Args:
        path: The file.
        pixels: Says which bands and page of a file are used.
        decode: Decode JPEG and PNG files, too.
    """
    try:
        with cast(io.FileIO, open_file(path, buffering=0)) as file:
            length = os.fstat(file.fileno()).st_size
            head = file.read(_GLANCE)
            if not head:
                return ImageFacts(problem="image-empty")
            if head.startswith(JPEG_START) and not decode:
                facts = _facts_of_jpeg(file, head, length)
                if facts is not None:
                    return facts
            return replace(_inspect_content(file, head, pixels, decode), num_bytes=length)
    except NotAFileError:
        return ImageFacts(problem="image-not-a-file")
    except (OSError, ValueError):
        return ImageFacts(problem="image-unreadable")


def inspect_images(
    paths: list[Path], pixels: PixelFormat = PLAIN, *, decode: bool = False
) -> Iterator[ImageFacts]:
    """Inspects many files in parallel; yields what `inspect_image` returns, in the order given."""
    bar = progress_bar(total=len(paths), desc="inspecting images", unit="image", delay=2)
    parts = [paths[first : first + _PART] for first in range(0, len(paths), _PART)]

    def inspect_part(part: list[Path]) -> list[ImageFacts]:
        return [inspect_image(path, pixels, decode=decode) for path in part]

    with bar, ThreadPoolExecutor(_THREADS) as pool:
        for facts in pool.map(inspect_part, parts):
            bar.update(len(facts))
            yield from facts


def _facts_of_jpeg(file: io.FileIO, head: bytes, length: int) -> ImageFacts | None:
    # Most files of most datasets, so every microsecond counts. None: it has to be decoded.
    size = plain_size(head)
    if size is None:  # long metadata
        head += file.read(_LONG_HEADER) or b""
        size = plain_size(head)
    if size is None:
        return None
    orientation = _read_orientation(file) if _JPEG_EXIF in head else 1
    problem = None
    if size[0] * size[1] > MAX_PIXELS:
        problem = "image-too-large"
    elif _seems_cut_short(file, length):
        problem = "image-truncated"
    return ImageFacts(*size, orientation, problem, length)


def _inspect_content(file: io.FileIO, head: bytes, pixels: PixelFormat, decode: bool) -> ImageFacts:
    size = plain_size(head)
    if size is not None and size[0] * size[1] > MAX_PIXELS:
        return ImageFacts(*size, problem="image-too-large")
    is_upright = head.startswith(_PNG) and _PNG_EXIF not in head
    orientation = 1 if is_upright else _read_orientation(file)
    if pixels.in_windows and is_tiff(head):
        facts = _facts_of_tiff(file, pixels, orientation)
        if facts is not None:
            return facts
    content = _read_all(file)
    try:
        if is_cut_short(content):  # though Pillow may find all rows in it
            raise UnusableImage("image-truncated")
        if size is None or decode or png_problem(content) is not None:
            values = read_values(content, pixels)
            height, width = values.shape[:2]
            return ImageFacts(height, width, orientation, pixel_type=values.dtype.name)
    except UnusableImage as error:
        error = explain_damage(content, error)
        return ImageFacts(*(size or (0, 0)), problem=error.code, detail=error.detail)
    return ImageFacts(*size, orientation)


def _facts_of_tiff(file: io.FileIO, pixels: PixelFormat, orientation: int) -> ImageFacts | None:
    # None: it has to be decoded as a whole.
    try:
        windows = open_in_windows(file, pixels)
        if windows is None:
            return None
        pixel_type = read_stored(windows, (0, 0, 1, 1)).dtype.name
    except UnusableImage as error:
        return ImageFacts(problem=error.code, detail=error.detail)
    return ImageFacts(*windows.size, orientation, pixel_type=pixel_type)


def open_in_windows(file: io.FileIO, pixels: PixelFormat) -> TiffWindows | None:
    """An open image file of which windows can be decoded; None if only all of it can.

    Raises:
        UnusableImage: It is damaged, or bands or a page have to be chosen.
    """
    file.seek(0)
    head = file.read(_GLANCE) or b""
    if not is_tiff(head):
        return None
    file.seek(0)
    with explain_errors(head):
        return open_tiff_windows(file, pixels)


def read_stored(windows: TiffWindows, place: tuple[int, int, int, int]) -> NDArray[Any]:
    """The values of a window, as `read_values` gives those of the whole file.

    Args:
        windows: Of the file.
        place: y0 x0 y1 x1, px, of the image as it is stored.

    Raises:
        UnusableImage: This part of the file is damaged.
    """
    with explain_errors(b""):
        return to_native(windows.read(*place))


def _read_all(file: io.FileIO) -> bytes:
    file.seek(0)
    return file.read() or b""


def _read_orientation(file: io.FileIO) -> int:
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file) as image:
                orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow's parsers raise anything on malicious files
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def plain_size(content: bytes) -> tuple[int, int] | None:
    """H, W of an 8-bit JPEG or PNG, before any EXIF rotation, px.

    Args:
        content: The first bytes of the file, or all.

    Returns:
        None for any other file, for an animation, and if the header goes on after `content`.
    """
    if content.startswith(_PNG) and len(content) > _PNG_DEPTH:
        width, height = struct.unpack_from(">II", content, 16)
        if content[_PNG_DEPTH] == 16 or b"acTL" in content[:_GLANCE] or not height * width:
            return None
        return height, width
    for marker, start in _jpeg_segments(content) if content.startswith(JPEG_START) else ():
        if 0xC0 <= marker <= 0xCF and marker not in _NO_FRAMES:
            if marker not in _STARTS_OF_FRAME or content[start : start + 1] != b"\x08":
                return None
            height, width = struct.unpack(">HH", content[start + 1 : start + 5].ljust(4, b"\0"))
            return (height, width) if height * width else None
    return None


def explain_damage(content: bytes, error: UnusableImage) -> UnusableImage:
    """The reason why a JPEG or PNG cannot be decoded, from its structure, else the given one."""
    if error.code not in ("image-damaged", "image-not-an-image", "image-truncated"):
        return error
    if kind := _rare_jpeg(content):
        return UnusableImage("image-format", kind)
    if is_cut_short(content):
        return UnusableImage("image-truncated")
    if problem := png_problem(content):
        return UnusableImage("image-damaged", problem)
    if content.startswith((JPEG_START, _PNG)) and error.code == "image-not-an-image":
        return UnusableImage("image-damaged", "its header")
    return error


def _rare_jpeg(content: bytes) -> str:
    # Of a whole file, whose pixels no library here decodes; empty for others.
    for marker, start in _jpeg_segments(content) if content.startswith(JPEG_START) else ():
        if marker == _JPEG_LS:
            return "JPEG-LS"
        if 0xC0 <= marker <= 0xCF and marker not in _NO_FRAMES and content[start] != 8:
            return f"a JPEG of {content[start]} bits"
    return ""


def png_problem(content: bytes) -> str | None:
    """What is wrong with the chunks that a PNG is decoded from; None: nothing, or it is no PNG."""
    position = len(_PNG)
    while content.startswith(_PNG):
        length = int.from_bytes(content[position : position + 4], "big")
        name, end = content[position + 4 : position + 8], position + 8 + length
        if end + 4 > len(content):
            return f"a chunk at byte {position} reaches past the end"
        is_critical = name[:1].isupper()
        stored = int.from_bytes(content[end : end + 4], "big")
        if is_critical and zlib.crc32(memoryview(content)[position + 4 : end]) != stored:
            return f"the checksum of bytes {position} to {end} is wrong"
        if name == b"IEND":
            return None
        position = end + 4
    return None


def _seems_cut_short(file: io.FileIO, length: int) -> bool:
    file.seek(max(0, length - _GLANCE))
    # Some writers pad the file. An end marker further up might be a thumbnail's.
    ending = (file.read() or b"").rstrip(b"\0\r\n ")
    return not ending.endswith(_JPEG_END) and is_cut_short(_read_all(file))


def is_cut_short(content: bytes) -> bool:
    """Whether a JPEG or PNG lacks its end: OpenCV fills missing rows with grey, in silence."""
    if content.startswith(_PNG):
        return _PNG_END not in content[-_GLANCE:]
    if not content.startswith(JPEG_START):
        return False
    # Past the header segments (which may hold a thumbnail with an end marker of its own), the end
    # marker cannot occur in the pixel data.
    for marker, start in _jpeg_segments(content):
        if marker == _START_OF_SCAN:
            return content.find(_JPEG_END, start) < 0
    return True


def _jpeg_segments(content: bytes) -> Iterator[tuple[int, int]]:
    # Marker and first byte of the body of each header segment, up to the first scan's.
    position = len(JPEG_START)
    while content[position : position + 1] == b"\xff" and content[position + 1 : position + 2]:
        marker = content[position + 1]
        if marker == 0xFF:  # padding
            position += 1
            continue
        length = int.from_bytes(content[position + 2 : position + 4], "big")
        yield marker, position + 4
        if marker == _START_OF_SCAN:
            return
        position += 2 + length
