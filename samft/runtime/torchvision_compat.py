"""Lets `import torchvision` finish where its C++ operators do not load. Import this before it.

A torchvision built for CUDA beside a CPU-only torch cannot load its extension. It would go on
without its operators, but on import it registers fakes for two of them, and a fake needs a schema:
"operator torchvision::nms does not exist". Declaring the two schemas lets the import finish. samft
calls neither operator; a call still fails, and says why. torchmetrics and segment_anything import
torchvision, so this comes before them as well.
"""

import sys
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def _find_extension() -> Path | None:
    # find_spec on the top-level name finds the package without running any of its code.
    spec = find_spec("torchvision")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for suffix in EXTENSION_SUFFIXES:
            path = Path(folder) / f"_C{suffix}"
            if path.exists():
                return path
    return None


def declare_missing_operators() -> torch.library.Library | None:
    """Declares torchvision's operators if, and only if, its own extension cannot.

    Loading the extension is what `import torchvision` does first; doing it here costs nothing more.

    Returns:
        The library that holds the declarations, which lapse when it is freed; None if there was
        nothing to do.
    """
    if "torchvision" in sys.modules or hasattr(torch.ops.torchvision, "nms"):
        return None
    extension = _find_extension()
    if extension is not None:
        try:
            torch.ops.load_library(extension)
            return None
        except (ImportError, OSError):
            pass
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    return library


LIBRARY = declare_missing_operators()
