"""The tables and the figure of benchmarks/construction.md, from the rows of construction.py.

Only the part of the page between its two markers is written; the rest is by hand.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.construction_jobs import DENSE, DOMAINS, SCRATCH

if TYPE_CHECKING:
    from benchmarks.construction import Plan

BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


def write(plan: Plan, settings: dict[str, Any], page: Path) -> None:
    """Replace the generated part of `page` (or add it) and draw the figure beside it."""
    drawn = page.with_suffix(".svg")
    has_figure = figure(plan, drawn)
    text = "\n".join(render(plan, settings, drawn.name if has_figure else None))
    old = page.read_text() if page.is_file() else "# Construction\n"
    before, found, rest = old.partition(BEGIN)
    after = rest.partition(END)[2] if found else "\n"
    page.write_text(f"{before.rstrip()}\n\n{BEGIN}\n\n{text}\n\n{END}{after}")


def render(plan: Plan, settings: dict[str, Any], drawn: str | None) -> list[str]:
    seeds = ", ".join(map(str, plan.seeds))
    lines = [
        f"Held-out loss in nats a token, mean of {len(DOMAINS)} domains, one document a row, "
        f"context {settings['block']}, in float32; {settings['calibration']:,} calibration tokens. "
        f"Seeds {seeds}: mean ± half the range, the number in brackets where seeds are missing. "
        "Sorted by the first column of figures.",
    ]
    lines += ["", "## Right after conversion", "", *converted(plan)]
    if finer := list(finer_experts(plan)):
        lines += ["", "## More experts, the same active share", "", *finer]
    if not any(row["kind"] == "train" for row in plan.rows.values()):
        return lines
    lines += ["", "## Trained on", "", conditions(plan, settings)]
    for top_k in (k for k in plan.actives if k in (2, 4)):
        lines += ["", f"### {top_k} of {plan.experts} experts active", "", *trained(plan, top_k)]
    if drawn:
        lines += ["", f"![Loss over tokens of continual pre-training]({drawn})"]
    lines += ["", "### Learning rates", "", *rates(plan)]
    return lines


# Right after conversion


def converted(plan: Plan) -> Iterable[str]:
    """A row a method: loss, gap to the dense model and its share of the best published gap."""
    dense = _dense(plan)
    if dense is None:
        return ["The dense model has not been measured."]
    gaps: dict[str, dict[int, list[float]]] = {}
    for row in _conversions(plan):
        if row["experts"] == plan.experts and row["method"] not in (DENSE, SCRATCH):
            found = gaps.setdefault(row["method"], {}).setdefault(row["top_k"], [])
            found.append(row["loss"] - dense)
    from benchmarks.construction import PUBLISHED

    heads = ["method"]
    best = {}
    for top_k in plan.actives:
        heads += [f"{top_k}/{plan.experts}", "gap", "of best published"]
        known = [statistics.mean(gaps[m][top_k]) for m in PUBLISHED if top_k in gaps.get(m, {})]
        best[top_k] = min(known, default=None)
    seconds = _seconds(plan)
    heads.append("construction s")
    table = []
    for method, found in gaps.items():
        cells = [method]
        for top_k in plan.actives:
            values, published = found.get(top_k), best[top_k]
            if not values:
                cells += ["", "", ""]
                continue
            gap = statistics.mean(values)
            cells += [_figure([gap + dense for gap in values], plan), f"{gap:.3f}"]
            cells.append("" if published is None else f"{gap / published:.0%}")
        cells.append(f"{seconds[method]:.1f}" if method in seconds else "")
        table.append(cells)
    table.sort(key=lambda cells: cells[1] or "~")
    return [f"Dense: {dense:.4f}.", "", *_table(heads, table)]


def finer_experts(plan: Plan) -> Iterable[str]:
    """The methods made with more experts, beside the same methods with the usual number."""
    dense = _dense(plan)
    found: dict[tuple[str, float], dict[int, list[float]]] = {}
    for row in _conversions(plan):
        if row["method"] not in (DENSE, SCRATCH):
            share = row["top_k"] / row["experts"]
            found.setdefault((row["method"], share), {}).setdefault(row["experts"], []).append(
                row["loss"]
            )
    numbers = [plan.experts, *plan.finer]
    found = {key: by for key, by in found.items() if any(n in by for n in plan.finer)}
    if not found or dense is None:
        return []
    heads = ["method", "active share", *(f"{n} experts" for n in numbers), "gaps"]
    table = []
    for (method, share), by in sorted(found.items(), key=lambda item: (item[0][1], item[0][0])):
        gaps = [f"{statistics.mean(by[n]) - dense:.3f}" if n in by else "–" for n in numbers]
        cells = [_figure(by.get(n, []), plan) for n in numbers]
        table.append([method, f"{share:.0%}", *cells, ", ".join(gaps)])
    return _table(heads, table)


# Trained on


def conditions(plan: Plan, settings: dict[str, Any]) -> str:
    trained = [row for row in plan.rows.values() if row["kind"] == "train"]
    update = f"{settings['sequences']} x {settings['block']}"
    return (
        f"AdamW (0.9, 0.95), weight decay 0.1, clipping at 1, {settings['warmup']:.0%} warm-up, "
        f"cosine to {settings['floor']:.0%}, {update} tokens an update, domains in equal parts, "
        "bf16 autocast over float32 weights; every row of a seed sees the same tokens in the same "
        "order. Balance loss and noise are the model's own; a pruned model's gate is not trained. "
        f"{len(trained)} runs. Learning rates of every budget are chosen on one half of the "
        "held-out documents, and once more on the other, by the first seed; where they choose "
        "two, the mean of both runs stands. Other seeds take the best of the whole. Tried are at "
        "the first budget a grid and whatever lies beyond a best end, at a longer one the best "
        "rate of the one before and higher ones; where an asterisk stands, not all of these were."
    )


def trained(plan: Plan, top_k: int) -> Iterable[str]:
    """A row a start: loss after every budget at the chosen rate."""
    heads = ["start", "0", *(f"{b / 1e6:g} M tokens" for b in plan.budgets), "active parameters"]
    table = []
    for method in (DENSE, *plan.methods, SCRATCH):
        size = plan.experts if method == DENSE else top_k
        by = [_losses(plan, method, size, budget) for budget in (0, *plan.budgets)]
        if any(by[1:]):
            rows = [r for b in plan.budgets for r in plan.tried(method, size, b).values()]
            active = f"{rows[0]['active_parameters'] / 1e6:.2f} M" if rows else ""
            cells = [_figure(losses, plan) for losses in by]
            for place, budget in enumerate(plan.budgets, start=1):
                if cells[place] and not plan.sought(method, size, budget):
                    cells[place] += " \\*"
            table.append([method, *cells, active])
    table.sort(key=lambda cells: cells[-2] or cells[-3] or cells[-4])
    return _table(heads, table)


def rates(plan: Plan) -> Iterable[str]:
    """Every rate that was tried with its loss; the lowest is bold."""
    heads = ["start", "active", "tokens", "rate: loss"]
    table = []
    for method in (DENSE, *plan.methods, SCRATCH):
        for top_k in [plan.experts] if method == DENSE else plan.actives:
            for budget in plan.budgets:
                tried = plan.tried(method, top_k, budget)
                best = plan.lowest(method, top_k, budget)
                if not tried:
                    continue
                cells = []
                for lr, row in sorted(tried.items()):
                    loss = "diverged" if row["halves"] is None else f"{row['loss']:.4f}"
                    cells.append(f"**{lr:g}: {loss}**" if lr == best else f"{lr:g}: {loss}")
                active = "all" if method == DENSE else f"{top_k}/{plan.experts}"
                table.append([method, active, f"{budget / 1e6:g} M", ", ".join(cells)])
    return _table(heads, table)


def figure(plan: Plan, path: Path) -> bool:
    """Draw loss over tokens, a panel for each number of active experts; False without runs.

    Solid: ours; dashed: as published; dotted: a published split, or pruning, and what was added.
    """
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "moesaic"  # the same figures give the same file
    actives = [k for k in plan.actives if k in (2, 4)]
    drawn = Figure(figsize=(4.4 * len(actives) + 2.2, 4.6), layout="constrained")
    points = [0, *plan.budgets]
    looks = _looks(plan.trained())
    lines: dict[str, Any] = {}
    for place, top_k in enumerate(actives):
        axes = drawn.add_subplot(1, len(actives), place + 1)
        for method, look in looks.items():
            size = plan.experts if method == DENSE else top_k
            by = [_losses(plan, method, size, budget) for budget in points]
            known = [(x, statistics.mean(y)) for x, y in enumerate(by) if y]
            if len(known) < 2:
                continue
            line = axes.plot(*zip(*known, strict=True), marker="o", markersize=3, **look)
            lines.setdefault(method, line[0])
        axes.set_xticks(range(len(points)), [f"{b / 1e6:g} M" for b in points])
        axes.set_title(f"{top_k} of {plan.experts} experts active")
        axes.set_xlabel("tokens of continual pre-training")
        axes.set_ylabel("held-out loss, nats a token")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.3, which="both")
    if lines:
        drawn.legend(list(lines.values()), list(lines), loc="outside right upper", fontsize=8)
        drawn.savefig(path, metadata={"Date": None})
    return bool(lines)


def _looks(methods: list[str]) -> dict[str, dict[str, Any]]:
    """The line of each method: the dense model's first, no two alike."""
    from benchmarks.construction import PUBLISHED

    kinds: dict[str, list[str]] = {"-": [], ":": [], "--": []}
    for method in methods:
        ours = method.startswith(("energy", "layerwise"))
        kinds["-" if ours else "--" if method in PUBLISHED else ":"].append(method)
    found: dict[str, dict[str, Any]] = {DENSE: {"color": "black", "linewidth": 2}}
    for style, those in kinds.items():
        for number, method in enumerate(those):
            found[method] = {"color": f"C{number % 10}", "linestyle": style}
    return found


