"""Model families that transformers lacks or gets wrong, one file each. Importing this room
registers them.

After `import moesaic.models`, transformers' Auto classes load them from a path without remote code,
and the experts implementation "moesaic" is known.
"""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
)

from moesaic import kernels
from moesaic.models.expert_weights import register_released_layout
from moesaic.models.llama_moe import (
    LlamaMoEConfig,
    LlamaMoEForCausalLM,
    LlamaMoEForQuestionAnswering,
    LlamaMoEForSequenceClassification,
    LlamaMoEModel,
)
from moesaic.models.llama_moe_residual import (
    LlamaMoEResidualConfig,
    LlamaMoEResidualForCausalLM,
    LlamaMoEResidualForQuestionAnswering,
    LlamaMoEResidualForSequenceClassification,
    LlamaMoEResidualModel,
)

__all__ = [
    "LlamaMoEConfig",
    "LlamaMoEForCausalLM",
    "LlamaMoEForQuestionAnswering",
    "LlamaMoEForSequenceClassification",
    "LlamaMoEModel",
    "LlamaMoEResidualConfig",
    "LlamaMoEResidualForCausalLM",
    "LlamaMoEResidualForQuestionAnswering",
    "LlamaMoEResidualForSequenceClassification",
    "LlamaMoEResidualModel",
]

_AUTO = (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForQuestionAnswering,
)
_FAMILIES = (
    (
        LlamaMoEConfig,
        LlamaMoEModel,
        LlamaMoEForCausalLM,
        LlamaMoEForSequenceClassification,
        LlamaMoEForQuestionAnswering,
    ),
    (
        LlamaMoEResidualConfig,
        LlamaMoEResidualModel,
        LlamaMoEResidualForCausalLM,
        LlamaMoEResidualForSequenceClassification,
        LlamaMoEResidualForQuestionAnswering,
    ),
)


def register() -> None:
    """Register every family and kernel with transformers; a second call changes nothing."""
    kernels.register()
    for config, *models in _FAMILIES:
        AutoConfig.register(config.model_type, config, exist_ok=True)
        for auto, model in zip(_AUTO, models, strict=True):
            auto.register(config, model, exist_ok=True)
        register_released_layout(config.model_type)


register()
