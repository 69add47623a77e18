"""Focal, dice and IoU losses for one mask per box: one number per mask, in float32.

The sum over masks is divided by the number of masks of the whole optimizer step, over all ranks
and micro-batches, so that neither the number of processes nor accumulation changes what is learnt.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from samft.models.prompted_sam import inside_sides
from samft.training.pixel_sums import pixel_sums

DICE_SMOOTHING = 1.0


class MaskLosses(NamedTuple):
    """Losses and IoU of each mask, float32 [M] each; only `total` carries the weights.

    Attributes:
        total: Weighted sum of the three losses.
        focal: Focal loss, mean over the pixels of the image.
        dice: Dice loss.
        iou: Squared error of the predicted IoU.
        iou_actual: IoU of the mask (logit above 0) with its target; no gradient.
    """

    total: Tensor
    focal: Tensor
    dice: Tensor
    iou: Tensor
    iou_actual: Tensor


LossFunction = Callable[..., MaskLosses]  # `mask_losses` with its weights and image size set


def mask_losses(
    mask_logits: Tensor,
    iou_predicted: Tensor,
    *,
    targets: Tensor,
    image_index: Tensor,
    input_sizes: Tensor,
    image_size: int,
    focal_weight: float = 20.0,
    dice_weight: float = 1.0,
    iou_weight: float = 1.0,
) -> MaskLosses:
    """The three losses of each mask, in float32 whatever autocast does.

    Logits are taken at the resolution of the targets: as they are where the targets are at the
    decoder's own (a quarter of the input), upsampled bilinearly where they are at the input's.
    Memory does not grow with the latter (`pixel_sums`).

    - Focal: the mean over the pixels that are image, not padding.
    - Dice: 1 - (2 |P T| + 1) / (|P| + |T| + 1), areas in pixels of the input. At a quarter of the
      resolution, a smoothing of one cell would be sixteen pixels: enough to make an empty mask
      almost as good as the right one where an object is a few pixels wide.
    - IoU: the squared error of the prediction. The truth is the IoU of the mask, logits above 0,
      with the target, at least one half; an object too small to fill half of any pixel is held to
      the pixels that it fills most. It is 1 where both are empty.

    Args:
        mask_logits: float [M, S/4, S/4].
        iou_predicted: float [M].
        targets: uint8 [M, s, s]; shares in 0..255 for s = S/4, 0 or 1 for s = S.
        image_index: int64 [M], the image of each mask.
        input_sizes: int [N, 2], height and width of each image inside the frame.
        image_size: S.
        focal_weight: Weight of the focal loss.
        dice_weight: Weight of the dice loss.
        iou_weight: Weight of the IoU loss.

    Returns:
        MaskLosses, each [M].

    Source: Lin et al., Focal Loss for Dense Object Detection, 2017; alpha 1/4 and gamma 2 as there.
    Milletari et al., V-Net, 2016; dice smoothed as in MaskFormer.
    """
    with torch.autocast(mask_logits.device.type, enabled=False):
        size = targets.shape[-1]
        cell = image_size // size
        sides = inside_sides(input_sizes, size, cell=cell)[image_index]
        full = 1.0 if cell == 1 else 255.0
        sums = pixel_sums(mask_logits, targets, sides, full=full)
        focal = sums.focal / sides.sum(2).prod(1).clamp(min=1)
        overlap, areas = cell**2 * sums.overlap, cell**2 * (sums.area + sums.target_area)
        dice = 1 - (2 * overlap + DICE_SMOOTHING) / (areas + DICE_SMOOTHING)
        iou_actual = torch.where(sums.union > 0, sums.common / sums.union.clamp(min=1), 1.0)
        iou = (iou_predicted.float() - iou_actual).square()
        total = focal_weight * focal + dice_weight * dice + iou_weight * iou
    return MaskLosses(total, focal, dice, iou, iou_actual)
