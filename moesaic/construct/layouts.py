"""Stock transformers layouts that a mixture of ours can be written in, and why it cannot.

What a layout has is a choice of router rules and the attention of some dense families; `supports`
compares both with a mixture's config. A factor that a layout has no place for is multiplied into
the experts' down projections. Weights of exactly 1, which no stock router gives, are approached by
flattening: a router scaled by `FLATTEN` chooses the same experts with nearly equal weights. Those
that training has tempered are exactly a scaled router's.
Notation: E routed experts, K chosen, s a mixture's factor on the chosen experts' sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, overload

from moesaic.construct.mixture_view import MixtureView, Rule, view_of
from moesaic.core.errors import unknown

__all__ = ["FLATTEN", "LAYOUTS", "Layout", "supports"]

FLATTEN = 2.0**-10
"""Scale of a router whose weights are to be equal: a power of two, so that no bit is lost."""

Attention = Literal["llama", "biased qkv", "norm each head", "norm all heads, after", "latent"]

_ATTENTION: Mapping[str, Attention] = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "biased qkv",
    "qwen3": "norm each head",
    "olmo2": "norm all heads, after",
    "deepseek_v3": "latent",
}
_WHAT: Mapping[str, str] = {
    "gemma2": "Gemma 2 caps scores and logits and has four norms a layer",
    "gemma3_text": "Gemma 3 has four norms a layer and two kinds of positions",
    "phi3": "Phi-3 stores queries, keys and values as one and has long-short positions",
    "smollm3": "SmolLM3 leaves positions out in some layers",
    "qwen2": "Qwen2 adds biases to queries, keys and values",
    "qwen3": "Qwen3 normalises queries and keys of each head",
    "olmo2": "OLMo2 normalises after attention and feed-forward part, not before",
    "deepseek_v3": "DeepSeek-V3 has latent attention",
    "llama": "LLaMA neither normalises nor compresses queries and keys",
    "mistral": "Mistral neither normalises nor compresses queries and keys",
}


@dataclass(frozen=True)
class Layout:
    """One of transformers' mixtures: what it computes and how its files name the parts."""

    model_type: str
    architecture: str
    attention: tuple[Attention, ...]
    """The attention of these dense families is computed exactly."""
    rules: tuple[Rule, ...]
    """Router rules that it has; "one" is approached by flattening the first of them."""
    llama_cpp: Rule | None
    """The one rule that llama.cpp computes for it, whatever norm_topk_prob says; None: it has no
    such architecture. (Its src/models/*.cpp, as vendored by llama-cpp-python 0.3.36.)"""
    llama_cpp_ties: bool = True
    """Whether llama.cpp loads it without a head, taking the embeddings instead."""
    shared: Literal["none", "any", "sigmoid", "whole"] = "none"
    """Always-on part: none; of any width; any, behind a sigmoid; a multiple of the width."""
    window: Literal["no", "all", "layers"] = "no"
    """A sliding window: none, the same in all layers, or by layer_types."""
    free_head: bool = True
    """Heads may be of another size than hidden_size / heads."""
    expert: str = "mlp.experts.{}.{}_proj.weight"
    parts: tuple[str, str, str] = ("gate", "up", "down")
    router: str = "mlp.gate.weight"
    global_factor: bool = False
    """The config has a factor on the chosen experts' sum."""

    def not_in_llama_cpp(self, rule: Rule, *, tied: bool) -> str | None:
        """Say why llama.cpp computes something else, or nothing; None where it does the same."""
        if self.llama_cpp is None:
            return f"has no {self.model_type}"
        if rule != self.llama_cpp:
            return (
                f"always weighs {self.model_type} by {self.llama_cpp}, this router weighs by {rule}"
            )
        if tied and not self.llama_cpp_ties:
            return f"wants a head in a {self.model_type}, this one is tied to the embeddings"
        return None

    def names(self, expert: int) -> tuple[str, str, str]:
        """Names of gate, up and down of an expert, after `layers.{i}.`."""
        gate, up, down = (self.expert.format(expert, part) for part in self.parts)
        return gate, up, down

    def shared_names(self) -> tuple[str, str, str]:
        """Names of gate, up and down of the always-on part, after `layers.{i}.`."""
        block = "shared_expert" if self.shared == "sigmoid" else "shared_experts"
        gate, up, down = (f"mlp.{block}.{part}_proj.weight" for part in ("gate", "up", "down"))
        return gate, up, down


