"""Compute of routed experts: a reference that is the meaning, and fast code tested against it.

This room knows tensors and the attributes of transformers' experts modules, never configs or model
classes. `register()` makes `experts_implementation="moesaic"` known to transformers.
"""

from __future__ import annotations

NAME = "moesaic"


def register() -> None:
    """Register our experts function with transformers as "moesaic"; again changes nothing."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    from moesaic.kernels.select import experts_forward

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
