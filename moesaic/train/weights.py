"""Domain weights that follow held-out loss: two rules, and the losses they compare with.

Source: LLaMA-MoE (spec/llama-moe-v1.md, section 4), after Sheared-LLaMA's dynamic batch loading.
A domain's *excess* is its held-out loss minus the loss of a reference model on the same text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from moesaic.core.errors import UserError
from moesaic.data.portions import canonical, match

Rule = Literal["sheared", "sheared-paper"]

# Held-out losses of LLaMA-2-7B on SlimPajama, in nats a token: only meaningful for its tokenizer.
LLAMA2_7B_REFERENCE: dict[str, float] = {
    "books": 1.925248146057129,
    "wikipedia": 1.5899001359939575,
    "stackexchange": 1.4974864721298218,
    "github": 0.6984495520591736,
    "c4": 2.074881076812744,
    "commoncrawl": 1.6916865110397339,
    "arxiv": 1.2408167123794556,
}


def reference_losses(
    reference: Literal["llama2-7b"] | Mapping[str, float], domains: Sequence[str]
) -> dict[str, float]:
    """Return the reference loss of each of `domains` (nats a token). Raises UserError for a gap."""
    if isinstance(reference, str):
        of = f"the reference losses '{reference}'"
        return {name: LLAMA2_7B_REFERENCE[canonical(name, of=of)] for name in domains}
    return match(reference, domains, what="data.dynamic.reference")


def update_weights(
    weights: Mapping[str, float],
    losses: Mapping[str, float],
    reference: Mapping[str, float],
    *,
    rule: Rule,
    rate: float = 1.0,
    smoothing: float = 1e-4,
) -> dict[str, float]:
    """Return new domain weights from held-out `losses`; domains that lag their reference gain.

    ``sheared``: w <- (1 - c) softmax(log w + rate * excess) + c / n, so excess may be negative and no
    domain vanishes (c is `smoothing`). ``sheared-paper``: w proportional to w exp(max(0, excess)).
    """
    names = list(weights)
    excess = np.array([losses[name] - reference[name] for name in names])
    if not np.isfinite(excess).all():
        raise UserError("a held-out or reference loss is not a finite number; weights cannot follow.")
    score = np.log(np.array([weights[name] for name in names])) + (
        rate * excess if rule == "sheared" else np.maximum(0.0, excess)
    )
    shares = np.exp(score - score.max())
    shares /= shares.sum()
    if rule == "sheared":
        shares = (1.0 - smoothing) * shares + smoothing / len(names)
        shares /= shares.sum()
    return dict(zip(names, shares.tolist(), strict=True))
