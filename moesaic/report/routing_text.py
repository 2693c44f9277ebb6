"""The headline figures of routing analyses as text for a terminal."""

from __future__ import annotations

from typing import Any

from moesaic.report.analysis import Analysis
from moesaic.report.tables import MISSING


def overview(analysis: Analysis) -> str:
    """Return a few lines: SRP and rho by segment length, hit rates, load, specialisation."""
    metrics = analysis.metrics
    lines = [
        f"tokens       {metrics['trace']['rows']:,} in {metrics['trace']['samples']:,} samples"
    ]
    for m, found in metrics["srp"].items():
        if found["srp"] is None:
            lines.append(f"SRP          {MISSING} (no sample has {m} tokens)")
            continue
        interval = ""
        if found.get("low") is not None:
            interval = f" ({100 * found['low']:.2f} to {100 * found['high']:.2f})"
        lines.append(
            f"SRP          {100 * found['srp']:.2f} %{interval}, rho {found['rho']:.2f}: "
            f"segments of {m} tokens"
        )
    for scope, where in (("layer", "a cache a layer"), ("model", "one cache")):
        rates = metrics["hit_rates"][scope]
        shown = ", ".join(
            f"{policy} {_percent(rates[policy].get('2'))}" for policy in ("lru", "lfu", "belady")
        )
        lines.append(f"hit rates    {shown}: {where}, twice the active experts")
    load, special = metrics["load"], metrics["specialisation"]
    lines.append(
        f"load         deviation / mean {load['cv']:.3f}, inside samples {load['local_cv']:.3f}; "
        f"{load['dead']} dead experts"
    )
    lines.append(
        f"special      domains {_number(special['domain'])}; words read "
        f"{_number(special['input'])}, predicted {_number(special['predicted'])}, next "
        f"{_number(special['target'])}"
    )
    lines += [f"note         {text}" for text in metrics["notes"]]
    return "\n".join(lines)


def _percent(value: Any) -> str:
    return MISSING if value is None else f"{100 * value:.1f} %"


def _number(value: Any) -> str:
    return MISSING if value is None else f"{value:.3f}"
