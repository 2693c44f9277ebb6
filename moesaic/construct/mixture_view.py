"""What one of our mixtures computes, whichever of our classes stores it.

`MixtureView` names the attention's family, the router's rule, and where experts, shared experts and
routers are; the stock layouts (`layouts`) are judged and filled from it.
Notation: E routed experts, K chosen, L layers, D hidden size, I width of an expert.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moesaic.core.errors import UserError
from moesaic.models.checkpoint import Checkpoint

Rule = Literal["softmax", "renormalised", "sigmoid", "one"]

SOURCES = ("llama_moe", "llama_moe_residual", "llama_moe_v2", "moesaic_moe")
"""The model_types of our mixtures."""


@dataclass(frozen=True)
class MixtureView:
    """A mixture of ours, read off its config.json alone."""

    model_type: str
    text: dict[str, Any]
    """The dense model's config with its model_type and its family's defaults."""
    experts: int
    top_k: int
    """K; where layers differ, which is an obstacle, the largest."""
    width: int
    """I."""
    shared_width: int
    """Width of the always-on part; 0: none."""
    rule: Rule
    """What weighs the chosen experts, before `factors`."""
    factors: tuple[float, ...]
    """[layer] factor on the routed experts' sum."""
    shared_factor: float = 1.0
    """Factor on the always-on part."""
    router_bias: bool = False
    tempered: bool = False
    """Of the rule "one": when trained, a softmax of the logits times an exponent."""
    obstacles: tuple[str, ...] = field(default=())
    """What no stock layout has."""

    @property
    def layers(self) -> int:
        """L."""
        return int(self.text["num_hidden_layers"])

    def names(self, layer: int, expert: int) -> tuple[str, str, str]:
        """Names of gate, up and down of a routed expert, after `layers.{i}.`."""
        del layer
        if self.model_type == "moesaic_moe":
            return _triple(f"mlp.experts.{expert}.{{}}_proj.weight")
        if self.model_type == "llama_moe_v2":
            start = f"block_sparse_moe.experts.{expert}."
            return f"{start}w1.weight", f"{start}w3.weight", f"{start}w2.weight"
        inner = "moe_layer." if self.model_type == "llama_moe_residual" else ""
        return _triple(f"mlp.{inner}calculator.experts.weight_{{}}.{expert}")

    def shared_names(self) -> tuple[str, str, str] | None:
        """Names of gate, up and down of the always-on part, after `layers.{i}.`."""
        if not self.shared_width:
            return None
        if self.model_type == "moesaic_moe":
            return _triple("mlp.shared_experts.{}_proj.weight")
        if self.model_type == "llama_moe_v2":
            return "mlp_residual.w1.weight", "mlp_residual.w3.weight", "mlp_residual.w2.weight"
        return _triple("mlp.residual_block.calculator.experts.weight_{}.0")

    def router_name(self) -> str:
        """Name of the router's weight, after `layers.{i}.`."""
        if self.model_type == "moesaic_moe":
            return "mlp.gate.weight"
        if self.model_type == "llama_moe_v2":
            return "block_sparse_moe.gate.weight"
        inner = "moe_layer." if self.model_type == "llama_moe_residual" else ""
        return f"mlp.{inner}gate.gate_network.weight"

    def correction_name(self) -> str:
        """Name of the learned part of weights near 1, which a file may hold."""
        if self.model_type == "moesaic_moe":
            return "mlp.gate.scale"
        return self.router_name().replace("gate_network.weight", "correction")

    def inside(self, name: str) -> bool:
        """Whether a tensor belongs to a feed-forward part, which a layout writes anew."""
        return bool(re.search(r"layers\.\d+\.(mlp|block_sparse_moe|mlp_residual)\.", name))


def view_of(config: Mapping[str, Any], *, name: str = "config.json") -> MixtureView:
    """Read a mixture's config.json. Raises UserError unless it is one of ours."""
    kind = config.get("model_type")
    if kind not in SOURCES:
        raise UserError(
            f"{name} is a model of type {kind!r}. Layouts are written from a mixture of ours: "
            f"{', '.join(SOURCES)}."
        )
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    import moesaic.models  # noqa: F401 - registers the families

    fields = {key: value for key, value in config.items() if key != "model_type"}
    own: Any = CONFIG_MAPPING[kind](**fields)
    head = str((config.get("architectures") or ["ForCausalLM"])[0])
    obstacles = [] if head.endswith("ForCausalLM") else [f"it is a {head}, not a language model"]
    if kind == "moesaic_moe":
        return _moesaic(own, obstacles)
    text = {**own.to_dict(), "model_type": "llama"}
    if config.get("attention_bias"):
        obstacles.append("its attention has four biases (attention_bias)")
    if kind == "llama_moe_v2":
        return _v2(own, text, obstacles)
    return _llama_moe(own, text, obstacles)


