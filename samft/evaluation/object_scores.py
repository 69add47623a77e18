"""Scores per object as a table with one row per mask, and the comparison of two such tables.

A table is gathered from all ranks, sorted by image and object. Two models are compared object by
object: which gained, which lost, means of groups, and an interval for the mean change.
"""

import math
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from samft.data.samplers import RESAMPLE_STREAM, generator_of
from samft.distributed import all_gather

Table = TypeVar("Table", bound="ObjectScores")

LOST_IOU = 0.1  # a change of IoU by more than this is visible at a glance
_NO_CHANGE_IOU = 0.005  # a change by less is not worth showing
NUM_RESAMPLES = 10_000  # of the bootstrap
_MAX_DRAWS = 2**22  # random indices in memory at once: 32 MiB
# By the side of a square of the mask's area, px. 32 and 96 are COCO's bounds of small and large.
_SIDES = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
SIZE_NAMES = (
    f"under {_SIDES[0]} px",
    *(f"{low} to {high} px" for low, high in zip(_SIDES, _SIDES[1:], strict=False)),
    f"over {_SIDES[-1]} px",
)


@dataclass(frozen=True)
class ObjectScores:
    """A table with one row for each of K masks.

    Attributes:
        image_ids: int64 [K].
        object_ids: int64 [K], of the annotation.
        areas: float64 [K], of the true mask in pixels of the original image.
        iou_actual: float64 [K], with the true mask, at the original resolution.
        iou_predicted: float64 [K], the model's own estimate of its IoU.
        iou_box_fill: float64 [K], of filling the box, see `metrics.box_fill_ious`.
    """

    image_ids: NDArray[np.int64]
    object_ids: NDArray[np.int64]
    areas: NDArray[np.float64]
    iou_actual: NDArray[np.float64]
    iou_predicted: NDArray[np.float64]
    iou_box_fill: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.object_ids)

    @property
    def num_above_box_fill(self) -> int:
        """Objects whose mask is better than their filled box."""
        return int((self.iou_actual > self.iou_box_fill).sum())

    def keys(self) -> NDArray[np.int64]:
        """Image id and object id of each row, int64 [K, 2]."""
        return np.stack([self.image_ids, self.object_ids], axis=1)

    def take(self: Table, which: NDArray[np.int64]) -> Table:
        """The rows at some indices, int64 [N], in that order."""
        return type(self)(*(getattr(self, field.name)[which] for field in fields(self)))

    def to_json(self) -> dict[str, list[float]]:
        """The columns as plain lists."""
        return {field.name: getattr(self, field.name).tolist() for field in fields(self)}

    @staticmethod
    def from_json(columns: dict[str, list[float]]) -> "ObjectScores":
        """The table from the columns that `to_json` returned.

        Raises:
            ValueError: A column is missing, of another length, or holds something else.
        """
        names = [field.name for field in fields(ObjectScores)]
        try:
            table: list[NDArray[Any]] = [
                np.array(columns[name], dtype=_column_dtype(name)) for name in names
            ]
        except (LookupError, TypeError, OverflowError) as error:
            raise ValueError("no table of scores") from error
        if {column.shape for column in table} != {(len(table[0]),)}:
            raise ValueError("columns of different lengths")
        return ObjectScores(*table)

    @classmethod
    def concatenate(cls: type[Table], parts: list[Table]) -> Table:
        """The rows of several tables in one, sorted by image, then object."""
        names = [field.name for field in fields(cls)]
        # One without rows does not know how many values a row of a column has.
        parts = [part for part in parts if len(part)]
        columns = [
            np.concatenate([getattr(part, name) for part in parts])
            if parts
            else np.zeros(0, _column_dtype(name))
            for name in names
        ]
        table = cls(*columns)
        return table.take(np.lexsort((table.object_ids, table.image_ids)))


def _column_dtype(name: str) -> type:
    if name.startswith("rle_"):
        return object
    return np.int64 if name.endswith("_ids") else np.float64


def gather_scores(scores: Table) -> Table:
    """The rows of all ranks, the same on each. Collective: every rank must call."""
    return type(scores).concatenate(all_gather(scores))


