"""What every one of our pretrained classes says about its experts to transformers."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moesaic import kernels


class PreTrainedMoE(PreTrainedModel):
    """A pretrained model whose experts can be run by any implementation, by ours unless told."""

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers searches the class's source file for the decorator, caching it on a base
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        if requested_experts is None:
            requested_experts = kernels.NAME if kernels.NAME in ALL_EXPERTS_FUNCTIONS else "eager"
        return super().get_correct_experts_implementation(requested_experts)
