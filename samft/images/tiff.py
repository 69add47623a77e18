"""TIFF of any type, number of bands and kind of stack, by tifffile. Imports no torch.

A page is what a viewer shows at once. Smaller copies of a page (thumbnails, levels of a pyramid)
and masks are none. OME, ImageJ and other microscope formats may keep each channel of a page as a
TIFF page of its own, and say so: these are its bands.
"""

import io
import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from samft.images.limits import UnusableImage, check_size
from samft.images.pixels import PixelFormat

if TYPE_CHECKING:
    import tifffile

_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # classic and BigTIFF, either byte order
_REDUCED, _MASK = 1, 4  # bits of the tag NewSubfileType
_MINISWHITE, _MINISBLACK, _RGB, _PALETTE, _CMYK = 0, 1, 2, 3, 5  # PhotometricInterpretation
_CFA, _LINEAR_RAW = 32803, 34892
_ALPHA = (1, 2)  # of ExtraSamples
_GDAL_NODATA = 42113
_ALIKE = 0.02  # by how much the aspect ratio of a thumbnail may differ

Read8Bits = Callable[[bytes, int], NDArray[np.uint8]]


def is_tiff(content: bytes) -> bool:
    """Whether a file begins as TIFF does."""
    return content.startswith(_STARTS)


def read_tiff(content: bytes, pixels: PixelFormat, *, read_8_bits: Read8Bits) -> NDArray[Any]:
    """Reads the chosen page and bands.

    Args:
        content: Of the file.
        pixels: Says which bands and page.
        read_8_bits: Reads a TIFF page of fewer bits, or of 8-bit YCbCr or CIELab, say, as RGB,
            given its index.

    Returns:
        [H, W] or [H, W, 3], without alpha; of the file's type and byte order.

    Raises:
        UnusableImage: Bands or a page have to be chosen, or it is a camera's raw data.
        Exception: Whatever tifffile raises on broken files.
    """
    import tifffile  # a tenth of a second that most datasets need not wait for

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it raises what matters
    with tifffile.TiffFile(io.BytesIO(content), _multifile=False) as tiff:
        first = tiff.pages.first
        if int(first.photometric) in (_CFA, _LINEAR_RAW):
            raise UnusableImage("image-format", "a camera's raw data")
        described = _described_series(tiff)
        if described is not None:
            return _read_series(described, pixels)
        pages = _pages_of(tiff)
        index = pages[pixels.choose_page(len(pages))]
        page = tiff.pages[index].aspage()
        check_size(
            page.imagelength,
            page.imagewidth,
            bytes_per_pixel=page.samplesperpixel * max(page.bitspersample // 8, 1),
        )
        bits, photometric = page.bitspersample, int(page.photometric)
        if bits < 8 or (bits == 8 and photometric > _PALETTE):
            return read_8_bits(content, index)
        return _colours_of(page, _bands_last(page.asarray(), page.axes), pixels)


def _described_series(tiff: "tifffile.TiffFile") -> "tifffile.TiffPageSeries | None":
    # The first image of a file that says how its pages belong together; None if it does not.
    if not (tiff.is_ome or tiff.is_imagej or tiff.is_shaped or tiff.is_lsm or tiff.is_stk):
        return None
    series = tiff.series[0]
    return series if len(series.axes) > 2 and series.axes not in ("YXS", "SYX") else None


def _read_series(series: "tifffile.TiffPageSeries", pixels: PixelFormat) -> NDArray[Any]:
    sizes = dict(zip(series.axes, series.shape, strict=True))
    separate = "C" if "S" not in sizes and "C" in sizes else ""
    leading = [axis for axis in series.axes if axis not in f"YXS{separate}"]
    page = pixels.choose_page(math.prod(sizes[axis] for axis in leading))
    height, width = sizes["Y"], sizes["X"]
    check_size(height, width, bytes_per_pixel=series.nbytes // max(height * width, 1))
    whole = series.asarray()
    order = [*leading, "Y", "X", *(axis for axis in ("S", separate) if axis in sizes)]
    whole = whole.transpose([series.axes.index(axis) for axis in order])
    planes = whole.reshape(-1, *whole.shape[len(leading) :])
    values = planes[page]
    return _colours_of(series.keyframe, values if values.ndim == 3 else values[..., None], pixels)


def _pages_of(tiff: "tifffile.TiffFile") -> list[int]:
    # Indices of the TIFF pages that are pages; the first always is one.
    first = tiff.pages.first
    pages = [0]
    for index in range(1, len(tiff.pages)):
        page = tiff.pages[index].aspage()
        if int(page.subfiletype) & (_REDUCED | _MASK) or _is_smaller_copy(page, first):
            continue
        pages.append(index)
    return pages


def _is_smaller_copy(page: "tifffile.TiffPage", first: "tifffile.TiffPage") -> bool:
    if page.imagelength >= first.imagelength or page.imagewidth >= first.imagewidth:
        return False
    ratio = page.imagewidth * first.imagelength / (page.imagelength * first.imagewidth)
    tolerance = _ALIKE + 1 / min(page.imagelength, page.imagewidth)  # sides are whole numbers
    return abs(ratio - 1) <= tolerance


def _bands_last(values: NDArray[Any], axes: str) -> NDArray[Any]:
    if "S" not in axes:
        return values.reshape(*values.shape[-2:], 1)
    order = [axes.index(axis) for axis in "YXS"]
    return values.transpose(order)


def _colours_of(
    page: "tifffile.TiffPage", values: NDArray[Any], pixels: PixelFormat
) -> NDArray[Any]:
    # [H, W, C] as [H, W] or [H, W, 3].
    photometric, num_bands = int(page.photometric), values.shape[2]
    if page.samplesperpixel == num_bands:
        extra = num_bands - len(page.extrasamples)
        alpha = [extra + k for k, kind in enumerate(page.extrasamples) if int(kind) in _ALPHA]
        values = np.delete(values, alpha, axis=2) if alpha else values
    if photometric == _PALETTE and page.colormap is not None:
        colours = np.moveaxis(np.asarray(page.colormap)[:, values[..., 0]], 0, -1)
        return (colours >> 8).astype(np.uint8)
    if photometric == _CMYK and values.shape[2] == 4 and values.dtype.kind == "u":
        most = np.iinfo(values.dtype).max
        light = (most - values[..., :3].astype(np.float64)) * (most - values[..., 3:]) / most
        return np.rint(light).astype(values.dtype)
    values = pixels.choose_bands(values, are_colours=photometric == _RGB and values.shape[2] == 4)
    if photometric == _MINISWHITE and values.dtype.kind == "u":
        values = np.iinfo(values.dtype).max - values
    return _without_nodata(values, page) if _GDAL_NODATA in page.tags else values


def _without_nodata(values: NDArray[Any], page: "tifffile.TiffPage") -> NDArray[Any]:
    # GDAL's mark of pixels without data, -9999 say, would be most of the range. NaN, or, where the
    # type has none, the least value instead.
    empty = values == page.nodata
    if values.dtype.kind == "f":
        return np.where(empty | (values == values.dtype.type(page.nodata)), np.nan, values)
    if values.dtype == np.uint8 or not empty.any() or empty.all():
        return values
    return np.where(empty, values[~empty].min(), values)
