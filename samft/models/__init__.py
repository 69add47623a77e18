"""SAM: built, loaded and frozen; its encoder and decoder made faster, with the same numbers."""

import samft.runtime.torchvision_compat  # noqa: F401  (before torchvision is imported)
