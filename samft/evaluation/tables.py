"""The summary of an evaluation, from one row per object, and its tables for a terminal.

`summarise_scores` computes the numbers of one model: by size, class and prompt.
`summarise_comparison` compares two models, and `format_tables` prints one or several of them in
columns.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samft.evaluation.automatic import automatic_changes, automatic_rows
from samft.evaluation.click_curves import (
    click_changes,
    click_rows,
    compare_clicks,
    has_clicks,
    summarise_clicks,
)
from samft.evaluation.coco_ap import USUAL_MAX_DETS
from samft.evaluation.evaluator import OTHER_PROMPTS, EvaluatedObjects
from samft.evaluation.object_scores import (
    LOST_IOU,
    compare_objects,
    describe_against_box_fill,
    describe_share,
    mean_change,
)

Floats = NDArray[np.float64]

# COCO's ranges of the mask's area, in pixels of the original image: from, and below.
SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, float("inf"))}
NUM_BINS = 10  # of the calibration
TIE = 0.01  # IoU; changes up to this count as ties
NUM_SHOWN = 10  # most improved and most harmed objects in the JSON
MAX_CLASSES_SHOWN = 12  # on the terminal
MAX_OBJECTS_SHOWN = 5  # on the terminal, of each kind

_LABEL_WIDTH, _CHANGE_WIDTH = 36, 21  # characters
_PROMPT_LABELS = {
    "box": "box as annotated",
    "jitter_5": "box, sides off by up to 5 %",
    "jitter_10": "box, sides off by up to 10 %",
    "jitter_20": "box, sides off by up to 20 %",
    "point": "one point at the centre",
    "point_multimask": "  the best of three masks for it",
}
_LINE_COLUMNS = {  # of a table of averages
    "per_mask_iou": "IoU",
    "boundary_iou": "boundary",
    "iou_jitter_10": "box +-10%",
    "iou_point": "point",
    "objects_harmed": "harmed",
    "general_per_mask_iou": "general",
}
_AP_LABELS = {
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_small": "AP small",
    "ap_medium": "AP medium",
    "ap_large": "AP large",
}


def summarise_scores(
    objects: EvaluatedObjects,
    category_ids: NDArray[np.int64],
    *,
    names: dict[int, str],
    seed: int = 0,
) -> dict[str, Any]:
    """The scores of one model, as plain values for JSON.

    Args:
        objects: K rows, at least one.
        category_ids: int64 [K].
        names: Of the categories, by id.
        seed: Of the intervals of click curves.

    Returns:
        `per_mask_iou` first, then `summary_statistics` of each score, means by size, class and
        prompt, `calibration`, and, of objects that were corrected by clicks, `clicks` (see
        `summarise_clicks`); None where there is no such object.
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
        "masks_above_box_fill": objects.num_above_box_fill,
        "by_size": _means_by_size(objects),
        "by_category": _means_by_category(objects, category_ids, names),
        "by_prompt": {
            "box": summary_statistics(objects.iou_actual),
            **{name: summary_statistics(values) for name, values in ious.items()},
        },
        "calibration": calibration(objects.iou_predicted, objects.iou_actual),
        **({"clicks": summarise_clicks(objects, seed=seed)} if has_clicks(objects) else {}),
    }


def summarise_line(
    weights: Sequence[float],
    tables: Sequence[EvaluatedObjects],
    general: Sequence[EvaluatedObjects] = (),
) -> list[dict[str, float]]:
    """The scores of averages of two models, A and B.

    Args:
        weights: Of B in each average; the first is 0, A itself, since which objects are harmed.
        tables: Of each average.
        general: The same on a general set, if there is one.

    Returns:
        Of each average its `weight`, and scores by the keys of `_LINE_COLUMNS`.
    """
    points = [
        {
            "weight": weight,
            "per_mask_iou": float(objects.iou_actual.mean()),
            "boundary_iou": float(objects.iou_boundary.mean()),
            "iou_jitter_10": float(objects.iou_jitter_10.mean()),
            "iou_point": float(objects.iou_point.mean()),
            "objects_harmed": compare_objects(tables[0], objects).num_lost,
        }
        for weight, objects in zip(weights, tables, strict=True)
    ]
    for point, objects in zip(points, general, strict=bool(general)):
        point["general_per_mask_iou"] = float(objects.iou_actual.mean())
        point["general_objects_harmed"] = compare_objects(general[0], objects).num_lost
    return points


