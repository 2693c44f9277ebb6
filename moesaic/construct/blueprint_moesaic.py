"""What a converted `moesaic_moe` checkpoint will hold: its config and tensor names.

Every tensor of the dense model but its MLPs keeps its name. Routed experts are
`mlp.experts.{e}.{gate,up,down}_proj`, the shared ones together `mlp.shared_experts`.
Notation: E routed experts, I neurons of one, K routed experts chosen for a token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moesaic.construct.blueprint import Blueprint, with_shared
from moesaic.construct.dense import DenseModel
from moesaic.construct.router import RouterInit
from moesaic.construct.split import NeuronSplit
from moesaic.core.errors import UserError
from moesaic.models.gates import start_at_one
from moesaic.models.selects import Selects, selects_of

# Fields of the dense config.json that belong to a file, not to a model.
_OF_THE_FILE = ("architectures", "auto_map", "_name_or_path", "torch_dtype", "dtype")


@dataclass(frozen=True)
class BlueprintMoesaic(Blueprint):
    """A dense model of any family, its split and router, and the mixture that they make."""

    def every(self, layer: int) -> list[NDArray[np.int64]]:
        """The neurons of every part: routed experts, then all shared ones as one."""
        shared = self.split.shared[layer]
        return self.split.experts[layer] + ([np.concatenate(shared)] if shared else [])

    def expert_names(self, layer: int) -> Iterator[tuple[str, str, str]]:
        """Names of gate, up and down of every part of a layer."""
        start = f"{self.prefix}layers.{layer}.mlp."
        parts = [f"{start}experts.{expert}." for expert in range(self.split.num_experts)]
        parts += [f"{start}shared_experts."] if self.split.num_shared else []
        for part in parts:
            yield f"{part}gate_proj.weight", f"{part}up_proj.weight", f"{part}down_proj.weight"

    def router_tensors(self, layer: int) -> dict[str, torch.Tensor]:
        """The router under its final names, in the checkpoint's type."""
        from moesaic.models.families.moesaic_moe import LEARNED

        start = f"{self.prefix}layers.{layer}.mlp.gate."
        weights = self.router.layers[layer]
        weighting = self.config["weighting"]
        if weighting in LEARNED:
            weights = {**weights, "scale": start_at_one(weighting, self.split.num_experts)}
        return {f"{start}{name}": tensor.to(self.experts_dtype) for name, tensor in weights.items()}

    def sizes(self) -> dict[str, Any]:
        """Parameters in all and active for a token, and the width of the experts."""
        experts, chosen = self.split.num_experts, self.config["num_experts_per_tok"]
        width = self.config["moe_intermediate_size"]
        plan = self.plan()
        total = sum(math.prod(shape) for _, _, shape in plan)
        spare = sum(experts - selects_of(chosen, layer) for layer in range(self.dense.layers))
        idle = spare * 3 * self.dense.hidden * width
        return {
            "layers": self.dense.layers,
            "experts": experts + self.split.num_shared,
            "shared": self.split.num_shared,
            "top_k": with_shared(chosen, self.split.num_shared),
            "expert_width": [width, width],
            "parameters_dense": self.dense.checkpoint.parameters,
            "parameters_total": total,
            "parameters_active": total - idle,
            "bytes": sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in plan),
            "dtype": str(self.experts_dtype).removeprefix("torch."),
        }


def draw_moesaic(
    dense: DenseModel,
    split: NeuronSplit,
    router: RouterInit,
    *,
    selects: Selects,
    scale: float | list[float],
) -> BlueprintMoesaic:
    """Put dense model, split and router together; `selects` is K, `scale` the score factor.

    The chosen experts are weighted as in LLaMA-MoE: by a softmax over the K, times `scale`; the
    shared ones are added as they are. Of a DeepSeek-V3, weights are its sigmoids, scaled so that
    for logits of zero they are the same. Raises UserError for experts of unequal width and for a
    router that is not one matrix.
    """
    if router.gate != "linear":
        raise UserError(
            f"{dense.checkpoint.path} becomes a moesaic_moe, which routes by one matrix, but the "
            f"router init is of network {router.gate}. Make it with gate=linear."
        )
    widths = {len(ids) for layer in split.experts for ids in layer}
    together = {sum(map(len, layer)) for layer in split.shared}
    for what, found in (("routed", widths), ("shared", together)):
        if len(found) > 1:
            raise UserError(
                f"The {what} experts of the split hold {min(found)} to {max(found)} neurons, but "
                "those of moesaic_moe are of one width. Make a split with equal experts."
            )
    sigmoid = dense.family.model_type == "deepseek_v3"
    if sigmoid:
        factors = scale if isinstance(scale, list) else [scale] * dense.layers
        factors = [2 * f / selects_of(selects, layer) for layer, f in enumerate(factors)]
        scale = factors if len(set(factors)) > 1 else factors[0]
    config: dict[str, Any] = {
        "architectures": ["MoesaicMoeForCausalLM"],
        "model_type": "moesaic_moe",
        "dtype": str(dense.checkpoint.dtype(dense.outer()[0][0])).removeprefix("torch."),
        "text_config": text_config(dense),
        "tie_word_embeddings": bool(dense.config.get("tie_word_embeddings")),
        "num_experts": split.num_experts,
        "num_experts_per_tok": selects,
        "moe_intermediate_size": widths.pop(),
        "shared_expert_intermediate_size": together.pop(),
        "weighting": "sigmoid" if sigmoid else "renormalised",
        "routed_scaling_factor": scale,
        "router_bias": "bias" in router.layers[0],
        **{
            name: dense.config.get(name)
            for name in ("bos_token_id", "eos_token_id", "pad_token_id")
            if name in dense.checkpoint.config
        },
    }
    return BlueprintMoesaic(dense, split, router, config)


def text_config(dense: DenseModel) -> dict[str, Any]:
    """The dense model's own config.json, with nothing added and nothing left to defaults of ours.

    transformers' class of the family reads it as it read the dense file; rope scaling, windows,
    kinds of layers and soft-capping are in it.
    """
    given = dense.checkpoint.config
    kept = {key: value for key, value in given.items() if key not in _OF_THE_FILE}
    return {**kept, "tie_word_embeddings": bool(dense.config.get("tie_word_embeddings"))}
