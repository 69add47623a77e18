"""A tuned tiny checkpoint at a small image size, with a sidecar, as a run writes it."""

import json
from pathlib import Path
from typing import Any

import torch
from segment_anything.modeling import Sam

from samft.checkpoints.top_k import save_tensors
from samft.models.sam import build_sam, load_state, read_state
from samft.runtime.files import sha256_of
from samft.weights.download import PACKAGED_TINY

SIZE = 64


def tiny_sam(*, image_size: int = SIZE, seed: int = 1) -> Sam:
    """The packaged model with every weight changed a little, so that it equals no packaged file."""
    sam = build_sam("vit_tiny", image_size)
    load_state(sam, read_state(PACKAGED_TINY))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sam.parameters():
            parameter += (
                0.02
                * parameter.std(unbiased=False)
                * torch.randn(parameter.shape, generator=generator)
            )
    return sam


def mask_finding_sam(*, iou_predicted: float = 1.0, steepness: float = 50.0) -> Sam:
    """Gives points the mask that boxes get, with steep edges and a fixed predicted IoU."""
    sam = tiny_sam()
    decoder = sam.mask_decoder
    state = decoder.output_hypernetworks_mlps[0].state_dict()
    with torch.no_grad():
        decoder.mask_tokens.weight[1:] = decoder.mask_tokens.weight[0]
        for network in decoder.output_hypernetworks_mlps:
            network.load_state_dict(state)
            network.layers[-1].weight *= steepness
            network.layers[-1].bias *= steepness
        decoder.iou_prediction_head.layers[-1].weight.zero_()
        decoder.iou_prediction_head.layers[-1].bias.fill_(iou_predicted)
    return sam


def write_tiny(folder: Path, *, sam: Sam | None = None, **sidecar: Any) -> Path:
    """Writes `30-0.67.ckpt` and its sidecar."""
    path = folder / "30-0.67.ckpt"
    sam = sam or tiny_sam()
    save_tensors(path, sam.state_dict())
    content = {
        "model_type": "vit_tiny",
        "image_size": sam.image_encoder.img_size,
        "resize_mode": "pad",
        "step": 30,
        "metrics": {"val_per_mask_iou": 0.674},
        "config": {"checkpoint_path": "auto", "model_type": "vit_tiny"},
        "sha256": sha256_of(path),
        **sidecar,
    }
    path.with_suffix(".json").write_text(json.dumps(content))
    return path
