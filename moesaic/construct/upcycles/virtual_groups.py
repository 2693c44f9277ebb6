"""Megatron's virtual groups (arXiv 2410.07524): fine experts that together still are the dense one.

The dense layer is cut into g slices (the granularity), and each slice is copied E / g times. The
router rows of the g slices of one copy are equal, so a copy wins as a whole: with K a multiple of
g, the chosen experts are K / g whole dense layers of total weight 1, each slice weighing 1 / K of
it on average; the factor g makes the sum the dense output again, whatever the router says.

Megatron spreads the factor over the matrices, its cube root on each of the three. That is exact
for squared ReLU only; here it is in the score scale, or in down_proj where a layout has no scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from moesaic.construct.upcycle_method import UpcycleInputs, UpcycleMethod
from moesaic.construct.upcycles import UPCYCLES
from moesaic.core.errors import UserError
from moesaic.measure.exactness import FeedForward


@UPCYCLES.register
class VirtualGroups(UpcycleMethod):
    """Slices of the dense layer, copied; the slices of one copy are always chosen together."""

    granularity: int = Field(default=2, ge=1)
    """g: slices of the dense layer; an expert has F / g neurons."""
    scaling: Literal["exact", "megatron"] = "exact"
    """Where the factor g goes: into the sum of the experts, or, as in Megatron, its cube root into
    gate, up and down (not exact with SiLU)."""

    def check(self, inputs: UpcycleInputs) -> None:
        """Raise UserError unless g divides the neurons and the experts."""
        super().check(inputs)
        for what, count in (
            ("neurons of a layer", inputs.dense.width),
            ("experts", inputs.experts),
        ):
            if count % self.granularity:
                near = [g for g in range(1, min(count, 65)) if count % g == 0]
                raise UserError(
                    f"granularity={self.granularity} does not divide the {count} {what}. "
                    f"Use one of {', '.join(map(str, near))}."
                )

    def neurons(self, inputs: UpcycleInputs) -> list[NDArray[np.int64]]:
        """The g slices in order, once for each copy."""
        slices = np.split(np.arange(inputs.dense.width), self.granularity)
        return slices * (inputs.experts // self.granularity)

    def scale(self, inputs: UpcycleInputs) -> float:
        """G, unless it is in the matrices already."""
        return float(self.granularity) if self.scaling == "exact" else 1.0

    def exact(self, inputs: UpcycleInputs) -> bool:
        """Exact when whole copies are chosen."""
        whole = inputs.selects % self.granularity == 0
        return whole and (self.scaling == "exact" or self.granularity == 1)

    def routers(self, inputs: UpcycleInputs) -> Iterator[torch.Tensor]:
        """A random row for each copy, repeated for its slices."""
        for rows_ED in super().routers(inputs):
            copies = inputs.experts // self.granularity
            yield rows_ED[:copies].repeat_interleave(self.granularity, 0)

    def expert(
        self, inputs: UpcycleInputs, layer: int, expert: int, dense: Sequence[FeedForward]
    ) -> FeedForward:
        """Slice `expert` modulo g of the dense layer."""
        width = inputs.dense.width // self.granularity
        start = expert % self.granularity * width
        part = dense[0].part(start, start + width)
        if self.scaling == "exact":
            return part
        factor = self.granularity ** (1 / 3)
        return FeedForward(*((weight.float() * factor).to(weight.dtype) for weight in part[:3]))
