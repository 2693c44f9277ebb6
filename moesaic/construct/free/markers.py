"""CMoE's markers: for every token, which neurons are among its most active (arXiv 2502.04416).

Notation: T tokens, F neurons, a_TF markers of 0 and 1.
"""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from moesaic.construct.free.view import LayerView

__all__ = ["distances", "markers"]


def markers(view: LayerView, top: int) -> torch.Tensor:
    """1 for the `top` largest |act(x̂ ĝ) (x̂ û)| of each token: [T, F]; hats are unit vectors."""
    x_TD = normalize(view.x_TD, dim=1)
    gate_TF = view.activation(x_TD @ normalize(view.gate_FD, dim=1).T)
    h_TF = (gate_TF * (x_TD @ normalize(view.up_FD, dim=1).T)).abs()
    ids_TA = h_TF.topk(min(top, h_TF.shape[1]), dim=1).indices
    return torch.zeros_like(h_TF).scatter_(1, ids_TA, 1.0)


def distances(marker_TF: torch.Tensor, centre_TE: torch.Tensor) -> torch.Tensor:
    """L1 distances [F, E] of marker columns (of 0 and 1) to centres in 0..1."""
    return marker_TF.sum(0)[:, None] + centre_TE.sum(0) - 2 * marker_TF.T @ centre_TE
