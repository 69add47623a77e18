"""An export is kept only if its predictions equal the model's; what a sidecar adds."""

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from segment_anything.modeling import Sam

from helpers.tiny_checkpoint import SIZE, tiny_sam, write_tiny
from samft.checkpoints.top_k import TopK, make_sidecar
from samft.config import TrainConfig
from samft.errors import CheckpointError, ExportError
from samft.exporters import exporter, weight_files
from samft.exporters.exporter import (
    export_model,
    load_base,
    model_to_write,
    open_tuned_checkpoint,
)
from samft.exporters.verification import (
    Difference,
    PredictFunction,
    bitwise_equal,
    predict_boxes,
    synthetic_sample,
)
from samft.images.pixels import PixelFormat
from samft.models.lora import (
    AdapterSettings,
    adapter_state,
    adapter_tensors,
    add_adapters,
    merged_state,
)
from samft.models.sam import build_sam, load_sam, load_state
from samft.models.trainable import constant_names, freeze
from samft.runtime.files import sha256_of
from samft.views.windows import WHOLE, View
from samft.weights.download import PACKAGED_TINY
from samft.weights.saved_settings import (
    SavedPrompts,
    saved_pixels,
    saved_prompts,
    saved_rectangle,
    saved_resize_mode,
    saved_view,
)

TILES = View("tiles", tile_size=48, tile_overlap=0.5)
DEEP = PixelFormat(ranges=(("uint16", 5.0, 900.0),))


def export_tiny(output: Path, *, format: str = "pth") -> Difference:
    """Exports the tiny model, compared with its own predictions."""
    sam = tiny_sam()
    expected = [(synthetic_sample(), predict_boxes(sam, synthetic_sample()))]
    return export_model(sam, output, format=format, metadata={}, expected=expected, opset=17)


def with_offset(sam: Sam, *, by: float) -> Sam:
    """The same model with an offset on the mask token, which moves all logits."""
    with torch.no_grad():
        sam.mask_decoder.mask_tokens.weight += by
    return sam


@pytest.mark.parametrize("format", ["pth", "safetensors"])
def test_weight_files_are_bitwise_equal(format: str, tmp_path) -> None:
    if format == "safetensors":
        pytest.importorskip("safetensors")
    output = tmp_path / "a"
    difference = export_tiny(output, format=format)
    assert (difference.logits, difference.iou_predicted, difference.equal_pixels) == (0.0, 0.0, 1.0)
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("existed", [True, False])
def test_an_export_with_other_predictions_is_not_kept(existed, tmp_path, monkeypatch) -> None:
    output = tmp_path / "a"
    if existed:
        output.write_text("an earlier export")

    def load_another_model(*_: Any, **__: Any) -> PredictFunction:
        return partial(predict_boxes, with_offset(tiny_sam(), by=0.05))

    monkeypatch.setattr(exporter, "_load_written", load_another_model)
    with pytest.raises(
        ExportError, match="was not written: loaded again, it does not predict the masks"
    ):
        export_tiny(output)
    assert os.listdir(tmp_path) == (["a"] if existed else [])
    assert not existed or output.read_text() == "an earlier export"


def test_one_flipped_bit_is_detected(tmp_path, monkeypatch) -> None:
    write = weight_files.save_tensors

    def save_with_flipped_bit(path: Path, state: dict[str, torch.Tensor]) -> None:
        state = {name: tensor.clone() for name, tensor in state.items()}
        state["prompt_encoder.not_a_point_embed.weight"].view(torch.int32)[0, 0] ^= 1
        write(path, state)

    monkeypatch.setattr(weight_files, "save_tensors", save_with_flipped_bit)
    with pytest.raises(ExportError, match="differ from those that were written"):
        export_tiny(tmp_path / "a.pth")
    assert os.listdir(tmp_path) == []


def test_a_checkpoint_is_opened_with_its_sidecar(tmp_path) -> None:
    path = write_tiny(tmp_path)
    tuned = open_tuned_checkpoint(path)
    assert (tuned.model_type, tuned.image_size) == ("vit_tiny", SIZE)
    assert tuned.find_base() == PACKAGED_TINY
    metadata = tuned.metadata(image_size=1024)
    assert json.loads(metadata.pop("metrics")) == {"val_per_mask_iou": 0.674}
    sidecar = json.loads(path.with_suffix(".json").read_text())
    assert metadata.pop("source_sha256") == sidecar["sha256"]
    assert metadata.pop("samft_version")
    assert json.loads(metadata.pop("pixels")) == PixelFormat().to_json()
    assert metadata == {
        "model_type": "vit_tiny",
        "image_size": "1024",
        "resize_mode": "pad",
        "step": "30",
    }


