"""Figures for reports: loss curves, grouped losses, expert load. Plain numbers in, Figure out.

Figures are `matplotlib.figure.Figure` objects made without pyplot, so nothing global changes and
no window can open. `svg(figure)` gives inline SVG whose colours follow the page's light or dark
setting; `save(figure, path)` writes a PNG, PDF or stand-alone SVG in the light colours.

L layers, E experts, `load_LE` the share of routed tokens each expert of a layer received (rows
sum to 1).
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moesaic.core.errors import UserError
from moesaic.report.theme import HEAT, SERIES, VARIABLE_OF, light

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: searchable, and set in the page's own font
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": light("rule"),
    "axes.labelcolor": light("muted"),
    "axes.titlecolor": light("ink"),
    "axes.axisbelow": True,
    "text.color": light("ink"),
    "xtick.color": light("rule"),
    "ytick.color": light("rule"),
    "xtick.labelcolor": light("muted"),
    "ytick.labelcolor": light("muted"),
    "grid.color": light("rule"),
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}
HEAT_RANGE = 2.0  # the heat map's ends: a quarter and four times the uniform share (log2)


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_label: str,
    y_label: str,
    levels: Mapping[str, float] | None = None,
    smooth: int = 1,
) -> Figure:
    """Draw one line per series of (x, y) points, and dashed horizontal `levels` to compare with.

    With `smooth` above 1 the raw points stay visible as a faint line and a centred running mean
    over that many points is drawn on top.
    """
    with style():
        figure, (axes,) = new_figure(9.4, 3.7)
        colours = iter(SERIES)
        for name, points in series.items():
            if not points:
                raise UserError(f"the series {name!r} has no points. Give at least one (x, y).")
            x, y = np.asarray(points, dtype=float).T
            colour = light(next(colours, SERIES[-1]))
            if smooth > 1 and len(y) > 2 * smooth:
                axes.plot(x, y, color=colour, alpha=0.3, linewidth=1.0)
                y = _running_mean(y, smooth)
            axes.plot(x, y, color=colour, label=name, marker="o" if len(x) < 8 else "")
        _levels(axes, levels or {}, colours)
        axes.grid(True, axis="y")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.margins(x=0.01)
        _thousands(axes)
        if len(series) + len(levels or {}) > 1:
            axes.legend(loc="best", fontsize=9)
    return figure


def dots(
    values: Mapping[str, Mapping[str, float | None]], *, x_label: str, better: str = ""
) -> Figure:
    """Compare groups on one scale: a row per group, a dot per named stage.

    `values` is {group: {stage: value or None}}. Positions are read off a common axis, which is
    more exact than bars when the interesting differences are far from zero.
    """
    groups = list(values)
    stages = list(dict.fromkeys(stage for row in values.values() for stage in row))
    if not groups or not stages:
        raise UserError("nothing to compare: `values` is empty.")
    with style():
        figure, (axes,) = new_figure(9.4, 1.1 + 0.34 * len(groups))
        for row, group in enumerate(groups):
            present = [v for v in values[group].values() if v is not None]
            if len(present) > 1:
                axes.plot(
                    [min(present), max(present)], [row, row], color=light("rule"), linewidth=2.5
                )
        for number, stage in enumerate(stages):
            points = [(values[g].get(stage), row) for row, g in enumerate(groups)]
            shown = [(x, row) for x, row in points if x is not None]
            axes.scatter(
                [x for x, _ in shown],
                [row for _, row in shown],
                s=52,
                color=light(SERIES[number % len(SERIES)]),
                label=stage,
                zorder=3,
            )
        axes.set_yticks(range(len(groups)), groups)
        axes.tick_params(axis="y", length=0, labelcolor=light("ink"))
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.spines["left"].set_visible(False)
        axes.grid(True, axis="x")
        axes.set_xlabel(x_label + (f" ({better})" if better else ""))
        figure.legend(loc="outside upper left", ncols=min(4, len(stages)), fontsize=9)
    return figure


def load_map(loads: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """Draw expert load, layer by expert, one panel per domain: {domain: load_LE}.

    The colour is the load relative to the uniform share 1/E on a log scale from a quarter to four
    times; small maps also carry the number. Raises UserError when panels differ in shape.
    """
    panels = {name: np.asarray(load, dtype=float) for name, load in loads.items()}
    shapes = {panel.shape for panel in panels.values()}
    if len(shapes) != 1 or any(panel.ndim != 2 for panel in panels.values()):
        found = ", ".join(f"{name} {panel.shape}" for name, panel in panels.items()) or "none"
        raise UserError(
            f"load maps need one [layers, experts] table per domain, all alike; got {found}."
        )
    layers, experts = shapes.pop()
    numbers = experts <= 16 and layers <= 32
    cell = 0.34 if numbers else max(0.06, min(0.2, 9 / experts / len(panels)))
    # As many panels in a row as stay readable at the width of a page.
    per_row = max(1, min(len(panels), int(12.5 / (experts * cell + 0.5))))
    rows = -(-len(panels) // per_row)
    from matplotlib.colors import BoundaryNorm, ListedColormap

    colours = ListedColormap([light(name) for name in HEAT])
    edges = np.linspace(-HEAT_RANGE, HEAT_RANGE, len(HEAT) + 1)
    with style():
        figure, grid = new_figure(
            0.9 + per_row * (experts * cell + 0.35),
            rows * (max(1.6, layers * cell * 0.86) + 0.75) + 0.45,
            rows=rows,
            columns=per_row,
        )
        for axes, (name, load_LE) in zip(grid, panels.items(), strict=False):
            relative_LE = load_LE * experts
            shade_LE = np.log2(np.clip(relative_LE, 2.0**-HEAT_RANGE, 2.0**HEAT_RANGE))
            # Just inside the outermost edges, so that clipped cells still get the last colour.
            shade_LE = np.clip(shade_LE, edges[0] + 1e-9, edges[-1] - 1e-9)
            mesh = axes.pcolormesh(
                shade_LE,
                cmap=colours,
                norm=BoundaryNorm(edges, len(HEAT)),
                edgecolors=light("paper"),
                linewidth=0.8 if numbers else 0.0,
                rasterized=layers * experts > 4096,
            )
            axes.set_title(name)
            axes.invert_yaxis()
            axes.tick_params(length=0, pad=1, labelsize=8)
            axes.set_xticks(_centres(experts), _indices(experts))
            axes.set_yticks(_centres(layers), _indices(layers))
            for spine in axes.spines.values():
                spine.set_visible(False)
            if numbers:
                _annotate(axes, relative_LE, shade_LE)
            axes.set_xlabel("expert")
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        for axes in grid[: len(panels) : per_row]:
            axes.set_ylabel("layer")
        bar = figure.colorbar(mesh, ax=grid, location="right", shrink=0.7, pad=0.02, aspect=16)
        ticks = [-2, -1, 0, 1, 2]
        bar.set_ticks(ticks, labels=["¼", "½", "1", "2", "4"])
        bar.set_label("load relative to uniform", fontsize=9)
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0)
    return figure


def svg(figure: Figure) -> str:
    """Inline SVG of a figure: themed by CSS variables, no metadata, ids unique to the figure.

    The same figure always gives the same text. The text is set in the font of the page around it.
    """
    text = _render_svg(figure)
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r"#[0-9a-f]{6}\b", lambda m: VARIABLE_OF.get(m[0], m[0]), text)
    text = re.sub(r"font:\s*(?:(\d+) )?([\d.]+)px [^;\"]*", _font, text)
    text = re.sub(r"font-family:[^;\"]*;?", "", text)
    mark = "f" + hashlib.sha256(text.encode()).hexdigest()[:8]
    text = re.sub(r'\bid="', f'id="{mark}-', text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{mark}-", text)
    # Width and height in points would fix the size; the viewBox lets CSS scale it.
    return re.sub(r'(<svg\b[^>]*?)\swidth="([\d.]+)pt"', _scalable, text, count=1)


def save(figure: Figure, path: Path, *, dpi: int = 144) -> Path:
    """Write a figure to a file in the light colours; the suffix chooses PNG, PDF or SVG."""
    allowed = (".png", ".pdf", ".svg")
    if path.suffix not in allowed:
        raise UserError(f"{path.name}: figures are written as {', '.join(allowed)}.")
    with style():
        figure.savefig(path, dpi=dpi, facecolor=light("paper"))
    return path


def fixed(figure: Figure) -> Figure:
    """Arrange a figure now and keep it so: written to several files, it is arranged only once."""
    with style():
        figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def style() -> Any:
    """A context with our style only: the user's matplotlibrc must not change a report."""
    import matplotlib as mpl

    settings: dict[Any, Any] = {**mpl.rcParamsDefault, **STYLE}
    # The backend is the one setting that acts on the process: leave it alone.
    del settings["backend"]
    return mpl.rc_context(settings)


