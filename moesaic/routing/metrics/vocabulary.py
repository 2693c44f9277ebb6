"""Vocabulary specialisation: whether an expert's tokens are always the same words.

Three words belong to a token: the one read (`input`), the one the model expects next (`predicted`)
and the one that really comes next (`target`; the last token of a sample has none). A token counts
for its first expert, the one of the highest score. For a word v and an expert e of a layer:

    count_EV      times v occurred where e was first
    frequency_V   max_e count / sum_e count; the first expert with the maximum owns v
    specialisation_E   mean frequency of the words that e owns; NaN where it owns none

Words with fewer than `min_count` occurrences are left out. Source: arXiv 2505.16056, section 4.3.

Notation: L layers, E experts, V words counted. Memory: 4 L E V bytes for each of the three, so give
`words` (from `frequent`) where the vocabulary is large.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesaic.core.errors import UserError
from moesaic.routing.compiled import compiled, spread
from moesaic.routing.metric import Metric
from moesaic.routing.metrics import METRICS
from moesaic.routing.samples import Samples, Space

Word = Literal["input", "predicted", "target"]
WORDS: tuple[Word, ...] = ("input", "predicted", "target")


@dataclass(frozen=True, eq=False)
class VocabularyFigures:
    """Words of one kind, all domains together; `words_V` are the ids of those kept."""

    words_V: NDArray[np.int64]
    counts_LEV: NDArray[np.int64]
    frequency_LV: NDArray[np.float64]
    owner_LV: NDArray[np.int64]
    specialisation_LE: NDArray[np.float64]

    def owned(self, layer: int, expert: int, most: int = 15) -> list[tuple[int, float, int]]:
        """Return (id, frequency, count) of the words that an expert owns, the most frequent first.

        Equal frequencies are ordered by count, equal counts by id.
        """
        own_V = np.flatnonzero(self.owner_LV[layer] == expert)
        frequency_V = self.frequency_LV[layer, own_V]
        count_V = self.counts_LEV[layer, expert, own_V]
        order_V = np.lexsort((own_V, -count_V, -frequency_V))[:most]
        return [
            (int(self.words_V[own_V[v]]), float(frequency_V[v]), int(count_V[v])) for v in order_V
        ]


@METRICS.register
class Vocabulary(Metric):
    """Specialisation of experts in words: those read, predicted, and coming next."""

    def __init__(
        self,
        space: Space,
        *,
        vocabulary: int,
        min_count: int = 20,
        words: Mapping[Word, ArrayLike] | None = None,
    ) -> None:
        """Count words with ids below `vocabulary`, or only those in `words` (from `frequent`)."""
        super().__init__(space)
        self.min_count = min_count
        self.words: dict[str, NDArray[np.int64]] = {
            word: np.arange(vocabulary)
            if words is None or word not in words
            else np.asarray(words[word], dtype=np.int64)
            for word in WORDS
        }
        self._place: dict[str, NDArray[np.int32]] = {}
        for word, ids_V in self.words.items():
            place = np.full(vocabulary, -1, dtype=np.int32)
            place[ids_V] = np.arange(len(ids_V))
            self._place[word] = place
            shape = (space.layers, space.num_experts, len(ids_V))
            self.sums[word] = np.zeros(shape, dtype=np.uint32)
            self.sums[f"seen {word}"] = np.zeros(len(ids_V), dtype=np.int64)

    def add(self, domain: int, rows_N: NDArray[np.int64], samples: Samples) -> None:
        """Add samples. Raises UserError when they have no tokens, or ids outside the vocabulary."""
        if samples.tokens_NT is None:
            raise UserError("vocabulary specialisation needs token ids; the samples have none.")
        target_NT = np.full_like(samples.tokens_NT, -1)
        target_NT[:, :-1] = samples.tokens_NT[:, 1:]  # past the end it is -1 already
        words: dict[str, NDArray[np.int64] | None] = {
            "input": samples.tokens_NT,
            "predicted": samples.predicted_NT,
            "target": target_NT,
        }
        for word, ids_NT in words.items():
            if ids_NT is None:
                continue
            place = self._place[word]
            if int(ids_NT.max(initial=-1)) >= len(place):
                raise UserError(
                    f"the {word} token {ids_NT.max()} is outside the vocabulary of {len(place)}. "
                    "Give the size of the tokenizer that made the tokens."
                )
            place_NT = np.where(ids_NT >= 0, place[ids_NT], -1)
            _count(samples, place_NT, self.sums[word])
            seen_V = self.sums[f"seen {word}"]
            seen_V += np.bincount(place_NT[place_NT >= 0], minlength=len(seen_V))

    def result(self) -> dict[str, VocabularyFigures]:
        """Return the figures of each kind of word."""
        return {word: self.at(word) for word in WORDS}

    def at(self, word: Word) -> VocabularyFigures:
        """Return the figures of one kind of word; their counts take 8 L E V bytes."""
        counts_LEV = self.sums[word]
        kept_V = np.flatnonzero(self.sums[f"seen {word}"] >= max(1, self.min_count))
        counts_LEV = counts_LEV[:, :, kept_V].astype(np.int64)
        total_LV = counts_LEV.sum(axis=1)
        frequency_LV = counts_LEV.max(axis=1) / np.maximum(total_LV, 1)
        owner_LV = np.where(total_LV > 0, counts_LEV.argmax(axis=1), -1)
        owns_LEV = owner_LV[:, None] == np.arange(self.space.num_experts)[None, :, None]
        owned_LE = owns_LEV.sum(axis=2)
        sum_LE = np.einsum("lev,lv->le", owns_LEV, frequency_LV)
        special_LE = np.where(owned_LE > 0, sum_LE / np.maximum(owned_LE, 1), np.nan)
        return VocabularyFigures(
            self.words[word][kept_V], counts_LEV, frequency_LV, owner_LV, special_LE
        )


def frequent(tokens: ArrayLike, *, vocabulary: int, min_count: int = 20) -> NDArray[np.int64]:
    """Return the ids that occur at least `min_count` times; negative ones are skipped."""
    ids = np.asarray(tokens).ravel()
    counts = np.bincount(ids[ids >= 0], minlength=vocabulary)
    return np.flatnonzero(counts >= min_count)


def _count(samples: Samples, place_NT: NDArray[np.int32], counts_LEV: NDArray[np.uint32]) -> None:
    def work(start: int, stop: int) -> None:  # layers: each thread has its own
        for layer in range(start, stop):
            _count_words(samples.experts_NTLK[:, :, layer, 0], place_NT, counts_LEV[layer])

    spread(work, samples.layers)


@compiled
def _count_words(first_NT, place_NT, counts_EV):  # type: ignore[no-untyped-def]
    for n in range(first_NT.shape[0]):
        for t in range(first_NT.shape[1]):
            if first_NT[n, t] >= 0 and place_NT[n, t] >= 0:
                counts_EV[first_NT[n, t], place_NT[n, t]] += 1
