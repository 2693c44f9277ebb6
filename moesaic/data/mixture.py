"""Blocks drawn from weighted domains: one endless, resumable stream for the whole run.

Draw g picks its domain with the g-th pseudorandom number and takes that domain's next block. The
sequence of draws is one and the same however many processes read it: of every `world` draws,
process `rank` reads its own and steps over the others, so all processes hold the same cursor.

Epoch policy: a domain that has been read to its end is shuffled anew and read again.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moesaic.core.errors import UserError
from moesaic.data.conversations import ConversationDomain, open_conversations
from moesaic.data.packing import Block, EndOfData, PackedDomain
from moesaic.data.portions import Portions, domain_weights
from moesaic.data.shuffle import key, uniform
from moesaic.data.sources import Data
from moesaic.data.tokens import TokenDomain, open_tokens

Weights = Portions | Literal["size"] | Mapping[str, float]


class MixtureStream:
    """Draws blocks of `block` token ids from `domains` in proportion to their weights.

    `weights` is a preset (`moesaic.data.portions`), ``size`` (in proportion to tokens) or a
    mapping. `conversations`: the domains are those of `open_conversations`. Iterating ends quietly
    where `next_block` raises EndOfData. The same arguments give the same blocks on every machine;
    `state_dict` is JSON, and loading it is immediate, not a replay.
    """

    def __init__(
        self,
        domains: Mapping[str, TokenDomain],
        *,
        block: int,
        weights: Weights = "uniform",
        seed: int = 0,
        lanes: int = 8,
        max_epochs: float | None = None,
        conversations: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if not 0 <= rank < world:
            raise UserError(f"rank={rank} of world={world}. Give 0 <= rank < world.")
        if block < 1:
            raise UserError(f"block={block}. A block holds at least one token.")
        options: Any = {"block": block, "seed": seed, "max_epochs": max_epochs}
        self.domains: dict[str, PackedDomain | ConversationDomain] = {
            name: ConversationDomain(domain, **options)
            if conversations
            else PackedDomain(domain, lanes=lanes, **options)
            for name, domain in domains.items()
        }
        self._names = list(self.domains)
        self.seed = seed
        self.block = block
        self.rank = rank
        self.world = world
        self.draws = 0
        self._key = key(seed, "domain of each draw")
        self.weights: dict[str, float] = {}
        self.set_weights(
            {name: packed.epoch_tokens for name, packed in self.domains.items()}
            if weights == "size"
            else weights
        )

    @property
    def epochs(self) -> dict[str, float]:
        """Passes over each domain so far, by all processes together."""
        return {name: packed.epochs for name, packed in self.domains.items()}

    def set_weights(self, weights: Portions | Mapping[str, float]) -> None:
        """Draw by these weights from now on (they need not sum to 1).

        Raises UserError as `domain_weights` does.
        """
        self.weights = domain_weights(weights, list(self.domains))
        self._bounds = list(itertools.accumulate(self.weights.values()))

    def next_block(self) -> tuple[str, np.ndarray]:
        """Return the next block's domain and its ids, int64 [block]. Raises EndOfData."""
        block = self.next()
        return block.domain, block.ids

    def next(self) -> Block:
        """Return the next block with its document boundaries. Raises EndOfData."""
        mine: Block | None = None
        for turn in range(self.world):
            packed = self.domains[self._draw()]
            if turn == self.rank:
                mine = packed.take()
            else:
                packed.skip()
            self.draws += 1
        assert mine is not None
        return mine

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        while True:
            try:
                yield self.next_block()
            except EndOfData:
                return

    def state_dict(self) -> dict[str, Any]:
        """Return seed, draws, weights and the cursor of every domain as JSON."""
        return {
            "seed": self.seed,
            "block": self.block,
            "draws": self.draws,
            "weights": dict(self.weights),
            "domains": {name: packed.state_dict() for name, packed in self.domains.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken. Raises UserError when seed, block size or data differ."""
        for name, mine in (("seed", self.seed), ("block", self.block)):
            if state[name] != mine:
                raise UserError(
                    f"the saved data position has {name}={state[name]}, this run {name}={mine}. "
                    "Resume with the settings the run began with."
                )
        if set(state["domains"]) != set(self.domains):
            raise UserError(
                f"the saved data position has the domains {', '.join(state['domains'])}, this run "
                f"{', '.join(self.domains)}. Resume with the data the run began with."
            )
        for name, packed in self.domains.items():
            packed.load_state_dict(state["domains"][name])
        self.draws = int(state["draws"])
        self.set_weights(state["weights"])

    def _draw(self) -> str:
        point = uniform(self._key, self.draws) * self._bounds[-1]
        return self._names[min(bisect.bisect_right(self._bounds, point), len(self._names) - 1)]


def open_mixture(
    data: Data,
    tokenizer: Any,
    *,
    block: int,
    weights: Weights = "uniform",
    seed: int = 0,
    cache: Path | str | None = None,
    max_epochs: float | None = None,
    conversations: bool = False,
    rank: int = 0,
    world: int = 1,
) -> MixtureStream:
    """Tokenise `data` (or find it in `cache`) and return the stream of its blocks.

    With `conversations` the data holds those, and a block is whole ones with their labels.
    """
    opened = open_conversations if conversations else open_tokens
    return MixtureStream(
        opened(data, tokenizer, cache=cache),
        block=block,
        weights=weights,
        seed=seed,
        max_epochs=max_epochs,
        conversations=conversations,
        rank=rank,
        world=world,
    )
