"""Conversations on disk and in rows: each whole, in one row, kept apart, read anew every epoch.

They are cached as documents are (`tokens`), with their template's special tokens, in int32. A token
that is context only is kept as ~id, which is below zero.

A row takes conversations in a pseudorandom order until one does not fit; that one begins the next
row. What is left of a row is filled with the beginning of that same conversation, of which nothing
is learned: real text, because padding would send one token to the same experts again and again and
bend the balance of the routers.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.core.console import note
from moesaic.core.errors import UserError
from moesaic.data.chat import IGNORED, Conversation, chat_template, encode
from moesaic.data.packing import Block, ShuffledDomain
from moesaic.data.segments import first_fit, pack
from moesaic.data.sources import Data, Source, conversations_of
from moesaic.data.tokens import TokenDomain, cached_tokens, tokenizer_fingerprint


def open_conversations(
    data: Data, tokenizer: Any, *, cache: Path | str | None = None
) -> dict[str, TokenDomain]:
    """Tokenise the conversations of every domain, or find them in the cache; context is ~id.

    Conversations without an answer are left out. Raises UserError for faults in the data, and for
    a tokenizer without a usable template.
    """
    decides = (chat_template(tokenizer), sorted(tokenizer.special_tokens_map.items()))
    facts = f"conversations {tokenizer_fingerprint(tokenizer)} {decides}"
    return cached_tokens(
        data,
        tokenizer,
        lambda name, source: ([ids] for ids in _encoded(source, tokenizer, name)),
        fingerprint=hashlib.sha256(facts.encode()).hexdigest(),
        dtype=np.int32,
        cache=cache,
    )


def conversation_rows(
    source: Source, tokenizer: Any, *, context: int, max_documents: int | None = None
) -> Iterator[list[int]]:
    """Yield one row a conversation, cut off after `context` tokens; what is no answer is ~id."""
    for ids in itertools.islice(_encoded(source, tokenizer, "held out"), max_documents):
        yield ids[:context]


def _encoded(source: Source, tokenizer: Any, name: str) -> Iterator[list[int]]:
    """Yield the ids of every conversation that has an answer."""
    for number, messages in enumerate(conversations_of(source), start=1):
        try:
            ids, labels = encode(messages, tokenizer)
        except UserError as error:
            raise UserError(f"{name}, conversation {number}: {error}") from None
        if any(label != IGNORED for label in labels):
            yield [~i if label == IGNORED else i for i, label in zip(ids, labels, strict=True)]


class ConversationDomain(ShuffledDomain):
    """The endless (or `max_epochs` long) sequence of rows of one domain's conversations.

    Conversations longer than `block` are left out, with a note that says how many.
    """

    def __init__(
        self, domain: TokenDomain, *, block: int, seed: int, max_epochs: float | None = None
    ) -> None:
        self._lengths = np.diff(domain.offsets)
        self._kept = np.flatnonzero(self._lengths <= block)
        super().__init__(
            domain,
            block=block,
            seed=seed,
            max_epochs=max_epochs,
            count=len(self._kept),
            unit="conversations",
            material="conversations",
        )
        long = len(domain) - len(self._kept)
        if not len(self._kept):
            raise UserError(
                f"the domain '{domain.name}' has no conversation of at most {block} tokens (the "
                f"shortest has {self._lengths.min()}). Make rows longer."
            )
        if long:
            note(
                f"{domain.name}: {long} of {len(domain)} conversations are longer than a row of "
                f"{block} tokens and are left out"
            )

    @cached_property
    def epoch_tokens(self) -> int:
        """Tokens of one pass over the domain, what fills rows counted (in the order of files)."""
        rows = first_fit(self._lengths[self._kept].tolist(), limit=self.block)
        return len(rows) * self.block

    @property
    def epochs(self) -> float:
        """Passes over the domain so far."""
        return self.opened / self.count

    def take(self) -> Block:
        """Return the next row. Raises EndOfData past `max_epochs`."""
        first, last = self._advance()
        items = [self._read(k) for k in range(first, last)]
        rest = self.block - sum(len(item.ids) for item in items)
        while rest:  # once, but for the last row of max_epochs
            begun = self._read(last).ids[:rest]
            items.append(Conversation(begun, [IGNORED] * len(begun)))
            rest -= len(begun)
            last += 1
        row = pack(items)
        return Block(self.domain.name, row.ids, row.segment - 1, row.position, row.labels)

    def skip(self) -> None:
        """Go on by one row without reading it."""
        self._advance()

    def _advance(self) -> tuple[int, int]:
        """Go on by a row and return the running numbers [first, last) of its conversations."""
        limit = self._limit
        first = last = self.opened
        if limit is not None and first >= limit:
            raise self._end()
        room = self.block
        while (limit is None or last < limit) and self._lengths[self._index(last)] <= room:
            room -= int(self._lengths[self._index(last)])
            last += 1
        self.opened = last
        return first, last

    def _index(self, k: int) -> int:
        return int(self._kept[self._place(k)])

    def _read(self, k: int) -> Conversation:
        kept_T = self.domain.document(self._index(k))
        context_T = kept_T < 0
        return Conversation(
            np.where(context_T, ~kept_T, kept_T).tolist(),
            np.where(context_T, IGNORED, kept_T).tolist(),
        )
