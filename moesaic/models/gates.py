"""Gates of LLaMA-MoE: which experts take a token, with what weight, and how evenly.

Source: LLaMA-MoE (arXiv 2406.16554), noisy top-k of Shazeer et al. (arXiv 1701.06538), Switch
(arXiv 2101.03961). Logits, noise, choice and probabilities are float32 whatever the model's dtype:
in bf16, ties among experts change the choice. Load counts tokens, importance sums scores (of one
chosen expert whose weight starts at one: beside the next best); rows that `valid_T` marks False
(padding) count in neither.

Notation: T tokens, D hidden size, E experts, K chosen experts of a token.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from moesaic.core.errors import UserError, unknown
from moesaic.kernels.router import Scheme
from moesaic.models.randomness import Randomness

GateNetwork = Literal["mlp", "linear", "glu"]
Weighting = Literal["scores", "one", "tempered"]
LoadRule = Literal["shazeer", "original"]
ScoreRule = Literal["probability", "original"]


class GateOutput(NamedTuple):
    """What a gate decided. The first three fields are in the order of transformers' own routers."""

    logits: torch.Tensor
    """[T, E] float32, before noise."""
    weights: torch.Tensor
    """[T, K] in the dtype of the input, before any scale factor."""
    ids: torch.Tensor
    """[T, K] int64, highest score first where the gate ranks experts."""
    balance_loss: torch.Tensor | None
    """Scalar float32 with a gradient; None when statistics were not asked for."""
    load: torch.Tensor | None
    """[E] float32: tokens of each expert (expected under training noise; Switch: their share)."""
    importance: torch.Tensor | None
    """[E] float32: sum of each expert's weights (Switch: mean probability)."""


