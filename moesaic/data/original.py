"""The block order of the original LLaMA-MoE programs, defects included, to compare runs with them.

For training use `moesaic.data.mixture`: this order loses the rest of every buffer, ends with the
first domain that ends, and can only be resumed by replay. Source: spec llama-moe-v1, section 4.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Document = Sequence[int]
Files = Mapping[str, Iterable[Document]]


def packed_blocks(
    files: Files, *, block: int, seed: int = 1227, buffer: int = 200
) -> Iterator[list[int]]:
    """Yield the blocks of one domain.

    One generator seeded with `seed` shuffles the sorted file names, then each buffer of `buffer`
    documents; a buffer is joined and cut into blocks and its rest dropped. A buffer shorter than a
    block is yielded whole, as one short block.
    """
    generator = random.Random(seed)
    names = sorted(files)
    generator.shuffle(names)
    documents = itertools.chain.from_iterable(files[name] for name in names)
    while held := list(itertools.islice(documents, buffer)):
        generator.shuffle(held)
        joined = list(itertools.chain.from_iterable(held))
        if 0 < len(joined) < block:
            yield joined
        for start in range(0, len(joined) - block + 1, block):
            yield joined[start : start + block]


class OriginalMixture:
    """The mixed stream: every block's domain is drawn with `random.choices` of the same seed.

    `domains` maps names, in directory order, to files of token ids. Iterating ends when the domain
    that was drawn has no block left.
    """

    def __init__(
        self,
        domains: Mapping[str, Files],
        *,
        weights: Mapping[str, float],
        block: int,
        seed: int = 1227,
        buffer: int = 200,
    ) -> None:
        self.weights = dict(weights)
        self._generator = random.Random(seed)
        self._blocks = {
            name: packed_blocks(files, block=block, seed=seed, buffer=buffer)
            for name, files in domains.items()
        }

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Draw by these weights from now on."""
        self.weights = dict(weights)

    def __iter__(self) -> Iterator[tuple[str, list[int]]]:
        names = list(self._blocks)
        while True:
            chances = [self.weights[name] for name in names]
            name = self._generator.choices(names, chances)[0]
            block = next(self._blocks[name], None)
            if block is None:
                return
            yield name, block


def evaluation_blocks(documents: Iterable[Document], *, block: int) -> list[list[int]]:
    """Join the documents of a validation file in order and cut them into full blocks."""
    return group_texts({"input_ids": list(documents)}, block=block)["input_ids"]


def group_texts(columns: Mapping[str, Sequence[Document]], *, block: int) -> dict[str, Any]:
    """Join each column and cut it into full blocks; the rest is dropped; labels are the ids."""
    joined = {name: list(itertools.chain.from_iterable(rows)) for name, rows in columns.items()}
    length = len(next(iter(joined.values())))
    if length >= block:
        length = length // block * block
    grouped: dict[str, Any] = {
        name: [ids[start : start + block] for start in range(0, length, block)]
        for name, ids in joined.items()
    }
    grouped["labels"] = [list(row) for row in grouped["input_ids"]]
    return grouped
