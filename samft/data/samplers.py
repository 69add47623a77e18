"""Distributed samplers: the order of training images, and each rank's share of validation.

Which images an optimizer step is made of depends on the seed and the number of images per step
only: not on the number of workers, processes or micro-batches, nor on restarts.
"""

import itertools
from collections.abc import Iterator, Mapping, Sized
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler, Sampler

from samft.distributed import get_rank, get_world_size

# The first number of every seed, so that no two purposes share a stream of random numbers.
_ORDER_STREAM, _REPEAT_STREAM, SAMPLE_STREAM, PROMPT_STREAM, RESAMPLE_STREAM = 1, 3, 2, 4, 5
CLICK_STREAM, ROUND_STREAM, SUBSET_STREAM = 6, 7, 8
_UINT64_MAX = 2**64 - 1

Key = TypeVar("Key")  # of a sample


class SampleKey(NamedTuple):
    """What a training sample is drawn from: the dataset's augmentation is seeded with it."""

    epoch: int
    row: int  # of the image in the subset
    copy: int  # 0, or 1, 2, ... where the image comes more than once in the epoch


def generator_of(*seed: int) -> np.random.Generator:
    """An independent random generator for each sequence of integers, negative ones included."""
    sequence = np.random.SeedSequence([number & _UINT64_MAX for number in seed])
    return np.random.Generator(np.random.Philox(sequence))


def repeat_factors(
    images: NDArray[np.integer],
    categories: NDArray[np.integer],
    *,
    num_images: int,
    threshold: float,
) -> NDArray[np.float64]:
    """How many times per epoch each image should be sampled so that rare categories come often.

    A category in a share f of the images has the factor max(1, sqrt(threshold / f)); the factor of
    an image is the largest of its categories.

    Args:
        images: [K], the image of each object.
        categories: [K], the category of each object.
        num_images: N.
        threshold: Categories in a smaller share of the images than this are repeated.

    Returns:
        [N], each at least 1; 1 for an image without objects.

    Source: repeat-factor sampling of LVIS, https://arxiv.org/abs/1908.03195, appendix B.2.

    Example:
        >>> categories = np.array([7, 7, 7, 9])  # 9 is in one of four images
        >>> repeat_factors(np.arange(4), categories, num_images=4, threshold=1.0)
        array([1.15470054, 1.15470054, 1.15470054, 2.        ])
    """
    _, category = np.unique(categories, return_inverse=True)
    pairs = np.unique(np.stack([images, category]), axis=1)  # an image counts once per category
    shares = np.bincount(pairs[1]) / num_images
    repeats = np.ones(num_images)
    np.maximum.at(repeats, pairs[0], np.sqrt(threshold / shares)[pairs[1]])
    return repeats


class _RankSampler(DistributedSampler[Key]):
    # A DistributedSampler that needs no process group: without one, there is one rank.
    def __init__(
        self,
        dataset: Sized,
        num_replicas: int | None = None,
        rank: int | None = None,
        *options: Any,
    ) -> None:
        super().__init__(
            dataset,  # type: ignore[arg-type]  # torch needs no more of it than its length
            get_world_size() if num_replicas is None else num_replicas,
            get_rank() if rank is None else rank,
            *options,
        )


