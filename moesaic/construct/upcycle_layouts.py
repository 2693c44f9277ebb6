"""How an upcycled model is stored: our LLaMA-MoE classes, our `moesaic_moe`, or Mixtral.

A layout knows config, tensor names and sizes; it reads nothing. All choose K experts by a linear
router and weight them with the softmax over those K. LLaMA-MoE has a scale on the sum and shared
experts with weights of their own; `moesaic_moe` keeps the layers of every dense family, and has a
scale and one always-on part; Mixtral has neither, and is what vLLM and llama.cpp load.
Notation: as in upcycle_method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from moesaic.construct.blueprint import Blueprint, draw, mixture_config
from moesaic.construct.blueprint_moesaic import draw_moesaic
from moesaic.construct.dense import DenseModel
from moesaic.construct.router import RouterInit
from moesaic.construct.split import NeuronSplit
from moesaic.core.errors import UserError, unknown
from moesaic.measure.exactness import FeedForward
from moesaic.models.writer import Planned

__all__ = ["Layout", "LayoutName", "make_layout"]

LayoutName = Literal["llama_moe", "moesaic_moe", "mixtral"]

_MIXTRAL_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_dropout",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "dtype",
    "id2label",
    "label2id",
)


class Layout(Protocol):
    """Names, shapes and config of an upcycled model."""

    @property
    def config(self) -> dict[str, Any]:
        """The config.json."""

    @property
    def fold(self) -> float:
        """Factor on every routed down_proj, where the layout has no scale of its own."""

    @property
    def shared_fold(self) -> float:
        """Factor on the always-on parts' down_proj, where the layout does not weight them."""

    def renamed(self, name: str) -> str:
        """The name of a tensor that is taken over."""

    def expert_names(self, layer: int) -> list[tuple[str, str, str]]:
        """Names of gate, up and down of the routed experts, then of the always-on parts."""

    def always(self, dense: FeedForward) -> list[tuple[FeedForward, float]]:
        """The always-on parts, copies of a dense layer, and the weight that each is given."""

    def router_tensors(self, layer: int, router_ED: torch.Tensor) -> dict[str, torch.Tensor]:
        """The router's tensors, in the type they are stored in."""

    def plan(self) -> list[Planned]:
        """Name, type and shape of every tensor, in the order of the network."""


def make_layout(
    name: str,
    dense: DenseModel,
    neurons: Sequence[NDArray[np.int64]],
    *,
    selects: int,
    shared: int,
    scale: float,
    noise: bool,
) -> Layout:
    """The layout called `name`; `scale` multiplies the routed sum, `noise` allows noisy routing.

    Raises UserError when the layout cannot hold the model.
    """
    if name not in get_args(LayoutName):
        raise unknown("layout", name, get_args(LayoutName))
    if name != "moesaic_moe" and dense.mixture != "llama_moe":
        raise UserError(
            f"{dense.checkpoint.path} is of type {dense.config['model_type']!r}, and the layout "
            f"{name} does not compute its attention. Use the layout moesaic_moe, which keeps every "
            "family's own layers."
        )
    if dense.config.get("mlp_bias"):
        raise UserError(
            f"{dense.checkpoint.path} has biases in its feed-forward layers (mlp_bias), which "
            "upcycling does not carry. Use `moesaic convert`, or a model without them."
        )
    every = [np.arange(dense.width)] * shared
    layers = dense.layers
    division = NeuronSplit([list(neurons)] * layers, [every] * layers, dense.width)
    if name == "mixtral":
        return _mixtral(dense, division, selects=selects, scale=scale)
    zeros = torch.zeros(division.num_experts, dense.hidden)
    share = selects / (selects + shared)
    each = (1 - share) / shared if shared else 1.0
    if name == "moesaic_moe":
        router = RouterInit([{"weight": zeros}] * layers, [None] * layers)
        generic = draw_moesaic(dense, division, router, selects=selects, scale=scale * share)
        # Weights must add up to a constant: DeepSeek-V3's sigmoids do not.
        generic.config.update(weighting="renormalised", routed_scaling_factor=scale * share)
        return _Moesaic(generic, shared, each, shared_fold=each)
    always = torch.zeros(shared, dense.hidden) if shared else None
    router = RouterInit([{"weight": zeros}] * layers, [always] * layers)
    blueprint = draw(
        dense, division, router, selects=selects, scale=scale * share, shared_scale=1 - share
    )
    blueprint.config["gate_add_noise"] = noise
    return _LlamaMoE(blueprint, shared, each)


