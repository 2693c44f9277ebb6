"""The hidden-random router init: each expert is found by one token's features, picked at random."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field

from moesaic.construct.hidden import HiddenSettings
from moesaic.construct.router import Gate, RouterInputs, RouterMethod
from moesaic.construct.routers import ROUTERS
from moesaic.construct.routers.hidden_clusters import gates_of


@ROUTERS.register
class HiddenRandom(RouterMethod):
    """Row e is what the layer sees of one token of real text, picked at random.

    LLaMA-MoE-v2's hidden-feature random selection (arXiv 2411.15708).
    """

    needs_data: ClassVar[bool] = True
    reads_split: ClassVar[bool] = False
    networks: ClassVar[tuple[Gate, ...]] = ("linear",)

    tokens: int = Field(default=16_384, ge=2)
    """Tokens read."""
    context: int = Field(default=512, ge=2)
    """Tokens of a row."""

    def build(self, inputs: RouterInputs) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the router weights of every layer."""
        settings = HiddenSettings("random")
        yield from gates_of(inputs, settings, tokens=self.tokens, context=self.context)
