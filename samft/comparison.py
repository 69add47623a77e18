"""Two validations of the same objects: which of them gained, and which lost."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from samft.scores import ObjectScores

LOST_IOU = 0.1  # a loss of more than this is one that a person sees
_SEEN_IOU = 0.005  # less is no change to look at
# By the side of a square of the mask's area, px. 32 and 96 are COCO's bounds of small and large.
_SIDES = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
SIZE_NAMES = (
    f"under {_SIDES[0]} px",
    *(f"{low} to {high} px" for low, high in zip(_SIDES, _SIDES[1:], strict=False)),
    f"over {_SIDES[-1]} px",
)


@dataclass(frozen=True)
class Comparison:
    """The same K objects, row for row, as two models are scored on them."""

    before: ObjectScores
    after: ObjectScores

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

    def choose(self, num: int) -> dict[str, NDArray[np.int64]]:
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
class Group:
    """Some of the objects of a comparison, and their mean IoU before and after."""

    name: str
    num_objects: int
    before: float
    after: float


def compare(before: ObjectScores, after: ObjectScores) -> Comparison:
    """Pairs the rows of the objects that are in both tables, in the order of image and object."""
    keys = np.concatenate([before.keys(), after.keys()])
    _, numbers = np.unique(keys, axis=0, return_inverse=True)
    ours, theirs = np.split(numbers, [len(before)])
    _, first, second = np.intersect1d(ours, theirs, return_indices=True)
    return Comparison(before.take(first), after.take(second))


def group_by(comparison: Comparison, labels: NDArray[np.int64], names: list[str]) -> list[Group]:
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
    return [Group(*row) for row in zip(*columns, strict=True) if row[1]]


def group_by_size(comparison: Comparison) -> list[Group]:
    """Means of objects of like size, the smallest first."""
    edges = np.square(_SIDES)
    labels = np.searchsorted(edges, comparison.before.areas, side="right")
    return group_by(comparison, labels, list(SIZE_NAMES))
