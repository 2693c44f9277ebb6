"""Real text as rows of token ids: whole documents to measure on, full rows to calibrate with."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from moesaic.core.errors import UserError
from moesaic.data.sources import Data, Source, open_domains
from moesaic.data.tokens import encode_batches

if TYPE_CHECKING:
    import torch


def document_rows(
    source: Source, tokenizer: Any, *, context: int, max_documents: int | None = None
) -> Iterator[list[int]]:
    """Yield one row a document: ``BOS ids EOS``, cut off after `context` tokens.

    Delimiters as in packing: those the tokenizer has; one, in front, where both are the same token.
    Documents without a token are left out.
    """
    texts = itertools.islice(source.documents(), max_documents)
    for ids in _delimited(texts, tokenizer):
        yield ids[:context]


class TooShort(UserError):
    """Data without one full row."""


def calibration_batches(
    data: Data,
    tokenizer: Any,
    *,
    tokens: int,
    context: int = 512,
    batch: int = 8,
    starts: bool = False,
) -> Iterator[torch.Tensor]:
    """Yield LongTensors [B, T] of real text: `tokens` in all, rounded down to full rows of
    `context`.

    The domains take turns row by row; inside a domain, documents follow one another in their order.
    Every row is full, so there is no mask. With `starts` every row begins with a document, as
    prompts do, and what is left of its last one is dropped. Raises TooShort when the data holds
    less than one row.
    """
    import torch

    wanted = max(1, tokens // context)
    sources = open_domains(data).values()
    streams = [_rows(source, tokenizer, context, starts=starts) for source in sources]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*streams))
    rows = itertools.islice((row for row in turns if row is not None), wanted)
    empty = True
    while chunk := list(itertools.islice(rows, batch)):
        empty = False
        yield torch.tensor(chunk, dtype=torch.long)
    if empty:
        raise TooShort(
            f"the data holds less than one row of {context} tokens. "
            "Give more text or a shorter context."
        )


def _rows(source: Source, tokenizer: Any, context: int, *, starts: bool) -> Iterator[list[int]]:
    texts = source.documents()
    if starts:  # no row reaches further into a document than some characters a token
        texts = (text[: 32 * context] for text in texts)
    buffer: list[int] = []
    for row in _delimited(texts, tokenizer):
        buffer += row
        while len(buffer) >= context:
            yield buffer[:context]
            del buffer[: len(buffer) if starts else context]


def _delimited(texts: Iterable[str], tokenizer: Any) -> Iterator[list[int]]:
    """Yield ``BOS ids EOS`` of every text that has a token."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    front = [] if bos is None else [bos]
    back = [] if eos is None or eos == bos else [eos]
    for batch in encode_batches(texts, tokenizer):
        for ids in batch:
            if ids:
                yield [*front, *ids, *back]
