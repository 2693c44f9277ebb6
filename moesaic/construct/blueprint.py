"""What a converted checkpoint will hold: its config, its tensor names, its sizes. Nothing is read.

Notation: L layers, E routed experts, R shared experts, D hidden size, I neurons of one expert,
K routed experts chosen for a token. The names are those of the released LLaMA-MoE checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moesaic.construct.dense import DenseModel
from moesaic.construct.router import RouterInit
from moesaic.construct.split import NeuronSplit
from moesaic.models.gates import start_at_one
from moesaic.models.selects import Selects, selects_of
from moesaic.models.writer import Planned

_ROPE = ("rope_theta", "rope_scaling", "rope_parameters")
# Fields of the dense config that say nothing about the mixture, or would contradict it.
_DROPPED = (
    "architectures",
    "auto_map",
    "model_type",
    "sliding_window",
    "pretraining_tp",
    "transformers_version",
    "_name_or_path",
    "torch_dtype",
)
_RUNTIME = ("output_hidden_states", "output_attentions", "return_dict", "chunk_size_feed_forward")
_ALWAYS_KEPT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
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
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
)


@dataclass(frozen=True)
class Blueprint:
    """A dense model, its split and router, and the config of the mixture they make."""

    dense: DenseModel
    split: NeuronSplit
    router: RouterInit
    config: dict[str, Any]

    @property
    def experts_dtype(self) -> torch.dtype:
        """The type that routers are written in: that of the first layer's experts."""
        return self.dense.checkpoint.dtype(self.dense.ffn(0)[0])

    @property
    def prefix(self) -> str:
        """What precedes `layers.`; a dense question answerer says `transformer.`, ours `model.`."""
        return "model." if self.dense.prefix == "transformer." else self.dense.prefix

    def renamed(self, name: str) -> str:
        """The name in the mixture of a tensor that is taken over as it is."""
        inside = self.dense.prefix and name.startswith(self.dense.prefix)
        return self.prefix + name.removeprefix(self.dense.prefix) if inside else name

    def mlp(self, layer: int) -> str:
        """What precedes `gate.` and `calculator.` of a layer's routed experts."""
        inner = "mlp.moe_layer." if self.split.num_shared else "mlp."
        return f"{self.prefix}layers.{layer}.{inner}"

    def blocks(self, layer: int) -> list[tuple[str, list[NDArray[np.int64]]]]:
        """What precedes `calculator.`, and the experts there: the routed, then the shared ones."""
        routed = [(self.mlp(layer), self.split.experts[layer])]
        if not self.split.num_shared:
            return routed
        block = f"{self.prefix}layers.{layer}.mlp.residual_block."
        return [*routed, (block, self.split.shared[layer])]

    def every(self, layer: int) -> list[NDArray[np.int64]]:
        """The neurons of every expert of a layer, shared ones last."""
        return self.split.experts[layer] + self.split.shared[layer]

    def expert_names(self, layer: int) -> Iterator[tuple[str, str, str]]:
        """Names of gate, up and down of every expert of a layer, shared ones last."""
        for start, experts in self.blocks(layer):
            for expert in range(len(experts)):
                name = f"{start}calculator.experts.weight_"
                yield f"{name}gate.{expert}", f"{name}up.{expert}", f"{name}down.{expert}"

    def bias_tensors(
        self, layer: int, gate_F: torch.Tensor, up_F: torch.Tensor, down_D: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The biases of a layer under their final names, from those of the dense layer.

        down's bias belongs to no neuron: it goes to the routed block, the shared one adds nothing.
        """
        tensors: dict[str, torch.Tensor] = {}
        for place, (start, experts) in enumerate(self.blocks(layer)):
            for kind, bias_F in (("gate", gate_F), ("up", up_F)):
                for expert, ids in enumerate(experts):
                    name = f"{start}calculator.experts.bias_{kind}.{expert}"
                    tensors[name] = bias_F[torch.from_numpy(ids)]
            tensors[f"{start}calculator.bias_down"] = down_D if place == 0 else 0 * down_D
        return tensors

    def router_tensors(self, layer: int) -> dict[str, torch.Tensor]:
        """The router weights of a layer under their final names, in the checkpoint's type."""
        start, weights = self.mlp(layer), self.router.layers[layer]
        tensors = {f"{start}gate.gate_network.{name}": weight for name, weight in weights.items()}
        if self.config.get("gate_add_noise", True):
            noise = torch.zeros(self.split.num_experts, self.dense.hidden)
            tensors[f"{start}gate.weight_noise.weight"] = noise
        weighting = self.config.get("gate_weighting", "scores")
        if weighting != "scores":
            tensors[f"{start}gate.correction"] = start_at_one(weighting, self.split.num_experts)
        shared = self.router.shared[layer]
        if shared is not None:
            block = self.blocks(layer)[1][0]
            tensors[f"{block}gate.gate_network.weight"] = shared
        return {name: tensor.to(self.experts_dtype) for name, tensor in tensors.items()}

    def plan(self) -> list[Planned]:
        """Name, type and shape of every tensor, in the order of the network."""
        checkpoint = self.dense.checkpoint
        before, after = self.dense.outer()
        plan: list[Planned] = [self._same(name) for name in before]
        for layer in range(self.dense.layers):
            plan += [self._same(name) for name in self.dense.others(layer)]
            dtypes = [checkpoint.dtype(name) for name in self.dense.ffn(layer)]
            for names, ids in zip(self.expert_names(layer), self.every(layer), strict=True):
                wide, tall = (len(ids), self.dense.hidden), (self.dense.hidden, len(ids))
                plan += zip(names, dtypes, (wide, wide, tall), strict=True)
            small = self.router_tensors(layer)
            if names_of := self.dense.biases(layer):
                empty = [
                    torch.empty(checkpoint.shape(n), dtype=checkpoint.dtype(n)) for n in names_of
                ]
                small = self.bias_tensors(layer, *empty) | small
            plan += [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in small.items()]
        return plan + [self._same(name) for name in after]

    def _same(self, name: str) -> Planned:
        checkpoint = self.dense.checkpoint
        return self.renamed(name), checkpoint.dtype(name), checkpoint.shape(name)

    def sizes(self) -> dict[str, Any]:
        """Parameters in all and active for a token, and the widths of the experts."""
        widths = [[len(ids) for ids in layer] for layer in self.split.experts]
        total = sum(math.prod(shape) for _, _, shape in self.plan())
        # Noise weights act in training only; anatomy counts them as idle too.
        noisy = self.config.get("gate_add_noise", True)
        noise = self.dense.layers * self.split.num_experts * self.dense.hidden * noisy
        selects = self.config["num_selects"]
        weights = 3 * self.dense.hidden + (2 if self.config.get("mlp_bias") else 0)
        idle = sum(
            weights * sum(sizes) * (1 - selects_of(selects, layer) / self.split.num_experts)
            for layer, sizes in enumerate(widths)
        )
        return {
            "layers": self.dense.layers,
            "experts": self.split.num_experts + self.split.num_shared,
            "shared": self.split.num_shared,
            "top_k": with_shared(selects, self.split.num_shared),
            "expert_width": [min(map(min, widths)), max(map(max, widths))],
            "parameters_dense": self.dense.checkpoint.parameters,
            "parameters_total": total,
            "parameters_active": round(total - idle - noise),
            "bytes": sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in self.plan()),
            "dtype": str(self.experts_dtype).removeprefix("torch."),
        }


