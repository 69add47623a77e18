"""Automatic masks scored against the annotations, whatever their class: which objects they find.

The masks are those of SAM's automatic mask generator, on a sample of images, each scored by its
predicted IoU. COCOeval matches masks and objects, one to one; crowd regions are ignored as it does.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from segment_anything.utils.amg import coco_encode_rle

from samft.annotations.segmentation import encode_cropped
from samft.coco.subset import CocoSubset
from samft.data.dataset import Batch
from samft.data.loaders import lockstep
from samft.data.samplers import SUBSET_STREAM, generator_of
from samft.distributed import all_gather
from samft.errors import explain_out_of_memory
from samft.evaluation.coco_ap import TrueObjects, coco_truth, run_cocoeval
from samft.evaluation.evaluator import MEMORY_ADVICE
from samft.evaluation.object_scores import ObjectScores, mean_change
from samft.evaluation.resampled_ap import RankedMasks, change_of_ap, rank_masks
from samft.evaluation.tiled_masks import generate_in_tiles
from samft.evaluation.validation import describe_image
from samft.models.mask_generator import MaskGenerator
from samft.runtime import heartbeat
from samft.views.regions import DecodedImage
from samft.views.windows import WHOLE, View

FEW, MANY = 100, 1000  # masks of an image that count, those of the highest scores
_ANY_CLASS = 1
_LABELS = {  # in the table, and in a line of changes
    "found_50": ("objects found at IoU .50", "automatic, IoU .50"),
    "found_75": ("objects found at IoU .75", "automatic, IoU .75"),
    "ar_100": (f"AR, {FEW} masks an image", f"automatic AR@{FEW}"),
    "ar_1000": (f"AR, {MANY:,} masks an image", f"automatic AR@{MANY}"),
    "ap": (f"AP, {FEW} masks an image", "automatic AP"),
    "masks_per_image": ("masks an image", "automatic masks"),
}
_OF_OBJECTS = ("ar_100", "ar_1000", "found_50", "found_75")  # means over objects


@dataclass(frozen=True)
class ImageMasks:
    """The automatic masks of one image, and its true ones; masks are COCO's compressed RLE.

    Attributes:
        image_id: In the COCO file.
        masks: M automatic masks.
        scores: [M], predicted IoU.
        seconds: What the generator took.
        object_ids: Of the K annotated objects.
        rle_true: Their masks.
        areas: [K], px.
    """

    image_id: int
    masks: list[dict[str, Any]]
    scores: list[float]
    seconds: float
    object_ids: list[int]
    rle_true: list[dict[str, Any]]
    areas: list[float]


def sample_images(subset: CocoSubset, number: int, *, seed: int) -> CocoSubset:
    """A random sample of images, in their order; a larger one has all of a smaller one's.

    Args:
        subset: All images.
        number: Images to take; all, where there are no more.
        seed: Of the draw.
    """
    order = generator_of(SUBSET_STREAM, seed).permutation(subset.num_images)
    return subset.select(np.sort(order[:number]))


def generate_split(
    generator: MaskGenerator,
    subset: CocoSubset,
    batches: Iterable[Batch],
    *,
    view: View = WHOLE,
    on_image: Callable[[], object] = lambda: None,
) -> list[ImageMasks]:
    """Generates the masks of images. Collective: every rank must call.

    Args:
        generator: Of the model.
        subset: The images.
        batches: This rank's share of them, one per batch, with their true masks.
        view: How images are seen; where it has windows, masks are those of tiles.
        on_image: Called after each image of this rank.

    Returns:
        The images of all ranks that can be read, by image id.

    Raises:
        UserError: An image cannot be read, on any rank.
    """
    rows = {subset.image_id(row): row for row in range(subset.num_images)}
    images = []
    for batch in lockstep(batches):
        heartbeat.set_activity("generating masks of image", partial(list, batch.image_ids))
        if batch.num_masks:  # 0 if the image cannot be read
            row = rows[batch.image_ids[0]]
            with explain_out_of_memory(partial(describe_image, batch), advice=MEMORY_ADVICE):
                image = subset.open_image(row).decode()
                images.append(_generate_image(generator, image, batch, view))
        on_image()
    gathered = [image for images in all_gather(images) for image in images]
    return sorted(gathered, key=lambda image: image.image_id)


def _generate_image(
    generator: MaskGenerator, image: NDArray[np.uint8], batch: Batch, view: View
) -> ImageMasks:
    start = time.monotonic()
    if view.has_windows:
        tiled = generate_in_tiles(generator, DecodedImage(image), view)
        rles, scores = [one.rle for one in tiled], [one.iou_predicted for one in tiled]
    else:
        entries = generator.generate(image)
        rles = [coco_encode_rle(entry["segmentation"]) for entry in entries]
        scores = [entry["predicted_iou"] for entry in entries]
    seconds = time.monotonic() - start
    size = (image.shape[0], image.shape[1])
    return ImageMasks(
        batch.image_ids[0],
        rles,
        scores,
        seconds,
        batch.object_ids.tolist(),
        [encode_cropped(truth, size) for truth in batch.truths],
        [float(truth.mask.sum()) for truth in batch.truths],
    )


@dataclass(frozen=True)
class AutomaticScores:
    """How the automatic masks of one model match the annotations of a sample of N images.

    Attributes:
        images: [N].
        objects: The K annotated ones.
        columns: Of the objects, float64 [K] each. `iou_best`: IoU of the mask that has most in
            common with it, 0 without any. `found_50`: 1 where one of the first `MANY` masks matches
            it at IoU .50; `found_75`: at .75. `ar_100`: the share of COCO's ten IoU thresholds, .50
            to .95, at which one of the first `FEW` masks matches it, so that the mean is COCO's
            average recall; `ar_1000`: of the first `MANY`.
        ranked: For AP.
        coco: `ap`, `ar_100` and `ar_1000` as COCOeval accumulates them.
    """

    images: list[ImageMasks]
    objects: TrueObjects
    columns: dict[str, NDArray[np.float64]]
    ranked: RankedMasks
    coco: dict[str, float]

    @property
    def masks_per_image(self) -> NDArray[np.float64]:
        """How many automatic masks each image has, [N]."""
        return np.array([len(image.masks) for image in self.images], dtype=np.float64)

    def summarise(self) -> dict[str, Any]:
        """The scores as plain values for JSON."""
        return {
            "images": len(self.images),
            "objects": len(self.objects.object_ids),
            **self.coco,
            **{name: float(self.columns[name].mean()) for name in ("found_50", "found_75")},
            "masks_per_image": float(self.masks_per_image.mean()),
            "seconds_per_image": float(np.mean([image.seconds for image in self.images])),
        }


def score_masks(images: list[ImageMasks], subset: CocoSubset) -> AutomaticScores:
    """Matches automatic masks with annotated objects.

    Args:
        images: From `generate_split`, at least one.
        subset: Their crowds are taken from it.
    """
    objects = TrueObjects(
        np.repeat([image.image_id for image in images], [len(i.object_ids) for i in images]),
        np.array([key for image in images for key in image.object_ids], dtype=np.int64),
        np.array([area for image in images for area in image.areas]),
        np.array([rle for image in images for rle in image.rle_true], dtype=object),
    )
    truth = coco_truth(objects, subset)
    for entry in truth["annotations"]:
        entry["category_id"] = _ANY_CLASS
    truth["categories"] = [{"id": _ANY_CLASS, "name": "any"}]
    results = [
        {"image_id": image.image_id, "category_id": _ANY_CLASS, "segmentation": m, "score": score}
        for image in images
        for m, score in zip(image.masks, image.scores, strict=True)
    ]
    evaluation = run_cocoeval(truth, results, max_dets=[FEW, MANY])
    recalls = evaluation.eval["recall"][:, 0, 0].mean(0).tolist()
    precision = float(evaluation.eval["precision"][:, :, 0, 0, 0].mean())
    coco = {"ap": precision, "ar_100": recalls[0], "ar_1000": recalls[1]}
    columns = _match_objects(evaluation, len(objects.object_ids))
    return AutomaticScores(images, objects, columns, rank_masks(evaluation, most=FEW), coco)


def _match_objects(evaluation: Any, num_objects: int) -> dict[str, NDArray[np.float64]]:
    names = ("iou_best", "found_50", "found_75", "ar_100", "ar_1000")
    columns = {name: np.zeros(num_objects) for name in names}
    places = [int(np.abs(evaluation.params.iouThrs - iou).argmin()) for iou in (0.5, 0.75)]
    for image_id, entry in zip(evaluation.params.imgIds, evaluation.evalImgs, strict=False):
        ids, is_crowd = np.array(entry["gtIds"]), np.array(entry["gtIgnore"]) > 0
        # `coco_truth` numbers the objects from 1, and the crowds after them.
        rows = ids[~is_crowd] - 1
        few, many = (
            np.stack([np.isin(ids[~is_crowd], row[:most]) for row in entry["dtMatches"]])
            for most in (FEW, MANY)
        )
        columns["ar_100"][rows], columns["ar_1000"][rows] = few.mean(0), many.mean(0)
        columns["found_50"][rows], columns["found_75"][rows] = many[places]
        ious = evaluation.ious[image_id, _ANY_CLASS]  # in the order of the annotations
        if len(ious):
            own = [one["id"] - 1 for one in evaluation.cocoGt.imgToAnns[image_id]]
            inside = [k for k, row in enumerate(own) if row < num_objects]
            columns["iou_best"][np.array(own)[inside]] = np.array(ious).max(0)[inside]
    return columns


def compare_scores(
    before: AutomaticScores, after: AutomaticScores, *, seed: int
) -> dict[str, dict[str, Any]]:
    """The change of each score, with the 95 % interval of a bootstrap over images.

    Args:
        before: Of the first model.
        after: Of the second, on the same images.
        seed: Of the bootstrap.

    Returns:
        By score, `difference` and `interval`, as `mean_change` gives them.
    """
    image_ids = before.objects.image_ids
    changes = {
        name: mean_change(after.columns[name] - before.columns[name], image_ids, seed=seed)
        for name in _OF_OBJECTS
    }
    more = after.masks_per_image - before.masks_per_image
    changes["masks_per_image"] = mean_change(more, np.arange(len(more)), seed=seed)
    changes["ap"] = change_of_ap(before.ranked, after.ranked, seed=seed)
    return changes


def automatic_rows(evaluations: list[dict[str, Any]]) -> Iterator[tuple[str, list[Any] | None]]:
    """Rows of `tables.format_tables`: a label with one score per model; without: a heading."""
    scores = [evaluation["automatic"] for evaluation in evaluations]
    yield f"automatic masks, {scores[0]['images']:,} images, any class", None
    for name, (label, _) in _LABELS.items():
        yield f"  {label}", [one[name] for one in scores]
    yield "  seconds an image", [one["seconds_per_image"] for one in scores]


def automatic_changes(changes: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """What `compare_scores` gave, with a label of each."""
    return [(label, changes[name]) for name, (_, label) in _LABELS.items()]


def automatic_columns(
    scores: AutomaticScores, objects: ObjectScores
) -> dict[str, list[float | None]]:
    """The scores of each row of a table of objects; None for objects outside of the sample."""
    keys = zip(scores.objects.image_ids.tolist(), scores.objects.object_ids.tolist(), strict=True)
    rows = {key: row for row, key in enumerate(keys)}
    places = [rows.get((image, one)) for image, one in objects.keys().tolist()]
    return {
        f"automatic_{name}": [None if row is None else float(values[row]) for row in places]
        for name, values in scores.columns.items()
    }
