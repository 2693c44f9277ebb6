"""Looking at data before training on it: sizes per domain, and documents token by token."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesaic.core.console import progress
from moesaic.core.errors import UserError, unknown
from moesaic.data.sources import Data, open_domains
from moesaic.data.tokens import encode_batches


@dataclass(frozen=True)
class DomainStatistics:
    """Sizes of one domain; the token figures are None where no tokenizer was given.

    `bytes` are those of the text in UTF-8. Tokens are counted without BOS and EOS.
    """

    documents: int
    bytes: int
    tokens: int | None = None
    bytes_per_token: float | None = None
    median_tokens: float | None = None
    longest_tokens: int | None = None


def statistics(data: Data, tokenizer: Any = None) -> dict[str, DomainStatistics]:
    """Count documents, bytes and (with a tokenizer) tokens of every domain, reading it once."""
    return {name: _count(name, source, tokenizer) for name, source in open_domains(data).items()}


def _count(name: str, source: Any, tokenizer: Any) -> DomainStatistics:
    size = 0
    documents = 0
    lengths: list[int] = []

    def counted() -> Iterator[str]:
        nonlocal size, documents
        for text in source.documents():
            size += len(text.encode())
            documents += 1
            yield text

    with progress(f"reading {name}") as bar:
        if tokenizer is None:
            for _ in counted():
                bar.advance(1)
        else:
            for batch in encode_batches(counted(), tokenizer):
                lengths += [len(ids) for ids in batch]
                bar.advance(len(batch), tokens=sum(lengths))
    if not documents:
        raise UserError(f"the domain '{name}' holds no document. Give it text, or leave it out.")
    if tokenizer is None:
        return DomainStatistics(documents, size)
    tokens = sum(lengths)
    return DomainStatistics(
        documents,
        size,
        tokens,
        round(size / tokens, 3) if tokens else None,
        float(np.median(lengths)),
        max(lengths),
    )


@dataclass(frozen=True)
class Inspected:
    """One document as the model will see it: `ids`, and the text that each id stands for.

    `pieces` decode one id at a time: a character made of several tokens shows as a replacement mark
    in each of them.
    """

    domain: str
    index: int
    tokens: int
    ids: list[int]
    pieces: list[str]


def inspect(
    data: Data,
    tokenizer: Any,
    *,
    documents: int = 2,
    tokens: int = 200,
    domain: str | None = None,
) -> Iterator[Inspected]:
    """Yield the first `documents` of each domain (or of one), the first `tokens` tokens of each.

    BOS and EOS are shown where packing puts them. Raises UserError for an unknown `domain`.
    """
    from moesaic.data.batches import document_rows

    domains = open_domains(data)
    if domain is not None and domain not in domains:
        raise unknown("domain", domain, domains)
    for name, source in domains.items():
        if domain not in (None, name):
            continue
        rows = document_rows(source, tokenizer, context=1 << 62, max_documents=documents)
        for index, ids in enumerate(itertools.islice(rows, documents)):
            shown = ids[:tokens]
            pieces = [tokenizer.decode([id_]) for id_ in shown]
            yield Inspected(name, index, len(ids), shown, pieces)
