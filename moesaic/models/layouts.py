"""How released files name the tensors of a layer's experts, and how they become 3-D parameters.

Each function gives transformers' weight conversions of one layout; saving runs them backwards. In
memory: `gate_up_proj` [E, 2I, D] (gate rows first) and `down_proj` [E, D, I].
"""

from __future__ import annotations

from typing import Any

from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter


def qwen_layout(block: str = "mlp") -> list[Any]:
    """`<block>.experts.{e}.{gate,up,down}_proj.weight`."""
    return _layout(block, "gate_proj", "up_proj", "down_proj")


def mixtral_layout(block: str = "mlp") -> list[Any]:
    """`<block>.experts.{e}.{w1,w3,w2}.weight`: gate, up, down."""
    return _layout(block, "w1", "w3", "w2")


def _layout(block: str, gate: str, up: str, down: str) -> list[Any]:
    # Names are patterns: without the block, `shared_experts.down_proj` would be cut up on saving.
    experts = f"{block}.experts"
    return [
        WeightConverter(
            [f"{experts}.*.{gate}.weight", f"{experts}.*.{up}.weight"],
            f"{experts}.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            f"{experts}.*.{down}.weight",
            f"{experts}.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ]
