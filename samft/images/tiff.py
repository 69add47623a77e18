"""TIFF of any type, number of bands and kind of stack, by tifffile. Imports no torch.

A page is what a viewer shows at once. Smaller copies of a page (thumbnails, levels of a pyramid)
and masks are none. OME, ImageJ and other microscope formats may keep each channel of a page as a
TIFF page of its own, and say so: these are its bands.
"""

import io
import logging
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from threading import Lock
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from samft.images.limits import MAX_PIXELS, MAX_PIXELS_IN_WINDOWS, UnusableImage, check_size
from samft.images.pixels import PixelFormat

if TYPE_CHECKING:
    import tifffile

_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # classic and BigTIFF, either byte order
_REDUCED, _MASK = 1, 4  # bits of the tag NewSubfileType
_MINISWHITE, _MINISBLACK, _RGB, _PALETTE, _CMYK = 0, 1, 2, 3, 5  # PhotometricInterpretation
_YCBCR, _CFA, _LINEAR_RAW = 6, 32803, 34892
_JPEG = 7  # Compression
_ALPHA = (1, 2)  # of ExtraSamples
_GDAL_NODATA = 42113
_ALIKE = 0.02  # by how much the aspect ratio of a thumbnail may differ
_KEPT_BYTES = 1 << 28  # of decoded segments: a row of windows shares them
_ROWS_AT_ONCE = 512  # where all of an image is looked at

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
    with _open_tiff(io.BytesIO(content)) as tiff:
        described = _described_series(tiff)
        if described is not None:
            return _read_series(described, pixels)
        index, page = _choose_page(tiff, pixels)
        check_size(
            page.imagelength,
            page.imagewidth,
            bytes_per_pixel=page.samplesperpixel * max(page.bitspersample // 8, 1),
        )
        if _is_converted(page):
            return read_8_bits(content, index)
        values = _colours_of(page, _bands_last(page.asarray(), page.axes), pixels)
        return _without_nodata(values, page, least=_least_value([values], page))


def _open_tiff(file: BinaryIO) -> "tifffile.TiffFile":
    import tifffile  # a tenth of a second that most datasets need not wait for

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it raises what matters
    tiff = tifffile.TiffFile(file, _multifile=False)
    if int(tiff.pages.first.photometric) in (_CFA, _LINEAR_RAW):
        raise UnusableImage("image-format", "a camera's raw data")
    return tiff


def _choose_page(tiff: "tifffile.TiffFile", pixels: PixelFormat) -> tuple[int, "tifffile.TiffPage"]:
    pages = _pages_of(tiff)
    index = pages[pixels.choose_page(len(pages))]
    return index, tiff.pages[index].aspage()


def _is_converted(page: "tifffile.TiffPage") -> bool:
    # Whether another library makes its values whole bytes, or its colours RGB.
    bits, photometric = page.bitspersample, int(page.photometric)
    return bits < 8 or (bits == 8 and photometric > _PALETTE)


def open_tiff_windows(file: BinaryIO, pixels: PixelFormat) -> "TiffWindows | None":
    """A page of a file that can be decoded in parts.

    Args:
        file: Of a TIFF; open for as long as windows are read.
        pixels: Says which bands and page.

    Returns:
        None where the page has to be decoded as a whole: its values are of less than a byte, its
        bands are pages of their own, or a single strip is too large.

    Raises:
        UnusableImage: See `read_tiff`; or the file ends before its pixels do.
        Exception: Whatever tifffile raises on broken files.
    """
    tiff = _open_tiff(file)
    if _described_series(tiff) is not None:
        return None
    page = _choose_page(tiff, pixels)[1]
    is_jpeg = int(page.photometric) == _YCBCR and int(page.compression) == _JPEG  # becomes RGB
    if page.imagedepth != 1 or (_is_converted(page) and not (page.bitspersample == 8 and is_jpeg)):
        return None
    if not page.is_memmappable and math.prod(page.chunks) > MAX_PIXELS:
        return None
    height, width = page.imagelength, page.imagewidth
    if height * width > MAX_PIXELS_IN_WINDOWS:
        raise UnusableImage("image-too-large", f"{width} x {height} pixels")
    length = os.fstat(file.fileno()).st_size
    pairs = zip(page.dataoffsets, page.databytecounts, strict=True)
    if any(offset + count > length for offset, count in pairs):
        raise UnusableImage("image-truncated")
    return TiffWindows(file, page, pixels)


class TiffWindows:
    """A page of a TIFF of which only the tiles or strips that a window needs are decoded.

    The last ones are kept, as neighbouring windows share them: at most `_KEPT_BYTES`.

    Attributes:
        size: H, W, px, as stored.
    """

    def __init__(self, file: BinaryIO, page: "tifffile.TiffPage", pixels: PixelFormat) -> None:
        """See `open_tiff_windows`."""
        self.size = (page.imagelength, page.imagewidth)
        self._file, self._page, self._pixels = file, page, pixels
        self._segments: OrderedDict[int, NDArray[Any] | None] = OrderedDict()
        self._lock = Lock()
        # Of each: plane, depth, row, column and band where it begins; depth, rows, columns, bands.
        places = [page.decode(None, k)[1:] for k in range(len(page.dataoffsets))]
        self._places = np.array([a + b for a, b in places], dtype=np.int64).reshape(-1, 9)
        needs_least = _GDAL_NODATA in page.tags and np.dtype(page.dtype).kind in "iu"
        self._least = _least_value(self._row_blocks(), page) if needs_least else None

    @property
    def num_bytes(self) -> int:
        """Of the decoded segments that are kept."""
        return sum(one.nbytes for one in self._segments.values() if one is not None)

    def read(self, y0: int, x0: int, y1: int, x1: int) -> NDArray[Any]:
        """The values of a window of the page, as `read_tiff` gives those of all of it."""
        values = self._colours(y0, x0, y1, x1)
        return _without_nodata(values, self._page, least=self._least)

    def _row_blocks(self) -> Iterator[NDArray[Any]]:
        height, width = self.size
        for top in range(0, height, _ROWS_AT_ONCE):
            yield self._colours(top, 0, min(top + _ROWS_AT_ONCE, height), width)

    def _colours(self, y0: int, x0: int, y1: int, x1: int) -> NDArray[Any]:
        page = self._page
        if page.is_memmappable:
            stored = np.memmap(
                self._file,
                mode="r",
                dtype=np.dtype(page.dtype).newbyteorder(page.parent.byteorder),
                offset=page.dataoffsets[0],
                shape=page.shape,
            )
            values = _bands_last(stored, page.axes)[y0:y1, x0:x1].copy()
        else:
            values = self._decode_window(y0, x0, y1, x1)
        return _colours_of(page, values, self._pixels)

    def _decode_window(self, y0: int, x0: int, y1: int, x1: int) -> NDArray[Any]:
        page, (first_band, _, top, left, _, _, rows, columns, bands) = self._page, self._places.T
        num_bands = int(first_band.max() + bands.max())
        shape = (y1 - y0, x1 - x0, num_bands)
        values = np.full(shape, page.nodata, dtype=page.dtype)
        hit = (top < y1) & (top + rows > y0) & (left < x1) & (left + columns > x0)
        for k in np.flatnonzero(hit).tolist():
            segment = self._segment(k)
            if segment is None:  # nothing is stored of it
                continue
            low = max(y0, int(top[k])), max(x0, int(left[k]))
            high = min(y1, int(top[k] + rows[k])), min(x1, int(left[k] + columns[k]))
            inner = segment[
                low[0] - top[k] : high[0] - top[k], low[1] - left[k] : high[1] - left[k]
            ]
            band = slice(int(first_band[k]), int(first_band[k] + bands[k]))
            values[low[0] - y0 : high[0] - y0, low[1] - x0 : high[1] - x0, band] = inner
        return values

    def _segment(self, k: int) -> NDArray[Any] | None:
        # [rows, columns, bands]
        with self._lock:
            if k in self._segments:
                self._segments.move_to_end(k)
                return self._segments[k]
        page = self._page
        count, options = page.databytecounts[k], {}
        if int(page.compression) == _JPEG:
            options = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}
        # Not by seeking, as threads and forked processes share the file's position.
        data = os.pread(self._file.fileno(), count, page.dataoffsets[k]) if count else None
        decoded, _, shape = page.decode(data, k, **options)
        segment = None if decoded is None else decoded[0, : shape[1], : shape[2]]
        with self._lock:
            self._segments[k] = segment
            while self.num_bytes > _KEPT_BYTES and len(self._segments) > 1:
                self._segments.popitem(last=False)
        return segment


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
    first, bands = series.keyframe, values if values.ndim == 3 else values[..., None]
    values = _colours_of(first, bands, pixels)
    return _without_nodata(values, first, least=_least_value([values], first))


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
    return values


def _least_value(blocks: Iterable[NDArray[Any]], page: "tifffile.TiffPage") -> Any:
    # Of the pixels that have data, where whole numbers stand for those that have none; or None.
    if _GDAL_NODATA not in page.tags:
        return None
    filled = (block[block != page.nodata] for block in blocks if block.dtype.kind in "iu")
    return min((block.min() for block in filled if block.size), default=None)


def _without_nodata(values: NDArray[Any], page: "tifffile.TiffPage", *, least: Any) -> NDArray[Any]:
    # GDAL's mark of pixels without data, -9999 say, would be most of the range. NaN, or, where the
    # type has none, the least value of the image instead.
    if _GDAL_NODATA not in page.tags:
        return values
    empty = values == page.nodata
    if values.dtype.kind == "f":
        return np.where(empty | (values == values.dtype.type(page.nodata)), np.nan, values)
    return values if values.dtype == np.uint8 or least is None else np.where(empty, least, values)
