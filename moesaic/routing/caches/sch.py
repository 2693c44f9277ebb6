"""The SCH policy: the expert asked for least often in the tokens just ahead leaves (an oracle)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesaic.core.errors import UserError
from moesaic.routing.caches import CACHES
from moesaic.routing.policy import Policy
from moesaic.routing.requests import Requests
from moesaic.routing.stacks import sch_sizes


@CACHES.register
class SCH(Policy):
    """Segment cache best: the expert least asked for in the next tokens leaves.

    Segment cache best hit rate, arXiv 2505.16056, section 3.2. While token t is served, the window
    of m tokens is t to t + m - 1, less the requests of t already served; among equals the expert
    not asked for the longest leaves. It knows frequencies only; m = 1 is nearly LRU.
    """

    takes_window = True

    def __init__(self, *, window: int) -> None:
        """Look at `window` tokens, the current one included. Raises UserError below 1."""
        if isinstance(window, bool) or not isinstance(window, (int, np.integer)) or window < 1:
            raise UserError(f"window={window!r} was given. Give a number of tokens, 1 or more.")
        self.window = int(window)

    def first_sizes(self, requests: Requests) -> NDArray[np.int32]:
        """Count requests by their place in the stack."""
        return sch_sizes(requests, self.window)
