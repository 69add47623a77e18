"""What `SamPredictor` answers to boxes in a picture, and how far another answer is from it.

Whether automatic mask generation still finds something: tuning on boxes can spoil it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from segment_anything import SamPredictor
from segment_anything.modeling import Sam

from samft.coco.synthetic import draw_scene
from samft.prediction.predictors import build_mask_generator, choose_points_per_batch

TOLERANCE = 1e-3  # of logits up to 10, and in proportion above: float32 has seven digits
EQUAL_PIXELS = 0.9999
_SIDE, _HEIGHT, _MAX_BOXES = 400, 300, 6


@dataclass(frozen=True)
class VerificationSample:
    """A picture with boxes to predict_boxes for.

    Attributes:
        name: What to call it.
        image: uint8 [H, W, 3], RGB.
        boxes: float64 [M, 4], x0 y0 x1 y1 in pixels of the image.
    """

    name: str
    image: NDArray[np.uint8]
    boxes: NDArray[np.float64]


@dataclass(frozen=True)
class Prediction:
    """One mask for each box.

    Attributes:
        logits: float32 [M, H, W], at the resolution of the image.
        iou_predicted: float32 [M].
    """

    logits: NDArray[np.float32]
    iou_predicted: NDArray[np.float32]


@dataclass(frozen=True)
class Difference:
    """How far one answer is from another.

    Attributes:
        logits: Largest difference of a logit.
        largest_logit: Largest absolute value of a logit, of either answer.
        iou_predicted: Largest difference of a predicted IoU.
        equal_pixels: Share of the mask pixels (logits above 0 or not) that are equal.
    """

    logits: float
    largest_logit: float
    iou_predicted: float
    equal_pixels: float

    @property
    def is_small(self) -> bool:
        """Whether both stand for the same model, to the accuracy of float32 arithmetic."""
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


def painted_sample() -> VerificationSample:
    """A picture that needs no file: butterflies and flowers, wider than high."""
    picture, objects = draw_scene(np.random.default_rng(3), _SIDE)
    points = [np.concatenate(item.polygons).reshape(-1, 2) for item in objects if not item.crowd]
    edge = np.array([_SIDE, _HEIGHT], dtype=np.float64)
    corners = [(np.minimum(p.min(0), edge), np.minimum(p.max(0), edge)) for p in points]
    boxes = [np.concatenate(pair) for pair in corners if (pair[1] - pair[0] >= 8).all()]
    return VerificationSample(
        "the built-in picture", picture[:_HEIGHT], np.stack(boxes[-_MAX_BOXES:])
    )


def sample_of(name: str, image: NDArray[np.uint8]) -> VerificationSample:
    """A picture of the user's own, with boxes around all of it, its middle, and its quarters.

    Args:
        name: What to call it.
        image: uint8 [H, W, 3], RGB.
    """
    shares = [[0, 0, 1, 1], [0.25, 0.25, 0.75, 0.75], [0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]]
    height, width = image.shape[:2]
    return VerificationSample(name, image, np.array(shares) * [width, height, width, height])


def predict_boxes(sam: Sam, sample: VerificationSample) -> Prediction:
    """What stock `SamPredictor.predict(box=...)` answers, box by box.

    Args:
        sam: In eval mode.
        sample: The picture and its boxes.
    """
    predictor = SamPredictor(sam)
    predictor.set_image(sample.image)
    answers = [
        predictor.predict(box=box, multimask_output=False, return_logits=True)[:2]
        for box in sample.boxes
    ]
    logits, iou_predicted = zip(*answers, strict=True)
    return Prediction(np.concatenate(logits), np.concatenate(iou_predicted))


def compare(expected: Sequence[Prediction], found: Sequence[Prediction]) -> Difference:
    """The largest differences over some samples.

    Args:
        expected: One answer for each sample.
        found: The other model's, for the same samples.

    Returns:
        With infinite differences where shapes differ or numbers are not finite.
    """
    pairs = list(zip(expected, found, strict=True))
    if any(a.logits.shape != b.logits.shape for a, b in pairs):
        return Difference(np.inf, np.inf, np.inf, 0.0)
    equal = sum(int(((a.logits > 0) == (b.logits > 0)).sum()) for a, b in pairs)
    return Difference(
        logits=max(_gap(a.logits, b.logits) for a, b in pairs),
        largest_logit=max(float(np.abs(x.logits).max()) for pair in pairs for x in pair),
        iou_predicted=max(_gap(a.iou_predicted, b.iou_predicted) for a, b in pairs),
        equal_pixels=equal / sum(a.logits.size for a, _ in pairs),
    )


def _gap(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    gap = float(np.abs(a - b).max())
    return gap if np.isfinite(gap) else np.inf


def bitwise_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts have the same keys, types, shapes and bits."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and a[name].numpy().tobytes() == b[name].numpy().tobytes()
        for name in a
    )


POINTS_PER_SIDE = 8


@dataclass(frozen=True)
class AutomaticMaskCounts:
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


def compare_automatic_masks(
    tuned: Sam, base: Sam | None, sample: VerificationSample
) -> AutomaticMaskCounts:
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
    return AutomaticMaskCounts(sample.name, after, before, words)


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
        points_per_batch=choose_points_per_batch((image.shape[0], image.shape[1])),
        **options,
    )
    found: list[dict[str, Any]] = generator.generate(image)
    return found
