"""How good each mask is: one row for each, of all ranks, to be sorted and grouped.

Two models on the same objects: what changed, and whether it could be chance.
"""

from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from samft.data.samplers import RESAMPLE_STREAM, generator_of
from samft.distributed import all_gather

Table = TypeVar("Table", bound="ObjectScores")


@dataclass(frozen=True)
class ObjectScores:
    """One row for each of K masks.

    Attributes:
        image_ids: int64 [K].
        object_ids: int64 [K], of the annotation.
        areas: float64 [K], of the true mask in pixels of the original image.
        iou_actual: float64 [K], with the true mask, at the original resolution.
        iou_predicted: float64 [K], what the model says that its IoU is.
    """

    image_ids: NDArray[np.int64]
    object_ids: NDArray[np.int64]
    areas: NDArray[np.float64]
    iou_actual: NDArray[np.float64]
    iou_predicted: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.object_ids)

    def keys(self) -> NDArray[np.int64]:
        """The ids of each row's image and object, int64 [K, 2]."""
        return np.stack([self.image_ids, self.object_ids], axis=1)

    def take(self: Table, which: NDArray[np.int64]) -> Table:
        """Some of the rows, in the order given."""
        return type(self)(*(getattr(self, field.name)[which] for field in fields(self)))

    def to_json(self) -> dict[str, list[float]]:
        """The columns as plain lists."""
        return {field.name: getattr(self, field.name).tolist() for field in fields(self)}

    @staticmethod
    def from_json(columns: dict[str, list[float]]) -> "ObjectScores":
        """The rows that `to_json` gave.

        Raises:
            KeyError: A column is missing.
        """
        names = [field.name for field in fields(ObjectScores)]
        return ObjectScores(*(np.array(columns[name], dtype=_dtype(name)) for name in names))

    @classmethod
    def concatenate(cls: type[Table], parts: list[Table]) -> Table:
        """The rows of several tables in one, in the order of image, then object."""
        names = [field.name for field in fields(cls)]
        columns = [
            np.concatenate([np.zeros(0, dtype=_dtype(name)), *(getattr(p, name) for p in parts)])
            for name in names
        ]
        joined = cls(*columns)
        return joined.take(np.lexsort((joined.object_ids, joined.image_ids)))


def _dtype(name: str) -> type:
    if name.startswith("rle_"):
        return object
    return np.int64 if name.endswith("_ids") else np.float64


def gather_scores(scores: Table) -> Table:
    """The rows of all ranks, the same on each. Collective: every rank must call."""
    return type(scores).concatenate(all_gather(scores))


LOST_IOU = 0.1  # a loss of more than this is one that a person sees
_SEEN_IOU = 0.005  # less is no change to look at
NUM_RESAMPLES = 10_000
_BLOCK = 2**22  # numbers at once
# By the side of a square of the mask's area, px. 32 and 96 are COCO's bounds of small and large.
_SIDES = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
SIZE_NAMES = (
    f"under {_SIDES[0]} px",
    *(f"{low} to {high} px" for low, high in zip(_SIDES, _SIDES[1:], strict=False)),
    f"over {_SIDES[-1]} px",
)


@dataclass(frozen=True)
class Comparison(Generic[Table]):
    """The same K objects, row for row, as two models are scored on them."""

    before: Table
    after: Table

    @property
    def change(self) -> NDArray[np.float64]:
        """float64 [K], what each object's IoU gained."""
        return self.after.iou_actual - self.before.iou_actual

    @property
    def num_gained(self) -> int:
        """Objects that gained more than `LOST_IOU`."""
        return int((self.change > LOST_IOU).sum())

    @property
    def num_lost(self) -> int:
        """Objects that lost more than `LOST_IOU`."""
        return int((self.change < -LOST_IOU).sum())

    def choose_examples(self, num: int) -> dict[str, NDArray[np.int64]]:
        """Which objects to look at; none is in two of the groups.

        Args:
            num: At most so many in a group.

        Returns:
            Rows of `improved` and `harmed`, the most first, and of those that are the `worst` now.
        """
        change = self.change
        order = np.argsort(change, kind="stable")
        improved = order[::-1][:num]
        harmed = order[:num]
        improved = improved[change[improved] > _SEEN_IOU]
        harmed = harmed[change[harmed] < -_SEEN_IOU]
        worst = np.argsort(self.after.iou_actual, kind="stable")
        worst = worst[~np.isin(worst, np.concatenate([improved, harmed]))][:num]
        return {"improved": improved, "worst": worst, "harmed": harmed}


@dataclass(frozen=True)
class GroupMeans:
    """Some of the objects of a comparison, and their mean IoU before and after."""

    name: str
    num_objects: int
    before: float
    after: float


def compare_objects(before: Table, after: Table) -> Comparison[Table]:
    """Pairs the rows of the objects that are in both tables, in the order of image and object."""
    keys = np.concatenate([before.keys(), after.keys()])
    _, numbers = np.unique(keys, axis=0, return_inverse=True)
    ours, theirs = np.split(numbers, [len(before)])
    _, first, second = np.intersect1d(ours, theirs, return_indices=True)
    return Comparison(before.take(first), after.take(second))


def mean_by_group(
    comparison: Comparison[ObjectScores], labels: NDArray[np.int64], names: list[str]
) -> list[GroupMeans]:
    """Means of groups of objects; groups without any are left out.

    Args:
        comparison: K objects.
        labels: int64 [K], the group of each, as an index into `names`.
        names: Of the groups.
    """
    counts = np.bincount(labels, minlength=len(names))
    means = [
        np.bincount(labels, weights=rows.iou_actual, minlength=len(names)) / np.maximum(counts, 1)
        for rows in (comparison.before, comparison.after)
    ]
    columns = (names, counts.tolist(), *(mean.tolist() for mean in means))
    return [GroupMeans(*row) for row in zip(*columns, strict=True) if row[1]]


def mean_by_size(comparison: Comparison[ObjectScores]) -> list[GroupMeans]:
    """Means of objects of like size, the smallest first."""
    edges = np.square(_SIDES)
    labels = np.searchsorted(edges, comparison.before.areas, side="right")
    return mean_by_group(comparison, labels, list(SIZE_NAMES))


def mean_change(
    change: NDArray[np.float64], image_ids: NDArray[np.int64], *, seed: int
) -> dict[str, Any]:
    """The mean of K numbers, and between what it may lie on other images of the same kind.

    Objects of one image are alike, so whole images are drawn anew, with replacement, and not single
    objects; the mean is over objects.

    Args:
        change: float64 [K].
        image_ids: int64 [K].
        seed: Of the draws.

    Returns:
        `difference`, and `interval`: the 2.5th and 97.5th percentile of the mean; None with a
        single image, which says nothing about others.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993: the percentile interval,
    of clusters.
    """
    _, image = np.unique(image_ids, return_inverse=True)
    sums, counts = np.bincount(image, weights=change), np.bincount(image)
    difference, num_images = float(change.mean()), len(counts)
    if num_images < 2:
        return {"difference": difference, "interval": None}
    generator = generator_of(RESAMPLE_STREAM, seed)
    block = max(1, _BLOCK // num_images)
    means = []
    for start in range(0, NUM_RESAMPLES, block):
        size = (min(block, NUM_RESAMPLES - start), num_images)
        drawn = generator.integers(num_images, size=size)
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    low, high = np.percentile(np.concatenate(means), (2.5, 97.5)).tolist()
    return {"difference": difference, "interval": [low, high]}
