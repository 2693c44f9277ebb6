"""Figures of routing analyses: one function a figure, of one analysis or of several side by side.

Notation: m segment length in tokens; rho experts kept by the best segment router over those active;
ratio a cache's size over the active experts; L layers, E experts, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moesaic.report.analysis import ALL, Analysis
from moesaic.report.plots import load_map, new_figure, style
from moesaic.report.reference import reference
from moesaic.report.theme import SERIES, light

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POLICY_NAMES = {"lru": "LRU", "lfu": "LFU", "belady": "Belady", "fixed": "fixed"}
POLICY_COLOURS = {"lru": "series-1", "lfu": "series-3", "belady": "series-4", "fixed": "muted"}
SPECIAL = {
    "domain": "domain specialisation",
    "input": "vocabulary: words read",
    "predicted": "vocabulary: words predicted",
    "target": "vocabulary: words that follow",
}
MOST_RATIO = 4.0
"""Cache sizes are drawn up to so many times the active experts."""


def policy_name(policy: str) -> str:
    """The name of a policy for people."""
    return POLICY_NAMES.get(policy) or policy.upper().replace("SCH-", "SCH, m = ")


def figures_of(analysis: Analysis) -> dict[str, Figure]:
    """Return every figure of one analysis that its data allow, by file name."""
    made = {
        "srp-rho": srp_against("rho", [analysis]),
        "srp-loss": srp_against("loss", [analysis]),
        "srp-layers": srp_by_layer([analysis]),
        "srp-experts": srp_by_expert([analysis]),
        "srp-positions": srp_by_position([analysis]),
        "srp-domains": srp_by_domain(analysis),
        "domain-likeness": domain_likeness(analysis),
        "specialisation-models": specialisation_models([analysis]),
        "specialisation-experts": specialisation_experts(analysis),
        "specialisation-layers": specialisation_layers(analysis),
        "load": load_figure(analysis),
        "balance": balance(analysis),
        "coactivation": coactivation(analysis),
        "hits-policies": hits_by_policy(analysis),
        "hits-domains": hits_by_domain(analysis),
        "sch-models": sch([analysis]),
        "sch-layers": sch_by_layer([analysis]),
        "policies-models": policies([analysis]),
        "cases": cases_figure(analysis),
    }
    return {name: figure for name, figure in made.items() if figure is not None}


# ---------------------------------------------------------------------------- models as points


def srp_against(what: str, analyses: Sequence[Analysis]) -> Figure | None:
    """SRP of whole models against rho or loss, a panel for each m, among the published models."""
    values = {
        "rho": lambda a, m: a.metrics["srp"][str(m)]["rho"],
        "loss": lambda a, m: a.metrics["loss"],
    }[what]
    if all(values(a, a.segments[0]) is None for a in analyses):
        return None
    segments = _segments(analyses)
    with style():
        figure, grid = _panels(len(segments), 4.7, 3.5)
        for axes, m in zip(grid, segments, strict=False):
            published = []
            for row in reference():
                x = row["srp"].get(m)
                y = row["rho"].get(m) if what == "rho" else row["log_ppl"]
                if x is not None and y is not None:
                    published.append((100 * x, y, row["name"]))
            own = [
                (100 * a.metrics["srp"][str(m)]["srp"], values(a, m), a.name)
                for a in analyses
                if str(m) in a.metrics["srp"] and a.metrics["srp"][str(m)]["srp"] is not None
            ]
            _points(axes, published, [p for p in own if p[1] is not None])
            axes.set_title(f"m = {m}")
            axes.set_xlabel("SRP, %")
            axes.set_ylabel("rho" if what == "rho" else "loss, nats a token")
        _legend(figure, grid)
    return figure


def specialisation_models(analyses: Sequence[Analysis]) -> Figure | None:
    """Correlation of experts' SRP with their specialisation, against the model's SRP."""
    m = analyses[0].headline
    with style():
        figure, grid = _panels(4, 4.7, 3.2)
        for axes, (kind, title) in zip(grid, SPECIAL.items(), strict=True):
            published = [
                (100 * row["srp"][16], row["correlations"][kind], row["name"])
                for row in reference()
                if row["correlations"][kind] is not None
            ]
            own = []
            for a in analyses:
                found = a.metrics["correlations"]["srp_with_specialisation"][kind]
                srp = a.metrics["srp"].get(str(m), {}).get("srp")
                if found is not None and srp is not None:
                    own.append((100 * srp, found, a.name))
            _points(axes, published, own)
            axes.axhline(0, color=light("rule"), linewidth=1)
            axes.set_ylim(-1.05, 1.05)
            axes.set_title(title)
            axes.set_xlabel(f"SRP, % (m = {m})")
            axes.set_ylabel("correlation with SRP")
        _legend(figure, grid)
    return figure


# ---------------------------------------------------------------------------- curves


def srp_by_layer(analyses: Sequence[Analysis]) -> Figure:
    """SRP (solid, left axis) and rho (dotted, right axis) of every layer; a colour for each m."""
    wide = len(analyses) == 1
    with style():
        figure, grid = _panels(len(analyses), 9.4 if wide else 4.7, 3.6, columns=1 if wide else 2)
        for axes, analysis in zip(grid, analyses, strict=False):
            right = axes.twinx()
            right.patch.set_alpha(0)
            for colour, m in _coloured(analysis.segments):
                table = analysis.table("segments_layer", domain=ALL, segment=m)
                dots = {"color": colour, "label": f"m = {m}", **_dots(table)}
                axes.plot(table["layer"], 100 * table["srp"], **dots)
                if "low" in table:
                    axes.fill_between(
                        table["layer"], 100 * table["low"], 100 * table["high"],
                        color=colour, alpha=0.15, linewidth=0,
                    )  # fmt: skip
                right.plot(table["layer"], table["rho"], color=colour, linestyle=":", linewidth=1.4)
            axes.set_title(analysis.name if not wide else "")
            axes.set_xlabel("layer")
            axes.set_ylabel("SRP, % (solid)")
            right.set_ylabel("rho (dotted)")
            right.set_ylim(0.5, 5.5)
            axes.grid(True, axis="y")
            _whole_numbers(axes)
        _legend(figure, grid)
    return figure


def srp_by_position(analyses: Sequence[Analysis]) -> Figure:
    """SRP by the middle of the segment in its sample; a colour for each m."""
    wide = len(analyses) == 1
    with style():
        figure, grid = _panels(len(analyses), 9.4 if wide else 4.7, 3.2, columns=1 if wide else 2)
        for axes, analysis in zip(grid, analyses, strict=False):
            for colour, m in _coloured(analysis.segments):
                table = analysis.table("positions", domain=ALL, segment=m)
                some = table["windows"] > 0
                if some.any():
                    axes.plot(
                        table["middle"][some], 100 * table["srp"][some],
                        color=colour, label=f"m = {m}", linewidth=1.4,
                    )  # fmt: skip
            axes.set_title(analysis.name if not wide else "")
            axes.set_xlabel("middle of the segment, tokens from the beginning")
            axes.set_ylabel("SRP, %")
            axes.grid(True, axis="y")
        _legend(figure, grid)
    return figure


def hits_by_policy(analysis: Analysis) -> Figure:
    """Hit rate by cache size for every policy: a cache for each layer, and one for the model."""
    with style():
        figure, grid = _panels(2, 4.7, 4.0)
        for axes, scope in zip(grid, ("layer", "model"), strict=True):
            table = analysis.table(f"hits_{scope}", domain=ALL)
            found = list(dict.fromkeys(table["policy"].tolist()))
            windows = [policy for policy in found if policy.startswith("sch")]
            warm = _ramp(len(windows), "plasma", 0.5, 0.85)
            colours: dict[str, Any] = {p: tuple(warm[i]) for i, p in enumerate(windows)}
            colours |= {policy: light(name) for policy, name in POLICY_COLOURS.items()}
            for policy in found:
                ratio, rate = _mean_curve(table, policy)
                line = "--" if policy in windows else ":" if policy == "fixed" else "-"
                axes.plot(
                    ratio, 100 * rate, line, color=colours.get(policy, light("ink")),
                    label=policy_name(policy),
                )  # fmt: skip
            axes.set_title("a cache for each layer" if scope == "layer" else "one for the model")
            _rate_axes(axes)
        _legend(figure, grid)
    return figure


def hits_by_domain(analysis: Analysis) -> Figure:
    """Hit rate of LRU in the layers' caches by cache size, a line for each domain."""
    with style():
        figure, grid = _panels(2, 4.7, 4.0)
        windows = [m for m in analysis.segments if m == analysis.headline]
        for axes, policy in zip(grid, ("lru", f"sch-{windows[0]}"), strict=True):
            for colour, domain in _coloured(analysis.domains):
                table = analysis.table("hits_layer", domain=domain)
                ratio, rate = _mean_curve(table, policy)
                axes.plot(ratio, 100 * rate, color=colour, label=domain, linewidth=1.4)
            axes.set_title(f"{policy_name(policy)}, a cache for each layer")
            _rate_axes(axes)
        _legend(figure, grid)
    return figure


