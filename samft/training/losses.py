"""Focal, dice and IoU losses, one number per mask, taken on a fine grid over each object.

The caller sums the losses over masks and divides by the number of masks of the whole optimizer
step, over all ranks and micro-batches, so that neither the number of processes nor accumulation
changes what is learnt.

Each object has a *window*, a rectangle around it with a grid of G x G cells, on which its target is
drawn. The decoder's logits, which have cells of 4 x 4 px of the input, are interpolated at the
centres of the window's cells: bilinearly, as they are before a mask is thresholded. So a small
object is compared as finely as a large one, at the same cost. Outside of its window an object has
no pixels; there, the logits are compared with 0 as they are, in the decoder's own cells. Together,
window and surroundings cover the image once: all sums below are areas in square pixels of the
input, whatever the size of the cells.

For a logit z, a target t in 0..1 and p = sigmoid(z), in a cell of which an area w is image:

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
backward. Here only the decoder's logits and the targets' bytes are kept. The rest is computed for a
few masks at a time, in backward once more, in buffers that are used several times and never leave a
processor's cache.

Source: `torchvision.ops.sigmoid_focal_loss` at alpha 1/4 and gamma 2, whose sum is F. A loss at
samples of the logits that lie where they matter is PointRend's (Kirillov et al., 2020).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from samft.data.transforms import LOW_CELL
from samft.runtime.device import full_precision

FOCAL_ALPHA = 0.25  # gamma is 2, which the formulas above have built in
# Cells computed at once: on a CPU what stays in its cache, elsewhere what keeps a GPU busy.
CELLS_AT_ONCE = {"cpu": 2**20}
CELLS_AT_ONCE_ELSEWHERE = 2**24


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


LossFunction = Callable[..., MaskLosses]  # `mask_losses` with its weights set


def mask_losses(
    mask_logits: Tensor,
    iou_predicted: Tensor,
    *,
    targets: Tensor,
    windows: Tensor,
    image_index: Tensor,
    input_sizes: Tensor,
    focal_weight: float = 10.0,
    dice_weight: float = 1.0,
    iou_weight: float = 1.0,
) -> MaskLosses:
    """The three losses of each mask, in float32 whatever autocast does.

    Logits are interpolated at the centres of the targets' cells. Memory does not grow with the
    number of cells (`mask_sums`).

    - Focal: the mean over the pixels that are image, not padding.
    - Dice: 1 - (2 |P T| + c) / (|P| + |T| + c), smoothed by c, the area of one cell: an empty mask
      of an empty target has none, and an empty mask of the smallest object has nearly all.
    - IoU: the squared error of the prediction. The actual IoU compares the mask, logits above 0,
      with the cells whose target is at least one half; an object too thin to fill half of any
      cell counts as the cells that it fills most. It is 1 where both are empty.

    Args:
        mask_logits: float [M, H/4, W/4].
        iou_predicted: float [M].
        targets: uint8 [M, G, G], the share of each cell of the window that the object covers,
            times 255.
        windows: float32 [M, 4], x0 y0 x1 y1 in pixels of the input, which contain the objects; may
            reach beyond the image.
        image_index: int64 [M], the image of each mask.
        input_sizes: int [N, 2], height and width of each image inside the frame.
        focal_weight: Weight of the focal loss.
        dice_weight: Weight of the dice loss.
        iou_weight: Weight of the IoU loss.

    Returns:
        MaskLosses, each [M].

    Source: Lin et al., Focal Loss for Dense Object Detection, 2017; alpha 1/4 and gamma 2 as there.
    Milletari et al., V-Net, 2016.
    """
    with torch.autocast(mask_logits.device.type, enabled=False):
        extents = input_sizes[image_index].float()
        sums = mask_sums(mask_logits, targets, windows, extents)
        focal = sums.focal / extents.prod(1).clamp(min=1)
        cell = (windows[:, 2:] - windows[:, :2]).prod(1) / targets.shape[-1] ** 2
        dice = 1 - (2 * sums.overlap + cell) / (sums.area + sums.target_area + cell)
        is_empty = sums.union <= 0
        iou_actual = torch.where(is_empty, 1.0, sums.intersection / sums.union.clamp(min=1e-12))
        iou = (iou_predicted.float() - iou_actual).square()
        total = focal_weight * focal + dice_weight * dice + iou_weight * iou
    return MaskLosses(total, focal, dice, iou, iou_actual)


class MaskSums(NamedTuple):
    """Areas of each mask in pixels of the input, float32 [M]; the first three have gradients.

    Attributes:
        focal: F, of the focal loss.
        overlap: O, of p t.
        area: A, of p.
        target_area: Of t.
        intersection: Of what is both mask (logit above 0) and target.
        union: Of what is either.
    """

    focal: Tensor
    overlap: Tensor
    area: Tensor
    target_area: Tensor
    intersection: Tensor
    union: Tensor


def mask_sums(mask_logits: Tensor, targets: Tensor, windows: Tensor, extents: Tensor) -> MaskSums:
    """The sums over window and surroundings of each mask that the losses are made of.

    Args:
        mask_logits: float [M, s, s'], in cells of 4 x 4 px.
        targets: uint8 [M, G, G], 0 to 255.
        windows: float32 [M, 4], x0 y0 x1 y1, px.
        extents: float32 [M, 2], height and width of each mask's image inside the frame, px.

    Returns:
        MaskSums, in float32.

    Example:
        >>> logits = torch.full((1, 16, 16), 20.0)  # the mask is all of 64 x 64 px
        >>> targets = torch.full((1, 8, 8), 255, dtype=torch.uint8)  # all of the window, the left
        >>> windows = torch.tensor([[0.0, 0.0, 32.0, 64.0]])  # half of the image
        >>> sums = mask_sums(logits, targets, windows, torch.tensor([[64.0, 64.0]]))
        >>> sums.target_area.item(), sums.intersection.item(), sums.union.item()
        (2048.0, 2048.0, 4096.0)
    """
    return MaskSums(*_MaskSums.apply(mask_logits, targets, windows, extents))


class _MaskSums(torch.autograd.Function):
    """`mask_sums`, a few masks at a time, with the gradient of the first three sums.

    Nothing of the size of the targets is kept: backward computes the same chunks as forward again.
    Only the geometry is, which is as small as a few rows of each mask.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, windows: Tensor, extents: Tensor) -> Any:
        dtype, sizes = _at_least_float32(logits), (targets.shape[-1], *logits.shape[1:])
        geometry = Geometry.from_windows(windows.to(dtype), extents.to(dtype), *sizes)
        ctx.save_for_backward(logits, targets, *geometry)
        sums = logits.new_zeros(6, len(logits), dtype=dtype)
        for chunk in mask_chunks(logits, targets):
            grids = Grids(logits[chunk], targets[chunk], geometry.rows(chunk))
            sums[:, chunk] = _sum_cells(grids.window()) + _sum_surroundings(*grids.surroundings())
        ctx.mark_non_differentiable(*(constant := sums[3:].unbind()))
        return (*sums[:3].unbind(), *constant)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_focal: Tensor, d_overlap: Tensor, d_area: Tensor, *_: Tensor) -> Any:
        logits, targets, *lengths = ctx.saved_tensors
        geometry, gradient = Geometry(*lengths), torch.empty_like(logits)
        for chunk in mask_chunks(logits, targets):
            grids = Grids(logits[chunk], targets[chunk], geometry.rows(chunk))
            of_masks = [d[chunk, None, None] for d in (d_focal, d_overlap, d_area)]
            of_window = _gradient_of_cells(grids.window(), *of_masks)
            gradient[chunk] = grids.interpolation_backward(of_window).add_(
                _gradient_of_surroundings(*grids.surroundings(), of_masks[0], of_masks[2])
            )
        return gradient, None, None, None


