"""One layer of a construction: its experts, its router, what they give, what they miss.

Notation: T tokens, D hidden size, F dense neurons, E routed experts, K chosen, P neurons held by
the layer's experts (shared ones last; a neuron of two experts counts twice).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from moesaic.construct.free.fit import captured, choose
from moesaic.construct.free.view import LayerView, sums_by_expert
from moesaic.construct.method import LayerSplit
from moesaic.models.gates import TopKBalancedNoisyGate

__all__ = ["ConvertedLayer"]

_PART = 8192
_FEW = 2048


@dataclass
class ConvertedLayer:
    """The converted feed-forward layer.

    `down_PD` is as the split made it, `refit_PD` refitted. The neurons that its methods are given
    are the dense layer's, [T, F], and after `fold` the experts' own, [T, P].
    """

    parts: LayerSplit
    router: dict[str, torch.Tensor]
    gate: TopKBalancedNoisyGate
    scale: float
    down_PD: torch.Tensor
    down_bias_D: torch.Tensor | None = None
    refit_PD: torch.Tensor | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    _neurons: Callable[[torch.Tensor, slice], torch.Tensor] | None = None
    """Some of the experts' neurons of any tokens, after `fold`."""

    @cached_property
    def order_P(self) -> torch.Tensor:
        """Neuron ids, expert by expert, shared ones last."""
        ids_P = torch.from_numpy(np.concatenate([*self.parts.experts, *self.parts.shared]))
        return ids_P.to(self.down_PD.device)

    @cached_property
    def sizes(self) -> list[int]:
        """Neurons of every routed expert, and last those of all shared ones."""
        return [*map(len, self.parts.experts), sum(map(len, self.parts.shared))]

    @torch.inference_mode()
    def weights(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Weight of every expert, 0 where it is not chosen, and a last column of ones: [T, E+1]."""
        ids_TK, weights_TK = [], []
        for part in x_TD.split(_PART):
            decision = self.gate(part, statistics=False)
            ids_TK.append(decision.ids)
            weights_TK.append(decision.weights * self.scale)
        made_TE = x_TD.new_zeros(len(x_TD), len(self.parts.experts))
        made_TE.scatter_(1, torch.cat(ids_TK), torch.cat(weights_TK))
        return torch.cat([made_TE, x_TD.new_ones(len(x_TD), 1)], dim=1)

    @torch.inference_mode()
    def fold(
        self, view: LayerView, gate_PD: torch.Tensor, up_PD: torch.Tensor, weights_TE: torch.Tensor
    ) -> torch.Tensor:
        """Give the experts gate and up rows of their own, in their order; returns their neurons.

        Neurons of experts that a token does not use stay zero.
        """
        gate_bias_P, up_bias_P = (
            None if bias_F is None else bias_F[self.order_P]
            for bias_F in (view.gate_bias_F, view.up_bias_F)
        )

        def neurons(x_TD: torch.Tensor, rows: slice) -> torch.Tensor:
            gate_b, up_b = (None if b is None else b[rows] for b in (gate_bias_P, up_bias_P))
            gated = view.activation(functional.linear(x_TD, gate_PD[rows], gate_b))
            return gated * functional.linear(x_TD, up_PD[rows], up_b)

        self._neurons = neurons
        made_TP = view.x_TD.new_zeros(len(view.x_TD), len(gate_PD))
        start = 0
        for size, weight_T in zip(self.sizes, weights_TE.T, strict=True):
            rows = slice(start, start := start + size)
            for used_N in torch.nonzero(weight_T).flatten().split(_PART) if size else ():
                made_TP[:, rows].index_copy_(0, used_N, neurons(view.x_TD[used_N], rows))
        return made_TP

    def features(self, neurons_TF: torch.Tensor, weights_TE: torch.Tensor) -> torch.Tensor:
        """The neurons times the weight of their expert: [T, P]."""
        own = self._neurons is not None
        h_TP = neurons_TF.clone() if own else neurons_TF.index_select(1, self.order_P)
        # in place, expert by expert: a third of the time of a product with weights_TE[:, owner_P]
        for part_TI, weight_T in zip(h_TP.split(self.sizes, 1), weights_TE.unbind(1), strict=True):
            part_TI.mul_(weight_T[:, None])
        return h_TP

    @torch.inference_mode()
    def forward(self, neurons_TF: torch.Tensor, weights_TE: torch.Tensor) -> torch.Tensor:
        """What the layer gives, [T, D]; refitted, where it has been."""
        down_PD = self.down_PD if self.refit_PD is None else self.refit_PD
        parts = [
            self.features(neurons_TF[start : start + _PART], weights_TE[start : start + _PART])
            @ down_PD
            for start in range(0, len(neurons_TF), _PART)
        ]
        out_TD = torch.cat(parts)
        return out_TD if self.down_bias_D is None else out_TD + self.down_bias_D

    @torch.inference_mode()
    def judge(self, view: LayerView, weights_TE: torch.Tensor, own_TD: torch.Tensor) -> None:
        """Record load, captured energy and the all-experts-on difference, on held-back tokens."""
        held_T = view.held_T
        chosen_TE = (weights_TE[:, :-1] != 0).float()
        load_E = chosen_TE.sum(0)
        share_E = load_E / load_E.sum()
        logs_E = torch.where(share_E > 0, share_E.log(), 0.0)
        # of these tokens alone: the energies of all take as much memory as the neurons
        energy_TF = view.neurons_TF[held_T].square_().mul_(view.down_DF.square().sum(0))
        energy_TE = sums_by_expert(energy_TF, self.parts.experts)
        oracle_TE = choose(energy_TE, min(view.top_k, energy_TE.shape[1]))
        experts = len(load_E)
        self.facts |= {
            "layer": view.layer,
            "captured": captured(energy_TE, chosen_TE[held_T]),
            "oracle": captured(energy_TE, oracle_TE),
            "load": [round(float(v), 4) for v in share_E],
            "load_entropy": float(-(share_E * logs_E).sum() / np.log(experts))
            if experts > 1
            else 1,
            "never_chosen": [e for e, v in enumerate(load_E.tolist()) if v == 0],
            "all_on": self._all_on(view.neurons_TF, own_TD),
            "largest": float(own_TD[:_FEW].abs().max()),
        }

    @torch.inference_mode()
    def judge_refit(self, view: LayerView, own_TD: torch.Tensor) -> None:
        """Record what the refit did to the all-experts-on difference."""
        neurons_TF = view.neurons_TF[:_FEW]
        if self._neurons is not None:
            neurons_TF = self._neurons(view.x_TD[:_FEW], slice(None))
        self.facts["all_on_refit"] = self._all_on(neurons_TF, own_TD)

    def _all_on(self, neurons_TF: torch.Tensor, own_TD: torch.Tensor) -> float:
        own_TD = own_TD[:_FEW]
        ones_TE = own_TD.new_ones(len(own_TD), len(self.sizes))
        return float((self.forward(neurons_TF[:_FEW], ones_TE) - own_TD).abs().max())

    @torch.inference_mode()
    def error(
        self,
        neurons_TF: torch.Tensor,
        weights_TE: torch.Tensor,
        own_TD: torch.Tensor,
        held_T: torch.Tensor,
    ) -> float:
        """Share of the dense layer's output squares that is missed, on held-back tokens."""
        given_TD = self.forward(neurons_TF[held_T], weights_TE[held_T])
        wanted_TD = own_TD[held_T]
        return float((given_TD - wanted_TD).square().sum() / wanted_TD.square().sum())
