"""LLaMA-MoE back to a dense LLaMA: the experts of a layer laid side by side.

All experts of a layer, summed, are one dense layer: gate and up rows stacked, down columns joined.
Notation: E routed and R shared experts, D hidden size, I neurons of an expert, F of a layer.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from moesaic.construct.dense import read_finite
from moesaic.construct.split import FILE_NAME as SPLIT_FILE
from moesaic.construct.split import NeuronSplit
from moesaic.core.console import note, track
from moesaic.core.errors import MoesaicError, UserError
from moesaic.core.files import check_step, output_directory, write_text
from moesaic.core.lineage import write_lineage
from moesaic.measure.exactness import FeedForward, fixed_tokens, is_exact, layer_difference
from moesaic.models.checkpoint import Checkpoint, CheckpointWriter, copy_companions
from moesaic.models.writer import Planned

__all__ = ["export"]

Scores = Literal["off", "uniform"]

_FAMILIES = {"llama_moe": "LlamaMoE", "llama_moe_residual": "LlamaMoEResidual"}
# Fields of the mixture that mean nothing to a dense LLaMA.
_MIXTURE_FIELD = re.compile(
    r"^(num_experts|num_selects|size_experts|gate_|calculator_type|multiply_gate_scores|"
    r"score_scale_factor|add_weight_norm|drop_tokens|dropped_padding|capacity_factor|load_rule|"
    r"score_rule|count_padding|output_router_logits|intermediate_size|use_weighting|architectures|"
    r"model_type|auto_map|gates$|transformers_version)"
)


@dataclass(frozen=True)
class _Part:
    """The routed or the shared experts of the layers: where they are stored, how they count."""

    start: str
    """What follows `layers.{i}.mlp.`: nothing, `moe_layer.` or `residual_block.`."""
    widths: list[list[int]]
    """[layer][expert]."""
    weights: list[float]
    """[layer] the factor on every expert's output."""


