"""How good each mask is: one row for each, of all ranks, to be sorted and grouped."""

from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

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
    def join(cls: type[Table], parts: list[Table]) -> Table:
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
    return type(scores).join(all_gather(scores))
