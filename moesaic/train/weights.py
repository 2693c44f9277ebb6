"""Which share of the training blocks each domain gets: named portions, and two rules that adapt them.

Source: LLaMA-MoE (spec/llama-moe-v1.md, section 4), after Sheared-LLaMA's dynamic batch loading.
A domain's *excess* is its held-out loss minus the loss of a reference model on the same text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from moesaic.core.errors import UserError, nearest

Portions = Literal["llama", "sheared", "uniform"]
Rule = Literal["sheared", "sheared-paper"]

# Our names of the seven SlimPajama domains, and the names found for them in the wild.
_ALIASES: dict[str, tuple[str, ...]] = {
    "commoncrawl": ("commoncrawl", "common_crawl", "cc", "en_cc"),
    "c4": ("c4", "en_c4"),
    "github": ("github",),
    "wikipedia": ("wikipedia", "wiki", "en_wikipedia"),
    "books": ("books", "book", "en_book"),
    "arxiv": ("arxiv", "en_arxiv"),
    "stackexchange": ("stackexchange", "stack", "en_stack"),
}
_CANONICAL = {alias: name for name, aliases in _ALIASES.items() for alias in aliases}

PORTIONS: dict[str, dict[str, float]] = {
    "llama": {
        "commoncrawl": 0.67,
        "c4": 0.15,
        "github": 0.045,
        "wikipedia": 0.045,
        "books": 0.045,
        "arxiv": 0.025,
        "stackexchange": 0.02,
    },
    "sheared": {
        "commoncrawl": 0.361,
        "c4": 0.492,
        "github": 0.008,
        "wikipedia": 0.031,
        "books": 0.091,
        "arxiv": 0.007,
        "stackexchange": 0.01,
    },
}

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


def domain_weights(
    portions: Portions | Mapping[str, float], domains: Sequence[str]
) -> dict[str, float]:
    """Return the weight of each of `domains`, summing to 1.

    A preset is cut down to the domains present and renormalised, so that three of the seven keep their
    ratios. Raises UserError for a domain that the preset does not know, a domain without a weight, a
    weight without a domain, a negative weight, or weights that are all zero.
    """
    if portions == "uniform":
        return {name: 1.0 / len(domains) for name in domains}
    if isinstance(portions, str):
        preset = PORTIONS[portions]
        strangers = [name for name in domains if name.lower() not in _CANONICAL]
        if strangers:
            raise UserError(
                f"the weights '{portions}' know the domains {', '.join(preset)}, not "
                f"'{strangers[0]}'. Use 'uniform', or give each domain a number."
            )
        chosen = {name: preset[_CANONICAL[name.lower()]] for name in domains}
    else:
        chosen = _match(portions, domains, what="weights")
    negative = [name for name, weight in chosen.items() if not weight >= 0]
    if negative:
        raise UserError(
            f"weights.{negative[0]} is {chosen[negative[0]]}. A weight is 0 or larger."
        )
    total = sum(chosen.values())
    if total <= 0:
        raise UserError("every domain weight is 0. Give at least one domain a positive weight.")
    return {name: weight / total for name, weight in chosen.items()}


def reference_losses(
    reference: Literal["llama2-7b"] | Mapping[str, float], domains: Sequence[str]
) -> dict[str, float]:
    """Return the reference loss of each of `domains` (nats a token). Raises UserError for a gap."""
    if isinstance(reference, str):
        strangers = [name for name in domains if name.lower() not in _CANONICAL]
        if strangers:
            raise UserError(
                f"the reference '{reference}' has no loss for '{strangers[0]}'. Give reference as a "
                "mapping of domain to loss."
            )
        return {name: LLAMA2_7B_REFERENCE[_CANONICAL[name.lower()]] for name in domains}
    return _match(reference, domains, what="reference")


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
    with np.errstate(divide="ignore"):  # a weight of 0 stays 0 before smoothing
        log_weights = np.log(np.array([weights[name] for name in names]))
    score = log_weights + (rate * excess if rule == "sheared" else np.maximum(0.0, excess))
    shares = np.exp(score - score.max())
    shares /= shares.sum()
    if rule == "sheared":
        shares = (1.0 - smoothing) * shares + smoothing / len(names)
        shares /= shares.sum()
    return dict(zip(names, shares.tolist(), strict=True))


def _match(given: Mapping[str, float], domains: Sequence[str], *, what: str) -> dict[str, float]:
    unknown = [name for name in given if name not in domains]
    if unknown:
        raise UserError(
            f"{what}.{unknown[0]}: there is no such domain.{nearest(unknown[0], domains)} "
            f"The data has: {', '.join(domains)}."
        )
    absent = [name for name in domains if name not in given]
    if absent:
        raise UserError(f"{what} has no value for the domain '{absent[0]}'. Add {what}.{absent[0]}.")
    return {name: float(given[name]) for name in domains}
