"""The order of training images in any layout, epoch and restart; validation's shares."""

import itertools
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from torch.utils.data import DataLoader, DistributedSampler

from samft.data.samplers import (
    EndlessBatchSampler,
    SampleKey,
    TrainingSampler,
    ValidationSampler,
    generator_of,
    repeat_factors,
)

LAYOUTS = [(1, 4, 1), (2, 2, 1), (1, 1, 4), (2, 1, 2)]  # world size, batch size, accumulation
REPEATS = np.array([1, 1.5, 3.25, 1, 1, 2.5, 1, 1, 1, 1, 1, 1, 1.25])
WITH_AND_WITHOUT = pytest.mark.parametrize("repeats", [None, REPEATS], ids=["once", "repeats"])


def batches_of(
    count: int, *, num_images: int = 13, position: int = 0, **options: Any
) -> list[list[SampleKey]]:
    """The first batches of one rank from a position on."""
    sampler = TrainingSampler(range(num_images), **options)
    sampler.load_state_dict({"position": position})
    return list(EndlessBatchSampler(sampler, num_batches=count))


def steps_of(count: int, *, accumulate: int, **options: Any) -> list[list[SampleKey]]:
    """The images of one rank's first optimizer steps."""
    batches = batches_of(count * accumulate, **options)
    return [
        sum(batches[start : start + accumulate], []) for start in range(0, len(batches), accumulate)
    ]


def epochs_of(count: int, *, num_images: int = 13, **options: Any) -> list[list[tuple[int, int]]]:
    """The rows and copies of the first epochs."""
    sampler = TrainingSampler(range(num_images), batch_size=4, **options)
    stream = itertools.chain.from_iterable(EndlessBatchSampler(sampler))
    keys = list(itertools.islice(stream, count * sampler.total_size))
    assert [key.epoch for key in keys] == sorted(list(range(count)) * sampler.total_size)
    return [[key[1:] for key in keys if key.epoch == epoch] for epoch in range(count)]


# The order itself: whoever resumes a run of an earlier version has to be given the same images.


def philox(*numbers: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(list(numbers))))


def expected_key(
    position: int, *, num_images: int, seed: int, repeats: np.ndarray | None
) -> tuple[int, int, int]:
    """The image at a position of the stream, in closed form."""
    factors = np.ones(num_images) if repeats is None else repeats
    length = int(np.ceil(factors.sum() - 1e-6))
    epoch, place = position // length, position % length
    number = int(philox(1, seed, epoch).permutation(length)[place])
    if repeats is None:
        return epoch, number, 0
    offset = philox(3, seed, epoch).random()
    ends = np.cumsum(factors)
    ends *= length / ends[-1]  # the k-th sample of an epoch is the image whose interval has k + u
    rows = [min(int((ends <= k + offset).sum()), num_images - 1) for k in range(number + 1)]
    return epoch, rows[-1], rows[:-1].count(rows[-1])


@WITH_AND_WITHOUT
@pytest.mark.parametrize("start_step", [0, 5])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 29])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_batches_are_consecutive_blocks_of_one_stream(
    world_size: int,
    batch_size: int,
    accumulate: int,
    start_step: int,
    repeats: np.ndarray | None,
) -> None:
    order: dict[str, Any] = {"num_images": 13, "seed": 3, "repeats": repeats}
    for rank in range(world_size):
        batches = batches_of(
            4 * accumulate,
            position=start_step * accumulate * world_size * batch_size,
            num_replicas=world_size,
            rank=rank,
            batch_size=batch_size,
            **order,
        )
        assert len(batches) == 4 * accumulate
        for step in range(4):
            for micro in range(accumulate):
                block = ((start_step + step) * accumulate + micro) * world_size + rank
                positions = range(block * batch_size, (block + 1) * batch_size)
                expected = [expected_key(position, **order) for position in positions]
                assert batches[step * accumulate + micro] == expected


