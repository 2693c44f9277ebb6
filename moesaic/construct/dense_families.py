"""The dense families that experts are cut from, and what is missing in the others.

A family is known when its decoder layers keep gate, up and down of a gated feed-forward part under
`mlp`, apart or with gate and up in one tensor. Everything else about it (attention, norms, position
rules, soft-capping) is left to transformers' own class.
Notation: D hidden size, F neurons of a feed-forward layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from moesaic.core.errors import UserError, nearest
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.direct import Arena

Mixture = Literal["llama_moe", "moesaic_moe"]


@dataclass(frozen=True)
class DenseFamily:
    """One family of dense models, by transformers' model_type."""

    model_type: str
    name: str
    fused: bool = False
    """gate_proj and up_proj are stored as one `gate_up_proj` [2F, D], gate rows first."""
    sibling: str | None = None
    """model_type of transformers' mixture with this family's attention, norms and positions."""

    def mixture(self, config: Mapping[str, Any]) -> Mixture:
        """The model_type that `convert` writes: LLaMA-MoE where it computes the same attention."""
        if self.model_type == "llama":
            return "llama_moe"
        if self.model_type == "mistral" and not _has_window(config):
            return "llama_moe"
        return "moesaic_moe"


FAMILIES: Mapping[str, DenseFamily] = {
    family.model_type: family
    for family in (
        DenseFamily("llama", "LLaMA", sibling="mixtral"),
        DenseFamily("mistral", "Mistral", sibling="mixtral"),
        DenseFamily("qwen2", "Qwen2", sibling="qwen2_moe"),
        DenseFamily("qwen3", "Qwen3", sibling="qwen3_moe"),
        DenseFamily("gemma2", "Gemma 2"),
        DenseFamily("gemma3_text", "Gemma 3"),
        DenseFamily("phi3", "Phi-3", fused=True),
        DenseFamily("olmo2", "OLMo2", sibling="flex_olmo"),
        DenseFamily("smollm3", "SmolLM3"),
        DenseFamily("deepseek_v3", "DeepSeek-V3 without experts", sibling="deepseek_v3"),
    )
}
"""The families that moesaic makes experts of."""

# What a feed-forward layer without a gate calls its first matrix.
_UNGATED = re.compile(
    r"\.(fc1|c_fc|dense_h_to_4h|fc_in|wi|lin1|intermediate\.dense)\.(weight|bias)$"
)
_ROUTED = re.compile(r"\.(experts?|local_experts)\.|\.(block_sparse_moe|router)\.")
_STATE_SPACE = re.compile(r"\.(mixer|mamba|ssm|time_mix|linear_attn)\.")
_GATED = re.compile(r"\.mlp\.(gate_proj|gate_up_proj)\.weight$")


def known_family(config: Mapping[str, Any]) -> DenseFamily | None:
    """The family that a config is of, where experts can be made of it."""
    kind = config.get("model_type")
    known = FAMILIES.get(kind) if isinstance(kind, str) else None
    return None if known is None or _routed(config) else known


def family_of(checkpoint: Checkpoint) -> DenseFamily:
    """Return the family of a checkpoint. Raises UserError that says which anatomy is missing."""
    if (known := known_family(checkpoint.config)) is not None:
        return known
    kind = checkpoint.config.get("model_type")
    hint = nearest(str(kind), tuple(FAMILIES)) if kind else ""
    raise UserError(
        f"{checkpoint.path} is a model of type {kind!r}, not a dense LLaMA or of its kind: "
        f"{missing_anatomy(checkpoint)}.{hint} Give a dense model whose model_type is one of: "
        f"{', '.join(sorted(FAMILIES))}."
    )


def missing_anatomy(checkpoint: Checkpoint) -> str:
    """Say why a model outside `FAMILIES` cannot be cut into experts, from its names alone."""
    config, names = checkpoint.config, checkpoint.keys()
    if any(isinstance(config.get(part), Mapping) for part in ("text_config", "llm_config")):
        inner = config.get("text_config") or config.get("llm_config") or {}
        return (
            "it has parts beside the language model (a text_config of type "
            f"{inner.get('model_type')!r}); save its language model alone"
        )
    for missing, pattern in (
        ("it is a mixture of experts already, so there is no dense layer to cut", _ROUTED),
        ("its layers mix tokens by a state instead of attention", _STATE_SPACE),
        (
            "its feed-forward layers have no gate: {} is the first of two matrices, and an "
            "expert needs gate, up and down",
            _UNGATED,
        ),
    ):
        if found := next((name for name in names if pattern.search(name)), None):
            return missing.format(found)
    if config.get("is_encoder_decoder"):
        return "it is an encoder with a decoder, not a decoder alone"
    if any(_GATED.search(name) for name in names):
        return (
            "its feed-forward layers have gate, up and down, but its attention, norms and "
            "positions were never compared with a mixture's"
        )
    return "it has no mlp.gate_proj, mlp.up_proj and mlp.down_proj in its layers"


