"""IoU against the number of clicks, summed up: means, clicks needed, and changes with intervals.

An object's scores after each click are the columns `iou_clicks_box`, for clicks after a box, and
`iou_clicks_point`, for clicks alone, of `EvaluatedObjects`; they are empty where no clicks were
wanted.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samft.evaluation.clicks import clicks_needed
from samft.evaluation.evaluator import EvaluatedObjects
from samft.evaluation.object_scores import mean_change

Floats = NDArray[np.float64]

TARGETS = {"85": 0.85, "90": 0.90}  # IoU that clicks are counted to


@dataclass(frozen=True)
class CurveStart:
    """What an object is prompted with before it is corrected.

    Attributes:
        name: Of its columns in `EvaluatedObjects`.
        label: Of it, for a person.
        first: Clicks that led to the first mask.
    """

    name: str
    label: str
    first: int

    def ious(self, objects: EvaluatedObjects) -> Floats:
        """The IoU of K objects, float64 [K, R]; [K, 0] where no clicks were wanted."""
        return np.asarray(getattr(objects, f"iou_clicks_{self.name}"))

    def boundary_ious(self, objects: EvaluatedObjects) -> Floats:
        """The boundary IoU, the same."""
        return np.asarray(getattr(objects, f"iou_boundary_clicks_{self.name}"))

    def columns(self, objects: EvaluatedObjects) -> dict[str, list[Any]]:
        """Scores of K objects as columns of a CSV file; empty cells where an IoU is not reached."""
        columns: dict[str, list[Any]] = {}
        for kind, values in (
            ("iou", self.ious(objects)),
            ("iou_boundary", self.boundary_ious(objects)),
        ):
            for column, scores in enumerate(values.T):
                columns[f"{kind}_{self.name}_clicks_{self.first + column}"] = scores.tolist()
        for percent, target in TARGETS.items():
            needed, ever = clicks_needed(self.ious(objects), target, first=self.first)
            columns[f"noc_{percent}_{self.name}"] = [
                count if reached else ""
                for count, reached in zip(needed.tolist(), ever.tolist(), strict=True)
            ]
        return columns


STARTS = (CurveStart("box", "a box", 0), CurveStart("point", "a point", 1))


def has_clicks(objects: EvaluatedObjects) -> bool:
    """Whether objects were corrected by clicks."""
    return objects.iou_clicks_box.ndim == 2 and objects.iou_clicks_box.shape[1] > 0


def summarise_clicks(objects: EvaluatedObjects, *, seed: int) -> dict[str, Any]:
    """The click curves of one model, as plain values for JSON.

    Args:
        objects: K rows, at least one, corrected by clicks.
        seed: Of the intervals.

    Returns:
        For `box` and `point`: `clicks`, the numbers of clicks; for each of them the mean `iou` with
        its `iou_interval` (95 %, see `mean_change`; None with a single image) and the mean
        `boundary_iou`; `noc_85` and `noc_90`, the mean number of clicks needed for an IoU of .85
        and .90, where an object that never gets there counts with all clicks; `never_85` and
        `never_90`, the share of those objects.
    """
    return {start.name: _summarise_curve(objects, start, seed=seed) for start in STARTS}


def _summarise_curve(objects: EvaluatedObjects, start: CurveStart, *, seed: int) -> dict[str, Any]:
    ious = start.ious(objects)
    means = [mean_change(values, objects.image_ids, seed=seed) for values in ious.T]
    summary: dict[str, Any] = {
        "clicks": list(range(start.first, start.first + ious.shape[1])),
        "iou": [mean["difference"] for mean in means],
        "iou_interval": [mean["interval"] for mean in means],
        "boundary_iou": start.boundary_ious(objects).mean(0).tolist(),
    }
    for percent, target in TARGETS.items():
        needed, ever = clicks_needed(ious, target, first=start.first)
        summary[f"noc_{percent}"] = float(needed.mean())
        summary[f"never_{percent}"] = float(1 - ever.mean())
    return summary


def compare_clicks(
    before: EvaluatedObjects, after: EvaluatedObjects, *, seed: int
) -> dict[str, Any]:
    """The change of the click curves from one model to another, on the same K objects.

    Returns:
        For `box` and `point`: `clicks`; `iou` and `boundary_iou`, for each number of clicks the
        mean `difference`, after less before, with its 95 % `interval`; `noc_85` and `noc_90`, the
        same of the clicks needed, of which fewer are better.
    """

    def change(first: NDArray[Any], second: NDArray[Any]) -> dict[str, Any]:
        return mean_change((second - first).astype(np.float64), before.image_ids, seed=seed)

    comparison = {}
    for start in STARTS:
        columns = {"iou": start.ious, "boundary_iou": start.boundary_ious}
        changes: dict[str, Any] = {
            "clicks": list(range(start.first, start.first + start.ious(before).shape[1]))
        }
        for name, column in columns.items():
            pairs = zip(column(before).T, column(after).T, strict=True)
            changes[name] = [change(*pair) for pair in pairs]
        for percent, target in TARGETS.items():
            needed = [
                clicks_needed(start.ious(objects), target, first=start.first)[0]
                for objects in (before, after)
            ]
            changes[f"noc_{percent}"] = change(needed[0], needed[1])
        comparison[start.name] = changes
    return comparison


def click_rows(
    evaluations: list[dict[str, Any]],
) -> Iterator[tuple[str, list[float] | None]]:
    """Rows of the table on the terminal: a label with a score of each model, None in a heading.

    Args:
        evaluations: Of each model, with what `summarise_clicks` returned as `clicks`.
    """
    for start in STARTS:
        curves = [evaluation["clicks"][start.name] for evaluation in evaluations]
        yield f"IoU by clicks, from {start.label}", None
        for column, number in enumerate(curves[0]["clicks"]):
            label = f"{start.label} alone" if number == 0 else describe_clicks(number)
            yield f"  {label}", [curve["iou"][column] for curve in curves]
        for percent in TARGETS:
            for name, label in (("noc", "clicks to IoU"), ("never", "objects never at")):
                values = [curve[f"{name}_{percent}"] for curve in curves]
                yield f"  {label} .{percent}", values


def click_changes(comparison: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Labels and changes after the most clicks, of what `compare_clicks` returned."""
    for start in STARTS:
        changes = comparison[start.name]
        most = describe_clicks(changes["clicks"][-1])
        prompt = f"{start.name}, {most}" if start.first == 0 else most
        yield f"IoU, {prompt}", changes["iou"][-1]


def describe_clicks(number: int) -> str:
    """A number of clicks in words: `1 click`, `2 clicks`."""
    return f"{number} click" if number == 1 else f"{number} clicks"