def format_line(points: Sequence[dict[str, float]], best: int) -> list[str]:
    """A table of averages for a terminal, and what its columns mean.

    Args:
        points: From `summarise_line`.
        best: The position of the one that is written.
    """
    names = [name for name in _LINE_COLUMNS if name in points[0]]
    lines = [f"{'share of B':10}" + "".join(f"{_LINE_COLUMNS[name]:>10}" for name in names)]
    for number, point in enumerate(points):
        texts = (f"{point[name]:.4f}" if "iou" in name else f"{point[name]}" for name in names)
        mark = "  best" if number == best else ""
        lines.append(f"{point['weight']:<10g}" + "".join(f"{text:>10}" for text in texts) + mark)
    lines += ["", "harmed: objects whose IoU is more than .1 lower than with A"]
    if "general_per_mask_iou" in names:
        first, chosen, last = (points[k]["general_per_mask_iou"] for k in (0, best, -1))
        lines.append(
            f"general: IoU on the general set, which chooses none: {first:.4f} with A, {last:.4f} "
            f"with B, {chosen:.4f} with the best ({chosen - first:+.4f} since A; harmed "
            f"{points[best]['general_objects_harmed']})"
        )
    return lines


def summary_statistics(values: Floats) -> dict[str, float]:
    """Mean, median and 10th percentile of K numbers, K > 0."""
    return {
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "percentile_10": float(np.percentile(values, 10)),
    }


def _mean_scores(objects: EvaluatedObjects) -> dict[str, Any]:
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


def _means_by_size(objects: EvaluatedObjects) -> dict[str, dict[str, Any]]:
    inside = {
        name: (objects.areas >= least) & (objects.areas < below)
        for name, (least, below) in SIZES.items()
    }
    return {
        name: _mean_scores(objects.take(np.flatnonzero(which))) for name, which in inside.items()
    }


def _means_by_category(
    objects: EvaluatedObjects, category_ids: NDArray[np.int64], names: dict[int, str]
) -> list[dict[str, Any]]:
    return [
        {
            "id": category_id,
            "name": names[category_id],
            **_mean_scores(objects.take(np.flatnonzero(category_ids == category_id))),
        }
        for category_id in np.unique(category_ids).tolist()
    ]