def read_family_config(checkpoint: Checkpoint, family: DenseFamily) -> dict[str, Any]:
    """Return config.json with the family's defaults filled in; UserError when it is refused."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    given = checkpoint.config
    fields = {key: value for key, value in given.items() if key != "model_type"}
    try:
        config: dict[str, Any] = CONFIG_MAPPING[family.model_type](**fields).to_dict()
    except Exception as error:  # transformers' own validation, of many types
        reason = " ".join(str(error).split())
        raise UserError(
            f"{checkpoint.path / 'config.json'} is not accepted by transformers: {reason}. "
            "Correct that field."
        ) from error
    return config


def family_model(config: Mapping[str, Any]) -> Any:
    """Build transformers' own causal language model of a config on the meta device."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    fields = {key: value for key, value in config.items() if key != "model_type"}
    made = CONFIG_MAPPING[config["model_type"]](**fields)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(made, attn_implementation="eager")


def family_shapes(config: Mapping[str, Any], family: DenseFamily) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, in the order of the network; fused gate and up apart."""
    shapes: dict[str, tuple[int, ...]] = {}
    tied = bool(config.get("tie_word_embeddings"))
    for name, tensor in family_model(config).state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        if family.fused and name.endswith(FUSED):
            rows, hidden = tensor.shape
            for part in PARTS:
                shapes[name.replace(FUSED, part)] = (rows // 2, hidden)
        else:
            shapes[name] = tuple(tensor.shape)
    return shapes


def activation_name(config: Mapping[str, Any]) -> str:
    """The activation after gate_proj; the Gemmas call it hidden_activation."""
    return str(config.get("hidden_activation") or config.get("hidden_act"))


FUSED = "mlp.gate_up_proj.weight"
PARTS = ("mlp.gate_proj.weight", "mlp.up_proj.weight")


class UnfusedCheckpoint(Checkpoint):
    """A checkpoint whose `mlp.gate_up_proj` [2F, D] is seen as `gate_proj` and `up_proj` [F, D].

    Both are views of the mapped file: nothing is copied.
    """

    def __init__(self, path: Path | str) -> None:
        super().__init__(path)
        self._halves: dict[str, tuple[str, int]] = {}
        for key in super().keys():  # noqa: SIM118 - no dict
            if key.endswith(FUSED):
                for half, part in enumerate(PARTS):
                    self._halves[key.replace(FUSED, part)] = (key, half)

    def keys(self) -> list[str]:
        """Return the tensor names, sorted, those of the halves instead of the fused ones."""
        stored = super().keys()
        return sorted([*(k for k in stored if not k.endswith(FUSED)), *self._halves])

    def __contains__(self, key: object) -> bool:
        return key in self._halves or (super().__contains__(key) and not str(key).endswith(FUSED))

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of one tensor without reading it."""
        if key in self._halves:
            rows, *others = super().shape(self._halves[key][0])
            return (rows // 2, *others)
        return super().shape(key)

    def dtype(self, key: str) -> torch.dtype:
        """Return the type of one tensor without reading it."""
        return super().dtype(self._halves.get(key, (key, 0))[0])

    def read(self, key: str) -> torch.Tensor:
        """Return one tensor, backed by the mapped file."""
        whole, half = self._halves.get(key, (key, -1))
        tensor = super().read(whole)
        return tensor if half < 0 else tensor.chunk(2)[half]

    def fetch(self, keys: Sequence[str], arena: Arena) -> dict[str, torch.Tensor]:
        """Read tensors from disk into `arena`, the fused ones once."""
        wholes = list(dict.fromkeys(self._halves.get(key, (key, 0))[0] for key in keys))
        found = super().fetch(wholes, arena)
        return {
            key: found[self._halves[key][0]].chunk(2)[self._halves[key][1]]
            if key in self._halves
            else found[key]
            for key in keys
        }

    def release(self, keys: Any) -> None:
        """Let go of the pages that `read` mapped."""
        super().release([self._halves.get(key, (key, 0))[0] for key in keys])


def _routed(config: Mapping[str, Any]) -> bool:
    """Whether a DeepSeek-V3 has routed layers, as nearly all have."""
    dense = config.get("first_k_dense_replace", 3)
    return config.get("model_type") == "deepseek_v3" and dense < config["num_hidden_layers"]


def _has_window(config: Mapping[str, Any]) -> bool:
    window = config.get("sliding_window")
    return window is not None and window < config["max_position_embeddings"]
