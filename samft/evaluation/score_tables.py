"""The numbers of an evaluation, from one row for each object: by size, class and prompt."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samft.evaluation.comparison import LOST_IOU, compare, mean_change
from samft.evaluation.evaluation import OTHER_PROMPTS, EvaluatedObjects

Floats = NDArray[np.float64]

# Areas in pixels of the original image, as COCO has them: from, and below.
SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, float("inf"))}
NUM_BINS = 10
TIE = 0.01  # IoU; a difference that nobody sees
NUM_SHOWN = 10


def summarise(
    objects: EvaluatedObjects, category_ids: NDArray[np.int64], *, names: dict[int, str]
) -> dict[str, Any]:
    """All numbers of one model, as plain values.

    Args:
        objects: K rows, at least one.
        category_ids: int64 [K].
        names: Of the categories, by id.

    Returns:
        `per_mask_iou` first, then spreads, tables and calibration; None is "cannot be said".
    """
    ious = {name: getattr(objects, f"iou_{name}") for name in OTHER_PROMPTS}
    return {
        "per_mask_iou": float(objects.iou_actual.mean()),
        "images": len(np.unique(objects.image_ids)),
        "masks": len(objects),
        "iou": spread(objects.iou_actual),
        "dice": spread(objects.dice),
        "boundary_iou": spread(objects.iou_boundary),
        "box_fill_iou": float(objects.iou_box_fill.mean()),
        "by_size": _by_size(objects),
        "by_category": _by_category(objects, category_ids, names),
        "by_prompt": {
            "box": spread(objects.iou_actual),
            **{name: spread(values) for name, values in ious.items()},
        },
        "calibration": calibration(objects.iou_predicted, objects.iou_actual),
    }


def spread(values: Floats) -> dict[str, float]:
    """Mean, median and 10th percentile of K numbers, K at least 1."""
    return {
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "percentile_10": float(np.percentile(values, 10)),
    }


def _means(objects: EvaluatedObjects) -> dict[str, Any]:
    columns = {
        "iou": objects.iou_actual,
        "dice": objects.dice,
        "boundary_iou": objects.iou_boundary,
        "iou_point": objects.iou_point,
    }
    means = {
        name: float(values.mean()) if len(values) else None for name, values in columns.items()
    }
    return {"masks": len(objects), **means}


def _by_size(objects: EvaluatedObjects) -> dict[str, dict[str, Any]]:
    inside = {
        name: (objects.areas >= least) & (objects.areas < below)
        for name, (least, below) in SIZES.items()
    }
    return {name: _means(objects.take(np.flatnonzero(which))) for name, which in inside.items()}


def _by_category(
    objects: EvaluatedObjects, category_ids: NDArray[np.int64], names: dict[int, str]
) -> list[dict[str, Any]]:
    def rows() -> Iterator[dict[str, Any]]:
        for key in np.unique(category_ids).tolist():
            own = objects.take(np.flatnonzero(category_ids == key))
            yield {"id": key, "name": names[key], **_means(own)}

    return list(rows())


def calibration(predicted: Floats, actual: Floats) -> dict[str, Any]:
    """How far the predicted IoU can be believed.

    Args:
        predicted: float64 [K]; the model's may lie a little outside of 0..1.
        actual: float64 [K].

    Returns:
        `expected_calibration_error`: over bins of equal width, the mean distance of a bin's mean
        prediction from its mean IoU, weighted by its masks. `correlation`: Pearson's; None where
        either does not vary. `bias`: mean prediction less mean IoU. `bins`: those that are not
        empty.

    Source: Guo et al., On Calibration of Modern Neural Networks, 2017, for the error.
    """
    number = np.clip((predicted * NUM_BINS).astype(np.int64), 0, NUM_BINS - 1)
    bins = [
        {
            "from": k / NUM_BINS,
            "to": (k + 1) / NUM_BINS,
            "masks": int((number == k).sum()),
            "predicted": float(predicted[number == k].mean()),
            "actual": float(actual[number == k].mean()),
        }
        for k in np.unique(number).tolist()
    ]
    error = sum(row["masks"] * abs(row["predicted"] - row["actual"]) for row in bins)
    varies = min(np.ptp(predicted), np.ptp(actual)) > 0
    return {
        "expected_calibration_error": error / len(predicted),
        "correlation": float(np.corrcoef(predicted, actual)[0, 1]) if varies else None,
        "bias": float((predicted - actual).mean()),
        "bins": bins,
    }


def summarise_change(
    before: EvaluatedObjects, after: EvaluatedObjects, *, seed: int = 0
) -> dict[str, Any]:
    """What another model changes, object by object.

    Args:
        before: Rows in the order of image and object.
        after: The same; what is not in both is left out.
        seed: Of the bootstrap.

    Returns:
        Differences are after less before. `iou`, `boundary_iou`, `iou_point`: mean `difference`
        and its 95 % `interval`. `wins`, `losses`, `ties`: objects by whether their IoU changed by
        more than `tie`. `lost`: objects that lost over `lost_over`. `most_improved` and
        `most_harmed`: objects with the largest changes, beginning with the largest.
    """
    both = compare(before, after)
    before, after, change = both.before, both.after, both.change
    columns = {"iou": "iou_actual", "boundary_iou": "iou_boundary", "iou_point": "iou_point"}
    intervals = {
        name: mean_change(getattr(after, c) - getattr(before, c), before.image_ids, seed=seed)
        for name, c in columns.items()
    }
    chosen = both.choose(NUM_SHOWN)
    return {
        **intervals,
        "wins": int((change > TIE).sum()),
        "losses": int((change < -TIE).sum()),
        "ties": int((np.abs(change) <= TIE).sum()),
        "tie": TIE,
        "lost": both.num_lost,
        "lost_over": LOST_IOU,
        "most_improved": _named(before, after, chosen["improved"]),
        "most_harmed": _named(before, after, chosen["harmed"]),
    }


def _named(
    before: EvaluatedObjects, after: EvaluatedObjects, which: NDArray[np.int64]
) -> list[dict[str, Any]]:
    columns = zip(
        before.image_ids[which].tolist(),
        before.object_ids[which].tolist(),
        before.iou_actual[which].tolist(),
        after.iou_actual[which].tolist(),
        strict=True,
    )
    names = ("image_id", "object_id", "iou_before", "iou_after")
    return [dict(zip(names, values, strict=True)) for values in columns]
