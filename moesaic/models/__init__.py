"""Model families that transformers lacks or gets wrong. Importing this room registers them.

After `import moesaic.models`, transformers' Auto classes load them from a path without remote code,
and the experts implementation "moesaic" is known.
"""

from __future__ import annotations

from importlib.metadata import entry_points

from moesaic import kernels
from moesaic.core.registry import PLUGIN_GROUP
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
    """Register every family and kernel with transformers; a second call changes nothing.

    Other packages' families come from the modules that the entry points of `moesaic.plugins` name.
    """
    kernels.register()
    families.register_all()
    for entry_point in entry_points(group=PLUGIN_GROUP):
        entry_point.load()


register()
