"""Activation checkpointing: the same numbers, fewer tensors kept, and blocks run again."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from samft.models.image_encoder import checkpoint_activations
from samft.models.sam import build_sam

HOW = ("none", "blocks", "full")


def make_encoder(how: str, attention: str = "fast") -> nn.Module:
    torch.manual_seed(0)
    encoder = build_sam("vit_tiny", 64, attention=attention).image_encoder
    nn.init.normal_(encoder.pos_embed)  # zeros in a fresh model
    return checkpoint_activations(encoder, how)


def gradients(encoder: nn.Module) -> dict[str, Tensor]:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    encoder(images).square().sum().backward()
    return {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["fast", "stock"])
@pytest.mark.parametrize("how", ["blocks", "full"])
def test_outputs_and_gradients_are_the_same(how, attention):
    expected, actual = (gradients(make_encoder(h, attention)) for h in ("none", how))
    assert expected.keys() == actual.keys()
    assert len(actual) == len([*make_encoder("none").parameters()])
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def runs_of_blocks(how: str) -> list[int]:
    encoder = make_encoder(how)
    runs = [0] * len(encoder.blocks)
    for number, block in enumerate(encoder.blocks):

        def count(*_: object, number: int = number) -> None:
            runs[number] += 1

        block.register_forward_pre_hook(count)
    gradients(encoder)
    return runs


def test_each_block_runs_as_often_as_documented():
    assert runs_of_blocks("none") == [1, 1, 1, 1]
    assert runs_of_blocks("blocks") == [2, 2, 2, 2]
    # Groups of two: when a group runs again for the inputs of its blocks, its last block need not
    # run, as nothing wants its output.
    assert set(runs_of_blocks("full")) <= {2, 3} and 3 in runs_of_blocks("full")


def saved_bytes(how: str) -> int:
    saved: dict[int, int] = {}  # by the address of the storage

    def record_saved(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    encoder = make_encoder(how)
    parameters = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(record_saved, lambda tensor: tensor):
        output = encoder(torch.randn(2, 3, 64, 64))
    assert output.requires_grad
    return sum(size for address, size in saved.items() if address not in parameters)


def test_less_is_saved_for_backward():
    none, blocks, full = (saved_bytes(how) for how in HOW)
    assert blocks < none / 3
    assert full <= blocks


@pytest.mark.parametrize("how", HOW)
def test_keys_copies_and_pickles_are_those_of_the_stock_encoder(how):
    stock, encoder = build_sam("vit_tiny", 64).image_encoder, make_encoder(how)
    assert list(encoder.state_dict()) == list(stock.state_dict())
    images = torch.randn(1, 3, 64, 64)
    for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert torch.equal(other(images), encoder(images))


def test_without_gradients_nothing_is_run_twice():
    encoder = make_encoder("full")
    runs = []
    encoder.blocks[0].register_forward_pre_hook(lambda *_: runs.append(1))
    with torch.no_grad():
        encoder(torch.randn(1, 3, 64, 64))
    assert len(runs) == 1
