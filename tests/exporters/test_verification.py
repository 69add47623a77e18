"""Differences of hand-made predictions; the built-in image."""

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor

from helpers.tiny_checkpoint import tiny_sam
from samft.exporters.verification import (
    Prediction,
    VerificationSample,
    bitwise_equal,
    compare_predictions,
    image_sample,
    predict_boxes,
    synthetic_sample,
)


def prediction(logits: list[float], iou: float = 0.5) -> Prediction:
    """One mask of 1 x len(logits) pixels."""
    return Prediction(np.array([[logits]], np.float32), np.array([iou], np.float32))


def test_the_largest_differences_over_all_samples_and_the_share_of_equal_pixels() -> None:
    a = [prediction([1.0, -2.0, 3.0, -4.0]), prediction([0.5, 0.25, -8.0, 1.0], iou=0.25)]
    b = [prediction([1.5, 2.0, 3.0, -4.0]), prediction([0.5, 0.0, -8.0, 1.0], iou=0.75)]
    difference = compare_predictions(a, b)
    assert (difference.logits, difference.largest_logit) == (4.0, 8.0)
    assert difference.iou_predicted == 0.5
    # Unequal are -2 and 2, and 0.25 and 0, which is not above 0.
    assert difference.equal_pixels == 6 / 8
    assert "largest difference of logits 4 (largest logit 8), equal mask pixels 75.0000 %" == str(
        difference
    )


@pytest.mark.parametrize(
    ("a", "b", "small"),
    [
        (prediction([5.0] * 4), prediction([5.0009] * 4), True),
        (prediction([5.0] * 4), prediction([5.0011] * 4), False),
        (prediction([50.0] * 4), prediction([50.004] * 4), True),
        (prediction([50.0] * 4), prediction([50.006] * 4), False),
        (prediction([5.0] * 4), prediction([5.0] * 4, iou=0.502), False),
        (prediction([1.0] * 9998 + [1e-4] * 2), prediction([1.0] * 9998 + [1e-4, -1e-4]), True),
        (prediction([1.0] * 9997 + [1e-4] * 3), prediction([1.0] * 9998 + [-1e-4] * 2), False),
        (prediction([1.0]), prediction([float("nan")]), False),
        (prediction([1.0]), prediction([1.0], iou=float("nan")), False),
        (prediction([1.0]), prediction([1.0, 1.0]), False),
    ],
)
def test_what_counts_as_the_same_model(a: Prediction, b: Prediction, small: bool) -> None:
    assert compare_predictions([a], [b]).is_small is small


def test_the_synthetic_image_is_wider_than_high_and_its_boxes_lie_inside() -> None:
    sample = synthetic_sample()
    height, width = sample.image.shape[:2]
    assert (height, width, sample.image.dtype) == (300, 400, np.uint8)
    assert len(sample.boxes) >= 3
    assert (sample.boxes[:, :2] >= 0).all()
    assert (sample.boxes[:, 2:] <= [width, height]).all()
    assert (sample.boxes[:, 2:] - sample.boxes[:, :2] >= 8).all()
    again = synthetic_sample()
    assert (again.image == sample.image).all() and (again.boxes == sample.boxes).all()


def test_boxes_of_a_users_image_are_shares_of_it() -> None:
    boxes = image_sample("a.png", np.zeros((20, 40, 3), np.uint8)).boxes.tolist()
    assert boxes == [[0, 0, 40, 20], [10, 5, 30, 15], [0, 0, 20, 10], [20, 10, 40, 20]]


def test_predicted_boxes_equal_sam_predictors() -> None:
    sam = tiny_sam()
    image = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    boxes = np.array([[2.0, 3, 30, 20], [10, 10, 45, 28]])
    predicted = predict_boxes(sam, VerificationSample("noise", image, boxes))
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    for box, logits, iou in zip(boxes, predicted.mask_logits, predicted.iou_predicted, strict=True):
        masks, scores, _ = predictor.predict(box=box, multimask_output=False)
        assert ((logits > 0) == masks[0]).all()
        assert iou == scores[0]


def test_bitwise_equality_of_state_dicts() -> None:
    a = tiny_sam().state_dict()
    b = {name: tensor.clone() for name, tensor in a.items()}
    assert bitwise_equal(a, b)
    name = "mask_decoder.iou_token.weight"
    b[name].view(torch.int32)[0, 3] ^= 1
    assert not bitwise_equal(a, b)
    del b[name]
    assert not bitwise_equal(a, b)
    assert not bitwise_equal(a, {**a, name: a[name].double()})
