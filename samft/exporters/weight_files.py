"""Weights in one file: Meta's flat `.pth`, which the stock registry reads, and safetensors."""

from collections.abc import Mapping
from pathlib import Path

from segment_anything import sam_model_registry
from segment_anything.modeling import Sam
from torch import Tensor

from samft.checkpoints.top_k import save_tensors
from samft.models.sam import build_sam, identify, load_sam, load_state

META_SIZE = 1024  # the only image size that the stock registry builds


def write_pth(sam: Sam, path: Path) -> None:
    """Writes SAM's own keys and nothing else, as Meta publishes them.

    Args:
        sam: At image size 1024, or the stock registry cannot read it.
        path: The file.

    Raises:
        OSError: The disk is full or the folder cannot be written.
    """
    save_tensors(path, sam.state_dict())


def read_pth(path: Path) -> Sam:
    """Reads such a file as everyone else does: by the stock registry, where it knows the type."""
    sam = load_sam(path)
    model_type, _ = identify(sam.state_dict())
    if model_type in sam_model_registry:
        sam = sam_model_registry[model_type](checkpoint=path)
    return sam.eval()


def write_safetensors(sam: Sam, path: Path, metadata: Mapping[str, str]) -> None:
    """Writes SAM's own keys at the model's own image size.

    Args:
        sam: The model.
        path: The file.
        metadata: What else is to be known, as text.

    Raises:
        OSError: The disk is full or the folder cannot be written.
    """
    save_safetensors(sam.state_dict(), path, metadata)


def save_safetensors(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Writes tensors and text to a safetensors file.

    Raises:
        OSError: The disk is full or the folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    try:
        save_file(tensors, path, metadata={"format": "pt", **metadata})
    except SafetensorError as error:  # what it makes of a full disk
        raise OSError(str(error)) from error


def read_safetensors(path: Path) -> Sam:
    """Reads such a file into a model built for it."""
    from safetensors.torch import load_file

    state = load_file(path)
    sam = build_sam(*identify(state, source=path))
    load_state(sam, state, source=path)
    return sam
