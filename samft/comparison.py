"""Two models on the same objects: what changed, and whether it could be chance."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from samft.evaluation import EvaluatedObjects
from samft.samplers import RESAMPLE_STREAM, generator_of

NUM_RESAMPLES = 10_000
TIE = 0.01  # IoU; a difference that nobody sees
LOST = 0.1  # IoU; one that hurts
NUM_SHOWN = 10
_BLOCK = 2**22  # numbers at once


def compare(before: EvaluatedObjects, after: EvaluatedObjects, *, seed: int = 0) -> dict[str, Any]:
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
    shared = np.intersect1d(before.object_ids, after.object_ids)
    before, after = (
        one.take(np.flatnonzero(np.isin(one.object_ids, shared))) for one in (before, after)
    )
    change = after.iou_actual - before.iou_actual
    columns = {"iou": "iou_actual", "boundary_iou": "iou_boundary", "iou_point": "iou_point"}
    intervals = {
        name: mean_change(getattr(after, c) - getattr(before, c), before.image_ids, seed=seed)
        for name, c in columns.items()
    }
    order = np.argsort(change, kind="stable")
    worst = order[change[order] < 0][:NUM_SHOWN]
    best = order[::-1][change[order[::-1]] > 0][:NUM_SHOWN]
    return {
        **intervals,
        "wins": int((change > TIE).sum()),
        "losses": int((change < -TIE).sum()),
        "ties": int((np.abs(change) <= TIE).sum()),
        "tie": TIE,
        "lost": int((change < -LOST).sum()),
        "lost_over": LOST,
        "most_improved": _named(before, after, best),
        "most_harmed": _named(before, after, worst),
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


def mean_change(
    change: NDArray[np.float64], image_ids: NDArray[np.int64], *, seed: int
) -> dict[str, Any]:
    """The mean of K numbers, and between what it may lie on other images of the same kind.

    Objects of one image are alike, so whole images are drawn anew, with replacement, and not single
    objects; the mean is over objects.

    Args:
        change: float64 [K].
        image_ids: int64 [K].
        seed: Of the draws.

    Returns:
        `difference`, and `interval`: the 2.5th and 97.5th percentile of the mean; None with a
        single image, which says nothing about others.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993: the percentile interval,
    of clusters.
    """
    _, image = np.unique(image_ids, return_inverse=True)
    sums, counts = np.bincount(image, weights=change), np.bincount(image)
    difference, num_images = float(change.mean()), len(counts)
    if num_images < 2:
        return {"difference": difference, "interval": None}
    generator = generator_of(RESAMPLE_STREAM, seed)
    block = max(1, _BLOCK // num_images)
    means = []
    for start in range(0, NUM_RESAMPLES, block):
        size = (min(block, NUM_RESAMPLES - start), num_images)
        drawn = generator.integers(num_images, size=size)
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    low, high = np.percentile(np.concatenate(means), (2.5, 97.5)).tolist()
    return {"difference": difference, "interval": [low, high]}
