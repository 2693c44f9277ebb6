"""A converted decoder layer that can be trained: attention, norms, experts and their router.

The choice of experts is a step; its gradient is taken straight through the router's softmax.
Notation: B rows, C tokens a row, T = B*C tokens, D hidden size, E experts, I neurons of an expert,
P = E*I neurons and those of shared experts behind them, K chosen experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from moesaic.construct.activations import LayerStream

__all__ = ["Fixed", "RoutedBlock", "dense_block"]


@dataclass(frozen=True)
class Fixed:
    """What a block has beside its weights: how many experts it chooses, and what never changes."""

    top_k: int
    activation: Callable[[torch.Tensor], torch.Tensor] = functional.silu
    """What follows the gate rows."""
    gate_bias_P: torch.Tensor | None = None
    """Biases of the dense model, where it has them."""
    up_bias_P: torch.Tensor | None = None
    down_bias_D: torch.Tensor | None = None


class RoutedBlock(nn.Module):
    """One decoder layer whose feed-forward part is experts of one width, weight 1 each.

    `width` are the neurons of a routed expert; what follows the routed ones is used by every token.
    `layer` is a layer of `stream` without its feed-forward part. The weights are copied.
    """

    def __init__(
        self,
        stream: LayerStream,
        layer: Any,
        fixed: Fixed,
        *,
        width: int,
        gate_PD: torch.Tensor,
        up_PD: torch.Tensor,
        down_PD: torch.Tensor,
        router: dict[str, torch.Tensor],
    ) -> None:
        super().__init__()
        self.stream, self.fixed, self.width = stream, fixed, width
        layer.mlp = nn.Identity()
        for part in layer.modules():
            for name, parameter in list(part.named_parameters(recurse=False)):
                setattr(part, name, nn.Parameter(parameter.detach().clone()))
        self.layer = layer
        self.gate_PD = nn.Parameter(gate_PD.clone())
        self.up_PD = nn.Parameter(up_PD.clone())
        self.down_PD = nn.Parameter(down_PD.clone())
        self.router_ED = nn.Parameter(router["weight"].clone())
        bias_E = router.get("bias")
        self.bias_E = None if bias_E is None else nn.Parameter(bias_E.clone())

    def forward(self, rows_BCD: torch.Tensor) -> torch.Tensor:
        """The residual stream after the layer: [B, C, D]."""
        residual_BCD, x_BCD = self.stream.block(self.layer, rows_BCD)
        out_TD = self.experts(x_BCD.flatten(0, 1))
        return self.stream.finish(self.layer, residual_BCD, out_TD.view_as(residual_BCD))

    def experts(self, x_TD: torch.Tensor) -> torch.Tensor:
        """The sum of the chosen experts: [T, D]."""
        shares_TE = functional.linear(x_TD, self.router_ED, self.bias_E).softmax(1)
        shares_TK, ids_TK = shares_TE.topk(self.fixed.top_k, dim=1)
        weights_TK = 1 + (shares_TK - shares_TK.detach())
        if x_TD.is_cuda:
            weights_TE = torch.zeros_like(shares_TE).scatter(1, ids_TK, weights_TK)
            out_TD = self._all(x_TD, weights_TE)
        else:
            out_TD = self._chosen(x_TD, ids_TK, weights_TK)
        return out_TD if self.fixed.down_bias_D is None else out_TD + self.fixed.down_bias_D

    def _all(self, x_TD: torch.Tensor, weights_TE: torch.Tensor) -> torch.Tensor:
        """All experts, those not chosen times 0: the same work whatever the router does, so that a
        CUDA graph can hold it.
        """
        fixed = self.fixed
        h_TP = fixed.activation(functional.linear(x_TD, self.gate_PD, fixed.gate_bias_P))
        h_TP = h_TP * functional.linear(x_TD, self.up_PD, fixed.up_bias_P)
        routed = weights_TE.shape[1] * self.width
        h_TEI = h_TP[:, :routed].unflatten(1, (-1, self.width)) * weights_TE[..., None]
        if routed < h_TP.shape[1]:
            return torch.cat([h_TEI.flatten(1), h_TP[:, routed:]], 1) @ self.down_PD
        return h_TEI.flatten(1) @ self.down_PD

    def _chosen(
        self, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """Every expert on its own tokens: K / E of the work."""
        experts, top_k = len(self.router_ED), ids_TK.shape[1]
        flat_N = ids_TK.flatten()
        order_N = flat_N.argsort(stable=True)
        token_N = order_N // top_k
        counts = torch.bincount(flat_N, minlength=experts).tolist()
        parts = [
            self._expert(rows_ND, slice(expert * self.width, (expert + 1) * self.width))
            for expert, rows_ND in enumerate(x_TD[token_N].split(counts))
        ]
        out_ND = torch.cat(parts) * weights_TK.flatten()[order_N, None]
        routed = experts * self.width
        shared = routed < len(self.gate_PD)
        out_TD = self._expert(x_TD, slice(routed, None)) if shared else torch.zeros_like(x_TD)
        return out_TD.index_add(0, token_N, out_ND)

    def _expert(self, x_ND: torch.Tensor, own: slice) -> torch.Tensor:
        """The neurons `own`, of the rows x."""
        gate_I, up_I = (
            None if bias_P is None else bias_P[own]
            for bias_P in (self.fixed.gate_bias_P, self.fixed.up_bias_P)
        )
        h_NI = self.fixed.activation(functional.linear(x_ND, self.gate_PD[own], gate_I))
        return (h_NI * functional.linear(x_ND, self.up_PD[own], up_I)) @ self.down_PD[own]


def dense_block(stream: LayerStream, layer: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """A layer of the dense model, from residual stream to residual stream [B, C, D]."""

    def run(rows_BCD: torch.Tensor) -> torch.Tensor:
        residual_BCD, x_BCD = stream.block(layer, rows_BCD)
        return stream.finish(layer, residual_BCD, layer.mlp(x_BCD))

    return run
