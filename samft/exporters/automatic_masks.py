"""What became of automatic masks in training: warnings, because training on boxes can lose them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from segment_anything.modeling import Sam

from samft.annotations.segmentation import decode_cropped
from samft.evaluation.metrics import cropped_iou
from samft.exporters.verification import VerificationSample
from samft.models.mask_generator import MaskGenerator
from samft.runtime.files import read_json
from samft.runtime.own_files import has_keys

POINTS_PER_SIDE = 8  # of the automatic mask generator: few, since this is a check
_FOUND_IOU = 0.5

_is_evaluation = has_keys("per_mask_iou", "checkpoint", "samft_version", "others")


@dataclass(frozen=True)
class AutomaticMaskCounts:
    """Automatic masks in one image, before and after fine-tuning.

    Attributes:
        name: The sample's.
        tuned: Number of masks of the tuned model.
        base: Number of masks of the model that training started from; None if it is not known.
        objects: Number of known objects in the image.
        tuned_found: Of these, how many a mask of the tuned model has an IoU of .50 with.
        base_found: The same of the other; None if it is not known.
        warning: Message for the user if the tuned model finds fewer than the other, else None.
    """

    name: str
    tuned: int
    base: int | None
    objects: int
    tuned_found: int
    base_found: int | None
    warning: str | None


def compare_automatic_masks(
    tuned: Sam, base: Sam | None, sample: VerificationSample
) -> AutomaticMaskCounts:
    """Runs `SamAutomaticMaskGenerator` with its default thresholds on a coarse grid of points.

    Args:
        tuned: In eval mode.
        base: The model that training started from, if it is known.
        sample: Its image is used, and its objects.
    """
    masks = _generate_masks(tuned, sample.image)
    counts = len(masks), _count_objects(masks, sample)
    before: tuple[int | None, int | None] = None, None
    warning = None
    if base is not None:
        masks = _generate_masks(base, sample.image)
        before = len(masks), _count_objects(masks, sample)
        if masks and not counts[0]:
            warning = (
                f"the automatic mask generator finds NO masks in {sample.name} with the tuned "
                f"model, and {len(masks)} with the base model. Masks for boxes are not affected. "
                + _suggest_thresholds(tuned, sample.image)
            )
        elif counts[1] < (before[1] or 0):
            warning = (
                f"automatic masks find fewer objects than before tuning: of the "
                f"{len(sample.objects)} in {sample.name}, {counts[1]} at an IoU of .50, and "
                f"{before[1]} with the base model. Masks for boxes are not affected. What counts "
                "are your images: give both checkpoints to samft evaluate --automatic."
            )
    return AutomaticMaskCounts(
        sample.name,
        tuned=counts[0],
        base=before[0],
        objects=len(sample.objects),
        tuned_found=counts[1],
        base_found=before[1],
        warning=warning,
    )


def _count_objects(masks: Sequence[dict[str, Any]], sample: VerificationSample) -> int:
    size = sample.image.shape[0], sample.image.shape[1]
    decoded = []
    for mask in masks if sample.objects else ():
        rle = mask["segmentation"]
        decoded.append(decode_cropped({**rle, "counts": np.array(rle["counts"])}, size))
    best = [max((cropped_iou(one, true) for one in decoded), default=0) for true in sample.objects]
    return sum(iou >= _FOUND_IOU for iou in best)


def _suggest_thresholds(sam: Sam, image: NDArray[np.uint8]) -> str:
    masks = _generate_masks(sam, image, pred_iou_thresh=0.0, stability_score_thresh=0.0)
    iou, stability = (
        # A score that equals itself is not NaN.
        max((mask[name] for mask in masks if mask[name] == mask[name]), default=0.0)
        for name in ("predicted_iou", "stability_score")
    )
    return (
        f"Without thresholds it finds {len(masks)}: their highest predicted IoU is {iou:.2f} "
        f"(pred_iou_thresh is 0.88), their highest stability {stability:.2f} "
        "(stability_score_thresh is 0.95). Lower these thresholds of SamAutomaticMaskGenerator, or "
        "train with --prompts mixed --multimask best."
    )


def _generate_masks(sam: Sam, image: NDArray[np.uint8], **options: Any) -> list[dict[str, Any]]:
    return MaskGenerator(sam, points_per_side=POINTS_PER_SIDE, **options).generate(image)


def evaluation_warnings(checkpoint: Path) -> list[str]:
    """What evaluations with `--automatic` say that lie beside a checkpoint, if it got worse.

    Args:
        checkpoint: It is compared with the first one of an evaluation.
    """
    lines = []
    for file in sorted(checkpoint.parent.glob("*.json")):
        if not _is_evaluation(file):
            continue
        try:
            lines += _describe_losses(file, read_json(file), checkpoint)
        except (LookupError, TypeError, ValueError, AttributeError, OSError):
            continue  # of another version, or changed by hand: not worth failing an export
    return lines


def _describe_losses(file: Path, report: dict[str, Any], checkpoint: Path) -> list[str]:
    lines = []
    for one in report["others"]:
        path = Path(one["checkpoint"])
        is_other = path.name != checkpoint.name or (path.exists() and not path.samefile(checkpoint))
        if is_other or "automatic" not in one:
            continue
        before, after = (scores["automatic"]["found_50"] for scores in (report, one))
        if after < before:
            lines.append(
                f"automatic masks find fewer objects than before tuning: {after:.1%} at an IoU of "
                f".50, and {before:.1%} with {report['checkpoint']}, on "
                f"{one['automatic']['images']} images, says {file}."
            )
    return lines
