"""moesaic construct: a mixture of experts without training, by a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moesaic.cli.output import JsonOption, OutOption, SetOption, emit

PANEL = "Make"


def command(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")],
    out: OutOption,
    model: Annotated[
        Path | None, typer.Option(help="The dense model, where the recipe names none.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Calibration text: file, folder or dataset.")
    ] = None,
    held_out: Annotated[
        str | None, typer.Option(help="Text to measure the loss on, before and after each stage.")
    ] = None,
    set_: SetOption = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the output directory.")] = False,
    json: JsonOption = False,
) -> None:
    """Split, route, weight and refit a dense model in closed form, and show what each stage did.

    The recipe chooses a split, a router, a weighting and a refit, which combine freely; the default
    is the energy method. Every stage is measured: loss on held-out text, difference with all
    experts on, captured energy of the router beside an oracle, load, error of the layers' outputs.
    The figures are in construct.json and on the page report.html.

    Example: `moesaic construct energy -o runs/moe --model ckpt/dense --data text.jsonl`
    """
    from json import loads

    from moesaic.construct.pipeline import Recipe, construct
    from moesaic.core.config import override, parse, read_yaml
    from moesaic.core.files import write_text
    from moesaic.recipes import find
    from moesaic.report import construct_page

    file = find(recipe, kind="construct")
    given = read_yaml(file)
    for key, value in (("data", data), ("held_out", held_out)):
        if value is not None:
            given[key] = value
    settings = parse(Recipe, override(given, set_ or ()), source=str(file))
    path = construct(model, out=out, recipe=settings, overwrite=overwrite)
    figures: dict[str, Any] = loads((path / "construct.json").read_text(encoding="utf-8"))
    write_text(path / "report.html", construct_page.page(figures).html())
    result = {"path": str(path), **figures}
    emit(result, json=json, render=lambda: _show(figures), path=path)


def _show(figures: dict[str, Any]) -> None:
    from moesaic.report import construct_page

    print(construct_page.stages_table(figures).text())
    print()
    print(construct_page.layers_table(figures).text())
    if numbers := construct_page.by_layer(figures):
        print(f"\n{numbers}")
    print(f"\n{construct_page.spent(figures)}")
