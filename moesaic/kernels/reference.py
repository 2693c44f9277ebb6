"""What a layer of routed experts computes, in plain torch: what every kernel is tested against.

T tokens, D hidden size, E experts, I expert width, J = 2I, K experts a token. Experts are stored as
transformers stores them: `gate_up_EJD` (rows [0, I) gate, rows [I, 2I) up) and `down_EDI`.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

Activation = Literal["silu", "gelu", "gelu_tanh"]
GELU = {"gelu": "none", "gelu_tanh": "tanh"}  # torch's name for the approximation


def activate(gate: torch.Tensor, activation: Activation) -> torch.Tensor:
    """Apply the named activation element by element."""
    if activation == "silu":
        return F.silu(gate)
    return F.gelu(gate, approximate=GELU[activation])


def experts(
    x_TD: torch.Tensor,
    gate_up_EJD: torch.Tensor,
    down_EDI: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    *,
    activation: Activation = "silu",
) -> torch.Tensor:
    """Return out[t] = sum_k weights[t, k] * expert_{ids[t, k]}(x[t]), of shape and dtype of `x_TD`.

    expert(x) = down(act(gate(x)) * up(x)). Every id lies in [0, E); a token may name an expert
    twice. Sums over k are taken in float32 or wider. A loop over experts: for tests, not for use.
    """
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    out_TD = torch.zeros_like(x_TD, dtype=wide)
    for expert in range(gate_up_EJD.shape[0]):
        token, slot = torch.where(ids_TK == expert)
        gate, up = F.linear(x_TD[token], gate_up_EJD[expert]).chunk(2, dim=-1)
        y = F.linear(activate(gate, activation) * up, down_EDI[expert])
        out_TD = out_TD.index_add(0, token, y.to(wide) * weights_TK[token, slot, None].to(wide))
    return out_TD.to(x_TD.dtype)
