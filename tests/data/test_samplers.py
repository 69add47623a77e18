from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from samft.data.samplers import Key, ShardSampler, StepSampler, generator_of, repeat_factors

LAYOUTS = [(1, 4, 1), (2, 2, 1), (1, 1, 4), (2, 1, 2)]  # world size, batch size, accumulation
REPEATS = np.array([1, 1.5, 3.25, 1, 1, 2.5, 1, 1, 1, 1, 1, 1, 1.25])
WITH_AND_WITHOUT = pytest.mark.parametrize("repeats", [None, REPEATS], ids=["once", "repeats"])


def _steps(sampler: StepSampler, accumulate: int) -> list[list[Key]]:
    lists = list(sampler)
    return [
        [key for keys in lists[start : start + accumulate] for key in keys]
        for start in range(0, len(lists), accumulate)
    ]


def _epochs(count: int, **options: Any) -> list[list[tuple[int, int]]]:
    # The images and copies of the first epochs.
    sampler = StepSampler(batch_size=4, **options)
    stream = (key for keys in sampler for key in keys)
    keys = [next(stream) for _ in range(count * sampler.epoch_length)]
    assert [key[0] for key in keys] == sorted(list(range(count)) * sampler.epoch_length)
    return [[key[1:] for key in keys if key[0] == epoch] for epoch in range(count)]


@WITH_AND_WITHOUT
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_has_the_same_images_in_any_layout(
    layout: tuple[int, int, int], repeats: np.ndarray | None
) -> None:
    world, batch, accumulate = layout
    options: dict[str, Any] = {"num_images": 13, "steps": 9, "seed": 3, "repeats": repeats}
    expected = [sorted(keys) for keys in StepSampler(batch_size=4, **options)]
    ranks = [
        StepSampler(
            batch_size=batch, accumulate_steps=accumulate, rank=rank, world_size=world, **options
        )
        for rank in range(world)
    ]
    by_rank = [_steps(sampler, accumulate) for sampler in ranks]
    assert all(len(steps) == 9 for steps in by_rank)
    assert [sorted(sum(parts, [])) for parts in zip(*by_rank, strict=True)] == expected


@WITH_AND_WITHOUT
@pytest.mark.parametrize("layout", LAYOUTS)
def test_resuming_gives_the_same_tail(
    layout: tuple[int, int, int], repeats: np.ndarray | None
) -> None:
    world, batch, accumulate = layout
    for rank in range(world):
        options: dict[str, Any] = {
            "num_images": 13,
            "batch_size": batch,
            "accumulate_steps": accumulate,
            "steps": 20,
            "rank": rank,
            "world_size": world,
            "repeats": repeats,
        }
        straight = list(StepSampler(**options))
        assert list(StepSampler(**options, start_step=7)) == straight[7 * accumulate :]


def test_an_epoch_has_every_image_once_in_an_order_of_its_own() -> None:
    orders = _epochs(3, num_images=13, seed=1)
    assert all(sorted(order) == [(i, 0) for i in range(13)] for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    other = next(iter(StepSampler(num_images=13, batch_size=13, seed=2)))
    assert [key[1:] for key in other] != orders[0]


def test_more_images_in_a_step_than_there_are() -> None:
    first = next(iter(StepSampler(num_images=3, batch_size=8)))
    assert [epoch for epoch, _, _ in first] == [0, 0, 0, 1, 1, 1, 2, 2]


def test_an_epoch_with_repeats_has_each_image_as_often_as_it_asks() -> None:
    orders = _epochs(400, num_images=13, seed=1, repeats=REPEATS)
    counts = []
    for order in orders:
        assert len(order) == 18 == np.ceil(REPEATS.sum())  # 17.5
        images = [i for i, _ in order]
        count = np.bincount(images, minlength=13)
        assert sorted(order) == [(i, copy) for i in range(13) for copy in range(count[i])]
        counts.append(count)
    wanted = REPEATS * 18 / 17.5
    assert (np.min(counts, axis=0) >= np.floor(wanted)).all()
    assert (np.max(counts, axis=0) <= np.ceil(wanted)).all()
    np.testing.assert_allclose(np.mean(counts, axis=0), wanted, atol=0.08)
    assert len({tuple(images) for images in np.array(counts).tolist()}) > 3


@given(
    factors=st.lists(st.floats(1, 40), min_size=1, max_size=30),
    epoch=st.integers(0, 10**6),
)
def test_repeats_never_leave_an_image_out(factors: list[float], epoch: int) -> None:
    sampler = StepSampler(num_images=len(factors), repeats=np.array(factors))
    start = epoch * sampler.epoch_length
    images = [sampler._at(start + place)[1] for place in range(sampler.epoch_length)]
    count = np.bincount(images, minlength=len(factors))
    wanted = np.array(factors) * sampler.epoch_length / sum(factors)
    assert (count >= 1).all() and (np.abs(count - wanted) < 1 + 1e-6).all()


def test_whole_repeats_make_a_whole_epoch() -> None:
    assert StepSampler(num_images=10, repeats=np.full(10, 1.1) - 0.1).epoch_length == 10
    assert StepSampler(num_images=3, repeats=np.full(3, 7 / 3)).epoch_length == 7


def test_repeat_factors_are_those_of_lvis() -> None:
    # Category 5 is in all four images, 7 in two, 9 in one (twice).
    images = np.array([0, 1, 2, 3, 0, 1, 1, 1])
    categories = np.array([5, 5, 5, 5, 7, 7, 9, 9])
    factors = repeat_factors(images, categories, num_images=4, threshold=0.5)
    np.testing.assert_allclose(factors, [1, 2**0.5, 1, 1])
    factors = repeat_factors(images, categories, num_images=4, threshold=2.25)
    np.testing.assert_allclose(factors, [4.5**0.5, 3, 1.5, 1.5])
    nothing = repeat_factors(images[:0], categories[:0], num_images=2, threshold=0.5)
    np.testing.assert_array_equal(nothing, [1, 1])
    alone = repeat_factors(np.array([1]), np.array([3]), num_images=4, threshold=1.0)
    np.testing.assert_allclose(alone, [1, 2, 1, 1])


def test_generators_differ_by_every_word_and_by_nothing_else() -> None:
    first = generator_of(2, 0, 5, 7, 0).random(4)
    np.testing.assert_array_equal(first, generator_of(2, 0, 5, 7, 0).random(4))
    for words in ((1, 0, 5, 7, 0), (2, 1, 5, 7, 0), (2, 0, 5, 7, 1), (2, 0, 5, -7, 0)):
        assert not np.array_equal(first, generator_of(*words).random(4))


@pytest.mark.parametrize("num_images", [1, 2, 57])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_shards_hold_each_image_once(num_images: int, world_size: int) -> None:
    shards = [
        ShardSampler(num_images, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    assert sorted(i for shard in shards for i in shard) == list(range(num_images))
    assert [len(shard) for shard in shards] == [len(list(shard)) for shard in shards]
