"""Every mask of a split predicted and scored: validation, metrics, COCO AP, tables."""

import samft.runtime.torchvision_compat  # noqa: F401  (before torchvision is imported)
