"""How an image, or a window of it, fits into the model's input: H x W px, a square or not.

Imports no torch.
"""

import numpy as np
from numpy.typing import NDArray

from samft.cli import name_image_size

_MUCH_SMALLER = 0.95  # of the scale in a square; rounding to whole cells of 16 px takes less

Size = tuple[int, int]  # H, W, px


def fit_scales(
    original_size: Size, frame_size: Size, *, resize_mode: str, zoom: float = 1.0
) -> tuple[float, float]:
    """Input pixels per original pixel, down and across, before sides are rounded.

    Args:
        original_size: H, W of the image, original px.
        frame_size: H, W of the model's input.
        resize_mode: `pad`: the same for both, so that the image just fits; `squash`: it fills the
            input.
        zoom: Scales to this times the input instead.
    """
    (height, width), (frame_height, frame_width) = original_size, frame_size
    down, across = frame_height * zoom / height, frame_width * zoom / width
    if resize_mode == "squash":
        return down, across
    return min(down, across), min(down, across)


def fit_size(
    original_size: Size, frame_size: Size, *, resize_mode: str = "pad", zoom: float = 1.0
) -> Size:
    """H, W of an image in the model's input, px; see `fit_scales`.

    Source: `pad` is, for a square, `ResizeLongestSide.get_preprocess_shape` of segment_anything.

    Example:
        >>> fit_size((480, 640), (1024, 1024)), fit_size((640, 480), (768, 1024))
        ((768, 1024), (768, 576))
    """
    down, across = fit_scales(original_size, frame_size, resize_mode=resize_mode, zoom=zoom)
    height, width = original_size
    return max(1, int(height * down + 0.5)), max(1, int(width * across + 0.5))


def describe_misfits(sizes: NDArray[np.integer], frame_size: Size) -> str | None:
    """How many images a rectangle shows smaller than the square of its longer side would.

    Args:
        sizes: [n, 2], H, W of the images, px.
        frame_size: H, W of the model's input.

    Returns:
        A phrase; None where there are none, as in a square.
    """
    longer = max(frame_size)
    full = np.maximum(sizes, 1)
    shares = (np.array(frame_size) / full).min(axis=1) / (longer / full.max(axis=1))
    smaller = shares[shares < _MUCH_SMALLER]
    if not len(smaller):
        return None
    return (
        f"{len(smaller):,} of {len(sizes):,} images ({len(smaller) / len(sizes):.1%}) are of "
        f"another shape than image_size {name_image_size(frame_size)}, which shows them smaller "
        f"than {longer} would, down to {smaller.min():.0%} of the size"
    )
