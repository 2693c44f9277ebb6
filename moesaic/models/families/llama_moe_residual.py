"""LLaMA-MoE with residual experts as a family; the classes: `moesaic.models.llama_moe_residual`."""

from __future__ import annotations

from moesaic.models.expert_weights import released_layout
from moesaic.models.family import Family
from moesaic.models.llama_moe_residual import (
    LlamaMoEResidualConfig,
    LlamaMoEResidualForCausalLM,
    LlamaMoEResidualForQuestionAnswering,
    LlamaMoEResidualForSequenceClassification,
    LlamaMoEResidualModel,
)

FAMILY = Family(
    config=LlamaMoEResidualConfig,
    models={
        "AutoModel": LlamaMoEResidualModel,
        "AutoModelForCausalLM": LlamaMoEResidualForCausalLM,
        "AutoModelForSequenceClassification": LlamaMoEResidualForSequenceClassification,
        "AutoModelForQuestionAnswering": LlamaMoEResidualForQuestionAnswering,
    },
    conversion=released_layout,
    harmless=("rotary_emb.inv_freq",),
)