class Gate(nn.Module):
    """What all gates share: the network (if any), the settings, the sums over tokens.

    `network=None` builds a gate without parameters. "mlp" is D -> E, tanh, E -> E; "linear" is D ->
    E; "glu" is one gated neuron an expert, |silu(gate x) * (up x)| (CMoE's). Only "linear" has a
    bias, and only when asked for. `weighting="one"` (`near_one`) and "tempered" (`tempered`) weigh
    every chosen expert by 1 until what is learned (`correction`) leaves zero.
    """

    is_moe_router = True  # how `moesaic.recording` knows it

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_selects: int,
        *,
        network: GateNetwork | None,
        use_softmax: bool = True,
        use_balance: bool = True,
        balance_loss_weight: float = 1e-2,
        add_noise: bool = True,
        noise_epsilon: float = 1e-2,
        load_rule: LoadRule = "shazeer",
        score_rule: ScoreRule = "probability",
        bias: bool = False,
        weighting: Weighting = "scores",
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.num_selects = num_selects
        self.use_softmax = use_softmax
        self.use_balance = use_balance
        self.balance_loss_weight = balance_loss_weight
        self.add_noise = add_noise
        self.noise_epsilon = noise_epsilon
        self.load_rule = load_rule
        self.score_rule = score_rule
        self.randomness = Randomness()
        if network == "mlp":
            self.gate_network: nn.Module | None = nn.Sequential(
                nn.Linear(hidden_size, num_experts, bias=False),
                nn.Tanh(),
                nn.Linear(num_experts, num_experts, bias=False),
            )
        elif network == "linear":
            self.gate_network = nn.Linear(hidden_size, num_experts, bias=bias)
        elif network == "glu":
            self.gate_network = RepresentativeNeurons(hidden_size, num_experts)
        elif network is None:
            self.gate_network = None
        else:
            raise unknown("gate network", str(network), ("mlp", "linear", "glu"))
        self.weighting = weighting
        self.correction: nn.Parameter | None = None
        if weighting in LEARNED:
            self.correction = nn.Parameter(start_at_one(weighting, num_experts))

    def forward(
        self, x_TD: torch.Tensor, valid_T: torch.Tensor | None = None, statistics: bool = True
    ) -> GateOutput:
        raise NotImplementedError

    def logits(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Clean logits [T, E] in float32; zeros for a gate without a network."""
        if self.gate_network is None:
            return torch.zeros(x_TD.shape[0], self.num_experts, device=x_TD.device)
        logits_TE: torch.Tensor = self.gate_network(x_TD)
        return logits_TE.float()

    def _weights(
        self, logits_TE: torch.Tensor, ids_TK: torch.Tensor, scores_TK: torch.Tensor
    ) -> torch.Tensor:
        """Weights [T, K] of the chosen experts: scores, or starting at 1."""
        if self.correction is None:
            return scores_TK
        return LEARNED[self.weighting](logits_TE, self.correction, ids_TK)

    def _sums(
        self, ids_TK: torch.Tensor, values_TK: torch.Tensor | float, valid_T: torch.Tensor | None
    ) -> torch.Tensor:
        """The sum of each expert's values, [E] float32: with 1.0, the tokens that chose it."""
        none_TE = torch.zeros(ids_TK.shape[0], self.num_experts, device=ids_TK.device)
        # scatter and sum instead of index_add: no atomics, so the same numbers every time on a GPU
        return _total(none_TE.scatter(1, ids_TK, values_TK), valid_T)

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, selects={self.num_selects}, softmax={self.use_softmax}"


class RepresentativeNeurons(nn.Module):
    """|silu(gate x) * (up x)|: one gated neuron for each expert, as in CMoE (arXiv 2502.04416)."""

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, num_experts, bias=False)
        self.up = nn.Linear(hidden_size, num_experts, bias=False)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Map x_TD to logits [T, E]."""
        return (F.silu(self.gate(x_TD)) * self.up(x_TD)).abs()


class NoiseWeight(nn.Linear):
    """D -> E without bias, zero in a new model: noise starts as wide for every token."""

    def __init__(self, hidden_size: int, num_experts: int, **kwargs: Any) -> None:
        super().__init__(hidden_size, num_experts, bias=False, **kwargs)
        nn.init.zeros_(self.weight)


class TopKBalancedNoisyGate(Gate):
    """Keep the k largest logits; softmax over those k; balance load and importance (the released
    models' gate).

    In training with noise, sigma = softplus(W_noise x) + epsilon and the choice is made on logits +
    sigma * N(0, 1); an expert's load is then the probability that it would be chosen again.
    `load_rule="original"` reproduces the program that trained the released models: it compares the
    noise alone with the threshold, and without noise it counts only positive scores.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.add_noise:
            self.enable_noise()

    def enable_noise(self) -> None:
        """Turn training noise on; its weight starts at zero where the gate has none yet (sigma = ln
        2 + epsilon).
        """
        self.add_noise = True
        if not hasattr(self, "weight_noise"):
            reference = next(self.parameters())
            self.weight_noise = NoiseWeight(
                self.hidden_size,
                self.num_experts,
                device=reference.device,
                dtype=reference.dtype,
            )

    def forward(
        self, x_TD: torch.Tensor, valid_T: torch.Tensor | None = None, statistics: bool = True
    ) -> GateOutput:
        """Route x_TD; `valid_T` (bool) says which rows count in the statistics."""
        K, E = self.num_selects, self.num_experts
        logits_TE = ranked_TE = self.logits(x_TD)
        noise_TE = sigma_TE = None
        if self.training and self.add_noise:
            sigma_TE = F.softplus(self.weight_noise(x_TD).float()) + self.noise_epsilon
            noise_TE = sigma_TE * self.randomness.normal(logits_TE)
            ranked_TE = logits_TE + noise_TE
            top_TK1, ids_TK1 = ranked_TE.topk(min(K + 1, E), dim=-1)
            kept_TK, ids_TK = top_TK1[:, :K], ids_TK1[:, :K]
            scores_TK = kept_TK.softmax(dim=-1) if self.use_softmax else kept_TK
        else:
            scores_TK, ids_TK = self.choose(logits_TE)
        weights_TK = self._weights(logits_TE, ids_TK, scores_TK).to(x_TD.dtype)
        if not statistics:
            return GateOutput(logits_TE, weights_TK, ids_TK, None, None, None)

        load_E = self._sums(ids_TK, 1.0, valid_T)
        # importance sums scores even where weights are 1: it must pull the router to balance
        if self.correction is not None and K == 1 and E > 1:
            # the score of one chosen expert is 1 and pulls nothing; beside the next best it does
            best_T2, ids_T2 = ranked_TE.topk(2, dim=-1)
            importance_E = self._sums(ids_T2, best_T2.softmax(dim=-1), valid_T)
        else:
            importance_E = self._sums(ids_TK, scores_TK, valid_T)
        if noise_TE is not None and sigma_TE is not None and K < E:
            judged_TE = noise_TE if self.load_rule == "original" else ranked_TE
            threshold_in_T1, threshold_out_T1 = top_TK1[:, K : K + 1], top_TK1[:, K - 1 : K]
            threshold_TE = torch.where(
                judged_TE > threshold_in_T1, threshold_in_T1, threshold_out_T1
            )
            again_TE = torch.special.ndtr((logits_TE - threshold_TE) / sigma_TE)
            load_E = _total(again_TE, valid_T)
        elif self.load_rule == "original":
            positive_TE = torch.zeros_like(logits_TE).scatter(1, ids_TK, (scores_TK > 0).float())
            load_E = _total(positive_TE, valid_T)
        balance_loss = logits_TE.new_zeros(())
        if self.use_balance:
            spread = squared_variation(importance_E) + squared_variation(load_E)
            balance_loss = self.balance_loss_weight * spread
        return GateOutput(
            logits_TE, weights_TK, ids_TK, balance_loss, load_E.detach(), importance_E.detach()
        )

    def choose(self, logits_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and ids [T, K] without noise, the highest logit first."""
        kept_TK, ids_TK = logits_TE.topk(self.num_selects, dim=-1)
        return kept_TK.softmax(dim=-1) if self.use_softmax else kept_TK, ids_TK

    def scheme(self) -> Scheme | str:
        """What `choose` does, for `kernels.fuse_routers`, or why it is not fused."""
        if not self.use_softmax:
            return "its scores are the logits"
        return Scheme(self.num_selects, "softmax of chosen")


class SwitchBalancedGate(Gate):
    """Send each token to one expert; balance = weight * E * sum(load * importance) (Switch
    Transformers, eq. 4).

    The score is the chosen expert's probability and noise is added in training only.
    `score_rule="original"` reproduces the original program: the score is the largest noisy logit,
    and noise is added in evaluation too.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.num_selects not in (1, 2):
            raise UserError(
                f"num_selects={self.num_selects} with SwitchBalancedGate, which chooses one. "
                "Give 1 (2 is accepted as in the original and means 1)."
            )

    def forward(
        self, x_TD: torch.Tensor, valid_T: torch.Tensor | None = None, statistics: bool = True
    ) -> GateOutput:
        """Route x_TD to one expert a token: ids and weights are [T, 1]."""
        logits_TE = self.logits(x_TD)
        original = self.score_rule == "original"
        noisy_TE = logits_TE
        if self.add_noise and (self.training or original):
            noisy_TE = logits_TE + self.randomness.gumbel(logits_TE)
        largest_T1, ids_T1 = noisy_TE.max(dim=-1, keepdim=True)
        probs_TE = logits_TE.softmax(dim=-1) if self.use_softmax else logits_TE
        scores_T1 = largest_T1 if original else probs_TE.gather(1, ids_T1)
        weights_T1 = scores_T1.to(x_TD.dtype)
        if not statistics:
            return GateOutput(logits_TE, weights_T1, ids_T1, None, None, None)

        count_E = self._sums(ids_T1, 1.0, valid_T)
        tokens = len(x_TD) if valid_T is None else valid_T.sum().clamp(min=1)
        load_E, importance_E = count_E / tokens, _total(probs_TE, valid_T) / tokens
        balance_loss = logits_TE.new_zeros(())
        if self.use_balance:
            balance_loss = (
                self.balance_loss_weight * self.num_experts * (load_E * importance_E).sum()
            )
        return GateOutput(
            logits_TE, weights_T1, ids_T1, balance_loss, load_E.detach(), importance_E.detach()
        )


class _UnbalancedGate(Gate):
    """A gate that learns nothing about balance: its balance loss is 0; load and importance are
    measured.
    """

    def _finish(
        self,
        x_TD: torch.Tensor,
        logits_TE: torch.Tensor,
        ids_TK: torch.Tensor,
        scores_TK: torch.Tensor,
        valid_T: torch.Tensor | None,
        statistics: bool,
    ) -> GateOutput:
        weights_TK = scores_TK.to(x_TD.dtype)
        if not statistics:
            return GateOutput(logits_TE, weights_TK, ids_TK, None, None, None)
        load_E = self._sums(ids_TK, 1.0, valid_T)
        importance_E = self._sums(ids_TK, scores_TK, valid_T)
        return GateOutput(
            logits_TE,
            weights_TK,
            ids_TK,
            logits_TE.new_zeros(()),
            load_E.detach(),
            importance_E.detach(),
        )


class UniformPlainGate(_UnbalancedGate):
    """Every token to every expert with the same score: 1/E, or 1 without softmax. No parameters."""

    def __init__(self, *args: Any, network: GateNetwork | None = None, **kwargs: Any) -> None:
        super().__init__(*args, network=None, **kwargs)

    def forward(
        self, x_TD: torch.Tensor, valid_T: torch.Tensor | None = None, statistics: bool = True
    ) -> GateOutput:
        """Route every row of x_TD to all experts."""
        logits_TE = self.logits(x_TD)
        scores_TE = torch.full_like(logits_TE, 1.0 / self.num_experts if self.use_softmax else 1.0)
        return self._finish(
            x_TD, logits_TE, _all_experts(logits_TE), scores_TE, valid_T, statistics
        )


class UniformLearnableGate(_UnbalancedGate):
    """Every token to every expert with a learned score: the softmax over all experts, or the
    logits.
    """

    def forward(
        self, x_TD: torch.Tensor, valid_T: torch.Tensor | None = None, statistics: bool = True
    ) -> GateOutput:
        """Route every row of x_TD to all experts, in the order of the experts."""
        logits_TE = self.logits(x_TD)
        scores_TE = logits_TE.softmax(dim=-1) if self.use_softmax else logits_TE
        return self._finish(
            x_TD, logits_TE, _all_experts(logits_TE), scores_TE, valid_T, statistics
        )


class RandomPlainGate(_UnbalancedGate):
    """Each token to k random experts with the same score: 1/k (`score_rule="original"`: 1/E), or 1
    without softmax.
    """

    def __init__(self, *args: Any, network: GateNetwork | None = None, **kwargs: Any) -> None:
        super().__init__(*args, network=None, **kwargs)

    def forward(
        self, x_TD: torch.Tensor, valid_T: torch.Tensor | None = None, statistics: bool = True
    ) -> GateOutput:
        """Route x_TD at random, in evaluation too."""
        logits_TE = self.logits(x_TD)
        _, ids_TK = self.randomness.uniform(logits_TE).topk(self.num_selects, dim=-1)
        shares = self.num_experts if self.score_rule == "original" else self.num_selects
        score = 1.0 / shares if self.use_softmax else 1.0
        scores_TK = torch.full(ids_TK.shape, score, device=x_TD.device)
        return self._finish(x_TD, logits_TE, ids_TK, scores_TK, valid_T, statistics)


class RandomLearnableGate(_UnbalancedGate):
    """Each token to k random experts with a learned score: the softmax over their logits, or the
    logits.
    """

    def forward(
        self, x_TD: torch.Tensor, valid_T: torch.Tensor | None = None, statistics: bool = True
    ) -> GateOutput:
        """Route x_TD at random, in evaluation too."""
        logits_TE = self.logits(x_TD)
        _, ids_TK = self.randomness.uniform(logits_TE).topk(self.num_selects, dim=-1)
        kept_TK = logits_TE.gather(1, ids_TK)
        scores_TK = kept_TK.softmax(dim=-1) if self.use_softmax else kept_TK
        return self._finish(x_TD, logits_TE, ids_TK, scores_TK, valid_T, statistics)


GATES: dict[str, type[Gate]] = {
    gate.__name__: gate
    for gate in (
        TopKBalancedNoisyGate,
        SwitchBalancedGate,
        UniformPlainGate,
        UniformLearnableGate,
        RandomPlainGate,
        RandomLearnableGate,
    )
}
"""The names that a config's `gate_type` may have (those of the original program)."""


def near_one(
    logits_TE: torch.Tensor, correction_E: torch.Tensor, ids_TK: torch.Tensor
) -> torch.Tensor:
    """Weights of the chosen experts, [T, K]: 1 + u_e * s_e, s the softmax over all experts.

    u is learned and starts at zero (CMoE, arXiv 2502.04416).
    """
    # All experts' weights first: the gradient of correction[ids] would add up T * K numbers one
    # after the other, a fifth of a training step on a GPU.
    weights_TE = 1.0 + correction_E.float() * logits_TE.softmax(dim=-1, dtype=torch.float32)
    return weights_TE.gather(1, ids_TK)


def tempered(
    logits_TE: torch.Tensor, correction_1: torch.Tensor, ids_TK: torch.Tensor
) -> torch.Tensor:
    """Weights of the chosen experts, [T, K], of mean 1: K times the softmax of 10 u * logits.

    u is learned, one number a layer: at zero all weights are 1, at 0.1 they are K times the usual
    ones. u moves first, then the router, whose gradient u is a factor of. One chosen expert is
    weighed beside the next best. (Ten, as Adam moves every number by about the learning rate: too
    slow for an exponent. One number, as then a router scaled by 10 u gives the same weights in any
    model that renormalises; one for each expert was not better.)
    """
    chosen = ids_TK.shape[1]
    if chosen == 1 and logits_TE.shape[1] > 1:
        others_TE = logits_TE.detach().scatter(1, ids_TK, float("-inf"))
        ids_TK = torch.cat([ids_TK, others_TE.argmax(dim=1, keepdim=True)], dim=1)
    kept_TK = logits_TE.float().gather(1, ids_TK)
    # Below the best one's, or u's gradient would be a small difference of large numbers.
    kept_TK = kept_TK - kept_TK.detach().amax(dim=1, keepdim=True)
    weights_TK = ids_TK.shape[1] * (10.0 * correction_1.float() * kept_TK).softmax(dim=-1)
    return weights_TK[:, :chosen]


LEARNED = {"one": near_one, "tempered": tempered}
"""The weightings that start at 1, with a learned `correction`."""


def start_at_one(weighting: str, experts: int) -> torch.Tensor:
    """What such a weighting learns, zero at first: a number for each expert, or one (tempered)."""
    return torch.zeros(1 if weighting == "tempered" else experts)


def squared_variation(values_E: torch.Tensor) -> torch.Tensor:
    """Squared coefficient of variation: unbiased var / (mean² + 1e-10); 0 for a single value."""
    if values_E.numel() == 1:
        return values_E.new_zeros(())
    values_E = values_E.float()
    return values_E.var() / (values_E.mean() ** 2 + 1e-10)


def _total(values_TE: torch.Tensor, valid_T: torch.Tensor | None) -> torch.Tensor:
    """Sum over the valid tokens."""
    if valid_T is not None:
        # not a product: some attention kernels leave NaN in the rows of padding
        values_TE = values_TE.masked_fill(~valid_T[:, None], 0.0)
    return values_TE.sum(dim=0)


def _all_experts(logits_TE: torch.Tensor) -> torch.Tensor:
    tokens, experts = logits_TE.shape
    return torch.arange(experts, device=logits_TE.device).expand(tokens, experts)
