"""The hidden-clusters router init: each expert is found by a cluster of what its layer sees."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field

from moesaic.construct.activations import text_sample
from moesaic.construct.hidden import HiddenSettings, hidden_gates
from moesaic.construct.router import Gate, RouterInputs, RouterMethod
from moesaic.construct.routers import ROUTERS


@ROUTERS.register
class HiddenClusters(RouterMethod):
    """Row e is the center of a cluster of the layer's inputs on real text (k-means).

    LLaMA-MoE-v2's hidden-feature clustering (arXiv 2411.15708). The split `gradient-plus` makes
    the same gates and matches its experts to them; with another split, rows and experts meet by
    chance.
    """

    needs_data: ClassVar[bool] = True
    reads_split: ClassVar[bool] = False
    networks: ClassVar[tuple[Gate, ...]] = ("linear",)

    jitter: float = Field(default=0.4, ge=0, lt=1)
    """Clusters hold an equal share of tokens, less or more by this part of it; 0: balanced."""
    metric: Literal["l2", "cos"] = "l2"
    """Distance between features."""
    sample: int = Field(default=16_384, ge=1)
    """Tokens that are clustered; all tokens then settle the centers in two passes."""
    starts: int = Field(default=4, ge=1)
    """Starts of k-means, of which the best is kept."""
    tokens: int = Field(default=131_072, ge=2)
    """Tokens read."""
    context: int = Field(default=512, ge=2)
    """Tokens of a row."""

    def build(self, inputs: RouterInputs) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the router weights of every layer."""
        settings = HiddenSettings("clusters", self.jitter, self.metric, self.sample, self.starts)
        yield from gates_of(inputs, settings, tokens=self.tokens, context=self.context)


def gates_of(
    inputs: RouterInputs, settings: HiddenSettings, *, tokens: int, context: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Read text and yield the gates of every layer; keeps how often each wins."""
    ids_BC = text_sample(inputs.model, inputs.data, tokens=tokens, context=context)
    gates_LED, wins = hidden_gates(
        inputs.dense,
        ids_BC,
        inputs.split.num_experts,
        settings=settings,
        seed=inputs.seed,
        top_k=inputs.top_k,
    )
    inputs.facts |= {"tokens": ids_BC.numel(), "tokens_won": wins}
    for gate_ED in gates_LED:
        yield {"weight": gate_ED.clone()}
