"""Several dense models of one shape seen as one, whose attention, norms and embeddings are means.

The mean of what is not an expert is Branch-Train-MiX's rule (arXiv 2403.07816). Tensors are read
and averaged one at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch

from moesaic.construct.dense import DenseModel
from moesaic.core.errors import UserError

__all__ = ["MergedModel", "check_alike", "merge"]

_MUST_AGREE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "layer_types",
    "sliding_window",
    "no_rope_layers",
    "partial_rotary_factor",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
)


@dataclass(frozen=True)
class MergedModel(DenseModel):
    """A dense model that reads as the mean of itself and its peers, feed-forward layers apart."""

    peers: tuple[DenseModel, ...] = ()

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor: the first model's own where it is of a feed-forward layer."""
        first = super().read(name)
        if not self.peers or ".mlp." in name:
            return first
        total = first.float()
        for peer in self.peers:
            inside = name.startswith(self.prefix)
            theirs = peer.prefix + name.removeprefix(self.prefix) if inside else name
            total = total + peer.read(theirs).float()
        return (total / (1 + len(self.peers))).to(first.dtype)


def merge(models: Sequence[DenseModel], *, others: Literal["mean", "first"]) -> MergedModel:
    """See `models` as one: all but the feed-forward layers the mean, or the first model's."""
    own = {item.name: getattr(models[0], item.name) for item in fields(DenseModel)}
    return MergedModel(**own, peers=tuple(models[1:]) if others == "mean" else ())


def check_alike(models: Sequence[DenseModel]) -> None:
    """Raise UserError unless models have the same shape, number type and vocabulary."""
    first = models[0]
    for other in models[1:]:
        for key in _MUST_AGREE:
            if first.config.get(key) != other.config.get(key):
                raise UserError(
                    f"{other.checkpoint.path} has {key}={other.config.get(key)}, "
                    f"{first.checkpoint.path} has {first.config.get(key)}. "
                    "Join models of one shape, such as fine-tunings of one model."
                )
        if first.head != other.head:
            raise UserError(
                f"{other.checkpoint.path} is a {other.head}, {first.checkpoint.path} a "
                f"{first.head}. Join models of one class."
            )
        types = [[m.checkpoint.dtype(name) for name in m.ffn(0)] for m in (first, other)]
        if types[0] != types[1]:
            raise UserError(
                f"{other.checkpoint.path} is stored as {types[1][0]}, {first.checkpoint.path} as "
                f"{types[0][0]}. Save them in one type."
            )
        _check_vocabulary(first, other)


def _check_vocabulary(first: DenseModel, other: DenseModel) -> None:
    paths = [model.checkpoint.path for model in (first, other)]
    files = [path / "tokenizer.json" for path in paths]
    if not all(file.is_file() for file in files) or len({f.read_bytes() for f in files}) == 1:
        return
    from moesaic.models.tokenizer import load_tokenizer

    vocabularies = [load_tokenizer(path).get_vocab() for path in paths]
    if vocabularies[0] != vocabularies[1]:
        raise UserError(
            f"The tokenizers of {paths[0]} and {paths[1]} give different ids. "
            "Join models that read text in the same tokens."
        )
