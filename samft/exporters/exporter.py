"""From a checkpoint to a file of another format that has been read again and compared."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from segment_anything.modeling import Sam

import samft
from samft.errors import ExportError
from samft.exporters.huggingface import open_huggingface, write_huggingface
from samft.exporters.onnx import open_onnx, write_onnx
from samft.exporters.verification import (
    Difference,
    Prediction,
    VerificationSample,
    bitwise_equal,
    compare,
    predict_boxes,
)
from samft.exporters.weight_files import (
    META_SIZE,
    read_pth,
    read_safetensors,
    write_pth,
    write_safetensors,
)
from samft.models.sam import build_sam, identify, load_state, open_checkpoint, read_state
from samft.models.weights import find_local_weights
from samft.runtime.files import sha256_of, staging_path


@dataclass(frozen=True)
class Tuned:
    """A checkpoint and what its sidecar says of it.

    Attributes:
        path: The file.
        sam: With its weights, at the image size that it was tuned for, in eval mode.
        model_type: A key of `samft.sam.MODEL_SHAPES`.
        image_size: Side of the model input, px.
        sidecar: What stands beside it, or nothing.
    """

    path: Path
    sam: Sam
    model_type: str
    image_size: int
    sidecar: dict[str, Any] = field(default_factory=dict)

    def metadata(self, *, image_size: int) -> dict[str, str]:
        """What an exported file says of itself, as text.

        Args:
            image_size: Of the model that is written, px.
        """
        found = {
            "model_type": self.model_type,
            "image_size": str(image_size),
            "resize_mode": str(self.sidecar.get("resize_mode", "pad")),
            "source_sha256": sha256_of(self.path),
            "samft_version": samft.__version__,
        }
        if "step" in self.sidecar:
            found["step"] = str(self.sidecar["step"])
        if "metrics" in self.sidecar:
            found["metrics"] = json.dumps(self.sidecar["metrics"])
        return found

    def find_base(self) -> Path | None:
        """The checkpoint that it was tuned from, as far as the sidecar says and it is here."""
        config = self.sidecar.get("config")
        named = config.get("checkpoint_path") if isinstance(config, dict) else None
        return find_local_weights(str(named), self.model_type) if named else None


def open_tuned(path: Path) -> Tuned:
    """Reads a checkpoint, and its sidecar if it has one.

    Raises:
        CheckpointError: It cannot be read or is no SAM.
    """
    sam, model_type, image_size, _ = open_checkpoint(path)
    sidecar = {}
    if path.suffix == ".ckpt":
        try:
            sidecar = json.loads(path.with_suffix(".json").read_text())
        except (OSError, ValueError):
            pass
    return Tuned(path, sam, model_type, image_size, sidecar if isinstance(sidecar, dict) else {})


def model_to_write(tuned: Tuned, format: str) -> Sam:
    """The model that a file of this format holds: at 1024 px for `pth`, else as it was tuned."""
    if format != "pth" or tuned.image_size == META_SIZE:
        return tuned.sam
    sam = build_sam(tuned.model_type, META_SIZE)
    load_state(sam, tuned.sam.state_dict(), source=tuned.path)
    return sam


def open_base(path: Path, sam: Sam) -> Sam:
    """The checkpoint that a model was tuned from, at the model's image size.

    Args:
        path: The checkpoint.
        sam: The model.

    Raises:
        CheckpointError: It cannot be read, or is of another model type.
    """
    base = build_sam(*identify(sam.state_dict()))
    load_state(base, read_state(path), source=path)
    return base


def export(
    sam: Sam,
    output: Path,
    *,
    format: str,
    metadata: Mapping[str, str],
    expected: Sequence[tuple[VerificationSample, Prediction]],
    opset: int,
) -> Difference:
    """Writes a file, reads it again, and puts it in its place if it answers as the model does.

    Args:
        sam: What is written, see `model_to_write`.
        output: Where to; what is there is replaced.
        format: `pth`, `safetensors`, `onnx` or `huggingface`.
        metadata: What the file says of itself, where its format can.
        expected: Pictures, and what `sam` answers in the stock `SamPredictor`.
        opset: Version of ONNX's operators.

    Returns:
        How far the file's answers are from those.

    Raises:
        ExportError: Too far; nothing is left of it, and what was there before is untouched.
        OSError: It cannot be written.
    """
    with staging_path(output) as part:
        _write(sam, part, metadata, format=format, opset=opset)
        answer = _read_again(sam, part, format=format)
        difference = compare([a for _, a in expected], [answer(sample) for sample, _ in expected])
        if not difference.is_small:
            raise ExportError(
                f"{output} was not written: what was read again does not answer as the checkpoint "
                f"does ({difference}). Please report it, with the versions of torch and of the "
                "packages of this format; another version of them may do."
            )
    return difference


def _write(sam: Sam, part: Path, metadata: Mapping[str, str], *, format: str, opset: int) -> None:
    if format == "pth":
        write_pth(sam, part)
    elif format == "safetensors":
        write_safetensors(sam, part, metadata)
    elif format == "onnx":
        write_onnx(sam, part, metadata, opset=opset)
    else:
        write_huggingface(sam, part, metadata)


def _read_again(sam: Sam, part: Path, *, format: str) -> Callable[[VerificationSample], Prediction]:
    if format == "onnx":
        return open_onnx(part)
    if format == "huggingface":
        return open_huggingface(part)
    again = read_pth(part) if format == "pth" else read_safetensors(part)
    if not bitwise_equal(sam.state_dict(), again.state_dict()):
        raise ExportError(
            "the weights that were read again are not those that were written, so nothing is left "
            "of the file: the disk or the memory may be at fault."
        )
    return partial(predict_boxes, again)