def with_shared(selects: Selects, shared: int) -> Selects:
    """Experts active for a token, shared ones included: one number, or one for each layer."""
    return selects + shared if isinstance(selects, int) else [k + shared for k in selects]


def draw(
    dense: DenseModel,
    split: NeuronSplit,
    router: RouterInit,
    *,
    selects: Selects,
    scale: float | list[float],
    shared_scale: float,
) -> Blueprint:
    """Put dense model, split and router together; `selects` is K, of all layers or of each,
    `scale` the score factor.

    Of a family whose attention LLaMA-MoE does not compute, a `moesaic_moe` is drawn.
    """
    if dense.mixture == "moesaic_moe":
        from moesaic.construct.blueprint_moesaic import draw_moesaic

        return draw_moesaic(dense, split, router, selects=selects, scale=scale)
    config = mixture_config(dense, split, router, selects=selects, scale=scale)
    if split.num_shared:
        shared_sizes = [[len(ids) for ids in layer] for layer in split.shared]
        routed, shared = sum(config["size_experts"][0]), sum(shared_sizes[0])
        config |= {
            "intermediate_size": routed + shared,
            "intermediate_size_moe": routed,
            "intermediate_size_residual": shared,
            "num_experts_residual": split.num_shared,
            "size_experts_residual": shared_sizes,
            "gate_use_softmax_residual": True,
            "multiply_gate_scores_residual": True,
            "score_scale_factor_residual": shared_scale,
            "use_weighting": False,
        }
    return Blueprint(dense, split, router, config)


def mixture_config(
    dense: DenseModel,
    split: NeuronSplit,
    router: RouterInit,
    *,
    selects: Selects,
    scale: float | list[float],
) -> dict[str, Any]:
    """The config.json of the mixture: the dense model's fields, then those of LLaMA-MoE."""
    kind = "llama_moe_residual" if split.num_shared else "llama_moe"
    family = "LlamaMoEResidual" if split.num_shared else "LlamaMoE"
    sizes = [[len(ids) for ids in layer] for layer in split.experts]
    return {
        "architectures": [f"{family}{dense.head}"],
        "model_type": kind,
        **dense_fields(dense),
        "intermediate_size": sum(sizes[0]),
        "num_experts": split.num_experts,
        "num_selects": selects,
        "size_experts": sizes,
        "gate_type": "TopKBalancedNoisyGate",
        "gate_network": router.gate,
        **({"gate_bias": True} if router.bias else {}),
        "gate_use_softmax": True,
        "gate_use_balance": True,
        "gate_balance_loss_weight": 1e-2,
        "gate_add_noise": True,
        "gate_noise_epsilon": 1e-2,
        "calculator_type": "UniversalCalculator",
        "multiply_gate_scores": True,
        "score_scale_factor": scale,
        "add_weight_norm": False,
        "drop_tokens": True,
        "dropped_padding": "zero",
        "capacity_factor": 1.25,
    }


def dense_fields(dense: DenseModel) -> dict[str, Any]:
    """The fields of a dense config that its mixture keeps."""
    given: Mapping[str, Any] = dense.checkpoint.config
    # Families differ in their defaults (a LLaMA has no pad token, LLaMA-MoE's is 0), so the fields
    # that shape the network are written even where the dense config left them out.
    fields = {key: dense.config[key] for key in _ALWAYS_KEPT if key in dense.config}
    rope = {key: given[key] for key in _ROPE if given.get(key) is not None}
    fields |= rope or {"rope_parameters": dense.config["rope_parameters"]}
    written = dense.checkpoint.dtype(dense.outer()[0][0])
    fields["dtype"] = str(written).removeprefix("torch.")
    skipped = {*fields, *_DROPPED, *_RUNTIME, *_ROPE}
    fields |= {key: value for key, value in given.items() if key not in skipped}
    return fields
