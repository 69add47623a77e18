"""samft: fine-tune Segment Anything on a COCO dataset with plain PyTorch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from samft.api import FinetuneResult, finetune
    from samft.config import TrainConfig
    from samft.models.sam import build_sam, load_sam, read_image
    from samft.prediction.window_predictor import load_predictor

__version__ = "0.1.0"
_MODULE_OF = {
    "FinetuneResult": "samft.api",
    "TrainConfig": "samft.config",
    "build_sam": "samft.models.sam",
    "finetune": "samft.api",
    "load_predictor": "samft.prediction.window_predictor",
    "load_sam": "samft.models.sam",
    "read_image": "samft.models.sam",
}
__all__ = [
    "FinetuneResult",
    "TrainConfig",
    "__version__",
    "build_sam",
    "finetune",
    "load_predictor",
    "load_sam",
    "read_image",
]


def __getattr__(name: str) -> Any:
    # `python -m samft.train --help` imports this file, and must answer without importing torch.
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module 'samft' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})  # for completion in notebooks