class TrainingSampler(_RankSampler[SampleKey]):
    """A `DistributedSampler` whose epochs join without padding, and that can resume anywhere.

    The epochs are one endless stream: position p is place p % n of epoch p // n, where n is
    `total_size`, the number of places in an epoch. Rank r gets every `num_replicas`-th block of
    `batch_size` positions, beginning with block r. So the ranks partition every epoch, and a global
    batch is a contiguous piece of the stream, however it is divided among processes and
    micro-batches. Iterating gives this rank's share of the current epoch, in which ranks may differ
    by up to one batch: `EndlessBatchSampler` joins the epochs, so that all ranks have equally many
    batches.

    Args:
        dataset: Anything with a length, in images.
        num_replicas: Number of processes; None: of the process group, 1 without one.
        rank: Of this process; None: in the process group, 0 without one.
        shuffle: An order drawn from (seed, epoch); False: the order of the dataset.
        seed: The same on all ranks.
        drop_last: Shorten each epoch to a multiple of num_replicas * batch_size, so that every rank
            gets equally many whole batches of it. False: the first images of the next epoch
            complete the last batch.
        batch_size: Images per process and micro-batch.
        repeats: [len(dataset)], how many times each image comes in an epoch, each at least 1; see
            `repeat_factors`. None: once.

    Raises:
        ValueError: An epoch has no images.
    """

    def __init__(
        self,
        dataset: Sized,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        *,
        batch_size: int = 1,
        repeats: NDArray[np.floating] | None = None,
    ) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle, seed, drop_last)
        self.num_images, self.batch_size, self.repeats = len(dataset), batch_size, repeats
        self._num_places = self.num_images
        if repeats is not None:
            # Rounding errors must not turn a sum that is a whole number into the next one.
            self._num_places = int(np.ceil(np.sum(repeats) - 1e-6))
        # The base class counts padding, or dropped images, in these two.
        global_batch = self.num_replicas * batch_size
        self.total_size = self._num_places - (self._num_places % global_batch if drop_last else 0)
        self.num_samples = -(-self.total_size // self.num_replicas)
        if not self.total_size:
            raise ValueError(f"an epoch of {self.num_images} images has no batch to give")
        self._num_used = 0  # of this rank's share of the stream
        self._num_to_skip = 0  # at the beginning of the next iteration, after a resume

    def __len__(self) -> int:
        """This rank's share of the current epoch."""
        first = self.epoch * self.total_size
        return int(self._num_own_before(first + self.total_size) - self._num_own_before(first))

    def __iter__(self) -> Iterator[SampleKey]:
        """This rank's share of the current epoch, or what `load_state_dict` left of it."""
        order = self._draw_order()
        first = self.epoch * self.total_size
        positions = np.arange(first, first + self.total_size)
        positions = positions[positions // self.batch_size % self.num_replicas == self.rank]
        numbers = self._num_own_before(positions)  # this rank's share counted from epoch 0 on
        is_left = numbers >= self._num_to_skip
        epoch, self._num_to_skip = self.epoch, 0
        for place, number in zip(positions[is_left] - first, numbers[is_left], strict=True):
            self._num_used = int(number) + 1
            yield SampleKey(epoch, *order[place].tolist())

    def set_epoch(self, epoch: int) -> None:
        """Selects the epoch that the next iteration gives.

        The current epoch again leaves a resumed position as it is; another one begins at its start.
        """
        if epoch != self.epoch:
            super().set_epoch(epoch)
            self._num_used = int(self._num_own_before(epoch * self.total_size))
            self._num_to_skip = 0

    def state_dict(self) -> dict[str, int]:
        """Where this rank is in the stream.

        Returns:
            `position`: images that all ranks together have been given, if each has been given as
            many as this one. A `DataLoader` with workers asks for batches in advance: what it has
            not handed out yet is counted, too.
        """
        return {"position": self._num_used * self.num_replicas}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Makes the next iteration begin at a position, and selects the epoch that it lies in.

        Args:
            state_dict: From `state_dict`. At a multiple of the global batch it may come from a
                sampler with another number of processes or another batch size.

        Raises:
            ValueError: The position cannot be shared evenly among the processes.
        """
        position = int(state_dict["position"])
        if position < 0 or position % self.num_replicas:
            raise ValueError(
                f"position {position} is not a multiple of the {self.num_replicas} processes"
            )
        self._num_used = self._num_to_skip = position // self.num_replicas
        # The epoch of this rank's next image: in a batch that straddles two, ranks may differ.
        block, place_in_block = divmod(self._num_used, self.batch_size)
        next_position = (block * self.num_replicas + self.rank) * self.batch_size + place_in_block
        super().set_epoch(next_position // self.total_size)

    def _num_own_before(self, position: Any) -> Any:
        # How many positions of the stream before this one (an int or an array) are this rank's.
        global_batches, rest = np.divmod(position, self.num_replicas * self.batch_size)
        in_block = np.clip(rest - self.rank * self.batch_size, 0, self.batch_size)
        return global_batches * self.batch_size + in_block

    def _draw_order(self) -> NDArray[np.int64]:
        # int64 [n, 2]: row and copy of each place of the current epoch.
        places = np.arange(self._num_places)
        order = places
        if self.shuffle:
            order = generator_of(_ORDER_STREAM, self.seed, self.epoch).permutation(len(places))
        order = order[: self.total_size]
        if self.repeats is None:
            return np.stack([order, np.zeros_like(order)], axis=1)
        # Systematic sampling: from one random offset on, equal strides through the cumulative sum
        # of the repeats, so that an image with a factor f comes floor(f) or ceil(f) times.
        offset = generator_of(_REPEAT_STREAM, self.seed, self.epoch).random()
        ends = np.cumsum(self.repeats)
        ends *= len(places) / ends[-1]
        rows = np.minimum(np.searchsorted(ends, places + offset, side="right"), self.num_images - 1)
        copies = places - np.searchsorted(rows, rows)
        return np.stack([rows, copies], axis=1)[order]


class EndlessBatchSampler(Sampler[list[SampleKey]]):
    """The batches of one epoch after the other, without end; a batch may straddle two epochs.

    For the `batch_sampler` of a `DataLoader`. Each iteration begins at the position that the
    sampler had when this object was made.

    Args:
        sampler: Gives the images, and their number in a batch.
        num_batches: Ends after so many; None: never.
    """

    def __init__(self, sampler: TrainingSampler, *, num_batches: int | None = None) -> None:
        self.sampler, self.num_batches = sampler, num_batches
        self._start = sampler.state_dict()

    def __iter__(self) -> Iterator[list[SampleKey]]:
        self.sampler.load_state_dict(self._start)
        keys = itertools.chain.from_iterable(self._epochs())
        batches = iter(lambda: list(itertools.islice(keys, self.sampler.batch_size)), [])
        return itertools.islice(batches, self.num_batches)

    def _epochs(self) -> Iterator[TrainingSampler]:
        while True:
            yield self.sampler
            self.sampler.set_epoch(self.sampler.epoch + 1)


class ValidationSampler(_RankSampler[int]):
    """A `DistributedSampler` that pads nothing: over all ranks, each image comes exactly once.

    Rank r takes r, r + num_replicas, ... Where the images cannot be divided evenly, ranks get
    different numbers of them, some perhaps none.

    Args:
        dataset: Anything with a length, in images.
        num_replicas: Number of processes; None: of the process group, 1 without one.
        rank: Of this process; None: in the process group, 0 without one.
        shuffle: In an order drawn from (seed, epoch), instead of the dataset's.
        seed: The same on all ranks.
    """

    def __init__(
        self,
        dataset: Sized,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle, seed)
        # The base class pads up to `total_size` and gives each rank `num_samples`.
        self.total_size = len(dataset)
        self.num_samples = len(range(self.rank, self.total_size, self.num_replicas))
