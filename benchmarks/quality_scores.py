"""Scores of the quality lab's runs: measured, kept in a file, and compared by a bootstrap.

Of each object of the validation images, at the original resolution, from its annotated box and
from a box whose sides are off by up to 10 %. The same objects get the same boxes in all runs.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as mask_utils

from benchmarks.pretrain_tiny import AUTOMATIC_SETTINGS
from samft.coco.subset import CocoSubset
from samft.data.dataset import Coco2MaskDataset
from samft.data.loaders import val_loader
from samft.data.samplers import RESAMPLE_STREAM, generator_of
from samft.evaluation.automatic import generate_split, sample_images, score_masks
from samft.evaluation.coco_ap import TrueObjects
from samft.evaluation.evaluator import Clicking, EvaluatedObjects, evaluate_split
from samft.models.mask_generator import MaskGenerator
from samft.models.prompted_sam import PromptedSam
from samft.runtime.files import write_atomically

NUM_RESAMPLES = 10_000
METRICS = {
    "iou": "IoU",
    "boundary_iou": "boundary IoU",
    "iou_shaken": "IoU, shaken",
    "boundary_iou_shaken": "boundary IoU, shaken",
}
NUM_CLICKS = 7
CLICK_METRICS = {  # of runs that were scored with `--clicks`
    "iou_point": "IoU, one point",
    "iou_point_best": "IoU, one point, best of three",
    "iou_clicks_point": f"IoU, {NUM_CLICKS} clicks",
    "iou_clicks_box": f"IoU, box and {NUM_CLICKS} clicks",
}
AUTOMATIC_METRICS = {  # of runs that were scored with `--automatic`
    "found_50": "found automatically, IoU .50",
    "found_75": "found automatically, IoU .75",
}


@dataclass(frozen=True)
class RunScores:
    """Scores of the K validation objects of a run, sorted by image, then object.

    Attributes:
        image_ids: int64 [K].
        object_ids: int64 [K].
        iou: float64 [K], from the annotated box, in stock SAM's padded frame.
        boundary_iou: The same; see `evaluation.metrics.boundary_iou`.
        iou_shaken: IoU from a box whose sides are off by up to 10 % of its width or height.
        boundary_iou_shaken: The same.
        iou_box_fill: IoU of the filled box.
        area_ratio: Predicted over true area, px; from the annotated box.
        iou_own_frame: IoU in the frame that the recipe trains in; the same as `iou` for `pad`.
        iou_point: IoU from one point; nan, as below, in runs that were scored without clicks.
        iou_point_best: Of the three masks of that point, the one with the highest predicted IoU.
        iou_clicks_point: After `NUM_CLICKS` clicks that began with that point.
        iou_clicks_box: After `NUM_CLICKS` clicks that corrected the box's mask.
        found_50: 1 where one of SAM's automatic masks matches the object at IoU .50, else 0; nan
            for objects of images outside of the sample, and in runs that were scored without.
        found_75: The same at IoU .75.
    """

    image_ids: NDArray[np.int64]
    object_ids: NDArray[np.int64]
    iou: NDArray[np.float64]
    boundary_iou: NDArray[np.float64]
    iou_shaken: NDArray[np.float64]
    boundary_iou_shaken: NDArray[np.float64]
    iou_box_fill: NDArray[np.float64]
    area_ratio: NDArray[np.float64]
    iou_own_frame: NDArray[np.float64]
    iou_point: NDArray[np.float64]
    iou_point_best: NDArray[np.float64]
    iou_clicks_point: NDArray[np.float64]
    iou_clicks_box: NDArray[np.float64]
    found_50: NDArray[np.float64]
    found_75: NDArray[np.float64]

    @property
    def has_clicks(self) -> bool:
        """Whether it was scored with clicks."""
        return bool(np.isfinite(self.iou_clicks_box).all())

    @property
    def has_automatic(self) -> bool:
        """Whether it was scored with automatic masks, on any image."""
        return bool(np.isfinite(self.found_50).any())

    def summarise(self) -> dict[str, float]:
        """Means over objects; of `area_ratio` the median. Numbers of images and objects."""
        more = measured_metrics([self])
        names = (*more, "iou_box_fill", "iou_own_frame")
        return {
            "num_images": len(np.unique(self.image_ids)),
            "num_objects": len(self.object_ids),
            **{name: float(np.nanmean(getattr(self, name))) for name in names},
            "area_ratio": float(np.median(self.area_ratio)),
        }

    def write(self, path: Path) -> None:
        """Writes the columns as a compressed .npz."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: np.savez_compressed(file, **asdict(self)))


