"""How a model routes one text: a prompt and what it writes next, token by token.

The model continues the prompt greedily, then reads prompt and continuation in one pass, which is
recorded: every token is routed as it is when a text is scored.

Notation: T tokens, L layers, K experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig, PreTrainedModel

from moesaic.core.errors import UserError
from moesaic.routing.cases import consistency
from moesaic.routing.record import Device, DType, open_model
from moesaic.routing.recording import Routes, recording
from moesaic.routing.samples import read_samples
from moesaic.routing.words import pieces

__all__ = ["Routed", "Shown", "show"]


@dataclass(frozen=True, eq=False)
class Routed:
    """One stack's tokens and where they went."""

    words: list[str]
    ids: list[int]
    prompt: int
    """So many of the tokens were given; the rest was written by the model."""
    layers: tuple[int, ...]
    num_experts: int
    experts_TLK: NDArray[np.int64]
    """Highest score first; -1: dropped by capacity."""
    consistency_L: NDArray[np.float64]

    @property
    def best(self) -> int:
        """Place of the layer that routes this text most consistently."""
        return int(self.consistency_L.argmax())

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `experts` is [tokens, layers, K]."""
        return {
            "words": self.words,
            "ids": self.ids,
            "prompt_tokens": self.prompt,
            "layers": list(self.layers),
            "num_experts": self.num_experts,
            "best_layer": self.layers[self.best],
            "consistency": [round(float(value), 6) for value in self.consistency_L],
            "experts": self.experts_TLK.tolist(),
        }


@dataclass(frozen=True, eq=False)
class Shown:
    """A text and its routing; `encoder` is of sequence-to-sequence models only."""

    decoder: Routed
    encoder: Routed | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        found = self.decoder.to_dict()
        if self.encoder is not None:
            found["encoder"] = self.encoder.to_dict()
        return found


def show(
    model: str | Path | PreTrainedModel,
    prompt: str,
    *,
    new_tokens: int = 32,
    tokenizer: Any = None,
    device: Device = "auto",
    dtype: DType = "auto",
) -> Shown:
    """Continue `prompt` by at most `new_tokens` tokens, 0 for none, and see where all tokens go.

    `model` and `tokenizer` are as in `moesaic.record`. Raises UserError for a dense model, no
    tokenizer, an empty prompt, and a text longer than the model's context.
    """
    if new_tokens < 0:
        raise UserError(f"new_tokens={new_tokens} was given. Give 0 or more.")
    named = getattr(model, "name_or_path", "") if isinstance(model, PreTrainedModel) else model
    loaded, tokenizer = open_model(model, tokenizer, str(named), device, dtype, {})
    ids = list(tokenizer(prompt)["input_ids"])
    if not ids:
        raise UserError("the prompt is empty. Give a text with -p.")
    _check_length(loaded, len(ids) + new_tokens)
    training = loaded.training
    loaded.eval()  # routers add noise in training mode
    try:
        with torch.no_grad():
            return _run(loaded, tokenizer, ids, new_tokens)
    finally:
        loaded.train(training)


def _run(model: Any, tokenizer: Any, ids: list[int], new_tokens: int) -> Shown:
    place = model.get_input_embeddings().weight.device
    given = torch.tensor([ids], device="cpu" if place.type == "meta" else place)
    whole = _continued(model, tokenizer, given, new_tokens)
    seq2seq = model.config.is_encoder_decoder
    with recording(model) as rec:
        if seq2seq:
            model(input_ids=given, decoder_input_ids=whole, use_cache=False)
        else:
            model(input_ids=whole, use_cache=False)
    if not rec.experts:
        raise UserError(f"{type(model).__name__} has no routed feed-forward layer.")
    prompt = 1 if seq2seq else len(ids)
    decoder = _routed(rec, tokenizer, whole[0].tolist(), prompt)
    if not seq2seq or not rec.encoder.experts:
        return Shown(decoder)
    return Shown(decoder, _routed(rec.encoder, tokenizer, ids, len(ids)))


def _continued(model: Any, tokenizer: Any, given: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Return prompt and continuation (of a sequence-to-sequence model: what its decoder reads)."""
    if new_tokens == 0:
        if not model.config.is_encoder_decoder:
            return given
        start = model.generation_config.decoder_start_token_id
        return torch.tensor([[0 if start is None else start]], device=given.device)
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    first = ends[0] if isinstance(ends, list) else ends
    settings: dict[str, Any] = {
        "max_new_tokens": new_tokens,
        "do_sample": False,
        "eos_token_id": ends,
        "pad_token_id": first or 0,
    }
    if model.config.is_encoder_decoder:
        for name in ("decoder_start_token_id", "forced_bos_token_id"):
            settings[name] = getattr(model.generation_config, name, None)
    found: torch.Tensor = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        generation_config=GenerationConfig.from_dict(settings),
    )
    return found


def _routed(routes: Routes, tokenizer: Any, ids: list[int], prompt: int) -> Routed:
    chosen = routes.experts
    layers = tuple(chosen)
    width = max(part.shape[1] for part in chosen.values())
    experts = max(part.shape[1] for part in routes.logits.values())
    experts_TLK = np.full((len(ids), len(layers), width), -1, dtype=np.int64)
    for place, layer in enumerate(layers):
        part = chosen[layer].numpy()
        experts_TLK[:, place, : part.shape[1]] = part
    samples = read_samples(experts_TLK[None], num_experts=experts, lengths=np.array([len(ids)]))
    return Routed(
        pieces(tokenizer, ids), ids, prompt, layers, experts, experts_TLK, consistency(samples)
    )


def _check_length(model: Any, tokens: int) -> None:
    if model.config.is_encoder_decoder:
        return
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and tokens > limit:
        raise UserError(
            f"prompt and continuation have {tokens} tokens, but the model reads {limit} at most. "
            "Shorten the prompt, or lower --new-tokens."
        )
