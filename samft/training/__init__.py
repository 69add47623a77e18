"""The training loop, its losses and its optimizer. Read `engine.py`, `losses.py`, `optim.py`."""

import samft.runtime.torchvision_compat  # noqa: F401  (before torchvision is imported)