@pytest.mark.parametrize("sidecar", [None, "no JSON", "[]", '{"config": 3, "step": null}'])
def test_an_unreadable_or_empty_sidecar_is_no_error(sidecar: str | None, tmp_path) -> None:
    path = write_tiny(tmp_path)
    path.with_suffix(".json").unlink()
    if sidecar is not None:
        path.with_suffix(".json").write_text(sidecar)
    tuned = open_tuned_checkpoint(path)
    assert tuned.find_base() is None
    assert tuned.metadata(image_size=SIZE)["model_type"] == "vit_tiny"


def test_only_pth_is_resized_to_1024_and_only_positions_change(tmp_path) -> None:
    tuned = open_tuned_checkpoint(write_tiny(tmp_path))
    for format in ("safetensors", "onnx", "huggingface"):
        assert model_to_write(tuned, format) is tuned.sam
    sam = model_to_write(tuned, "pth")
    assert sam.image_encoder.img_size == 1024
    old, new = tuned.sam.state_dict(), sam.state_dict()
    changed = {n for n in old if old[n].shape != new[n].shape or not torch.equal(old[n], new[n])}
    assert changed
    assert all("pos_embed" in name or ".rel_pos_" in name for name in changed)


def test_the_base_is_opened_at_the_models_size_and_must_be_of_its_type(tmp_path) -> None:
    base = load_base(PACKAGED_TINY, tiny_sam())
    assert base.image_encoder.img_size == SIZE
    name = "mask_decoder.iou_token.weight"
    assert torch.equal(base.state_dict()[name], load_sam(PACKAGED_TINY).state_dict()[name])
    assert not bitwise_equal(base.state_dict(), tiny_sam().state_dict())
    other = tmp_path / "other.pth"
    state = {**tiny_sam().state_dict(), name: torch.zeros(1, 7)}
    torch.save(state, other)
    with pytest.raises(CheckpointError, match="does not fit"):
        load_base(other, tiny_sam())


