"""`moesaic info`: what a model is, from its files alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from moesaic.cli.output import JsonOption, emit

if TYPE_CHECKING:
    from moesaic.models.describe import Description

PANEL = "Help"


def command(
    model: Annotated[str, typer.Argument(help="A model directory, hub id or alias.")],
    json: JsonOption = False,
) -> None:
    """Show what a model is: family, experts, total and active parameters, dtype, size, lineage.

    Nothing is loaded: config.json is enough, weight files are looked at where they are there. An
    alias works without the network, another hub id once its config.json was downloaded. --json
    holds the whole config and every routed layer.

    Example: `moesaic info runs/moe`
    """
    from moesaic.models.describe import describe

    found = describe(model)
    emit(found.to_dict(), json=json, render=lambda: _render(found))


def _render(found: Description) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    alias = f" (alias {found.alias})" if found.alias else ""
    table.add_row("model", f"{found.path}{alias}")
    table.add_row("class", f"{found.architecture or '?'} ({_model_type(found)})")
    if found.refused:
        table.add_row("not loaded", found.refused)
    for summary in found.corrected.values():
        table.add_row("corrected", summary)
    for name, value in _anatomy_rows(found):
        table.add_row(name, value)
    table.add_row("dtype", found.dtype or "not stated")
    if found.catalogued:
        table.add_row("weights", "not downloaded; the sizes are those of moesaic's catalog")
    elif found.weights is None:
        table.add_row("weights", "none here, config.json only")
    else:
        files = f"{found.weights.files} file{'s' if found.weights.files > 1 else ''}"
        table.add_row("weights", f"{_size(found.weights.bytes)} in {files}")
        if found.anatomy is None:
            table.add_row("parameters", f"{found.weights.parameters:,}")
        elif found.weights.parameters != found.anatomy.params_total:
            table.add_row("warning", f"the files hold {found.weights.parameters:,} parameters")
    for name, value in _lineage_rows(found):
        table.add_row(name, value)
    Console().print(table)


def _model_type(found: Description) -> str:
    ours = found.anatomy.model_type if found.anatomy else None
    stated = f"model_type {found.model_type or 'none'}"
    return stated if ours in (None, found.model_type) else f"{ours}; config.json has {stated}"


def _anatomy_rows(found: Description) -> list[tuple[str, str]]:
    anatomy = found.anatomy
    if anatomy is None:
        return []
    total, active = anatomy.params_total, anatomy.params_active
    rows = [("layers", f"{anatomy.num_layers}")]
    groups: dict[tuple[str, int, int, int], list[int]] = {}
    for layer in anatomy.layers:
        key = (layer.kind, layer.num_experts, layer.top_k, layer.num_shared)
        groups.setdefault(key, []).append(layer.index)
    for (kind, experts, top_k, shared), indices in groups.items():
        always = f" + {shared} shared" if shared else ""
        where = f"layer{'s' * (len(indices) > 1)} {_ranges(indices)}"
        rows.append(
            (f"{kind} experts", f"{top_k} of {experts}{always} in {len(indices)} ({where})")
        )
    if not anatomy.layers:
        rows.append(("experts", "none, a dense model"))
    rows.append(("parameters", f"{total:,}"))
    if anatomy.layers:
        rows.append(("active a token", f"{active:,} ({active / total:.1%})"))
    return rows


def _ranges(numbers: list[int]) -> str:
    """Rising numbers in words: "0, 2 to 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _lineage_rows(found: Description) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    lineage = found.lineage
    while isinstance(lineage, dict):
        parent = f" from {lineage['parent']}" if lineage.get("parent") else ""
        rows.append(("" if rows else "made by", f"{lineage.get('step', '?')}{parent}"))
        lineage = lineage.get("parent_lineage")
    return rows


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
