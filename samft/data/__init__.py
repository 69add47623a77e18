"""From a checked COCO index to batches: geometry, targets, augmentation, samplers, loaders."""

import samft.runtime.torchvision_compat  # noqa: F401  (before torchvision is imported)
from samft.data.dataset import Coco2MaskDataset

__all__ = ["Coco2MaskDataset"]
