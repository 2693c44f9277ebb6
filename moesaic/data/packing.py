"""Documents laid end to end and cut into blocks; no token is lost, the cursor is a few integers.

A domain's documents are read in a pseudorandom order, a new one for every epoch. Each becomes
``BOS ids EOS`` (only the delimiters that the tokenizer has; one, in front, where both are the same
token). A block is the next `block` tokens; a document that does not fit goes on in a later block.

Neighbouring blocks come from different documents: `lanes` documents are open at a time, and block b
continues lane b modulo `lanes`. A long book then does not fill a whole batch.

    k      running number of a document: document order[k % documents] of epoch k // documents
    lane   [k, tokens of it already used]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesaic.core.errors import UserError
from moesaic.data.shuffle import Permutation, key
from moesaic.data.tokens import TokenDomain


class EndOfData(UserError):
    """A domain has been read as often as `max_epochs` allows."""


@dataclass(frozen=True)
class Block:
    """A block of tokens and where its documents begin.

    All arrays are int64 [T]: `ids`; `document`, 0, 1, 2, ... within the block; `position`, 0, 1,
    ... within each document's part of the block (pass it as position_ids to keep documents apart);
    `labels`, what is learned where it is not all of `ids`, -100 elsewhere.
    """

    domain: str
    ids: np.ndarray
    document: np.ndarray
    position: np.ndarray
    labels: np.ndarray | None = None


@dataclass(frozen=True)
class _Piece:
    """Tokens start..stop of document `index`, delimiters counted."""

    index: int
    start: int
    stop: int


class PackedDomain:
    """The endless (or `max_epochs` long) sequence of blocks of one domain."""

    def __init__(
        self,
        domain: TokenDomain,
        *,
        block: int,
        seed: int,
        lanes: int = 8,
        max_epochs: float | None = None,
    ) -> None:
        if domain.tokens == 0:
            raise UserError(
                f"the domain '{domain.name}' holds no token. Give it text, or leave it out."
            )
        self.domain = domain
        self.block = block
        self.seed = seed
        self.max_epochs = max_epochs
        # Few documents: few lanes, or all of them would be open at once and none be finished.
        lanes = max(1, min(lanes, len(domain) // 4))
        self.blocks = 0
        self.opened = 0
        self.lanes: list[list[int]] = [[-1, 0] for _ in range(lanes)]
        front = [] if domain.bos is None else [domain.bos]
        back = [] if domain.eos is None or domain.eos == domain.bos else [domain.eos]
        self._front = np.array(front, dtype=np.int64)
        self._back = np.array(back, dtype=np.int64)
        self._indices: dict[int, int] = {}

    @property
    def epoch_tokens(self) -> int:
        """Tokens of one pass over the domain, delimiters counted."""
        return self.domain.tokens + len(self.domain) * (len(self._front) + len(self._back))

    @property
    def epochs(self) -> float:
        """Passes over the domain so far."""
        return self.blocks * self.block / self.epoch_tokens

    def take(self) -> Block:
        """Return the next block. Raises EndOfData past `max_epochs`."""
        pieces = self._advance()
        ids = np.concatenate([self._read(piece) for piece in pieces])
        sizes = [piece.stop - piece.start for piece in pieces]
        document = np.repeat(np.arange(len(pieces)), sizes)
        position = np.concatenate([np.arange(size) for size in sizes])
        return Block(self.domain.name, ids, document, position)

    def skip(self) -> None:
        """Go on by one block without reading it."""
        self._advance()

    def state_dict(self) -> dict[str, Any]:
        """Return the cursor as JSON."""
        return {
            "documents": len(self.domain),
            "tokens": self.domain.tokens,
            "blocks": self.blocks,
            "opened": self.opened,
            "lanes": [list(lane) for lane in self.lanes],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the place that `state` names. Raises UserError when it does not fit this domain."""
        lanes: Sequence[Sequence[int]] = state["lanes"]
        known = (state["documents"], state["tokens"], len(lanes))
        if known != (len(self.domain), self.domain.tokens, len(self.lanes)):
            raise UserError(
                f"the saved position in the domain '{self.domain.name}' is one among "
                f"{known[0]} documents of {known[1]} tokens, but the data has {len(self.domain)} "
                f"of {self.domain.tokens}. Resume with the data the run began with."
            )
        self.blocks = int(state["blocks"])
        self.opened = int(state["opened"])
        self.lanes = [[int(k), int(used)] for k, used in lanes]

    def _advance(self) -> list[_Piece]:
        lanes = [list(lane) for lane in self.lanes]
        opened = self.opened
        own = lanes[self.blocks % len(lanes)]
        limit = None if self.max_epochs is None else round(self.max_epochs * len(self.domain))
        pieces: list[_Piece] = []
        missing = self.block
        while missing:
            if own[0] < 0 or own[1] == self._length(own[0]):
                if limit is None or opened < limit:
                    own[:] = [opened, 0]
                    opened += 1
                else:
                    rest = [x for x in lanes if x[0] >= 0 and x[1] < self._length(x[0])]
                    if not rest:
                        raise self._end()
                    oldest = min(rest)
                    own[:], oldest[:] = oldest[:], [-1, 0]
                continue
            size = min(missing, self._length(own[0]) - own[1])
            pieces.append(_Piece(self._index(own[0]), own[1], own[1] + size))
            own[1] += size
            missing -= size
        self.lanes, self.opened = lanes, opened
        self.blocks += 1
        return pieces

    def _end(self) -> EndOfData:
        return EndOfData(
            f"the domain '{self.domain.name}' has been read {self.max_epochs:g} times, which is "
            "max_epochs. Add text, lower its weight, train on fewer tokens or raise max_epochs."
        )

    def _index(self, k: int) -> int:
        if k not in self._indices:
            epoch, place = divmod(k, len(self.domain))
            order = Permutation(len(self.domain), key(self.seed, self.domain.name, epoch))
            if len(self._indices) > 4 * len(self.lanes):
                self._indices.clear()
            self._indices[k] = order[place]
        return self._indices[k]

    def _length(self, k: int) -> int:
        return self.domain.length(self._index(k)) + len(self._front) + len(self._back)

    def _read(self, piece: _Piece) -> np.ndarray:
        """Read only the piece: a document may be a whole book, or a whole file."""
        start, stop = piece.start - len(self._front), piece.stop - len(self._front)
        length = self.domain.length(piece.index)
        inside = self.domain.read(piece.index, max(start, 0), max(min(stop, length), 0))
        front = self._front[piece.start : piece.stop]
        back = self._back[max(start - length, 0) : max(stop - length, 0)]
        return np.concatenate([front, inside, back])
