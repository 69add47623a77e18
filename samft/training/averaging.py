"""The moving average of the trained weights, which is validated and saved in their place."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """Averages of parameters over the steps, the later the more: a <- d a + (1 - d) p.

    Args:
        parameters: By name; the averages begin as what they are now.
        decay: d, at most. In step n from 1 it is min(d, n / (n + 9)): an average over a tenth of
            the steps so far, as long as that is shorter.

    Source: Polyak and Juditsky, Acceleration of stochastic approximation by averaging, 1992. The
    shorter averages at the start are those of TensorFlow's `ExponentialMovingAverage`.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, decay: float) -> None:
        self.decay = decay
        self._parameters = dict(parameters)
        self._averages = [parameter.detach().clone() for parameter in self._parameters.values()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Adds the parameters as they are after a step, counted from 1."""
        decay = min(self.decay, step / (step + 9))
        torch._foreach_lerp_(self._averages, self._values(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[dict[str, Tensor]]:
        """Gives the parameters their averages within the block, in place.

        Yields:
            The parameters' own values, by name.
        """
        self._exchange()
        try:
            yield dict(zip(self._parameters, self._averages, strict=True))
        finally:
            self._exchange()

    @torch.no_grad()
    def restore(self, own_values: Mapping[str, Tensor]) -> None:
        """Takes the parameters for averages, and gives them values of their own.

        Args:
            own_values: What `applied` gave, by name.
        """
        for average, value in zip(self._averages, self._values(), strict=True):
            average.copy_(value)
        for name, parameter in self._parameters.items():
            parameter.copy_(own_values[name])

    @torch.no_grad()
    def _exchange(self) -> None:
        for average, value in zip(self._averages, self._values(), strict=True):
            own = value.clone()
            value.copy_(average)
            average.copy_(own)

    def _values(self) -> list[Tensor]:
        return [parameter.detach() for parameter in self._parameters.values()]
