"""Windows of images with the methods of `decoder.EncodedImage`, which a dataset opens.

Imports no torch.
"""

import hashlib
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from samft.images.decoder import EncodedImage
from samft.images.files import ImageError
from samft.images.orientation import UPRIGHT
from samft.images.pixels import PLAIN, PixelFormat
from samft.runtime.files import sha256_of
from samft.views.mapping import cut_window
from samft.views.regions import SOURCES
from samft.views.windows import Windows

_KEPT_DIGESTS = 1024


def _size_of(window: Windows) -> tuple[int, int]:
    x0, y0, x1, y1 = window.tolist()
    return y1 - y0, x1 - x0


def _moved(window: Windows, corner: tuple[int, int]) -> Windows:
    (y, x), (height, width) = corner, _size_of(window)
    return np.array([x, y, x + width, y + height], dtype=np.int64)


@dataclass(frozen=True, eq=False)
class WindowOfImage:
    """A window of an image that is in memory.

    Attributes:
        image: The whole image.
        window: [4], x0 y0 x1 y1, px.
    """

    image: EncodedImage
    window: Windows

    @property
    def path(self) -> Path:
        """Of the image."""
        return self.image.path

    @property
    def size(self) -> tuple[int, int]:
        """H, W of the window, px."""
        return _size_of(self.window)

    def move_to(self, corner: tuple[int, int]) -> "WindowOfImage":
        """A window of the same size at y, x, px."""
        return replace(self, window=_moved(self.window, corner))

    def decode(self, *, at_least: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        """The pixels of the window, uint8 [h, w, 3], RGB; they are never reduced."""
        return np.ascontiguousarray(cut_window(self.image.decode(), self.window))

    def digest(self) -> bytes:
        """SHA-256 of the image and the place of the window: 32 bytes."""
        return _digest_of(self.image.digest(), self.window)


@dataclass(frozen=True, eq=False)
class WindowOfFile:
    """A window of an image file, which is read when it is decoded.

    Attributes:
        path: The file.
        window: [4], x0 y0 x1 y1, px of the turned image.
        whole_size: H, W of the image that the window was made for.
        orientation: How the image is turned, as EXIF numbers it.
        pixels: How its values become 8 bits.
    """

    path: Path
    window: Windows
    whole_size: tuple[int, int]
    orientation: int = UPRIGHT
    pixels: PixelFormat = PLAIN

    @property
    def size(self) -> tuple[int, int]:
        """H, W of the window, px."""
        return _size_of(self.window)

    def move_to(self, corner: tuple[int, int]) -> "WindowOfFile":
        """A window of the same size at y, x, px."""
        return replace(self, window=_moved(self.window, corner))

    def decode(self, *, at_least: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        """The pixels of the window, uint8 [h, w, 3], RGB; they are never reduced.

        Raises:
            ImageError: The file cannot be used, or is of another size than it was.
        """
        source = SOURCES.open(self.path, orientation=self.orientation, pixels=self.pixels)
        if source.size != self.whole_size:
            now, then = (f"{width} x {height}" for height, width in (source.size, self.whole_size))
            raise ImageError(f"{self.path} is of {now} px, and was of {then} px: start again.")
        return source.read(self.window)

    def digest(self) -> bytes:
        """SHA-256 of the file, of how it becomes 8 bits, and of the window's place: 32 bytes.

        Raises:
            ImageError: The file cannot be read.
        """
        try:
            facts = self.path.stat()
            content = _hash_file(self.path, facts.st_mtime_ns, facts.st_size)
        except OSError as error:
            raise ImageError(
                f"{self.path} cannot be read ({error.strerror}): check the file."
            ) from error
        return _digest_of(content, self.window, f"orientation {self.orientation}{self.pixels}")


@lru_cache(maxsize=_KEPT_DIGESTS)
def _hash_file(path: Path, modified_ns: int, num_bytes: int) -> bytes:
    # Once for all windows of a file; a changed one has another time or size.
    return bytes.fromhex(sha256_of(path))


def _digest_of(content: bytes, window: Windows, treatment: str = "") -> bytes:
    return hashlib.sha256(content + f"{treatment}window {window.tolist()}".encode()).digest()
