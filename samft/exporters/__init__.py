"""Writes checkpoints in the formats of other programs, and verifies what was written."""

import samft.runtime.torchvision_compat  # noqa: F401  (before torchvision is imported)
