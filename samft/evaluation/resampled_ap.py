"""AP of resampled images: its interval, for which it is computed anew for each resample."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samft.data.samplers import RESAMPLE_STREAM, generator_of

_NUM_RESAMPLES = 1000  # of the bootstrap; each takes a millisecond or so


@dataclass(frozen=True)
class RankedMasks:
    """The best masks of each of N images, D in all, by falling score, at T thresholds of IoU.

    Attributes:
        image: int64 [D], 0 to N - 1.
        is_right: bool [T, D], whether it matches an object.
        is_wrong: bool [T, D], whether it matches nothing, and no crowd.
        num_objects: int64 [N], of each image.
        recalls: float64, the recalls at which precision is read.
    """

    image: NDArray[np.int64]
    is_right: NDArray[np.bool_]
    is_wrong: NDArray[np.bool_]
    num_objects: NDArray[np.int64]
    recalls: NDArray[np.float64]

    def average_precision(self, weights: NDArray[np.float64]) -> float:
        """COCO's AP with each image so many times in the set.

        Args:
            weights: float64 [N].

        Source: `COCOeval.accumulate` of pycocotools, where all weights are 1.
        """
        each = weights[self.image]
        right, wrong = (np.cumsum(one * each, axis=1) for one in (self.is_right, self.is_wrong))
        recall = right / (weights @ self.num_objects)
        precision = right / (right + wrong + np.spacing(1))
        envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        envelope = np.pad(envelope, ((0, 0), (0, 1)))  # 0 at recalls that are never reached
        read = [
            row[np.searchsorted(reached, self.recalls)]
            for reached, row in zip(recall, envelope, strict=True)
        ]
        return float(np.mean(read))


def rank_masks(evaluation: Any, *, most: int) -> RankedMasks:
    """Ranks what a COCOeval of one class has matched.

    Args:
        evaluation: It has evaluated.
        most: Masks of an image that count, those of the highest scores.
    """
    entries = evaluation.evalImgs[: len(evaluation.params.imgIds)]  # of all sizes of object
    scores = np.concatenate([entry["dtScores"][:most] for entry in entries])
    order = np.argsort(-scores, kind="mergesort")  # as COCOeval
    counts = [len(entry["dtScores"][:most]) for entry in entries]
    matches, ignored = (
        np.concatenate([entry[name][:, :most] for entry in entries], axis=1)[:, order] > 0
        for name in ("dtMatches", "dtIgnore")
    )
    return RankedMasks(
        image=np.repeat(np.arange(len(entries)), counts)[order],
        is_right=matches & ~ignored,
        is_wrong=~matches & ~ignored,
        num_objects=np.array([np.count_nonzero(entry["gtIgnore"] == 0) for entry in entries]),
        recalls=np.asarray(evaluation.params.recThrs),
    )


def change_of_ap(before: RankedMasks, after: RankedMasks, *, seed: int) -> dict[str, Any]:
    """The change of AP, with a 95 % bootstrap interval that resamples whole images.

    Args:
        before: Of the first model.
        after: Of the second, on the same images.
        seed: Of the bootstrap.

    Returns:
        As `object_scores.mean_change`.
    """
    number = len(before.num_objects)
    draws = generator_of(RESAMPLE_STREAM, seed).multinomial(
        number, np.full(number, 1 / number), size=_NUM_RESAMPLES
    )
    weights = [np.ones(number), *(draws if number > 1 else [])]
    changes = [after.average_precision(w) - before.average_precision(w) for w in weights]
    interval = np.percentile(changes[1:], (2.5, 97.5)).tolist() if number > 1 else None
    return {"difference": changes[0], "interval": interval}