def sch(analyses: Sequence[Analysis]) -> Figure:
    """SCH hit rate of one cache for the model by its size, a panel for each m."""
    segments = _segments(analyses)
    with style():
        figure, grid = _panels(len(segments), 4.7, 3.4)
        for axes, m in zip(grid, segments, strict=False):
            if m == 16:
                for row in reference():
                    known = row["sch16"]
                    axes.plot(
                        list(known), [100 * v for v in known.values()], "o-", markersize=2.5,
                        color=light("muted"), linewidth=0.6, alpha=0.6,
                        label="published models",
                    )  # fmt: skip
            for colour, analysis in _coloured(analyses):
                table = analysis.table("hits_model", domain=ALL)
                ratio, rate = _mean_curve(table, f"sch-{m}")
                if len(ratio):
                    axes.plot(ratio, 100 * rate, color=colour, label=analysis.name)
            axes.set_title(f"SCH, m = {m}")
            _rate_axes(axes)
        _legend(figure, grid)
    return figure


def policies(analyses: Sequence[Analysis]) -> Figure:
    """Hit rate of LRU, LFU and Belady in one cache for the model, a panel for each policy."""
    with style():
        figure, grid = _panels(3, 3.3, 3.6, columns=3)
        for axes, policy in zip(grid, ("lru", "lfu", "belady"), strict=True):
            known = [100 * row["rate2"][policy] for row in reference()]
            axes.scatter(
                [2.0] * len(known), known, s=12, color=light("muted"), label="published models",
                zorder=3,
            )  # fmt: skip
            for colour, analysis in _coloured(analyses):
                ratio, rate = _mean_curve(analysis.table("hits_model", domain=ALL), policy)
                axes.plot(ratio, 100 * rate, color=colour, label=analysis.name)
            axes.set_title(policy_name(policy))
            _rate_axes(axes)
        _legend(figure, grid)
    return figure


