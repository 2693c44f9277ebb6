"""The fixed policy: the experts asked for most often overall stay, no other enters."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesaic.routing.caches import CACHES
from moesaic.routing.compiled import compiled
from moesaic.routing.policy import Policy
from moesaic.routing.requests import Requests


@CACHES.register
class Fixed(Policy):
    """The experts asked for most often in all the text are loaded once and stay.

    A request hits when its expert is among them. Content is chosen per cache, over all samples (and
    domains) given; the smaller id among equals. Nothing is filled for free.
    """

    by_expert = True

    def first_sizes(self, requests: Requests) -> NDArray[np.int32]:
        """Count the requests for each expert: the order of loading comes from all samples."""
        counts_SE = np.zeros((len(requests.ids_SQ), requests.experts), dtype=np.int32)
        _count(requests.ids_SQ, requests.counts_S, counts_SE)
        return counts_SE


@compiled
def _count(ids_SQ, asked_S, counts_SE):  # type: ignore[no-untyped-def]
    for s in range(ids_SQ.shape[0]):
        for q in range(asked_S[s]):
            counts_SE[s, ids_SQ[s, q]] += 1
