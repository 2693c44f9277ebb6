"""Switch: a token over its expert's capacity passes the layer, times its probability.

transformers (to 5.23) gives zero for such a token; the original program gives prob * x. Capacity is
counted in each sequence, in order, padding included; transformers to 5.17 counts it over the whole
batch, and its balance loss cannot read what its routers record.

Notation: B batch, T positions, D model width, E experts, N = B * T rows.
"""

from __future__ import annotations

import torch
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.models.switch_transformers.configuration_switch_transformers import (
    SwitchTransformersConfig,
)
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersSparseMLP,
    SwitchTransformersTop1Router,
)

from moesaic.models.overrides import Override


class Router(SwitchTransformersTop1Router):
    """The router of one layer, with the outputs that it has in transformers 5.23."""

    def forward(
        self, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return what was chosen [B, T, E], its probability [B, T, 1] and the logits [B, T, E].

        What was chosen is one-hot, and zero where the expert's capacity is used up.
        """
        x_BTD = hidden_states.to(self.dtype)
        if self.training and self.jitter_noise > 0:
            low, high = 1.0 - self.jitter_noise, 1.0 + self.jitter_noise
            x_BTD = x_BTD * torch.empty_like(x_BTD).uniform_(low, high)
        bias = self.classifier.bias
        logits_BTE = functional.linear(
            x_BTD,
            self.classifier.weight.to(self.dtype),
            None if bias is None else bias.to(self.dtype),
        )
        probs_BTE = logits_BTE.softmax(dim=-1, dtype=self.dtype).to(hidden_states.dtype)
        prob_BT1, ids_BT1 = probs_BTE.max(dim=-1, keepdim=True)
        chosen_BTE = functional.one_hot(ids_BT1.squeeze(-1), self.num_experts)
        kept_BTE = chosen_BTE * (chosen_BTE.cumsum(dim=-2) <= self.expert_capacity)
        return kept_BTE, prob_BT1, logits_BTE


class SparseMLP(SwitchTransformersSparseMLP):
    """The layer of experts."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map x [B, T, D] to prob * expert(x), or prob * x over capacity."""
        kept_BTE, prob_BT1, _ = self.router(hidden_states)
        kept_NE, x_ND = kept_BTE.flatten(0, 1), hidden_states.flatten(0, 1)
        y_ND = torch.where(kept_NE.any(dim=-1, keepdim=True), torch.zeros_like(x_ND), x_ND)
        for expert in kept_NE.any(dim=0).nonzero().flatten().tolist():
            rows = kept_NE[:, expert].nonzero().flatten()
            out = self.experts[f"expert_{expert}"](x_ND[rows])
            y_ND = y_ND.index_add(0, rows, out.to(y_ND.dtype))
        return prob_BT1 * y_ND.view_as(hidden_states)


def unpack(router_outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Join the layers' logits [B, T, E] along T, beside the experts they choose."""
    logits = torch.cat(router_outputs, dim=1)
    return logits, logits.argmax(dim=-1)


def finish(model: PreTrainedModel) -> None:
    """Let the balance loss read the logits: transformers 5.17 expects pairs."""
    if hasattr(model, "_unpack_router_logits"):
        setattr(model, "_unpack_router_logits", unpack)  # noqa: B010 - no attribute to mypy


def probe() -> bool:
    """Whether the second of two equal tokens, over the capacity of 1, gives anything but p * x."""
    config = SwitchTransformersConfig(
        d_model=4, d_ff=4, num_experts=2, expert_capacity=1, router_jitter_noise=0.0
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        layer, x_BTD = SwitchTransformersSparseMLP(config).eval(), torch.ones(1, 2, 4)
        found_BTD = layer(x_BTD)
        layer.router.__class__ = Router
        _, prob_BT1, _ = layer.router(x_BTD)
    return not torch.allclose(found_BTD[:, 1], (prob_BT1 * x_BTD)[:, 1], atol=1e-6)


OVERRIDE = Override(
    model_type="switch_transformers",
    summary="transformers drops tokens over an expert's capacity; here they pass the layer",
    probe=probe,
    parts={SwitchTransformersTop1Router: Router, SwitchTransformersSparseMLP: SparseMLP},
    finish=finish,
)