def sch_by_layer(analyses: Sequence[Analysis]) -> Figure | None:
    """SCH hit rate of every layer's cache: ratio 1 solid, ratio 2 dotted; a colour for each m."""
    wide = len(analyses) == 1
    drawn = False
    with style():
        figure, grid = _panels(len(analyses), 9.4 if wide else 4.7, 3.4, columns=1 if wide else 2)
        for axes, analysis in zip(grid, analyses, strict=False):
            table = analysis.table("hits_layer", domain=ALL)
            for colour, m in _coloured(analysis.segments):
                for ratio, line in ((1.0, "-"), (2.0, ":")):
                    own = (table["policy"] == f"sch-{m}") & np.isclose(table["ratio"], ratio)
                    drawn |= bool(own.any())
                    axes.plot(
                        table["layer"][own], 100 * table["rate"][own], line, color=colour,
                        label=f"m = {m}" if ratio == 1.0 else None,
                    )  # fmt: skip
            axes.set_title(analysis.name if not wide else "")
            axes.set_xlabel("layer")
            axes.set_ylabel("SCH, % (ratio 1 solid, 2 dotted)")
            axes.grid(True, axis="y")
            _whole_numbers(axes)
        _legend(figure, grid)
    return figure if drawn else None


# ---------------------------------------------------------------------------- experts


