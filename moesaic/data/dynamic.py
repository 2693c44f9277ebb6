"""Domain weights that follow the losses: more of what lags behind a reference model.

After an evaluation, a domain's *excess* is its held-out loss minus the reference model's loss on
the same domain. Source: LLaMA-MoE (spec llama-moe-v1, section 4), after Sheared-LLaMA's dynamic
batch loading (arXiv 2310.06694, algorithm 1).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from moesaic.core.errors import UserError, nearest
from moesaic.data.portions import canonical, match

Rule = Literal["sheared_llama", "sheared_llama_paper"]

# Held-out losses of LLaMA-2-7B on SlimPajama, nats a token of its own tokenizer: with another
# tokenizer a token is another amount of text, and the figures mean nothing.
LLAMA2_7B: dict[str, float] = {
    "books": 1.925248146057129,
    "wikipedia": 1.5899001359939575,
    "stackexchange": 1.4974864721298218,
    "github": 0.6984495520591736,
    "c4": 2.074881076812744,
    "commoncrawl": 1.6916865110397339,
    "arxiv": 1.2408167123794556,
}


def sheared_llama(
    weights: Mapping[str, float],
    losses: Mapping[str, float],
    reference: Mapping[str, float],
    *,
    rate: float = 1.0,
    smoothing: float = 1e-4,
) -> dict[str, float]:
    """Return w' = (1 - c) softmax(log w + rate * excess) + c / n, summing to 1.

    A negative excess lowers a weight; `smoothing` c keeps every domain above c / n.
    """
    names, weights_n, excess_n = _arrays(weights, losses, reference)
    shares_n = _softmax(_log(weights_n) + rate * excess_n)
    shares_n = (1.0 - smoothing) * shares_n + smoothing / len(names)
    return dict(zip(names, (shares_n / shares_n.sum()).tolist(), strict=True))


def sheared_llama_paper(
    weights: Mapping[str, float], losses: Mapping[str, float], reference: Mapping[str, float]
) -> dict[str, float]:
    """Return w' proportional to w exp(max(0, excess)): only domains that lag behind gain."""
    names, weights_n, excess_n = _arrays(weights, losses, reference)
    shares_n = _softmax(_log(weights_n) + np.maximum(0.0, excess_n))
    return dict(zip(names, shares_n.tolist(), strict=True))


RULES: dict[Rule, Callable[..., dict[str, float]]] = {
    "sheared_llama": sheared_llama,
    "sheared_llama_paper": sheared_llama_paper,
}


def update_weights(
    rule: Rule,
    weights: Mapping[str, float],
    losses: Mapping[str, float],
    reference: Mapping[str, float],
    **options: float,
) -> dict[str, float]:
    """Apply one of the rules; `options` as the rule's own. Raises UserError for an unknown rule."""
    if rule not in RULES:
        raise UserError(
            f"Unknown rule '{rule}'.{nearest(rule, RULES)} Available: {', '.join(RULES)}."
        )
    return RULES[rule](weights, losses, reference, **options)


def reference_losses(
    reference: Literal["llama2-7b"] | Mapping[str, float] | Path | str, domains: Sequence[str]
) -> dict[str, float]:
    """Return the reference loss of each of `domains` (nats a token).

    `reference` is the name ``llama2-7b``, a mapping, or a JSON file with one (what
    ``held_out_loss`` returns: its ``mean`` is not a domain). Raises UserError for a domain without
    a loss, a loss without a domain, and a loss that is not a finite number.
    """
    if reference == "llama2-7b":
        of = "the reference losses 'llama2-7b'"
        return {name: LLAMA2_7B[canonical(name, of=of)] for name in domains}
    if isinstance(reference, str | Path):
        reference = _read(Path(reference))
    given = {k: v for k, v in reference.items() if k != "mean" or "mean" in domains}
    found = match(given, domains, what="reference")
    for name, loss in found.items():
        if not math.isfinite(loss):
            raise UserError(f"reference.{name} is {loss}. Give a finite loss in nats a token.")
    return found


def _read(path: Path) -> dict[str, float]:
    if not path.is_file():
        raise UserError(
            f"reference '{path}' is neither 'llama2-7b' nor a file. Give one of them, or a mapping "
            "of domain to loss."
        )
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): float(loss) for name, loss in given.items()}
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{path}: not a JSON object of domain to loss. Write one.") from None


def _arrays(
    weights: Mapping[str, float], losses: Mapping[str, float], reference: Mapping[str, float]
) -> tuple[list[str], np.ndarray, np.ndarray]:
    names = list(weights)
    for what, given in (("loss", losses), ("reference loss", reference)):
        absent = [name for name in names if name not in given]
        if absent:
            raise UserError(
                f"the domain '{absent[0]}' has no {what}. Evaluate all that is trained on: "
                f"{', '.join(names)}."
            )
    weights_n = np.array([weights[name] for name in names], dtype=np.float64)
    excess_n = np.array([losses[name] - reference[name] for name in names], dtype=np.float64)
    bad = [name for name, excess in zip(names, excess_n, strict=True) if not math.isfinite(excess)]
    if bad:
        raise UserError(
            f"the loss of '{bad[0]}' is {losses[bad[0]]}: weights cannot follow it. "
            "Look for a diverging run, or for held-out text without tokens."
        )
    return names, weights_n, excess_n


def _log(weights_n: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):  # the paper's rule can bring a weight down to 0: it stays
        return np.log(weights_n)


def _softmax(score_n: np.ndarray) -> np.ndarray:
    exponentials_n = np.exp(score_n - score_n.max())
    return exponentials_n / exponentials_n.sum()
