"""What every one of our pretrained classes says about its experts to transformers."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moesaic import kernels


class PreTrainedMoE(PreTrainedModel):
    """A pretrained model whose experts can be run by any implementation, by ours unless told.

    Raises UserError for a config that its class would not build.
    """

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        # from_pretrained sets its keywords as attributes of a config whose checks are done
        type(config).from_dict(config.to_dict())
        super().__init__(config, *args, **kwargs)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers searches the class's source file for the decorator, caching it on a base
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        if requested_experts is None:
            requested_experts = kernels.NAME if kernels.NAME in ALL_EXPERTS_FUNCTIONS else "eager"
        return super().get_correct_experts_implementation(requested_experts)
