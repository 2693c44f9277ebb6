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

_REMEMBERED = 256
"""Places that are not worked out again; more than lanes are open at a time."""


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


class ShuffledDomain:
    """A domain's documents in an order that is new every epoch, and how far they have been opened.

    `count` of them are read; `unit` is what they are called.
    """

    def __init__(
        self,
        domain: TokenDomain,
        *,
        block: int,
        seed: int,
        max_epochs: float | None,
        count: int,
        unit: str = "documents",
        material: str = "text",
    ) -> None:
        self.domain = domain
        self.block = block
        self.seed = seed
        self.max_epochs = max_epochs
        self.opened = 0
        self.count, self.unit, self.material = count, unit, material
        self._indices: dict[int, int] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the cursor as JSON."""
        return {
            "documents": len(self.domain),
            "tokens": self.domain.tokens,
            "opened": self.opened,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the place that `state` names. Raises UserError when it does not fit this domain."""
        if (state["documents"], state["tokens"]) != (len(self.domain), self.domain.tokens):
            raise self._misfit(state)
        self.opened = int(state["opened"])

    @property
    def _limit(self) -> int | None:
        """How many may be opened in all."""
        return None if self.max_epochs is None else round(self.max_epochs * self.count)

    def _place(self, k: int) -> int:
        """Where the k-th one opened is, in range(count)."""
        if k not in self._indices:
            epoch, place = divmod(k, self.count)
            order = Permutation(self.count, key(self.seed, self.domain.name, epoch))
            if len(self._indices) > _REMEMBERED:
                self._indices.clear()
            self._indices[k] = order[place]
        return self._indices[k]

    def _end(self) -> EndOfData:
        return EndOfData(
            f"the domain '{self.domain.name}' has been read {self.max_epochs:g} times, which is "
            f"max_epochs. Add {self.material}, lower its weight, train on fewer tokens or raise "
            "max_epochs."
        )

    def _misfit(self, state: Mapping[str, Any]) -> UserError:
        return UserError(
            f"the saved position in the domain '{self.domain.name}' is one among "
            f"{state['documents']} {self.unit} of {state['tokens']} tokens, but the data has "
            f"{len(self.domain)} of {self.domain.tokens}. Resume with the data the run began with."
        )


class PackedDomain(ShuffledDomain):
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
        super().__init__(domain, block=block, seed=seed, max_epochs=max_epochs, count=len(domain))
        # Few documents: few lanes, or all of them would be open at once and none be finished.
        lanes = max(1, min(lanes, len(domain) // 4))
        self.blocks = 0
        self.lanes: list[list[int]] = [[-1, 0] for _ in range(lanes)]
        front = [] if domain.bos is None else [domain.bos]
        back = [] if domain.eos is None or domain.eos == domain.bos else [domain.eos]
        self._front = np.array(front, dtype=np.int64)
        self._back = np.array(back, dtype=np.int64)

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
        lanes = [list(lane) for lane in self.lanes]
        return super().state_dict() | {"blocks": self.blocks, "lanes": lanes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the place that `state` names. Raises UserError when it does not fit this domain."""
        lanes: Sequence[Sequence[int]] = state["lanes"]
        if len(lanes) != len(self.lanes):
            raise self._misfit(state)
        super().load_state_dict(state)
        self.blocks = int(state["blocks"])
        self.lanes = [[int(k), int(used)] for k, used in lanes]

    def _advance(self) -> list[_Piece]:
        lanes = [list(lane) for lane in self.lanes]
        opened = self.opened
        own = lanes[self.blocks % len(lanes)]
        limit = self._limit
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
            pieces.append(_Piece(self._place(own[0]), own[1], own[1] + size))
            own[1] += size
            missing -= size
        self.lanes, self.opened = lanes, opened
        self.blocks += 1
        return pieces

    def _length(self, k: int) -> int:
        return self.domain.length(self._place(k)) + len(self._front) + len(self._back)

    def _read(self, piece: _Piece) -> np.ndarray:
        """Read only the piece: a document may be a whole book, or a whole file."""
        start, stop = piece.start - len(self._front), piece.stop - len(self._front)
        length = self.domain.length(piece.index)
        inside = self.domain.read(piece.index, max(start, 0), max(min(stop, length), 0))
        front = self._front[piece.start : piece.stop]
        back = self._back[max(start - length, 0) : max(stop - length, 0)]
        return np.concatenate([front, inside, back])
