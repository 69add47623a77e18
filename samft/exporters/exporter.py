"""Exports a checkpoint: writes the format, loads it again, and compares the predictions."""

import json
from collections.abc import Mapping, Sequence
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
    PredictFunction,
    Prediction,
    VerificationSample,
    bitwise_equal,
    compare_predictions,
    predict_boxes,
)
from samft.exporters.weight_files import (
    META_SIZE,
    read_pth,
    write_pth,
    write_safetensors,
)
from samft.exporters.xanylabeling import open_xanylabeling, write_xanylabeling
from samft.images.pixels import PLAIN, PixelFormat
from samft.models.lora import apply_adapter, read_adapter
from samft.models.sam import (
    build_sam,
    identify_model,
    load_state,
    open_checkpoint,
    read_state,
)
from samft.runtime.checkpoint_paths import find_weights_file
from samft.runtime.files import read_json, sha256_of, staging_path
from samft.views.windows import WHOLE, View
from samft.weights.download import find_local_weights
from samft.weights.saved_settings import (
    saved_config,
    saved_pixels,
    saved_resize_mode,
    saved_training,
    saved_view,
)

AT_META_SIZE = ("pth", "xanylabeling")  # formats whose readers know no other image size


@dataclass(frozen=True)
class TunedCheckpoint:
    """A fine-tuned checkpoint with its sidecar.

    Attributes:
        path: The file.
        sam: With its weights, at the image size that it was trained at, in eval mode.
        model_type: A key of `MODEL_SHAPES`.
        image_size: Side of the model input, px.
        sidecar: Content of the sidecar, or what the file records of itself; empty if nothing does.
        pixels: How values of images became 8 bits in training.
        adapter: The adapter file that was merged into it, which then records the training.
    """

    path: Path
    sam: Sam
    model_type: str
    image_size: int
    sidecar: dict[str, Any] = field(default_factory=dict)
    pixels: PixelFormat = PLAIN
    adapter: Path | None = None

    @property
    def record(self) -> Path:
        """The file whose sidecar or header records the training."""
        return self.adapter or self.path

    @property
    def view(self) -> View:
        """How images were seen in training."""
        return saved_view(self.record) or WHOLE

    def metadata(self, *, image_size: int) -> dict[str, str]:
        """The metadata of an exported file.

        Args:
            image_size: Of the exported model, px.
        """
        metadata = {
            "model_type": self.model_type,
            "image_size": str(image_size),
            "resize_mode": str(self.sidecar.get("resize_mode", "pad")),
            "source_sha256": sha256_of(find_weights_file(self.path)),
            "samft_version": samft.__version__,
            "pixels": json.dumps(self.pixels.to_json()),
        }
        if self.view.has_windows:
            metadata["view"] = json.dumps(self.view.to_json())
        if "step" in self.sidecar:
            metadata["step"] = str(self.sidecar["step"])
        if "metrics" in self.sidecar:
            metadata["metrics"] = json.dumps(self.sidecar["metrics"])
        config = self.sidecar.get("config")
        if isinstance(config, dict):
            names = ("prompts", "correction_rounds", "multimask")
            metadata |= {name: str(config[name]) for name in names if config.get(name) is not None}
        return metadata

    def find_base(self) -> Path | None:
        """The checkpoint that training started from, if it is known and here."""
        if self.adapter is not None:
            return self.path
        config = self.sidecar.get("config")
        source = config.get("checkpoint_path") if isinstance(config, dict) else None
        return find_local_weights(str(source), self.model_type) if source else None


def open_tuned_checkpoint(path: Path, *, adapter: Path | None = None) -> TunedCheckpoint:
    """Reads a checkpoint, and its sidecar if it has a readable one.

    Args:
        path: The checkpoint.
        adapter: An adapter file to merge into it, which was trained on it.

    Raises:
        CheckpointError: The checkpoint cannot be read or is no SAM, or the adapter does not fit.
    """
    sam, model_type, _, _ = open_checkpoint(path)  # of a rectangle, too, the square
    record, sidecar = path, _read_sidecar(path)
    if adapter is not None:
        record, sidecar = adapter, {}
        sam = _merge_adapter(sam, adapter, base=path)
    sidecar = {"resize_mode": saved_resize_mode(record), **saved_training(record), **sidecar}
    pixels, side = saved_pixels(record) or PLAIN, sam.image_encoder.img_size
    return TunedCheckpoint(path, sam, model_type, side, sidecar, pixels, adapter)


