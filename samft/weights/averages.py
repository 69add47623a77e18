"""Averages of two state dicts: points on the line between untouched and tuned weights.

Source: Wortsman et al., Robust fine-tuning of zero-shot models, CVPR 2022, arXiv:2109.01903.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_ENCODER = "image_encoder."


def average_states(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], weight: float
) -> dict[str, Tensor]:
    """The weights (1 - w) A + w B; at w = 0 and 1 these of A and of B, to the bit.

    Args:
        first: A.
        second: B, with the same names, shapes and types.
        weight: w, 0 to 1.

    Returns:
        Name to tensor, of the type that A has. Whole numbers and booleans, which have no average,
        are those of the nearer end.

    Example:
        >>> from torch import tensor
        >>> ends = {"scale": tensor([1.0, 2.0])}, {"scale": tensor([2.0, 6.0])}
        >>> average_states(*ends, 0.25)
        {'scale': tensor([1.2500, 3.0000])}
    """
    nearer = first if weight < 0.5 else second
    if weight in (0, 1):
        return dict(nearer)
    return {
        # In float64, rounded once.
        name: torch.lerp(tensor.double(), second[name].double(), weight).to(tensor.dtype)
        if tensor.is_floating_point()
        else nearer[name]
        for name, tensor in first.items()
    }


def differing_names(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors in which two models of the same type differ."""
    return [name for name, tensor in first.items() if not torch.equal(tensor, second[name])]


def have_same_encoder(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Whether the image encoders of two SAMs are equal to the bit."""
    return not any(name.startswith(_ENCODER) for name in differing_names(first, second))


def best_point(ious: Sequence[float], weights: Sequence[float]) -> int:
    """The position of the highest IoU; among equal ones of the lowest weight, the least changed.

    Args:
        ious: Mean IoU of each point.
        weights: Of the second checkpoint.
    """
    return max(range(len(ious)), key=lambda k: (ious[k], -weights[k]))
