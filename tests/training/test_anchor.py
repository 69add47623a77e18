"""The pull to the weights at the start, in closed form, also of merged adapters."""

import torch
from torch import nn

from helpers.tiny_checkpoint import tiny_sam
from helpers.trainers import make_sample, make_trainer
from samft.data.dataset import collate
from samft.models.lora import AdapterSettings, add_adapters, merged_state
from samft.training.anchor import Anchor


def test_it_is_the_pull_in_closed_form() -> None:
    torch.manual_seed(0)
    given = {name: nn.Parameter(torch.randn(3, 2)) for name in ("a", "b")}
    start = {name: p.detach().double().clone() for name, p in given.items()}
    groups = [
        {"params": [given["a"]], "lr": 1e-2},
        {"params": [given["b"]], "lr": 1e-3},
    ]
    optimizer = torch.optim.SGD(groups)
    anchor = Anchor(given, weight=30.0)
    for parameter in given.values():
        parameter.data.add_(torch.randn_like(parameter))
    moved = {name: p.detach().double().clone() for name, p in given.items()}
    for _ in range(3):
        anchor.pull(optimizer)
    for name, rate in (("a", 1e-2), ("b", 1e-3)):
        expected = start[name] + (1 - 30 * rate) ** 3 * (moved[name] - start[name])
        torch.testing.assert_close(given[name].double(), expected, rtol=1e-6, atol=1e-6)


def test_merged_adapters_are_pulled_to_the_base() -> None:
    sam = tiny_sam()
    base = {name: tensor.clone() for name, tensor in sam.state_dict().items()}
    sam.requires_grad_(False)
    add_adapters(sam, AdapterSettings(rank=2, alpha=4.0, targets=("q", "v", "mlp")))
    trained = {name: p for name, p in sam.named_parameters() if p.requires_grad}
    anchor = Anchor(trained, weight=0.5)
    for parameter in trained.values():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    before = {name: tensor.clone() for name, tensor in merged_state(sam).items()}
    anchor.pull(torch.optim.SGD(trained.values(), lr=0.5))
    after = merged_state(sam)
    name = "image_encoder.blocks.0.attn.qkv.weight"
    assert not torch.equal(before[name], base[name])
    for name, tensor in after.items():
        expected = base[name] + 0.75 * (before[name] - base[name])
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)


def test_what_was_saved_is_restored() -> None:
    given = {"a": nn.Parameter(torch.zeros(2))}
    saved = Anchor(given, weight=1.0).start_values()
    given["a"].data.fill_(5.0)
    resumed = Anchor(given, weight=1.0)
    resumed.restore(saved)
    resumed.pull(torch.optim.SGD(given.values(), lr=0.5))
    assert given["a"].tolist() == [2.5, 2.5]
    assert resumed.start_values()["a"].tolist() == [0.0, 0.0]


def test_a_step_that_is_skipped_pulls_nothing() -> None:
    trainer = make_trainer(anchor_weight=1000.0)
    assert trainer.train_step([collate([make_sample(1)])])
    before = [parameter.detach().clone() for parameter in trainer.parameters]
    name = "mask_decoder.iou_token.weight"
    token = dict(trainer.model.sam.named_parameters())[name]
    token.register_hook(lambda gradient: gradient * float("nan"))
    assert not trainer.train_step([collate([make_sample(1)])])
    assert all(map(torch.equal, before, trainer.parameters))
