"""Studies and the making of the packaged weights; `samft` never imports from here."""

import samft.runtime.torchvision_compat  # noqa: F401  (before torchvision is imported)
