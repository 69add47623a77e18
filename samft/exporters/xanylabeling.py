"""Writes what X-AnyLabeling and AnyLabeling load: two ONNX files, and the YAML that names them.

What these programs feed is read from their source: CVHub520/X-AnyLabeling,
`anylabeling/services/auto_labeling/segment_anything.py` and `sam_onnx.py`. They fit each picture
into 1024 x 684 px, and add a point that is none to every prompt.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor

from samft.exporters.onnx import (
    BOTTOM_RIGHT,
    PADDING,
    TOP_LEFT,
    Decoder,
    Encoder,
    decoder_inputs,
    export_traced,
    save_metadata,
)
from samft.exporters.verification import PredictFunction, Prediction, VerificationSample
from samft.runtime.files import write_text

ENCODER, DECODER, CONFIG = "*.encoder.onnx", "*.decoder.onnx", "*.yaml"
# As in the YAML files of X-AnyLabeling's own SAM models.
_SIZES = {"input_size": 1024, "max_width": 1024, "max_height": 682}


class _PixelsEncoder(Encoder):
    """`Encoder` for pixels as they lie in memory."""

    def forward(self, image: Tensor) -> Tensor:
        """Float32 [H, W, 3], RGB in 0..255 -> [1, C, S/16, S/16]."""
        return super().forward(image.permute(2, 0, 1)[None])


class _PromptDecoder(Decoder):
    """`Decoder` of one prompt, without the point that is none where the prompt has a box.

    `SamPredictor` adds that point to prompts of points only, and so does training.
    """

    def _embed_points(self, point_coords: Tensor, point_labels: Tensor) -> Tensor:
        has_box = (point_labels == TOP_LEFT).any()
        kept = ((point_labels[0] != PADDING) | ~has_box).nonzero()[:, 0]
        embedded: Tensor = super()._embed_points(point_coords[:, kept], point_labels[:, kept])
        return embedded


def write_xanylabeling(sam: Sam, folder: Path, metadata: Mapping[str, str], *, opset: int) -> None:
    """Writes the three files, with names that no other checkpoint's files have.

    X-AnyLabeling looks for the ONNX files where it was started before it looks beside the YAML.

    Args:
        sam: At 1024 px, in eval mode.
        folder: Where to write them; created here.
        metadata: Of `TunedCheckpoint.metadata`; stored in both ONNX files.
        opset: ONNX operator set version.

    Raises:
        OSError: The disk is full or the folder cannot be written.
    """
    folder.mkdir()
    model_type = metadata["model_type"]
    name = f"sam_{model_type}_{metadata['source_sha256'][:6]}"
    encoder, decoder, config = (
        folder / pattern.replace("*", name) for pattern in (ENCODER, DECODER, CONFIG)
    )
    image = {"input_image": torch.zeros(684, 1024, 3)}
    axes = {"input_image": {0: "height", 1: "width"}}
    outputs = ["image_embeddings"]
    export_traced(_PixelsEncoder(sam), encoder, image, outputs, axes, opset=opset)
    axes = {label: {1: "num_points"} for label in ("point_coords", "point_labels")}
    outputs = ["masks", "iou_predictions", "low_res_masks"]
    single = _PromptDecoder(sam, return_single_mask=True)
    export_traced(single, decoder, decoder_inputs(sam, num_prompts=1), outputs, axes, opset=opset)
    save_metadata(encoder, metadata)
    save_metadata(decoder, metadata)
    step = f", step {metadata['step']}" if "step" in metadata else ""
    settings = {
        "type": "segment_anything",
        "name": name,
        "provider": "samft",
        "display_name": f"Tuned SAM ({model_type}{step}, {name[-6:]})",
        "encoder_model_path": encoder.name,
        "decoder_model_path": decoder.name,
        **_SIZES,
    }
    write_text(config, OmegaConf.to_yaml(OmegaConf.create(settings)))


def open_xanylabeling(folder: Path) -> PredictFunction:
    """Opens both ONNX files in onnxruntime.

    Args:
        folder: Holds the files.

    Returns:
        A function from a sample to its prediction, which feeds one box at a time, with a point that
        is none.
    """
    import onnxruntime

    paths = [next(folder.glob(pattern)) for pattern in (ENCODER, DECODER)]
    encoder, decoder = (
        onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        for path in paths
    )
    return lambda sample: _predict_sample(encoder, decoder, sample)


def _predict_sample(encoder: Any, decoder: Any, sample: VerificationSample) -> Prediction:
    low = next(one.shape[-1] for one in decoder.get_inputs() if one.name == "mask_input")
    resize, size = ResizeLongestSide(4 * low), sample.image.shape[:2]
    pixels = resize.apply_image(sample.image).astype(np.float32)
    (embedding,) = encoder.run(None, {"input_image": pixels})
    masks, scores = [], []
    for corners in resize.apply_boxes(sample.boxes, size).reshape(-1, 2, 2):
        points = np.concatenate([corners, [[0, 0]]])[None].astype(np.float32)
        mask, score, _ = decoder.run(
            None,
            {
                "image_embeddings": embedding,
                "point_coords": points,
                "point_labels": np.array([[TOP_LEFT, BOTTOM_RIGHT, PADDING]], np.float32),
                "mask_input": np.zeros((1, 1, low, low), np.float32),
                "has_mask_input": np.zeros(1, np.float32),
                "orig_im_size": np.array(size, np.float32),
            },
        )
        masks.append(mask[:, 0])
        scores.append(score[:, 0])
    return Prediction(np.concatenate(masks), np.concatenate(scores))
