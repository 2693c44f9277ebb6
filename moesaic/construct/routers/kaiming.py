"""The kaiming router init: fresh weights by the rule of a new linear layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch

from moesaic.construct.router import RouterInputs, RouterMethod
from moesaic.construct.routers import ROUTERS


@ROUTERS.register
class Kaiming(RouterMethod):
    """Fresh weights from U(-1/sqrt(D), 1/sqrt(D)), D the inputs; needs only the model's config.

    What LLaMA-MoE-v2's converter does without a gate file (arXiv 2411.15708).
    """

    reads_split: ClassVar[bool] = False

    def build(self, inputs: RouterInputs) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the router weights of every layer, drawn from one seeded stream."""
        experts, hidden = inputs.split.num_experts, inputs.dense.hidden
        layers = inputs.split.layers
        for layer in range(layers):
            if not inputs.contract_layers <= layer < layers - inputs.contract_layers:
                # The original draws for layers with experts only; the seed's numbers depend on it.
                yield _zeros(inputs.gate, experts, hidden)
                continue
            first = kaiming(experts, hidden, generator=inputs.generator)
            if inputs.gate == "linear":
                yield {"weight": first}
            else:
                second = kaiming(experts, experts, generator=inputs.generator)
                yield {"0.weight": first, "2.weight": second}


def _zeros(gate: str, experts: int, hidden: int) -> dict[str, torch.Tensor]:
    first = torch.zeros(experts, hidden)
    if gate == "linear":
        return {"weight": first}
    return {"0.weight": first, "2.weight": torch.zeros(experts, experts)}


def kaiming(rows: int, columns: int, *, generator: torch.Generator) -> torch.Tensor:
    """A float32 matrix [rows, columns] as torch.nn.Linear begins with."""
    bound = columns**-0.5
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
