"""Cache simulations: hit rates of expert caches of every size at once, one policy a file.

A policy is a `moesaic.routing.policy.Policy` decorated with `@CACHES.register`; its key is its
file's name. Nothing heavy is imported before a policy is used.

    from moesaic.routing import caches
    rates = caches.hit_rates(experts, num_experts=64, policy="sch", window=16)
    rates[:, 15]                     # hit rate of each sample with a cache of 16 experts
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from moesaic.core.errors import UserError
from moesaic.core.registry import Registry

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    from moesaic.routing.policy import Policy

__all__ = ["CACHES", "PolicyName", "hit_rates", "make_policy"]

CACHES: Registry[type[Policy]] = Registry("cache policy", "moesaic.routing.caches")

PolicyName = Literal["lru", "lfu", "belady", "sch", "fixed"]


def make_policy(policy: PolicyName | str | Policy, *, window: int | None = None) -> Policy:
    """Return the policy of a name, or the policy itself. Raises UserError for what it cannot be."""
    from moesaic.routing.policy import Policy

    if isinstance(policy, Policy):
        return policy
    found: Any = CACHES.get(policy)
    if not found.takes_window:
        made: Policy = found()
        return made
    if window is None:
        raise UserError(
            f"The cache policy '{policy}' looks ahead, but no window was given. Give window: the "
            "number of tokens it sees, the current one included."
        )
    made = found(window=window)
    return made


def hit_rates(
    experts: ArrayLike | Sequence[ArrayLike],
    *,
    num_experts: int,
    policy: PolicyName | str | Policy = "lru",
    window: int | None = None,
    scope: Literal["layer", "model"] = "layer",
    mask: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
) -> NDArray[np.float32]:
    """Return the share of requests that hit, of every sample, in caches of every size.

    `experts`, `mask` and `lengths` are as in `moesaic.routing.samples.read_samples`. [samples,
    tokens, k] gives float32 [samples, E], column C - 1 for a cache of C experts; [samples, tokens,
    layers, k] gives [samples, layers, E], a cache for each layer, or for `scope="model"` [samples,
    layers * E], one cache for all layers. `window` is for "sch" only, others ignore it: the tokens
    it sees, the current one included. "fixed" holds the experts that the samples given ask for most
    often. Samples without a request are NaN. The rules are in `moesaic.routing.policy`.

    Raises UserError for an unknown policy or scope, a window below 1 and bad arrays.
    """
    from moesaic.routing.hits import rates_of
    from moesaic.routing.samples import read_samples

    if scope not in ("layer", "model"):
        raise UserError(f"scope='{scope}' is unknown. Use layer or model.")
    chosen = make_policy(policy, window=window)
    samples = read_samples(experts, num_experts=num_experts, mask=mask, lengths=lengths)
    rates_NGE = rates_of(samples, chosen, scope)
    return rates_NGE[:, 0] if scope == "model" or not samples.layered else rates_NGE
