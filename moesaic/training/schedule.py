"""Learning rate: linear warm-up, then a cosine that stops falling at a floor.

The rule is LLaMA-MoE's (spec/llama-moe-v1.md, section 4): the floor cuts the cosine off, it does
not rescale it. One difference: past the last step the original's cosine rises again; here it stays
at the floor.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from moesaic.training.config import ScheduleConfig

if TYPE_CHECKING:
    import torch


def multiplier(step: int, *, warmup: int, total: int, floor: float) -> float:
    """Return the share of the peak learning rate that update number `step` (from 0) uses.

    `warmup` updates rise linearly from 0; then max(floor, (1 + cos(pi * progress)) / 2).
    """
    if step < warmup:
        return step / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return max(floor, 0.5 * (1.0 + math.cos(math.pi * progress)))


class Schedule:
    """Sets the learning rate of an optimizer's groups before each update.

    The rate depends on the update's number alone, so that number is the whole state.
    """

    def __init__(self, config: ScheduleConfig, *, peak: float, total: int) -> None:
        self.config = config
        self.peak = peak
        self.total = total

    def rate(self, step: int) -> float:
        """Return the rate of update `step`, from 0: a warm-up's first update has rate 0."""
        return self.peak * multiplier(
            step, warmup=self.config.warmup, total=self.total, floor=self.config.floor
        )

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set the rate of update `step` in every group and return it."""
        rate = self.rate(step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        return rate
