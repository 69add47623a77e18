"""Averages of weights in closed form: ends, whole numbers, names of the same tensor."""

import pytest
import torch

from samft.weights.averages import average_states, differing_names, have_same_encoder

State = dict[str, torch.Tensor]


def two_states() -> tuple[State, State]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"image_encoder.pos_embed": (1, 2, 2, 3), "mask_decoder.weight": (40, 50)}
    ends = []
    for number in (0, 1):
        state = {
            name: torch.randn(shape, generator=generator) * 10 ** (3 * number)
            for name, shape in shapes.items()
        }
        state["tied"] = state["mask_decoder.weight"]
        state["counter"] = torch.tensor([number, 5 + number])
        state["flag"] = torch.tensor(bool(number))
        ends.append(state)
    return ends[0], ends[1]


@pytest.mark.parametrize("weight", [0.1, 0.3, 0.5, 0.9])
def test_it_is_the_average_in_closed_form(weight: float) -> None:
    first, second = two_states()
    average = average_states(first, second, weight)
    assert list(average) == list(first)
    for name in ("image_encoder.pos_embed", "mask_decoder.weight"):
        assert average[name].dtype == torch.float32
        expected = (1 - weight) * first[name].double() + weight * second[name].double()
        torch.testing.assert_close(average[name].double(), expected, rtol=1e-7, atol=1e-7)
    assert torch.equal(average["tied"], average["mask_decoder.weight"])
    nearer = first if weight < 0.5 else second
    assert torch.equal(average["counter"], nearer["counter"])
    assert average["counter"].dtype == torch.int64
    assert torch.equal(average["flag"], nearer["flag"])


def test_the_ends_are_the_checkpoints_to_the_bit() -> None:
    first, second = two_states()
    first["zero"], second["zero"] = torch.tensor(-0.0), torch.tensor(3e38)
    for weight, end in ((0.0, first), (1.0, second)):
        average = average_states(first, second, weight)
        assert all(average[name].numpy().tobytes() == end[name].numpy().tobytes() for name in end)


def test_what_differs_is_named() -> None:
    first, second = two_states()
    same = {**second, "image_encoder.pos_embed": first["image_encoder.pos_embed"].clone()}
    assert not differing_names(first, {name: tensor.clone() for name, tensor in first.items()})
    assert differing_names(first, same) == ["mask_decoder.weight", "tied", "counter", "flag"]
    assert have_same_encoder(first, same)
    assert not have_same_encoder(first, second)
