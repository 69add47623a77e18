"""Sums over the pixels of each mask that the losses are made of, in a fraction of the memory.

Written out with autograd, focal and dice loss keep a dozen arrays of the size of the masks for
backward: 57 MB for one mask at 1024 x 1024. Here only the decoder's logits and the targets' bytes
are kept; the rest is computed for a few masks at a time, again in backward, and never leaves a
processor's cache. For a logit z, a target t in 0..1 and p = sigmoid(z), weighted by the share w of
the pixel that is image:

    focal    F = sum w a u^2 e,  a = 3/4 - t/2,  u = p + t - 2 p t = 1 - p_t,
                                 e = softplus(z) - z t, the cross-entropy
    overlap  O = sum w p t
    area     A = sum w p

    dF/dz = w a u (u (p - t) + 2 (1 - 2t) p (1 - p) e),  as de/dz = p - t and dp/dz = p (1 - p)
    dO/dz = w t p (1 - p)
    dA/dz = w p (1 - p)

Where targets are four times as fine as the logits, these are upsampled first, bilinearly.

Source: `torchvision.ops.sigmoid_focal_loss` at alpha 1/4 and gamma 2, of which F is the sum.

Focal, dice and IoU losses for one mask per box: one number per mask, in float32.

The sum over masks is divided by the number of masks of the whole optimizer step, over all ranks
and micro-batches, so that neither the number of processes nor accumulation changes what is learnt.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from samft.models.prompted_sam import inside_sides

FOCAL_ALPHA = 0.25  # and gamma 2, which the formulas above have worked in
# Pixels in one go: on a CPU what stays in its cache, on a GPU what keeps it busy.
PIXELS_AT_ONCE = {"cpu": 2**20}
OTHERWISE_AT_ONCE = 2**24


@dataclass
class Pixels:
    """A few masks, pixel by pixel, float32 or wider [m, s, s] each: see the formulas above."""

    logits: Tensor
    targets: Tensor
    inside: Tensor
    p: Tensor
    u: Tensor
    cross_entropy: Tensor

    @classmethod
    def of(cls, logits: Tensor, targets: Tensor, sides: Tensor, *, full: float) -> "Pixels":
        """Computes them.

        Args:
            logits: float [m, s, s], or [m, s / 4, s / 4].
            targets: uint8 [m, s, s].
            sides: float32 [m, 2, s], the share of each row and column that is image.
            full: The target of a pixel that is all object.
        """
        z = logits.to(_wide(logits))
        if targets.shape != z.shape:
            z = F.interpolate(z[:, None], targets.shape[1:], mode="bilinear")[:, 0]
        t = targets.to(z.dtype).div_(full)
        p = z.sigmoid()
        u = torch.addcmul(t, p, t, value=-2).add_(p)
        # softplus(z) = max(z, 0) + log(1 + exp(-|z|))
        cross_entropy = z.abs().neg_().exp_().log1p_().add_(z.clamp(min=0)).addcmul_(z, t, value=-1)
        inside = sides[:, 0, :, None] * sides[:, 1, None, :]
        return cls(z, t, inside.to(z.dtype), p, u, cross_entropy)

    def alpha(self) -> Tensor:
        """The focal loss's a, times the share of the pixel that is image."""
        return torch.mul(self.targets, 2 * FOCAL_ALPHA - 1).add_(1 - FOCAL_ALPHA).mul_(self.inside)


class PixelSums(NamedTuple):
    """Sums over the pixels of each mask, float32 [M]; only the first three carry a gradient.

    Attributes:
        focal: Of the focal loss.
        overlap: Of p t.
        area: Of p.
        target_area: Of t.
        common: Pixels that both the mask (logit above 0) and the target have.
        union: Pixels that either has.
    """

    focal: Tensor
    overlap: Tensor
    area: Tensor
    target_area: Tensor
    common: Tensor
    union: Tensor


def pixel_sums(mask_logits: Tensor, targets: Tensor, sides: Tensor, *, full: float) -> PixelSums:
    """Sums what the losses need over the pixels of each mask, a few masks at a time.

    Args:
        mask_logits: float [M, s, s], or [M, s / 4, s / 4] to be upsampled.
        targets: uint8 [M, s, s], 0 to `full`.
        sides: float32 [M, 2, s], the share of each row and of each column that is image.
        full: The target of a pixel that is all object.

    Returns:
        PixelSums, in float32.
    """
    return PixelSums(*_PixelSums.apply(mask_logits, targets, sides, full))


