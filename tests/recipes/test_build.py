import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.gloo_pool import GlooPool
from helpers.short_runs import a_config, write_data
from samft import distributed
from samft.errors import CheckpointError, DataError, SharedError
from samft.models.image_encoder import CheckpointedEncoder, FastBlock
from samft.models.prompted_sam import PromptedSam
from samft.models.sam import build_sam
from samft.recipes import build
from samft.training.engine import Progress
from samft.training.losses import MaskLosses, mask_losses

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


# together


def fail_on_ranks(ranks: tuple[int, ...]) -> Any:
    rank = torch.distributed.get_rank()

    def build() -> int:
        if rank in ranks:
            raise DataError(f"rank {rank} cannot read its disk")
        return 10 + rank

    try:
        return distributed.run_on_all_ranks(build)
    except SharedError as error:
        return str(error)


def test_run_on_all_ranks_returns_each_ranks_own_result(gloo2: GlooPool):
    assert gloo2.run(fail_on_ranks, ()) == [10, 11]


@pytest.mark.parametrize(("ranks", "first"), [((0,), 0), ((1,), 1), ((0, 1), 0)])
def test_run_on_all_ranks_raises_the_error_of_the_first_rank_on_all(gloo2: GlooPool, ranks, first):
    assert gloo2.run(fail_on_ranks, ranks) == [f"rank {first} cannot read its disk"] * 2


def test_run_on_all_ranks_without_a_group_raises_the_error_itself():
    def fail() -> None:
        raise CheckpointError("no such file")

    with pytest.raises(CheckpointError, match="no such file"):
        distributed.run_on_all_ranks(fail)
    assert distributed.run_on_all_ranks(lambda: 3) == 3


# Precision


@pytest.mark.parametrize(
    ("amp", "device", "gpu_has_bf16", "dtype"),
    [
        ("off", GPU, True, None),
        ("bf16", CPU, False, torch.bfloat16),
        ("fp16", GPU, True, torch.float16),
        ("auto", CPU, True, None),
        ("auto", GPU, True, torch.bfloat16),
        ("auto", GPU, False, None),
    ],
)
def test_amp_dtype(amp, device, gpu_has_bf16, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: gpu_has_bf16)
    assert build.pick_amp_dtype(amp, device) is dtype


# Weights and model


@pytest.mark.parametrize("attention", ["fast", "stock"])
def test_the_encoder_has_the_configured_attention(data, attention):
    config = a_config(data, checkpoint_path="random", attention=attention)
    blocks = build.build_model(config, None, CPU).sam.image_encoder.blocks
    assert {isinstance(block, FastBlock) for block in blocks} == {attention == "fast"}


@pytest.mark.parametrize(
    ("weight", "own_loss", "is_trained"), [(1.0, False, True), (0.0, False, False), (0, True, True)]
)
def test_the_iou_head_is_frozen_where_no_loss_reaches_it(
    data, caplog, weight, own_loss, is_trained
):
    # Weight decay would shrink it, and with it the predicted IoU that automatic masks go by.
    with caplog.at_level(logging.INFO, logger="samft"):
        config = a_config(data, checkpoint_path="random", loss_iou_weight=weight)
        model = build.build_model(config, None, CPU, own_loss=own_loss)
    head = model.sam.mask_decoder.iou_prediction_head
    assert {parameter.requires_grad for parameter in head.parameters()} == {is_trained}
    assert ("box prompts and the loss do not reach" in caplog.text) == (not is_trained)


@pytest.mark.parametrize("how", ["none", "blocks"])
def test_activation_checkpointing_is_as_configured(data, how):
    config = a_config(data, activation_checkpointing=how)
    encoder = build.build_model(config, None, CPU).sam.image_encoder
    assert isinstance(encoder, CheckpointedEncoder) == (how == "blocks")


@pytest.mark.parametrize(
    ("compile", "measured", "compiled"),
    [
        ("off", ("CPU",), False),
        ("on", (), True),
        ("auto", (), False),
        ("auto", ("NVIDIA H100", "CPU"), True),
        ("auto", ("NVIDIA H100",), False),
    ],
)
def test_blocks_are_compiled_where_that_was_measured_to_be_faster(
    data, monkeypatch, compile, measured, compiled
):
    monkeypatch.setattr(build, "FASTER_COMPILED", measured)
    encoder = build.build_model(a_config(data, compile=compile), None, CPU).sam.image_encoder
    assert all((block._compiled_call_impl is not None) == compiled for block in encoder.blocks)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_graphs_are_made_as_configured_and_have_no_effect_on_a_cpu(data, caplog, cuda_graphs):
    with caplog.at_level(logging.INFO, logger="samft"):
        model = build.build_model(a_config(data, cuda_graphs=cuda_graphs), None, CPU)
    assert (model.chunk_graphs is not None) == (model.encoder_graphs is not None) == cuda_graphs
    assert ("cuda_graphs: no effect without a GPU" in caplog.messages) == cuda_graphs


