"""Verifies an exported model: its masks for boxes equal the checkpoint's in `SamPredictor`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from segment_anything import SamPredictor
from segment_anything.modeling import Sam

from samft.annotations.segmentation import CroppedMask, decode_cropped
from samft.images.synthetic import draw_scene
from samft.runtime.device import exact_float32

# Absolute, for predicted IoU and logits up to 10; relative to larger logits. float32 has 7 digits.
TOLERANCE = 1e-3
EQUAL_PIXELS = 0.9999  # least share of mask pixels
_WIDTH, _HEIGHT, _MAX_BOXES, _MIN_SIDE = 400, 300, 6, 8  # of the synthetic sample; px


@dataclass(frozen=True)
class VerificationSample:
    """An image with boxes to predict masks for.

    Attributes:
        name: Shown in messages.
        image: uint8 [H, W, 3], RGB.
        boxes: float64 [K, 4], x0 y0 x1 y1, px, original frame.
        objects: Masks of the objects in the image, as far as they are known.
    """

    name: str
    image: NDArray[np.uint8]
    boxes: NDArray[np.float64]
    objects: Sequence[CroppedMask] = ()


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
    # Drawn on the square, and then cut as well.
    drawn = [
        decode_cropped([np.asarray(p, dtype=np.float64) for p in one.polygons], (_WIDTH, _WIDTH))
        for one in objects
    ]
    masks = [
        CroppedMask(mask.top, mask.left, mask.mask[: max(_HEIGHT - mask.top, 0)]) for mask in drawn
    ]
    return VerificationSample(
        "the built-in picture",
        image[:_HEIGHT],
        np.stack(boxes[-_MAX_BOXES:]),
        [mask for mask in masks if mask.mask.sum() >= _MIN_SIDE**2],
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