@WITH_AND_WITHOUT
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_has_the_same_images_in_any_layout(
    layout: tuple[int, int, int], repeats: np.ndarray | None
) -> None:
    world, batch, accumulate = layout
    options: dict[str, Any] = {"seed": 3, "repeats": repeats}
    expected = [sorted(keys) for keys in batches_of(9, batch_size=4, **options)]
    by_rank = [
        steps_of(
            9, accumulate=accumulate, batch_size=batch, rank=rank, num_replicas=world, **options
        )
        for rank in range(world)
    ]
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
            "batch_size": batch,
            "rank": rank,
            "num_replicas": world,
            "repeats": repeats,
        }
        straight = batches_of(20 * accumulate, **options)
        tail = batches_of(13 * accumulate, position=7 * 4, **options)
        assert tail == straight[7 * accumulate :]


def test_an_epoch_has_every_image_once_in_an_order_of_its_own() -> None:
    orders = epochs_of(3, seed=1)
    assert all(sorted(order) == [(i, 0) for i in range(13)] for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    (other,) = batches_of(1, batch_size=13, seed=2)
    assert [key[1:] for key in other] != orders[0]


def test_more_images_in_a_step_than_there_are() -> None:
    (first,) = batches_of(1, num_images=3, batch_size=8)
    assert [key.epoch for key in first] == [0, 0, 0, 1, 1, 1, 2, 2]


def test_an_epoch_with_repeats_has_each_image_as_often_as_it_asks() -> None:
    orders = epochs_of(400, seed=1, repeats=REPEATS)
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
    sampler = TrainingSampler(factors, repeats=np.array(factors))
    sampler.set_epoch(epoch)
    images = [key.row for key in sampler]
    assert len(images) == sampler.total_size
    count = np.bincount(images, minlength=len(factors))
    wanted = np.array(factors) * sampler.total_size / sum(factors)
    assert (count >= 1).all() and (np.abs(count - wanted) < 1 + 1e-6).all()


def test_whole_repeats_make_a_whole_epoch() -> None:
    assert TrainingSampler(range(10), repeats=np.full(10, 1.1) - 0.1).total_size == 10
    assert TrainingSampler(range(3), repeats=np.full(3, 7 / 3)).total_size == 7


# What holds of every DistributedSampler


def samplers_of(num_replicas: int, **options: Any) -> list[TrainingSampler]:
    return [
        TrainingSampler(range(13), num_replicas, rank, **options) for rank in range(num_replicas)
    ]


@WITH_AND_WITHOUT
@pytest.mark.parametrize("batch_size", [1, 2, 20])
@pytest.mark.parametrize("num_replicas", [1, 2, 3])
def test_ranks_partition_every_epoch(
    num_replicas: int, batch_size: int, repeats: np.ndarray | None
) -> None:
    samplers = samplers_of(num_replicas, batch_size=batch_size, repeats=repeats, seed=5)
    (whole,) = samplers_of(1, repeats=repeats, seed=5)
    for epoch in range(4):
        for sampler in (whole, *samplers):
            assert isinstance(sampler, DistributedSampler)
            sampler.set_epoch(epoch)
        shares = [list(sampler) for sampler in samplers]
        assert [len(share) for share in shares] == [len(sampler) for sampler in samplers]
        assert max(map(len, shares)) - min(map(len, shares)) <= batch_size
        assert sorted(sum(shares, [])) == sorted(whole)
        assert {key.epoch for key in whole} == {epoch}


def test_set_epoch_and_seed_change_the_order_and_iterating_again_does_not() -> None:
    orders = {}
    for seed, epoch in itertools.product((0, 1), (0, 1, 2)):
        sampler = TrainingSampler(range(13), seed=seed)
        sampler.set_epoch(epoch)
        orders[seed, epoch] = [key.row for key in sampler]
        assert [key.row for key in sampler] == orders[seed, epoch]
        assert sorted(orders[seed, epoch]) == list(range(13))
    assert len({tuple(order) for order in orders.values()}) == 6


def test_without_shuffling_the_order_is_that_of_the_dataset() -> None:
    sampler = TrainingSampler(range(5), shuffle=False)
    for epoch in (0, 3):
        sampler.set_epoch(epoch)
        assert list(sampler) == [(epoch, row, 0) for row in range(5)]
    # As DistributedSampler divides it: rank r has r, r + num_replicas, ...
    first, second = (TrainingSampler(range(5), 2, rank, shuffle=False) for rank in range(2))
    assert [key.row for key in first] == [0, 2, 4] and [key.row for key in second] == [1, 3]
    repeated = TrainingSampler(range(3), shuffle=False, repeats=np.array([1.0, 3.0, 1.0]))
    assert [key[1:] for key in repeated] == [(0, 0), (1, 0), (1, 1), (1, 2), (2, 0)]


def test_drop_last_gives_every_rank_as_many_whole_batches() -> None:
    # 13 images are one batch of 2 * 6, and 1 that is left out.
    samplers = samplers_of(2, batch_size=6, drop_last=True)
    for epoch in range(3):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        rows = [[key.row for key in sampler] for sampler in samplers]
        assert [len(share) for share in rows] == [len(sampler) for sampler in samplers] == [6, 6]
        assert len(set(sum(rows, []))) == 12
    with pytest.raises(ValueError, match="no batch"):
        samplers_of(2, batch_size=7, drop_last=True)
    with pytest.raises(ValueError, match="no batch"):
        TrainingSampler([])


def test_a_rank_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="Invalid rank"):
        TrainingSampler(range(5), num_replicas=2, rank=2)
    with pytest.raises(ValueError, match="Invalid rank"):
        ValidationSampler(range(5), num_replicas=2, rank=2)


