"""Text to samples, as the routing study cut them (moe-lrc, 01_tokenize.py).

Each document becomes its tokens between the special tokens that its tokenizer adds, with EOS at the
end; the documents of a domain are laid end to end and cut into samples of `length` tokens, which
may span documents. Only the last sample of a domain may be shorter. NLLB's language code stands
once at the beginning of every sample instead of every document.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesaic.core.errors import UserError
from moesaic.data.shuffle import Permutation, key
from moesaic.data.sources import Source
from moesaic.data.tokens import encode_batches, open_tokens

_DOCUMENTS_AT_ONCE = 32
_TEXT = "a"  # any text, to see what stands around it


@dataclass(frozen=True)
class Sample:
    """Tokens that one forward pass sees together: `ids` and `document`, int64 [T].

    `document` numbers the documents of the domain in the order in which they were read.
    """

    domain: int
    ids: np.ndarray
    document: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Delimiters:
    """The ids that stand around every document; `repeated`: around every sample instead."""

    front: tuple[int, ...]
    back: tuple[int, ...]
    repeated: tuple[int, ...] = ()


def delimiters(tokenizer: Any, *, language_code: bool = False) -> Delimiters:
    """Read off the tokenizer what it puts around a text, and add EOS where it is missing.

    `language_code`: the first of these ids names the language and opens every sample (NLLB).
    """
    inner = list(tokenizer(_TEXT, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(_TEXT)["input_ids"])
    start = next((i for i in range(len(whole)) if whole[i : i + len(inner)] == inner), 0)
    front, back = whole[:start], whole[start + len(inner) :]
    eos = tokenizer.eos_token_id
    if eos is not None and (not back or back[-1] != eos):
        back = [*back, eos]
    if language_code and front:
        return Delimiters(tuple(front[1:]), tuple(back), (front[0],))
    return Delimiters(tuple(front), tuple(back))


def samples(
    sources: Mapping[str, Source],
    tokenizer: Any,
    around: Delimiters,
    *,
    tokens: int,
    length: int,
    seed: int | None = None,
) -> Iterator[Sample]:
    """Yield `tokens` tokens in samples of `length`, the same number from every domain in turn.

    Documents come in their order, or shuffled with `seed`; empty ones are left out. A domain that
    has less gives what it has. Raises UserError when there is no token at all.
    """
    found = 0
    for index, (name, source) in enumerate(sources.items()):
        wanted = tokens // len(sources) + (index < tokens % len(sources))
        documents = _in_order(source, tokenizer) if seed is None else None
        if documents is None:
            documents = _shuffled(name, source, tokenizer, key(seed, name))
        for sample in _cut(index, documents, around, wanted, length):
            found += len(sample)
            yield sample
    if found == 0:
        raise UserError("the data holds no token. Give text.")


def _in_order(source: Source, tokenizer: Any) -> Iterator[list[int] | np.ndarray]:
    texts = iter(source.documents())
    while batch := list(itertools.islice(texts, _DOCUMENTS_AT_ONCE)):
        for encoded in encode_batches(batch, tokenizer):
            yield from encoded


def _shuffled(name: str, source: Source, tokenizer: Any, key: int) -> Iterator[np.ndarray]:
    """Any order needs every document: they are tokenised once, into the cache."""
    domain = open_tokens({name: source}, tokenizer)[name]
    order = Permutation(len(domain), key)
    for place in range(len(domain)):
        yield domain.document(order[place])


def _cut(
    domain: int,
    documents: Iterator[list[int] | np.ndarray],
    around: Delimiters,
    wanted: int,
    length: int,
) -> Iterator[Sample]:
    head = np.array(around.repeated, np.int64)
    front, back = np.array(around.front, np.int64), np.array(around.back, np.int64)
    held_ids = held_document = np.empty(0, np.int64)
    done = 0
    for number, ids in enumerate(documents):
        if done >= wanted:
            return
        if len(ids) == 0:
            continue
        pieces = [held_ids, front, np.asarray(ids, np.int64), back]
        added = sum(map(len, pieces[1:]))
        held_ids = np.concatenate(pieces)
        held_document = np.concatenate([held_document, np.full(added, number, np.int64)])
        start = 0
        while done < wanted:
            size = min(length, wanted - done)
            body = size - len(head)
            if body < 1 or len(held_ids) - start < body:
                break
            part = slice(start, start + body)
            yield _sample(domain, head, held_ids[part], held_document[part])
            done += size
            start += body
        held_ids, held_document = held_ids[start:], held_document[start:]
        if wanted - done <= len(head):
            return
    if len(held_ids) and len(head) < wanted - done:
        body = min(len(held_ids), wanted - done - len(head))
        yield _sample(domain, head, held_ids[:body], held_document[:body])


def _sample(domain: int, head: np.ndarray, ids: np.ndarray, document: np.ndarray) -> Sample:
    first = np.full(len(head), document[0], np.int64)
    return Sample(domain, np.concatenate([head, ids]), np.concatenate([first, document]))
