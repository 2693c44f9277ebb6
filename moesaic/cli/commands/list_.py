"""`moesaic list`: the choices of every kind, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import typer

from moesaic.cli.output import JsonOption, emit

PANEL = "Help"


def command(
    kind: Annotated[
        str | None, typer.Argument(help="What to list; without it, the kinds themselves.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """List what there is to choose from: splits, routers, gates, models, recipes, presets, kernels.

    Example: `moesaic list splits`
    """
    from moesaic.core.errors import unknown

    if kind is None:
        entries = {name: what for name, (what, _) in KINDS.items()}
    elif kind in KINDS or f"{kind}s" in KINDS:
        entries = KINDS[kind if kind in KINDS else f"{kind}s"][1]()
    else:
        raise unknown("kind", kind, KINDS)

    def render() -> None:
        from rich.console import Console
        from rich.table import Table

        table = Table(kind or "kind", "what it is")
        for name, text in entries.items():
            table.add_row(name, text)
        Console().print(table)

    emit(entries, json=json, render=render)


def _splits() -> dict[str, str]:
    from moesaic.construct.splits import SPLITS

    return SPLITS.describe()


def _routers() -> dict[str, str]:
    from moesaic.construct.routers import ROUTERS

    return ROUTERS.describe()


def _upcycles() -> dict[str, str]:
    from moesaic.construct.upcycles import UPCYCLES

    return UPCYCLES.describe()


def _weightings() -> dict[str, str]:
    from moesaic.construct.weightings import WEIGHTINGS

    return WEIGHTINGS.describe()


def _refits() -> dict[str, str]:
    from moesaic.construct.refits import REFITS

    return REFITS.describe()


def _gates() -> dict[str, str]:
    from moesaic.models.gates import GATES

    return {name: _first_line(gate) for name, gate in GATES.items()}


def _calculators() -> dict[str, str]:
    from moesaic.models.calculators import CALCULATORS

    return {name: _first_line(calculator) for name, calculator in CALCULATORS.items()}


def _models() -> dict[str, str]:
    from moesaic.models.catalog import catalog

    return {
        alias: f"{entry.hub or entry.note} ({entry.family}), {entry.total:g} B parameters, "
        f"{entry.active:g} B active; {entry.status}"
        for alias, entry in catalog().items()
    }


def _recipes() -> dict[str, str]:
    from moesaic.recipes import recipes, summary

    kinds: tuple[Literal["train", "construct"], ...] = ("train", "construct")
    return {name: summary(path) for kind in kinds for name, path in recipes(kind).items()}


def _presets() -> dict[str, str]:
    from moesaic.recipes import recipes, summary

    return {name: summary(path) for name, path in recipes("init").items()}


def _kernels() -> dict[str, str]:
    from moesaic.kernels import implementations

    return implementations()


KINDS: dict[str, tuple[str, Callable[[], dict[str, str]]]] = {
    "splits": ("ways to divide a dense layer's neurons into experts", _splits),
    "routers": ("first weights of the router of a converted model", _routers),
    "weightings": ("how the chosen experts of a construction add up", _weightings),
    "refits": ("how a construction makes up for dropped experts", _refits),
    "upcycles": ("ways to make more experts than a dense model has", _upcycles),
    "gates": ("gate_type of a LLaMA-MoE", _gates),
    "calculators": ("calculator_type of a LLaMA-MoE", _calculators),
    "models": ("aliases of published models, and whether this version loads them", _models),
    "recipes": ("shipped files for moesaic train and moesaic construct", _recipes),
    "presets": ("shipped shapes for moesaic init", _presets),
    "kernels": ("experts implementations registered with transformers", _kernels),
}


def _first_line(entry: object) -> str:
    """First sentence of a docstring, which may go over a line."""
    paragraph = " ".join((entry.__doc__ or "").strip().partition("\n\n")[0].split())
    return paragraph.partition(". ")[0].rstrip(".") + "."
