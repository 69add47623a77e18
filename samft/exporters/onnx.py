"""Writes SAM as two ONNX files: image encoder with preprocessing, and prompt and mask decoder.

Both are traced by PyTorch's TorchScript exporter (`dynamo=False`), which needs only `onnx`. The
newer exporter also needs `onnxscript`, and it refuses `SamOnnxModel`, whose crop depends on data.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from segment_anything.modeling import Sam
from segment_anything.utils.onnx import SamOnnxModel
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor, nn
from torch.nn import functional as F

from samft.exporters.verification import PredictFunction, Prediction, VerificationSample

ENCODER, DECODER = "encoder.onnx", "decoder.onnx"
OPSET = 17
TOP_LEFT, BOTTOM_RIGHT, PADDING = 2, 3, -1  # point labels: a box's corners, no point


class Encoder(nn.Module):
    """Image embedding of RGB pixels whose longer side is the model's image size."""

    def __init__(self, sam: Sam) -> None:
        """Takes the model in eval mode."""
        super().__init__()
        self.sam, self.side = sam, sam.image_encoder.img_size

    def forward(self, image: Tensor) -> Tensor:
        """Float32 [1, 3, H, W] in 0..255 -> [1, C, S/16, S/16]."""
        padded = self.sam.preprocess(image).reshape(1, 3, self.side, self.side)
        embedding: Tensor = self.sam.image_encoder(padded)
        return embedding


class Decoder(SamOnnxModel):
    """`SamOnnxModel`, except that tracing does not fix the size of the image."""

    def mask_postprocessing(self, masks: Tensor, orig_im_size: Tensor) -> Tensor:
        """The inherited one crops by `int(...)` in release 1.0: in a trace, that is a constant."""
        side = (self.img_size, self.img_size)
        masks = F.interpolate(masks, size=side, mode="bilinear", align_corners=False)
        height, width = self.resize_longest_image_size(orig_im_size, self.img_size)
        inside = masks[..., :height, :width]
        size: Any = tuple(orig_im_size.to(torch.int64))  # tensors stay variable in a trace
        return F.interpolate(inside, size=size, mode="bilinear", align_corners=False)


def write_onnx(sam: Sam, folder: Path, metadata: Mapping[str, str], *, opset: int = OPSET) -> None:
    """Writes both files.

    The encoder maps `image`, float32 [1, 3, H, W], RGB in 0..255, resized so that the longer of H
    and W is the model's image size, to `image_embeddings`. The decoder has the inputs and outputs
    of Meta's ONNX export, with all four masks; index 0 is the mask for a box.

    Args:
        sam: In eval mode.
        folder: Where to write them; created here.
        metadata: Stored in both files.
        opset: ONNX operator set version.

    Raises:
        OSError: The disk is full or the folder cannot be written.
    """
    folder.mkdir()
    side = sam.image_encoder.img_size
    image = {"image": torch.zeros(1, 3, side, side // 2)}
    axes = {"image": {2: "height", 3: "width"}}
    export_traced(Encoder(sam), folder / ENCODER, image, ["image_embeddings"], axes, opset=opset)
    axes = {name: {0: "num_prompts", 1: "num_points"} for name in ("point_coords", "point_labels")}
    outputs = ["masks", "iou_predictions", "low_res_masks"]
    decoder, prompts = Decoder(sam, return_single_mask=False), decoder_inputs(sam, num_prompts=2)
    export_traced(decoder, folder / DECODER, prompts, outputs, axes, opset=opset)
    for name in (ENCODER, DECODER):
        save_metadata(folder / name, metadata)


def decoder_inputs(sam: Sam, *, num_prompts: int) -> dict[str, Tensor]:
    """Inputs to trace a decoder with, by name; each prompt has three points."""
    side, grid = sam.image_encoder.img_size, sam.prompt_encoder.image_embedding_size
    return {
        "image_embeddings": torch.zeros(1, sam.prompt_encoder.embed_dim, *grid),
        "point_coords": torch.zeros(num_prompts, 3, 2),
        "point_labels": torch.zeros(num_prompts, 3),
        "mask_input": torch.zeros(1, 1, *sam.prompt_encoder.mask_input_size),
        "has_mask_input": torch.zeros(1),
        "orig_im_size": torch.tensor([float(side), float(side)]),
    }


def save_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Stores text in an ONNX file."""
    import onnx  # an extra, and its import takes half a second

    model = onnx.load(path, load_external_data=False)
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.save(model, path)


def export_traced(
    module: nn.Module,
    path: Path,
    inputs: Mapping[str, Tensor],
    outputs: list[str],
    axes: Mapping[str, Mapping[int, str]],
    *,
    opset: int,
) -> None:
    """Traces a module and writes it as ONNX.

    Args:
        module: In eval mode.
        path: The file.
        inputs: Examples by name, in the order of the module's arguments.
        outputs: Their names.
        axes: Which axes of which inputs may have any length, and the names of these.
        opset: ONNX operator set version.
    """
    with torch.no_grad(), warnings.catch_warnings():
        # Warnings: this exporter is the older one; sizes that never change became constants.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            str(path),
            dynamo=False,
            opset_version=opset,
            input_names=list(inputs),
            output_names=outputs,
            dynamic_axes=axes,
        )


def open_onnx(folder: Path) -> PredictFunction:
    """Opens both files in onnxruntime.

    Args:
        folder: Holds both files.

    Returns:
        A function from a sample to its prediction; it gives all boxes to the decoder in one call.
    """
    import onnxruntime

    encoder, decoder = (
        onnxruntime.InferenceSession(str(folder / name), providers=["CPUExecutionProvider"])
        for name in (ENCODER, DECODER)
    )
    return lambda sample: _predict_sample(encoder, decoder, sample)


def _predict_sample(encoder: Any, decoder: Any, sample: VerificationSample) -> Prediction:
    low = next(i.shape[-2:] for i in decoder.get_inputs() if i.name == "mask_input")
    resize = ResizeLongestSide(4 * low[0])
    pixels = resize.apply_image(sample.image).astype(np.float32).transpose(2, 0, 1)[None]
    size = sample.image.shape[:2]
    corners = resize.apply_boxes(sample.boxes, size).reshape(-1, 2, 2)
    (embedding,) = encoder.run(None, {"image": pixels})
    masks, iou, _ = decoder.run(
        None,
        {
            "image_embeddings": embedding,
            "point_coords": corners.astype(np.float32),
            "point_labels": np.full(corners.shape[:2], [TOP_LEFT, BOTTOM_RIGHT], np.float32),
            "mask_input": np.zeros((1, 1, *low), np.float32),
            "has_mask_input": np.zeros(1, np.float32),
            "orig_im_size": np.array(size, np.float32),
        },
    )
    return Prediction(masks[:, 0], iou[:, 0])
