"""The energy split: the experts that a router can find and that hold what a token's output needs.

Notation: T tokens, F neurons, E routed experts; c_TF output energies of neurons.
"""

import numpy as np
import torch
from pydantic import Field

from moesaic.construct.free.assign import assign
from moesaic.construct.free.fit import RouterFit, captured, choose
from moesaic.construct.free.view import CalibratedSplit, LayerView
from moesaic.construct.method import LayerSplit
from moesaic.construct.splits import SPLITS

K_MEANS_ROUNDS = 20
"""Most assignments of one start of the k-means."""
FEWER = 8
"""The k-means looks at every so many tokens, where there are more than 4096."""


@SPLITS.register
class Energy(CalibratedSplit):
    """Balanced experts that capture the most output energy under a router fitted in closed form.

    A neuron's energy for a token is h² ||its column of W_down||². Shared experts take the neurons
    of highest mean energy. The others start from balanced k-means of their energies and then
    alternate: fit the router to the experts' log energies, give every neuron to the expert whose
    tokens it serves best (an exact balanced assignment), until nothing captures more.
    """

    rounds: int = Field(default=10, ge=0)
    """Most alternations of router and assignment."""
    starts: int = Field(default=2, ge=1)
    """Starts of the k-means."""

    def divide_layer(self, view: LayerView) -> LayerSplit:
        """Divide one layer."""
        view = view.first(self.tokens)
        width = view.down_DF.shape[1]
        size = width // view.experts
        order = torch.argsort(view.energy_TF.mean(0), descending=True, stable=True)
        shared, rest = order[: view.shared * size], order[view.shared * size :].sort().values
        energy_TR = view.energy_TF[:, rest]
        routed = view.experts - view.shared
        fit = RouterFit(view.x_TD, view.held_T)
        labels = self._start(energy_TR, routed, view.seed + view.layer)
        best = (-1.0, labels)
        for step in range(self.rounds + 1):
            member_RE = torch.nn.functional.one_hot(labels, routed).float()
            energy_TE = energy_TR @ member_RE
            chosen_TE = fit.chosen(fit.log_energy(energy_TE), view.top_k)
            share = captured(energy_TE, chosen_TE)
            view.facts.setdefault("captured", []).append(round(share, 4))
            if share > best[0]:
                best = (share, labels)
            if step == self.rounds:
                break
            moved = _assign(energy_TR.T @ chosen_TE)
            if bool((moved == labels).all()):
                break
            labels = moved
        found = rest.cpu().numpy()
        experts = [found[best[1].cpu().numpy() == expert] for expert in range(routed)]
        view.facts["oracle"] = round(_oracle(energy_TR, best[1], routed, view.top_k), 4)
        parts = [np.sort(part) for part in shared.cpu().numpy().reshape(max(1, view.shared), -1)]
        return LayerSplit(experts, parts if view.shared else [])

    def _start(self, energy_TR: torch.Tensor, experts: int, seed: int) -> torch.Tensor:
        """Balanced k-means of the neurons' amplitudes over some of the tokens: labels [R]."""
        points_TR = energy_TR[:: FEWER if len(energy_TR) > 4096 else 1].sqrt()
        points_TR = points_TR / points_TR.norm(dim=0).clamp(min=1e-12)
        generator = torch.Generator().manual_seed(seed)
        best: tuple[float, torch.Tensor] | None = None
        for _ in range(self.starts):
            first = torch.randperm(points_TR.shape[1], generator=generator)[:experts].to(
                points_TR.device
            )
            centres_TE = points_TR[:, first]
            labels = first.new_full((points_TR.shape[1],), -1)
            for _ in range(K_MEANS_ROUNDS):
                found = _assign(points_TR.T @ centres_TE)
                if bool((found == labels).all()):
                    break
                labels = found
                centres_TE = points_TR @ torch.nn.functional.one_hot(labels, experts).float()
                centres_TE = centres_TE / centres_TE.norm(dim=0).clamp(min=1e-12)
            value = float((points_TR.T @ centres_TE).gather(1, labels[:, None]).sum())
            if best is None or value > best[0]:
                best = (value, labels)
        assert best is not None
        return best[1]


def _oracle(energy_TR: torch.Tensor, labels: torch.Tensor, experts: int, top_k: int) -> float:
    energy_TE = energy_TR @ torch.nn.functional.one_hot(labels, experts).float()
    return captured(energy_TE, choose(energy_TE, top_k))


def _assign(gain_RE: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(assign(gain_RE.double().cpu().numpy())).to(gain_RE.device)
