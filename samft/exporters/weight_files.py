"""Writes and reads weights as one file: Meta's flat `.pth`, and safetensors."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from segment_anything import sam_model_registry
from segment_anything.modeling import Sam
from torch import Tensor

from samft.checkpoints.top_k import save_tensors
from samft.models.sam import identify_model, load_sam

META_SIZE = 1024  # px, the only image size that sam_model_registry builds


def write_pth(sam: Sam, path: Path) -> None:
    """Writes SAM's own keys and nothing else, as Meta publishes them.

    Args:
        sam: At image size 1024; `sam_model_registry` can read no other.
        path: The file.

    Raises:
        OSError: The disk is full or the folder cannot be written.
    """
    save_tensors(path, sam.state_dict())


def read_pth(path: Path) -> Sam:
    """Reads such a file with `sam_model_registry` if it knows the model type, else with samft."""
    sam = load_sam(path)
    model_type, _ = identify_model(sam.state_dict())
    if model_type in sam_model_registry:
        sam = sam_model_registry[model_type](checkpoint=path)
    return sam.eval()


def write_safetensors(sam: Sam, path: Path, metadata: Mapping[str, str]) -> None:
    """Writes SAM's own keys at the model's own image size.

    Args:
        sam: The model.
        path: The file.
        metadata: Stored in the file's header.

    Raises:
        OSError: The disk is full or the folder cannot be written.
    """
    save_safetensors(sam.state_dict(), path, metadata)


def save_safetensors(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Writes tensors and text to a safetensors file.

    Raises:
        OSError: The disk is full or the folder cannot be written.
    """
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    try:
        save_file(tensors, path, metadata={"format": "pt", **metadata})
    except SafetensorError as error:  # raised for a full disk too
        raise OSError(str(error)) from error
