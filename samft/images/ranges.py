"""Measures on a dataset which range of its pixel values becomes 0 to 255. Imports no torch."""

import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from samft.images.files import open_in_windows, read_stored
from samft.images.formats import read_values
from samft.images.limits import UnusableImage
from samft.images.pixels import PixelFormat, measure_range, sample_blocks, sample_values
from samft.images.tiff import TiffWindows
from samft.runtime.files import open_file

NUM_SAMPLED = 64  # images
_THREADS = 4
_ROWS_AT_ONCE = 512


def measure_ranges(
    pixels: PixelFormat, types: Sequence[str], *, path: Callable[[int], Path]
) -> PixelFormat:
    """Measures the ranges that are lacking for a dataset.

    Of each type, up to `NUM_SAMPLED` images are read, at even distances in the list: the same ones
    in each process.

    Args:
        pixels: With the ranges that are known.
        types: [N], the pixel type of each image, see `pixels.PIXEL_TYPES`.
        path: The file of an image, by its position in `types`.
    """
    rows_of: dict[str, list[int]] = {
        name: [] for name in sorted(set(types)) if pixels.lacks_range(name)
    }
    for row, name in enumerate(types if rows_of else ()):
        if name in rows_of:
            rows_of[name].append(row)
    measured = {}
    for name, rows in rows_of.items():
        chosen = np.unique(np.linspace(0, len(rows) - 1, NUM_SAMPLED).round().astype(int))
        with ThreadPoolExecutor(_THREADS) as pool:
            samples = pool.map(
                lambda row, name=name: _sample_file(path(row), pixels, name),
                [rows[k] for k in chosen],
            )
            measured[name] = measure_range([one for one in samples if one is not None])
    return pixels.with_ranges(measured)


def _sample_file(path: Path, pixels: PixelFormat, pixel_type: str) -> NDArray[Any] | None:
    # None: whoever loads the image reports what is wrong with it.
    try:
        with cast(io.FileIO, open_file(path, buffering=0)) as file:
            windows = open_in_windows(file, pixels) if pixels.in_windows else None
            if windows is not None:
                sample = sample_windows(windows)
            else:
                file.seek(0)
                sample = sample_values(read_values(file.read() or b"", pixels))
    except (OSError, UnusableImage):
        return None
    return sample if sample.dtype.name == pixel_type else None


def sample_windows(windows: TiffWindows) -> NDArray[Any]:
    """What `sample_values` takes of an image that is read in windows.

    Raises:
        UnusableImage: A part of it is damaged.
    """
    height, width = windows.size
    blocks = (
        read_stored(windows, (top, 0, min(top + _ROWS_AT_ONCE, height), width))
        for top in range(0, height, _ROWS_AT_ONCE)
    )
    num_bands = read_stored(windows, (0, 0, 1, 1)).size
    return sample_blocks(blocks, height * width * num_bands)
