"""CMoE's router init: one neuron stands for each expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch.nn.functional import normalize

from moesaic.construct.free.markers import distances, markers
from moesaic.construct.free.view import CalibratedRouter, Ids, LayerView
from moesaic.construct.router import Gate
from moesaic.construct.routers import ROUTERS


@ROUTERS.register
class Representative(CalibratedRouter):
    """CMoE's analytic router: |silu(x g) (x u)| of the neuron nearest to its expert's centre.

    Makes a gate of network `glu`; the rows are scaled to length 1 (arXiv 2502.04416).
    """

    networks: ClassVar[tuple[Gate, ...]] = ("glu",)

    tokens: int = Field(default=16_384, ge=2)
    """Tokens looked at."""
    active: int = Field(default=10, ge=1)
    """Neurons of a token that count as active."""

    def fit_layer(self, view: LayerView, experts: Sequence[Ids]) -> dict[str, torch.Tensor]:
        """Rows [E, D] of the gate and of the up projection of the representative neurons."""
        view = view.first(self.tokens)
        marker_TF = markers(view, self.active)
        chosen = []
        for ids in experts:
            members_TM = marker_TF[:, torch.from_numpy(ids)]
            nearest = distances(members_TM, members_TM.mean(1, keepdim=True)).argmin()
            chosen.append(int(ids[int(nearest)]))
        return {
            "gate.weight": normalize(view.gate_FD[chosen], dim=1),
            "up.weight": normalize(view.up_FD[chosen], dim=1),
        }
