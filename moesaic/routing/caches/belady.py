"""Belady's policy: the expert that is asked for again the latest leaves (an oracle)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesaic.routing.caches import CACHES
from moesaic.routing.policy import Policy
from moesaic.routing.requests import Requests
from moesaic.routing.stacks import belady_sizes


@CACHES.register
class Belady(Policy):
    """The expert asked for again the latest leaves; knows the whole future.

    Of experts that nobody asks for again, the one with the largest id leaves.
    """

    def first_sizes(self, requests: Requests) -> NDArray[np.int32]:
        """Count requests by their place in the stack."""
        return belady_sizes(requests)
