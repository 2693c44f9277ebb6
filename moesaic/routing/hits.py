"""Hit rates of expert caches: per sample, and summed over samples with bootstrap intervals.

Notation: N samples, G caches of a sample (layers, or 1 for the whole model), E experts that a cache
can hold, P policies, D domains, B replicates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesaic.core.errors import UserError
from moesaic.routing.bootstrap import as_weights, interval
from moesaic.routing.caches import make_policy
from moesaic.routing.compiled import all_of, spread
from moesaic.routing.metric import Metric
from moesaic.routing.policy import Policy
from moesaic.routing.requests import Requests, Scope, requests_of
from moesaic.routing.samples import Samples, Space
from moesaic.routing.stacks import LANES

__all__ = ["CacheHits", "HitFigures", "count_hits", "rates_of"]

_REQUEST_BYTES = 1 << 26
"""What the requests of the samples simulated at once may take."""


def count_hits(
    samples: Samples, policies: Sequence[Policy], scope: Scope
) -> list[NDArray[np.int32]]:
    """Count, for each policy, the requests that hit from each size on: int32 [N, G, E]."""
    groups = samples.layers if scope == "layer" else 1
    lanes = max(1, LANES // groups)  # samples that fill the lanes
    each = 4 * samples.experts_NTLK[:1].size  # bytes of a sample's requests
    at_once = lanes * max(1, _REQUEST_BYTES // (each * lanes))
    found: list[list[NDArray[np.int32]]] = [[] for _ in policies]
    for first in range(0, len(samples), at_once):
        rows = slice(first, first + at_once)
        part = Samples(samples.experts_NTLK[rows], samples.lengths_N[rows], samples.num_experts)
        # several blocks a thread: some take longer
        listed = spread(partial(_requests, part, scope), len(part), multiple=lanes, each=2)
        counted = all_of([partial(p.first_sizes, block) for p in policies for block in listed])
        for place, parts in enumerate(found):
            parts += counted[place * len(listed) : (place + 1) * len(listed)]
    return [np.concatenate(parts).reshape(len(samples), groups, -1) for parts in found]


def _requests(samples: Samples, scope: Scope, start: int, stop: int) -> Requests:
    part = Samples(
        samples.experts_NTLK[start:stop], samples.lengths_N[start:stop], samples.num_experts
    )
    return requests_of(part, scope)


def rates_of(samples: Samples, policy: Policy, scope: Scope) -> NDArray[np.float32]:
    """Return the hit rate of every sample, cache and size: float32 [N, G, E]."""
    (first_NGE,) = count_hits(samples, [policy], scope)
    if policy.by_expert:
        order_GE = _most_used(first_NGE.sum(axis=0, dtype=np.int64))
        first_NGE = np.take_along_axis(first_NGE, order_GE[None], axis=2)
    hits_NGE = first_NGE.cumsum(axis=2, dtype=np.int64)
    return _share(hits_NGE, hits_NGE[..., -1:]).astype(np.float32)


@dataclass(frozen=True, eq=False)
class HitFigures:
    """Mean hit rates over samples: [G, E], column C - 1 for a cache of C experts."""

    rate: NDArray[np.float64]
    samples: NDArray[np.int64]
    """Samples with a request, [G]."""
    low: NDArray[np.float64] | None = None
    high: NDArray[np.float64] | None = None


class CacheHits(Metric):
    """Mean hit rates of caches of every size, with bootstrap intervals.

    `policies` maps a name of your own to (policy, window), such as {"sch-16": ("sch", 16)}. Memory:
    8 D P G E bytes, and B times as much with intervals.
    """

    def __init__(
        self,
        space: Space,
        *,
        policies: dict[str, tuple[str | Policy, int | None]],
        scope: Scope = "layer",
        bootstrap: int | ArrayLike | Sequence[ArrayLike] | None = None,
        samples: Sequence[int] | None = None,
        seed: int = 0,
        confidence: float = 0.95,
    ) -> None:
        super().__init__(space)
        self.scope: Scope = scope
        self.confidence = confidence
        self.policies = {
            name: make_policy(policy, window=window) for name, (policy, window) in policies.items()
        }
        domains = len(space.domains)
        self.weights_D = as_weights(bootstrap, samples, domains=domains, seed=seed)
        groups = space.layers if scope == "layer" else 1
        experts = space.num_experts * space.layers // groups
        shape = (domains, groups, experts)
        self.sums["samples"] = np.zeros(shape[:2], dtype=np.int64)
        if self.weights_D is not None:
            replicates = self.weights_D[0].shape[1]
            interval(0.0, np.zeros(replicates), confidence)  # too few are refused before the work
            self.sums["drawn samples"] = np.zeros((domains, groups, replicates))
        for name, policy in self.policies.items():
            self.sums[f"rate {name}"] = np.zeros(shape)
            if self.weights_D is not None:
                self.sums[f"drawn {name}"] = np.zeros((domains, groups, replicates, experts))
            if policy.by_expert:
                self.sums[f"asked {name}"] = np.zeros(shape, dtype=np.int64)

    def add(self, domain: int, rows_N: NDArray[np.int64], samples: Samples) -> None:
        """Add samples of one domain."""
        drawn_BN = None
        if self.weights_D is not None:
            weights_NB = self.weights_D[domain]
            if len(rows_N) and rows_N.max() >= len(weights_NB):
                raise UserError(
                    f"sample {rows_N.max()} of the domain '{self.space.domains[domain]}' arrived, "
                    f"but there are bootstrap weights for {len(weights_NB)}. Give as many as "
                    "samples."
                )
            drawn_BN = np.ascontiguousarray(weights_NB[rows_N].T, dtype=np.float64)
        counted = count_hits(samples, list(self.policies.values()), self.scope)
        for place, (name, policy) in enumerate(self.policies.items()):
            first_NGE = counted[place]
            asked_NG = first_NGE.sum(axis=2, dtype=np.int64)
            if place == 0:
                self.sums["samples"][domain] += (asked_NG > 0).sum(axis=0)
                if drawn_BN is not None:
                    self.sums["drawn samples"][domain] += (drawn_BN @ (asked_NG > 0)).T
            if policy.by_expert:
                self.sums[f"asked {name}"][domain] += first_NGE.sum(axis=0, dtype=np.int64)
            else:
                first_NGE = first_NGE.cumsum(axis=2, dtype=np.int32)
            for group in range(first_NGE.shape[1]):
                rate_NE = first_NGE[:, group] / np.maximum(asked_NG[:, group, None], 1)
                self.sums[f"rate {name}"][domain, group] += rate_NE.sum(axis=0)
                if drawn_BN is not None:
                    self.sums[f"drawn {name}"][domain, group] += drawn_BN @ rate_NE

    def result(self) -> dict[tuple[str, str], HitFigures]:
        """Return the figures of every (domain, policy)."""
        return {
            (domain, name): self.at(name, domain=domain)
            for domain in self.space.domains
            for name in self.policies
        }

    def at(self, name: str, *, domain: str) -> HitFigures:
        """Return the figures of one policy, by its name here, in one domain."""
        if name not in self.policies or domain not in self.space.domains:
            raise UserError(
                f"There is no '{name}' in a domain '{domain}'. Policies: "
                f"{', '.join(self.policies)}; domains: {', '.join(self.space.domains)}."
            )
        d = self.space.domains.index(domain)
        samples_G = self.sums["samples"][d]
        order_GE = None
        if self.policies[name].by_expert:
            order_GE = _most_used(self.sums[f"asked {name}"].sum(axis=0))

        def rates(sums: NDArray[Any], samples: NDArray[Any]) -> NDArray[np.float64]:
            if order_GE is not None:
                order = order_GE if sums.ndim == 2 else order_GE[:, None]
                sums = np.take_along_axis(sums, order, axis=-1).cumsum(axis=-1)
            return _share(sums, samples[..., None])

        rate_GE = rates(self.sums[f"rate {name}"][d], samples_G)
        if self.weights_D is None:
            return HitFigures(rate_GE, samples_G)
        drawn_GBE = rates(self.sums[f"drawn {name}"][d], self.sums["drawn samples"][d])
        low, high = interval(rate_GE, np.moveaxis(drawn_GBE, 1, 2), self.confidence)
        return HitFigures(rate_GE, samples_G, low, high)


def _most_used(counts_GE: NDArray[np.int64]) -> NDArray[np.int64]:
    """Experts by number of requests, most first; the smaller id among equals."""
    return np.argsort(-counts_GE, axis=-1, kind="stable")


def _share(part: NDArray[Any], whole: NDArray[Any]) -> NDArray[np.float64]:
    """Divide; NaN where there is nothing to divide by."""
    return np.where(whole > 0, part / np.where(whole > 0, whole, 1), np.nan)
