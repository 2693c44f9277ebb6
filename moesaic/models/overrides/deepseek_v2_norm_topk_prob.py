"""DeepSeek-V2 with `norm_topk_prob`: the weights of the chosen experts are brought to sum 1.

transformers (to 5.23) ignores the field and always multiplies by `routed_scaling_factor`. The
original program (modeling_deepseek.py, MoEGate) with top_k > 1 and norm_topk_prob divides by the
sum + 1e-20 and does not scale. No published alias sets the field; checkpoints of others may.
"""

from __future__ import annotations

import torch
from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter

from moesaic.models.overrides import Override


class Router(DeepseekV2TopkRouter):
    """The router of one layer; rows T, experts E, chosen K."""

    is_moe_router = True

    def forward(
        self, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return logits [T, E], weights [T, K] of sum 1, and the chosen experts [T, K]."""
        logits_TE, weights_TK, ids_TK = super().forward(hidden_states)
        if ids_TK.shape[-1] > 1:
            weights_TK = logits_TE.softmax(dim=-1, dtype=torch.float32).gather(-1, ids_TK)
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
        return logits_TE, weights_TK, ids_TK


def probe() -> bool:
    """Whether two weights do not sum to 1 though they should."""
    config = DeepseekV2Config(
        hidden_size=4,
        num_attention_heads=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        topk_method="greedy",
        norm_topk_prob=True,
        routed_scaling_factor=3.0,
    )
    with torch.no_grad():
        _, weights_TK, _ = DeepseekV2TopkRouter(config)(torch.zeros(1, 4))
    return bool((weights_TK.sum() - 1).abs() > 1e-5)


OVERRIDE = Override(
    model_type="deepseek_v2",
    summary="transformers ignores norm_topk_prob; here the chosen experts' weights sum to 1",
    probe=probe,
    applies=lambda config: bool(config.get("norm_topk_prob")),
    parts={DeepseekV2TopkRouter: Router},
)
