"""Rows of scores for tests of tables."""

from dataclasses import fields

import numpy as np

from samft.evaluation.evaluator import EvaluatedObjects


def rows_of(ious: list[float], *, images: list[int] | None = None) -> EvaluatedObjects:
    count = len(ious)
    values = {field.name: np.zeros(count) for field in fields(EvaluatedObjects)}
    values["image_ids"] = np.array(images or range(count))
    values["object_ids"] = np.arange(count) + 100
    values["iou_actual"] = np.array(ious)
    return EvaluatedObjects(**values)