def srp_by_expert(analyses: Sequence[Analysis]) -> Figure:
    """SRP of every expert against its activation (logit axis), coloured by layer.

    Dotted: what predicting everything gives, 2 r / (1 + r). Dashed: even load, k / E.
    """
    wide = len(analyses) == 1
    with style():
        figure, grid = _panels(len(analyses), 9.4 if wide else 4.7, 4.2, columns=1 if wide else 2)
        for axes, analysis in zip(grid, analyses, strict=False):
            table = analysis.table("experts")
            some = np.isfinite(table["activation"]) & np.isfinite(table["srp"])
            share = np.geomspace(1e-5, 0.5, 100)
            share = np.concatenate([share, 1 - share[::-1]])
            axes.plot(
                _logit(share), 100 * 2 * share / (1 + share), ":", color=light("muted"),
                label="everything predicted", linewidth=1.2,
            )  # fmt: skip
            model = analysis.metrics["model"]
            even = float(np.mean(np.array(model["top_k"]) / np.array(model["num_experts"])))
            axes.axvline(_logit(even), linestyle="--", color=light("muted"), linewidth=1.2)
            places = np.searchsorted(model["layers"], table["layer"][some])
            axes.scatter(
                _logit(table["activation"][some]), 100 * table["srp"][some], s=16,
                c=_ramp(len(model["layers"]))[places], rasterized=some.sum() > 1500,
                alpha=0.85, linewidth=0,
            )  # fmt: skip
            ticks = np.array([1e-4, 1e-3, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99])
            held = _logit(table["activation"][some]) if some.any() else np.array([_logit(even)])
            low, high = min(held.min(), _logit(even)) - 0.4, max(held.max(), _logit(even)) + 0.4
            axes.set_xlim(low, high)
            ticks = ticks[(_logit(ticks) >= low) & (_logit(ticks) <= high)]
            axes.set_xticks(_logit(ticks), [f"{100 * t:g} %" for t in ticks])
            axes.set_ylim(0, 103)
            axes.set_title(analysis.name if not wide else "")
            axes.set_xlabel("activation")
            axes.set_ylabel(f"SRP of the expert, % (m = {analysis.headline})")
        _layer_bar(figure, grid, analyses[0])
    return figure


def specialisation_experts(analysis: Analysis) -> Figure | None:
    """SRP of every expert against its specialisation: domains, and words of three kinds."""
    table = analysis.table("experts")
    layers = analysis.metrics["model"]["layers"]
    columns = {kind: table[f"{kind}_specialisation"] for kind in SPECIAL}
    columns = {kind: values for kind, values in columns.items() if np.isfinite(values).any()}
    if not columns:
        return None
    with style():
        figure, grid = _panels(len(columns), 4.7, 3.4)
        for axes, (kind, values) in zip(grid, columns.items(), strict=False):
            some = np.isfinite(values) & np.isfinite(table["srp"])
            axes.scatter(
                values[some], 100 * table["srp"][some], s=14, linewidth=0, alpha=0.85,
                c=_ramp(len(layers))[np.searchsorted(layers, table["layer"][some])],
                rasterized=some.sum() > 1500,
            )  # fmt: skip
            known = analysis.metrics["correlations"]["srp_with_specialisation"][kind]
            said = "" if known is None else f", correlation {known:+.2f}"
            axes.set_title(f"{SPECIAL[kind]}{said}", fontsize=9.5)
            axes.set_xlabel("variation over domains" if kind == "domain" else "specialisation")
            axes.set_ylabel("SRP, %")
        _layer_bar(figure, grid, analysis)
    return figure


