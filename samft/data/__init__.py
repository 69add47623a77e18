"""From a checked COCO index to batches: geometry, targets, augmentation, samplers, loaders."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "Coco2MaskDataset":  # on demand: modules of this room without torch must stay so
        from samft.data.data import Coco2MaskDataset

        return Coco2MaskDataset
    raise AttributeError(name)
