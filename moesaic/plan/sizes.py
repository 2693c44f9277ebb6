"""Parameters of a model by part, and the memory of running and training it.

Read off a model on the meta device. Notation: B sequences, S tokens of a sequence, D hidden size,
V vocabulary, L layers.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from moesaic.models.anatomy import Anatomy, anatomy
from moesaic.training.distill import ELEMENTS

__all__ = ["Sizes", "sizes"]

Precision = Literal["fp32", "mixed", "bf16"]

PARTS = ("embeddings", "attention", "experts", "shared experts", "routers", "dense FFN", "other")

_EMBEDDING = re.compile(r"embed|(^|\.)(wte|lm_head|output)\.")
_ATTENTION = re.compile(r"att(entio)?n")
_SHARED = re.compile(r"shared|residual_block")
_FFN = re.compile(r"\.(mlp|ffn|feed_forward|block_sparse_moe|moe)\b")
_NORM = re.compile(r"norm")


@dataclass(frozen=True)
class Sizes:
    """What a model holds."""

    anatomy: Anatomy
    parts: dict[str, int]
    """Parameters by part, in the order of `PARTS`."""
    hidden: int
    vocabulary: int
    cached: int
    """Numbers that the key-value cache holds of one token."""
    active_width: int
    """Neurons of all layers that one token passes through."""

    @property
    def total(self) -> int:
        """All parameters."""
        return self.anatomy.params_total

    @property
    def active(self) -> int:
        """Parameters that one token uses."""
        return self.anatomy.params_active

    def running(self, *, batch: int, context: int, itemsize: int = 2) -> dict[str, int]:
        """Bytes of generating with `batch` texts of `context` tokens, by part."""
        return {
            "weights": self.total * itemsize,
            "key-value cache": batch * context * self.cached * itemsize,
            "logits": batch * self.vocabulary * 4,
        }

    def training(
        self, *, batch: int, context: int, precision: Precision, recompute: bool
    ) -> dict[str, int]:
        """Bytes of a training step with AdamW on `batch` sequences at a time, by part.

        Activations are an estimate: what the backward pass of a layer needs, of every layer, or of
        one and each layer's input where they are recomputed.
        """
        half = precision == "bf16"
        tokens, layers = batch * context, self.anatomy.num_layers
        width = 2 if precision != "fp32" else 4
        # inputs and outputs of norms, projections and residual sums; gate, up, act and product
        within = 10 * self.hidden * layers + self.cached + 4 * self.active_width
        kept = within // layers + self.hidden * layers if recompute else within
        return {
            "weights": self.total * (2 if half else 4),
            "gradients": self.total * (2 if half else 4),
            "optimizer": self.total * (12 if half else 8),
            "activations": tokens * kept * width,
            "logits and loss": 2 * tokens * self.vocabulary * 4,
        }

    def teaching(self, *, batch: int, context: int, precision: Precision) -> dict[str, int]:
        """Bytes of asking this model, frozen, about `batch` sequences of a training step, by part.

        Beside its logits a gradient as large is kept for the student's; what is computed of them is
        of some rows at a time.
        """
        width, logits = 4 if precision == "fp32" else 2, batch * context * self.vocabulary
        return {
            "teacher's weights": self.total * width,
            "teacher's logits and divergence": 2 * logits * width + 3 * 4 * min(logits, ELEMENTS),
        }


def sizes(model: Any) -> Sizes:
    """Count a model that was built on the meta device."""
    found = anatomy(model)
    parts = Counter(dict.fromkeys(PARTS, 0))
    routers = tuple(f"{layer.router}." for layer in found.layers if layer.router)
    experts = tuple(f"{layer.experts}." for layer in found.layers)
    for name, parameter in model.named_parameters():
        parts[_part(name, routers, experts)] += parameter.numel()
    # anatomy leaves the padding of uneven experts out
    parts["experts"] -= sum(parts.values()) - found.params_total
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    routed = sum(parts[p] for p in ("experts", "shared experts", "dense FFN"))
    idle = found.params_total - found.params_active
    return Sizes(
        anatomy=found,
        parts={part: parts[part] for part in PARTS if parts[part]},
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        cached=2 * found.num_layers * heads * size,
        active_width=(routed - idle) // (3 * config.hidden_size),
    )


def _part(name: str, routers: tuple[str, ...], experts: tuple[str, ...]) -> str:
    if name.startswith(routers):
        return "routers"
    if name.startswith(experts):
        return "experts"
    if _SHARED.search(name):
        return "shared experts"
    if _NORM.search(name):
        return "other"
    if _EMBEDDING.search(name):
        return "embeddings"
    if _ATTENTION.search(name):
        return "attention"
    return "dense FFN" if _FFN.search(name) else "other"
