"""The layout of transformers' SamModel: every name and shape, and the same masks."""

import pytest
import torch

from helpers.tiny_checkpoint import tiny_sam
from samft.exporters.huggingface import (
    CONFIG,
    PROCESSOR,
    WEIGHTS,
    model_config,
    open_huggingface,
    processor_config,
    to_huggingface_names,
    write_huggingface,
)
from samft.exporters.verification import compare_predictions, predict_boxes, synthetic_sample
from samft.models.sam import MODEL_SHAPES, build_sam

transformers = pytest.importorskip(
    "transformers", reason="no transformers: pip install '.[huggingface]'"
)
TIED = "prompt_encoder.shared_embedding.positional_embedding"


@pytest.mark.parametrize("model_type", MODEL_SHAPES)
@pytest.mark.parametrize("image_size", [256, 1024])
def test_every_model_type_has_transformers_names_and_shapes(
    model_type: str, image_size: int
) -> None:
    config = transformers.SamConfig.from_dict(model_config(model_type, image_size))
    with torch.device("meta"):
        ours = to_huggingface_names(build_sam(model_type, image_size).state_dict())
        theirs = transformers.SamModel(config).state_dict()
    assert {n: t.shape for n, t in ours.items()} == {
        n: t.shape for n, t in theirs.items() if n != TIED
    }


def test_transformers_model_predicts_the_masks_of_sam_predictor(tmp_path) -> None:
    sam, sample = tiny_sam(), synthetic_sample()
    folder = tmp_path / "tuned"
    write_huggingface(sam, folder, {"step": "30"})
    assert sorted(path.name for path in folder.iterdir()) == sorted([CONFIG, WEIGHTS, PROCESSOR])
    difference = compare_predictions(
        [predict_boxes(sam, sample)], [open_huggingface(folder)(sample)]
    )
    assert difference.logits < 1e-3
    assert difference.iou_predicted < 1e-5
    assert difference.equal_pixels == 1.0


def test_all_weights_are_loaded_and_no_key_is_missing_or_unexpected(tmp_path) -> None:
    folder = tmp_path / "tuned"
    write_huggingface(tiny_sam(), folder, {})
    model, info = transformers.SamModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    loaded = model.state_dict()
    for name, tensor in to_huggingface_names(tiny_sam().state_dict()).items():
        assert torch.equal(loaded[name], tensor), name
    assert torch.equal(loaded[TIED], loaded["shared_image_embedding.positional_embedding"])


def test_the_processor_normalises_as_sam() -> None:
    config = processor_config(256)
    pixel = torch.tensor([10.0, 20.0, 30.0])
    mean, std = torch.tensor(config["image_mean"]), torch.tensor(config["image_std"])
    theirs = (pixel * config["rescale_factor"] - mean) / std
    sam = build_sam("vit_tiny", 64)
    ours = sam.preprocess(pixel[None, :, None, None].expand(1, 3, 64, 64))[0, :, 0, 0]
    torch.testing.assert_close(theirs, ours)