class _PixelSums(torch.autograd.Function):
    """As `pixel_sums`, with the gradient of the first three sums, made again from the logits.

    No pixel's loss or probability is kept: backward goes through the same parts as forward.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, sides: Tensor, full: float) -> Any:
        ctx.save_for_backward(logits, targets, sides)
        ctx.full = full
        sums = logits.new_zeros(6, len(logits), dtype=_wide(logits))
        for part in _parts(targets):
            pixels = Pixels.of(logits[part], targets[part], sides[part], full=full)
            sums[:, part] = _sums_of(pixels)
        ctx.mark_non_differentiable(*(constant := sums[3:].unbind()))
        return (*sums[:3].unbind(), *constant)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, focal: Tensor, overlap: Tensor, area: Tensor, *_: Tensor) -> Any:
        logits, targets, sides = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for part in _parts(targets):
            pixels = Pixels.of(logits[part], targets[part], sides[part], full=ctx.full)
            weights = (focal[part], overlap[part], area[part])
            found = _gradient_of(pixels, *[weight[:, None, None] for weight in weights])
            if found.shape != logits[part].shape:
                found = shrink(shrink(found, 1), 2)
            gradient[part] = found
        return gradient, None, None, None


def _wide(logits: Tensor) -> torch.dtype:
    """The type that is computed in: float32 for halves, too."""
    return torch.promote_types(logits.dtype, torch.float32)


def _parts(targets: Tensor) -> Iterator[slice]:
    at_once = PIXELS_AT_ONCE.get(targets.device.type, OTHERWISE_AT_ONCE)
    step = max(1, at_once // max(targets[0].numel() if len(targets) else 1, 1))
    return (slice(start, start + step) for start in range(0, len(targets), step))


def _sums_of(pixels: Pixels) -> Tensor:
    t, inside = pixels.targets, pixels.inside
    focal = pixels.alpha().mul_(pixels.u).mul_(pixels.u).mul_(pixels.cross_entropy).sum((1, 2))
    probability = pixels.p.mul_(inside)
    area = probability.sum((1, 2))
    overlap = probability.mul_(t).sum((1, 2))
    target_area = torch.mul(t, inside, out=probability).sum((1, 2))
    # An object too small to fill half of any pixel is held to the pixels that it fills most.
    threshold = t.amax((1, 2), keepdim=True).clamp_(min=1e-6, max=0.5)
    truth = torch.ge(t, threshold, out=t)
    masks = torch.gt(pixels.logits, 0, out=pixels.u).mul_(inside > 0)
    both = masks.sum((1, 2)) + truth.sum((1, 2))
    common = masks.mul_(truth).sum((1, 2))
    return torch.stack([focal, overlap, area, target_area, common, both - common])


def _gradient_of(pixels: Pixels, focal: Tensor, overlap: Tensor, area: Tensor) -> Tensor:
    p, u, t = pixels.p, pixels.u, pixels.targets
    slope = torch.addcmul(p, p, p, value=-1)  # p (1 - p)
    sharpness = pixels.cross_entropy.mul_(slope).mul_(2).addcmul_(pixels.cross_entropy, t, value=-2)
    gradient = p.sub_(t).mul_(u).add_(sharpness).mul_(u).mul_(pixels.alpha()).mul_(focal)
    return gradient.addcmul_(slope.mul_(pixels.inside), t.mul_(overlap).add_(area))


def shrink(gradient: Tensor, dim: int) -> Tensor:
    """The transpose of bilinear upsampling by four along one dimension.

    Output 4 i + r is taken at i + (2 r - 3) / 8, so that it weighs sample i by (5, 7, 7, 5) / 8
    for r = 0 to 3, the sample before by (3, 1, 0, 0) / 8, and the one after by (0, 0, 1, 3) / 8;
    beyond the border stands the border's own sample. Written as sums of slices: PyTorch's own
    backward takes ten times as long on a CPU, and adds in any order on a GPU.

    Args:
        gradient: float, 4 n long in `dim`.
        dim: Not the last but one of a negative count: 0, 1 or 2.

    Returns:
        float, n long in `dim`.
    """
    a, b, c, d = gradient.unflatten(dim, (-1, 4)).unbind(dim + 1)
    total = (a + d).mul_(0.625).add_(b, alpha=0.875).add_(c, alpha=0.875)
    before = (a * 0.375).add_(b, alpha=0.125)
    after = (d * 0.375).add_(c, alpha=0.125)
    last = total.shape[dim] - 1
    total.narrow(dim, 0, last).add_(before.narrow(dim, 1, last))
    total.narrow(dim, 1, last).add_(after.narrow(dim, 0, last))
    total.select(dim, 0).add_(before.select(dim, 0))
    total.select(dim, last).add_(after.select(dim, last))
    return total


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