LAYOUTS: Mapping[str, Layout] = {
    layout.model_type: layout
    for layout in (
        Layout(
            "mixtral",
            "MixtralForCausalLM",
            attention=("llama",),
            rules=("renormalised",),
            llama_cpp="renormalised",
            window="all",
            expert="block_sparse_moe.experts.{}.{}.weight",
            parts=("w1", "w3", "w2"),
            router="block_sparse_moe.gate.weight",
        ),
        Layout(
            "qwen2_moe",
            "Qwen2MoeForCausalLM",
            attention=("llama", "biased qkv"),
            rules=("softmax", "renormalised"),
            llama_cpp="softmax",
            llama_cpp_ties=False,
            shared="sigmoid",
            free_head=False,
        ),
        Layout(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            attention=("norm each head",),
            rules=("renormalised", "softmax"),
            llama_cpp="renormalised",
        ),
        Layout(
            "flex_olmo",
            "FlexOlmoForCausalLM",
            attention=("norm all heads, after",),
            rules=("renormalised", "softmax"),
            llama_cpp=None,
            free_head=False,
        ),
        Layout(
            "olmoe",
            "OlmoeForCausalLM",
            attention=(),
            rules=("softmax", "renormalised"),
            llama_cpp="softmax",
            llama_cpp_ties=False,
            free_head=False,
        ),
        Layout(
            "deepseek_v3",
            "DeepseekV3ForCausalLM",
            attention=("latent",),
            rules=("sigmoid",),
            llama_cpp="sigmoid",
            shared="whole",
            global_factor=True,
        ),
    )
}
"""The stock layouts, by transformers' model_type."""


@overload
def supports(
    config: Mapping[str, Any], layout: str, *, explain: Literal[False] = False
) -> bool: ...
@overload
def supports(config: Mapping[str, Any], layout: str, *, explain: Literal[True]) -> list[str]: ...
def supports(config: Mapping[str, Any], layout: str, *, explain: bool = False) -> bool | list[str]:
    """Whether a stock layout can carry a mixture, told from its config.json.

    With `explain`, every reason why it cannot; an empty list when it can. Raises UserError for an
    unknown layout and for a model that is no mixture of ours.
    """
    reasons = obstacles(view_of(config), find_layout(layout))
    return reasons if explain else not reasons


def find_layout(name: str) -> Layout:
    """Return a layout by its name. Raises UserError that lists them."""
    if name not in LAYOUTS:
        raise unknown("layout", name, tuple(LAYOUTS))
    return LAYOUTS[name]


def obstacles(view: MixtureView, layout: Layout) -> list[str]:
    """Return what of a mixture a layout has no place for."""
    kind = view.text["model_type"]
    found = list(view.obstacles)
    if _ATTENTION.get(kind) not in layout.attention:
        told = _WHAT.get(kind, f"the attention of {kind} is not {layout.model_type}'s")
        if layout.model_type == "olmoe":
            told += "; OLMoE normalises queries and keys of all heads together, before its norms"
        found.append(told)
    if view.rule != "one" and view.rule not in layout.rules:
        known = " or ".join(layout.rules)
        found.append(f"its router weighs by {view.rule}, {layout.architecture} by {known}")
    if view.router_bias:
        found.append(
            "its routers have biases (construct with router: {method: energy, intercept: false})"
        )
    if view.shared_width and layout.shared == "none":
        found.append("it has always-on experts")
    if layout.shared == "whole" and view.shared_width % view.width:
        found.append(
            f"its always-on part is {view.shared_width} wide, no multiple of an expert's "
            f"{view.width}"
        )
    found += _window(view.text, layout)
    heads = view.text["num_attention_heads"]
    size = view.text.get("head_dim") or view.text["hidden_size"] // heads
    if not layout.free_head and size * heads != view.text["hidden_size"]:
        found.append(f"its {heads} heads of {size} are not hidden_size wide")
    return found


def _window(text: Mapping[str, Any], layout: Layout) -> list[str]:
    kinds = set(text.get("layer_types") or ())
    window = text.get("sliding_window")
    if text["model_type"] in ("qwen2", "qwen3"):
        window = window if text.get("use_sliding_window") else None
    if window is None or layout.window != "no" or kinds == {"full_attention"}:
        return []
    if window >= text["max_position_embeddings"]:
        return []
    return [f"its attention slides over {window} tokens"]