def _at_least_float32(logits: Tensor) -> torch.dtype:
    """The type to compute in: float32 for halves, too."""
    return torch.promote_types(logits.dtype, torch.float32)


def mask_chunks(logits: Tensor, targets: Tensor) -> Iterator[slice]:
    """The masks [M, s, s'] and targets [M, G, G] to compute with at once, a few at a time."""
    at_once = CELLS_AT_ONCE.get(targets.device.type, CELLS_AT_ONCE_ELSEWHERE)
    cells = max(1, logits.shape[1:].numel(), targets.shape[1:].numel())
    step = max(1, at_once // cells)
    return (slice(start, start + step) for start in range(0, len(targets), step))


class Geometry(NamedTuple):
    """Where the windows of M masks lie on the image, along y and x.

    Attributes:
        inside: [M, 2, G], the length in px of each row and column of a window that is image.
        of_image: [M, 2, n], the same of the decoder's cells; n is the larger of s and s'.
        of_window: [M, 2, n], of the decoder's cells, the length that is image and window.
        start: [M, 2], where a window begins, px.
        cell: [M, 2], the size of its cells, px.
    """

    inside: Tensor
    of_image: Tensor
    of_window: Tensor
    start: Tensor
    cell: Tensor

    @classmethod
    def from_windows(
        cls, windows: Tensor, extents: Tensor, size: int, rows: int, columns: int
    ) -> "Geometry":
        """Of windows of G = `size` cells, in the letters of `mask_sums`; s `rows`, s' `columns`."""
        low = max(rows, columns)
        start, end = windows.reshape(-1, 2, 2).flip(2).unbind(1)  # along y, then x: [M, 2]
        cell = (end - start) / size
        zeros, fours = torch.zeros_like(start), torch.full_like(start, LOW_CELL)
        within = start.clamp(min=0), torch.minimum(end, extents)
        return cls(
            _overlaps(start, cell, size, zeros, extents),
            _overlaps(zeros, fours, low, zeros, extents),
            _overlaps(zeros, fours, low, *within),
            start,
            cell,
        )

    def rows(self, chunk: slice) -> "Geometry":
        """Of a few of the masks."""
        return Geometry(*(tensor[chunk] for tensor in self))


class Grids:
    """The two grids on which a few masks are compared with their targets: window, surroundings."""

    def __init__(self, logits: Tensor, targets: Tensor, geometry: Geometry) -> None:
        """See `mask_sums`; of m masks."""
        self.logits = logits.to(_at_least_float32(logits))
        self.targets, self.geometry = targets, geometry
        centres = cell_centres(geometry.start, geometry.cell, targets.shape[-1])
        self.weights = tuple(
            _interpolation_weights(centres[:, axis], low)
            for axis, low in enumerate(logits.shape[1:])
        )

    def window(self) -> "_Cells":
        """The cells of the windows, with the logits interpolated at their centres."""
        weights = outer_product(self.geometry.inside)
        return _Cells.from_logits(self.window_logits(), self.window_targets(), weights)

    def window_logits(self) -> Tensor:
        """The logits at the centres of the windows' cells, [m, G, G]."""
        rows, columns = self.weights
        with full_precision(self.logits.device):
            return rows @ self.logits @ columns.transpose(1, 2)

    def window_targets(self) -> Tensor:
        """The share of each cell of the windows that is object, [m, G, G], a new tensor."""
        return self.targets.to(self.logits.dtype).div_(255)

    def surroundings(self) -> tuple[Tensor, Tensor]:
        """The decoder's logits, and the area of each cell outside of the window, where t is 0."""
        of_image, of_window = self.geometry.of_image, self.geometry.of_window
        cells = self.logits.shape[1:]
        return self.logits, outer_product(of_image, *cells).sub_(outer_product(of_window, *cells))

    def interpolation_backward(self, gradient: Tensor) -> Tensor:
        """From a gradient in the cells of the windows, [m, G, G], to that of the logits."""
        # A matrix product, as the interpolation is: on a GPU it adds in a fixed order.
        rows, columns = self.weights
        with full_precision(gradient.device):
            return rows.transpose(1, 2) @ gradient @ columns


def _overlaps(start: Tensor, cell: Tensor, size: int, low: Tensor, high: Tensor) -> Tensor:
    # The length in px of each cell that lies between `low` and `high`: [m, 2, size] along y and x.
    # Grids begin at `start` and have `size` cells; arguments are [m, 2].
    numbers = torch.arange(size + 1, device=start.device, dtype=start.dtype)
    edges = start[..., None] + numbers * cell[..., None]
    return edges.clamp_(low[..., None], high[..., None]).diff()


def outer_product(lengths: Tensor, rows: int | None = None, columns: int | None = None) -> Tensor:
    """From something along y and x, [m, 2, n], to products: [m, n, n], or [m, rows, columns]."""
    return lengths[:, 0, :rows, None] * lengths[:, 1, None, :columns]


def cell_centres(start: Tensor, cell: Tensor, size: int) -> Tensor:
    """The centres of cells of size `cell` [m, 2] from `start` [m, 2] on, px: [m, 2, size]."""
    numbers = torch.arange(size, device=start.device, dtype=start.dtype)
    return start[..., None] + (numbers + 0.5) * cell[..., None]


def _interpolation_weights(centres: Tensor, low: int) -> Tensor:
    # Bilinear, along one axis: [m, size, low], the weight of each logit at places [m, size], px.
    # Logits are at the centres of cells of LOW_CELL; beyond the outermost ones, the nearest counts,
    # as in torch's `interpolate`.
    at = (centres / LOW_CELL - 0.5).clamp_(0, low - 1)
    logits = torch.arange(low, device=centres.device, dtype=centres.dtype)
    return (1 - (at[..., None] - logits).abs_()).clamp_(min=0)


@dataclass
class _Cells:
    """Cells of a few masks, in the letters of the top, float32 or wider [m, g, g] each.

    `_sum_cells` and `_gradient_of_cells` overwrite these buffers; each says with what.

    Attributes:
        logits: z.
        targets: t.
        weights: w, px^2.
        p: sigmoid(z).
        u: p + t - 2 p t.
        cross_entropy: e.
    """

    logits: Tensor
    targets: Tensor
    weights: Tensor
    p: Tensor
    u: Tensor
    cross_entropy: Tensor

    @classmethod
    def from_logits(cls, z: Tensor, t: Tensor, weights: Tensor) -> "_Cells":
        """Computes all of them."""
        p = z.sigmoid()
        u = torch.addcmul(t, p, t, value=-2).add_(p)  # t - 2 p t, + p
        # softplus(z) = max(z, 0) + log(1 + exp(-|z|)), which cannot overflow.
        e = z.abs().neg_().exp_().log1p_()  # log(1 + exp(-|z|))
        e = e.add_(z.clamp(min=0)).addcmul_(z, t, value=-1)  # + max(z, 0), - z t
        return cls(z, t, weights, p, u, e)

    def weighted_alpha(self) -> Tensor:
        """The product w a = w (3/4 - t/2), in a buffer of its own."""
        a = torch.mul(self.targets, 2 * FOCAL_ALPHA - 1).add_(1 - FOCAL_ALPHA)
        return a.mul_(self.weights)


def object_threshold(targets: Tensor) -> Tensor:
    """The share from which on a cell of targets [m, G, G] counts as object: [m, 1, 1].

    One half; but an object too thin to fill half of any cell counts as the cells that it fills
    most. Above 0, so that an empty target stays empty.
    """
    return targets.amax((1, 2), keepdim=True).clamp_(min=1e-6, max=0.5)


def _sum_cells(cells: _Cells) -> Tensor:
    """The six sums of `MaskSums`, [6, m]. Overwrites p, t and u."""
    t, w, u, e = cells.targets, cells.weights, cells.u, cells.cross_entropy
    focal = cells.weighted_alpha().mul_(u).mul_(u).mul_(e).sum((1, 2))  # w a u u e

    weighted_p = cells.p.mul_(w)  # reuses the buffer of p: w p
    area = weighted_p.sum((1, 2))
    weighted_overlap = weighted_p.mul_(t)  # reuses it again: w p t
    overlap = weighted_overlap.sum((1, 2))
    weighted_target = torch.mul(t, w, out=weighted_overlap)  # and again: w t
    target_area = weighted_target.sum((1, 2))

    # Binary from here on, w or 0.
    truth = torch.ge(t, object_threshold(t), out=t).mul_(w)  # reuses the buffer of t
    masks = torch.gt(cells.logits, 0, out=u)  # reuses the buffer of u
    areas = (masks * w).sum((1, 2)) + truth.sum((1, 2))
    intersection = masks.mul_(truth).sum((1, 2))
    return torch.stack([focal, overlap, area, target_area, intersection, areas - intersection])


def _gradient_of_cells(cells: _Cells, focal: Tensor, overlap: Tensor, area: Tensor) -> Tensor:
    """The gradient of each logit, [m, g, g]: focal dF/dz + overlap dO/dz + area dA/dz.

    Overwrites p, t, the cross-entropy and the returned buffer; the last three arguments are the
    gradients of the sums, [m, 1, 1].
    """
    p, u, t, w = cells.p, cells.u, cells.targets, cells.weights
    slope = torch.addcmul(p, p, p, value=-1)  # p (1 - p) = p - p p

    # dF/dz = w a u (u (p - t) + 2 (1 - 2t) p (1 - p) e), from the inside out.
    twice_slope_e = cells.cross_entropy.mul_(slope).mul_(2)  # reuses the buffer of e
    second_term = twice_slope_e.addcmul_(twice_slope_e, t, value=-2)  # times 1 - 2t, in place
    gradient = p.sub_(t)  # reuses the buffer of p, to the end: p - t
    gradient = gradient.mul_(u).add_(second_term).mul_(u).mul_(cells.weighted_alpha())
    gradient = gradient.mul_(focal)

    # overlap dO/dz + area dA/dz = w p (1 - p) (overlap t + area)
    weighted_slope = slope.mul_(w)
    overlap_and_area = t.mul_(overlap).add_(area)  # reuses the buffer of t, no longer needed
    return gradient.addcmul_(weighted_slope, overlap_and_area)


def _sum_surroundings(z: Tensor, w: Tensor) -> Tensor:
    """`_sum_cells` where there is no object: u is p, and only F, A and the union are not 0."""
    p = z.sigmoid()
    weighted_p = p * w
    area = weighted_p.sum((1, 2))
    e = F.softplus(z)
    focal = weighted_p.mul_(p).mul_(e).sum((1, 2)) * (1 - FOCAL_ALPHA)
    union = torch.gt(z, 0, out=e).mul_(w).sum((1, 2))  # reuses the buffer of e
    none = torch.zeros_like(area)
    return torch.stack([focal, none, area, none, none, union])


def _gradient_of_surroundings(z: Tensor, w: Tensor, focal: Tensor, area: Tensor) -> Tensor:
    """`_gradient_of_cells` where there is no object: focal dF/dz + area dA/dz."""
    p = z.sigmoid()
    slope = torch.addcmul(p, p, p, value=-1)  # p (1 - p)
    # dF/dz = w 3/4 p (p p + 2 p (1 - p) e) = w 3/4 p p (p + 2 (1 - p) e)
    bracket = F.softplus(z).mul_(1 - p).mul_(2).add_(p)
    focal_part = bracket.mul_(p).mul_(p).mul_(focal * (1 - FOCAL_ALPHA))
    return focal_part.addcmul_(slope, area).mul_(w)
