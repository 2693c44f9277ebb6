"""JetMoE: `router_logits` holds each router once, so the balance loss counts it once.

transformers (to 5.23) records an attention router twice a layer: from the router itself, and from
the attention that hands its logits on. Here a layer gives two: attention, feed-forward.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.jetmoe.configuration_jetmoe import JetMoeConfig
from transformers.models.jetmoe.modeling_jetmoe import JetMoeAttention, JetMoeModel

from moesaic.models.overrides import Override


class Attention(JetMoeAttention):
    """Attention that keeps its router's logits to itself."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """Return output and attention weights; None where transformers hands the logits on."""
        output, weights, _ = super().forward(*args, **kwargs)
        return output, weights, None


def probe() -> bool:
    """Whether one layer with two routers records more than two."""
    config = JetMoeConfig(
        vocab_size=4,
        hidden_size=4,
        num_hidden_layers=1,
        num_key_value_heads=1,
        kv_channels=2,
        intermediate_size=2,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = JetMoeModel._from_config(config, attn_implementation="eager").eval()
        out = model(input_ids=torch.zeros(1, 1, dtype=torch.long), output_router_logits=True)
    return len(out.router_logits) > 2


OVERRIDE = Override(
    model_type="jetmoe",
    summary="transformers counts attention routers twice in the balance loss; here once",
    probe=probe,
    parts={JetMoeAttention: Attention},
)
