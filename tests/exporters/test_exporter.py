"""What is kept and what is not: a file takes its place only if it answers as the model does."""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from segment_anything.modeling import Sam

from helpers.tiny_checkpoint import SIZE, tiny_sam, write_tiny
from samft.errors import CheckpointError, ExportError
from samft.exporters import exporter, weight_files
from samft.exporters.exporter import export, model_to_write, open_base, open_tuned
from samft.exporters.verification import (
    Difference,
    Prediction,
    VerificationSample,
    bitwise_equal,
    painted_sample,
    predict_boxes,
)
from samft.models.sam import load_sam
from samft.models.weights import PACKAGED_TINY


def export_tiny(output: Path, *, format: str = "pth") -> Difference:
    """Exports the tiny model, with what it answers beforehand."""
    sam = tiny_sam()
    expected = [(painted_sample(), predict_boxes(sam, painted_sample()))]
    return export(sam, output, format=format, metadata={}, expected=expected, opset=17)


def disturbed(sam: Sam, *, by: float) -> Sam:
    """The same model with an offset on the mask token, which moves all logits."""
    with torch.no_grad():
        sam.mask_decoder.mask_tokens.weight += by
    return sam


@pytest.mark.parametrize("format", ["pth", "safetensors"])
def test_a_file_of_weights_is_equal_to_the_bit(format: str, tmp_path) -> None:
    if format == "safetensors":
        pytest.importorskip("safetensors")
    output = tmp_path / "a"
    found = export_tiny(output, format=format)
    assert (found.logits, found.iou_predicted, found.equal_pixels) == (0.0, 0.0, 1.0)
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("existed", [True, False])
def test_a_file_that_answers_otherwise_is_not_kept(existed, tmp_path, monkeypatch) -> None:
    output = tmp_path / "a"
    if existed:
        output.write_text("an earlier export")

    def read_wrongly(*_: Any, **__: Any) -> Callable[[VerificationSample], Prediction]:
        return partial(predict_boxes, disturbed(tiny_sam(), by=0.05))

    monkeypatch.setattr(exporter, "_read_again", read_wrongly)
    with pytest.raises(ExportError, match="was not written: what was read again does not answer"):
        export_tiny(output)
    assert os.listdir(tmp_path) == (["a"] if existed else [])
    assert not existed or output.read_text() == "an earlier export"


def test_one_bit_that_the_disk_changed_is_found(tmp_path, monkeypatch) -> None:
    write = weight_files.save_tensors

    def save_wrongly(path: Path, state: dict[str, torch.Tensor]) -> None:
        state = {name: tensor.clone() for name, tensor in state.items()}
        state["prompt_encoder.not_a_point_embed.weight"].view(torch.int32)[0, 0] ^= 1
        write(path, state)

    monkeypatch.setattr(weight_files, "save_tensors", save_wrongly)
    with pytest.raises(ExportError, match="not those that were written"):
        export_tiny(tmp_path / "a.pth")
    assert os.listdir(tmp_path) == []


def test_a_checkpoint_is_opened_with_what_its_sidecar_says(tmp_path) -> None:
    path = write_tiny(tmp_path)
    tuned = open_tuned(path)
    assert (tuned.model_type, tuned.image_size) == ("vit_tiny", SIZE)
    assert tuned.find_base() == PACKAGED_TINY
    said = tuned.metadata(image_size=1024)
    assert json.loads(said.pop("metrics")) == {"val_per_mask_iou": 0.674}
    sidecar = json.loads(path.with_suffix(".json").read_text())
    assert said.pop("source_sha256") == sidecar["sha256"]
    assert said.pop("samft_version")
    assert said == {
        "model_type": "vit_tiny",
        "image_size": "1024",
        "resize_mode": "pad",
        "step": "30",
    }


@pytest.mark.parametrize("sidecar", [None, "no JSON", "[]", '{"config": 3, "step": null}'])
def test_a_sidecar_that_says_nothing_is_no_error(sidecar: str | None, tmp_path) -> None:
    path = write_tiny(tmp_path)
    path.with_suffix(".json").unlink()
    if sidecar is not None:
        path.with_suffix(".json").write_text(sidecar)
    tuned = open_tuned(path)
    assert tuned.find_base() is None
    assert tuned.metadata(image_size=SIZE)["model_type"] == "vit_tiny"


def test_only_pth_is_brought_to_metas_size_and_only_positions_change(tmp_path) -> None:
    tuned = open_tuned(write_tiny(tmp_path))
    for format in ("safetensors", "onnx", "huggingface"):
        assert model_to_write(tuned, format) is tuned.sam
    sam = model_to_write(tuned, "pth")
    assert sam.image_encoder.img_size == 1024
    old, new = tuned.sam.state_dict(), sam.state_dict()
    changed = {n for n in old if old[n].shape != new[n].shape or not torch.equal(old[n], new[n])}
    assert changed
    assert all("pos_embed" in name or ".rel_pos_" in name for name in changed)


def test_the_base_is_opened_at_the_models_size_and_must_be_of_its_type(tmp_path) -> None:
    base = open_base(PACKAGED_TINY, tiny_sam())
    assert base.image_encoder.img_size == SIZE
    name = "mask_decoder.iou_token.weight"
    assert torch.equal(base.state_dict()[name], load_sam(PACKAGED_TINY).state_dict()[name])
    assert not bitwise_equal(base.state_dict(), tiny_sam().state_dict())
    other = tmp_path / "other.pth"
    state = {**tiny_sam().state_dict(), name: torch.zeros(1, 7)}
    torch.save(state, other)
    with pytest.raises(CheckpointError, match="does not fit"):
        open_base(other, tiny_sam())
