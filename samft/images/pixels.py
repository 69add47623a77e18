"""How pixel values of any type become the 8-bit RGB that SAM takes. Imports no torch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samft.cli import parse_channels, parse_pixel_range
from samft.errors import ConfigError
from samft.images.limits import UnusableImage

AUTO, PERCENTILE, FULL = "auto", "percentile", "full"
PERCENTILES = (1, 99)
# Of images, as NumPy names them; their positions are stored in indexes.
PIXEL_TYPES = tuple(
    """uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 float32 float64""".split()
)
SAMPLED_VALUES = 1 << 16  # of an image


@dataclass(frozen=True)
class PixelFormat:
    """Which values of an image file are used, and how they become 8 bits.

    Attributes:
        pixel_range: `auto`: 8 bits as they are, other types as `percentile`. `percentile`: the
            range from percentile 1 to 99 becomes 0 to 255. `full`: the type's whole range does
            (0 to 1 for floats). `MIN,MAX`: that range does, also of 8-bit images if MAX is at most
            255.
        channels: 1-based numbers of the one or three bands to use of images of more bands than
            three (and of two); empty: not chosen.
        page: 1-based number of the page to use of stacks and animations; None: not chosen.
        ranges: Of `percentile` and `auto`: pixel type, low, high for each type that has been
            measured on a dataset; without one, each image is measured by itself.
        in_windows: Images are only ever read in windows, so that one may have more than
            `limits.MAX_PIXELS` if its format can be decoded in parts.
    """

    pixel_range: str = AUTO
    channels: tuple[int, ...] = ()
    page: int | None = None
    ranges: tuple[tuple[str, float, float], ...] = ()
    in_windows: bool = field(default=False, repr=False)  # changes no pixel, so no cached embedding

    @classmethod
    def parse(
        cls, *, pixel_range: str = AUTO, channels: str | None = None, page: int | None = None
    ) -> "PixelFormat":
        """From the values of the settings and flags of these names, which have been checked."""
        parse_pixel_range(pixel_range)
        return cls(pixel_range, parse_channels(channels) if channels else (), page)

    @classmethod
    def from_json(cls, saved: Any) -> "PixelFormat | None":
        """The inverse of `to_json`; None for anything else."""
        try:
            ranges = tuple(
                (name, float(low), float(high)) for name, (low, high) in saved["ranges"].items()
            )
            channels = tuple(int(band) for band in saved["channels"] or ())
            page = None if saved["page"] is None else int(saved["page"])
            parse_pixel_range(saved["pixel_range"])
        except (TypeError, ValueError, KeyError, AttributeError):
            return None
        return cls(saved["pixel_range"], channels, page, ranges)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the sidecar of a checkpoint and for exports."""
        return {
            "pixel_range": self.pixel_range,
            "ranges": {name: [low, high] for name, low, high in self.ranges},
            "channels": list(self.channels) or None,
            "page": self.page,
        }

    def completed(self, given: Mapping[str, Any], *, flags_of: str) -> "PixelFormat":
        """With flags for what a checkpoint does not say; it says what its training needed.

        Args:
            given: Those of `pixel_range`, `channels` and `page` that were given.
            flags_of: Names the checkpoint in the error.

        Raises:
            ConfigError: A flag contradicts the checkpoint.
        """
        flags = PixelFormat.parse(**given)
        known = {
            "pixel_range": self.pixel_range if self.pixel_range != AUTO or self.ranges else None,
            "channels": self.channels or None,
            "page": self.page,
        }
        changes = {}
        for name in given:
            asked = getattr(flags, name)
            if known[name] not in (None, asked):
                raise ConfigError(
                    f"--{name}: {flags_of} was trained with {name} {known[name]}, which is used by "
                    "itself: leave the flag out."
                )
            changes[name] = asked
        return replace(self, **changes)

    @property
    def layout(self) -> "PixelFormat":
        """Only what decides which images can be read: bands, page, and whether in windows."""
        return PixelFormat(channels=self.channels, page=self.page, in_windows=self.in_windows)

    @property
    def maps_8_bits(self) -> bool:
        """Whether 8-bit images are changed, too."""
        return self._range_of(np.zeros((1, 1), dtype=np.uint8)) is not None

    def lacks_range(self, pixel_type: str) -> bool:
        """Whether the range of a pixel type has yet to be measured on the dataset."""
        measured = any(name == pixel_type for name, _, _ in self.ranges)
        if self.pixel_range == AUTO:
            return pixel_type != "uint8" and not measured
        return self.pixel_range == PERCENTILE and not measured

    def with_ranges(self, measured: Mapping[str, tuple[float, float]]) -> "PixelFormat":
        """With the ranges of further pixel types."""
        new = tuple((name, low, high) for name, (low, high) in sorted(measured.items()))
        return replace(self, ranges=self.ranges + new)

    def lines(self) -> list[str]:
        """What is done to the values, for people to read; empty if 8 bits are used as they are."""
        low, high = PERCENTILES
        lines = [
            f"{name} values from {start:g} to {end:g} become 0 to 255 (pixel_range "
            f"{self.pixel_range}: percentiles {low} and {high} of a sample of the images)"
            for name, start, end in self.ranges
        ]
        if self.pixel_range not in (AUTO, PERCENTILE):
            lines.append(f"pixel_range {self.pixel_range}: these values become 0 to 255")
        if self.channels:
            bands = ", ".join(map(str, self.channels))
            lines.append(f"images of more than three bands: band {bands} (counted from 1)")
        if self.page is not None:
            lines.append(f"images of several pages: page {self.page} (counted from 1)")
        return lines

    def choose_page(self, num_pages: int) -> int:
        """The index, from 0, of the page to use of an image; that of an image of one page is 0.

        Raises:
            UnusableImage: There are several, and none is chosen, or one that is not there.
        """
        if num_pages < 2:
            return 0
        if self.page is None:
            raise UnusableImage("image-pages", f"{num_pages} pages")
        if self.page > num_pages:
            raise UnusableImage("image-pages", f"{num_pages} pages, and page is {self.page}")
        return self.page - 1

    def choose_bands(self, values: NDArray[Any], *, are_colours: bool = False) -> NDArray[Any]:
        """The bands to use of an image.

        Args:
            values: [H, W, C], without alpha.
            are_colours: Whether the first three are declared to be red, green and blue.

        Returns:
            [H, W] or [H, W, 3]; all of an image of one or three bands.

        Raises:
            UnusableImage: There are others, and none are chosen, or some that are not there.
        """
        num_bands = values.shape[2]
        if num_bands == 1:
            return values[..., 0]
        if num_bands == 3:
            return values
        if not self.channels:
            if are_colours:
                return values[..., :3]
            raise UnusableImage("image-bands", f"{num_bands} bands")
        if max(self.channels) > num_bands:
            asked = ",".join(map(str, self.channels))
            raise UnusableImage("image-bands", f"{num_bands} bands, and channels is {asked}")
        chosen = values[..., [band - 1 for band in self.channels]]
        return chosen[..., 0] if len(self.channels) == 1 else chosen

    def to_rgb(self, values: NDArray[Any]) -> NDArray[np.uint8]:
        """Pixel values as 8-bit RGB.

        A value v of a range from a to b becomes `round(255 (v - a) / (b - a))`, from 0 to 255. NaN
        and infinite values become 0.

        Args:
            values: [H, W] or [H, W, 3], of any of `PIXEL_TYPES`.

        Returns:
            uint8 [H, W, 3], for the caller to write into.
        """
        chosen = self._range_of(values)
        image = values if chosen is None else _map_range(values, *chosen)
        if image.ndim == 2:
            image = np.repeat(image[..., None], 3, axis=2)
        return np.require(image, dtype=np.uint8, requirements=["C", "W", "O"])

    def _range_of(self, values: NDArray[Any]) -> tuple[float, float] | None:
        # None: 8 bits as they are.
        pixel_type = values.dtype.name
        for name, low, high in self.ranges:
            if name == pixel_type:
                return low, high
        if self.lacks_range(pixel_type):
            return measure_range([sample_values(values)])
        if self.pixel_range in (AUTO, PERCENTILE, FULL):
            return None if pixel_type == "uint8" else _whole_range(values.dtype)
        low, high = parse_pixel_range(self.pixel_range) or (0.0, 255.0)
        return None if pixel_type == "uint8" and high > 255 else (low, high)