def _read_sidecar(path: Path) -> dict[str, Any]:
    sidecar: Any = {}
    if path.suffix == ".ckpt":
        try:
            sidecar = read_json(path.with_suffix(".json"))
        except (OSError, ValueError):
            pass
    return sidecar if isinstance(sidecar, dict) else {}


def _merge_adapter(sam: Sam, adapter: Path, *, base: Path) -> Sam:
    # The base's model with the adapter, at the image size that the adapter was trained at.
    tensors, settings = read_adapter(adapter, base=find_weights_file(base))
    recorded, (model_type, side) = saved_config(adapter) or {}, identify_model(sam.state_dict())
    merged = build_sam(model_type, int(recorded.get("image_size", side)))
    load_state(merged, sam.state_dict(), source=base)
    load_state(merged, apply_adapter(merged.state_dict(), tensors, settings), source=adapter)
    return merged.eval()


def model_to_write(tuned: TunedCheckpoint, format: str) -> Sam:
    """The model that a file of this format holds: at 1024 px for some, else as it was trained."""
    if format not in AT_META_SIZE or tuned.image_size == META_SIZE:
        return tuned.sam
    sam = build_sam(tuned.model_type, META_SIZE)
    load_state(sam, tuned.sam.state_dict(), source=tuned.path)
    return sam


def load_base(path: Path, sam: Sam) -> Sam:
    """Loads the checkpoint that training started from, at the image size of the tuned model.

    Args:
        path: The checkpoint.
        sam: The tuned model.

    Raises:
        CheckpointError: The checkpoint cannot be read, or is of another model type.
    """
    base = build_sam(*identify_model(sam.state_dict()))
    load_state(base, read_state(path), source=path)
    return base


def export_model(
    sam: Sam,
    output: Path,
    *,
    format: str,
    metadata: Mapping[str, str],
    expected: Sequence[tuple[VerificationSample, Prediction]],
    opset: int,
) -> Difference:
    """Writes a model, loads it again, and keeps the file only if its predictions are the model's.

    Args:
        sam: The model, see `model_to_write`.
        output: The file or folder to write; an existing one is replaced.
        format: `pth`, `safetensors`, `onnx`, `xanylabeling` or `huggingface`.
        metadata: Stored in the file, except in `pth`.
        expected: Samples, and the predictions of `sam` for them.
        opset: ONNX operator set version.

    Returns:
        The difference between the predictions of the file and the expected ones.

    Raises:
        ExportError: The difference is too large; nothing is written, an existing output is kept.
        OSError: The output cannot be written.
    """
    with staging_path(output) as part:
        _write_format(sam, part, metadata, format=format, opset=opset)
        predict = _load_written(sam, part, format=format)
        difference = compare_predictions(
            [prediction for _, prediction in expected],
            [predict(sample) for sample, _ in expected],
        )
        if not difference.is_small:
            raise ExportError(
                f"{output} was not written: loaded again, it does not predict the masks of the "
                f"checkpoint ({difference}). Please report this with the versions of torch and of "
                "the packages of this format; another version of them may work."
            )
    return difference


def _write_format(
    sam: Sam, part: Path, metadata: Mapping[str, str], *, format: str, opset: int
) -> None:
    if format == "pth":
        write_pth(sam, part)
    elif format == "safetensors":
        write_safetensors(sam, part, metadata)
    elif format == "onnx":
        write_onnx(sam, part, metadata, opset=opset)
    elif format == "xanylabeling":
        write_xanylabeling(sam, part, metadata, opset=opset)
    else:
        write_huggingface(sam, part, metadata)


def _load_written(sam: Sam, part: Path, *, format: str) -> PredictFunction:
    if format == "onnx":
        return open_onnx(part)
    if format == "xanylabeling":
        return open_xanylabeling(part)
    if format == "huggingface":
        return open_huggingface(part)
    loaded = read_pth(part) if format == "pth" else open_checkpoint(part).sam
    if not bitwise_equal(sam.state_dict(), loaded.state_dict()):
        raise ExportError(
            "the weights read back differ from those that were written, so the file was removed: "
            "the disk or the memory may be faulty."
        )
    return partial(predict_boxes, loaded)
