"""The pool itself: other tests trust that it runs every rank and hides no failure."""

import os

import pytest
import torch
from torch import distributed

from helpers.gloo_pool import GlooPool, RankTraceback


def rank_and_sum(value: float) -> tuple[int, int, float]:
    total = torch.tensor(value * (distributed.get_rank() + 1))
    distributed.all_reduce(total)
    return distributed.get_rank(), os.getpid(), total.item()


def fail_everywhere() -> None:
    raise KeyError(f"rank {distributed.get_rank()}")


def fail_on_rank_one() -> None:
    if distributed.get_rank() == 1:
        raise KeyError("rank 1")
    distributed.barrier()


def die_on_rank_one() -> None:
    if distributed.get_rank() == 1:
        os._exit(7)
    distributed.barrier()


class Unportable(Exception):
    def __init__(self, first: str, *, second: str) -> None:
        super().__init__(first + second)


def raise_unportable() -> None:
    raise Unportable("a", second="b")


def test_every_rank_runs_in_the_same_two_processes(gloo2: GlooPool) -> None:
    first, second = gloo2.run(rank_and_sum, 2.0), gloo2.run(rank_and_sum, 0.5)
    assert [(rank, total) for rank, _, total in first] == [(0, 6.0), (1, 6.0)]
    assert [(rank, total) for rank, _, total in second] == [(0, 1.5), (1, 1.5)]
    assert [pid for _, pid, _ in first] == [pid for _, pid, _ in second]
    assert len({pid for _, pid, _ in first} | {os.getpid()}) == 3


def test_an_error_of_all_ranks_keeps_the_processes(gloo2: GlooPool) -> None:
    before = gloo2.run(rank_and_sum, 1.0)
    with pytest.raises(KeyError, match="rank [01]") as caught:
        gloo2.run(fail_everywhere)
    assert isinstance(caught.value.__cause__, RankTraceback)
    assert "in fail_everywhere" in str(caught.value.__cause__)
    with pytest.raises(RuntimeError, match="Unportable: ab"):
        gloo2.run(raise_unportable)
    assert gloo2.run(rank_and_sum, 1.0) == before


def test_a_rank_that_fails_or_dies_alone_is_reported_and_replaced() -> None:
    pool = GlooPool(2)
    try:
        with pytest.raises(KeyError, match="rank 1"):
            pool.run(fail_on_rank_one)
        assert pool.run(rank_and_sum, 1.0)[0][2] == 3.0
        with pytest.raises(RuntimeError, match="rank 1 ended with exit code 7"):
            pool.run(die_on_rank_one)
    finally:
        pool.stop()