def export(
    model: Path | str,
    *,
    out: Path | str,
    scores: Scores = "off",
    overwrite: bool = False,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Turn a LLaMA-MoE checkpoint into the dense LLaMA that all its experts make together.

    Args:
        model: directory of a `llama_moe` or `llama_moe_residual` checkpoint.
        out: the directory that appears when everything is written and compared.
        scores: "off" adds the experts up, as the mixture does with every expert on and
            multiply_gate_scores off: the inverse of `convert`, bit for bit. "uniform" weights them
            as the mixture does with every expert on and equal scores, by the layer's
            score_scale_factor / E, folded into down_proj: the dense model of the size that a
            trained mixture's outputs have on average.
        overwrite: replace `out` when it is there.
        max_shard_bytes: size at which a new weight file starts.

    Neurons come back in their dense order when `split.safetensors` of the conversion is beside the
    weights and held every neuron once; otherwise they follow the experts, which is the same
    function. Layers narrower than the widest are filled up with zero neurons, which change nothing.

    Raises:
        UserError: not a LLaMA-MoE, damaged files, NaN, or routing that has no uniform score.
        MoesaicError: no space left, or a result that differs from the mixture.
    """
    model, out = Path(model), check_step(out, overwrite=overwrite, inputs=[model])
    checkpoint = Checkpoint(model)
    config = checkpoint.config
    if config.get("model_type") not in _FAMILIES:
        raise UserError(
            f"{model} is a model of type {config.get('model_type')!r}. "
            f"Give a checkpoint of type {' or '.join(_FAMILIES)}."
        )
    if scores not in ("off", "uniform"):
        raise UserError(f"scores={scores!r} was given. Use one of: off, uniform.")
    if config.get("use_weighting"):
        raise UserError(
            f"{model} has use_weighting=true: weights that depend on the token, which no dense "
            "layer has. Only mixtures with use_weighting=false can be exported."
        )
    mixture = _open(checkpoint, scores)
    if scores == "off" and config.get("multiply_gate_scores", True):
        note(
            "the experts are added up as they are: score_scale_factor "
            f"{config.get('score_scale_factor', 1.0)} counts only where scores multiply; "
            "--scores uniform folds it in"
        )
    plan = mixture.plan()
    with output_directory(out, overwrite=overwrite) as partial:
        worst = (0.0, 0.0)
        with CheckpointWriter(partial, plan, max_shard_bytes=max_shard_bytes) as writer:
            for name in mixture.kept():
                writer.write(mixture.dense_name(name), mixture.read(name))
            for layer in track(range(mixture.layers), "exporting layers"):
                experts, dense = mixture.layer(layer)
                tensors = [tensor for tensor in dense if tensor is not None]
                if mixture.biased:
                    tensors.append(mixture.down_bias(layer))
                for name, tensor in zip(mixture.dense_names(layer), tensors, strict=True):
                    writer.write(name, tensor)
                found = layer_difference(
                    dense, experts, activation=mixture.activation, x_TD=mixture.x_TD
                )
                worst = max(worst, found)
        if not is_exact(*worst):
            raise MoesaicError(
                f"The dense layers differ from the experts by {worst[0]:.3g}. "
                "Nothing was written; please report this."
            )
        write_text(partial / "config.json", json.dumps(mixture.dense_config(), indent=2) + "\n")
        copy_companions(model, partial)
        write_lineage(
            partial,
            step="export",
            parent=str(model),
            config={"scores": scores, "weights": [part.weights for part in mixture.parts]},
            exact=True,
            difference=worst[0],
            difference_of="layers",
            neuron_order="experts" if mixture.orders is None else "dense",
            parameters_total=sum(math.prod(shape) for _, _, shape in plan),
        )
    return out


@dataclass(frozen=True)
class _Mixture:
    """An opened LLaMA-MoE checkpoint and what its dense model will look like."""

    checkpoint: Checkpoint
    prefix: str
    """What precedes `layers.` in the mixture."""
    head: str
    """What follows the family in the class name."""
    parts: list[_Part]
    orders: list[torch.Tensor] | None
    """[layer] where each dense neuron is among the experts; None when that is not known."""

    @property
    def layers(self) -> int:
        return int(self.checkpoint.config["num_hidden_layers"])

    @property
    def hidden(self) -> int:
        return int(self.checkpoint.config["hidden_size"])

    @property
    def biased(self) -> bool:
        return bool(self.checkpoint.config.get("mlp_bias"))

    @property
    def width(self) -> int:
        """F: neurons of the widest layer."""
        return max(sum(sum(p.widths[i]) for p in self.parts) for i in range(self.layers))

    @property
    def activation(self) -> Any:
        from transformers.activations import ACT2FN

        return ACT2FN[self.checkpoint.config.get("hidden_act", "silu")]

    @cached_property
    def x_TD(self) -> torch.Tensor:
        return fixed_tokens(self.hidden)

    def read(self, name: str) -> torch.Tensor:
        return read_finite(self.checkpoint, name)

    def kept(self) -> list[str]:
        """Names of the tensors that are taken over: all but feed-forward layers and routers."""
        tied = bool(self.checkpoint.config.get("tie_word_embeddings"))
        return [
            name
            for name in self.checkpoint.keys()  # noqa: SIM118 - no dict
            if ".mlp." not in name
            and not name.endswith("rotary_emb.inv_freq")
            and not (tied and name == "lm_head.weight")
        ]

    def dense_name(self, name: str) -> str:
        """The dense model's name of a tensor that is taken over."""
        # transformers' LlamaForQuestionAnswering calls its decoder `transformer`.
        if self.head == "ForQuestionAnswering" and name.startswith("model."):
            return "transformer." + name.removeprefix("model.")
        return name

    def dense_names(self, layer: int) -> list[str]:
        """Names of gate_proj, up_proj and down_proj of a dense layer; then of their biases."""
        start = self.dense_name(f"{self.prefix}layers.{layer}.mlp.")
        kinds = ("weight", "bias") if self.biased else ("weight",)
        return [f"{start}{part}_proj.{kind}" for kind in kinds for part in ("gate", "up", "down")]

    def expert_names(self, layer: int) -> list[list[str]]:
        """Names of gate, up and down of every expert of a layer, shared ones last; then biases."""
        kinds = ["weight_gate", "weight_up", "weight_down"]
        kinds += ["bias_gate", "bias_up"] if self.biased else []
        starts = [
            (f"{self.prefix}layers.{layer}.mlp.{part.start}calculator.experts.", expert)
            for part in self.parts
            for expert in range(len(part.widths[layer]))
        ]
        return [[f"{start}{kind}.{expert}" for kind in kinds] for start, expert in starts]

    def down_bias(self, layer: int) -> torch.Tensor:
        """The bias of down_proj: the blocks' biases, which are added whatever the scores."""
        start = f"{self.prefix}layers.{layer}.mlp."
        names = [f"{start}{part.start}calculator.bias_down" for part in self.parts]
        biases = [self.read(name) for name in names]
        return torch.stack([bias.float() for bias in biases]).sum(0).to(biases[0])

    def plan(self) -> list[Planned]:
        """Name, type and shape of every tensor of the dense model."""
        stored = self.checkpoint
        plan: list[Planned] = [
            (self.dense_name(name), stored.dtype(name), stored.shape(name)) for name in self.kept()
        ]
        wide, tall = (self.width, self.hidden), (self.hidden, self.width)
        shapes = (wide, wide, tall, (self.width,), (self.width,), (self.hidden,))
        for layer in range(self.layers):
            dtypes = [stored.dtype(name) for name in self.expert_names(layer)[0]]
            dtypes.append(dtypes[-1])  # down's bias, where there is one, as the other biases
            names = self.dense_names(layer)
            count = len(names)
            plan += zip(names, dtypes[:count], shapes[:count], strict=True)
        return plan

    def layer(self, layer: int) -> tuple[list[FeedForward], FeedForward]:
        """The experts of a layer, their factors in down, and the dense layer they make."""
        factors = [part.weights[layer] for part in self.parts for _ in part.widths[layer]]
        experts: list[FeedForward] = []
        for names, factor in zip(self.expert_names(layer), factors, strict=True):
            expert = FeedForward(*(self.read(name) for name in names))
            if factor != 1:
                down = (expert.down_DF.float() * factor).to(expert.down_DF)
                expert = expert._replace(down_DF=down)
            experts.append(expert)
        dims = (0, 0, 1, 0, 0)[: 5 if self.biased else 3]
        every: list[Any] = experts
        made = [torch.cat([expert[i] for expert in every], dim) for i, dim in enumerate(dims)]
        for place, dim in enumerate(dims):
            if self.orders is not None:
                made[place] = made[place].index_select(dim, self.orders[layer])
            lacking = list(made[place].shape)
            lacking[dim] = self.width - lacking[dim]
            if lacking[dim]:
                made[place] = torch.cat([made[place], made[place].new_zeros(lacking)], dim)
        return experts, FeedForward(*made)

    def dense_config(self) -> dict[str, Any]:
        """The config.json of the dense model."""
        config = self.checkpoint.config
        return {
            "architectures": [f"Llama{self.head}"],
            "model_type": "llama",
            **{key: value for key, value in config.items() if not _MIXTURE_FIELD.match(key)},
            "intermediate_size": self.width,
        }


def _open(checkpoint: Checkpoint, scores: Scores) -> _Mixture:
    named = str((checkpoint.config.get("architectures") or ["LlamaMoEForCausalLM"])[0])
    head = named.removeprefix("LlamaMoE").removeprefix("Residual")
    prefix = "model." if "model.embed_tokens.weight" in checkpoint else ""
    parts = _parts(checkpoint, prefix, scores)
    return _Mixture(checkpoint, prefix, head, parts, _dense_order(checkpoint.path, parts))


def _parts(checkpoint: Checkpoint, prefix: str, scores: Scores) -> list[_Part]:
    config = checkpoint.config
    residual = config["model_type"] == "llama_moe_residual"
    layers = range(int(config["num_hidden_layers"]))
    starts = {"moe_layer.": "", "residual_block.": "_residual"} if residual else {"": ""}
    parts = []
    for start, suffix in starts.items():
        pattern = re.compile(
            rf"{re.escape(prefix)}layers\.(\d+)\.mlp\.{re.escape(start)}"
            r"calculator\.experts\.weight_gate\.(\d+)"
        )
        found: dict[tuple[int, int], int] = {}
        for name in checkpoint.keys():  # noqa: SIM118 - no dict
            if match := pattern.fullmatch(name):
                found[int(match[1]), int(match[2])] = checkpoint.shape(name)[0]
        count = config["num_experts" + suffix]
        lacking = [(i, e) for i in layers for e in range(count) if (i, e) not in found]
        if lacking:
            raise UserError(
                f"{checkpoint.path} lacks expert {lacking[0][1]} of layer {lacking[0][0]}. "
                "Give a complete LLaMA-MoE checkpoint."
            )
        widths = [[found[i, e] for e in range(count)] for i in layers]
        weights = [1.0 for _ in layers]
        if scores == "uniform":
            weights = [_uniform(checkpoint, prefix, start, suffix, i) for i in layers]
        parts.append(_Part(start, widths, weights))
    return parts


def _uniform(checkpoint: Checkpoint, prefix: str, start: str, suffix: str, layer: int) -> float:
    """The factor on each expert when all are on and their scores are equal."""
    config = checkpoint.config
    if not config.get("multiply_gate_scores" + suffix, True):
        return 1.0
    if not config.get("gate_use_softmax" + suffix, True):
        raise UserError(
            f"{checkpoint.path} scores with raw logits (gate_use_softmax{suffix}=false), which "
            "have no uniform value. Use scores=off."
        )
    learned = f"{prefix}layers.{layer}.mlp.{start}calculator.mlp_norm.weight"
    scale = config.get("score_scale_factor" + suffix, 1.0)
    if learned in checkpoint:
        scale = float(checkpoint.read(learned).float().sum())
    elif isinstance(scale, Sequence):
        scale = scale[layer]
    return float(scale) / int(config["num_experts" + suffix])


def _dense_order(model: Path, parts: list[_Part]) -> list[torch.Tensor] | None:
    """Per layer, where each dense neuron is among the experts; None when that is not known."""
    if not (model / SPLIT_FILE).is_file():
        return None
    division = NeuronSplit.load(model / SPLIT_FILE)
    sizes = [division.experts, *([division.shared] if division.num_shared else [])]
    widths = [[[len(ids) for ids in layer] for layer in groups] for groups in sizes]
    if not division.exact or widths != [part.widths for part in parts]:
        return None
    return [
        torch.from_numpy(np.argsort(np.concatenate(routed + shared)))
        for routed, shared in zip(division.experts, division.shared, strict=True)
    ]
