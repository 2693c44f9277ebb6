"""Phi-3.5-MoE: beyond its original context, positions turn by the long factors.

transformers (to 5.23) switches the magnitude of the rotation there but keeps the short factors. The
original program switches both together, for the whole input, when its length is over
`original_max_position_embeddings`. Keys that are cached keep the rotation they got.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.phimoe.configuration_phimoe import PhimoeConfig
from transformers.models.phimoe.modeling_phimoe import PhimoeRotaryEmbedding

from moesaic.models.overrides import Override


class RotaryEmbedding(PhimoeRotaryEmbedding):
    """Cosines and sines of the positions; B batch, S positions, H head width."""

    @torch.no_grad()
    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin [B, S, H] for `position_ids` [B, S], in the number format of x."""
        length = int(position_ids.max()) + 1
        inv_freq, scale = self.rope_init_fn(self.config, device=x.device, seq_len=length)
        rope: Any = self.config.rope_parameters
        if rope["rope_type"] != "default":
            is_long = length > rope["original_max_position_embeddings"]
            scale = rope["long_mscale" if is_long else "short_mscale"]
        # float32: positions beyond 256 are not told apart in bf16
        angles = position_ids[..., None].float() * inv_freq.to(device=x.device, dtype=torch.float)
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * scale).to(x.dtype), (angles.sin() * scale).to(x.dtype)


def probe() -> bool:
    """Whether the angle of position 1 is the same before and after the original context."""
    config = PhimoeConfig(
        hidden_size=8,
        num_attention_heads=2,
        max_position_embeddings=8,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 2,
            "short_factor": [1.0, 1.0],
            "long_factor": [4.0, 4.0],
            "short_mscale": 1.0,
            "long_mscale": 1.0,
        },
    )
    rope = PhimoeRotaryEmbedding(config)
    cos_short, cos_long = (
        rope(torch.zeros(1), position_ids=torch.arange(length)[None])[0][0, 1] for length in (2, 4)
    )
    return torch.allclose(cos_short, cos_long)


OVERRIDE = Override(
    model_type="phimoe",
    summary="transformers keeps the short RoPE factors on long inputs; here the long ones are used",
    probe=probe,
    applies=lambda config: bool(config.get("rope_scaling") or config.get("rope_parameters")),
    parts={PhimoeRotaryEmbedding: RotaryEmbedding},
)
