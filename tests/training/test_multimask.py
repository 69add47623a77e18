"""The best of several masks of an object, and the predicted IoU of all of them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from samft.training.losses import MaskLosses, mask_losses
from samft.training.multimask import best_of_masks

S = 64  # the model frame; logits are 16 x 16


def three_masks() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Three masks each of four objects in two images."""
    generator = torch.Generator().manual_seed(8)
    logits = 3 * torch.randn(4, 3, S // 4, S // 4, generator=generator)
    targets = torch.randint(0, 256, (4, 8, 8), generator=generator, dtype=torch.uint8)
    inputs = {
        "targets": targets,
        "windows": torch.tensor([[4.0, 8.0, 40.0, 50.0]]) + torch.arange(4.0)[:, None],
        "image_index": torch.tensor([0, 1, 1, 0]),
        "input_sizes": torch.tensor([[S, S], [40, S]]),
    }
    return logits, torch.rand(4, 3, generator=generator), inputs


def squared_dice(mask_logits: Tensor, iou_predicted: Tensor, **inputs: Tensor) -> MaskLosses:
    """A loss of somebody else's, which prefers other masks."""
    losses = mask_losses(mask_logits, iou_predicted, **inputs, focal_weight=0.0, iou_weight=2.0)
    return losses._replace(total=losses.total - 2 * losses.dice.square())


def untrained_iou(mask_logits: Tensor, iou_predicted: Tensor, **inputs: Tensor) -> MaskLosses:
    """Another one, whose total leaves the predicted IoU out."""
    return mask_losses(mask_logits, iou_predicted, **inputs, iou_weight=0.0)


@pytest.mark.parametrize(
    ("loss", "iou_weight", "is_known"),
    [
        (mask_losses, 1.0, True),
        (squared_dice, 2.0, True),
        (mask_losses, 1.0, False),
        (squared_dice, 2.0, False),
        (untrained_iou, 0.0, False),
    ],
)
def test_the_best_of_three_masks_is_trained_and_the_predicted_iou_of_all(
    loss: Any, iou_weight: float, is_known: bool
) -> None:
    logits, iou_predicted, inputs = three_masks()
    logits.requires_grad_()
    iou_predicted.requires_grad_()
    known = iou_weight if is_known else None
    losses = best_of_masks(logits, iou_predicted, loss=loss, iou_weight=known, **inputs)
    losses.total.sum().backward()
    assert logits.grad is not None and (iou_predicted.grad is not None or not iou_weight)

    input_sizes = inputs.pop("input_sizes")
    best_masks = []
    for k in range(4):
        own = {name: rows[k : k + 1] for name, rows in inputs.items()}
        leaves = [logits[k, n].detach().requires_grad_() for n in range(3)]
        ious = [iou_predicted[k, n].detach().requires_grad_() for n in range(3)]
        of_masks = [
            loss(mask[None], iou[None], input_sizes=input_sizes, **own)
            for mask, iou in zip(leaves, ious, strict=True)
        ]
        parts = [(of.total - iou_weight * of.iou).item() for of in of_masks]
        best = parts.index(min(parts))
        iou = sum(of.iou for of in of_masks) / 3
        total = of_masks[best].total - iou_weight * of_masks[best].iou + iou_weight * iou
        total.sum().backward()
        torch.testing.assert_close(losses.total[k], total[0])
        torch.testing.assert_close(losses.iou[k], iou[0])
        for name in ("focal", "dice", "iou_actual"):
            assert getattr(losses, name)[k] == getattr(of_masks[best], name)[0]
        for n in range(3):
            expected = leaves[n].grad if n == best else torch.zeros_like(leaves[n])
            torch.testing.assert_close(logits.grad[k, n], expected)
            if iou_weight:
                torch.testing.assert_close(iou_predicted.grad[k, n], ious[n].grad)
        best_masks.append(best)
    assert len(set(best_masks)) > 1


def test_the_best_of_one_mask_has_the_losses_of_that_mask() -> None:
    logits, iou_predicted, inputs = three_masks()
    best = best_of_masks(
        logits[:, :1], iou_predicted[:, :1], loss=mask_losses, iou_weight=1.0, **inputs
    )
    for actual, expected in zip(
        best, mask_losses(logits[:, 0], iou_predicted[:, 0], **inputs), strict=True
    ):
        torch.testing.assert_close(actual, expected)
