"""The numbers of an evaluation, from one row for each object: by size, class and prompt.

The numbers of evaluations as lines for a terminal: models side by side.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samft.evaluation.coco_ap import USUAL_MAX_DETS
from samft.evaluation.evaluator import OTHER_PROMPTS, EvaluatedObjects
from samft.evaluation.object_scores import LOST_IOU, compare_objects, mean_change

Floats = NDArray[np.float64]

# Areas in pixels of the original image, as COCO has them: from, and below.
SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, float("inf"))}
NUM_BINS = 10
TIE = 0.01  # IoU; a difference that nobody sees
NUM_SHOWN = 10


def summarise_scores(
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
        "iou": summary_statistics(objects.iou_actual),
        "dice": summary_statistics(objects.dice),
        "boundary_iou": summary_statistics(objects.iou_boundary),
        "box_fill_iou": float(objects.iou_box_fill.mean()),
        "by_size": _by_size(objects),
        "by_category": _by_category(objects, category_ids, names),
        "by_prompt": {
            "box": summary_statistics(objects.iou_actual),
            **{name: summary_statistics(values) for name, values in ious.items()},
        },
        "calibration": calibration(objects.iou_predicted, objects.iou_actual),
    }


def summary_statistics(values: Floats) -> dict[str, float]:
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


def summarise_comparison(
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
    both = compare_objects(before, after)
    before, after, change = both.before, both.after, both.change
    columns = {"iou": "iou_actual", "boundary_iou": "iou_boundary", "iou_point": "iou_point"}
    intervals = {
        name: mean_change(getattr(after, c) - getattr(before, c), before.image_ids, seed=seed)
        for name, c in columns.items()
    }
    chosen = both.choose_examples(NUM_SHOWN)
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


MAX_CLASSES_SHOWN = 12
MAX_OBJECTS_SHOWN = 5
_LABEL = 36

_PROMPTS = {
    "box": "box as annotated",
    "jitter_5": "box, sides off by up to 5 %",
    "jitter_10": "box, sides off by up to 10 %",
    "jitter_20": "box, sides off by up to 20 %",
    "point": "one point at the centre",
}
_AP = {
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_small": "AP small",
    "ap_medium": "AP medium",
    "ap_large": "AP large",
}


def format_tables(evaluations: list[dict[str, Any]], *, data: str) -> list[str]:
    """Everything that is worth reading, as lines.

    Args:
        evaluations: What `evaluation_run` makes of each checkpoint; from the second on with a
            `comparison` with the first.
        data: What was evaluated on.
    """
    first, letters = evaluations[0], [chr(ord("A") + k) for k in range(len(evaluations))]
    several = len(evaluations) > 1
    lines = [f"{data}: {first['images']:,} images, {first['masks']:,} masks", ""]
    for letter, one in zip(letters, evaluations, strict=True):
        mark = f"{letter}  " if several else ""
        model = f"{one['model_type']}, {one['image_size']} px, {one['resize_mode']}"
        lines.append(f"{mark}{one['checkpoint']} ({model})")
    heads = [*letters, *(f"{letter} - A" for letter in letters[1:])] if several else [""]
    lines += ["", _line("", heads)] if several else [""]
    for label, values in _rows(evaluations):
        lines.append(label if values is None else _line(label, _cells(values)))
    lines += ["", *_classes(evaluations, heads)]
    if not several:
        lines += _bins(first["calibration"])
    for letter, one in zip(letters[1:], evaluations[1:], strict=True):
        lines += ["", *_comparison(one["comparison"], letter)]
    return lines


def _line(label: str, cells: list[str]) -> str:
    return (f"{label:<{_LABEL}}" + "".join(f"{cell:>9}" for cell in cells)).rstrip()


def _cells(values: list[float | None]) -> list[str]:
    first = values[0]
    plain = ["-" if value is None else f"{value:.4f}" for value in values]
    changes = [
        "-" if value is None or first is None else f"{value - first:+.4f}" for value in values[1:]
    ]
    return plain + changes


def _rows(evaluations: list[dict[str, Any]]) -> Iterator[tuple[str, list[Any] | None]]:
    def of(*path: str) -> list[Any]:
        values: list[Any] = evaluations
        for key in path:
            values = [value[key] for value in values]
        return values

    yield "IoU, mean over masks", of("iou", "mean")
    yield "  median", of("iou", "median")
    yield "  10th percentile", of("iou", "percentile_10")
    yield "Dice", of("dice", "mean")
    yield "boundary IoU", of("boundary_iou", "mean")
    yield "IoU of filling each box", of("box_fill_iou")
    yield "IoU by size, pixels", None
    for name, (least, below) in SIZES.items():
        span = f"{least:,} to {below:,}" if below < float("inf") else f"{least:,} and more"
        masks = evaluations[0]["by_size"][name]["masks"]
        yield f"  {name}, {span} ({masks:,})", of("by_size", name, "iou")
    yield "IoU by prompt", None
    for name, label in _PROMPTS.items():
        yield f"  {label}", of("by_prompt", name, "mean")
    limit = evaluations[0]["coco"]["max_dets"]
    more = f", {limit} of a class in an image" if limit > USUAL_MAX_DETS else ""
    yield f"COCO AP of masks from boxes{more}", None
    for name, label in _AP.items():
        yield f"  {label}", of("coco", name)
    yield "predicted IoU", None
    yield "  mean error of calibration", of("calibration", "expected_calibration_error")
    yield "  correlation with the actual IoU", of("calibration", "correlation")


def _classes(evaluations: list[dict[str, Any]], heads: list[str]) -> list[str]:
    rows = sorted(
        zip(*(one["by_category"] for one in evaluations), strict=True),
        key=lambda row: row[0]["iou"],
    )
    if len(rows) < 2:
        return []
    shown = rows[:MAX_CLASSES_SHOWN]
    which = f", the {len(shown)} worst of {len(rows)}" if len(rows) > len(shown) else ""
    lines = [_line(f"IoU by class{which}", heads)]
    for row in shown:
        name = row[0]["name"] if len(row[0]["name"]) <= 22 else f"{row[0]['name'][:21]}~"
        label = f"  {name} ({row[0]['masks']:,})"
        lines.append(_line(label, _cells([one["iou"] for one in row])))
    return lines


def _bins(calibration: dict[str, Any]) -> list[str]:
    lines = ["", _line("predicted IoU (masks)", ["predicted", "actual"])]
    for row in calibration["bins"]:
        label = f"  {row['from']:.1f} to {row['to']:.1f} ({row['masks']:,})"
        lines.append(_line(label, [f"{row[name]:.4f}" for name in ("predicted", "actual")]))
    return lines


def _comparison(comparison: dict[str, Any], letter: str) -> list[str]:
    lines = [f"{letter} against A, on the same objects"]
    labels = {"iou": "IoU", "boundary_iou": "boundary IoU", "iou_point": "IoU from a point"}
    for name, label in labels.items():
        found = comparison[name]
        text = f"{found['difference']:+.4f}"
        if found["interval"] is not None:
            low, high = found["interval"]
            text += f"   95 % interval {low:+.4f} to {high:+.4f}"
        lines.append(f"  {label:<18}{text}")
    lines.append(
        f"  better {comparison['wins']:,}, worse {comparison['losses']:,}, within "
        f"{comparison['tie']}: {comparison['ties']:,}; lost over {comparison['lost_over']}: "
        f"{comparison['lost']:,}"
    )
    for name in ("most_improved", "most_harmed"):
        for k, row in enumerate(comparison[name][:MAX_OBJECTS_SHOWN]):
            lines.append(
                f"  {name.replace('_', ' ') if k == 0 else '':<18}"
                f"{row['iou_before']:.3f} -> {row['iou_after']:.3f}   object {row['object_id']}"
                f" ({row['category']}) in {row['file_name']}"
            )
    return lines
