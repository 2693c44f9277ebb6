"""LLaMA-MoE as a family: see `moesaic.models.llama_moe` for the classes."""

from __future__ import annotations

from moesaic.models.expert_weights import released_layout
from moesaic.models.family import Family
from moesaic.models.llama_moe import (
    LlamaMoEConfig,
    LlamaMoEForCausalLM,
    LlamaMoEForQuestionAnswering,
    LlamaMoEForSequenceClassification,
    LlamaMoEModel,
)

FAMILY = Family(
    config=LlamaMoEConfig,
    models={
        "AutoModel": LlamaMoEModel,
        "AutoModelForCausalLM": LlamaMoEForCausalLM,
        "AutoModelForSequenceClassification": LlamaMoEForSequenceClassification,
        "AutoModelForQuestionAnswering": LlamaMoEForQuestionAnswering,
    },
    conversion=released_layout,
    harmless=("rotary_emb.inv_freq",),
)