@dataclass(frozen=True)
class _LlamaMoE:
    blueprint: Blueprint
    shared: int
    each: float
    """The weight of a shared expert."""
    fold: float = 1.0
    shared_fold: float = 1.0

    @property
    def config(self) -> dict[str, Any]:
        return self.blueprint.config

    def renamed(self, name: str) -> str:
        return self.blueprint.renamed(name)

    def expert_names(self, layer: int) -> list[tuple[str, str, str]]:
        return list(self.blueprint.expert_names(layer))

    def always(self, dense: FeedForward) -> list[tuple[FeedForward, float]]:
        return [(dense, self.each)] * self.shared

    def router_tensors(self, layer: int, router_ED: torch.Tensor) -> dict[str, torch.Tensor]:
        # The blueprint's own are zeros: right for shared experts, which begin with equal weights.
        tensors = self.blueprint.router_tensors(layer)
        weight = f"{self.blueprint.mlp(layer)}gate.gate_network.weight"
        tensors[weight] = router_ED.to(tensors[weight].dtype)
        return {name: tensor for name, tensor in tensors.items() if not self._absent(name)}

    def plan(self) -> list[Planned]:
        return [item for item in self.blueprint.plan() if not self._absent(item[0])]

    def _absent(self, name: str) -> bool:
        return ".weight_noise." in name and not self.config["gate_add_noise"]


@dataclass(frozen=True)
class _Moesaic(_LlamaMoE):
    """Shared experts are one part there, and their weight is in its down projection."""

    def always(self, dense: FeedForward) -> list[tuple[FeedForward, float]]:
        if not self.shared:
            return []
        gate_FD, up_FD, down_DF = dense.scaled(self.shared_fold)[:3]
        copies = self.shared
        wide = FeedForward(
            gate_FD.repeat(copies, 1), up_FD.repeat(copies, 1), down_DF.repeat(1, copies)
        )
        return [(wide, 1.0)]

    def router_tensors(self, layer: int, router_ED: torch.Tensor) -> dict[str, torch.Tensor]:
        ((name, drawn),) = self.blueprint.router_tensors(layer).items()
        return {name: router_ED.to(drawn.dtype)}


@dataclass(frozen=True)
class _Mixtral:
    dense: DenseModel
    config: dict[str, Any]
    fold: float
    shared_fold: float = 1.0

    def renamed(self, name: str) -> str:
        inside = self.dense.prefix == "transformer." and name.startswith("transformer.")
        return "model." + name.removeprefix("transformer.") if inside else name

    def expert_names(self, layer: int) -> list[tuple[str, str, str]]:
        start = f"{self._block(layer)}experts."
        experts = range(self.config["num_local_experts"])
        return [(f"{start}{e}.w1.weight", f"{start}{e}.w3.weight", f"{start}{e}.w2.weight")
                for e in experts]  # fmt: skip

    def always(self, dense: FeedForward) -> list[tuple[FeedForward, float]]:
        return []

    def router_tensors(self, layer: int, router_ED: torch.Tensor) -> dict[str, torch.Tensor]:
        dtype = self.dense.checkpoint.dtype(self.dense.ffn(layer)[0])
        return {f"{self._block(layer)}gate.weight": router_ED.to(dtype)}

    def plan(self) -> list[Planned]:
        checkpoint, hidden = self.dense.checkpoint, self.dense.hidden
        width, experts = self.config["intermediate_size"], self.config["num_local_experts"]
        before, after = self.dense.outer()
        plan = [self._same(name) for name in before]
        for layer in range(self.dense.layers):
            plan += [self._same(name) for name in self.dense.others(layer)]
            dtypes = [checkpoint.dtype(name) for name in self.dense.ffn(layer)]
            shapes = ((width, hidden), (width, hidden), (hidden, width))
            for names in self.expert_names(layer):
                plan += zip(names, dtypes, shapes, strict=True)
            plan.append((f"{self._block(layer)}gate.weight", dtypes[0], (experts, hidden)))
        return plan + [self._same(name) for name in after]

    def _same(self, name: str) -> Planned:
        checkpoint = self.dense.checkpoint
        return self.renamed(name), checkpoint.dtype(name), checkpoint.shape(name)

    def _block(self, layer: int) -> str:
        prefix = "model." if self.dense.prefix == "transformer." else self.dense.prefix
        return f"{prefix}layers.{layer}.block_sparse_moe."


def _mixtral(dense: DenseModel, division: NeuronSplit, *, selects: int, scale: float) -> _Mixtral:
    if division.num_shared:
        raise UserError(
            f"shared={division.num_shared} was asked of the layout mixtral, which has no shared "
            "experts. Use the layout llama_moe or moesaic_moe."
        )
    if dense.config.get("attention_bias"):
        raise UserError(
            f"{dense.checkpoint.path} has biases in its attention, which Mixtral has not. "
            "Use the layout llama_moe."
        )
    zeros = torch.zeros(division.num_experts, dense.hidden)
    router = RouterInit([{"weight": zeros}] * dense.layers, [None] * dense.layers)
    # LLaMA-MoE's config carries the dense model's fields, resolved; a part of them is Mixtral's.
    fields = mixture_config(dense, division, router, selects=selects, scale=1.0)
    config = {
        "architectures": [f"Mixtral{dense.head}"],
        "model_type": "mixtral",
        **{key: fields[key] for key in _MIXTRAL_FIELDS if key in fields},
        "intermediate_size": len(division.experts[0][0]),
        "num_local_experts": division.num_experts,
        "num_experts_per_tok": selects,
        "sliding_window": None,
    }
    return _Mixtral(dense, config, scale)
