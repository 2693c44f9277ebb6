"""JetMoE chat: its config.json uses GPT-style field names, which transformers does not read.

The real file would silently give 12 layers in place of 24. A field that is there under
transformers' name counts before the other one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.models.jetmoe.configuration_jetmoe import JetMoeConfig

from moesaic.models.overrides import Override

NAMES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_key_value_heads",
    "n_positions": "max_position_embeddings",
    "ffn_hidden_size": "intermediate_size",
    "moe_num_experts": "num_local_experts",
    "moe_top_k": "num_experts_per_tok",
}


def read(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the fields; the old names are gone, so that a saved config.json has one set."""
    fields = {key: value for key, value in config.items() if key not in NAMES}
    for old, new in NAMES.items():
        if old in config:
            fields.setdefault(new, config[old])
    return fields


def probe() -> bool:
    """Whether transformers ignores n_embd."""
    return JetMoeConfig.from_dict({"n_embd": 64}).hidden_size != 64


OVERRIDE = Override(
    model_type="jetmoe",
    summary="its config.json has GPT-style names, which transformers ignores; here they are read",
    probe=probe,
    applies=lambda config: any(old in config and NAMES[old] not in config for old in NAMES),
    read=read,
)