def test_ranks_and_their_number_are_those_of_the_process_group(gloo2: Any) -> None:
    assert [TrainingSampler(range(5)).num_replicas, ValidationSampler(range(5)).rank] == [1, 0]
    assert gloo2.run(rank_and_rows) == [(0, [0, 2, 4]), (1, [1, 3])]


def rank_and_rows() -> tuple[int, list[int]]:
    rows = [key.row for key in TrainingSampler(range(5), shuffle=False)]
    assert list(ValidationSampler(range(5))) == rows
    return TrainingSampler(range(5)).rank, rows


def test_a_data_loader_takes_it_as_any_sampler() -> None:
    sampler = TrainingSampler(range(13), batch_size=4)
    loader = DataLoader(range(13), batch_size=4, sampler=sampler, collate_fn=list)
    assert len(loader) == 4
    loader = DataLoader(Rows(), batch_size=4, sampler=sampler, collate_fn=list)
    sizes = [len(rows) for rows in loader]
    assert sizes == [4, 4, 4, 1]
    assert sorted(sum(loader, [])) == list(range(13))


class Rows:
    def __getitem__(self, key: SampleKey) -> int:
        return key.row


# Resuming by state_dict, as torchdata's stateful samplers do


@WITH_AND_WITHOUT
@pytest.mark.parametrize("batch_size", [1, 2, 20])
@pytest.mark.parametrize("num_replicas", [1, 2, 3])
def test_state_dict_resumes_after_any_image(
    num_replicas: int, batch_size: int, repeats: np.ndarray | None
) -> None:
    options: dict[str, Any] = {"batch_size": batch_size, "repeats": repeats}
    for sampler in samplers_of(num_replicas, **options):
        stream = itertools.chain.from_iterable(EndlessBatchSampler(sampler))
        straight = list(itertools.islice(stream, 60))
        for used in range(40):
            sampler.load_state_dict({"position": 0})
            yielded: list[SampleKey] = []
            while len(yielded) < used:
                yielded += itertools.islice(sampler, used - len(yielded))
                if len(yielded) < used:
                    sampler.set_epoch(sampler.epoch + 1)
            assert yielded == straight[:used]
            state = sampler.state_dict()
            assert state == {"position": used * num_replicas}
            resumed = TrainingSampler(range(13), num_replicas, sampler.rank, **options)
            resumed.load_state_dict(state)
            assert resumed.state_dict() == state
            stream = itertools.chain.from_iterable(EndlessBatchSampler(resumed))
            assert list(itertools.islice(stream, 20)) == straight[used : used + 20]


