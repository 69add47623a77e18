"""The pull towards the weights that a run started from, so that it forgets less of what SAM knew.

Source: Li et al., Explicit inductive bias for transfer learning with convolutional networks, ICML
2018, arXiv:1802.01483 (L2-SP); decoupled from the gradient as AdamW's weight decay is (Loshchilov
and Hutter, ICLR 2019, arXiv:1711.05101).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from samft.models.lora import is_down_projection


class Anchor:
    """Pulls parameters p towards their values p0 at the start: p <- p - rate weight (p - p0).

    Of an adapter, whose update of a weight is (alpha / r) B A, only B is pulled, towards zero: so
    the merged weight is pulled towards the base's, by the same share.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, weight: float) -> None:
        """Keeps a copy of the parameters as they are now.

        Args:
            parameters: What is trained, by name.
            weight: See the class; times any learning rate at most 1.
        """
        self.weight = weight
        self._start = {
            name: parameter.detach().clone()
            for name, parameter in parameters.items()
            if not is_down_projection(name)
        }
        self._of_parameter = {
            id(parameter): self._start[name]
            for name, parameter in parameters.items()
            if name in self._start
        }

    @torch.no_grad()
    def pull(self, optimizer: torch.optim.Optimizer) -> None:
        """Moves all parameters of an optimizer, each at the learning rate of its group."""
        for group in optimizer.param_groups:
            pulled = [p for p in group["params"] if id(p) in self._of_parameter]
            start = [self._of_parameter[id(p)] for p in pulled]
            if pulled:
                torch._foreach_lerp_(pulled, start, group["lr"] * self.weight)

    def start_values(self) -> dict[str, Tensor]:
        """The values at the start by name, for `last.ckpt`: their file may change meanwhile."""
        return dict(self._start)

    @torch.no_grad()
    def restore(self, start_values: Mapping[str, Tensor]) -> None:
        """Takes what `start_values` gave in place of the parameters' own values."""
        for name, value in self._start.items():
            value.copy_(start_values[name])