def specialisation_layers(analysis: Analysis) -> Figure | None:
    """Mean specialisation of the experts of every layer: domains (left), words (right)."""
    layers = analysis.metrics["model"]["layers"]
    means = {
        kind: [_mean(part) for part in analysis.by_layer("experts", f"{kind}_specialisation")]
        for kind in SPECIAL
    }
    if not any(np.isfinite(part).any() for part in means.values()):
        return None
    with style():
        figure, grid = _panels(2, 4.7, 3.2)
        for colour, (kind, title) in _coloured(list(SPECIAL.items())):
            axes = grid[0 if kind == "domain" else 1]
            label = title.removeprefix("vocabulary: ")
            axes.plot(layers, means[kind], color=colour, label=label, marker="o", markersize=3.5)
        grid[0].set_title("over domains")
        grid[0].set_ylabel("variation of the activation")
        grid[1].set_title("in words")
        grid[1].set_ylabel("mean frequency of own words")
        for axes in grid:
            axes.set_xlabel("layer")
            axes.grid(True, axis="y")
            _whole_numbers(axes)
        _legend(figure, grid)
    return figure


def load_figure(analysis: Analysis) -> Figure | None:
    """Load of every expert, a panel for all text and one for each domain."""
    if len(set(analysis.metrics["model"]["num_experts"])) > 1:
        return None
    names = [ALL, *analysis.domains] if len(analysis.domains) > 1 else [ALL]
    loads = {
        name: np.stack(analysis.by_layer("load", "load", domain=name)).tolist() for name in names
    }
    return load_map(loads)


def balance(analysis: Analysis) -> Figure:
    """How uneven the load of every layer is, overall and inside samples; and how sharp weights."""
    table = analysis.table("balance", domain=ALL)
    kept = analysis.table("kept")
    with style():
        figure, grid = _panels(2, 4.7, 3.2)
        left, right = grid
        left.plot(table["layer"], table["cv"], label="all text together", **_dots(table))
        left.plot(table["layer"], table["local_cv"], label="inside a sample", **_dots(table))
        left.set_ylabel("deviation / mean of the load")
        right.plot(table["layer"], table["entropy"], label="entropy of the load", **_dots(table))
        right.plot(
            table["layer"], table["weight_entropy"], label="entropy of a token's weights",
            **_dots(table),
        )  # fmt: skip
        right.plot(
            kept["layer"], kept["kept"], label="experts kept from the last token", **_dots(kept)
        )
        right.set_ylim(0, 1.03)
        for axes, colours in ((left, SERIES[:2]), (right, SERIES[2:])):
            for line, colour in zip(axes.lines, colours, strict=False):
                line.set_color(light(colour))
            axes.set_xlabel("layer")
            axes.grid(True, axis="y")
            _whole_numbers(axes)
            axes.legend(fontsize=8)
        left.set_ylim(bottom=0)
    return figure


def coactivation(analysis: Analysis) -> Figure | None:
    """Which experts tokens choose together, of up to four layers: log2 of the lift."""
    layers, experts = analysis.shape
    if analysis.metrics["model"]["top_k"] and max(analysis.metrics["model"]["top_k"]) < 2:
        return None
    shown = sorted({layers[i] for i in np.linspace(0, len(layers) - 1, 4).round().astype(int)})
    with style():
        figure, grid = _panels(len(shown), 2.4, 2.6, columns=4)
        mesh = None
        for axes, layer in zip(grid, shown, strict=False):
            count = experts[layers.index(layer)]
            table = analysis.table("pairs", layer=layer)
            lift_EE = np.full((count, count), np.nan)
            with np.errstate(divide="ignore"):
                values = np.log2(table["lift"])
            lift_EE[table["expert"], table["other"]] = values
            lift_EE[table["other"], table["expert"]] = values
            mesh = _heat(axes, lift_EE, -2.0, 2.0)
            axes.set_title(f"layer {layer}")
            axes.set_xlabel("expert")
        grid[0].set_ylabel("expert")
        bar = figure.colorbar(mesh, ax=grid, location="right", shrink=0.7, pad=0.02, aspect=16)
        bar.set_ticks([-2, -1, 0, 1, 2], labels=["¼", "½", "1", "2", "4"])
        bar.set_label("together, against chance", fontsize=9)
        bar.outline.set_visible(False)
    return figure


