"""COCO's average precision of masks prompted with boxes, computed by COCOeval.

Each object gives one result, of its own class, with the predicted IoU as its score. So there are no
missed and no double detections: AP measures how good the masks are, and how well the predicted IoU
ranks them.
"""

import contextlib
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samft.annotations.entries import CROWD
from samft.annotations.segmentation import decode_cropped, encode_cropped
from samft.cli import require_extra
from samft.coco.subset import CocoSubset
from samft.evaluation.evaluator import EvaluatedObjects

BACKENDS = ("pycocotools", "faster_coco_eval")
USUAL_MAX_DETS = 100  # of a class in an image; COCOeval's default
_SIZES = ("small", "medium", "large")  # COCOeval's area ranges, in its order, after "all"


def category_ids_of(subset: CocoSubset, object_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """The category id of each object, int64 [K]."""
    ids = subset.index.object_ids[subset.objects]
    order = np.argsort(ids)
    rows = order[np.searchsorted(ids, object_ids, sorter=order)]
    return np.asarray(subset.index.categories[subset.objects[rows]])


def coco_results(
    objects: EvaluatedObjects, category_ids: NDArray[np.int64]
) -> list[dict[str, Any]]:
    """The masks in COCO's results format, as `COCO.loadRes` reads it.

    Args:
        objects: K evaluated objects.
        category_ids: int64 [K].
    """
    columns = zip(
        objects.image_ids.tolist(),
        category_ids.tolist(),
        objects.rle_predicted,
        objects.iou_predicted.tolist(),
        strict=True,
    )
    names = ("image_id", "category_id", "segmentation", "score")
    return [dict(zip(names, values, strict=True)) for values in columns]


@dataclass(frozen=True)
class TrueObjects:
    """K annotated objects, as columns.

    Attributes:
        image_ids: int64 [K].
        object_ids: int64 [K].
        areas: float64 [K], px.
        rle_true: object [K].
    """

    image_ids: NDArray[np.int64]
    object_ids: NDArray[np.int64]
    areas: NDArray[np.float64]
    rle_true: NDArray[np.object_]


def coco_truth(objects: EvaluatedObjects | TrueObjects, subset: CocoSubset) -> dict[str, Any]:
    """The true masks of objects, and the crowds in their images, as the content of a COCO file.

    Annotations are renumbered from 1, because COCOeval takes annotation id 0 for "no match". Areas
    are recomputed from the masks, because the `area` of some files is that of the box.

    Args:
        objects: The objects.
        subset: The images and objects that were evaluated.
    """
    sizes = {
        image_id: rle["size"]
        for image_id, rle in zip(objects.image_ids.tolist(), objects.rle_true, strict=True)
    }
    columns = zip(
        objects.image_ids.tolist(),
        category_ids_of(subset, objects.object_ids).tolist(),
        objects.rle_true,
        objects.areas.tolist(),
        strict=True,
    )
    entries = [(*values, 0) for values in columns] + _crowd_entries(subset, sizes)
    names = ("image_id", "category_id", "segmentation", "area", "iscrowd")
    return {
        "images": [{"id": key, "height": h, "width": w} for key, (h, w) in sizes.items()],
        "categories": [{"id": key, "name": n} for key, n in subset.index.category_names.items()],
        "annotations": [
            {"id": number, **dict(zip(names, entry, strict=True))}
            for number, entry in enumerate(entries, start=1)
        ],
    }


def _crowd_entries(subset: CocoSubset, sizes: dict[int, list[int]]) -> list[tuple[Any, ...]]:
    # COCOeval does not count a mask that matches no object as wrong if it lies in a crowd.
    index, entries = subset.index, []
    for row in np.flatnonzero(index.flags & CROWD).tolist():
        image_row = int(np.searchsorted(index.first_object, row, side="right")) - 1
        image_id = int(index.image_ids[image_row])
        if image_id not in sizes:
            continue
        height, width = sizes[image_id]
        crop = decode_cropped(index.segmentations[row], (height, width))
        if crop.mask.size:
            rle = encode_cropped(crop, (height, width))
            entries.append((image_id, int(index.categories[row]), rle, float(crop.mask.sum()), 1))
    return entries


def average_precision(
    truth: dict[str, Any], results: list[dict[str, Any]], *, backend: str = BACKENDS[0]
) -> dict[str, Any]:
    """COCO's AP, AP50, AP75 and AP by size.

    COCOeval considers at most 100 results of a class in an image. If an image has more objects of a
    class, the limit is raised to their number; otherwise the numbers are those that COCOeval prints
    itself.

    Args:
        truth: From `coco_truth`.
        results: From `coco_results`.
        backend: One of `BACKENDS`; they give the same numbers.

    Returns:
        `ap`, `ap50`, `ap75`, `ap_small`, `ap_medium`, `ap_large` (None if there is no such object),
        the `max_dets` that was used, and the `backend`.

    Raises:
        ConfigError: The backend is not installed.
    """
    groups = [(result["image_id"], result["category_id"]) for result in results]
    largest_group = np.unique(groups, axis=0, return_counts=True)[1].max()
    most = max(USUAL_MAX_DETS, int(largest_group))
    evaluation = run_cocoeval(truth, results, max_dets=[1, 10, most], backend=backend)
    precision = np.asarray(evaluation.eval["precision"])[..., -1]  # [T, R, K, A]
    thresholds = np.asarray(evaluation.params.iouThrs)
    scores = {"ap": _mean_precision(precision[..., 0])}
    for percent in (50, 75):
        is_threshold = np.isclose(thresholds, percent / 100)
        scores[f"ap{percent}"] = _mean_precision(precision[is_threshold][..., 0])
    for area, name in enumerate(_SIZES, start=1):
        scores[f"ap_{name}"] = _mean_precision(precision[..., area])
    return {**scores, "max_dets": evaluation.params.maxDets[-1], "backend": backend}


def run_cocoeval(
    truth: dict[str, Any],
    results: list[dict[str, Any]],
    *,
    max_dets: list[int],
    backend: str = BACKENDS[0],
) -> Any:
    """Evaluates and accumulates; results may be none at all.

    Args:
        truth: The content of a COCO file.
        results: As `COCO.loadRes` takes them.
        max_dets: Results of a class in an image that count, ascending.
        backend: One of `BACKENDS`.

    Returns:
        The COCOeval.

    Raises:
        ConfigError: The backend is not installed.
    """
    coco_class, eval_class = load_backend(backend)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        coco = coco_class()
        coco.dataset = truth
        coco.createIndex()
        predicted = coco_class()
        predicted.dataset = {**truth, "annotations": []}
        predicted.createIndex()
        if results:
            # Copies, because loadRes adds keys to the results it is given. It takes no empty list.
            predicted = coco.loadRes([dict(result) for result in results])
        evaluation = eval_class(coco, predicted, "segm")
        evaluation.params.maxDets = max_dets
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def _mean_precision(precision: NDArray[np.float64]) -> float | None:
    defined = precision[precision > -1]  # -1 where there is no object
    return float(defined.mean()) if defined.size else None


def load_backend(backend: str) -> tuple[Any, Any]:
    """Imports the classes COCO and COCOeval of one of `BACKENDS`.

    Raises:
        ConfigError: The backend is not installed.
    """
    if backend == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return COCO, COCOeval
    require_extra("fast-ap", what="--ap_backend faster_coco_eval")
    import faster_coco_eval

    return faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster
