"""The dense model that experts are made of, checked before use.

Tensor names and shapes of LLaMA and Mistral are written out here; those of the other families
(`dense_families`) are read off transformers' own class.

Notation: L layers, D hidden size, F neurons of a feed-forward layer. Neuron j is row j of gate_proj
and up_proj [F, D] and column j of down_proj [D, F].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from moesaic.construct.dense_families import (
    FAMILIES,
    DenseFamily,
    Mixture,
    UnfusedCheckpoint,
    activation_name,
    family_of,
    family_shapes,
    read_family_config,
)
from moesaic.core.errors import UserError, nearest
from moesaic.models.checkpoint import Checkpoint

HEADS: Mapping[str, tuple[str, ...]] = {
    "Model": (),
    "ForCausalLM": ("lm_head.weight",),
    "ForSequenceClassification": ("score.weight",),
    "ForQuestionAnswering": ("qa_outputs.weight", "qa_outputs.bias"),
}
"""The tensors outside the decoder, by the part of the class name that follows the family's."""


@dataclass(frozen=True)
class DenseModel:
    """A dense model whose tensors were found to be all there and of the right shape.

    Wherever a family keeps gate and up (apart or fused), `ffn` names the three matrices and
    `checkpoint` hands them out.
    """

    checkpoint: Checkpoint
    config: dict[str, Any]
    """config.json with the family's defaults filled in."""
    head: str
    """What follows the family in the class name: a key of `HEADS`."""
    prefix: str
    """What precedes `layers.` in the tensor names: `model.`, `transformer.` or nothing."""

    @property
    def family(self) -> DenseFamily:
        """Where this model keeps its parts, and which mixtures compute its attention."""
        return FAMILIES[self.config["model_type"]]

    @property
    def mixture(self) -> Mixture:
        """The model_type of the mixture that `convert` makes of it."""
        return self.family.mixture(self.config)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor, in the order of the network."""
        return expected_shapes(self.config, head=self.head, prefix=self.prefix)

    @property
    def layers(self) -> int:
        """L."""
        return int(self.config["num_hidden_layers"])

    @property
    def width(self) -> int:
        """F."""
        return int(self.config["intermediate_size"])

    @property
    def hidden(self) -> int:
        """D."""
        return int(self.config["hidden_size"])

    @property
    def activation(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The activation between gate_proj and the product with up_proj."""
        from transformers.activations import ACT2FN

        return ACT2FN[activation_name(self.config)]

    def need_llama(self, what: str) -> None:
        """Raise UserError unless LLaMA-MoE's classes compute this model's attention."""
        if self.mixture != "llama_moe":
            window = self.config.get("sliding_window")
            slides = self.family.model_type == "mistral" and f" with a window of {window} tokens"
            raise UserError(
                f"{self.checkpoint.path} is a {self.family.name}{slides or ''}; {what} is made of "
                "a LLaMA, or a Mistral without a sliding window. Use `moesaic convert`, which "
                "keeps every family's own layers."
            )

    def ffn(self, layer: int) -> tuple[str, str, str]:
        """Names of gate_proj, up_proj and down_proj of a layer."""
        start = f"{self.prefix}layers.{layer}.mlp."
        return f"{start}gate_proj.weight", f"{start}up_proj.weight", f"{start}down_proj.weight"

    def biases(self, layer: int) -> tuple[str, str, str] | None:
        """Names of the biases of gate_proj, up_proj and down_proj, where the model has them."""
        if not self.config.get("mlp_bias"):
            return None
        gate, up, down = (f"{name.removesuffix('weight')}bias" for name in self.ffn(layer))
        return gate, up, down

    def others(self, layer: int) -> list[str]:
        """Names of the other tensors of a layer: attention and norms."""
        start = f"{self.prefix}layers.{layer}."
        names = [name for name in self.shapes if name.startswith(start)]
        inside = {*self.ffn(layer), *(self.biases(layer) or ())}
        return [name for name in names if name not in inside]

    def outer(self) -> tuple[list[str], list[str]]:
        """Names of the tensors before and after the layers: embeddings; norm and head."""
        after = [f"{self.prefix}norm.weight", *_head_names(self.head, self.config)]
        return [f"{self.prefix}embed_tokens.weight"], after

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor. Raises UserError when it holds NaN or infinite values."""
        return read_finite(self.checkpoint, name)


def open_dense(path: Path | str) -> DenseModel:
    """Open a dense model's directory and check config, tensor names, shapes and types.

    Raises:
        UserError: a missing or truncated file, a family that is not in `dense_families.FAMILIES`
            (the message says which anatomy is missing), quantised weights, tensors that are
            missing, unknown or of another shape than the config says.
    """
    checkpoint = Checkpoint(path)
    if family_of(checkpoint).fused:
        checkpoint = UnfusedCheckpoint(path)
    config = resolve_config(checkpoint)
    head = _head(checkpoint)
    prefix = _prefix(checkpoint)
    dense = DenseModel(checkpoint, config, head, prefix)
    shapes = dense.shapes
    for name in shapes:
        if name not in checkpoint:
            raise UserError(
                f"{checkpoint.path} lacks the tensor {name} that its config.json asks for. "
                "Is it a complete dense model?"
            )
        if checkpoint.shape(name) != shapes[name]:
            raise UserError(
                f"{checkpoint.path}: {name} is {list(checkpoint.shape(name))}, but config.json "
                f"makes it {list(shapes[name])}. Weights and config.json do not belong together."
            )
        if not checkpoint.dtype(name).is_floating_point or checkpoint.dtype(name).itemsize < 2:
            raise UserError(
                f"{checkpoint.path}: {name} is {checkpoint.dtype(name)}, a quantised type. "
                "Give the bf16, fp16 or fp32 checkpoint."
            )
    unknown = [
        name
        for name in checkpoint.keys()  # noqa: SIM118 - no dict
        if name not in shapes and not _ignorable(name, config)
    ]
    if unknown:
        raise UserError(
            f"{checkpoint.path} holds {unknown[0]}, which a dense {config['model_type']} does not "
            f"have{_more(unknown)}. Give a plain checkpoint (merge adapters first)."
        )
    first = [checkpoint.dtype(name) for name in dense.ffn(0)]
    for layer in range(dense.layers):
        if [checkpoint.dtype(name) for name in dense.ffn(layer)] != first:
            raise UserError(
                f"{checkpoint.path}: the feed-forward weights of layer {layer} are of another type "
                "than those of layer 0. Save the checkpoint in one type."
            )
    return dense


def resolve_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return config.json with the family's defaults filled in; UserError unless convertible."""
    family = family_of(checkpoint)
    if checkpoint.config.get("quantization_config"):
        raise UserError(f"{checkpoint.path} is quantised. Give the bf16, fp16 or fp32 checkpoint.")
    config = read_family_config(checkpoint, family)
    _check_known(checkpoint, config)
    if family.mixture(config) != "llama_moe" and config.get("mlp_bias"):
        raise UserError(
            f"{checkpoint.path} has mlp_bias=true: biases in the feed-forward layers are kept in "
            "LLaMA models only. Give a checkpoint without them."
        )
    return config


def _check_known(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    """Raise UserError for an activation or rope type that transformers does not have."""
    from transformers.activations import ACT2FN
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    ropes = config.get("rope_parameters") or {}
    if all(isinstance(rope, Mapping) for rope in ropes.values()):
        every = list(ropes.values())  # one for each kind of layer
    else:
        every = [ropes]
    kinds = sorted({"default", *ROPE_INIT_FUNCTIONS})
    for name, given, known in (
        ("hidden_act", activation_name(config), sorted(ACT2FN)),
        *(("rope_type", rope.get("rope_type", "default"), kinds) for rope in every),
    ):
        if given not in known:
            raise UserError(
                f"{checkpoint.path / 'config.json'}: {name} is {given!r}, which transformers does "
                f"not have.{nearest(str(given), known)} Correct that field."
            )


def expected_shapes(
    config: Mapping[str, Any], *, head: str, prefix: str
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a dense model, in the order of the network."""
    family = FAMILIES[config["model_type"]]
    if family.model_type not in ("llama", "mistral"):
        return family_shapes(config, family)
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(config["num_hidden_layers"]):
        shapes.update(_layer_shapes(config, f"{prefix}layers.{layer}."))
    shapes[f"{prefix}norm.weight"] = (hidden,)
    labels = len(config.get("id2label") or {}) or 2
    heads = {
        "lm_head.weight": (vocabulary, hidden),
        "score.weight": (labels, hidden),
        "qa_outputs.weight": (2, hidden),
        "qa_outputs.bias": (2,),
    }
    shapes.update({name: heads[name] for name in _head_names(head, config)})
    return shapes


def read_finite(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """Read one tensor. Raises UserError when it holds NaN or infinite values."""
    tensor = checkpoint.read(name)
    check_finite(checkpoint, name, tensor)
    return tensor


def check_finite(checkpoint: Checkpoint, name: str, tensor: torch.Tensor) -> None:
    """Raise UserError when `tensor`, read as `name`, holds NaN or infinite values."""
    if not all_finite(tensor):
        raise UserError(
            f"{checkpoint.path}: {name} holds NaN or infinite values. "
            "Repair or replace the checkpoint."
        )


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinity."""
    # One pass at the speed of memory; only a sum that overflowed is looked at more closely.
    if bool(torch.isfinite(tensor.sum())):
        return True
    return all(bool(torch.isfinite(part).all()) for part in tensor.reshape(-1).split(1 << 24))


def _layer_shapes(config: Mapping[str, Any], start: str) -> dict[str, tuple[int, ...]]:
    hidden, width = config["hidden_size"], config["intermediate_size"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or hidden // heads
    shapes: dict[str, tuple[int, ...]] = {f"{start}input_layernorm.weight": (hidden,)}
    outputs = {"q_proj": heads * size, "k_proj": groups * size, "v_proj": groups * size}
    inputs = {**dict.fromkeys(outputs, hidden), "o_proj": heads * size}
    for name, rows in {**outputs, "o_proj": hidden}.items():
        shapes[f"{start}self_attn.{name}.weight"] = (rows, inputs[name])
        if config.get("attention_bias"):
            shapes[f"{start}self_attn.{name}.bias"] = (rows,)
    shapes[f"{start}post_attention_layernorm.weight"] = (hidden,)
    shapes[f"{start}mlp.gate_proj.weight"] = (width, hidden)
    shapes[f"{start}mlp.up_proj.weight"] = (width, hidden)
    shapes[f"{start}mlp.down_proj.weight"] = (hidden, width)
    if config.get("mlp_bias"):
        shapes[f"{start}mlp.gate_proj.bias"] = (width,)
        shapes[f"{start}mlp.up_proj.bias"] = (width,)
        shapes[f"{start}mlp.down_proj.bias"] = (hidden,)
    return shapes


def _head(checkpoint: Checkpoint) -> str:
    given = checkpoint.config.get("architectures") or ["LlamaForCausalLM"]
    if not isinstance(given, list):
        raise UserError(
            f"{checkpoint.path / 'config.json'}: architectures is {given!r}, not a list of names. "
            'Write it as a list, such as ["LlamaForCausalLM"].'
        )
    named = given[0]
    lowered = str(named).lower()  # the first LLaMA conversions say LLaMAForCausalLM
    kind = checkpoint.config["model_type"]
    if kind not in ("llama", "mistral"):
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        wanted = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
        if "architectures" in checkpoint.config and named != wanted:
            raise UserError(
                f"{checkpoint.path} is a {named}. Of a {kind}, give the language model, {wanted}."
            )
        return "ForCausalLM"
    for head in HEADS:
        if lowered in (f"llama{head}".lower(), f"mistral{head}".lower()):
            return head
    raise UserError(
        f"{checkpoint.path} is a {named}. Give a LLaMA or Mistral of one of these kinds: "
        f"{', '.join(HEADS)}."
    )


def _head_names(head: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    tied = head == "ForCausalLM" and config.get("tie_word_embeddings")
    return () if tied else HEADS[head]


def _prefix(checkpoint: Checkpoint) -> str:
    for prefix in ("model.", "", "transformer."):
        if f"{prefix}embed_tokens.weight" in checkpoint:
            return prefix
    raise UserError(
        f"{checkpoint.path} holds no embed_tokens.weight; its tensors are called like "
        f"{checkpoint.keys()[0] if checkpoint.keys() else '(none)'}. Give a dense LLaMA."
    )


def _ignorable(name: str, config: Mapping[str, Any]) -> bool:
    # Rotary tables of old checkpoints follow from the config; a tied head repeats the embeddings.
    tied = name == "lm_head.weight" and bool(config.get("tie_word_embeddings"))
    return tied or name.endswith("rotary_emb.inv_freq")


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
