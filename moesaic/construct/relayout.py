"""A mixture of ours under the names, shapes and fields of a stock transformers layout.

Nothing is run or written here: what the tensors of a layer become, and what the config says.
Notation: T tokens, E routed experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch

from moesaic.construct.dense import read_finite
from moesaic.construct.layouts import FLATTEN, Layout, obstacles
from moesaic.construct.mixture_view import MixtureView, Rule, shape_check
from moesaic.core.errors import UserError
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.writer import Planned

__all__ = ["Dtype", "Relayout"]

Dtype = Literal["keep", "float32"]

# Fields that every config has and that say nothing of the network.
_RUNTIME = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "chunk_size_feed_forward",
    "dtype",
    "head_dim",
    "layer_types",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "sliding_window",
    "transformers_version",
    "use_sliding_window",
)


@dataclass(frozen=True)
class Relayout:
    """One mixture on its way into one layout."""

    checkpoint: Checkpoint
    view: MixtureView
    layout: Layout
    dtype: Dtype

    @cached_property
    def learned(self) -> list[torch.Tensor]:
        """[layer] what weights that started at 1 have learned; empty: nothing."""
        if self.view.rule != "one":
            return []
        end = self.view.correction_name()
        names = [f"model.layers.{layer}.{end}" for layer in range(self.view.layers)]
        found = [self.read(name).float() for name in names if name in self.checkpoint]
        return found if any(bool(tensor.any()) for tensor in found) else []

    @cached_property
    def exponents(self) -> list[float]:
        """[layer] the trained exponent of tempered weights (`gates.tempered`); or empty.

        A router scaled by it gives, where the layout renormalises, the weights over K.
        """
        return [10 * float(tensor[0]) for tensor in self.learned] if self.view.tempered else []

    @property
    def flattened(self) -> bool:
        """Whether weights of 1 are approached by a flat router."""
        return self.view.rule == "one" and not self.learned

    @property
    def rule(self) -> Rule:
        """The rule that the exported routers follow."""
        if self.exponents:
            return "renormalised"
        return self.layout.rules[0] if self.flattened else self.view.rule

    @property
    def zero_shared(self) -> bool:
        """Whether the layout wants an always-on part that the mixture has not."""
        return self.layout.shared in ("sigmoid", "whole") and not self.view.shared_width

    @property
    def shared_width(self) -> int:
        """Width of the exported always-on part."""
        return self.view.width if self.zero_shared else self.view.shared_width

    def factor(self, layer: int) -> float:
        """What the exported chosen experts' weights must be multiplied with."""
        ones = {"renormalised": self.view.top_k, "softmax": self.view.experts, "sigmoid": 2}
        return self.view.factors[layer] * (ones[self.rule] if self.view.rule == "one" else 1)

    def steepness(self, layer: int) -> float:
        """The factor that goes into the router.

        An exponent below zero, by which the preferred expert weighs least, is near it: equal
        weights are nearest.
        """
        if self.exponents:
            return max(self.exponents[layer], FLATTEN)
        return FLATTEN if self.flattened else 1.0

    @property
    def global_factor(self) -> float | None:
        """The factor of all layers, where the config has room for one."""
        factors = {self.factor(layer) for layer in range(self.view.layers)}
        return factors.pop() if self.layout.global_factor and len(factors) == 1 else None

    def fold(self, layer: int) -> float:
        """The factor that goes into the down projections of the routed experts."""
        return 1.0 if self.global_factor is not None else self.factor(layer)

    def check(self) -> None:
        """Raise UserError unless the layout can carry the mixture."""
        reasons = obstacles(self.view, self.layout)
        if self.learned and (why := self._no_place()) is not None:
            reasons.append(f"its weights of chosen experts were trained away from 1{why}")
        if reasons:
            raise UserError(
                f"{self.checkpoint.path} cannot be written as {self.layout.model_type}: "
                f"{'; '.join(reasons)}. Choose another layout, or keep our own class."
            )
        shape_check(self.checkpoint, self.view, "model.")

    def _no_place(self) -> str | None:
        """Why the layout has no place for what the weights have learned; None: it has."""
        if not self.exponents:
            return ""
        if "renormalised" not in self.layout.rules:
            return f", and {self.layout.architecture} does not renormalise"
        if self.view.top_k == 1:
            return ", and one chosen expert always weighs 1 there"
        return None

    def read(self, name: str) -> torch.Tensor:
        """One tensor. Raises UserError for NaN."""
        return read_finite(self.checkpoint, name)

    def cast(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor in the type that is written."""
        return tensor.float() if self.dtype == "float32" else tensor

    def kept(self) -> list[str]:
        """Names of the tensors that stay: all but the feed-forward parts."""
        tied = bool(self.view.text.get("tie_word_embeddings"))
        return [
            name
            for name in self.checkpoint.keys()  # noqa: SIM118 - no dict
            if not self.view.inside(name)
            and not name.endswith("rotary_emb.inv_freq")
            and not (tied and name == "lm_head.weight")
        ]

    def plan(self) -> list[Planned]:
        """Name, type and shape of every tensor."""

        def written(tensor: torch.dtype) -> torch.dtype:
            return torch.float32 if self.dtype == "float32" else tensor

        stored = self.checkpoint
        plan: list[Planned] = [
            (name, written(stored.dtype(name)), stored.shape(name)) for name in self.kept()
        ]
        for layer in range(self.view.layers):
            plan += [
                (name, tensor.dtype, tuple(tensor.shape))
                for name, tensor in self.layer(layer, empty=True)
            ]
        return plan

    def layer(self, layer: int, *, empty: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors of a layer's feed-forward part; `empty`: shapes without content."""
        start, view, layout = f"model.layers.{layer}.", self.view, self.layout

        def get(name: str, factor: float = 1.0) -> torch.Tensor:
            name = f"{start}{name}"
            if empty:
                shape, kind = self.checkpoint.shape(name), self.checkpoint.dtype(name)
                return self.cast(torch.empty(shape, dtype=kind, device="meta"))
            tensor = self.read(name)
            if factor == 1:
                return self.cast(tensor)
            made = tensor.float() * factor
            return made if self.dtype == "float32" else made.to(tensor.dtype)

        for expert in range(view.experts):
            gate, up, down = view.names(layer, expert)
            to_gate, to_up, to_down = (f"{start}{name}" for name in layout.names(expert))
            yield to_gate, get(gate)
            yield to_up, get(up)
            yield to_down, get(down, self.fold(layer))
        router = get(view.router_name(), self.steepness(layer))
        yield f"{start}{layout.router}", router
        if self.shared_width:
            behind = 2.0 if layout.shared == "sigmoid" else 1.0  # sigmoid(0) is one half
            factors = (1.0, 1.0, behind * view.shared_factor)
            sources = view.shared_names() or view.names(layer, 0)
            for name, source, factor in zip(layout.shared_names(), sources, factors, strict=True):
                tensor = get(source, factor)
                yield f"{start}{name}", torch.zeros_like(tensor) if self.zero_shared else tensor
        hidden, place = router.shape[1], router.device
        if layout.shared == "sigmoid":
            # llama.cpp computes the sigmoid of z as silu(z) / z, which is NaN for zero.
            least = 2.0**-24 if router.dtype == torch.float16 else 2.0**-40
            nearly = torch.full((1, hidden), least, dtype=router.dtype, device=place)
            yield f"{start}mlp.shared_expert_gate.weight", nearly
        if layout.model_type == "deepseek_v3":
            zeros = torch.zeros(view.experts, device=place)
            yield f"{start}mlp.gate.e_score_correction_bias", zeros
        if layout.model_type == "qwen2_moe":
            for part in ("q", "k", "v"):
                name = f"{start}self_attn.{part}_proj.bias"
                if name not in self.checkpoint:
                    rows = self.checkpoint.shape(name.replace("bias", "weight"))[0]
                    yield name, torch.zeros(rows, dtype=router.dtype, device=place)

    def config(self) -> dict[str, Any]:
        """The config.json of the stock model."""
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        view, layout, text = self.view, self.layout, self.view.text
        stock = CONFIG_MAPPING[layout.model_type]
        allowed = set(stock().to_dict()) - set(_RUNTIME)
        fields = {key: value for key, value in text.items() if key in allowed}
        if layout.free_head and text.get("head_dim") and layout.model_type != "deepseek_v3":
            fields["head_dim"] = text["head_dim"]
        if layout.window == "all":
            fields["sliding_window"] = text.get("sliding_window")
        written = "float32" if self.dtype == "float32" else None
        embedding = self.checkpoint.dtype("model.embed_tokens.weight")
        fields |= {
            "architectures": [layout.architecture],
            "model_type": layout.model_type,
            "dtype": written or str(embedding).removeprefix("torch."),
            "num_experts_per_tok": view.top_k,
            "output_router_logits": False,
            **_legacy_rope(text.get("rope_parameters") or {}),
        }
        normed = {"norm_topk_prob": self.rule == "renormalised"}
        if layout.model_type == "mixtral":
            return fields | {"num_local_experts": view.experts, "intermediate_size": view.width}
        if layout.model_type in ("olmoe", "flex_olmo"):
            return fields | normed | {"num_experts": view.experts, "intermediate_size": view.width}
        fields["moe_intermediate_size"] = view.width
        if layout.model_type == "deepseek_v3":
            return fields | {
                "norm_topk_prob": False,
                "n_routed_experts": view.experts,
                "n_shared_experts": self.shared_width // view.width,
                "routed_scaling_factor": self.global_factor or 1.0,
                "first_k_dense_replace": 0,
                "n_group": 1,
                "topk_group": 1,
                # transformers computes nothing else and drops the names; vLLM and llama.cpp ask
                "scoring_func": "sigmoid",
                "topk_method": "noaux_tc",
            }
        fields |= {**normed, "num_experts": view.experts, "use_sliding_window": False}
        fields |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
        if layout.model_type == "qwen2_moe":
            fields |= {"shared_expert_intermediate_size": self.shared_width, "qkv_bias": True}
        return fields


def _legacy_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """The fields in which loaders before transformers 5 look for positions."""
    if "rope_theta" not in rope:
        return {}
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    found: dict[str, Any] = {"rope_theta": rope["rope_theta"]}
    if scaling.get("rope_type", "default") != "default":
        found["rope_scaling"] = scaling
    return found
