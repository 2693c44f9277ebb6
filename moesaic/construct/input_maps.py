"""Linear maps of the converted model's stream to the dense one's, folded into what reads it.

Layers that were converted before have changed what a layer is given. A ridge regression from what a
weight now reads to what it read in the dense model, W ← W Rᵀ, makes up for part of that and costs
nothing afterwards. Attention's inputs share one map; every expert has its own, fitted on the tokens
that choose it.
Notation: T tokens, D hidden size, E parts of the layer (routed experts, then the shared ones), P
neurons held by them, map_DD with wanted ≈ given map_DD.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moesaic.construct.free.ridge import regress

__all__ = ["fit_map", "fold", "fold_experts"]

_LOOKED_AT = 1 << 27
"""Numbers of one stream."""
_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)


def fit_map(given_TD: torch.Tensor, wanted_TD: torch.Tensor, held_T: torch.Tensor) -> torch.Tensor:
    """The map [D, D] from what is given to what is wanted, shrunk towards the identity.

    `held_T` are the tokens that choose the strength; where none helps there, the identity returns.
    Of many tokens the first are looked at, at least 8 times D.
    """
    most = max(_LOOKED_AT // given_TD.shape[1], 8 * given_TD.shape[1])
    given_TD, wanted_TD, held_T = (whole[:most] for whole in (given_TD, wanted_TD, held_T))
    identity_DD = torch.eye(given_TD.shape[1], device=given_TD.device)
    found = regress(given_TD, wanted_TD, held_T, start_PQ=identity_DD, strengths=_STRENGTHS)
    return found.weights_PQ


def fold(weight_PD: torch.Tensor, map_DD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight that reads through the map, rounded to `dtype`, that of the file."""
    return (weight_PD @ map_DD.T).to(dtype).float()


def fold_experts(
    gate_PD: torch.Tensor,
    up_PD: torch.Tensor,
    given_TD: torch.Tensor,
    wanted_TD: torch.Tensor,
    weights_TE: torch.Tensor,
    *,
    sizes: Sequence[int],
    held_T: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up rows, each expert's through the map of the tokens that it serves.

    `sizes` are the neurons of the E parts; weights_TE [T, E] is 0 where a part is not used.
    """
    parts = zip(gate_PD.split(list(sizes)), up_PD.split(list(sizes)), weights_TE.T, strict=True)
    gates, ups = [], []
    for gate_ID, up_ID, weight_T in parts:
        if len(gate_ID):
            used_T = weight_T != 0
            map_DD = fit_map(given_TD[used_T], wanted_TD[used_T], held_T[used_T])
            gate_ID, up_ID = fold(gate_ID, map_DD, dtype), fold(up_ID, map_DD, dtype)
        gates.append(gate_ID)
        ups.append(up_ID)
    return torch.cat(gates), torch.cat(ups)
