"""What a model is given of a batch of samples, and which of its rows are kept.

Causal models read the samples themselves, padded on the right. Switch fills masked positions: every
16th token is replaced by a sentinel, and the decoder is fed the sentinels and the tokens they
hide. Other sequence-to-sequence models (NLLB) copy: the decoder is fed the sample, shifted.

Notation: B samples, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moesaic.core.errors import UserError
from moesaic.routing.blocks import Sample

MASK_EVERY = 16
"""Switch: one token of so many is hidden, the one in the middle (the study: 32 of 512)."""
_IGNORED = -100

Task = Literal["causal", "fill", "copy"]


@dataclass(frozen=True)
class Side:
    """The rows of one stack: ids, documents and targets, one array [T] a sample."""

    ids: list[np.ndarray]
    document: list[np.ndarray]
    targets: list[np.ndarray]
    """The token that each row is to predict, -100 for none."""

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.ids]


@dataclass(frozen=True)
class Feed:
    """How this model is fed.

    `pad` fills up short samples; `start` is the decoder's first token; `sentinels` are Switch's
    markers, in order.
    """

    task: Task
    pad: int
    start: int = 0
    sentinels: tuple[int, ...] = ()

    def sides(self, samples: Sequence[Sample]) -> dict[str, Side]:
        """Return what "decoder", and "encoder" where there is one, read."""
        if self.task == "causal":
            targets = [np.append(s.ids[1:], _IGNORED) for s in samples]
            return {
                "decoder": Side([s.ids for s in samples], [s.document for s in samples], targets)
            }
        if self.task == "fill":
            parts = [self._hide(sample) for sample in samples]
        else:
            parts = [(s.ids, s.document, s.ids, s.document) for s in samples]
        inputs, documents, labels, label_documents = (
            list(part) for part in zip(*parts, strict=True)
        )
        return {
            "encoder": Side(inputs, documents, [np.full(len(x), _IGNORED) for x in inputs]),
            "decoder": Side(
                [np.concatenate([[self.start], x[:-1]]) for x in labels], label_documents, labels
            ),
        }

    def _hide(self, sample: Sample) -> tuple[np.ndarray, ...]:
        hidden = np.arange(MASK_EVERY // 2, len(sample), MASK_EVERY)[: len(self.sentinels) - 1]
        marks = np.array(self.sentinels[: len(hidden) + 1], np.int64)
        ids = sample.ids.copy()
        ids[hidden] = marks[:-1]
        labels = np.empty(2 * len(hidden) + 1, np.int64)
        labels[0::2], labels[1::2] = marks, sample.ids[hidden]
        places = np.append(np.repeat(hidden, 2), hidden[-1] if len(hidden) else 0)
        return ids, sample.document, labels, sample.document[places]


def feed_for(model: Any, tokenizer: Any) -> Feed:
    """Choose how a model is fed. Raises UserError when Switch's tokenizer has no sentinels."""
    config = model.config
    pad = next(
        (
            x
            for x in (tokenizer.pad_token_id, config.get_text_config().pad_token_id)
            if x is not None
        ),
        0,
    )
    if not config.is_encoder_decoder:
        return Feed("causal", int(pad))
    start = config.decoder_start_token_id
    start = int(pad if start is None else start)
    if config.model_type != "switch_transformers":
        return Feed("copy", int(pad), start)
    names = [f"<extra_id_{number}>" for number in range(100)]
    known = tokenizer.get_vocab()
    sentinels = tuple(known[name] for name in names if name in known)
    if not sentinels:
        raise UserError(
            "the tokenizer has no <extra_id_0>, which stands for hidden tokens in this model's "
            "training. Give the model's own tokenizer."
        )
    return Feed("fill", int(pad), start, sentinels)


def padded(rows: Sequence[np.ndarray], fill: int) -> np.ndarray:
    """Stack rows of unequal length, filled up on the right: int64 [B, T]."""
    out = np.full((len(rows), max(map(len, rows))), fill, np.int64)
    for index, row in enumerate(rows):
        out[index, : len(row)] = row
    return out
