"""Gathers, sums, agreement and broadcasts on two gloo ranks, and without a group."""

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.gloo_pool import GlooPool
from samft import distributed

UNEVEN = [
    ["a" * 100_000, ""],
    [[1, 2, 3], []],
    [None, {"nested": [{"deeper": (1, {2}, b"3")}], "empty": {}}],
    [torch.arange(5), torch.zeros(0, 3, dtype=torch.bool)],
]


def gather(values: list[Any]) -> list[Any]:
    return distributed.all_gather(values[distributed.get_rank()])


def identity() -> tuple[bool, int, int, bool]:
    return (
        distributed.is_initialized(),
        distributed.get_world_size(),
        distributed.get_rank(),
        distributed.is_main(),
    )


def sum_in_place(value: Tensor) -> tuple[Tensor, bool]:
    tensor = value * (distributed.get_rank() + 1)
    total = distributed.all_reduce_sum(tensor)
    return total, total is tensor


def agree_on(flags: list[bool]) -> bool:
    return distributed.any_rank(flags[distributed.get_rank()])


def broadcast_rank() -> Any:
    rank = distributed.get_rank()
    return distributed.broadcast({"from": rank, "tail": ["x"] * (1000 * rank)})


def pass_barrier() -> int:
    distributed.barrier()
    return distributed.get_rank()


@pytest.mark.parametrize("values", UNEVEN, ids=["text", "lists", "nested", "tensors"])
def test_gather_takes_any_objects_of_any_size(gloo2: GlooPool, values: list[Any]) -> None:
    for gathered in gloo2.run(gather, values):
        assert len(gathered) == 2
        for got, sent in zip(gathered, values, strict=True):
            assert torch.equal(got, sent) if isinstance(sent, Tensor) else got == sent


def test_ranks_know_who_they_are(gloo2: GlooPool) -> None:
    assert gloo2.run(identity) == [(True, 2, 0, True), (True, 2, 1, False)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64])
def test_sums_add_up_in_place(gloo2: GlooPool, dtype: torch.dtype) -> None:
    for total, in_place in gloo2.run(sum_in_place, torch.tensor([1, 5], dtype=dtype)):
        assert torch.equal(total, torch.tensor([3, 15], dtype=dtype))
        assert in_place


@pytest.mark.parametrize(
    "flags, answer",
    [([False, False], False), ([True, False], True), ([False, True], True), ([True, True], True)],
)
def test_any_rank_sets_the_flag_for_all(gloo2: GlooPool, flags: list[bool], answer: bool) -> None:
    assert gloo2.run(agree_on, flags) == [answer, answer]


def test_broadcast_gives_rank_zeros_object(gloo2: GlooPool) -> None:
    assert gloo2.run(broadcast_rank) == [{"from": 0, "tail": []}] * 2


def test_barrier_is_passed_by_all(gloo2: GlooPool) -> None:
    assert gloo2.run(pass_barrier) == [0, 1]


def test_everything_works_without_a_group() -> None:
    value = {"nested": [1, {}]}
    tensor = torch.tensor([1.0, 2.0])
    assert identity() == (False, 1, 0, True)
    assert distributed.all_gather(value) == [value]
    assert distributed.all_reduce_sum(tensor) is tensor
    assert tensor.tolist() == [1.0, 2.0]
    assert distributed.any_rank(True) is True
    assert distributed.any_rank(False) is False
    assert distributed.broadcast(value) is value
    distributed.barrier()
    distributed.shutdown()


def test_start_without_torchrun_makes_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    distributed.start(torch.device("cpu"))
    assert not distributed.is_initialized()


def test_start_under_torchrun_makes_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": 0}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    try:
        distributed.start(torch.device("cpu"))
        assert identity() == (True, 1, 0, True)
        start_id = distributed.start_id()
        assert start_id
        distributed.start(torch.device("cpu"))  # a second run in one process
        assert distributed.start_id() == start_id
    finally:
        distributed.shutdown()
    assert not distributed.is_initialized()
    assert distributed.start_id() == ""
