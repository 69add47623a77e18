"""Windows of image files: their pixels, without decoding what is outside where the format allows.

The tiles or strips of a TIFF are decoded one by one. Other formats are decoded as a whole; the last
images are kept, up to a number of bytes, for their next windows. Imports no torch.
"""

import io
import os
from collections import OrderedDict
from pathlib import Path
from threading import Lock
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from samft.images.decoder import open_image
from samft.images.files import ImageError, open_in_windows, read_stored
from samft.images.limits import UnusableImage
from samft.images.orientation import UPRIGHT, turn_back_points, turn_pixels, turned_size
from samft.images.pixels import PLAIN, PixelFormat, measure_range
from samft.images.ranges import sample_windows
from samft.images.tiff import TiffWindows
from samft.runtime.files import open_file
from samft.views.mapping import cut_window
from samft.views.windows import Windows

_KEPT_BYTES = 1 << 29  # of decoded pixels; the last image is kept whatever its size
_KEPT_FILES = 16


class ImageSource(Protocol):
    """An image that is read in windows.

    Attributes:
        size: H, W, px, turned as its orientation says.
    """

    size: tuple[int, int]

    @property
    def num_bytes(self) -> int:
        """Of decoded pixels that are kept."""
        ...

    def read(self, window: Windows) -> NDArray[np.uint8]:
        """The pixels of a window [4], x0 y0 x1 y1, px: uint8 [h, w, 3], RGB.

        Raises:
            ImageError: This part of the file is damaged.
        """
        ...


class DecodedImage:
    """An image in memory, see `ImageSource`."""

    def __init__(self, image: NDArray[np.uint8]) -> None:
        """Takes uint8 [H, W, 3], RGB."""
        self.size, self._image = (image.shape[0], image.shape[1]), image

    @property
    def num_bytes(self) -> int:
        """See `ImageSource`."""
        return self._image.nbytes

    def read(self, window: Windows) -> NDArray[np.uint8]:
        """See `ImageSource`."""
        return np.ascontiguousarray(cut_window(self._image, window))


class _StoredImage:
    # A file that is decoded in parts.
    def __init__(
        self, path: Path, windows: TiffWindows, *, orientation: int, pixels: PixelFormat
    ) -> None:
        self._path, self._windows, self._orientation = path, windows, orientation
        self.size = turned_size(windows.size, orientation)
        pixel_type = read_stored(windows, (0, 0, 1, 1)).dtype.name
        if pixels.lacks_range(pixel_type):  # that of the image, not of each window
            pixels = pixels.with_ranges({pixel_type: measure_range([sample_windows(windows)])})
        self._pixels = pixels

    @property
    def num_bytes(self) -> int:
        return self._windows.num_bytes

    def read(self, window: Windows) -> NDArray[np.uint8]:
        corners = turn_back_points(
            np.asarray(window, dtype=np.float64).reshape(2, 2), self._orientation, size=self.size
        )
        (x0, y0), (x1, y1) = corners.min(axis=0), corners.max(axis=0)
        try:
            values = read_stored(self._windows, (int(y0), int(x0), int(y1), int(x1)))
        except UnusableImage as error:
            raise ImageError(f"{self._path} {error.sentence}") from error
        return turn_pixels(self._pixels.to_rgb(values), self._orientation)


def open_source(
    path: Path, *, orientation: int = UPRIGHT, pixels: PixelFormat = PLAIN
) -> ImageSource:
    """Opens an image file to read windows of it; their pixels are those of `decoder.read_image`.

    Args:
        path: The file.
        orientation: How to turn it, as EXIF numbers it.
        pixels: Which bands and page are used, and how values become 8 bits.

    Raises:
        ImageError: The file cannot be used.
    """
    try:
        file = cast(io.FileIO, open_file(path, buffering=0))
        windows = open_in_windows(file, pixels)
        if windows is not None:
            return _StoredImage(path, windows, orientation=orientation, pixels=pixels)
    except OSError as error:
        raise ImageError(f"{path} cannot be read ({error.strerror}): check the file.") from error
    except UnusableImage as error:
        raise ImageError(f"{path} {error.sentence}") from error
    return DecodedImage(open_image(path, orientation=orientation, pixels=pixels).decode())


class SourceCache:
    """The files of this process that windows were read of last."""

    def __init__(self, max_bytes: int = _KEPT_BYTES) -> None:
        """Keeps at most so many bytes of pixels, or one image."""
        self._max_bytes, self._lock = max_bytes, Lock()
        self._sources: OrderedDict[Any, ImageSource] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        """Of decoded pixels that are kept."""
        return sum(source.num_bytes for source in self._sources.values())

    def read(
        self,
        path: Path,
        window: Windows,
        *,
        orientation: int = UPRIGHT,
        pixels: PixelFormat = PLAIN,
    ) -> NDArray[np.uint8]:
        """The pixels of a window [4] of a file, see `open_source` and `ImageSource.read`."""
        return self.open(path, orientation=orientation, pixels=pixels).read(window)

    def open(
        self, path: Path, *, orientation: int = UPRIGHT, pixels: PixelFormat = PLAIN
    ) -> ImageSource:
        """A file, see `open_source`; one of those that are kept, unless it has changed since."""
        try:
            facts = os.stat(path)
        except OSError as error:
            raise ImageError(
                f"{path} cannot be read ({error.strerror}): check the file."
            ) from error
        key = path, facts.st_mtime_ns, facts.st_size, orientation, pixels
        with self._lock:
            if key in self._sources:
                self._sources.move_to_end(key)
                return self._sources[key]
        source = open_source(path, orientation=orientation, pixels=pixels)
        with self._lock:
            self._sources[key] = source
            while len(self._sources) > 1 and self._is_full():
                self._sources.popitem(last=False)
        return source

    def _is_full(self) -> bool:
        return len(self._sources) > _KEPT_FILES or self.num_bytes > self._max_bytes


SOURCES = SourceCache()
