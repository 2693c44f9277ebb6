"""Sparse upcycling: every expert a copy of the dense layer (arXiv 2212.05055), with noise if asked.

Without noise the mixture equals the dense model whatever the router, since the weights of the
chosen experts add up to 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field

from moesaic.construct.upcycle_method import UpcycleInputs, UpcycleMethod
from moesaic.construct.upcycles import UPCYCLES
from moesaic.measure.exactness import FeedForward


@UPCYCLES.register
class Copies(UpcycleMethod):
    """Every expert a copy of the dense layer, with noise to make them differ if asked."""

    noise: float = Field(default=0.0, ge=0, le=1)
    """Standard deviation of the noise on every weight, as a share of its matrix's own."""

    def exact(self, inputs: UpcycleInputs) -> bool:
        """Copies are exact, noisy copies are not."""
        return self.noise == 0

    def expert(
        self, inputs: UpcycleInputs, layer: int, expert: int, dense: Sequence[FeedForward]
    ) -> FeedForward:
        """The dense layer, each matrix with noise of its own."""
        if self.noise == 0:
            return dense[0]
        generator = inputs.generator(layer, expert)
        return FeedForward(*(self._noisy(weight, generator) for weight in dense[0][:3]))

    def _noisy(self, weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        exact = weight.float()
        noise = torch.randn(exact.shape, generator=generator)
        return noise.mul_(self.noise * float(exact.std())).add_(exact).to(weight.dtype)
