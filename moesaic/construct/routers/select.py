"""The select router init: routers trained to find the experts whose neurons fire most.

Notation: T tokens, D hidden size, F neurons, E routed experts, K = top_k. Source: LLaMA-MoE's
`expert_select` (spec llama-moe-v1, section 1.7); the released models start from random routers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch.nn import functional

from moesaic.construct.activations import LayerStream, text_sample
from moesaic.construct.calibration import check_enough
from moesaic.construct.method import Projection
from moesaic.construct.router import RouterInputs, RouterMethod
from moesaic.construct.routers import ROUTERS
from moesaic.construct.routers.centroids import centroids

Criterion = Literal["plain", "positive", "l1_norm", "l2_norm"]
Target = Literal["softmax", "topk"]


@ROUTERS.register
class Select(RouterMethod):
    """Trained on real text to pick the experts whose neurons are most active.

    Every layer's router sees the inputs of the dense layer and learns, per expert, the activity of
    its neurons: as a distribution (`softmax`, Kullback-Leibler divergence) or as membership of the
    K most active (`topk`, binary cross-entropy). AdamW with a rate that falls on plateaus; the
    epoch with the best share of the K most active found among held-out tokens is kept.
    """

    needs_data: ClassVar[bool] = True
    criterion: Criterion = "l2_norm"
    """Activity of an expert from its neurons h: |sum h|, sum max(h, 0), sum |h| or sum h²."""
    target: Target = "topk"
    """What is learnt of the activity: its softmax, or which K experts have most."""
    start: Literal["weight", "random"] = "weight"
    """First layer: centroids of the experts' normalised rows, or N(0, 1). Second: identity."""
    projection: Projection = "up"
    """Whose rows the centroids are of."""
    epochs: int = Field(default=100, ge=1)
    """Passes over the tokens."""
    learning_rate: float = Field(default=0.1, gt=0)
    """Initial rate of AdamW; it falls to a hundredth of this at most."""
    batch: int = Field(default=1024, ge=1)
    """Tokens a step."""
    tokens: int = Field(default=16384, ge=2)
    """Tokens of text looked at."""
    context: int = Field(default=256, ge=1)
    """Tokens a row of text."""

    def build(self, inputs: RouterInputs) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the trained router weights of every layer."""
        ids_BC = text_sample(inputs.model, inputs.data, tokens=self.tokens, context=self.context)
        check_enough(ids_BC.numel(), inputs.split.num_experts + inputs.split.num_shared)
        stream = LayerStream(inputs.dense, context=self.context)
        found: list[float] = []
        for inputs_of in stream.layers(ids_BC):
            ids = inputs.split.experts[inputs_of.layer]
            if self.start == "weight":
                gate, up, _ = inputs.dense.ffn(inputs_of.layer)
                rows = inputs.dense.read(gate if self.projection == "gate" else up)
                first = centroids(rows, ids)
            else:
                first = inputs.normal(len(ids), inputs.dense.hidden, std=1.0)
            activity_TE = expert_activity(inputs_of.neurons(), ids, self.criterion)
            x_TD = inputs_of.normed_TD
            with torch.inference_mode(False):
                weights, share = self._train(
                    x_TD.clone(), activity_TE.clone(), first, inputs, linear=inputs.gate == "linear"
                )
            found.append(round(share, 4))
            inputs.facts["held_out_top_k_found"] = found
            yield weights

    def _train(
        self,
        x_TD: torch.Tensor,
        activity_TE: torch.Tensor,
        first_ED: torch.Tensor,
        inputs: RouterInputs,
        *,
        linear: bool,
    ) -> tuple[dict[str, torch.Tensor], float]:
        names = ("weight",) if linear else ("0.weight", "2.weight")
        starts = (first_ED,) if linear else (first_ED, torch.eye(len(first_ED)))
        weights = [w.clone().requires_grad_() for w in starts]
        top_k = min(inputs.top_k, len(first_ED))
        target_TE = targets(activity_TE, target=self.target, top_k=top_k)
        # Every tenth token is held out; a sample too small for that is judged on itself.
        held = (
            torch.arange(len(x_TD)) % 10 == 9 if len(x_TD) >= 20 else torch.ones(len(x_TD)).bool()
        )
        train = torch.nonzero(~held if len(x_TD) >= 20 else held).flatten()
        optimizer = torch.optim.AdamW(weights, lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=0.9, patience=10, min_lr=0.01 * self.learning_rate
        )
        wanted_TE = targets(activity_TE[held], target="topk", top_k=top_k)
        best = (_found(router_logits(x_TD[held], weights), wanted_TE, top_k), weights)
        best = (best[0], [w.detach().clone() for w in weights])
        for _ in range(self.epochs):
            order = train[torch.randperm(len(train), generator=inputs.generator)]
            total = 0.0
            for rows in order.split(self.batch):
                loss = router_loss(
                    router_logits(x_TD[rows], weights), target_TE[rows], target=self.target
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += float(loss.detach()) * len(rows)
            schedule.step(total)
            share = _found(router_logits(x_TD[held], weights), wanted_TE, top_k)
            if share > best[0]:
                best = (share, [w.detach().clone() for w in weights])
        return dict(zip(names, best[1], strict=True)), best[0]


def expert_activity(
    neurons_TF: torch.Tensor, experts: Sequence[NDArray[np.integer[Any]]], criterion: Criterion
) -> torch.Tensor:
    """Activity of every expert for every token, [T, E], from the inputs of down_proj [T, F]."""
    match criterion:
        case "plain":
            values = neurons_TF
        case "positive":
            values = neurons_TF.clamp(min=0)
        case "l1_norm":
            values = neurons_TF.abs()
        case "l2_norm":
            values = neurons_TF.square()
    ids = [torch.from_numpy(np.asarray(expert, np.int64)) for expert in experts]
    sums_TE = torch.stack([values.index_select(1, expert).sum(1) for expert in ids], dim=1)
    return sums_TE.abs() if criterion == "plain" else sums_TE


def targets(activity_TE: torch.Tensor, *, target: Target, top_k: int) -> torch.Tensor:
    """What a router learns of the experts' activity: its softmax, or 1 for the K most active."""
    if target == "softmax":
        return activity_TE.softmax(1)
    return torch.zeros_like(activity_TE).scatter_(1, activity_TE.topk(top_k, dim=1).indices, 1.0)


def router_logits(x_TD: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Logits [T, E] of a router given as [W] (linear) or [W1, W2] (mlp)."""
    logits = x_TD @ weights[0].T
    return logits if len(weights) == 1 else torch.tanh(logits) @ weights[1].T


def router_loss(
    logits_TE: torch.Tensor, target_TE: torch.Tensor, *, target: Target
) -> torch.Tensor:
    """KL divergence to a distribution, or cross-entropy to 0/1 labels: a mean of T*E entries."""
    if target == "softmax":
        log_probs = logits_TE.log_softmax(1)
        return functional.kl_div(log_probs.flatten(), target_TE.flatten(), reduction="batchmean")
    return functional.binary_cross_entropy_with_logits(logits_TE, target_TE)


def _found(logits_TE: torch.Tensor, wanted_TE: torch.Tensor, top_k: int) -> float:
    chosen_TK = logits_TE.detach().topk(top_k, dim=1).indices
    return float(wanted_TE.gather(1, chosen_TK).mean())
