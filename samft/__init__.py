"""samft: fine-tune Segment Anything on a COCO dataset with plain PyTorch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from samft.models.sam import build_sam, load_sam, read_image

__version__ = "0.1.0"
__all__ = ["__version__", "build_sam", "load_sam", "read_image"]


def __getattr__(name: str) -> Any:
    # `python -m samft.train --help` imports this file, and must answer without importing torch.
    if name in ("build_sam", "load_sam", "read_image"):
        from samft.models import sam

        return getattr(sam, name)
    raise AttributeError(f"module 'samft' has no attribute '{name}'")
