"""The numbers of evaluations as lines for a terminal: models side by side."""

from collections.abc import Iterator
from typing import Any

from samft.evaluation.coco_ap import USUAL_MAX_DETS
from samft.evaluation.score_tables import SIZES

MOST_CLASSES = 12
MOST_OBJECTS = 5
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


def sheet(evaluations: list[dict[str, Any]], *, data: str) -> list[str]:
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
    shown = rows[:MOST_CLASSES]
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
        for k, row in enumerate(comparison[name][:MOST_OBJECTS]):
            lines.append(
                f"  {name.replace('_', ' ') if k == 0 else '':<18}"
                f"{row['iou_before']:.3f} -> {row['iou_after']:.3f}   object {row['object_id']}"
                f" ({row['category']}) in {row['file_name']}"
            )
    return lines
