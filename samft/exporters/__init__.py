"""A checkpoint written for other programs, read again, and compared with PyTorch."""

import samft.runtime.torchvision_compat  # noqa: F401  (before torchvision is imported)
