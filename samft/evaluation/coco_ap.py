"""COCO's average precision of masks that were prompted by boxes, through COCOeval.

Each object gives one result, of its own class, with the predicted IoU as its score. So nothing is
missed or found twice, and AP says how good masks are and whether their scores order them rightly.
"""

import contextlib
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samft.coco.entries import CROWD
from samft.coco.segmentation import decode_cropped, encode_cropped
from samft.coco.subset import CocoSubset
from samft.errors import ConfigError
from samft.evaluation.evaluator import EvaluatedObjects

BACKENDS = ("pycocotools", "faster_coco_eval")
USUAL_MAX_DETS = 100  # of a class in an image; COCOeval's default
_SIZES = ("small", "medium", "large")  # in the order of COCOeval's area ranges, after all


def category_ids_of(subset: CocoSubset, object_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """The category id of each object, int64 [K]."""
    known = subset.index.object_ids[subset.objects]
    order = np.argsort(known)
    rows = order[np.searchsorted(known, object_ids, sorter=order)]
    return np.asarray(subset.index.categories[subset.objects[rows]])


def coco_results(
    objects: EvaluatedObjects, category_ids: NDArray[np.int64]
) -> list[dict[str, Any]]:
    """The masks in COCO's format of results, as `COCO.loadRes` reads it.

    Args:
        objects: K of them.
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


def coco_truth(objects: EvaluatedObjects, subset: CocoSubset) -> dict[str, Any]:
    """The true masks of objects, and the crowds in their images, as a COCO file's content.

    COCOeval takes annotation id 0 for "no match", so ids are given anew, from 1. Areas are those of
    the masks, because what files say is now the mask's, now the box's.

    Args:
        objects: What has been evaluated.
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
    entries = [(*values, 0) for values in columns] + _crowds(subset, sizes)
    names = ("image_id", "category_id", "segmentation", "area", "iscrowd")
    return {
        "images": [{"id": key, "height": h, "width": w} for key, (h, w) in sizes.items()],
        "categories": [{"id": key, "name": n} for key, n in subset.index.category_names.items()],
        "annotations": [
            {"id": number, **dict(zip(names, entry, strict=True))}
            for number, entry in enumerate(entries, start=1)
        ],
    }


def _crowds(subset: CocoSubset, sizes: dict[int, list[int]]) -> list[tuple[Any, ...]]:
    # A mask that fits no object better but lies in a crowd is not held against the model.
    index, entries = subset.index, []
    for row in np.flatnonzero(index.flags & CROWD).tolist():
        image_row = int(np.searchsorted(index.first_object, row, side="right")) - 1
        image_id = int(index.image_ids[image_row])
        if image_id not in sizes:
            continue
        height, width = sizes[image_id]
        crop = decode_cropped(index.segmentations[row], height, width)
        if crop.mask.size:
            rle = encode_cropped(crop, height=height, width=width)
            entries.append((image_id, int(index.categories[row]), rle, float(crop.mask.sum()), 1))
    return entries


def average_precision(
    truth: dict[str, Any], results: list[dict[str, Any]], *, backend: str = BACKENDS[0]
) -> dict[str, Any]:
    """COCO's AP, AP50, AP75 and AP by size.

    COCOeval looks at no more than 100 results of a class in an image. Where an image has more
    objects of a class than that, the limit is raised to what it has; else the numbers are those
    that COCOeval prints.

    Args:
        truth: From `coco_truth`.
        results: From `coco_results`.
        backend: One of `BACKENDS`; they give the same numbers.

    Returns:
        `ap`, `ap50`, `ap75`, `ap_small`, `ap_medium`, `ap_large` (None where there is no such
        object), and the `max_dets` that was needed.

    Raises:
        ConfigError: The backend is not installed.
    """
    coco_class, eval_class = load_backend(backend)
    most = max(np.unique([_group(result) for result in results], axis=0, return_counts=True)[1])
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools tells its progress
        coco = coco_class()
        coco.dataset = truth
        coco.createIndex()
        # It writes into the results that it is given.
        evaluation = eval_class(coco, coco.loadRes([dict(result) for result in results]), "segm")
        evaluation.params.maxDets = [1, 10, max(USUAL_MAX_DETS, int(most))]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = np.asarray(evaluation.eval["precision"])[..., -1]  # [T, R, K, A]
    thresholds = np.asarray(evaluation.params.iouThrs)
    scores = {"ap": _mean(precision[..., 0])}
    for percent in (50, 75):
        at = np.isclose(thresholds, percent / 100)
        scores[f"ap{percent}"] = _mean(precision[at][..., 0])
    for area, name in enumerate(_SIZES, start=1):
        scores[f"ap_{name}"] = _mean(precision[..., area])
    return {**scores, "max_dets": evaluation.params.maxDets[-1], "backend": backend}


def _group(result: dict[str, Any]) -> tuple[int, int]:
    return result["image_id"], result["category_id"]


def _mean(precision: NDArray[np.float64]) -> float | None:
    known = precision[precision > -1]  # -1 where there is no object
    return float(known.mean()) if known.size else None


def load_backend(backend: str) -> tuple[Any, Any]:
    """The classes COCO and COCOeval of one of `BACKENDS`.

    Raises:
        ConfigError: It is not installed.
    """
    if backend == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return COCO, COCOeval
    try:
        import faster_coco_eval
    except ImportError as error:
        raise ConfigError(
            "--ap_backend: faster_coco_eval is not installed: `pip install 'samft[fast-ap]'`, or "
            "leave the flag out."
        ) from error
    return faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster
