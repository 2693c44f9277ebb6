"""Model families that transformers lacks or gets wrong. Importing this room registers them.

After `import moesaic.models`, transformers' Auto classes load them from a path without remote code,
and the experts implementation "moesaic" is known.
"""

from __future__ import annotations

from moesaic import kernels
from moesaic.models import families
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


def register() -> None:
    """Register every family and kernel with transformers; a second call changes nothing."""
    kernels.register()
    families.register_all()


register()
