"""Adapters: what they change, what is trained, and that the merged model is the same model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from segment_anything.modeling import Sam

from samft.errors import CheckpointError
from samft.models.lora import (
    TARGETS,
    AdapterSettings,
    adapter_state,
    adapter_tensors,
    add_adapters,
    apply_adapter,
    load_adapter_state,
    merge_adapters,
    merged_state,
    read_adapter,
)
from samft.models.prompted_sam import PromptedSam
from samft.models.prompts import Prompts
from samft.models.sam import build_sam, load_state
from samft.models.trainable import constant_names, freeze

S, WIDTH = 64, 128


def adapted(settings: AdapterSettings, *, attention: str = "fast") -> Sam:
    """A model with adapters that change something."""
    torch.manual_seed(2)
    sam = build_sam("vit_tiny", S, attention=attention)
    freeze(sam, ["image_encoder"] if settings.encoder else [])
    add_adapters(sam, settings)
    for name, parameter in sam.named_parameters():
        if name.endswith(".up"):
            parameter.data.normal_(0, 0.05)
    return sam


def predict(sam: Sam, *, decoder: str = "fast") -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    images = torch.randint(0, 256, (2, 3, S, S), dtype=torch.uint8)
    prompts = Prompts(boxes=torch.tensor([[4.0, 8, 40, 50], [10, 10, 60, 30], [0, 0, 20, 20]]))
    model = PromptedSam(sam, decoder=decoder)
    with torch.no_grad():
        return model.decode(model.embed(images), prompts, torch.tensor([0, 0, 1]))


@pytest.mark.parametrize("attention", ["fast", "stock"])
@pytest.mark.parametrize("decoder", ["fast", "stock"])
def test_the_merged_model_predicts_the_same(attention: str, decoder: str) -> None:
    sam = adapted(AdapterSettings(4, 8.0, decoder=True), attention=attention)
    before = predict(sam, decoder=decoder)
    merged = build_sam("vit_tiny", S)
    base = predict(merged, decoder=decoder)
    load_state(merged, merged_state(sam))
    for ours, theirs in zip(before, predict(merged, decoder="stock"), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert (base[0] - before[0]).abs().max() > 1e-2
    state = merged_state(sam)
    merge_adapters(sam)
    assert sam.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in sam.state_dict().items())


@pytest.mark.parametrize("last_blocks", [None, 1])
def test_merging_freezes_nothing_that_its_adapters_trained(last_blocks: int | None) -> None:
    sam = adapted(AdapterSettings(4, 8.0, last_blocks=last_blocks))
    model = PromptedSam(sam)
    before = model.encoder_is_frozen, model.num_frozen_blocks, model.frozen_shape
    merge_adapters(sam)
    after = model.encoder_is_frozen, model.num_frozen_blocks, model.frozen_shape
    assert after == before and not after[0]


def test_new_adapters_change_nothing() -> None:
    torch.manual_seed(2)
    sam = build_sam("vit_tiny", S)
    before = predict(sam)
    freeze(sam, ["image_encoder"])
    add_adapters(sam, AdapterSettings(4, 8.0, decoder=True))
    for ours, theirs in zip(before, predict(sam), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("targets", [("q",), ("k", "v"), ("q", "v"), ("q", "k", "v")])
def test_each_third_of_the_fused_matrix_has_its_own_update(targets: tuple[str, ...]) -> None:
    sam = adapted(AdapterSettings(2, 6.0, targets))
    block = sam.image_encoder.blocks[1]
    update = block.attn.qkv.parametrizations.weight[0]
    original = block.attn.qkv.parametrizations.weight.original
    difference = (block.attn.qkv.weight - original).unflatten(0, (3, WIDTH))
    adapters = iter(zip(update.up, update.down, strict=True))
    for i, name in enumerate("qkv"):
        if name in targets:
            up, down = next(adapters)
            torch.testing.assert_close(difference[i], 3.0 * up @ down, atol=1e-6, rtol=1e-4)
        else:
            assert not difference[i].any()
    assert not hasattr(block.attn.proj, "parametrizations")


@pytest.mark.parametrize("last_blocks", [None, 1])
def test_only_adapters_are_trained_of_what_is_adapted(last_blocks: int | None) -> None:
    settings = AdapterSettings(2, 2.0, last_blocks=last_blocks, decoder=True)
    sam = adapted(settings)
    trained = {n for n, p in sam.named_parameters() if p.requires_grad}
    in_encoder = {name for name in trained if name.startswith("image_encoder.")}
    first = 0 if last_blocks is None else 3
    layers = ("attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2")
    assert in_encoder == {
        f"image_encoder.blocks.{i}.{layer}.parametrizations.weight.0.{part}"
        for i in range(first, 4)
        for layer in layers
        for part in ("down", "up")
    }
    assert not any(name.endswith("original") for name in trained)
    assert "mask_decoder.transformer.layers.0.self_attn.q_proj.bias" in trained
    assert "mask_decoder.iou_token.weight" in trained


def test_adapters_of_vit_b_are_few() -> None:
    with torch.device("meta"):
        sam = build_sam("vit_b", 1024)
        freeze(sam, ["image_encoder"])
        add_adapters(sam, AdapterSettings(8, 8.0, TARGETS))
    parameters = dict(sam.named_parameters())
    adapters = sum(p.numel() for n, p in parameters.items() if n.endswith((".up", ".down")))
    total = sum(p.numel() for p in parameters.values())
    # Of a block: three times 768 to 768, once more for the output, and 768 to 3072 and back.
    assert adapters == 12 * 8 * (4 * (768 + 768) + 2 * (768 + 3072))
    assert adapters < 0.02 * total


def test_what_was_saved_is_restored_to_the_bit() -> None:
    settings = AdapterSettings(2, 2.0, decoder=True)
    sam = adapted(settings)
    other = build_sam("vit_tiny", S)
    load_state(other, merged_state(sam))
    add_adapters(other, settings)
    load_adapter_state(other, adapter_state(sam))
    assert all(torch.equal(t, sam.state_dict()[n]) for n, t in other.state_dict().items())


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A base, the file of an adapter of it with a trained decoder, and the merged weights."""
    torch.manual_seed(2)
    base = build_sam("vit_tiny", S).state_dict()
    torch.save(base, tmp_path / "base.pth")
    sam = adapted(AdapterSettings(4, 8.0, ("q", "mlp")))
    assert base.keys() == merged_state(sam).keys()
    sam.mask_decoder.iou_token.weight.data.add_(1)
    tensors = adapter_tensors(merged_state(sam), adapter_state(sam), constant=constant_names(sam))
    metadata = {"rank": "4", "alpha": "8.0", "targets": "q,mlp", "base_sha256": "unknown"}
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "a", metadata)
    return tmp_path / "base.pth", tmp_path / "a", merged_state(sam)