def test_a_resumed_epoch_is_completed_once_and_whole_the_next_time() -> None:
    sampler = TrainingSampler(range(13), seed=1)
    whole = list(sampler)
    sampler.load_state_dict({"position": 9})
    sampler.set_epoch(sampler.epoch)  # as loops over epochs do
    assert list(sampler) == whole[9:]
    assert list(sampler) == whole
    sampler.load_state_dict({"position": 9})
    sampler.set_epoch(1)
    assert len(list(sampler)) == 13
    assert sampler.state_dict() == {"position": 26}
    sampler.load_state_dict({"position": 13 + 4})
    assert sampler.epoch == 1 and [key.epoch for key in sampler] == [1] * 9


@WITH_AND_WITHOUT
@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_number_of_processes_resumes_with_the_same_images(
    layout: tuple[int, int, int], repeats: np.ndarray | None
) -> None:
    world, batch, accumulate = layout
    options: dict[str, Any] = {"seed": 3, "repeats": repeats}
    straight = [sorted(keys) for keys in batches_of(11, batch_size=4, **options)]
    first = TrainingSampler(range(13), 2, 1, batch_size=2, **options)
    for _ in range(5):  # steps of 4 images, of which rank 1 of 2 gets 2
        keys = list(itertools.islice(EndlessBatchSampler(first), 1))
        assert len(keys) == 1
    by_rank = [
        steps_of(
            6,
            accumulate=accumulate,
            position=first.state_dict()["position"],
            batch_size=batch,
            num_replicas=world,
            rank=rank,
            **options,
        )
        for rank in range(world)
    ]
    assert [sorted(sum(parts, [])) for parts in zip(*by_rank, strict=True)] == straight[5:]


@pytest.mark.parametrize("position", [-2, 3])
def test_a_position_that_ranks_cannot_share_is_refused(position: int) -> None:
    with pytest.raises(ValueError, match=f"position {position} is not a multiple of the 2"):
        TrainingSampler(range(5), 2, 0).load_state_dict({"position": position})


def test_endless_batches_begin_anew_with_each_iteration() -> None:
    sampler = TrainingSampler(range(5), batch_size=2)
    sampler.load_state_dict({"position": 4})
    batches = EndlessBatchSampler(sampler, num_batches=4)
    first = list(batches)
    assert len(first) == 4 and list(batches) == first


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


def test_generators_differ_by_every_number_and_by_nothing_else() -> None:
    first = generator_of(2, 0, 5, 7, 0).random(4)
    np.testing.assert_array_equal(first, generator_of(2, 0, 5, 7, 0).random(4))
    for seed in ((1, 0, 5, 7, 0), (2, 1, 5, 7, 0), (2, 0, 5, 7, 1), (2, 0, 5, -7, 0)):
        assert not np.array_equal(first, generator_of(*seed).random(4))


@pytest.mark.parametrize("num_images", [1, 2, 57])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_shards_hold_each_image_once(num_images: int, world_size: int) -> None:
    shards = [ValidationSampler(range(num_images), world_size, rank) for rank in range(world_size)]
    assert all(isinstance(shard, DistributedSampler) for shard in shards)
    assert sorted(i for shard in shards for i in shard) == list(range(num_images))
    assert [len(shard) for shard in shards] == [len(list(shard)) for shard in shards]
    assert [list(shard) for shard in shards] == [
        list(range(rank, num_images, world_size)) for rank in range(world_size)
    ]


def test_validation_can_be_shuffled_as_a_distributed_sampler_is() -> None:
    sampler = ValidationSampler(range(12), 2, 1, shuffle=True, seed=3)
    torchs = DistributedSampler(range(12), 2, 1, shuffle=True, seed=3)  # type: ignore[arg-type]
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        torchs.set_epoch(epoch)
        assert list(sampler) == list(torchs)
