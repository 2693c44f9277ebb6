"""Phi-3.5-MoE: a sliding window of w lets a token see w + 1 keys, itself and w before it.

So counted the original program (transformers 4.46's masks, and flash attention's window_size=(w,
w)); transformers 5 counts w keys, itself included.
"""

from __future__ import annotations

from typing import Any

from transformers.masking_utils import sliding_window_overlay
from transformers.models.phimoe.configuration_phimoe import PhimoeConfig

from moesaic.models.overrides import Override


class Config(PhimoeConfig):
    """PhimoeConfig whose attribute `sliding_window` counts the visible keys.

    One more than in config.json, from which it is made and to which it is written.
    """

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.sliding_window is not None:
            self.sliding_window += 1

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as config.json holds it."""
        fields: dict[str, Any] = super().to_dict()
        if fields.get("sliding_window") is not None:
            fields["sliding_window"] -= 1
        return fields


def probe() -> bool:
    """Whether a window of 2 hides the key two positions before."""
    return not sliding_window_overlay(2)(0, 0, 2, 0)


OVERRIDE = Override(
    model_type="phimoe",
    summary="transformers' sliding window shows one key less than the original; here it does not",
    probe=probe,
    applies=lambda config: config.get("sliding_window") is not None,
    config=Config,
)
