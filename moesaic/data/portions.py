"""How much of each domain: named portions of the seven SlimPajama domains, and checks on one's own.

Source: LLaMA-MoE (spec llama-moe-v1, section 4). ``llama`` are the portions LLaMA was trained on,
``sheared`` those that Sheared-LLaMA arrived at, which the released LLaMA-MoE models used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from moesaic.core.errors import UserError, nearest

Portions = Literal["llama", "sheared", "uniform"]

# Our names of the seven domains, and the names they go by elsewhere.
ALIASES: dict[str, tuple[str, ...]] = {
    "commoncrawl": ("commoncrawl", "common_crawl", "cc", "en_cc", "redpajamacommoncrawl"),
    "c4": ("c4", "en_c4", "redpajamac4"),
    "github": ("github", "code", "en_github", "redpajamagithub"),
    "wikipedia": ("wikipedia", "wiki", "en_wikipedia", "redpajamawikipedia"),
    "books": ("books", "book", "en_book", "redpajamabook"),
    "arxiv": ("arxiv", "en_arxiv", "redpajamaarxiv"),
    "stackexchange": ("stackexchange", "stack", "en_stack", "redpajamastackexchange"),
}
_CANONICAL = {alias: name for name, aliases in ALIASES.items() for alias in aliases}

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


def domain_weights(
    weights: Portions | Mapping[str, float], domains: Sequence[str]
) -> dict[str, float]:
    """Return the weight of each of `domains`, in their order, summing to 1.

    A preset is cut down to the domains present and renormalised, so that three of the seven keep
    their ratios. Raises UserError for an unknown preset, a domain that the preset does not know, a
    weight without a domain, a domain without a weight, and a weight that is not above 0.
    """
    if not domains:
        raise UserError("there is no domain to weight. Give data with at least one domain.")
    if weights == "uniform":
        return dict.fromkeys(domains, 1.0 / len(domains))
    if isinstance(weights, str):
        if weights not in PORTIONS:
            names = [*PORTIONS, "uniform"]
            raise UserError(
                f"weights '{weights}' are unknown.{nearest(weights, names)} Use "
                f"{', '.join(names)}, "
                "or give each domain a number."
            )
        preset = PORTIONS[weights]
        named = {name: canonical(name, of=f"the weights '{weights}'") for name in domains}
        chosen = {name: preset[known] for name, known in named.items()}
    else:
        chosen = match(weights, domains, what="weights")
    for name, weight in chosen.items():
        if not (weight > 0 and math.isfinite(weight)):
            raise UserError(
                f"weights.{name} is {weight}. Give a number above 0, or leave the domain "
                "out of the data."
            )
    total = math.fsum(chosen.values())
    return {name: weight / total for name, weight in chosen.items()}


def canonical(name: str, *, of: str) -> str:
    """Return our name of one of the seven domains. UserError when `of` does not know `name`."""
    known = _CANONICAL.get(name.lower().replace("-", "_"))
    if known is None:
        raise UserError(
            f"{of} know the domains {', '.join(ALIASES)}, not '{name}'.{nearest(name, _CANONICAL)} "
            "Rename the domain in data, use 'uniform', or give each domain a number."
        )
    return known


def match(given: Mapping[str, float], domains: Sequence[str], *, what: str) -> dict[str, float]:
    """Return `given` in the order of `domains`. UserError unless both name the same domains."""
    for name in given:
        if name not in domains:
            raise UserError(
                f"{what}.{name}: there is no such domain.{nearest(name, domains)} "
                f"The data has: {', '.join(domains)}."
            )
    for name in domains:
        if name not in given:
            raise UserError(f"{what} has no value for the domain '{name}'. Add {what}.{name}.")
    return {name: float(given[name]) for name in domains}
