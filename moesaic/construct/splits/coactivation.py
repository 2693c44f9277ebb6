"""The co-activation split: neurons that are active on the same tokens together, by a graph cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from moesaic.construct.method import LayerSplit, SplitInputs, SplitMethod
from moesaic.construct.splits import SPLITS


@SPLITS.register
class Coactivation(SplitMethod):
    """Neurons active on the same tokens together (graph cut by METIS); every neuron once.

    The graph split of LLaMA-MoE's code, on act(gate x) * up x, the input of down_proj. Neurons
    ascend inside an expert.
    """

    needs_data: ClassVar[bool] = True

    kernel: Literal["plain", "l1", "l2"] = "l1"
    """What counts as activity: the value, its absolute value, or its square."""
    threshold: float = Field(default=float("inf"), gt=0)
    """The most that a pair of neurons gains from one shard of text (LLaMA-MoE: 1)."""
    edges: Literal["strongest", "percentile"] = "strongest"
    """Links to the neurons most active together, or LLaMA-MoE's to all above a percentile."""
    neighbours: int = Field(default=64, ge=1)
    """Links a neuron chooses, under `strongest`."""
    tokens: int = Field(default=32_768, ge=1)
    """Tokens read."""
    context: int = Field(default=512, ge=1)
    """Tokens of a row."""
    shard_tokens: int = Field(default=4096, ge=1)
    """Tokens of a shard, what is in memory at once."""

    def divide(self, inputs: SplitInputs) -> Iterator[LayerSplit]:
        """Yield the split of every layer in order."""
        import torch

        from moesaic.construct.activations import LayerStream, text_sample
        from moesaic.construct.calibration import check_enough
        from moesaic.construct.graph import (
            co_activation,
            equalise,
            partition,
            percentile_graph,
            strongest_graph,
        )

        ids_BC = text_sample(inputs.model, inputs.data, tokens=self.tokens, context=self.context)
        check_enough(ids_BC.numel(), inputs.experts)
        inputs.facts["tokens"] = ids_BC.numel()
        moved = inputs.facts.setdefault("moved_to_equalise", [])
        for seen in LayerStream(inputs.dense, context=ids_BC.shape[1]).layers(ids_BC):
            with torch.inference_mode():
                shards = (
                    replace(seen, residual_TD=residual_SD, normed_TD=normed_SD).neurons().numpy()
                    for residual_SD, normed_SD in zip(
                        seen.residual_TD.split(self.shard_tokens),
                        seen.normed_TD.split(self.shard_tokens),
                        strict=True,
                    )
                )
                together_FF = co_activation(shards, kernel=self.kernel, threshold=self.threshold)
            if self.edges == "strongest":
                graph = strongest_graph(together_FF, neighbours=self.neighbours)
            else:
                graph = percentile_graph(together_FF)
            del together_FF
            seed = inputs.seed + seen.layer
            rough_F = partition(graph, inputs.experts, seed=seed)
            labels_F = equalise(rough_F, graph, inputs.experts, seed=seed)
            moved.append(int((rough_F != labels_F).sum()))
            parts = [np.flatnonzero(labels_F == expert) for expert in range(inputs.experts)]
            yield LayerSplit(parts, [])