@dataclass(frozen=True)
class Comparison(Generic[Table]):
    """The scores of two models on the same K objects, row for row."""

    before: Table
    after: Table

    @property
    def change(self) -> NDArray[np.float64]:
        """float64 [K], each object's IoU after less before."""
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
        """Chooses objects to show; none is in two of the groups.

        Args:
            num: The most in a group.

        Returns:
            Rows, int64, of the objects that `improved` and that were `harmed`, the largest change
            first, and of the `worst` among the others, the lowest IoU after first.
        """
        change = self.change
        order = np.argsort(change, kind="stable")
        improved = order[::-1][:num]
        harmed = order[:num]
        improved = improved[change[improved] > _NO_CHANGE_IOU]
        harmed = harmed[change[harmed] < -_NO_CHANGE_IOU]
        worst = np.argsort(self.after.iou_actual, kind="stable")
        worst = worst[~np.isin(worst, np.concatenate([improved, harmed]))][:num]
        return {"improved": improved, "worst": worst, "harmed": harmed}


@dataclass(frozen=True)
class GroupMeans:
    """The mean IoU before and after, over a group of the objects of a comparison."""

    name: str
    num_objects: int
    before: float
    after: float


def describe_against_box_fill(iou: float, box_fill_iou: float) -> str:
    """How a mean IoU compares with that of filling each box: no model should be below it.

    Args:
        iou: Of the model's masks.
        box_fill_iou: Of the same objects' filled boxes.

    Returns:
        A phrase that continues a sentence on the model's masks, with both numbers in it.
    """
    difference = iou - box_fill_iou
    if math.isnan(difference):
        return f"not comparable with filling each box ({box_fill_iou:.4f})"
    if difference == 0:
        return f"just as good as filling each box ({box_fill_iou:.4f})"
    where = "above" if difference > 0 else "below"
    return f"{abs(difference):.4f} {where} filling each box ({box_fill_iou:.4f})"


def describe_share(num: int, num_objects: int) -> str:
    """A number of objects among all, with its share in per cent."""
    return f"{num:,} of {num_objects:,} objects ({num / max(num_objects, 1):.0%})"


def compare_objects(before: Table, after: Table) -> Comparison[Table]:
    """Pairs the rows of the objects that are in both tables, in the order of image and object."""
    keys = np.concatenate([before.keys(), after.keys()])
    # One number for each (image id, object id), so that the two can be intersected.
    _, numbers = np.unique(keys, axis=0, return_inverse=True)
    numbers_before, numbers_after = np.split(numbers, [len(before)])
    _, rows_before, rows_after = np.intersect1d(numbers_before, numbers_after, return_indices=True)
    return Comparison(before.take(rows_before), after.take(rows_after))


def mean_by_group(
    comparison: Comparison[ObjectScores], labels: NDArray[np.int64], names: list[str]
) -> list[GroupMeans]:
    """Mean IoU of groups of objects; empty groups are left out.

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
    """Mean IoU by size of the object, the smallest first; see `SIZE_NAMES`."""
    edges = np.square(_SIDES)
    labels = np.searchsorted(edges, comparison.before.areas, side="right")
    return mean_by_group(comparison, labels, list(SIZE_NAMES))


def mean_change(
    change: NDArray[np.float64], image_ids: NDArray[np.int64], *, seed: int
) -> dict[str, Any]:
    """Mean change with a 95 % bootstrap interval that resamples whole images.

    Objects of one image are alike, so images, not objects, are drawn with replacement. The mean is
    over objects.

    Args:
        change: float64 [K], one number per object.
        image_ids: int64 [K].
        seed: Of the bootstrap.

    Returns:
        `difference`, the mean, and `interval`, the 2.5th and 97.5th percentile of the resampled
        means: where it may lie on other images of the same kind. None with a single image, which
        says nothing about others.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993: the percentile interval,
    of clusters.
    """
    _, image = np.unique(image_ids, return_inverse=True)
    sums, counts = np.bincount(image, weights=change), np.bincount(image)
    difference, num_images = float(change.mean()), len(counts)
    if num_images < 2:
        return {"difference": difference, "interval": None}
    generator = generator_of(RESAMPLE_STREAM, seed)
    block = max(1, _MAX_DRAWS // num_images)
    means = []
    for start in range(0, NUM_RESAMPLES, block):
        size = (min(block, NUM_RESAMPLES - start), num_images)
        drawn = generator.integers(num_images, size=size)
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    low, high = np.percentile(np.concatenate(means), (2.5, 97.5)).tolist()
    return {"difference": difference, "interval": [low, high]}
