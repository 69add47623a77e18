"""Which images come when: samplers that any number of processes share and resume.

What a step consists of depends on the seed and the number of images in a step only: not on workers,
processes, accumulation or restarts.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

# First word of a seed, so that no two streams of random numbers are the same.
_ORDER_STREAM, _REPEAT_STREAM, SAMPLE_STREAM, PROMPT_STREAM, RESAMPLE_STREAM = 1, 3, 2, 4, 5
_WORD = 2**64 - 1

Key = tuple[int, int, int]  # epoch, image (its row in the index), which copy of it in that epoch


def generator_of(*words: int) -> np.random.Generator:
    """A random generator of its own for each tuple of whole numbers."""
    seed = np.random.SeedSequence([word & _WORD for word in words])
    return np.random.Generator(np.random.Philox(seed))


def repeat_factors(
    images: NDArray[np.integer],
    categories: NDArray[np.integer],
    *,
    num_images: int,
    threshold: float,
) -> NDArray[np.float64]:
    """How often each image should come in an epoch so that rare classes are seen more often.

    A category in a share f of the images asks for max(1, sqrt(threshold / f)) repeats; an image is
    repeated as the rarest of its categories asks.

    Args:
        images: [K], the image of each object.
        categories: [K], the category of each object.
        num_images: N.
        threshold: Categories in a smaller share of the images than this are repeated.

    Returns:
        [N], each at least 1; 1 for an image without objects.

    Source: repeat-factor sampling of LVIS, https://arxiv.org/abs/1908.03195, appendix B.2.
    """
    _, category = np.unique(categories, return_inverse=True)
    pairs = np.unique(np.stack([images, category]), axis=1)  # an image counts once for a category
    shares = np.bincount(pairs[1]) / num_images
    repeats = np.ones(num_images)
    np.maximum.at(repeats, pairs[0], np.sqrt(threshold / shares)[pairs[1]])
    return repeats


@dataclass(eq=False, kw_only=True)
class StepSampler(Sampler[list[Key]]):
    """The micro-batches of one process, as lists of keys, for a loader's `batch_sampler`.

    All processes read one endless stream. An epoch has n places: each image once or, with
    `repeats`, as often as that says, in an order drawn from (seed, epoch). Position p of the stream
    is place p % n of epoch p // n. A step takes the next world_size * batch_size * accumulate_steps
    positions, so it is made of the same images however that product comes about.
    """

    num_images: int
    batch_size: int = 1  # images per process per micro-batch
    accumulate_steps: int = 1  # micro-batches per step
    start_step: int = 0  # steps that are done already
    steps: int | None = None  # the step to end before; None goes on for ever
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    repeats: NDArray[np.floating] | None = None  # [num_images], each at least 1

    def __post_init__(self) -> None:
        self._order = functools.lru_cache(maxsize=2)(self._draw_order)

    @property
    def epoch_length(self) -> int:
        """Places in an epoch."""
        if self.repeats is None:
            return self.num_images
        # A sum that is whole but for rounding is that whole number.
        return int(np.ceil(np.sum(self.repeats) - 1e-6))

    def __iter__(self) -> Iterator[list[Key]]:
        ahead = itertools.count(self.start_step)
        for step in ahead if self.steps is None else range(self.start_step, self.steps):
            for micro in range(self.accumulate_steps):
                shard = (step * self.accumulate_steps + micro) * self.world_size + self.rank
                first = shard * self.batch_size
                yield [self._at(position) for position in range(first, first + self.batch_size)]

    def _at(self, position: int) -> Key:
        epoch, place = divmod(position, self.epoch_length)
        image, copy = self._order(epoch)[place].tolist()
        return epoch, image, copy

    def _draw_order(self, epoch: int) -> NDArray[np.int64]:
        # [n, 2]: image and copy.
        order = generator_of(_ORDER_STREAM, self.seed, epoch).permutation(self.epoch_length)
        if self.repeats is None:
            return np.stack([order, np.zeros_like(order)], axis=1)
        # Systematic sampling: one random offset, then equal strides through the sum of repeats, so
        # that each image comes floor or ceil of what it asks for times.
        offset = generator_of(_REPEAT_STREAM, self.seed, epoch).random()
        ends = np.cumsum(self.repeats)
        ends *= self.epoch_length / ends[-1]
        images = np.searchsorted(ends, np.arange(self.epoch_length) + offset, side="right")
        images = np.minimum(images, self.num_images - 1)
        copies = np.arange(self.epoch_length) - np.searchsorted(images, images)
        return np.stack([images, copies], axis=1)[order]


class ShardSampler(Sampler[int]):
    """Every image exactly once over all processes: rank r takes r, r + world_size, ...

    Processes get unequal numbers where n does not divide, some of them none: nothing is padded.
    """

    def __init__(self, num_images: int, *, rank: int = 0, world_size: int = 1) -> None:
        self.rows = range(rank, num_images, world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)
