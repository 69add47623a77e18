"""The loss of a prompt that is given several masks: that of the best, and the IoU's of all."""

import torch
from torch import Tensor

from samft.training.losses import LossFunction, MaskLosses


def best_of_masks(
    mask_logits: Tensor,
    iou_predicted: Tensor,
    *,
    loss: LossFunction,
    iou_weight: float | None,
    input_sizes: Tensor,
    **of_masks: Tensor,
) -> MaskLosses:
    """The losses of the best of K masks of each object; the IoU's are of all of them, on average.

    The best is the one with the lowest total without the IoU's part: the weighted sum of focal and
    dice loss, or what another loss function has in their place. Only its logits get a gradient. The
    predicted IoU of all masks is trained, because it chooses among them when the model is used.

    Args:
        mask_logits: float [M, K, H/4, W/4].
        iou_predicted: float [M, K].
        loss: Of one mask for each object.
        iou_weight: The weight that the IoU's loss has in the total of `loss`. None: it is not
            known, and its part is what the total has more than if each IoU were predicted rightly.
        input_sizes: See `mask_losses`.
        **of_masks: `targets`, `windows` and `image_index` of the M objects, see `mask_losses`.

    Returns:
        MaskLosses, each [M].

    Source: `supervise_all_iou` of facebookresearch/sam2, and the masks' minimum of Kirillov et al.,
    Segment Anything, 2023, section 3.
    """
    num_objects, count = iou_predicted.shape
    repeated = {name: rows.repeat_interleave(count, 0) for name, rows in of_masks.items()}

    def losses_of(logits: Tensor, iou: Tensor) -> MaskLosses:
        flat = loss(logits.flatten(0, 1), iou.flatten(), input_sizes=input_sizes, **repeated)
        return MaskLosses(*(values.reshape(num_objects, count) for values in flat))

    if iou_weight is None:
        own = losses_of(mask_logits.detach(), iou_predicted)
        losses = losses_of(mask_logits, own.iou_actual.detach())
        without_iou, part_of_iou = losses.total, own.total - losses.total.detach()
    else:
        losses = losses_of(mask_logits, iou_predicted.detach())  # trained below, of all masks
        without_iou = losses.total - iou_weight * losses.iou.detach()
    numbers = torch.arange(count, device=iou_predicted.device)
    is_best = numbers == without_iou.detach().argmin(1, keepdim=True)

    def of_best(values: Tensor) -> Tensor:
        # Not by an index, whose backward adds on a GPU in any order.
        return torch.where(is_best, values, 0).sum(1)

    iou = (iou_predicted.float() - losses.iou_actual).square().mean(1)
    return MaskLosses(
        total=of_best(without_iou)
        + (part_of_iou.mean(1) if iou_weight is None else iou_weight * iou),
        focal=of_best(losses.focal),
        dice=of_best(losses.dice),
        iou=iou,
        iou_actual=of_best(losses.iou_actual),
    )
