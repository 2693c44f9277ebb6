"""The CMoE split: activation rates for the shared expert, co-activation for the routed ones."""

import numpy as np
import torch
from pydantic import Field

from moesaic.construct.free.assign import assign
from moesaic.construct.free.markers import distances, markers
from moesaic.construct.free.view import CalibratedSplit, LayerView
from moesaic.construct.method import LayerSplit
from moesaic.construct.splits import SPLITS


@SPLITS.register
class Cmoe(CalibratedSplit):
    """CMoE (arXiv 2502.04416): neurons that are among a token's most active together.

    The neurons most often among a token's `active` largest are shared; the others go to the
    experts whose marker column is nearest (L1), each expert the same number, by linear assignment.
    """

    tokens: int = Field(default=16_384, ge=2)
    """Tokens looked at."""
    active: int = Field(default=10, ge=1)
    """Neurons of a token that count as active."""
    steps: int = Field(default=1, ge=1)
    """Assignments; after each the centres are the means of their members."""

    def divide_layer(self, view: LayerView) -> LayerSplit:
        """Divide one layer."""
        view = view.first(self.tokens)
        marker_TF = markers(view, self.active)
        size = marker_TF.shape[1] // view.experts
        order = torch.argsort(marker_TF.mean(0), descending=True, stable=True)
        shared, rest = order[: view.shared * size], order[view.shared * size :]
        routed = view.experts - view.shared
        centre_TE = marker_TF[:, rest[:routed]]  # rest is in order of falling rate
        for _ in range(self.steps):
            cost_RE = distances(marker_TF[:, rest], centre_TE)
            labels = torch.from_numpy(assign(-cost_RE.double().cpu().numpy())).to(rest.device)
            member_RE = torch.nn.functional.one_hot(labels, routed).float()
            centre_TE = marker_TF[:, rest] @ member_RE / size
        found = rest.cpu().numpy()
        experts = [np.sort(found[labels.cpu().numpy() == expert]) for expert in range(routed)]
        parts = [np.sort(part) for part in shared.cpu().numpy().reshape(max(1, view.shared), -1)]
        return LayerSplit(experts, parts if view.shared else [])
