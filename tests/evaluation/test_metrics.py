"""Per-mask IoU: exact over ranks, and equal to stock SAM's at the original resolution."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor
from torch.nn.functional import interpolate

from helpers.gloo_pool import GlooPool
from samft.annotations.segmentation import CroppedMask
from samft.distributed import get_rank
from samft.evaluation.metrics import MaskMean, PerMaskIoU, box_fill_ious, cropped_iou
from samft.models.prompted_sam import original_masks, upsampling_matrix
from samft.models.sam import build_sam

S = 256


def mean_on_rank(batches_of_rank: list[list[list[float]]]) -> tuple[float, torch.dtype]:
    metric = PerMaskIoU()
    for batch in batches_of_rank[get_rank()]:
        metric.update(torch.tensor(batch, dtype=torch.float64))
    mean = metric.compute()
    return mean.item(), mean.dtype


# Images of uneven numbers of masks; a mean of the images' or the ranks' means would differ.
BATCHES = [[0.25], [0.5, 0.75, 1.0], [], [0.125, 0.0]]
EXACT = sum(sum(batch) for batch in BATCHES) / 6


@pytest.mark.parametrize(
    "split",
    [
        [BATCHES[:2], BATCHES[2:]],
        [BATCHES[:1], BATCHES[1:]],
        [BATCHES, [[]]],
        [[], BATCHES],  # a rank without any image
    ],
)
def test_the_mean_is_exact_for_any_distribution_over_ranks(
    gloo2: GlooPool, split: list[list[list[float]]]
) -> None:
    assert gloo2.run(mean_on_rank, split) == [(EXACT, torch.float64)] * 2


def test_the_mean_of_no_masks_is_nan(gloo2: GlooPool) -> None:
    assert all(math.isnan(mean) for mean, _ in gloo2.run(mean_on_rank, [[[]], []]))


def test_the_mean_in_one_process_and_after_a_reset() -> None:
    metric = MaskMean()
    for batch in BATCHES:
        metric.update(torch.tensor(batch))
    assert metric.compute().item() == EXACT
    metric.reset()
    metric.update(torch.tensor([0.5]))
    assert metric.compute().item() == 0.5


def test_sums_do_not_lose_small_parts() -> None:
    metric = MaskMean()
    values = torch.full((1000,), 0.1)
    for _ in range(100):
        metric.update(values)
    # In float32 the running sum would be off in the fifth digit.
    assert metric.compute().item() == pytest.approx(float(values[0]), rel=1e-12)


@pytest.fixture(scope="module")
def sam() -> Sam:
    return build_sam("vit_tiny", S)


def smooth_logits(count: int) -> Tensor:
    return interpolate(
        torch.randn(count, 1, 7, 7) - 0.3, (S // 4, S // 4), mode="bicubic", align_corners=False
    )[:, 0]


def crop_of(mask: np.ndarray) -> CroppedMask:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, left = int(rows[0]), int(columns[0])
    return CroppedMask(top, left, mask[top : rows[-1] + 1, left : columns[-1] + 1])


def iou_of(mask: np.ndarray, truth: np.ndarray) -> float:
    return (mask & truth).sum() / (mask | truth).sum()


def original_masks_iou(
    logits: torch.Tensor, truths: list[CroppedMask], **sizes: Any
) -> torch.Tensor:
    pairs = zip(original_masks(logits, **sizes), truths, strict=True)
    return torch.tensor([cropped_iou(*pair) for pair in pairs], dtype=torch.float64)


@pytest.mark.parametrize(
    "original_size",
    [(333, 501), (457, 121), (1, 300), (7, 5), (64, 64), (256, 256), (255, 256), (600, 601)],
)
@pytest.mark.parametrize("squash", [False, True])
def test_iou_equals_that_of_stock_postprocess_masks(
    sam: Sam, original_size: tuple[int, int], squash: bool
) -> None:
    shape = ResizeLongestSide.get_preprocess_shape(*original_size, S)
    input_size = (S, S) if squash else shape
    logits = smooth_logits(6)
    logits[3] = -1
    logits[3, 2:9, 4:9] = 1  # only near the first corner
    logits[4] = -1  # an empty prediction
    logits[5] = 1  # all of the image
    stock = sam.postprocess_masks(logits[:, None], input_size, original_size)[:, 0] > 0
    masks = stock.numpy()
    height, width = original_size
    truths = np.zeros((6, height, width), bool)
    truths[:3] = masks[[1, 2, 0]]  # overlaps of all kinds
    truths[3:] = True
    truths[:, height // 3 : height // 2 + 1, width // 4 : width // 2 + 1] = True
    ious = original_masks_iou(
        logits,
        [crop_of(truth) for truth in truths],
        input_size=input_size,
        original_size=original_size,
    )
    expected = [iou_of(mask, truth) for mask, truth in zip(masks, truths, strict=True)]
    assert ious.dtype == torch.float64
    # A logit within rounding of 0 may fall to either side: not more than two pixels' worth.
    np.testing.assert_allclose(ious.numpy(), expected, atol=2 / truths.sum((1, 2)).min(), rtol=0)
    assert (expected[4], ious[4].item()) == (0, 0)
    assert ious[5].item() == 1
    exact = np.isclose(ious.numpy(), expected, atol=1e-12, rtol=0)
    assert exact.sum() >= 5


def test_positive_logits_in_the_padding_do_not_count() -> None:
    logits = torch.full((1, S // 4, S // 4), -1.0)
    logits[:, 34:] = 5  # the image is 128 high: 32 rows of cells
    truth = np.zeros((50, 100), bool)
    truth[10:20, 30:40] = True
    arguments = {"input_size": (128, S), "original_size": (50, 100)}
    assert original_masks_iou(logits, [crop_of(truth)], **arguments).item() == 0
    logits[:, :32] = 1
    iou = original_masks_iou(logits, [crop_of(truth)], **arguments).item()
    assert iou == pytest.approx(100 / 5000)


def test_no_masks_have_no_ious() -> None:
    none = original_masks_iou(torch.zeros(0, 64, 64), [], input_size=(S, S), original_size=(9, 9))
    assert none.shape == (0,)
    with pytest.raises(ValueError):
        original_masks_iou(torch.zeros(2, 64, 64), [], input_size=(S, S), original_size=(9, 9))


def test_the_upsampling_matrix_averages() -> None:
    matrix = upsampling_matrix(16, 64, 40, 33)
    assert matrix.shape == (33, 16)
    torch.testing.assert_close(matrix.sum(1), torch.ones(33))
    assert (matrix >= 0).all()
    # Where nothing is resized nothing is mixed.
    assert torch.equal(upsampling_matrix(8, 8, 8, 8), torch.eye(8))
    # Four times as many pixels: their centres lie at 1/8, 3/8, 5/8 and 7/8 between two cells'.
    expected = torch.tensor([[1, 0], [1, 0], [0.875, 0.125], [0.625, 0.375], [0.375, 0.625]])
    torch.testing.assert_close(upsampling_matrix(2, 8, 5, 5), expected)


FULL = CroppedMask(2, 3, np.ones((4, 5), bool))  # rows 2-5, columns 3-7
ROUND = CroppedMask(0, 0, np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], bool))


@pytest.mark.parametrize(
    "box, truth, iou",
    [
        ((3, 2, 8, 6), FULL, 1),
        ((3.4, 1.6, 7.6, 6.4), FULL, 1),  # a pixel is inside where its centre is
        ((3, 2, 8, 4), FULL, 1 / 2),
        ((0, 0, 12, 10), FULL, 20 / 120),
        ((-5, -5, 99, 99), FULL, 20 / 120),  # cut to the image
        ((8, 2, 12, 6), FULL, 0),
        ((3, 2, 3, 2), FULL, 0),
        ((0, 0, 3, 3), ROUND, 5 / 9),
    ],
)
@pytest.mark.parametrize("scale", [(1, 1), (4, 2)])
def test_filling_the_box_in_closed_form(
    box: tuple[float, ...], truth: CroppedMask, iou: float, scale: tuple[int, int]
) -> None:
    vertical, horizontal = scale
    in_frame = torch.tensor([box]) * torch.tensor([horizontal, vertical] * 2)
    ious = box_fill_ious(
        in_frame, [truth], input_size=(10 * vertical, 12 * horizontal), original_size=(10, 12)
    )
    assert ious.tolist() == [pytest.approx(iou, rel=1e-12)]


def test_filling_many_boxes_or_none() -> None:
    boxes = torch.tensor([[3.0, 2, 8, 6], [0, 0, 3, 3]])
    sizes = {"input_size": (10, 12), "original_size": (10, 12)}
    assert box_fill_ious(boxes, [FULL, ROUND], **sizes).tolist() == [1, 5 / 9]
    assert box_fill_ious(boxes[:0], [], **sizes).shape == (0,)
