"""Masks that are hard to write down: with holes, in parts, touching at corners, of one pixel."""

import numpy as np

from samft.annotations.segmentation import CroppedMask


def awkward_masks(size: tuple[int, int], *, seed: int = 0) -> list[CroppedMask]:
    """Masks inside of an image of H, W, at least 12 x 12 px; the last ones are of noise."""
    ring = np.ones((5, 6), bool)
    ring[2, 2:4] = False
    nested = np.zeros((9, 9), bool)
    nested[:] = True
    nested[1:8, 1:8] = False
    nested[3:6, 3:6] = True
    parts = np.zeros((4, 11), bool)
    parts[:2, :3] = parts[2:, 8:] = True
    masks = [
        CroppedMask(0, 0, np.ones((1, 1), bool)),
        CroppedMask(size[0] - 1, size[1] - 1, np.ones((1, 1), bool)),
        CroppedMask(3, 2, ring),
        CroppedMask(1, 2, nested),
        CroppedMask(0, 1, parts),
        CroppedMask(5, 5, np.eye(4, dtype=bool)),
        CroppedMask(0, 0, np.ones(size, bool)),
    ]
    generator = np.random.default_rng(seed)
    for share in (0.2, 0.5, 0.9):
        noise = generator.random((10, 11)) < share
        masks.append(CroppedMask(2, 1, noise))
    return masks


def whole_mask(mask: CroppedMask, size: tuple[int, int]) -> np.ndarray:
    """The mask of the whole image, bool [H, W]."""
    whole = np.zeros(size, bool)
    x0, y0, x1, y1 = mask.extent
    whole[y0:y1, x0:x1] = mask.mask
    return whole
