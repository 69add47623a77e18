"""Focal, dice and IoU losses for one mask per box: one number per mask, in float32.

The sum over masks is divided by the number of masks of the whole optimizer step, over all ranks
and micro-batches, so that neither the number of processes nor accumulation changes what is learnt.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

import samft.torchvision_cure  # noqa: F401  (before all that imports torchvision)
from samft.prompted import inside_image

from torchvision.ops import sigmoid_focal_loss

FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2.0
DICE_SMOOTHING = 1.0


@dataclass
class MaskLosses:
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


def focal_loss(mask_logits: Tensor, targets: Tensor, inside: Tensor) -> Tensor:
    """Focal loss of each mask, mean over its image's pixels.

    Args:
        mask_logits: float32 [M, h, w].
        targets: float32 [M, h, w] in 0..1; the share of the pixel that is object.
        inside: float32 [M, h, w] in 0..1; the share of the pixel that is image, not padding.

    Returns:
        float32 [M].

    Source: Lin et al., Focal Loss for Dense Object Detection, 2017; alpha and gamma as there.
    """
    per_pixel = sigmoid_focal_loss(mask_logits, targets, alpha=FOCAL_ALPHA, gamma=FOCAL_GAMMA)
    return (per_pixel * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)


def dice_loss(
    mask_logits: Tensor, targets: Tensor, inside: Tensor, *, pixel_area: float = 1.0
) -> Tensor:
    """Dice loss of each mask, 1 - (2 |P T| + 1) / (|P| + |T| + 1), areas in input pixels.

    At a quarter of the resolution, a smoothing of one cell would be sixteen pixels: enough to make
    an empty mask almost as good as the right one where an object is a few pixels wide.

    Args:
        mask_logits: float32 [M, h, w].
        targets: float32 [M, h, w] in 0..1.
        inside: float32 [M, h, w] in 0..1.
        pixel_area: Pixels of the model input that one pixel of these covers.

    Returns:
        float32 [M].

    Source: Milletari et al., V-Net, 2016; smoothing as in MaskFormer.
    """
    probabilities = mask_logits.sigmoid() * inside
    overlap = pixel_area * (probabilities * targets).sum((1, 2))
    total = pixel_area * (probabilities + targets * inside).sum((1, 2))
    return 1 - (2 * overlap + DICE_SMOOTHING) / (total + DICE_SMOOTHING)


@torch.no_grad()
def mask_iou(mask_logits: Tensor, targets: Tensor, inside: Tensor) -> Tensor:
    """IoU of each mask, thresholded at logit 0, with its target, thresholded at one half.

    An object too small to fill half of any pixel is held to the pixels that it fills most.

    Args:
        mask_logits: float [M, h, w].
        targets: float [M, h, w] in 0..1.
        inside: float [M, h, w] in 0..1.

    Returns:
        float32 [M]; 1 where both are empty.
    """
    threshold = targets.amax((1, 2), keepdim=True).clamp(min=1e-6, max=0.5)
    truth = targets >= threshold
    masks = (mask_logits > 0) & (inside > 0)
    intersection = (masks & truth).sum((1, 2)).float()
    union = (masks | truth).sum((1, 2)).float()
    return torch.where(union > 0, intersection / union.clamp(min=1), 1.0)


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
    """
    with torch.autocast(mask_logits.device.type, enabled=False):
        size = targets.shape[-1]
        logits = mask_logits.float()
        shares = targets.float() if size == image_size else targets.float() / 255
        if size != logits.shape[-1]:
            logits = F.interpolate(logits[:, None], (size, size), mode="bilinear")[:, 0]
        cell = image_size // size
        inside = inside_image(input_sizes, size, cell=cell)[image_index]
        focal = focal_loss(logits, shares, inside)
        dice = dice_loss(logits, shares, inside, pixel_area=cell**2)
        iou_actual = mask_iou(logits, shares, inside)
        iou = (iou_predicted.float() - iou_actual).square()
        total = focal_weight * focal + dice_weight * dice + iou_weight * iou
    return MaskLosses(total, focal, dice, iou, iou_actual)
