"""Schedules in closed form, parameter groups, and parameters that box prompts must not change."""

import math
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from helpers.gloo_pool import GlooPool
from helpers.pretend_cuda.runs import needs_harness, run_with_pretended_gpus
from samft.models.prompted_sam import PromptedSam
from samft.models.sam import build_sam
from samft.models.trainable import freeze
from samft.training.losses import mask_losses
from samft.training.optim import (
    build_optimizer,
    encoder_rate_factor,
    gather_state,
    get_learning_rate,
    learning_rate_factor,
    parameter_groups,
    set_learning_rate,
)

S = 64


@pytest.mark.parametrize(
    "schedule, step, factor",
    [
        ("multistep", 0, 1 / 100),
        ("multistep", 49, 0.5),
        ("multistep", 99, 1),
        ("multistep", 100, 1),
        ("multistep", 666, 1),
        ("multistep", 667, 0.1),
        ("multistep", 866, 0.1),
        ("multistep", 867, 0.01),
        ("multistep", 999, 0.01),
        ("cosine", 0, 1 / 100),
        ("cosine", 99, 1),
        ("cosine", 100, 1),
        ("cosine", 400, 0.75),  # a third of the way, at 60 degrees
        ("cosine", 550, 0.5),
        ("cosine", 700, 0.25),
        ("cosine", 999, (1 + math.cos(math.pi * 899 / 900)) / 2),
        ("wsd", 49, 0.5),
        ("wsd", 100, 1),
        ("wsd", 800, 1),
        ("wsd", 850, 0.75),
        ("wsd", 900, 0.5),
        ("wsd", 999, 1 / 200),
        ("wsd", 1000, 0),
        ("constant", 9, 0.1),
        ("constant", 100, 1),
        ("constant", 10**6, 1),
    ],
)
def test_schedules(schedule: str, step: int, factor: float) -> None:
    actual = learning_rate_factor(step, steps=1000, schedule=schedule, warmup_steps=100)
    assert actual == pytest.approx(factor, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("schedule", ["multistep", "cosine", "wsd", "constant"])
def test_without_warm_up_the_first_step_is_at_the_peak(schedule: str) -> None:
    assert learning_rate_factor(0, steps=10, schedule=schedule, warmup_steps=0) == 1
    assert learning_rate_factor(0, steps=1, schedule=schedule, warmup_steps=1) == 1


def test_the_share_of_the_decay_is_what_is_asked_for() -> None:
    of_run = {"steps": 40, "schedule": "wsd", "warmup_steps": 0, "decay_fraction": 0.5}
    rates = [learning_rate_factor(step, **of_run) for step in (0, 19, 20, 25, 30, 39, 40)]
    assert rates == [1, 1, 1, 0.75, 0.5, 0.05, 0]


@pytest.mark.parametrize("schedule", ["multistep", "cosine", "wsd", "constant"])
def test_rates_rise_then_never_rise_again_and_stay_positive(schedule: str) -> None:
    rates = [
        learning_rate_factor(step, steps=60, schedule=schedule, warmup_steps=6)
        for step in range(60)
    ]
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[:6] == sorted(rates[:6]) and rates[5:] == sorted(rates[5:], reverse=True)


@pytest.fixture
def model() -> PromptedSam:
    torch.manual_seed(6)
    model = PromptedSam(build_sam("vit_tiny", S))
    freeze(model.sam, [])
    return model


WITHOUT_DECAY = re.compile(
    r"bias$|norm\d?\.|norm_final_attn\.|neck\.[13]\.|output_upscaling\.1\.|pos_embed$|rel_pos_[hw]$"
    r"|point_embeddings|no_mask_embed|iou_token|mask_tokens|iou_prediction_head\.layers\.2\."
)


@pytest.mark.parametrize("frozen", [[], ["image_encoder"], ["mask_decoder", "prompt_encoder"]])
def test_each_trainable_parameter_is_in_the_right_group_once(
    model: PromptedSam, frozen: list[str]
) -> None:
    freeze(model.sam, frozen)
    decayed, undecayed = parameter_groups(model, weight_decay=0.3)
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.3, 0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed_names, undecayed_names = (
        {names[id(p)] for p in group["params"]} for group in (decayed, undecayed)
    )
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(decayed["params"]) + len(undecayed["params"]) == len(trainable)
    assert undecayed_names == {name for name in trainable if WITHOUT_DECAY.search(name)}
    assert decayed_names == trainable - undecayed_names
    # Only what multiplies decays: matrices and kernels.
    assert all(p.ndim in (2, 4) for p in decayed["params"])


def test_an_empty_group_is_left_out(model: PromptedSam) -> None:
    model.requires_grad_(False)
    model.sam.prompt_encoder.no_mask_embed.weight.requires_grad_(True)
    optimizer = build_optimizer(model, learning_rate=0.1, weight_decay=0.3)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]
    assert optimizer.param_groups[0]["weight_decay"] == 0


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("neck.0.weight", 1),
        ("blocks.3.attn.qkv.weight", 0.8),
        ("blocks.0.norm1.bias", 0.8**4),
        ("patch_embed.proj.weight", 0.8**5),
        ("pos_embed", 0.8**5),
    ],
)
def test_rates_fall_from_block_to_block(name: str, factor: float) -> None:
    actual = encoder_rate_factor(name, num_blocks=4, layer_decay=0.8)
    assert actual == pytest.approx(factor)


