"""Whether automatic mask generation still finds something: tuning on boxes can spoil it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from segment_anything.modeling import Sam

from samft.exporters.reference import Sample
from samft.prediction.mask_generation import build_mask_generator, points_at_once

POINTS_PER_SIDE = 8


@dataclass(frozen=True)
class Found:
    """How many masks automatic generation found in one picture.

    Attributes:
        name: Of the picture.
        tuned: By the tuned model.
        base: By the one that it was tuned from; None if that is not known.
        complaint: What is to be said loudly; None if nothing is.
    """

    name: str
    tuned: int
    base: int | None
    complaint: str | None


def compare_automatic_masks(tuned: Sam, base: Sam | None, sample: Sample) -> Found:
    """Runs stock `SamAutomaticMaskGenerator`, with its own thresholds, on a grid of a few points.

    Args:
        tuned: In eval mode.
        base: The model that it was tuned from, if it is known.
        sample: Its picture is looked at.
    """
    after = len(_generate(tuned, sample.image))
    before = None if base is None else len(_generate(base, sample.image))
    words = None
    if before and not after:
        words = (
            f"the automatic mask generator finds NOTHING in {sample.name} with the tuned model, "
            f"and {before} masks with the base. Masks for boxes are not concerned. "
            + _advice(tuned, sample.image)
        )
    return Found(sample.name, after, before, words)


def _advice(sam: Sam, image: NDArray[np.uint8]) -> str:
    everything = _generate(sam, image, pred_iou_thresh=0.0, stability_score_thresh=0.0)
    iou, stability = (
        max((mask[name] for mask in everything if mask[name] == mask[name]), default=0.0)
        for name in ("predicted_iou", "stability_score")
    )
    return (
        f"Without thresholds it finds {len(everything)}: their highest predicted IoU is {iou:.2f} "
        f"(pred_iou_thresh is 0.88), their highest stability {stability:.2f} "
        "(stability_score_thresh is 0.95). Lower these of SamAutomaticMaskGenerator, or tune with "
        "--freeze_mask_decoder."
    )


def _generate(sam: Sam, image: NDArray[np.uint8], **options: float) -> list[dict[str, Any]]:
    generator = build_mask_generator(
        sam,
        points_per_side=POINTS_PER_SIDE,
        points_per_batch=points_at_once((image.shape[0], image.shape[1])),
        **options,
    )
    found: list[dict[str, Any]] = generator.generate(image)
    return found
