"""Rows of scores for tests of tables."""

from dataclasses import fields

import numpy as np

from samft.evaluation.evaluator import EvaluatedObjects


def rows_of(
    ious: list[float],
    *,
    images: list[int] | None = None,
    clicks: dict[str, list[list[float]]] | None = None,
) -> EvaluatedObjects:
    """Objects with these IoUs, and with those after each click, from `box` and `point`."""
    count = len(ious)
    values = {field.name: np.zeros(count) for field in fields(EvaluatedObjects)}
    for start in ("box", "point"):
        curve = np.array((clicks or {}).get(start, [[]] * count))
        values |= {f"iou_clicks_{start}": curve, f"iou_boundary_clicks_{start}": curve / 2}
    values["image_ids"] = np.array(images or range(count))
    values["object_ids"] = np.arange(count) + 100
    values["iou_actual"] = np.array(ious)
    return EvaluatedObjects(**values)
