"""NLLB-MoE: tokens go to the two experts that the router chose.

transformers (to 5.23) takes the one-hot mask of the first choice for expert numbers, so that only
experts 0 and 1 are ever evaluated. The original program sends a token to every expert whose
combine weight is not zero: two, fewer where capacity dropped a choice.
"""

from __future__ import annotations

import torch
from transformers.models.nllb_moe.configuration_nllb_moe import NllbMoeConfig
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeExperts

from moesaic.models.overrides import Override


class Experts(NllbMoeExperts):
    """The experts of one layer; rows [T], model width D, experts E."""

    def forward(
        self, x_TD: torch.Tensor, first_TE: torch.Tensor, combine_TE: torch.Tensor
    ) -> torch.Tensor:
        """Sum the experts' outputs, weighted by `combine_TE`; `first_TE` is not needed."""
        y_TD = torch.zeros_like(x_TD)
        for expert in combine_TE.count_nonzero(0).nonzero().flatten().tolist():
            rows = combine_TE[:, expert].nonzero().flatten()
            out = self[f"expert_{expert}"](x_TD[rows]) * combine_TE[rows, expert, None]
            if self.moe_token_dropout > 0:
                keep = 1 - self.moe_token_dropout
                out = self.token_dropout(out) if self.training else out * keep
            y_TD.index_add_(0, rows, out.to(x_TD.dtype))
        return y_TD


def probe() -> bool:
    """Whether a token whose weight is all on expert 2 is not computed by expert 2."""
    config = NllbMoeConfig(d_model=4, num_experts=3, moe_token_dropout=0.0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        experts = NllbMoeExperts(config, ffn_dim=4).eval()
        x = torch.randn(2, 4)
        combine = torch.tensor([[0.0, 0.0, 1.0]]).repeat(2, 1)
        out = experts(x, combine.long(), combine)
        return not torch.allclose(out, experts["expert_2"](x), atol=1e-6)


OVERRIDE = Override(
    model_type="nllb-moe",
    summary="transformers evaluates experts 0 and 1 only; here a token visits its two experts",
    probe=probe,
    parts={NllbMoeExperts: Experts},
)
