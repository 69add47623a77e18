"""Lets `import torchvision` finish where its C++ operators do not load. Import this before it.

A torchvision built for CUDA beside a CPU-only torch cannot load its extension. It would go on
without its operators, but on import it registers fakes for two of them, and a fake needs a schema:
"operator torchvision::nms does not exist". Declaring the two schemas lets the import finish. A call
of either operator still fails, and says why; `replace_missing_nms` is for the one caller that samft
needs. torchmetrics and segment_anything import torchvision, so this comes before them as well.
"""

import sys
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

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


def replace_missing_nms(mask_generator: ModuleType) -> None:
    """Lets SAM's automatic mask generator run where torchvision's operators do not load.

    The generator is the one caller of such an operator: `torchvision.ops.boxes.batched_nms`. A
    person who predicts on a CPU often has a CPU-only torch beside a torchvision built for CUDA, so
    refusing would cost them automatic masks; where the operators load, nothing is changed.

    Args:
        mask_generator: The module `segment_anything.automatic_mask_generator`.
    """
    if LIBRARY is not None:
        vars(mask_generator)["batched_nms"] = _batched_nms_of_one_class


def _batched_nms_of_one_class(
    boxes: torch.Tensor, scores: torch.Tensor, idxs: torch.Tensor, iou_threshold: float
) -> torch.Tensor:
    # The signature of `torchvision.ops.boxes.batched_nms`; the generator passes class 0 only.
    assert not idxs.any()
    return non_maximum_suppression(boxes, scores, iou_threshold)


def non_maximum_suppression(
    boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float
) -> torch.Tensor:
    """Drops each box that overlaps a better one which is kept.

    Args:
        boxes: float [K, 4], x0 y0 x1 y1.
        scores: float [K].
        iou_threshold: The largest IoU of two boxes that are both kept.

    Returns:
        int64, indices of the kept boxes, by falling score.

    Source: `torchvision.ops.nms`, which it equals.
    """
    order = torch.argsort(scores, descending=True, stable=True)
    sorted_boxes = boxes[order]
    areas = (sorted_boxes[:, 2:] - sorted_boxes[:, :2]).prod(1)
    alive = torch.ones(len(order), dtype=torch.bool, device=boxes.device)
    for k in range(len(order)):
        if alive[k]:
            low = torch.maximum(sorted_boxes[k, :2], sorted_boxes[k + 1 :, :2])
            high = torch.minimum(sorted_boxes[k, 2:], sorted_boxes[k + 1 :, 2:])
            common = (high - low).clamp(min=0).prod(1)
            alive[k + 1 :] &= ~(common / (areas[k] + areas[k + 1 :] - common) > iou_threshold)
    return order[alive]