def test_each_parameter_has_its_rate_at_every_step(model: PromptedSam) -> None:
    optimizer = build_optimizer(
        model, learning_rate=0.1, weight_decay=0.3, encoder_factor=0.5, layer_decay=0.8
    )
    names = {id(parameter): name for name, parameter in model.sam.named_parameters()}
    for rate in (0.1, 0.02):
        set_learning_rate(optimizer, rate)
        assert get_learning_rate(optimizer) == pytest.approx(rate)
        rates = {
            names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]
        }
        assert rates.keys() == {n for n, p in model.sam.named_parameters() if p.requires_grad}
        for name, actual in rates.items():
            encoder, _, own_name = name.partition("image_encoder.")
            share = 1.0
            if not encoder:
                share = 0.5 * encoder_rate_factor(own_name, num_blocks=4, layer_decay=0.8)
            assert actual == pytest.approx(rate * share), name
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for group in parameter_groups(model, weight_decay=0.3):
        assert {decays[id(p)] for p in group["params"]} == {group["weight_decay"]}


def test_training_with_boxes_changes_only_what_they_reach(model: PromptedSam) -> None:
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = build_optimizer(model, learning_rate=1e-3, weight_decay=0.1)
    images = torch.randint(0, 256, (2, 3, S, S), dtype=torch.uint8)
    targets = torch.zeros(3, S // 4, S // 4, dtype=torch.uint8)
    targets[:, 3:9, 5:12] = 255
    index = torch.tensor([0, 1, 1])
    for step in range(30):
        boxes = torch.tensor([[18.0, 10.0, 50.0, 38.0]]).repeat(3, 1) + step % 3
        logits, iou = model(images, boxes, index)
        losses = mask_losses(
            logits,
            iou,
            targets=targets,
            windows=torch.tensor([[0.0, 0.0, S, S]] * 3),
            image_index=index,
            input_sizes=torch.tensor([[S, S]] * 2),
        )
        losses.total.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    end = model.state_dict()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    unchanged = {name for name in start if torch.equal(start[name], end[name])}
    assert unchanged == set(start) - trainable
    for number in (1, 2, 3):
        prefix = f"sam.mask_decoder.output_hypernetworks_mlps.{number}."
        assert sum(name.startswith(prefix) for name in unchanged) == 6
    for kind in ("weight", "bias"):
        name = f"sam.mask_decoder.iou_prediction_head.layers.2.{kind}"
        assert torch.equal(start[name][1:], end[name][1:])
        assert not torch.equal(start[name][0], end[name][0])


def optimizer_state_bytes(sharded: bool) -> int:
    torch.manual_seed(6)
    model = PromptedSam(build_sam("vit_tiny", S))
    freeze(model.sam, [])
    optimizer = build_optimizer(model, learning_rate=1e-3, weight_decay=0.0, sharded=sharded)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    local_optimizer = getattr(optimizer, "optim", optimizer)
    state = [value for of_one in local_optimizer.state.values() for value in of_one.values()]
    return sum(tensor.nbytes for tensor in state if isinstance(tensor, torch.Tensor))


def test_sharded_each_process_holds_half_of_the_state(gloo2: GlooPool) -> None:
    whole = optimizer_state_bytes(False)
    first, second = gloo2.run(optimizer_state_bytes, True)
    assert 0.4 * whole < first < 0.6 * whole
    assert first + second == pytest.approx(whole, rel=1e-3)


def broadcasts_of_sharded_step() -> int:
    torch.manual_seed(6)
    model = PromptedSam(build_sam("vit_tiny", S))
    freeze(model.sam, ["image_encoder"])
    optimizer = build_optimizer(model, learning_rate=1e-3, weight_decay=0.0, sharded=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    with mock.patch.object(dist, "broadcast", wraps=dist.broadcast) as broadcast:
        optimizer.step()
    return broadcast.call_count


def test_sharded_each_process_sends_its_parameters_at_once(gloo2: GlooPool) -> None:
    assert gloo2.run(broadcasts_of_sharded_step) == [2, 2]


def test_a_single_process_does_not_shard(model: PromptedSam) -> None:
    optimizer = build_optimizer(model, learning_rate=1e-3, weight_decay=0.0, sharded=True)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert gather_state(optimizer)["param_groups"] == optimizer.state_dict()["param_groups"]


@pytest.mark.processes
@needs_harness
def test_a_state_is_loaded_on_any_device_sharded_or_not(tmp_path: Path) -> None:
    run = run_with_pretended_gpus("helpers.pretended_optimizer", [], folder=tmp_path, processes=2)
    assert run.code == 0, run.output
    assert run.output.count("equal:") == 2 * 12, run.output
    assert not any(report.faults for report in run.reports)