def read_scores(path: Path) -> RunScores:
    """Reads what `RunScores.write` wrote."""
    with np.load(path) as columns:
        missing = np.full(
            len(columns["iou"]), np.nan
        )  # in files from before there was such a score
        return RunScores(**{one.name: columns.get(one.name, missing) for one in fields(RunScores)})


def measured_metrics(runs: Iterable[RunScores]) -> dict[str, str]:
    """The metrics that all of the runs were scored with, and their labels."""
    runs = list(runs)
    with_clicks = all(run.has_clicks for run in runs)
    with_automatic = all(run.has_automatic for run in runs)
    return {
        **METRICS,
        **(CLICK_METRICS if with_clicks else {}),
        **(AUTOMATIC_METRICS if with_automatic else {}),
    }


class KeptEmbeddings:
    """An `EmbeddingSource` in memory, float32: each validation image is encoded when first read."""

    def __init__(self, dataset: Coco2MaskDataset, model: PromptedSam) -> None:
        self.dataset, self.model = dataset, model
        self.kept: dict[int, tuple[tuple[int, int], NDArray[np.floating]]] = {}

    def _encode_image(self, i: int) -> tuple[tuple[int, int], NDArray[np.floating]]:
        if i not in self.kept:
            sample = self.dataset[i]
            with torch.no_grad():
                sizes = torch.tensor([sample.input_size])
                embedding = self.model.embed(sample.image[None], sizes)[0].numpy()
            self.kept[i] = sample.original_size, embedding
        return self.kept[i]

    def size(self, i: int) -> tuple[int, int]:
        """H, W of image i, original px."""
        return self._encode_image(i)[0]

    def read(self, i: int, *, flipped: bool) -> NDArray[np.floating]:
        """The embedding of image i, float32 [C, S/16, S/16]; validation flips none."""
        assert not flipped
        return self._encode_image(i)[1]