PLAIN = PixelFormat()  # 8 bits as they are, other types by themselves; one page of three bands


def pixel_content(image: NDArray[np.uint8]) -> bytes:
    """The height, the width and the pixels of an image [H, W, 3], to be hashed."""
    return f"{image.shape[0]} {image.shape[1]} ".encode() + image.tobytes()


def sample_values(values: NDArray[Any]) -> NDArray[Any]:
    """Finite values of an image, at most `SAMPLED_VALUES` of them, the same ones each time."""
    return sample_blocks([values], values.size)


def sample_blocks(blocks: Iterable[NDArray[Any]], num_values: int) -> NDArray[Any]:
    """The same from an image in blocks of rows, from the top down.

    Args:
        blocks: [h, W] or [h, W, 3] each.
        num_values: Of the image.
    """
    places = np.arange(num_values) if num_values <= SAMPLED_VALUES else _sampled_places(num_values)
    order = np.argsort(places, kind="stable")
    chosen, first, parts = places[order], 0, []
    for block in blocks:
        low, high = np.searchsorted(chosen, [first, first + block.size])
        parts.append(block.reshape(-1)[chosen[low:high] - first])
        first += block.size
    flat = np.empty_like(np.concatenate(parts))
    flat[order] = np.concatenate(parts)
    return flat[np.isfinite(flat)]


def _sampled_places(num_values: int) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, num_values, SAMPLED_VALUES)


def measure_range(samples: list[NDArray[Any]]) -> tuple[float, float]:
    """Percentiles 1 and 99 of sampled values; where they are one value, the least and the largest.

    Args:
        samples: Of any number of images, finite.

    Returns:
        Low, high; high is above low, so that a constant image becomes black.
    """
    pooled = np.concatenate([np.zeros(0), *samples], dtype=np.float64, casting="unsafe")
    if not len(pooled):
        return 0.0, 1.0
    low, high = np.percentile(pooled, PERCENTILES).tolist()
    if low == high:  # nearly all of it is background
        low, high = float(pooled.min()), float(pooled.max())
    return (low, high) if high > low else (low, float(np.nextafter(low, np.inf)) + 1.0)


def _whole_range(dtype: np.dtype[Any]) -> tuple[float, float]:
    if dtype.kind == "f":
        return 0.0, 1.0
    limits = np.iinfo(dtype)
    return float(limits.min), float(limits.max)


def _map_range(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    if values.dtype.name in ("uint8", "uint16"):
        # Looked up: a tenth of the time of computing each.
        levels = np.arange(np.iinfo(values.dtype).max + 1)
        return np.asarray(_to_levels(levels, low, high)[values])
    return _to_levels(values, low, high)


def _to_levels(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    exact = values.astype(np.float64)
    exact[~np.isfinite(exact)] = low
    with np.errstate(over="ignore"):
        levels = (exact - low) / (high - low) * 255
    return np.rint(np.clip(levels, 0, 255)).astype(np.uint8)
