"""Image files: read as the annotator saw them, or refused by name. Imports no torch."""

import io
import os
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from samft.errors import DataError

MAX_PIXELS = 178_956_970  # Pillow's limit against decompression bombs

_JPEG, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_PNG, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
_APP1, _START_OF_SCAN = 0xE1, 0xDA
_STARTS_OF_FRAME = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_ORIENTATION = 0x0112  # EXIF's tag
_GLANCE = 4096  # bytes
_REDUCED = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}


class ImageError(DataError):
    """An image file that cannot be used: missing, cut short, not an image, or too large."""


def header_size(source: Path | IO[bytes], *, name: str | None = None) -> tuple[int, int]:
    """Height and width that an image file's header gives, without decoding it.

    Args:
        source: The file, or an open one.
        name: What errors call it.

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
class EncodedImage:
    """An image file's content, whole as far as one can tell without decoding it."""

    path: Path
    content: bytes
    size: tuple[int, int]  # H, W

    def decode(self, *, at_least: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        """The image in the file's own pixels, uint8 RGB.

        An EXIF orientation is not applied: COCO annotations are drawn without it. Alpha is ignored
        and the colours under it are taken as stored, as `cv2.imread` and Pillow's `convert("RGB")`
        do: that is what users give to `SamPredictor`. Of 16 bits the upper 8 are taken.

        Args:
            at_least: A JPEG may be reduced to a half, a quarter or an eighth when decoded, which
                costs less, as long as it remains at least this high and wide; None: not reduced.

        Returns:
            uint8 [H, W, 3], or [H/n, W/n, 3] rounded up.

        Raises:
            ImageError: If it is broken.
        """
        factor = self._reduction(at_least) if at_least else 1
        flags = _REDUCED[factor] | cv2.IMREAD_IGNORE_ORIENTATION
        try:
            image = cv2.imdecode(np.frombuffer(self.content, dtype=np.uint8), flags)
        except cv2.error:
            image = None
        expected = tuple(-(-side // factor) for side in self.size)
        if image is None or image.shape[:2] != expected:
            raise _broken(self.path)
        return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image), dtype=np.uint8)

    def _reduction(self, at_least: tuple[int, int]) -> int:
        def suffices(factor: int) -> bool:
            return all(
                -(-side // factor) >= least for side, least in zip(self.size, at_least, strict=True)
            )

        if not self.content.startswith(_JPEG):
            return 1
        return max((factor for factor in _REDUCED if suffices(factor)), default=1)


def open_image(path: Path) -> EncodedImage:
    """Reads an image file and checks what can be checked without decoding it.

    Raises:
        ImageError: If it is missing, cut short, not an image, or larger than `MAX_PIXELS`.
    """
    try:
        with path.open("rb") as file:
            size = header_size(file, name=str(path))
            file.seek(0)
            content = file.read()
    except OSError as error:
        raise ImageError(f"{path} cannot be read ({error.strerror}): check the file.") from error
    if _is_cut_short(content):
        raise _broken(path)
    return EncodedImage(path, content, size)


def read_image(path: Path) -> NDArray[np.uint8]:
    """Reads an image file in full: uint8 [H, W, 3]; see `open_image` and `EncodedImage.decode`."""
    return open_image(path).decode()


def _broken(path: Path) -> ImageError:
    return ImageError(f"{path} is broken or cut short: replace it, or remove it from the JSON.")


@dataclass(frozen=True)
class ImageFacts:
    """What a file tells without being decoded.

    Attributes:
        height: Of the file's own pixels; 0 if unknown.
        width: As `height`.
        orientation: EXIF's, 1..8; samft never turns an image, and 1 is upright.
        problem: None, or `image-empty`, `image-not-an-image`, `image-truncated`,
            `image-too-large`, `image-unreadable` (missing, say, or without permission).
        num_bytes: Of the file.
    """

    height: int = 0
    width: int = 0
    orientation: int = 1
    problem: str | None = None
    num_bytes: int = 0


def inspect_image(path: Path) -> ImageFacts:
    """Looks at a file's first and last 4 KiB, and at the whole only if these leave doubts.

    Never raises for a file that is bad, whatever is wrong with it.
    """
    try:
        with path.open("rb", buffering=0) as file:
            length = os.fstat(file.fileno()).st_size
            head = file.read(_GLANCE)
            if not head:
                return ImageFacts(problem="image-empty")
            facts = _facts_of_head(head) or _facts_by_pillow(file, head)
            if facts.problem is None and _seems_cut_short(file, head, length=length):
                facts = replace(facts, problem="image-truncated")
            return replace(facts, num_bytes=length)
    except (OSError, ValueError):
        return ImageFacts(problem="image-unreadable")


def _facts_of_head(head: bytes) -> ImageFacts | None:
    # A tenth of Pillow's time, for the two formats that datasets are made of; None: ask Pillow.
    if head.startswith(_PNG) and len(head) > 24 and b"eXIf" not in head:
        width, height = struct.unpack_from(">II", head, 16)
        return _checked(height, width)
    for marker, start in _jpeg_segments(head) if head.startswith(_JPEG) else ():
        if marker == _APP1 and head.startswith(b"Exif", start):
            return None
        if marker in _STARTS_OF_FRAME and start + 5 <= len(head):
            return _checked(*struct.unpack_from(">HH", head, start + 1))
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
    except Exception:  # Pillow's parsers raise anything on a file made to hurt
        known = head.startswith((_JPEG, _PNG))
        return ImageFacts(problem="image-truncated" if known else "image-not-an-image")
    valid = isinstance(orientation, int) and 1 <= orientation <= 8
    return _checked(height, width, orientation=orientation if valid else 1)


def _checked(height: int, width: int, *, orientation: int = 1) -> ImageFacts:
    if not height or not width:
        return ImageFacts(problem="image-not-an-image")
    problem = "image-too-large" if height * width > MAX_PIXELS else None
    return ImageFacts(height, width, orientation, problem)


def _seems_cut_short(file: io.FileIO, head: bytes, *, length: int) -> bool:
    end = _PNG_END if head.startswith(_PNG) else _JPEG_END if head.startswith(_JPEG) else b""
    file.seek(max(0, length - _GLANCE))
    # Some writers pad. An end marker further up might be a thumbnail's.
    ending = (file.read() or b"").rstrip(b"\0\r\n ")
    if ending.endswith(end):
        return False
    file.seek(0)
    return _is_cut_short(file.read() or b"")


def _is_cut_short(content: bytes) -> bool:
    # OpenCV fills what is missing with grey and says nothing.
    if content.startswith(_PNG):
        return _PNG_END not in content[-_GLANCE:]
    if not content.startswith(_JPEG):
        return False
    # Past the header segments (which may hold a thumbnail with an end marker of its own), the end
    # marker cannot occur in the pixel data.
    for marker, start in _jpeg_segments(content):
        if marker == _START_OF_SCAN:
            return content.find(_JPEG_END, start) < 0
    return True


def _jpeg_segments(content: bytes) -> Iterator[tuple[int, int]]:
    # Marker and first byte of the body of each header segment, up to the first scan's.
    position = len(_JPEG)
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
