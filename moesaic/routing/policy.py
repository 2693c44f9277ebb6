"""What a cache policy is: which expert leaves when another is asked for and there is no room.

The rules that all policies share, for a cache of C experts and one sequence of requests:

* all requests of a token are tested against the content before that token;
* an expert asked for the first time fills an empty slot for nothing: with u distinct experts asked
  for before it, it is a hit exactly when u < C;
* then, request by request, an absent expert is admitted always; when the cache is full, the policy
  says which resident leaves.

So the hit rate of a cache that holds every expert is 1. Notation: S sequences, E experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections import defaultdict
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from moesaic.routing.requests import Requests

__all__ = ["History", "Policy", "PriorityPolicy"]


class Policy(ABC):
    """A way to run caches of all sizes at once."""

    takes_window: ClassVar[bool] = False
    """Whether the policy is made with `window`, the tokens that it looks ahead."""
    by_expert: ClassVar[bool] = False
    """Whether columns are experts, to be ordered by how often all samples ask for them."""

    @abstractmethod
    def first_sizes(self, requests: Requests) -> NDArray[np.int32]:
        """Count, per sequence, the requests that hit from each size on.

        Returns int32 [S, E]: column C - 1 counts the requests that miss in caches of fewer than C
        experts and hit in caches of C and more. Every row sums to the requests of its sequence.
        """


class History:
    """What a `PriorityPolicy` may look at when it chooses who leaves."""

    def __init__(self, tokens: list[list[int]]) -> None:
        self.tokens = tokens
        self.token = 0
        """Number of the token whose requests are being served."""
        self.clock = 0
        """Number of requests served so far."""
        self.last: dict[int, int] = {}
        """Clock of each expert's last request."""
        self.uses: dict[int, int] = defaultdict(int)
        """Requests so far."""
        self._when: dict[int, list[int]] = defaultdict(list)
        self._ends = np.cumsum([len(asked) for asked in tokens]).tolist()
        for clock, expert in enumerate(x for asked in tokens for x in asked):
            self._when[expert].append(clock)

    def next(self, expert: int) -> int | None:
        """Clock of the next request, the one being served included; None when there is none."""
        when = self._when[expert]
        place = bisect_left(when, self.clock)
        return when[place] if place < len(when) else None

    def ahead(self, expert: int, window: int) -> int:
        """Requests still to be served in `window` tokens, the current one included."""
        end = self._ends[min(self.token + window, len(self._ends)) - 1]
        when = self._when[expert]
        return bisect_left(when, end) - bisect_left(when, self.clock)


class PriorityPolicy(Policy):
    """A policy in a few lines of Python: the resident with the lowest priority leaves.

    The plain meaning of the rules, one cache after another: for trying ideas on small traces.

        class Oldest(PriorityPolicy):
            def priority(self, expert, history):
                return history.last[expert]

        hit_rates(experts, num_experts=8, policy=Oldest())
    """

    @abstractmethod
    def priority(self, expert: int, history: History) -> Any:
        """Return something that can be compared: residents with less leave first."""

    def first_sizes(self, requests: Requests) -> NDArray[np.int32]:
        """Simulate every size by itself."""
        hits_SC = np.zeros((len(requests.ids_SQ), requests.experts), dtype=np.int32)
        for row, ids_Q, starts_T in zip(hits_SC, requests.ids_SQ, requests.starts_ST, strict=True):
            edges = starts_T.tolist()
            tokens = [ids_Q[a:b].tolist() for a, b in pairwise(edges)]
            for size in range(1, requests.experts + 1):
                row[size - 1] = self._hits(tokens, size)
        return np.diff(hits_SC, axis=1, prepend=np.int32(0))

    def _hits(self, tokens: list[list[int]], size: int) -> int:
        history = History(tokens)
        resident: set[int] = set()
        hits = 0
        for history.token, asked in enumerate(tokens):
            distinct = len(history.last)
            for expert in asked:
                if expert in history.last:
                    hits += expert in resident
                else:
                    hits += distinct < size
                    distinct += 1
            for expert in asked:
                if expert not in resident:
                    if len(resident) == size:
                        resident.remove(min(resident, key=lambda e: self.priority(e, history)))
                    resident.add(expert)
                history.last[expert] = history.clock
                history.uses[expert] += 1
                history.clock += 1
        return hits