@pytest.fixture
def adapter(tmp_path: Path) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A base at 128 px, an adapter that was trained on it at 64 px, and the weights it makes."""
    base, settings = tmp_path / "base.pth", AdapterSettings(2, 4.0, decoder=True)
    sam = build_sam("vit_tiny", 128)
    torch.save(sam.state_dict(), base)
    tuned = build_sam("vit_tiny", 64)
    load_state(tuned, sam.state_dict())
    freeze(tuned, ["image_encoder"])
    add_adapters(tuned, settings)
    for name, parameter in tuned.named_parameters():
        if name.endswith(".up"):
            parameter.data.normal_(0, 0.05)
    merged, low_rank = merged_state(tuned), adapter_state(tuned)
    tensors = adapter_tensors(merged, low_rank, constant=constant_names(tuned))
    config = {**vars(TrainConfig(model_type="vit_tiny", image_size=64, resize_mode="squash"))}
    config |= {"prompts": "mixed", "multimask": "best", "correction_rounds": 7}
    described = {"rank": 2, "alpha": 4.0, "targets": ",".join(settings.targets)}
    sidecar = make_sidecar(
        config,
        step=30,
        metrics={"per_mask_iou": 0.5},
        pixels=DEEP.to_json(),
        view=TILES.to_json(),
        adapter={**described, "base_sha256": sha256_of(base)},
    )
    TopK(tmp_path, k=1).save_if_better(merged, score=0.5, sidecar=sidecar, adapter=tensors)
    (best,) = tmp_path.glob("*.ckpt")
    return base, best.with_suffix(".adapter.safetensors"), merged


def test_a_merged_adapter_is_the_checkpoint_and_says_how_it_was_trained(
    adapter: tuple[Path, Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    base, file, expected = adapter
    tuned = open_tuned_checkpoint(base, adapter=file)
    assert tuned.image_size == 64 and tuned.find_base() == base
    for name, tensor in expected.items():
        torch.testing.assert_close(tuned.sam.state_dict()[name], tensor, atol=1e-6, rtol=1e-5)
    output = tmp_path / "merged.safetensors"
    weight_files.write_safetensors(tuned.sam, output, tuned.metadata(image_size=64))
    for written in (output, file):
        assert saved_view(written) == TILES and saved_pixels(written) == DEEP
        assert saved_resize_mode(written) == "squash"
        assert saved_prompts(written) == SavedPrompts(boxes_only=False, three_masks=True)
    assert tuned.metadata(image_size=64)["metrics"] == '{"val_per_mask_iou": 0.5}'


def test_an_adapter_that_records_nothing_of_its_training_is_merged_at_the_size_of_its_base(
    adapter: tuple[Path, Path, dict[str, torch.Tensor]],
) -> None:
    base, file, _ = adapter
    with safe_open(file, "pt") as opened:
        names = ("rank", "alpha", "targets", "base_sha256")
        metadata = {name: opened.metadata()[name] for name in names}
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    save_file(tensors, file, metadata=metadata)
    tuned = open_tuned_checkpoint(base, adapter=file)
    assert (tuned.image_size, tuned.view, tuned.pixels) == (128, WHOLE, PixelFormat())
    assert tuned.sidecar["resize_mode"] == "pad"


def test_what_was_exported_or_averaged_says_how_it_was_trained_when_it_is_exported(
    tmp_path: Path,
) -> None:
    config = {"checkpoint_path": "auto", "prompts": "box", "multimask": "off"}
    checkpoint, output = write_tiny(tmp_path, config=config), tmp_path / "a.safetensors"
    tuned = open_tuned_checkpoint(checkpoint)
    expected = tuned.metadata(image_size=SIZE)
    assert {"step", "metrics", "prompts", "multimask"} <= expected.keys()
    weight_files.write_safetensors(tuned.sam, output, expected)
    average = tmp_path / "average.pth"
    torch.save(tuned.sam.state_dict(), average)
    sidecar = json.loads(checkpoint.with_suffix(".json").read_text())
    of_average = {name: sidecar[name] for name in ("metrics", "config", "resize_mode")}
    average.with_suffix(".json").write_text(json.dumps(of_average))
    last = tmp_path / "last.ckpt"  # whose sidecar has digests alone
    torch.save({"config": sidecar["config"], "model": tuned.sam.state_dict()}, last)
    last.with_suffix(".json").write_text(json.dumps({"sha256": sha256_of(last)}))
    for path, absent in ((output, set()), (average, {"step"}), (last, {"step", "metrics"})):
        again = open_tuned_checkpoint(path).metadata(image_size=SIZE)
        names = expected.keys() - absent - {"source_sha256"}
        assert {name: again.get(name) for name in names} == {n: expected[n] for n in names}
        written = tmp_path / "again.safetensors"
        weight_files.write_safetensors(tuned.sam, written, again)
        assert saved_prompts(written) == saved_prompts(checkpoint) == SavedPrompts(True, False)


@pytest.mark.parametrize("other", ['{"view": null, "rectangle": "64x48"}', "[]", "no JSON"])
def test_an_export_is_what_it_says_whatever_json_file_lies_beside_it(
    other: str, tmp_path: Path
) -> None:
    checkpoint, output = write_tiny(tmp_path, view=TILES.to_json()), tmp_path / "a.safetensors"
    tuned = open_tuned_checkpoint(checkpoint)
    weight_files.write_safetensors(tuned.sam, output, tuned.metadata(image_size=SIZE))
    output.with_suffix(".json").write_text(other)
    assert saved_view(output) == TILES and saved_rectangle(output) is None


def test_a_safetensors_file_that_says_nothing_is_what_its_sidecar_says(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    weight_files.write_safetensors(tiny_sam(), path, {})
    path.with_suffix(".json").write_text(json.dumps({"view": TILES.to_json()}))
    assert saved_view(path) == TILES


@pytest.mark.parametrize("name", ["tuned.ckpt", "base.pth", "plain.safetensors"])
def test_a_file_that_is_no_adapter_is_refused_as_one(
    adapter: tuple[Path, Path, dict[str, torch.Tensor]], name: str
) -> None:
    base, file, merged = adapter
    path = {"tuned.ckpt": next(base.parent.glob("*.ckpt")), "base.pth": base}.get(name)
    if path is None:
        path = base.with_name(name)
        save_file(merged, path)
    with pytest.raises(CheckpointError, match="is no adapter file of samft"):
        open_tuned_checkpoint(base, adapter=path)


def test_what_was_exported_keeps_its_windows_when_it_is_exported_again(tmp_path: Path) -> None:
    checkpoint, output = write_tiny(tmp_path, view=TILES.to_json()), tmp_path / "a.safetensors"
    tuned = open_tuned_checkpoint(checkpoint)
    weight_files.write_safetensors(tuned.sam, output, tuned.metadata(image_size=SIZE))
    again = open_tuned_checkpoint(output).metadata(image_size=SIZE)
    assert json.loads(again["view"]) == TILES.to_json()