# ---------------------------------------------------------------------------- domains and cases


def srp_by_domain(analysis: Analysis) -> Figure | None:
    """SRP of every domain against that of all text, as relative difference."""
    if len(analysis.domains) < 2:
        return None
    table = analysis.table("domains")
    own = table["domain"] != ALL
    change = 100 * table["difference"][own]
    if not np.isfinite(change).any():
        return None
    with style():
        figure, (axes,) = new_figure(9.4, 0.9 + 0.3 * len(change))
        names = table["domain"][own]
        axes.barh(names, change, color=light("series-1"), height=0.62)
        axes.axvline(0, color=light("muted"), linewidth=1)
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0, labelcolor=light("ink"))
        axes.grid(True, axis="x")
        axes.set_xlabel(f"SRP of the domain against all text, % (m = {analysis.headline})")
    return figure


def domain_likeness(analysis: Analysis) -> Figure | None:
    """Correlation between domains, over all experts, of activation and of SRP."""
    count = len(analysis.domains)
    if count < 2:
        return None
    with style():
        size = min(4.7, 2.1 + 0.24 * count)
        figure, grid = _panels(2, size + 0.4, size)
        mesh = None
        for axes, (key, title) in zip(
            grid, (("activation", "activation"), ("srp", "SRP")), strict=True
        ):
            table = analysis.table(f"domain_{key}")
            values = table["correlation"].reshape(count, count)
            mesh = _heat(axes, values, -1.0, 1.0, numbers=count <= 12)
            axes.set_title(f"{title} of the experts")
            axes.set_xticks(np.arange(count) + 0.5, analysis.domains, rotation=60, ha="right")
            axes.set_yticks(np.arange(count) + 0.5, analysis.domains)
        bar = figure.colorbar(mesh, ax=grid, location="right", shrink=0.7, pad=0.02, aspect=16)
        bar.set_label("correlation", fontsize=9)
        bar.outline.set_visible(False)
    return figure


def cases_figure(analysis: Analysis) -> Figure | None:
    """The experts that each token of a sample chose, in the most consistent layer; by domain."""
    cases = analysis.cases[:12]
    if not cases:
        return None
    layers, experts = analysis.shape
    with style():
        tall = min(2.4, 0.5 + max(experts) * 0.045)
        figure, grid = _panels(len(cases), 9.4, tall + 0.45, columns=1)
        for axes, case in zip(grid, cases, strict=False):
            chosen_TK = case["chosen"][:, case["best"]]
            count = experts[case["best"]]
            picture = np.zeros((count, len(chosen_TK)))
            for k in reversed(range(chosen_TK.shape[1])):
                some = np.flatnonzero(chosen_TK[:, k] >= 0)
                picture[chosen_TK[some, k], some] = 1 - 0.6 * k / max(1, chosen_TK.shape[1] - 1)
            from matplotlib.colors import LinearSegmentedColormap

            colours = LinearSegmentedColormap.from_list("", [light("card"), light("series-1")])
            axes.pcolormesh(picture, cmap=colours, vmin=0, vmax=1, rasterized=True)
            axes.set_title(
                f"{case['domain']}: layer {layers[case['best']]}, "
                f"consistency {max(case['consistency']):.2f}", fontsize=9,
            )  # fmt: skip
            axes.set_ylabel("expert")
        grid[len(cases) - 1].set_xlabel("token (the first choice darkest)")
    return figure


# ---------------------------------------------------------------------------- parts


def _segments(analyses: Sequence[Analysis]) -> list[int]:
    return sorted({m for analysis in analyses for m in analysis.segments})


def _panels(count: int, width: float, height: float, *, columns: int = 2) -> tuple[Any, list[Any]]:
    """A grid of panels; those without content are hidden."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure, grid = new_figure(width * columns, height * rows, rows=rows, columns=columns)
    for axes in grid[count:]:
        axes.set_axis_off()
    return figure, grid[:count]


def _coloured(items: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Pair items with colours: the theme's, or a ramp when there are more."""
    if len(items) <= len(SERIES):
        return [(light(SERIES[i]), item) for i, item in enumerate(items)]
    return list(zip([tuple(c) for c in _ramp(len(items))], items, strict=True))


