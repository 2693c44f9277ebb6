"""What a converted LLaMA-MoE-v2 checkpoint will hold: its config and tensor names.

Notation: L layers, E routed experts, D hidden size, I neurons of one expert, K routed experts
chosen for a token. Routed experts are `block_sparse_moe.experts.{e}`, the shared ones together
`mlp_residual`, the dense layers at both ends (contract layers) `block_sparse_moe` itself; w1 is
gate, w3 up, w2 down.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moesaic.construct.blueprint import Blueprint, dense_fields
from moesaic.construct.dense import DenseModel
from moesaic.construct.router import RouterInit
from moesaic.construct.split import NeuronSplit
from moesaic.core.errors import UserError

__all__ = ["BlueprintV2", "draw_v2", "v2_config"]


@dataclass(frozen=True)
class BlueprintV2(Blueprint):
    """A dense model, its split and router, and the LLaMA-MoE-v2 they make."""

    def is_moe(self, layer: int) -> bool:
        """Whether a layer's MLP becomes experts."""
        contract = self.config["num_moe_contract_layers"]
        return bool(contract <= layer < self.dense.layers - contract)

    def every(self, layer: int) -> list[NDArray[np.int64]]:
        """The neurons of every part: routed experts, then all shared ones as one."""
        if not self.is_moe(layer):
            return [np.arange(self.dense.width)]
        shared = self.split.shared[layer]
        return self.split.experts[layer] + ([np.concatenate(shared)] if shared else [])

    def expert_names(self, layer: int) -> Iterator[tuple[str, str, str]]:
        """Names of gate, up and down of every part of a layer."""
        start = f"{self.prefix}layers.{layer}."
        block = f"{start}block_sparse_moe."
        parts = [block]
        if self.is_moe(layer):
            parts = [f"{block}experts.{e}." for e in range(self.split.num_experts)]
            parts += [f"{start}mlp_residual."] if self.split.num_shared else []
        for part in parts:
            yield f"{part}w1.weight", f"{part}w3.weight", f"{part}w2.weight"

    def router_tensors(self, layer: int) -> dict[str, torch.Tensor]:
        """The router's weights under their final name, in the checkpoint's type."""
        if not self.is_moe(layer):
            return {}
        weight = self.router.layers[layer]["weight"].to(self.experts_dtype)
        return {f"{self.prefix}layers.{layer}.block_sparse_moe.gate.weight": weight}

    def sizes(self) -> dict[str, Any]:
        """Parameters in all and active for a token, and the width of the experts."""
        experts, chosen = self.split.num_experts, self.config["num_experts_per_tok"]
        width = self.config["intermediate_size"]
        plan = self.plan()
        total = sum(math.prod(shape) for _, _, shape in plan)
        layers = sum(self.is_moe(layer) for layer in range(self.dense.layers))
        idle = layers * (experts - chosen) * 3 * self.dense.hidden * width
        return {
            "layers": self.dense.layers,
            "contract_layers": self.config["num_moe_contract_layers"],
            "experts": experts + self.split.num_shared,
            "shared": self.split.num_shared,
            "top_k": chosen + self.split.num_shared,
            "expert_width": [width, width],
            "parameters_dense": self.dense.checkpoint.parameters,
            "parameters_total": total,
            "parameters_active": total - idle,
            "bytes": sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in plan),
            "dtype": str(self.experts_dtype).removeprefix("torch."),
        }


def draw_v2(
    dense: DenseModel,
    split: NeuronSplit,
    router: RouterInit,
    *,
    selects: int,
    scale: float,
    contract_layers: int = 0,
) -> BlueprintV2:
    """Put dense model, split and router together; `selects` is K, `scale` the scale factor.

    Raises UserError for what a LLaMA-MoE-v2 cannot hold: biases, experts of unequal width, a router
    that is not one matrix, or so many contract layers that none is left.
    """
    check_v2_source(dense)
    if not 0 <= 2 * contract_layers < dense.layers:
        raise UserError(
            f"contract_layers={contract_layers} leaves no layer with experts: the first and the "
            f"last {contract_layers} of {dense.layers} stay dense. Give 0 to "
            f"{(dense.layers - 1) // 2}."
        )
    if router.gate != "linear":
        raise UserError(
            "LLaMA-MoE-v2 routes by one matrix, but the router init is of network mlp. Make it "
            "with gate=linear."
        )
    inside = range(contract_layers, dense.layers - contract_layers)
    widths = {len(ids) for layer in inside for ids in split.experts[layer]}
    together = {sum(map(len, split.shared[layer])) for layer in inside}
    for what, found in (("routed", widths), ("shared", together)):
        if len(found) > 1:
            raise UserError(
                f"The {what} experts of the split hold {min(found)} to {max(found)} neurons, but "
                "those of LLaMA-MoE-v2 are of one width. Make a split with equal experts, or use "
                "the preset llama-moe-v1."
            )
    config = v2_config(dense) | {
        "intermediate_size": widths.pop(),
        "num_local_experts": split.num_experts,
        "num_experts_per_tok": selects,
        "intermediate_size_residual": together.pop() or None,
        "intermediate_size_dense": dense.width,
        "num_moe_contract_layers": contract_layers,
        "scale_factor": scale,
    }
    return BlueprintV2(dense, split, router, config)


def v2_config(dense: DenseModel) -> dict[str, Any]:
    """The config of a LLaMA-MoE-v2 without its experts: the dense fields, nothing injected.

    The original lets Mixtral's defaults in: a sliding window of 4096 and, where LLaMA's config
    leaves them out, rope_theta and rms_norm_eps; and its model ignores rope_scaling.
    """
    return {
        "architectures": [f"LlamaMoEV2{dense.head}"],
        "model_type": "llama_moe_v2",
        **dense_fields(dense),
        "sliding_window": None,
        "moe_type": "modulelist",
        "router_aux_loss_coef": 0.01,
        "output_router_logits": False,
        "use_attn_moe": False,
        "add_rescale_bias": False,
        "balance_loss": "switch",
    }


def check_v2_source(dense: DenseModel) -> None:
    """Raise UserError for a dense model with parts that a LLaMA-MoE-v2 has not."""
    kind = dense.config.get("model_type")
    if kind not in ("llama", "mistral"):
        raise UserError(
            f"{dense.checkpoint.path} is a {kind}; a LLaMA-MoE-v2 is made of a llama or a mistral. "
            "Use another preset."
        )
    dense.need_llama("a LLaMA-MoE-v2")
    biased = [key for key in ("attention_bias", "mlp_bias") if dense.config.get(key)]
    if biased:
        raise UserError(
            f"{dense.checkpoint.path} has biases ({', '.join(biased)}), a LLaMA-MoE-v2 has none. "
            "Use the preset llama-moe-v1."
        )
