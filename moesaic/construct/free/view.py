"""What a split, a router or a refit may look at in one layer, and the methods that look.

Methods of this kind are asked layer by layer, each layer on the output of the layers that are
converted already. Asked for a whole split (`moesaic split`), they see the dense model instead.
Notation: T tokens, D hidden size, F dense neurons, E experts, c_TF energies of neurons.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch.nn.functional import silu

from moesaic.construct.activations import LayerStream, text_sample
from moesaic.construct.calibration import check_enough
from moesaic.construct.method import LayerSplit, SplitInputs, SplitMethod
from moesaic.construct.router import Gate, RouterInputs, RouterMethod

__all__ = ["CalibratedRouter", "CalibratedSplit", "LayerView", "held_back", "sums_by_expert"]

Ids = NDArray[np.int64]


@dataclass
class LayerView:
    """One feed-forward layer on calibration tokens; float32."""

    layer: int
    x_TD: torch.Tensor
    """Inputs of the layer and of its router."""
    neurons_TF: torch.Tensor
    """act(gate x) * (up x), the inputs of the down projection."""
    gate_FD: torch.Tensor
    up_FD: torch.Tensor
    down_DF: torch.Tensor
    experts: int
    """All experts, shared ones included."""
    shared: int
    top_k: int
    """Routed experts of a token."""
    context: int
    seed: int
    activation: Callable[[torch.Tensor], torch.Tensor] = silu
    """What follows gate_proj."""
    gate_bias_F: torch.Tensor | None = None
    up_bias_F: torch.Tensor | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, layer: int, mlp: Any, x_TD: torch.Tensor, neurons_TF: torch.Tensor, **sizes: Any
    ) -> LayerView:
        """The view of a feed-forward module, given its inputs and neurons; `sizes` are the rest."""
        return cls(
            layer,
            x_TD,
            neurons_TF,
            mlp.gate_proj.weight,
            mlp.up_proj.weight,
            mlp.down_proj.weight,
            activation=mlp.act_fn,
            gate_bias_F=mlp.gate_proj.bias,
            up_bias_F=mlp.up_proj.bias,
            **sizes,
        )

    @cached_property
    def held_T(self) -> torch.Tensor:
        """Every eighth row of text is held back: bool [T]."""
        return held_back(len(self.x_TD), self.context).to(self.x_TD.device)

    @cached_property
    def energy_TF(self) -> torch.Tensor:
        """Output energy of every neuron: h² ||column of W_down||²."""
        return self.neurons_TF.square() * self.down_DF.square().sum(0)

    def first(self, tokens: int) -> LayerView:
        """The same layer on its first tokens only."""
        if tokens >= len(self.x_TD):
            return self
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        fields |= {"x_TD": self.x_TD[:tokens], "neurons_TF": self.neurons_TF[:tokens]}
        return LayerView(**fields)


class CalibratedSplit(SplitMethod):
    """A split that looks at a layer's activations on text."""

    needs_data: ClassVar[bool] = True
    makes_shared: ClassVar[bool] = True

    tokens: int = Field(default=65_536, ge=2)
    """Tokens looked at."""
    context: int = Field(default=512, ge=2)
    """Tokens of a row, where the method reads the text itself."""
    top_k: int = Field(default=2, ge=1)
    """Routed experts of a token, where no router says it."""

    @abstractmethod
    def divide_layer(self, view: LayerView) -> LayerSplit:
        """Divide one layer."""

    def divide(self, inputs: SplitInputs) -> Iterator[LayerSplit]:
        """Yield the split of every layer of the dense model in order."""
        top_k = min(self.top_k, inputs.experts - inputs.shared)
        for view in _views(
            inputs,
            tokens=self.tokens,
            context=self.context,
            experts=inputs.experts,
            shared=inputs.shared,
            top_k=top_k,
        ):
            yield self.divide_layer(view)
            if view.facts:
                inputs.facts.setdefault("by_layer", []).append(view.facts)


class CalibratedRouter(RouterMethod):
    """A router init in closed form from a layer's activations on text."""

    needs_data: ClassVar[bool] = True
    networks: ClassVar[tuple[Gate, ...]] = ("linear",)

    tokens: int = Field(default=65_536, ge=2)
    """Tokens looked at."""
    context: int = Field(default=512, ge=2)
    """Tokens of a row, where the method reads the text itself."""

    @abstractmethod
    def fit_layer(self, view: LayerView, experts: Sequence[Ids]) -> dict[str, torch.Tensor]:
        """Weights of one layer's router for these routed experts, as in `RouterInit.layers`."""

    def build(self, inputs: RouterInputs) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the router weights of every layer of the dense model in order."""
        shared = inputs.split.num_shared
        for view in _views(
            inputs,
            tokens=self.tokens,
            context=self.context,
            experts=inputs.split.num_experts + shared,
            shared=shared,
            top_k=inputs.top_k,
        ):
            yield self.fit_layer(view, inputs.split.experts[view.layer])


def _views(
    inputs: SplitInputs | RouterInputs, *, tokens: int, context: int, **sizes: int
) -> Iterator[LayerView]:
    """Every layer of the dense model in order, on `tokens` tokens of the inputs' text."""
    ids_BC = text_sample(inputs.model, inputs.data, tokens=tokens, context=context)
    check_enough(ids_BC.numel(), sizes["experts"])
    for seen in LayerStream(inputs.dense, context=context).layers(ids_BC):
        yield LayerView.of(
            seen.layer,
            seen.module.mlp,
            seen.normed_TD,
            seen.neurons(),
            context=context,
            seed=inputs.seed,
            **sizes,
        )


def held_back(tokens: int, context: int) -> torch.Tensor:
    """Every eighth row of text, or every eighth token where there are few rows: bool [T]."""
    place_T = torch.arange(tokens)
    rows_T = place_T // context
    return (rows_T if tokens > 7 * context else place_T) % 8 == 7


def sums_by_expert(values_TF: torch.Tensor, experts: Sequence[Ids]) -> torch.Tensor:
    """Sum of each expert's columns: [T, E]."""
    member_FE = values_TF.new_zeros(values_TF.shape[1], len(experts))
    for expert, ids in enumerate(experts):
        member_FE[torch.from_numpy(ids), expert] = 1.0
    return values_TF @ member_FE