def _ramp(count: int, name: str = "viridis", start: float = 0.12, stop: float = 0.88) -> np.ndarray:
    """Colours from the first to the last layer, to be seen on both kinds of paper."""
    import matplotlib as mpl

    colours: np.ndarray = mpl.colormaps[name](np.linspace(start, stop, max(2, count)))
    return colours[:count]


def _dots(table: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Markers where there are few layers: one layer alone has no line."""
    few = len(table["layer"]) < 40
    return {"marker": "o", "markersize": 3.5} if few else {}


def _points(axes: Axes, published: Sequence[Any], own: Sequence[Any]) -> None:
    """Scatter published models small and named, one's own large."""
    if published:
        x, y, names = zip(*published, strict=True)
        axes.scatter(x, y, s=14, color=light("muted"), label="published models", zorder=2)
        for at, height, name in zip(x, y, names, strict=True):
            axes.annotate(
                name, (at, height), xytext=(3, 2), textcoords="offset points", fontsize=5.5,
                color=light("muted"),
            )  # fmt: skip
    for colour, (x, y, name) in _coloured(own):
        axes.scatter([x], [y], s=70, color=colour, label=name, zorder=4, marker="D")
    axes.grid(True)


def _mean_curve(table: Mapping[str, np.ndarray], policy: str) -> tuple[np.ndarray, np.ndarray]:
    """Hit rate by ratio, averaged over the layers where there are several."""
    own = (table["policy"] == policy) & (table["ratio"] <= MOST_RATIO + 1e-9)
    ratio, place = np.unique(np.round(table["ratio"][own], 9), return_inverse=True)
    rate = table["rate"][own]
    known = np.isfinite(rate)
    total = np.bincount(place[known], rate[known], minlength=len(ratio))
    count = np.bincount(place[known], minlength=len(ratio))
    return ratio, np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _rate_axes(axes: Axes) -> None:
    axes.set_xlim(0, MOST_RATIO)
    axes.set_ylim(0, 103)
    axes.set_xlabel("cache size / active experts")
    axes.set_ylabel("hit rate, %")
    axes.grid(True)


def _heat(axes: Axes, values: np.ndarray, low: float, high: float, *, numbers: bool = False) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    from moesaic.report.theme import HEAT

    colours = LinearSegmentedColormap.from_list("", [light(name) for name in HEAT])
    mesh = axes.pcolormesh(
        np.clip(values, low, high), cmap=colours, vmin=low, vmax=high, rasterized=values.size > 900
    )
    axes.invert_yaxis()
    axes.tick_params(length=0, labelsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if numbers:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                strong = abs(value) > 0.75 * max(abs(low), abs(high))
                axes.text(
                    column + 0.5, row + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=6,
                    color=light("paper" if strong else "ink"),
                )  # fmt: skip
    return mesh


def _layer_bar(figure: Figure, grid: Sequence[Axes], analysis: Analysis) -> None:
    """A colour bar from the first to the last layer."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    layers = analysis.metrics["model"]["layers"]
    if len(layers) < 2:
        return
    scale = ScalarMappable(Normalize(layers[0], layers[-1]), ListedColormap(_ramp(len(layers))))
    bar = figure.colorbar(scale, ax=list(grid), location="right", shrink=0.7, pad=0.02, aspect=20)
    bar.set_label("layer", fontsize=9)
    bar.outline.set_visible(False)


def _legend(figure: Figure, grid: Sequence[Axes]) -> None:
    """One legend above all panels, each name once."""
    found: dict[str, Any] = {}
    for axes in grid:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if len(found) > 1:
        figure.legend(
            found.values(), found.keys(), loc="outside upper left", ncols=min(6, len(found)),
            fontsize=8.5,
        )  # fmt: skip


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _logit(share: Any) -> Any:
    """The study's axis: finite at 0 and 1."""
    return np.log(np.asarray(share) + 1e-5) - np.log(1 - np.asarray(share) + 1e-5)


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")
