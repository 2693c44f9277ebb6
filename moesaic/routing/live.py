"""A cache of experts that is asked as it goes: what it holds, and hits by the simulation's rule.

The rules are those of `moesaic.routing.policy`, for one size and without knowing what comes: the
requests served so far count as `caches.hit_rates` counts them on the same routing, exactly.

Notation: R rows, K requests of a row, L layers, E experts that can be asked for, C experts held.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.core.errors import UserError, unknown
from moesaic.routing.compiled import compiled
from moesaic.routing.policy import History, Policy, PriorityPolicy

__all__ = ["LIVE", "LiveCache", "PassBooks", "live_cache"]

LIVE = ("lru", "lfu", "fixed")
"""Policies by name that need not know what comes."""


class LiveCache(ABC):
    """One cache of `size` experts of `experts`; `resident_E` says which it holds."""

    def __init__(self, size: int, experts: int) -> None:
        self.size = size
        self.hits = 0
        self.requests = 0
        self.resident_E = np.zeros(experts, dtype=np.bool_)

    @abstractmethod
    def serve(self, ids_RK: NDArray[np.int64]) -> None:
        """Serve requests row by row; a negative id is none. Counts hits, moves experts."""

    @abstractmethod
    def clear(self) -> None:
        """Forget everything served, and what is held."""

    def _start(self) -> None:
        self.hits = self.requests = 0


def live_cache(
    policy: str | Policy, size: int, experts: int, usage_E: NDArray[Any] | None = None
) -> LiveCache:
    """Make the cache of a policy. Raises UserError for one that looks ahead, or lacks `usage_E`."""
    if isinstance(policy, PriorityPolicy):
        return _Ranked(size, experts, policy)
    if isinstance(policy, Policy):
        raise UserError(
            f"{type(policy).__name__} cannot run while the model does: it simulates whole traces. "
            f"Use {', '.join(LIVE)}, or derive it from PriorityPolicy."
        )
    if policy in ("belady", "sch"):
        raise UserError(
            f"policy='{policy}' knows the future, which a running model does not. Use "
            f"{', '.join(LIVE)}; `moesaic route cache` says what '{policy}' would reach."
        )
    if policy not in LIVE:
        raise unknown("policy", str(policy), LIVE)
    if policy != "fixed":
        return _Recent(size, experts, by_uses=policy == "lfu")
    if usage_E is None:
        raise UserError(
            "policy='fixed' keeps the experts used most, but usage was not given. Give usage: a "
            "trace, or counts [layers, experts]."
        )
    return _Fixed(size, experts, np.asarray(usage_E))


class _Recent(LiveCache):
    """LRU, or with `by_uses` LFU."""

    def __init__(self, size: int, experts: int, *, by_uses: bool) -> None:
        super().__init__(size, experts)
        self.by_uses = by_uses
        self.last_E = np.zeros(experts, dtype=np.int64)
        self.uses_E = np.zeros(experts, dtype=np.int64)
        self.held_C = np.full(size, -1, dtype=np.int64)
        self.state = np.zeros(3, dtype=np.int64)  # clock, distinct experts so far, experts held

    def serve(self, ids_RK: NDArray[np.int64]) -> None:
        hits, asked = _serve(
            ids_RK,
            self.by_uses,
            self.last_E,
            self.uses_E,
            self.resident_E,
            self.held_C,
            self.state,
        )
        self.hits += int(hits)
        self.requests += int(asked)

    def clear(self) -> None:
        self._start()
        for array in (self.last_E, self.uses_E, self.resident_E, self.state):
            array[:] = 0


@compiled
def _serve(ids_RK, by_uses, last_E, uses_E, resident_E, held_C, state):  # type: ignore[no-untyped-def]
    hits = 0
    start = state[0]
    for r in range(ids_RK.shape[0]):
        distinct = state[1]
        for k in range(ids_RK.shape[1]):
            expert = ids_RK[r, k]
            again = expert < 0
            for before in range(k):
                again = again or ids_RK[r, before] == expert
            if again:
                continue
            if uses_E[expert] > 0:
                hits += resident_E[expert]
            else:
                hits += distinct < held_C.shape[0]
                distinct += 1
        for k in range(ids_RK.shape[1]):
            expert = ids_RK[r, k]
            again = expert < 0
            for before in range(k):
                again = again or ids_RK[r, before] == expert
            if again:
                continue
            if not resident_E[expert]:
                place = state[2]
                if place < held_C.shape[0]:
                    state[2] += 1
                else:
                    place = 0
                    for c in range(1, held_C.shape[0]):
                        one, least = held_C[c], held_C[place]
                        if by_uses and uses_E[one] != uses_E[least]:
                            if uses_E[one] < uses_E[least]:
                                place = c
                        elif last_E[one] < last_E[least]:
                            place = c
                    resident_E[held_C[place]] = False
                held_C[place] = expert
                resident_E[expert] = True
            if uses_E[expert] == 0:
                state[1] += 1
            last_E[expert] = state[0]
            uses_E[expert] += 1
            state[0] += 1
    return hits, state[0] - start


class _Fixed(LiveCache):
    """The experts used most stay; the smaller id among equals."""

    def __init__(self, size: int, experts: int, usage_E: NDArray[Any]) -> None:
        super().__init__(size, experts)
        self.resident_E[np.argsort(-usage_E, kind="stable")[:size]] = True

    def serve(self, ids_RK: NDArray[np.int64]) -> None:
        for ids_K in ids_RK:
            asked_K = np.unique(ids_K[ids_K >= 0])
            self.requests += len(asked_K)
            self.hits += int(self.resident_E[asked_K].sum())

    def clear(self) -> None:
        self._start()


class _Ranked(LiveCache):
    """A `PriorityPolicy`, in plain Python."""

    def __init__(self, size: int, experts: int, policy: PriorityPolicy) -> None:
        super().__init__(size, experts)
        self.policy = policy
        self.past = _Past()

    def serve(self, ids_RK: NDArray[np.int64]) -> None:
        past, resident_E = self.past, self.resident_E
        for ids_K in ids_RK:
            asked = list(dict.fromkeys(int(expert) for expert in ids_K if expert >= 0))
            distinct = len(past.last)
            for expert in asked:
                if expert in past.last:
                    self.hits += bool(resident_E[expert])
                else:
                    self.hits += distinct < self.size
                    distinct += 1
            for expert in asked:
                if not resident_E[expert]:
                    held = np.flatnonzero(resident_E).tolist()
                    if len(held) == self.size:
                        leaves = min(held, key=lambda e: self.policy.priority(e, past))
                        resident_E[leaves] = False
                    resident_E[expert] = True
                past.last[expert] = past.clock
                past.uses[expert] += 1
                past.clock += 1
            self.requests += len(asked)
            past.token += 1

    def clear(self) -> None:
        self._start()
        self.past = _Past()
        self.resident_E[:] = False


class _Past(History):
    """A history without a future."""

    def __init__(self) -> None:
        super().__init__([])

    def next(self, expert: int) -> int | None:
        raise self._unknown()

    def ahead(self, expert: int, window: int) -> int:
        raise self._unknown()

    @staticmethod
    def _unknown() -> UserError:
        return UserError(
            "the policy asks what comes next, which a running model does not know. Use "
            "history.last and history.uses only."
        )


class PassBooks:
    """Hits of one cache for all layers, which the rule counts token by token.

    A model runs layer by layer, so the ids of a forward pass are kept until its last layer has
    chosen. A layer that a pass leaves out asks for nothing.
    """

    def __init__(self, cache: LiveCache, layers: int) -> None:
        self.cache = cache
        self.layers = layers
        self.waiting: dict[int, NDArray[np.int64]] = {}

    def report(self, place: int, ids_RK: NDArray[np.int64]) -> None:
        """Take what the layer at `place` asked for, already numbered over all layers."""
        if place in self.waiting:
            self.settle()
        self.waiting[place] = ids_RK
        if len(self.waiting) == self.layers:
            self.settle()

    def settle(self) -> None:
        """Count the pass that is waiting."""
        if self.waiting:
            rows = max(map(len, self.waiting.values()))
            parts = [ids for _, ids in sorted(self.waiting.items()) if len(ids) == rows]
            self.cache.serve(np.concatenate(parts, axis=1))
            self.waiting.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.waiting.clear()
        self.cache.clear()