class Scorer:
    """Scores models on one validation set; a frozen encoder encodes each image once for all.

    Args:
        subset: The validation images and objects.
        image_size: Of the models.
        with_clicks: Whether objects are corrected by clicks, which takes several times as long.
        automatic: The number of images to make automatic masks of; the same for all models.
    """

    def __init__(
        self,
        subset: CocoSubset,
        *,
        image_size: int,
        with_clicks: bool = False,
        automatic: int = 0,
    ) -> None:
        self.subset, self.image_size, self.with_clicks = subset, image_size, with_clicks
        self.sample = sample_images(subset, automatic, seed=0) if automatic else None
        self.embeddings: dict[str, KeptEmbeddings] = {}

    def score(self, model: PromptedSam, *, resize_mode: str) -> RunScores:
        """Scores a model in stock SAM's frame, and in its own.

        Args:
            model: If its encoder is frozen: with the encoder of all others that are.
            resize_mode: That it was trained with.
        """
        objects = self._evaluate(model, "pad")
        own = objects if resize_mode == "pad" else self._evaluate(model, resize_mode)
        missing = np.full(len(objects.image_ids), np.nan)
        # One by one: pycocotools counts a list's masks in a byte.
        predicted = np.array([mask_utils.area(rle) for rle in objects.rle_predicted], dtype=float)
        return RunScores(
            image_ids=objects.image_ids,
            object_ids=objects.object_ids,
            iou=objects.iou_actual,
            boundary_iou=objects.iou_boundary,
            iou_shaken=objects.iou_jitter_10,
            boundary_iou_shaken=objects.iou_boundary_jitter_10,
            iou_box_fill=objects.iou_box_fill,
            area_ratio=predicted / np.maximum(objects.areas, 1),
            iou_own_frame=own.iou_actual,
            iou_point=objects.iou_point if self.with_clicks else missing,
            iou_point_best=objects.iou_point_multimask if self.with_clicks else missing,
            iou_clicks_point=objects.iou_clicks_point[:, -1] if self.with_clicks else missing,
            iou_clicks_box=objects.iou_clicks_box[:, -1] if self.with_clicks else missing,
            **self._find_automatically(model, objects),
        )

    def _find_automatically(
        self, model: PromptedSam, objects: EvaluatedObjects
    ) -> dict[str, NDArray[np.float64]]:
        # In stock SAM's frame, as the automatic mask generator has no other.
        columns = {name: np.full(len(objects.image_ids), np.nan) for name in AUTOMATIC_METRICS}
        if self.sample is None:
            return columns
        loader = val_loader(self._dataset("pad", self.sample))
        generator = MaskGenerator(model.sam, show_progress=False, **AUTOMATIC_SETTINGS)
        scores = score_masks(generate_split(generator, self.sample, loader), self.sample)
        rows = {key: row for row, key in enumerate(_keys(objects))}
        places = [rows[key] for key in _keys(scores.objects)]
        for name, column in columns.items():
            column[places] = scores.columns[name]
        return columns

    def _evaluate(self, model: PromptedSam, resize_mode: str) -> EvaluatedObjects:
        dataset = self._dataset(resize_mode)
        if model.encoder_is_frozen:
            if resize_mode not in self.embeddings:
                source = self._dataset(resize_mode)
                self.embeddings[resize_mode] = KeptEmbeddings(source, model)
            dataset.embeddings = self.embeddings[resize_mode]
        clicking = Clicking(NUM_CLICKS if self.with_clicks else 0)
        return evaluate_split(model, val_loader(dataset), clicking=clicking)[0]

    def _dataset(self, resize_mode: str, subset: CocoSubset | None = None) -> Coco2MaskDataset:
        subset = subset or self.subset
        return Coco2MaskDataset(
            subset.index.image_folder,
            subset=subset,
            image_size=self.image_size,
            resize_mode=resize_mode,
        )


def _keys(objects: EvaluatedObjects | TrueObjects) -> Iterator[tuple[int, int]]:
    return zip(objects.image_ids.tolist(), objects.object_ids.tolist(), strict=True)


class Difference(NamedTuple):
    """A mean difference, and the bounds of its 95 % interval."""

    mean: float
    low: float
    high: float


def paired_difference(
    before: NDArray[np.float64],
    after: NDArray[np.float64],
    image_ids: NDArray[np.int64],
    *,
    seed: int = 0,
) -> Difference:
    """Mean of `after` less `before` over objects and seeds, with a bootstrap interval.

    Whole images are drawn with replacement, because objects of one image are alike, and so are
    runs of other seeds: both are samples of what could have been.

    Args:
        before: float64 [R, K], a score of K objects in the runs of R seeds. Objects that have none,
            nan, are left out; they are the same in all runs.
        after: float64 [R, K], of the same objects and seeds.
        image_ids: int64 [K].
        seed: Of the bootstrap.

    Returns:
        The mean difference, and the 2.5th and 97.5th percentile of the resampled means.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993: the percentile interval,
    of clusters; crossed with seeds as in Owen, The pigeonhole bootstrap, 2007.
    """
    scored = np.isfinite(before[0])
    change = (after - before)[:, scored]
    _, image = np.unique(image_ids[scored], return_inverse=True)
    counts = np.bincount(image).astype(np.float64)
    sums = np.stack([np.bincount(image, weights=of_seed) for of_seed in change])
    generator = generator_of(RESAMPLE_STREAM, seed)
    num_seeds, num_images = sums.shape
    # How often each seed and each image is drawn, [NUM_RESAMPLES, R] and [NUM_RESAMPLES, images].
    seeds_drawn, images_drawn = (
        generator.multinomial(count, np.full(count, 1 / count), size=NUM_RESAMPLES)
        for count in (num_seeds, num_images)
    )
    totals = ((seeds_drawn @ sums) * images_drawn).sum(axis=1)
    means = totals / (num_seeds * (images_drawn @ counts))
    low, high = np.percentile(means, (2.5, 97.5)).tolist()
    return Difference(float(change.mean()), low, high)
