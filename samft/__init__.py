"""samft: fine-tune Segment Anything on a COCO dataset with plain PyTorch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from samft.models.sam import load_sam

__version__ = "0.1.0"
__all__ = ["__version__", "load_sam"]


def __getattr__(name: str) -> Any:
    # `python -m samft.train --help` imports this file: torch must wait until it is asked for.
    if name == "load_sam":
        from samft.models.sam import load_sam

        return load_sam
    raise AttributeError(f"module 'samft' has no attribute '{name}'")
