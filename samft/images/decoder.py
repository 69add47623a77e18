"""Image files decoded as COCO annotations are drawn on them. Imports no torch."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from samft.images.files import JPEG_START, ImageError, explain_damage, is_cut_short, plain_size
from samft.images.formats import read_values
from samft.images.limits import UnusableImage, check_size
from samft.images.orientation import UPRIGHT, turn_pixels, turned_size
from samft.images.pixels import PLAIN, PixelFormat
from samft.runtime.files import open_file

_REDUCED = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}


@dataclass(frozen=True)
class EncodedImage:
    """The content of an image file that is complete, as far as can be told without decoding.

    Attributes:
        path: The file.
        content: Of the file.
        size: H, W, px, turned as `orientation` says.
        orientation: How the image is turned, as EXIF numbers it.
        pixels: How its values become 8 bits.
        values: [H, W] or [H, W, 3], RGB, of any of `pixels.PIXEL_TYPES`, if it had to be decoded to
            know its size: all but 8-bit JPEG and PNG.
    """

    path: Path
    content: bytes
    size: tuple[int, int]
    orientation: int = UPRIGHT
    pixels: PixelFormat = PLAIN
    values: NDArray[Any] | None = None

    def decode(self, *, at_least: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        """The image in the file's own pixels, uint8 RGB, turned as `orientation` says.

        The file's own EXIF orientation is not looked at: COCO annotations are drawn without it, and
        the index knows where they are not. Alpha is ignored and the colours under it are taken as
        stored, as `cv2.imread` and Pillow's `convert("RGB")` do: that is what users give to
        `SamPredictor`. Other types than 8 bits become 8 bits as `PixelFormat.to_rgb` says.

        Args:
            at_least: A JPEG may be reduced to a half, a quarter or an eighth when decoded, which
                costs less, as long as it remains at least this high and wide; None: not reduced.

        Returns:
            uint8 [H, W, 3], or [H/n, W/n, 3] rounded up.

        Raises:
            ImageError: If it is broken.
        """
        if self.values is not None:
            return self._to_view(self.values)
        factor = self._reduction_factor(at_least) if at_least else 1
        flags = _REDUCED[factor] | cv2.IMREAD_IGNORE_ORIENTATION
        try:
            image = cv2.imdecode(np.frombuffer(self.content, dtype=np.uint8), flags)
        except cv2.error:
            image = None
        expected = tuple(-(-side // factor) for side in turned_size(self.size, self.orientation))
        if image is None or image.shape[:2] != expected:
            return self._to_view(_read_values(self.path, self.content, self.pixels))
        cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)
        return self._to_view(np.asarray(image, dtype=np.uint8))

    def digest(self) -> bytes:
        """SHA-256 of the file's content and of how it becomes 8-bit pixels: 32 bytes."""
        digest = hashlib.sha256(self.content)
        digest.update(self.treatment.encode())
        return digest.digest()

    @property
    def treatment(self) -> str:
        """How the decoded image depends on more than `content`; empty if it does not."""
        turned = "" if self.orientation == UPRIGHT else f"orientation {self.orientation}"
        mapped = self.values is not None or self.pixels.maps_8_bits
        return f"{turned}{self.pixels}" if mapped else turned

    def _to_view(self, values: NDArray[Any]) -> NDArray[np.uint8]:
        return turn_pixels(self.pixels.to_rgb(values), self.orientation)

    def _reduction_factor(self, at_least: tuple[int, int]) -> int:
        def suffices(factor: int) -> bool:
            return all(
                -(-side // factor) >= least for side, least in zip(self.size, at_least, strict=True)
            )

        if not self.content.startswith(JPEG_START):
            return 1
        return max((factor for factor in _REDUCED if suffices(factor)), default=1)


def open_image(
    path: Path, *, orientation: int = UPRIGHT, pixels: PixelFormat = PLAIN
) -> EncodedImage:
    """Reads an image file and checks what can be checked without decoding it.

    Args:
        path: The file.
        orientation: How to turn it, as EXIF numbers it; see `turn_pixels`.
        pixels: Which bands and page are used, and how values become 8 bits.

    Raises:
        ImageError: If it is missing, cut short, not an image, or larger than `MAX_PIXELS`.
    """
    try:
        with open_file(path) as file:
            content = file.read()
    except OSError as error:
        raise ImageError(f"{path} cannot be read ({error.strerror}): check the file.") from error
    size, values = plain_size(content), None
    try:
        if size is not None:
            check_size(*size)
        if is_cut_short(content):
            raise UnusableImage("image-truncated")
    except UnusableImage as error:
        raise ImageError(f"{path} {error.sentence}") from error
    if size is None:
        values = _read_values(path, content, pixels)
        size = (values.shape[0], values.shape[1])
    return EncodedImage(path, content, turned_size(size, orientation), orientation, pixels, values)


def read_image(
    path: Path, *, orientation: int = UPRIGHT, pixels: PixelFormat = PLAIN
) -> NDArray[np.uint8]:
    """Reads an image file in full: uint8 [H, W, 3]; see `open_image` and `EncodedImage.decode`."""
    return open_image(path, orientation=orientation, pixels=pixels).decode()


def _read_values(path: Path, content: bytes, pixels: PixelFormat) -> NDArray[Any]:
    try:
        return read_values(content, pixels)
    except UnusableImage as error:
        error = explain_damage(content, error)
        raise ImageError(f"{path} {error.sentence}") from error
