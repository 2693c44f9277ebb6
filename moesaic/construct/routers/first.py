"""The router init `first`: every token to the first experts."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moesaic.construct.router import RouterInputs, RouterMethod
from moesaic.construct.routers import ROUTERS


@ROUTERS.register
class First(RouterMethod):
    """Every token goes to the experts of lowest number: static pruning, the control of routing."""

    networks = ("linear",)

    def build(self, inputs: RouterInputs) -> Iterator[dict[str, torch.Tensor]]:
        """Yield weights of zero and falling biases."""
        experts, hidden = inputs.split.num_experts, inputs.dense.hidden
        for _ in range(inputs.split.layers):
            bias = torch.linspace(1.0, 0.0, experts)
            yield {"weight": torch.zeros(experts, hidden), "bias": bias}
