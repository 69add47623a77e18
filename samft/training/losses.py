"""Focal, dice and IoU losses, one number per mask, from sums over pixels in closed form.

The caller sums the losses over masks and divides by the number of masks of the whole optimizer
step, over all ranks and micro-batches, so that neither the number of processes nor accumulation
changes what is learnt.

Focal and dice loss are made of three sums over the pixels of a mask. For a logit z, a target t in
0..1 and p = sigmoid(z), where a share w of the pixel is image:

    focal    F = sum w a u^2 e,   a = 3/4 - t/2             alpha: 1/4 for object, 3/4 for none
                                  u = p + t - 2 p t         1 - p_t: how far p is from the target
                                  e = softplus(z) - z t     the cross-entropy
    overlap  O = sum w p t
    area     A = sum w p

Their gradients follow from dp/dz = p (1 - p), du/dz = (1 - 2t) p (1 - p) and de/dz = p - t:

    dF/dz = w a u (u (p - t) + 2 (1 - 2t) p (1 - p) e)
    dO/dz = w p (1 - p) t
    dA/dz = w p (1 - p)

Written out with autograd, the losses would keep a dozen arrays of the size of the masks for
backward, 57 MB for one mask at 1024 x 1024. Here only the decoder's logits and the targets' bytes
are kept. The rest is computed for a few masks at a time, in backward once more, in buffers that are
used several times and never leave a processor's cache. Where targets are four times as fine as the
logits, the logits are upsampled first, bilinearly.

Source: `torchvision.ops.sigmoid_focal_loss` at alpha 1/4 and gamma 2, whose sum is F.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from samft.models.prompted_sam import inside_sides

FOCAL_ALPHA = 0.25  # gamma is 2, which the formulas above have built in
DICE_SMOOTHING = 1.0
# Pixels computed at once: on a CPU what stays in its cache, elsewhere what keeps a GPU busy.
PIXELS_AT_ONCE = {"cpu": 2**20}
PIXELS_AT_ONCE_ELSEWHERE = 2**24


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

    Logits are compared at the resolution of the targets: as they are if the targets have the
    decoder's own (a quarter of the input), upsampled bilinearly if the targets have the input's.
    Memory does not grow with the latter (`focal_dice_sums`).

    - Focal: the mean over the pixels that are image, not padding.
    - Dice: 1 - (2 |P T| + 1) / (|P| + |T| + 1), areas in pixels of the input. At a quarter of the
      resolution, a smoothing of one cell would be sixteen pixels: enough to make an empty mask
      almost as good as the right one where an object is a few pixels wide.
    - IoU: the squared error of the prediction. The actual IoU compares the mask, logits above 0,
      with the pixels whose target is at least one half; an object too small to fill half of any
      pixel counts as the pixels that it fills most. It is 1 where both are empty.

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
        cell = image_size // size  # pixels of the input along the side of a target's pixel
        sides = inside_sides(input_sizes, size, cell=cell)[image_index]
        full = 1.0 if cell == 1 else 255.0
        sums = focal_dice_sums(mask_logits, targets, sides, full=full)
        focal = sums.focal / sides.sum(2).prod(1).clamp(min=1)
        overlap, areas = cell**2 * sums.overlap, cell**2 * (sums.area + sums.target_area)
        dice = 1 - (2 * overlap + DICE_SMOOTHING) / (areas + DICE_SMOOTHING)
        iou_actual = torch.where(sums.union > 0, sums.intersection / sums.union.clamp(min=1), 1.0)
        iou = (iou_predicted.float() - iou_actual).square()
        total = focal_weight * focal + dice_weight * dice + iou_weight * iou
    return MaskLosses(total, focal, dice, iou, iou_actual)


class FocalDiceSums(NamedTuple):
    """Sums over the pixels of each mask, float32 [M]; only the first three carry a gradient.

    Attributes:
        focal: F, of the focal loss.
        overlap: O, of p t.
        area: A, of p.
        target_area: Of t.
        intersection: Pixels in both the mask (logit above 0) and the target.
        union: Pixels in either.
    """

    focal: Tensor
    overlap: Tensor
    area: Tensor
    target_area: Tensor
    intersection: Tensor
    union: Tensor


def focal_dice_sums(
    mask_logits: Tensor, targets: Tensor, sides: Tensor, *, full: float
) -> FocalDiceSums:
    """The sums over the pixels of each mask that the losses are made of.

    Args:
        mask_logits: float [M, s, s], or [M, s / 4, s / 4] to be upsampled.
        targets: uint8 [M, s, s], 0 to `full`.
        sides: float32 [M, 2, s], the share of each row and of each column that is image.
        full: The target of a pixel that is all object.

    Returns:
        FocalDiceSums, in float32.
    """
    return FocalDiceSums(*_FocalDiceSums.apply(mask_logits, targets, sides, full))


class _FocalDiceSums(torch.autograd.Function):
    """`focal_dice_sums`, a few masks at a time, with the gradient of the first three sums.

    Nothing of the size of the pixels is kept: backward computes the same chunks as forward again.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, sides: Tensor, full: float) -> Any:
        ctx.save_for_backward(logits, targets, sides)
        ctx.full = full
        sums = logits.new_zeros(6, len(logits), dtype=_at_least_float32(logits))
        for chunk in _mask_chunks(targets):
            pixels = _Pixels.from_logits(logits[chunk], targets[chunk], sides[chunk], full=full)
            sums[:, chunk] = _sum_pixels(pixels)
        ctx.mark_non_differentiable(*(constant := sums[3:].unbind()))
        return (*sums[:3].unbind(), *constant)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_focal: Tensor, d_overlap: Tensor, d_area: Tensor, *_: Tensor) -> Any:
        logits, targets, sides = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for chunk in _mask_chunks(targets):
            pixels = _Pixels.from_logits(logits[chunk], targets[chunk], sides[chunk], full=ctx.full)
            of_masks = (d_focal[chunk], d_overlap[chunk], d_area[chunk])
            d_pixels = _gradient_of_pixels(pixels, *[d[:, None, None] for d in of_masks])
            if d_pixels.shape != logits[chunk].shape:
                d_pixels = upsampling_backward(upsampling_backward(d_pixels, 1), 2)
            gradient[chunk] = d_pixels
        return gradient, None, None, None


