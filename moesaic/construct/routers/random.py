"""The random router init: fresh weights, as the released LLaMA-MoE models start from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch

from moesaic.construct.router import RouterInputs, RouterMethod
from moesaic.construct.routers import ROUTERS


@ROUTERS.register
class Random(RouterMethod):
    """Fresh weights from N(0, initializer_range²); needs only the model's config.

    The law of the original, whose converter keeps whatever a freshly built model holds
    (arXiv 2406.16554, section 3.3): every linear layer of the router, both of an `mlp`.
    """

    reads_split: ClassVar[bool] = False

    std: float | None = None
    """Standard deviation; the model's initializer_range when not given."""

    def build(self, inputs: RouterInputs) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the router weights of every layer, drawn from one seeded stream."""
        experts, hidden = inputs.split.num_experts, inputs.dense.hidden
        for _ in range(inputs.split.layers):
            first = inputs.normal(experts, hidden, std=self.std)
            if inputs.gate == "linear":
                yield {"weight": first}
            else:
                yield {"0.weight": first, "2.weight": inputs.normal(experts, experts, std=self.std)}