def _conversions(plan: Plan) -> list[dict[str, Any]]:
    return [row for row in plan.rows.values() if row["kind"] == "convert"]


def _dense(plan: Plan) -> float | None:
    return next((row["loss"] for row in _conversions(plan) if row["method"] == DENSE), None)


def _seconds(plan: Plan) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for row in _conversions(plan):
        if row.get("construct_seconds") is not None:
            found.setdefault(row["method"], []).append(row["construct_seconds"])
    return {method: statistics.median(spent) for method, spent in found.items()}


def _losses(plan: Plan, method: str, top_k: int, budget: int) -> list[float]:
    """Losses by seed at the chosen rate; at budget 0 those of the conversions."""
    if budget == 0:
        rows = [r for r in _conversions(plan) if (r["method"], r["top_k"]) == (method, top_k)]
        return [row["loss"] for row in rows if row["experts"] == plan.experts]
    rate, first = plan.rate(method, top_k, budget), plan.scored(method, top_k, budget)
    if rate is None or first is None:
        return []
    wanted = ("train", method, plan.experts, top_k)
    others = [plan.rows.get((*wanted, seed, budget, rate)) for seed in plan.seeds[1:]]
    return [first, *(row["loss"] for row in others if row and row["halves"])]


def _figure(losses: list[float], plan: Plan) -> str:
    if not losses:
        return ""
    half = (max(losses) - min(losses)) / 2
    text = f"{statistics.mean(losses):.4f}" + (f" ± {half:.4f}" if half > 5e-5 else "")
    return text if len(losses) in (1, len(plan.seeds)) else f"{text} [{len(losses)}]"


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]