def _moesaic(own: Any, obstacles: list[str]) -> MixtureView:
    from moesaic.models.families.moesaic_moe import LEARNED

    text = own.text_config.to_dict()
    top_k = _top_k(own.num_experts_per_tok, obstacles)
    if text.get("attention_bias"):
        obstacles.append("its attention has four biases (attention_bias)")
    return MixtureView(
        model_type="moesaic_moe",
        text=text,
        experts=own.num_experts,
        top_k=top_k,
        width=own.moe_intermediate_size,
        shared_width=own.shared_expert_intermediate_size,
        rule="one" if own.weighting in LEARNED else own.weighting,
        factors=tuple(own.scaling_of(i) for i in range(text["num_hidden_layers"])),
        router_bias=own.router_bias,
        tempered=own.weighting == "tempered",
        obstacles=tuple(obstacles),
    )


def _v2(own: Any, text: dict[str, Any], obstacles: list[str]) -> MixtureView:
    for found, what in (
        (own.use_attn_moe, "its attention is routed (use_attn_moe)"),
        (own.add_rescale_bias, "its experts have output biases (add_rescale_bias)"),
        (own.num_moe_contract_layers, "its first and last layers are dense (contract layers)"),
    ):
        if found:
            obstacles.append(what)
    if own.sliding_window is not None:
        text["model_type"] = "mistral"
    factor = 1.0 if own.scale_factor is None else float(own.scale_factor)
    return MixtureView(
        model_type="llama_moe_v2",
        text=text,
        experts=own.num_local_experts,
        top_k=own.num_experts_per_tok,
        width=own.intermediate_size,
        shared_width=own.intermediate_size_residual or 0,
        rule="renormalised",
        factors=(factor,) * own.num_hidden_layers,
        obstacles=tuple(obstacles),
    )


def _llama_moe(own: Any, text: dict[str, Any], obstacles: list[str]) -> MixtureView:
    residual = own.model_type == "llama_moe_residual"
    sizes = own.size_experts
    widths = {size for layer in sizes for size in layer} if sizes else set()
    if len(widths) > 1:
        obstacles.append(f"its experts are {min(widths)} to {max(widths)} neurons wide")
    near_one = getattr(own, "gate_weighting", "scores") != "scores" or not own.multiply_gate_scores
    for found, what in (
        (own.gate_network != "linear", f"its router is a {own.gate_network}, not one matrix"),
        (own.gate_type != "TopKBalancedNoisyGate", f"its gate is a {own.gate_type}"),
        (own.calculator_type != "UniversalCalculator", f"it drops tokens ({own.calculator_type})"),
        (not own.gate_use_softmax and not near_one, "its scores are raw logits"),
        (own.add_weight_norm, "its score scales are learned (add_weight_norm)"),
        (own.mlp_bias, "its experts have biases (mlp_bias)"),
    ):
        if found:
            obstacles.append(what)
    if residual and own.num_experts_residual > 1:
        obstacles.append(
            f"the weights of its {own.num_experts_residual} shared experts depend on the token"
        )
    if residual and own.use_weighting:
        obstacles.append("its shared part is weighted by the token (use_weighting)")
    scale = own.score_scale_factor if own.multiply_gate_scores else 1.0
    factors = scale if isinstance(scale, list | tuple) else [scale] * own.num_hidden_layers
    shared = own.intermediate_size_residual if residual else 0
    scaled = residual and own.multiply_gate_scores_residual
    total = own.intermediate_size_moe if residual else own.intermediate_size
    return MixtureView(
        model_type=own.model_type,
        text=text,
        experts=own.num_experts,
        top_k=_top_k(own.num_selects, obstacles),
        width=max(widths) if widths else total // own.num_experts,
        shared_width=shared,
        rule="one" if near_one else "renormalised",
        factors=tuple(float(factor) for factor in factors),
        shared_factor=float(own.score_scale_factor_residual) if scaled else 1.0,
        router_bias=bool(getattr(own, "gate_bias", False)),
        tempered=getattr(own, "gate_weighting", "scores") == "tempered",
        obstacles=tuple(obstacles),
    )


def shape_check(checkpoint: Checkpoint, view: MixtureView, prefix: str) -> None:
    """Raise UserError when a tensor that the config asks for is not there."""
    for layer in range(view.layers):
        start = f"{prefix}layers.{layer}."
        wanted = [name for e in range(view.experts) for name in view.names(layer, e)]
        for name in [*wanted, *(view.shared_names() or ()), view.router_name()]:
            if f"{start}{name}" not in checkpoint:
                raise UserError(
                    f"{checkpoint.path} lacks the tensor {start}{name} that its config.json asks "
                    "for. Give a complete checkpoint."
                )


def _top_k(selects: int | list[int], obstacles: list[str]) -> int:
    """The one K of all layers; where they differ an obstacle is added."""
    numbers = [selects] if isinstance(selects, int) else selects
    if len(set(numbers)) > 1:
        obstacles.append(f"its layers use {min(numbers)} to {max(numbers)} experts a token")
    return max(numbers)


def _triple(pattern: str) -> tuple[str, str, str]:
    return pattern.format("gate"), pattern.format("up"), pattern.format("down")