def test_an_adapter_file_makes_the_tuned_model_of_its_base(
    saved: tuple[Path, Path, dict[str, torch.Tensor]],
) -> None:
    base, path, expected = saved
    tensors, settings = read_adapter(path, base=base)
    assert path.stat().st_size < 0.7 * base.stat().st_size  # most of vit_tiny is its decoder
    merged = apply_adapter(torch.load(base, weights_only=True), tensors, settings)
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=1e-6)


def test_files_that_do_not_fit_are_refused(
    saved: tuple[Path, Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    base, path, _ = saved
    tensors, settings = read_adapter(path, base=base)
    metadata = {"rank": "4", "alpha": "8.0", "targets": "q,mlp", "base_sha256": "0" * 64}
    save_file(tensors, tmp_path / "other", metadata)
    with pytest.raises(CheckpointError, match="was trained on another base than"):
        read_adapter(tmp_path / "other", base=base)
    with pytest.raises(CheckpointError, match="is no adapter file"):
        read_adapter(base, base=base)
    state = torch.load(base, weights_only=True)
    wide = {n: t.repeat(1, 2) if t.ndim == 2 else t for n, t in state.items()}
    with pytest.raises(CheckpointError, match="is for weights of another shape"):
        apply_adapter(wide, tensors, settings)
    without = {n: t for n, t in state.items() if "blocks.2" not in n}
    with pytest.raises(CheckpointError, match="has a part for image_encoder.blocks.2"):
        apply_adapter(without, tensors, settings)
