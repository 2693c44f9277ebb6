"""GraniteMoE: `output_router_logits=True` gives the routers' logits, and a loss to train with.

transformers 5.17 records none, and then fails to compute the balance loss; later versions do. Its
language model does not tell the decoder whether they are wanted, so here they are always given.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel
from transformers.models.granitemoe import modeling_granitemoe as granite
from transformers.models.granitemoe.configuration_granitemoe import GraniteMoeConfig
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY, OutputRecorder

from moesaic.models.overrides import Override


class Model(granite.GraniteMoeModel):
    """The decoder; its routers give (ids, weights, logits)."""

    _can_record_outputs: ClassVar[dict[str, Any]] = {  # type: ignore[misc]  # as its base does
        **(granite.GraniteMoeModel._can_record_outputs or {}),
        "router_logits": OutputRecorder(granite.GraniteMoeTopKRouter, index=2),
    }

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the decoder and record the routers' logits."""
        return super().forward(*args, **{**kwargs, "output_router_logits": True})


def finish(model: PreTrainedModel) -> None:
    """Register what is recorded, as a model of the class does when it is made."""
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(Model), Model._can_record_outputs)


def probe() -> bool:
    """Whether a tiny model records nothing."""
    config = GraniteMoeConfig(
        vocab_size=4,
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = granite.GraniteMoeModel._from_config(config, attn_implementation="eager").eval()
        out = model(input_ids=torch.zeros(1, 1, dtype=torch.long), output_router_logits=True)
    return not getattr(out, "router_logits", None)


OVERRIDE = Override(
    model_type="granitemoe",
    summary="transformers records no router logits, so it has no balance loss; here it has",
    probe=probe,
    parts={granite.GraniteMoeModel: Model},
    finish=finish,
)