def calibration(predicted: Floats, actual: Floats) -> dict[str, Any]:
    """Calibration of the predicted IoU: how well it agrees with the actual one.

    Args:
        predicted: float64 [K]; may lie a little outside of 0..1.
        actual: float64 [K].

    Returns:
        `expected_calibration_error`: over bins of equal width, the mean difference between a bin's
        mean prediction and its mean IoU, weighted by its number of masks. `correlation`:
        Pearson's; None if either is constant. `bias`: mean prediction less mean IoU. `bins`: those
        that are not empty.

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
    """Compares two models, object by object, as plain values for JSON.

    Args:
        before: Scores of the first model.
        after: Scores of the second; objects that are not in both are left out.
        seed: Of the bootstrap.

    Returns:
        Differences are after less before. `iou`, `boundary_iou`, `iou_point`,
        `iou_point_multimask`: mean `difference` and its 95 % `interval`; `clicks` the same, see
        `compare_clicks`, if both were corrected by clicks. `wins`, `losses`, `ties`: how many
        objects gained or lost more than `tie`, or neither. `lost`: how many lost more than
        `lost_over`. `most_improved` and `most_harmed`: the objects with the largest changes, the
        largest first.
    """
    comparison = compare_objects(before, after)
    before, after, change = comparison.before, comparison.after, comparison.change
    columns = {"iou": "iou_actual", "boundary_iou": "iou_boundary"}
    columns |= {name: name for name in ("iou_point", "iou_point_multimask")}
    intervals = {
        name: mean_change(
            getattr(after, column) - getattr(before, column), before.image_ids, seed=seed
        )
        for name, column in columns.items()
    }
    if has_clicks(before) and has_clicks(after):
        intervals["clicks"] = compare_clicks(before, after, seed=seed)
    examples = comparison.choose_examples(NUM_SHOWN)
    return {
        **intervals,
        "wins": int((change > TIE).sum()),
        "losses": int((change < -TIE).sum()),
        "ties": int((np.abs(change) <= TIE).sum()),
        "tie": TIE,
        "lost": comparison.num_lost,
        "lost_over": LOST_IOU,
        "most_improved": _iou_changes(before, after, examples["improved"]),
        "most_harmed": _iou_changes(before, after, examples["harmed"]),
    }


def _iou_changes(
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


def format_tables(evaluations: list[dict[str, Any]], *, data: str) -> list[str]:
    """The tables that `samft.evaluate` prints, as lines; models are columns A, B, ...

    Args:
        evaluations: Of each checkpoint: `summarise_scores` with `checkpoint`, `model_type`,
            `image_size`, `resize_mode` and `coco` (`coco_ap.average_precision`); from the second
            on with a `comparison` with the first.
        data: Name of the dataset, for the heading.
    """
    first, letters = evaluations[0], [chr(ord("A") + k) for k in range(len(evaluations))]
    has_several = len(evaluations) > 1
    lines = [f"{data}: {first['images']:,} images, {first['masks']:,} masks", ""]
    for letter, evaluation in zip(letters, evaluations, strict=True):
        model = "{model_type}, {image_size} px, {resize_mode}".format(**evaluation)
        prefix = f"{letter}  " if has_several else ""
        lines.append(f"{prefix}{evaluation['checkpoint']} ({model})")
        lines += [f"{' ' * len(prefix)}{line}" for line in _verdict_lines(evaluation)]
    heads = [*letters, *(f"{letter} - A" for letter in letters[1:])] if has_several else [""]
    lines += ["", _format_line("", heads)] if has_several else [""]
    for label, values in _score_rows(evaluations):
        lines.append(label if values is None else _format_line(label, _format_cells(values)))
    lines += ["", *_class_lines(evaluations, heads)]
    if not has_several:
        lines += _calibration_lines(first["calibration"])
    for letter, evaluation in zip(letters[1:], evaluations[1:], strict=True):
        lines += ["", *_comparison_lines(evaluation["comparison"], letter)]
    return lines


def _verdict_lines(evaluation: dict[str, Any]) -> list[str]:
    iou = evaluation["per_mask_iou"]
    share = describe_share(evaluation["masks_above_box_fill"], evaluation["masks"])
    return [
        f"IoU {iou:.4f}, {describe_against_box_fill(iou, evaluation['box_fill_iou'])}",
        f"better than their filled boxes are {share}",
    ]


def _format_line(label: str, cells: list[str]) -> str:
    return (f"{label:<{_LABEL_WIDTH}}" + "".join(f"{cell:>9}" for cell in cells)).rstrip()


def _format_cells(scores: list[float | None]) -> list[str]:
    # The score of each model, then the difference of each further model from the first.
    first = scores[0]
    values = ["-" if score is None else f"{score:.4f}" for score in scores]
    differences = [
        "-" if score is None or first is None else f"{score - first:+.4f}" for score in scores[1:]
    ]
    return values + differences


def _score_rows(evaluations: list[dict[str, Any]]) -> Iterator[tuple[str, list[Any] | None]]:
    # A row is a label with one score per model, or with None where it is a heading.
    def scores_at(*path: str) -> list[Any]:
        values: list[Any] = evaluations
        for key in path:
            values = [value[key] for value in values]
        return values

    yield "IoU, mean over masks", scores_at("iou", "mean")
    yield "  median", scores_at("iou", "median")
    yield "  10th percentile", scores_at("iou", "percentile_10")
    yield "Dice", scores_at("dice", "mean")
    yield "boundary IoU", scores_at("boundary_iou", "mean")
    yield "IoU of filling each box", scores_at("box_fill_iou")
    yield "IoU by size, pixels", None
    for name, (least, below) in SIZES.items():
        span = f"{least:,} to {below:,}" if below < float("inf") else f"{least:,} and more"
        masks = evaluations[0]["by_size"][name]["masks"]
        yield f"  {name}, {span} ({masks:,})", scores_at("by_size", name, "iou")
    yield "IoU by prompt", None
    for name, label in _PROMPT_LABELS.items():
        yield f"  {label}", scores_at("by_prompt", name, "mean")
    if all("clicks" in evaluation for evaluation in evaluations):
        yield from click_rows(evaluations)
    if all("automatic" in evaluation for evaluation in evaluations):
        yield from automatic_rows(evaluations)
    limit = evaluations[0]["coco"]["max_dets"]
    more = f", {limit} of a class in an image" if limit > USUAL_MAX_DETS else ""
    yield f"COCO AP of masks from boxes{more}", None
    for name, label in _AP_LABELS.items():
        yield f"  {label}", scores_at("coco", name)
    yield "predicted IoU", None
    yield "  mean error of calibration", scores_at("calibration", "expected_calibration_error")
    yield "  correlation with the actual IoU", scores_at("calibration", "correlation")


def _class_lines(evaluations: list[dict[str, Any]], heads: list[str]) -> list[str]:
    rows = sorted(
        zip(*(evaluation["by_category"] for evaluation in evaluations), strict=True),
        key=lambda row: row[0]["iou"],
    )
    if len(rows) < 2:
        return []
    shown = rows[:MAX_CLASSES_SHOWN]
    which = f", the {len(shown)} worst of {len(rows)}" if len(rows) > len(shown) else ""
    lines = [_format_line(f"IoU by class{which}", heads)]
    for row in shown:
        name = row[0]["name"] if len(row[0]["name"]) <= 22 else f"{row[0]['name'][:21]}~"
        label = f"  {name} ({row[0]['masks']:,})"
        lines.append(_format_line(label, _format_cells([model["iou"] for model in row])))
    return lines


def _calibration_lines(calibration: dict[str, Any]) -> list[str]:
    lines = ["", _format_line("predicted IoU (masks)", ["predicted", "actual"])]
    for row in calibration["bins"]:
        label = f"  {row['from']:.1f} to {row['to']:.1f} ({row['masks']:,})"
        lines.append(_format_line(label, [f"{row[name]:.4f}" for name in ("predicted", "actual")]))
    return lines


def _comparison_lines(comparison: dict[str, Any], letter: str) -> list[str]:
    lines = [f"{letter} against A, on the same objects"]
    labels = {
        "iou": "IoU",
        "boundary_iou": "boundary IoU",
        "iou_point": "IoU from a point",
        "iou_point_multimask": "  best of three",
    }
    changes = [(label, comparison[name]) for name, label in labels.items()]
    changes += click_changes(comparison["clicks"]) if "clicks" in comparison else []
    changes += automatic_changes(comparison["automatic"]) if "automatic" in comparison else []
    for label, change in changes:
        line = f"  {label:<{_CHANGE_WIDTH}}{change['difference']:+.4f}"
        if change["interval"] is not None:
            low, high = change["interval"]
            line += f"   95 % interval {low:+.4f} to {high:+.4f}"
        lines.append(line)
    lines.append(
        f"  better {comparison['wins']:,}, worse {comparison['losses']:,}, within "
        f"{comparison['tie']}: {comparison['ties']:,}; lost over {comparison['lost_over']}: "
        f"{comparison['lost']:,}"
    )
    for name in ("most_improved", "most_harmed"):
        for k, row in enumerate(comparison[name][:MAX_OBJECTS_SHOWN]):
            lines.append(
                f"  {name.replace('_', ' ') if k == 0 else '':<{_CHANGE_WIDTH}}"
                f"{row['iou_before']:.3f} -> {row['iou_after']:.3f}   object {row['object_id']}"
                f" ({row['category']}) in {row['file_name']}"
            )
    return lines
