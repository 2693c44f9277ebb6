"""The energy router init: a ridge regression of the experts' log output energies."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moesaic.construct.free.fit import RouterFit
from moesaic.construct.free.view import CalibratedRouter, Ids, LayerView, sums_by_expert
from moesaic.construct.routers import ROUTERS


@ROUTERS.register
class Energy(CalibratedRouter):
    """Predict the log output energy of every expert by ridge regression.

    The strength is chosen on held-back tokens. Works for any split, an imported one too. Behind a
    norm the inputs predict a constant well and stand in for an intercept.
    """

    intercept: bool = False
    """Whether routers have a bias, which the stock layouts of `moesaic export` have no room for."""

    def fit_layer(self, view: LayerView, experts: Sequence[Ids]) -> dict[str, torch.Tensor]:
        """Weight [E, D] and, with the intercept, bias [E] of one layer."""
        view = view.first(self.tokens)
        fit = RouterFit(view.x_TD, view.held_T, intercept=self.intercept)
        weights_PE = fit.log_energy(sums_by_expert(view.energy_TF, experts))
        if not self.intercept:
            return {"weight": weights_PE.T.contiguous()}
        return {"weight": weights_PE[:-1].T.contiguous(), "bias": weights_PE[-1].contiguous()}
