"""Drop-Upcycling (arXiv 2502.19261): copies in which a share of the neurons begins anew.

For every expert a share r of the neurons is drawn. In each of the three matrices the weights of
those neurons are replaced by draws from a normal law with the mean and the standard deviation that
these weights had: experts differ from the start, and keep the scale of the dense layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field

from moesaic.construct.upcycle_method import UpcycleInputs, UpcycleMethod
from moesaic.construct.upcycles import UPCYCLES
from moesaic.core.errors import UserError
from moesaic.measure.exactness import FeedForward


@UPCYCLES.register
class Drop(UpcycleMethod):
    """Drop-Upcycling: copies in which a share of the neurons is drawn anew."""

    ratio: float = Field(default=0.5, ge=0, le=1)
    """Share of each expert's neurons that is drawn anew; the paper found 0.5 best."""

    def check(self, inputs: UpcycleInputs) -> None:
        """Raise UserError when the ratio stands for a single neuron, whose spread is unknown."""
        super().check(inputs)
        if self.ratio > 0 and self._count(inputs) < 1:
            raise UserError(
                f"ratio={self.ratio} of {inputs.dense.width} neurons is less than one. "
                "Raise it, or use the method copies."
            )

    def exact(self, inputs: UpcycleInputs) -> bool:
        """Only a ratio of 0, plain copies, is exact."""
        return self.ratio == 0

    def expert(
        self, inputs: UpcycleInputs, layer: int, expert: int, dense: Sequence[FeedForward]
    ) -> FeedForward:
        """The dense layer with some neurons of gate, up and down drawn anew."""
        count = self._count(inputs)
        if not count:
            return dense[0]
        generator = inputs.generator(layer, expert)
        ids_N = torch.randperm(inputs.dense.width, generator=generator)[:count]
        made = []
        for weight, dim in zip(dense[0][:3], (0, 0, 1), strict=True):
            kept = weight.index_select(dim, ids_N).float()
            fresh = torch.randn(kept.shape, generator=generator)
            fresh = fresh.mul_(float(kept.std(correction=0))).add_(float(kept.mean()))
            made.append(weight.index_copy(dim, ids_N, fresh.to(weight.dtype)))
        return FeedForward(*made)

    def _count(self, inputs: UpcycleInputs) -> int:
        return round(self.ratio * inputs.dense.width)
