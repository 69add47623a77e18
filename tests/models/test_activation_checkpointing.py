import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from samft.models.image_encoder import checkpoint_activations
from samft.models.sam import build_sam

HOW = ("none", "blocks", "full")


def an_encoder(how: str, attention: str = "fast") -> nn.Module:
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
    expected, found = (gradients(an_encoder(h, attention)) for h in ("none", how))
    assert expected.keys() == found.keys() and len(found) == len([*an_encoder("none").parameters()])
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def runs_of_blocks(how: str) -> list[int]:
    encoder = an_encoder(how)
    runs = [0] * len(encoder.blocks)
    for number, block in enumerate(encoder.blocks):

        def count(*_: object, number: int = number) -> None:
            runs[number] += 1

        block.register_forward_pre_hook(count)
    gradients(encoder)
    return runs


def test_each_block_is_run_as_often_as_is_said():
    assert runs_of_blocks("none") == [1, 1, 1, 1]
    assert runs_of_blocks("blocks") == [2, 2, 2, 2]
    # Groups of two: the last of a group need not be run for its inputs, which is all it is wanted
    # for the second time, but for its activations.
    assert set(runs_of_blocks("full")) <= {2, 3} and 3 in runs_of_blocks("full")


def kept_bytes(how: str) -> int:
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    encoder = an_encoder(how)
    parameters = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = encoder(torch.randn(2, 3, 64, 64))
    assert output.requires_grad
    return sum(size for at, size in kept.items() if at not in parameters)


def test_less_is_kept_for_backward():
    none, blocks, full = (kept_bytes(how) for how in HOW)
    assert blocks < none / 3
    assert full <= blocks


@pytest.mark.parametrize("how", HOW)
def test_keys_copies_and_pickles_are_those_of_the_stock_encoder(how):
    stock, encoder = build_sam("vit_tiny", 64).image_encoder, an_encoder(how)
    assert list(encoder.state_dict()) == list(stock.state_dict())
    images = torch.randn(1, 3, 64, 64)
    for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert torch.equal(other(images), encoder(images))


def test_without_gradients_nothing_is_run_twice():
    encoder = an_encoder("full")
    runs = []
    encoder.blocks[0].register_forward_pre_hook(lambda *_: runs.append(1))
    with torch.no_grad():
        encoder(torch.randn(1, 3, 64, 64))
    assert len(runs) == 1
