"""Image files decoded as COCO annotations are drawn on them. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from samft.images.files import JPEG_START, ImageError, header_size, is_cut_short
from samft.images.orientation import UPRIGHT, turn_pixels, turned_size
from samft.runtime.files import open_file

_REDUCED = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}


@dataclass(frozen=True)
class EncodedImage:
    """The content of an image file that is complete, as far as can be told without decoding."""

    path: Path
    content: bytes
    size: tuple[int, int]  # H, W, turned as `orientation` says
    orientation: int = UPRIGHT

    def decode(self, *, at_least: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        """The image in the file's own pixels, uint8 RGB, turned as `orientation` says.

        The file's own EXIF orientation is not looked at: COCO annotations are drawn without it, and
        the index knows where they are not. Alpha is ignored and the colours under it are taken as
        stored, as `cv2.imread` and Pillow's `convert("RGB")` do: that is what users give to
        `SamPredictor`. Of 16 bits the upper 8 are taken.

        Args:
            at_least: A JPEG may be reduced to a half, a quarter or an eighth when decoded, which
                costs less, as long as it remains at least this high and wide; None: not reduced.

        Returns:
            uint8 [H, W, 3], or [H/n, W/n, 3] rounded up.

        Raises:
            ImageError: If it is broken.
        """
        factor = self._reduction_factor(at_least) if at_least else 1
        flags = _REDUCED[factor] | cv2.IMREAD_IGNORE_ORIENTATION
        try:
            image = cv2.imdecode(np.frombuffer(self.content, dtype=np.uint8), flags)
        except cv2.error:
            image = None
        expected = tuple(-(-side // factor) for side in turned_size(self.size, self.orientation))
        if image is None or image.shape[:2] != expected:
            raise _broken_image_error(self.path)
        cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)
        return turn_pixels(np.asarray(image, dtype=np.uint8), self.orientation)

    def _reduction_factor(self, at_least: tuple[int, int]) -> int:
        def suffices(factor: int) -> bool:
            return all(
                -(-side // factor) >= least for side, least in zip(self.size, at_least, strict=True)
            )

        if not self.content.startswith(JPEG_START):
            return 1
        return max((factor for factor in _REDUCED if suffices(factor)), default=1)


def open_image(path: Path, *, orientation: int = UPRIGHT) -> EncodedImage:
    """Reads an image file and checks what can be checked without decoding it.

    Args:
        path: The file.
        orientation: How to turn it, as EXIF numbers it; see `turn_pixels`.

    Raises:
        ImageError: If it is missing, cut short, not an image, or larger than `MAX_PIXELS`.
    """
    try:
        with open_file(path) as file:
            size = header_size(file, name=str(path))
            file.seek(0)
            content = file.read()
    except OSError as error:
        raise ImageError(f"{path} cannot be read ({error.strerror}): check the file.") from error
    if is_cut_short(content):
        raise _broken_image_error(path)
    return EncodedImage(path, content, turned_size(size, orientation), orientation)


def read_image(path: Path, *, orientation: int = UPRIGHT) -> NDArray[np.uint8]:
    """Reads an image file in full: uint8 [H, W, 3]; see `open_image` and `EncodedImage.decode`."""
    return open_image(path, orientation=orientation).decode()


def _broken_image_error(path: Path) -> ImageError:
    return ImageError(f"{path} is broken or cut short: replace it, or remove it from the JSON.")
