"""Linear maps of the converted model's stream to the dense one's, folded into what reads it.

Layers that were converted before have changed what a layer is given. A ridge regression from what a
weight now reads to what it read in the dense model, W ← W Rᵀ, makes up for part of that and costs
nothing afterwards. Attention's inputs share one map; every expert has its own, fitted on the tokens
that choose it. What the head reads is scaled by one number, in the last norm.
Notation: B rows, C tokens a row, T tokens, D hidden size, E parts of the layer (routed experts,
then the shared ones), P neurons held by them, map_DD with wanted ≈ given map_DD.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moesaic.construct.free.ridge import regress

__all__ = ["MAP_STRENGTHS", "fit_map", "fold", "fold_experts", "looked_at", "scaled_norm"]

_LOOKED_AT = 1 << 27
"""Numbers of one stream."""
_ROWS = 16
MAP_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)
"""Ridge strengths tried, in units of the mean diagonal of xᵀx."""


def fit_map(given_TD: torch.Tensor, wanted_TD: torch.Tensor, held_T: torch.Tensor) -> torch.Tensor:
    """The map [D, D] from what is given to what is wanted, shrunk towards the identity.

    `held_T` are the tokens that choose the strength; where none helps there, the identity returns.
    Of many tokens the first `looked_at` count.
    """
    hidden = given_TD.shape[1]
    most = looked_at(hidden)
    given_TD, wanted_TD, held_T = (whole[:most] for whole in (given_TD, wanted_TD, held_T))
    identity_DD = torch.eye(hidden, device=given_TD.device)
    found = regress(given_TD, wanted_TD, held_T, start_PQ=identity_DD, strengths=MAP_STRENGTHS)
    return found.weights_PQ


def looked_at(hidden: int) -> int:
    """The most tokens that a map of this size is fitted on; at least 8 for each input."""
    return max(_LOOKED_AT // hidden, 8 * hidden)


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


def scaled_norm(
    norm: Any, given_BCD: torch.Tensor, wanted_BCD: torch.Tensor
) -> tuple[float, torch.Tensor | None]:
    """The factor that brings the normed stream nearest to the dense model's, by least squares, and
    the norm's weight with it; 1 and None for a norm that does not scale with its weight.

    A stream that has lost something predicts too surely; that makes up for it. `norm` is changed.
    """
    both = squares = 0.0
    for some, wanted in zip(given_BCD.split(_ROWS), wanted_BCD.split(_ROWS), strict=True):
        normed_BCD = norm(some)
        both += float((normed_BCD * norm(wanted)).sum())
        squares += float(normed_BCD.square().sum())
    factor = both / max(squares, 1e-30)
    plain_D, few_BCD = norm.weight, given_BCD[:1]
    aim_BCD = norm(few_BCD) * factor
    for weight_D in (plain_D * factor, (1 + plain_D) * factor - 1):  # Gemma's norms add one
        norm.weight = torch.nn.Parameter(weight_D, requires_grad=False)
        if torch.allclose(norm(few_BCD), aim_BCD, rtol=1e-3, atol=1e-5):
            return factor, weight_D
    return 1.0, None
