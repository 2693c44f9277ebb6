"""NLLB-MoE: the published config.json names the bare model, but its weights are the translator's.

facebook/nllb-moe-54b says NllbMoeModel in `architectures`; it is a translation model, whose output
matrix is its embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moesaic.models.overrides import Override


def read(config: Mapping[str, Any]) -> dict[str, Any]:
    """Name the class that translates."""
    return {**config, "architectures": ["NllbMoeForConditionalGeneration"]}


OVERRIDE = Override(
    model_type="nllb-moe",
    summary="its config.json names the bare model; here it is the translation model that it is",
    probe=lambda: True,  # it is the published file that is wrong, whatever transformers does
    applies=lambda config: config.get("architectures") == ["NllbMoeModel"],
    read=read,
)