def new_figure(
    width: float, height: float, *, rows: int = 1, columns: int = 1
) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.patch.set_alpha(0)
    return figure, list(grid.flat)


def _render_svg(figure: Figure) -> str:
    import matplotlib as mpl

    buffer = io.StringIO()
    with style(), mpl.rc_context({"svg.hashsalt": "moesaic"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _font(match: re.Match[str]) -> str:
    weight = f"font-weight: {match[1]}; " if match[1] else ""
    return f"{weight}font-size: {match[2]}px"


def _scalable(match: re.Match[str]) -> str:
    return f'{match[1]} style="max-width: {float(match[2]) * 4 / 3:.0f}px"'


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean; at the ends the window shrinks instead of inventing points."""
    half = window // 2
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    mean: np.ndarray = (total[high] - total[low]) / (high - low)
    return mean


def _levels(axes: Axes, levels: Mapping[str, float], colours: Any) -> None:
    for name, value in levels.items():
        colour = light(next(colours, SERIES[-1]))
        axes.axhline(value, color=colour, linestyle=(0, (4, 3)), linewidth=1.4, label=name)


def _thousands(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter

    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _centres(count: int) -> list[float]:
    return [i + 0.5 for i in range(0, count, _stride(count))]


def _indices(count: int) -> list[str]:
    return [str(i) for i in range(0, count, _stride(count))]


def _stride(count: int) -> int:
    return 1 if count <= 16 else 8 if count <= 64 else 16


def _annotate(axes: Axes, relative_LE: np.ndarray, shade_LE: np.ndarray) -> None:
    for (layer, expert), value in np.ndenumerate(relative_LE):
        strong = abs(shade_LE[layer, expert]) > 0.6 * HEAT_RANGE
        axes.text(
            expert + 0.5,
            layer + 0.5,
            f"{value:.1f}",
            ha="center",
            va="center_baseline",
            fontsize=7,
            color=light("paper" if strong else "ink"),
        )
