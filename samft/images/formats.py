"""The pixel values of image files of any format and type, as they are stored. Imports no torch.

8-bit JPEG and PNG have a faster way of their own, in `decoder`. TIFF is taken apart by tifffile,
everything else is read by OpenCV and Pillow.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from samft.errors import is_out_of_memory
from samft.images.limits import UnusableImage, check_size
from samft.images.pixels import PIXEL_TYPES, PLAIN, PixelFormat
from samft.images.tiff import is_tiff, read_tiff

# What Pillow opens but cannot decode (WMF, HDF5), or decodes by another program (EPS), is missing.
_FORMATS = frozenset(
    """AVIF BMP CUR DCX DDS DIB FLI GIF ICNS ICO IM JPEG JPEG2000 MPO MSP PCX PNG PPM PSD QOI SGI
    SPIDER SUN TGA TIFF WEBP XBM XPM""".split()
)
_SEQUENCES = frozenset({"AVIF", "DCX", "FLI", "GIF", "PNG", "TIFF", "WEBP"})  # of pages or frames
_DEEP = frozenset({"JPEG2000", "PNG", "PPM"})  # Pillow reduces their 16-bit colours to 8 bits
_STARTS = {
    b"SIMPLE  =": "FITS",
    b"\x89HDF": "HDF5",
    b"ZISRAWFILE": "CZI",
    b"v/1\x01": "OpenEXR",
    b"#?RADIANCE": "Radiance HDR",
    b"\x93NUMPY": "NumPy",
    b"%PDF": "PDF",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"<svg": "SVG",
}
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")

# What OpenCV prints about a file, the error says.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def read_values(content: bytes, pixels: PixelFormat = PLAIN) -> NDArray[Any]:
    """The values of an image in its own type, with bands and page as chosen.

    Args:
        content: Of an image file.
        pixels: Says which bands and page; its range is not applied.

    Returns:
        [H, W] or [H, W, 3] (RGB), of one of `pixels.PIXEL_TYPES`; alpha is left out.

    Raises:
        UnusableImage: It is damaged, of an unknown format, or bands or a page have to be chosen.
    """
    with explain_errors(content):
        if is_tiff(content):
            values = read_tiff(content, pixels, read_8_bits=_read_8_bits)
        else:
            values = _read_with_pillow(content, pixels)
    return to_native(values)


def to_native(values: NDArray[Any]) -> NDArray[Any]:
    """Values of a file in this machine's byte order; bits as 0 and 255.

    Raises:
        UnusableImage: They are of none of `pixels.PIXEL_TYPES`.
    """
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    if values.dtype == bool:
        values = values.astype(np.uint8) * np.uint8(255)
    if values.dtype.name not in PIXEL_TYPES:
        raise UnusableImage("image-format", f"values of type {values.dtype.name}")
    return values


@contextmanager
def explain_errors(content: bytes) -> Iterator[None]:
    """Whatever the libraries that read images raise, as `UnusableImage`.

    Args:
        content: Of the file, or its beginning.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UnusableImage:
        raise
    except Image.DecompressionBombError as error:
        raise UnusableImage("image-too-large", str(error)) from error
    except Image.UnidentifiedImageError as error:
        if content.startswith((b"GIF8", b"BM", b"RIFF")) or content[4:12] == b"ftypavif":
            raise UnusableImage("image-damaged", "its header") from error
        known = name_format(content[:256])
        raise UnusableImage("image-format" if known else "image-not-an-image", known) from error
    except Exception as error:  # parsers raise anything on malicious files
        if is_out_of_memory(error):
            raise UnusableImage("image-too-large", "more than the memory holds") from error
        # Of a KeyError, say, the message is but the key.
        reason = [line for line in str(error).strip().splitlines() if " " in line] or ["its header"]
        code = "image-truncated" if "truncated" in reason[0] else "image-damaged"
        raise UnusableImage(code, reason[0][:200]) from error


def name_format(head: bytes) -> str:
    """The name of a format that is not read here, by a file's first bytes; empty: unknown."""
    if head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS:
        return "HEIC"
    if head[128:132] == b"DICM":
        return "DICOM"
    return next((name for start, name in _STARTS.items() if head.startswith(start)), "")


def _read_with_pillow(content: bytes, pixels: PixelFormat) -> NDArray[Any]:
    with Image.open(io.BytesIO(content)) as image:
        check_size(image.height, image.width)
        if image.format not in _FORMATS:
            raise UnusableImage("image-format", str(image.format))
        num_pages = getattr(image, "n_frames", 1) if image.format in _SEQUENCES else 1
        page = pixels.choose_page(num_pages)
        deep = _read_deep(content) if image.format in _DEEP and page == 0 else None
        if deep is not None:
            return deep
        if page:
            image.seek(page)
        return _values_of(image)


def _values_of(image: Image.Image) -> NDArray[Any]:
    if image.mode == "F" or image.mode.startswith("I"):
        return np.array(image)
    if image.mode == "LA":  # the grey under the alpha as it is stored
        return np.array(image)[..., 0]
    return np.array(image.convert("RGB"))


def _read_deep(content: bytes) -> NDArray[Any] | None:
    # None for 8 bits.
    image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None or image.dtype == np.uint8:
        return None
    return image if image.ndim == 2 else np.asarray(image[..., 2::-1])


def _read_8_bits(content: bytes, index: int) -> NDArray[np.uint8]:
    # A page of a TIFF; both libraries convert its colours, and OpenCV knows only the first page.
    if index == 0:
        flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
        image = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
        if image is not None:
            return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), dtype=np.uint8)
    with Image.open(io.BytesIO(content), formats=("TIFF",)) as opened:
        opened.seek(index)
        return np.array(opened.convert("RGB"))