def _at_least_float32(logits: Tensor) -> torch.dtype:
    """The type to compute in: float32 for halves, too."""
    return torch.promote_types(logits.dtype, torch.float32)


def _mask_chunks(targets: Tensor) -> Iterator[slice]:
    at_once = PIXELS_AT_ONCE.get(targets.device.type, PIXELS_AT_ONCE_ELSEWHERE)
    step = max(1, at_once // max(targets[0].numel() if len(targets) else 1, 1))
    return (slice(start, start + step) for start in range(0, len(targets), step))


@dataclass
class _Pixels:
    """A few masks pixel by pixel, in the letters of the top, float32 or wider [m, s, s] each.

    `_sum_pixels` and `_gradient_of_pixels` overwrite these buffers; each says with what.

    Attributes:
        logits: z.
        targets: t.
        inside: w.
        p: sigmoid(z).
        u: p + t - 2 p t.
        cross_entropy: e.
    """

    logits: Tensor
    targets: Tensor
    inside: Tensor
    p: Tensor
    u: Tensor
    cross_entropy: Tensor

    @classmethod
    def from_logits(
        cls, logits: Tensor, targets: Tensor, sides: Tensor, *, full: float
    ) -> "_Pixels":
        """Computes all of them.

        Args:
            logits: float [m, s, s], or [m, s / 4, s / 4].
            targets: uint8 [m, s, s].
            sides: float32 [m, 2, s], the share of each row and column that is image.
            full: The target of a pixel that is all object.
        """
        z = logits.to(_at_least_float32(logits))
        if targets.shape != z.shape:
            z = F.interpolate(z[:, None], targets.shape[1:], mode="bilinear")[:, 0]
        t = targets.to(z.dtype).div_(full)
        p = z.sigmoid()
        u = torch.addcmul(t, p, t, value=-2).add_(p)  # t - 2 p t, + p
        # softplus(z) = max(z, 0) + log(1 + exp(-|z|)), which cannot overflow.
        e = z.abs().neg_().exp_().log1p_()  # log(1 + exp(-|z|))
        e = e.add_(z.clamp(min=0)).addcmul_(z, t, value=-1)  # + max(z, 0), - z t
        inside = sides[:, 0, :, None] * sides[:, 1, None, :]
        return cls(z, t, inside.to(z.dtype), p, u, e)

    def weighted_alpha(self) -> Tensor:
        """The product w a = w (3/4 - t/2), in a buffer of its own."""
        a = torch.mul(self.targets, 2 * FOCAL_ALPHA - 1).add_(1 - FOCAL_ALPHA)
        return a.mul_(self.inside)


def _sum_pixels(pixels: _Pixels) -> Tensor:
    """The six sums of `FocalDiceSums`, [6, m]. Overwrites p, t and u."""
    t, w, u, e = pixels.targets, pixels.inside, pixels.u, pixels.cross_entropy
    focal = pixels.weighted_alpha().mul_(u).mul_(u).mul_(e).sum((1, 2))  # w a u u e

    weighted_p = pixels.p.mul_(w)  # reuses the buffer of p: w p
    area = weighted_p.sum((1, 2))
    weighted_overlap = weighted_p.mul_(t)  # reuses it again: w p t
    overlap = weighted_overlap.sum((1, 2))
    weighted_target = torch.mul(t, w, out=weighted_overlap)  # and again: w t
    target_area = weighted_target.sum((1, 2))

    # Binary from here on, 1 or 0. An object too small to fill half of any pixel counts as the
    # pixels that it fills most; the minimum keeps an empty target empty.
    threshold = t.amax((1, 2), keepdim=True).clamp_(min=1e-6, max=0.5)
    truth = torch.ge(t, threshold, out=t)  # reuses the buffer of t
    masks = torch.gt(pixels.logits, 0, out=u).mul_(w > 0)  # reuses the buffer of u
    both_areas = masks.sum((1, 2)) + truth.sum((1, 2))
    intersection = masks.mul_(truth).sum((1, 2))
    union = both_areas - intersection
    return torch.stack([focal, overlap, area, target_area, intersection, union])


def _gradient_of_pixels(pixels: _Pixels, focal: Tensor, overlap: Tensor, area: Tensor) -> Tensor:
    """The gradient of each logit, [m, s, s]: focal dF/dz + overlap dO/dz + area dA/dz.

    Overwrites p, t, the cross-entropy and the returned buffer; the last three arguments are the
    gradients of the sums, [m, 1, 1].
    """
    p, u, t, w = pixels.p, pixels.u, pixels.targets, pixels.inside
    slope = torch.addcmul(p, p, p, value=-1)  # p (1 - p) = p - p p

    # dF/dz = w a u (u (p - t) + 2 (1 - 2t) p (1 - p) e), from the inside out.
    twice_slope_e = pixels.cross_entropy.mul_(slope).mul_(2)  # reuses the buffer of e
    second_term = twice_slope_e.addcmul_(twice_slope_e, t, value=-2)  # times 1 - 2t, in place
    gradient = p.sub_(t)  # reuses the buffer of p, to the end: p - t
    gradient = gradient.mul_(u).add_(second_term).mul_(u).mul_(pixels.weighted_alpha())
    gradient = gradient.mul_(focal)

    # overlap dO/dz + area dA/dz = w p (1 - p) (overlap t + area)
    weighted_slope = slope.mul_(w)
    overlap_and_area = t.mul_(overlap).add_(area)  # reuses the buffer of t, no longer needed
    return gradient.addcmul_(weighted_slope, overlap_and_area)


def upsampling_backward(gradient: Tensor, dim: int) -> Tensor:
    """The transpose of bilinear upsampling by four along one dimension.

    Output 4 i + r is sampled at i + (2 r - 3) / 8. For r = 0 to 3 it weighs sample i by
    (5, 7, 7, 5) / 8, the sample before by (3, 1, 0, 0) / 8, and the one after by (0, 0, 1, 3) / 8;
    beyond the border stands the border's own sample. Written as sums of slices: PyTorch's own
    backward takes ten times as long on a CPU, and on a GPU adds in no fixed order.

    Args:
        gradient: float, 4 n long in `dim`.
        dim: 0, 1 or 2; counted from the front, not negative.

    Returns:
        float, n long in `dim`.
    """
    a, b, c, d = gradient.unflatten(dim, (-1, 4)).unbind(dim + 1)  # r = 0, 1, 2, 3
    to_own = (a + d).mul_(0.625).add_(b, alpha=0.875).add_(c, alpha=0.875)
    to_before = (a * 0.375).add_(b, alpha=0.125)
    to_after = (d * 0.375).add_(c, alpha=0.125)
    last = to_own.shape[dim] - 1
    total = to_own
    total.narrow(dim, 0, last).add_(to_before.narrow(dim, 1, last))
    total.narrow(dim, 1, last).add_(to_after.narrow(dim, 0, last))
    # The first has no sample before it, and the last none after: theirs goes to themselves.
    total.select(dim, 0).add_(to_before.select(dim, 0))
    total.select(dim, last).add_(to_after.select(dim, last))
    return total
