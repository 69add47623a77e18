"""Verifies an exported model: its masks for boxes equal the checkpoint's in `SamPredictor`.

Also counts automatic masks, because fine-tuning on boxes can leave the automatic mask generator
without any.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from segment_anything import SamPredictor
from segment_anything.modeling import Sam

from samft.images.synthetic import draw_scene
from samft.models.mask_generator import MaskGenerator
from samft.runtime.device import exact_float32

# Absolute, for predicted IoU and logits up to 10; relative to larger logits. float32 has 7 digits.
TOLERANCE = 1e-3
EQUAL_PIXELS = 0.9999  # least share of mask pixels
POINTS_PER_SIDE = 8  # of the automatic mask generator: few, since this is a check
_WIDTH, _HEIGHT, _MAX_BOXES, _MIN_SIDE = 400, 300, 6, 8  # of the synthetic sample; px


@dataclass(frozen=True)
class VerificationSample:
    """An image with boxes to predict masks for.

    Attributes:
        name: Shown in messages.
        image: uint8 [H, W, 3], RGB.
        boxes: float64 [K, 4], x0 y0 x1 y1, px, original frame.
    """

    name: str
    image: NDArray[np.uint8]
    boxes: NDArray[np.float64]


@dataclass(frozen=True)
class Prediction:
    """The masks of a sample's K boxes.

    Attributes:
        mask_logits: float32 [K, H, W], at the resolution of the image.
        iou_predicted: float32 [K].
    """

    mask_logits: NDArray[np.float32]
    iou_predicted: NDArray[np.float32]


PredictFunction: TypeAlias = Callable[[VerificationSample], Prediction]


@dataclass(frozen=True)
class Difference:
    """The difference between the predictions of two models.

    Attributes:
        logits: Largest absolute difference of mask logits.
        largest_logit: Largest absolute mask logit of either model.
        iou_predicted: Largest absolute difference of predicted IoUs.
        equal_pixels: Share of mask pixels (logits above 0) that are equal.
    """

    logits: float
    largest_logit: float
    iou_predicted: float
    equal_pixels: float

    @property
    def is_small(self) -> bool:
        """Whether both models are the same up to float32 rounding."""
        return (
            self.logits <= TOLERANCE * max(1.0, self.largest_logit / 10)
            and self.iou_predicted <= TOLERANCE
            and self.equal_pixels >= EQUAL_PIXELS
        )

    def __str__(self) -> str:
        return (
            f"largest difference of logits {self.logits:.2g} (largest logit "
            f"{self.largest_logit:.3g}), equal mask pixels {100 * self.equal_pixels:.4f} %"
        )


def synthetic_sample() -> VerificationSample:
    """An image that needs no file, wider than high, with boxes around its drawn objects."""
    image, objects = draw_scene(np.random.default_rng(3), _WIDTH)
    # The scene is square; cropping it to another shape also tests the padding.
    limit = np.array([_WIDTH, _HEIGHT], dtype=np.float64)
    outlines = [np.concatenate(item.polygons).reshape(-1, 2) for item in objects if not item.crowd]
    corners = [(np.minimum(p.min(0), limit), np.minimum(p.max(0), limit)) for p in outlines]
    boxes = [np.concatenate(pair) for pair in corners if (pair[1] - pair[0] >= _MIN_SIDE).all()]
    return VerificationSample(
        "the built-in picture", image[:_HEIGHT], np.stack(boxes[-_MAX_BOXES:])
    )


def image_sample(name: str, image: NDArray[np.uint8]) -> VerificationSample:
    """A sample of the user's image, with boxes around the whole, its middle and two quarters.

    Args:
        name: Shown in messages.
        image: uint8 [H, W, 3], RGB.
    """
    shares = [[0, 0, 1, 1], [0.25, 0.25, 0.75, 0.75], [0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]]
    height, width = image.shape[:2]
    return VerificationSample(name, image, np.array(shares) * [width, height, width, height])


@exact_float32()
def predict_boxes(sam: Sam, sample: VerificationSample) -> Prediction:
    """The masks of `SamPredictor.predict(box=...)`, one box at a time.

    Args:
        sam: In eval mode.
        sample: The image and its boxes.
    """
    predictor = SamPredictor(sam)
    predictor.set_image(sample.image)
    outputs = [
        predictor.predict(box=box, multimask_output=False, return_logits=True)[:2]
        for box in sample.boxes
    ]
    mask_logits, iou_predicted = zip(*outputs, strict=True)
    return Prediction(np.concatenate(mask_logits), np.concatenate(iou_predicted))


def compare_predictions(expected: Sequence[Prediction], actual: Sequence[Prediction]) -> Difference:
    """The largest differences over all samples.

    Args:
        expected: One model's prediction for each sample.
        actual: The other model's, for the same samples.

    Returns:
        Infinite differences if shapes differ or a difference is not finite.
    """
    pairs = list(zip(expected, actual, strict=True))
    if any(a.mask_logits.shape != b.mask_logits.shape for a, b in pairs):
        return Difference(np.inf, np.inf, np.inf, 0.0)
    num_equal = sum(int(((a.mask_logits > 0) == (b.mask_logits > 0)).sum()) for a, b in pairs)
    return Difference(
        logits=max(_largest_difference(a.mask_logits, b.mask_logits) for a, b in pairs),
        largest_logit=max(float(np.abs(x.mask_logits).max()) for pair in pairs for x in pair),
        iou_predicted=max(_largest_difference(a.iou_predicted, b.iou_predicted) for a, b in pairs),
        equal_pixels=num_equal / sum(a.mask_logits.size for a, _ in pairs),
    )


def _largest_difference(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    difference = float(np.abs(a - b).max())
    return difference if np.isfinite(difference) else np.inf


def bitwise_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts have the same keys, dtypes, shapes and bits (-0.0 is not 0.0)."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and a[name].numpy().tobytes() == b[name].numpy().tobytes()
        for name in a
    )


@dataclass(frozen=True)
class AutomaticMaskCounts:
    """Number of automatic masks in one image, before and after fine-tuning.

    Attributes:
        name: The sample's.
        tuned: Masks of the tuned model.
        base: Masks of the model that training started from; None if it is not known.
        warning: Message for the user if the tuned model lost all masks, else None.
    """

    name: str
    tuned: int
    base: int | None
    warning: str | None


def compare_automatic_masks(
    tuned: Sam, base: Sam | None, sample: VerificationSample
) -> AutomaticMaskCounts:
    """Runs `SamAutomaticMaskGenerator` with its default thresholds on a coarse grid of points.

    Args:
        tuned: In eval mode.
        base: The model that training started from, if it is known.
        sample: Its image is used.
    """
    num_tuned = len(_generate_masks(tuned, sample.image))
    num_base = None if base is None else len(_generate_masks(base, sample.image))
    warning = None
    if num_base and not num_tuned:
        warning = (
            f"the automatic mask generator finds NO masks in {sample.name} with the tuned model, "
            f"and {num_base} with the base model. Masks for boxes are not affected. "
            + _suggest_thresholds(tuned, sample.image)
        )
    return AutomaticMaskCounts(sample.name, num_tuned, num_base, warning)


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
        "train with --freeze_mask_decoder."
    )


def _generate_masks(sam: Sam, image: NDArray[np.uint8], **options: Any) -> list[dict[str, Any]]:
    return MaskGenerator(sam, points_per_side=POINTS_PER_SIDE, **options).generate(image)
