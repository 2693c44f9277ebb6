"""Requests to a cache of experts: who asks for what, in which order.

A sequence is what one cache serves, cold at its start: one sample in one layer, or one sample in
the whole model, where the experts of layer l are numbered from l E on and a token's requests come
layer by layer. A token's requests are in the order of its choices, the highest score first.

Notation: S sequences, T tokens, Q requests of the longest sequence, E experts that can be asked
for, G caches of a sample (L layers or 1), N samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moesaic.routing.compiled import compiled
from moesaic.routing.samples import Samples

__all__ = ["Requests", "Scope", "requests_of"]

Scope = Literal["layer", "model"]


@dataclass(frozen=True, eq=False)
class Requests:
    """Sequences of requests: sequence s asks at token t for `ids_SQ[s, starts_ST[s, t] : ...]`."""

    ids_SQ: NDArray[np.int32]
    starts_ST: NDArray[np.int32]
    """[S, T + 1]: where the requests of each token begin; the last entry is the number of all."""
    experts: int
    groups: int
    """G: sequence s is of sample s // G and cache s % G."""

    @property
    def counts_S(self) -> NDArray[np.int32]:
        """Number of requests of each sequence."""
        return self.starts_ST[:, -1]

    def part(self, start: int, stop: int) -> Requests:
        """Return the sequences from `start` up to `stop`."""
        return Requests(
            self.ids_SQ[start:stop], self.starts_ST[start:stop], self.experts, self.groups
        )


def requests_of(samples: Samples, scope: Scope) -> Requests:
    """Return the requests of some samples to caches of one layer each, or of the whole model."""
    count, length, layers, top_k = samples.experts_NTLK.shape
    groups, each = (layers, top_k) if scope == "layer" else (1, layers * top_k)
    ids_SQ = np.zeros((count * groups, length * each), dtype=np.int32)
    starts_ST = np.zeros((count * groups, length + 1), dtype=np.int32)
    _list_requests(
        samples.experts_NTLK, samples.lengths_N, groups, samples.num_experts, ids_SQ, starts_ST
    )
    experts = samples.num_experts * (1 if scope == "layer" else layers)
    return Requests(ids_SQ, starts_ST, experts, groups)


@compiled
def _list_requests(ids_NTLK: Any, lengths_N: Any, groups, experts, ids_SQ, starts_ST):  # type: ignore[no-untyped-def]
    layers = ids_NTLK.shape[2]
    each = layers // groups
    for n in range(ids_NTLK.shape[0]):
        for group in range(groups):
            s = n * groups + group
            asked = 0
            for t in range(ids_NTLK.shape[1]):
                starts_ST[s, t] = asked
                if t < lengths_N[n]:
                    for own in range(each):
                        layer = group * each + own
                        for k in range(ids_NTLK.shape[3]):
                            expert = ids_NTLK[n, t, layer, k]
                            if expert >= 0:
                                ids_SQ[s, asked] = expert + own * experts
                                asked += 1
            starts_ST[s, ids_NTLK.shape[1]] = asked
