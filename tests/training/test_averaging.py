"""The moving average of the weights in closed form, in place, and never of a skipped step."""

import pytest
import torch
from torch import nn

from helpers.trainers import make_sample, make_trainer
from samft.data.dataset import collate
from samft.training.averaging import WeightAverage


def parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(1)
    return {"a": nn.Parameter(torch.randn(3, 2)), "b": nn.Parameter(torch.randn(4))}


@pytest.mark.parametrize("decay", [0.5, 0.99])
def test_it_is_the_average_in_closed_form(decay: float) -> None:
    given = parameters()
    average = WeightAverage(given, decay=decay)
    expected = {name: p.detach().double().clone() for name, p in given.items()}
    for step in range(1, 31):
        for parameter in given.values():
            parameter.data.add_(torch.randn_like(parameter))
        average.update(step)
        d = min(decay, step / (step + 9))
        for name, parameter in given.items():
            expected[name] = d * expected[name] + (1 - d) * parameter.detach().double()
    with average.applied():
        for name, parameter in given.items():
            torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_the_weights_come_back_whatever_happens_within() -> None:
    given = parameters()
    average = WeightAverage(given, decay=0.9)
    for parameter in given.values():
        parameter.data.add_(1)
    before = {name: p.detach().clone() for name, p in given.items()}
    places = [p.data_ptr() for p in given.values()]
    with pytest.raises(KeyError), average.applied() as own_values:
        assert all(torch.equal(own_values[name], before[name]) for name in given)
        assert not any(torch.equal(p, before[name]) for name, p in given.items())
        raise KeyError
    assert all(torch.equal(p, before[name]) for name, p in given.items())
    assert places == [p.data_ptr() for p in given.values()]


def test_what_was_saved_is_restored() -> None:
    given = parameters()
    average = WeightAverage(given, decay=0.9)
    for parameter in given.values():
        parameter.data.add_(1)
    with average.applied() as own_values:
        saved = {name: p.detach().clone() for name, p in given.items()}
        own = {name: value.clone() for name, value in own_values.items()}
    others = {name: nn.Parameter(value.clone()) for name, value in saved.items()}
    restored = WeightAverage(others, decay=0.9)
    restored.restore(own)
    assert all(torch.equal(others[name], given[name]) for name in given)
    with average.applied(), restored.applied():
        assert all(torch.equal(others[name], given[name]) for name in given)


def test_a_skipped_step_is_not_averaged() -> None:
    trainer = make_trainer(ema_decay=0.9)
    assert trainer.average is not None
    batch = collate([make_sample(1)])
    assert trainer.train_step([batch])
    name = "mask_decoder.iou_token.weight"
    token = dict(trainer.model.sam.named_parameters())[name]

    def averaged() -> torch.Tensor:
        with trainer.validated_weights():
            return token.detach().clone()

    before = averaged()
    assert not torch.equal(before, token)
    token.register_hook(lambda gradient: gradient * float("nan"))
    assert not trainer.train_step([batch])
    assert torch.equal(averaged(), before)