@pytest.mark.skipif(not os.environ.get("SAMFT_SLOW"), reason="slow: set SAMFT_SLOW=1")
@pytest.mark.parametrize("how", ["none", "blocks"])
def test_compiled_blocks_give_the_same_numbers(data, how):
    outputs = []
    for compiled in ("off", "on"):
        config = a_config(data, compile=compiled, activation_checkpointing=how)
        encoder = build.build_model(config, None, CPU).sam.image_encoder
        stock = build_sam("vit_tiny", 64).image_encoder
        assert list(encoder.state_dict()) == list(stock.state_dict())
        output = encoder(torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
        output.square().mean().backward()
        outputs.append([output.detach(), *(p.grad for p in encoder.parameters())])
    for eager, compiled in zip(*outputs, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


def test_the_decoder_is_as_configured(data):
    config = a_config(data, checkpoint_path="random", decoder="stock", mask_chunk=3)
    model = build.build_model(config, None, CPU)
    assert (model.decoder, model.mask_chunk) == ("stock", 3)


def test_random_weights_are_a_warning(data, caplog):
    assert build.load_weights(a_config(data, checkpoint_path="random")) is None
    assert [r.levelno for r in caplog.records if "RANDOM" in r.getMessage()] == [logging.WARNING]


def test_random_weights_depend_on_the_seed_only(data):
    def weights(seed: int) -> torch.Tensor:
        config = a_config(data, checkpoint_path="random", seed=seed)
        torch.rand(3)
        model = build.build_model(config, None, CPU)
        return model.sam.mask_decoder.mask_tokens.weight

    assert torch.equal(weights(5), weights(5))
    assert not torch.equal(weights(5), weights(6))


def test_checkpoint_of_another_model_type_names_both(data, tmp_path):
    path = tmp_path / "other.pth"
    torch.save(build_sam("vit_tiny", 64).state_dict(), path)
    with pytest.raises(CheckpointError, match="is a vit_tiny, but model_type is vit_b"):
        build.load_weights(a_config(data, checkpoint_path=path, model_type="vit_b"))


def test_weights_are_loaded_and_parts_frozen_as_configured(data, tmp_path, caplog):
    state = build_sam("vit_tiny", 64).state_dict()
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    config = a_config(data, checkpoint_path=path, freeze_image_encoder=True)
    with caplog.at_level(logging.INFO, logger="samft"):
        model = build.build_model(config, build.load_weights(config), CPU)
    loaded = model.sam.state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    training = {name.split(".")[0] for name, p in model.sam.named_parameters() if p.requires_grad}
    assert training == {"prompt_encoder", "mask_decoder"}
    frozen = next(text for text in caplog.messages if "box prompts do not reach them" in text)
    assert frozen.endswith(": 31 tensors (--debug lists them)")


def test_debug_lists_the_tensors_that_box_prompts_do_not_reach(data, caplog):
    config = a_config(data, checkpoint_path="random", debug=True)
    with caplog.at_level(logging.INFO, logger="samft"):
        build.build_model(config, None, CPU)
    frozen = next(text for text in caplog.messages if "box prompts do not reach them" in text)
    assert "prompt_encoder.not_a_point_embed.weight" in frozen
    assert "mask_decoder.output_hypernetworks_mlps.3.layers.2.bias" in frozen


# An own loss


def untrained_iou(mask_logits: torch.Tensor, iou: torch.Tensor, **truth: Any) -> MaskLosses:
    return mask_losses(mask_logits, iou, **truth, iou_weight=0.0)


def test_an_own_loss_chooses_the_best_of_three_masks_whatever_its_total_has_of_the_iou(
    tmp_path: Path,
) -> None:
    """A good mask of a rightly predicted IoU, and an empty one whose prediction is far off."""
    config = a_config(tmp_path, tmp_path, prompts="point", multimask="best")
    model = PromptedSam(build_sam("vit_tiny", 64))
    trainer = build.build_trainer(config, model, progress=Progress(), loss=untrained_iou)
    assert trainer.prompts is not None
    rounds = trainer.prompts.rounds_at(0, click_draws=torch.zeros(1, 8, 2), loss=trainer.loss)
    assert rounds.multimask_loss is not None
    logits, iou = torch.zeros(1, 2, 16, 16), torch.tensor([[1.0, 1.0]])
    logits[0, 0], logits[0, 1] = 2.0, -1e-3
    truth: dict[str, Any] = {
        "targets": torch.full((1, 8, 8), 255, dtype=torch.uint8),
        "windows": torch.tensor([[0.0, 0.0, 64.0, 64.0]]),
        "image_index": torch.zeros(1, dtype=torch.int64),
        "input_sizes": torch.tensor([[64, 64]]),
    }
    losses = rounds.multimask_loss(logits, iou, **truth)
    good = untrained_iou(logits[:, 0], iou[:, 0], **truth)
    torch.testing.assert_close(losses.total, good.total)
    torch.testing.assert_close(losses.dice, good.dice)
