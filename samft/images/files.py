"""What an image file shows without being decoded: size, EXIF, whether it is whole. No torch."""

import io
import os
import struct
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, cast

from PIL import Image
from tqdm import tqdm

from samft.errors import DataError
from samft.runtime.files import NotAFileError, open_file

MAX_PIXELS = 178_956_970  # Pillow's limit against decompression bombs

JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_PNG, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
_APP1, _START_OF_SCAN = 0xE1, 0xDA
_STARTS_OF_FRAME = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_ORIENTATION = 0x0112  # EXIF's tag
_GLANCE = 4096  # bytes
_THREADS = 8  # a network disk answers many requests at once
_PART = 64  # files that a thread inspects in one task: a task costs as much as an inspection


class ImageError(DataError):
    """An image file that cannot be used: missing, cut short, not an image, or too large."""


def header_size(source: Path | IO[bytes], *, name: str | None = None) -> tuple[int, int]:
    """Height and width from an image file's header, without decoding the image.

    Args:
        source: The file, or an open one.
        name: How errors name it.

    Raises:
        ImageError: If it is missing, not an image, or larger than `MAX_PIXELS`.
    """
    name = name or str(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(source) as image:
                width, height = image.size
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} has too many pixels ({error}): scale it down.") from error
    except (OSError, ValueError, SyntaxError) as error:
        reason = getattr(error, "strerror", None) or "not an image format that is known here"
        raise ImageError(f"{name} cannot be read as an image ({reason}): replace it.") from error
    if width * height > MAX_PIXELS:
        raise ImageError(f"{name} has {width} x {height} pixels, too many: scale it down.")
    return height, width


@dataclass(frozen=True)
class ImageFacts:
    """What an image file shows without being decoded.

    Attributes:
        height: px, before any EXIF rotation; 0 if unknown.
        width: px, as `height`.
        orientation: EXIF's, 1..8; 1 is upright.
        problem: None, or `image-empty`, `image-not-an-image`, `image-truncated`,
            `image-too-large`, `image-not-a-file` (a pipe), `image-unreadable` (missing, say).
        num_bytes: Size of the file.
    """

    height: int = 0
    width: int = 0
    orientation: int = 1
    problem: str | None = None
    num_bytes: int = 0


def inspect_image(path: Path) -> ImageFacts:
    """Reads a file's first and last 4 KiB, and all of it only if these do not suffice.

    Never raises, whatever is wrong with the file.
    """
    try:
        with cast(io.FileIO, open_file(path, buffering=0)) as file:
            length = os.fstat(file.fileno()).st_size
            head = file.read(_GLANCE)
            if not head:
                return ImageFacts(problem="image-empty")
            facts = _facts_of_head(head) or _facts_by_pillow(file, head)
            if facts.problem is None and _seems_cut_short(file, head, length=length):
                facts = replace(facts, problem="image-truncated")
            return replace(facts, num_bytes=length)
    except NotAFileError:
        return ImageFacts(problem="image-not-a-file")
    except (OSError, ValueError):
        return ImageFacts(problem="image-unreadable")


def inspect_images(paths: list[Path]) -> Iterator[ImageFacts]:
    """Inspects many files in parallel; yields what `inspect_image` returns, in the order given."""
    bar = tqdm(total=len(paths), desc="inspecting images", unit="image", disable=None, delay=2)
    parts = [paths[first : first + _PART] for first in range(0, len(paths), _PART)]
    with bar, ThreadPoolExecutor(_THREADS) as pool:
        for facts in pool.map(lambda part: [inspect_image(path) for path in part], parts):
            bar.update(len(facts))
            yield from facts


def _facts_of_head(head: bytes) -> ImageFacts | None:
    # A tenth of Pillow's time, for the two formats of most datasets. None: Pillow has to read it.
    if head.startswith(_PNG) and len(head) > 24 and b"eXIf" not in head:
        width, height = struct.unpack_from(">II", head, 16)
        return _facts_of_size(height, width)
    for marker, start in _jpeg_segments(head) if head.startswith(JPEG_START) else ():
        if marker == _APP1 and head.startswith(b"Exif", start):
            return None
        if marker in _STARTS_OF_FRAME and start + 5 <= len(head):
            return _facts_of_size(*struct.unpack_from(">HH", head, start + 1))
    return None


def _facts_by_pillow(file: io.FileIO, head: bytes) -> ImageFacts:
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file) as image:
                width, height = image.size
                orientation = image.getexif().get(_ORIENTATION, 1)
    except Image.DecompressionBombError:
        return ImageFacts(problem="image-too-large")
    except Exception:  # Pillow's parsers raise anything on malicious files
        known = head.startswith((JPEG_START, _PNG))
        return ImageFacts(problem="image-truncated" if known else "image-not-an-image")
    valid = isinstance(orientation, int) and 1 <= orientation <= 8
    return _facts_of_size(height, width, orientation=orientation if valid else 1)


def _facts_of_size(height: int, width: int, *, orientation: int = 1) -> ImageFacts:
    if not height or not width:
        return ImageFacts(problem="image-not-an-image")
    problem = "image-too-large" if height * width > MAX_PIXELS else None
    return ImageFacts(height, width, orientation, problem)


def _seems_cut_short(file: io.FileIO, head: bytes, *, length: int) -> bool:
    end = _PNG_END if head.startswith(_PNG) else _JPEG_END if head.startswith(JPEG_START) else b""
    file.seek(max(0, length - _GLANCE))
    # Some writers pad the file. An end marker further up might be a thumbnail's.
    ending = (file.read() or b"").rstrip(b"\0\r\n ")
    if ending.endswith(end):
        return False
    file.seek(0)
    return is_cut_short(file.read() or b"")


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
