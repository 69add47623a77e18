"""One raw COCO segmentation checked, or checked and drawn, for tests of the checks of many."""

from typing import Any

import numpy as np

from samft.annotations.mask_checks import RawMasks
from samft.annotations.notation import MaskError
from samft.annotations.segmentation import decode_cropped


def check_segmentation(raw: Any) -> Any:
    """A raw segmentation as `RawMasks` passes it.

    Returns:
        A list of polygon arrays, or an RLE dict with `size` [H, W] and an int64 array `counts`.

    Raises:
        MaskError: It is empty or malformed.
    """
    masks = RawMasks()
    masks.add(raw)
    checked = masks.check()
    if checked.codes[0]:
        raise MaskError(checked.codes[0])
    return checked.segmentations[0]


def decode_segmentation(raw: Any, size: tuple[int, int]) -> np.ndarray:
    """Checks and draws a raw segmentation: uint8 [H, W] of 0 and 1.

    Raises:
        MaskError: It is empty or malformed.
    """
    crop = decode_cropped(check_segmentation(raw), size)
    x0, y0, x1, y1 = crop.extent
    mask = np.zeros(size, dtype=np.uint8)
    mask[y0:y1, x0:x1] = crop.mask
    return mask
