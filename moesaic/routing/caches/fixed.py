"""The fixed policy: the experts asked for most often overall stay, no other enters."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesaic.routing.caches import CACHES
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
        sequences, experts = len(requests.ids_SQ), requests.experts
        asked_SQ = np.arange(requests.ids_SQ.shape[1]) < requests.counts_S[:, None]
        flat = (requests.ids_SQ + experts * np.arange(sequences)[:, None])[asked_SQ]
        counts = np.bincount(flat, minlength=sequences * experts)
        return counts.reshape(sequences, experts).astype(np.int32)
