"""moesaic recipe: the YAML files that ship with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesaic.cli.output import JsonOption, OutOption, emit

PANEL = "Help"

app = typer.Typer(
    help="Shipped YAML files: training, presets of new models, construction.", no_args_is_help=True
)

Name = Annotated[str, typer.Argument(help="A name that `moesaic recipe list` shows.")]


@app.command("list")
def list_(json: JsonOption = False) -> None:
    """List every recipe with what it is for.

    Example: `moesaic recipe list`
    """
    from moesaic.recipes import recipes, summary

    found = {
        kind: {name: summary(path) for name, path in recipes(kind).items()}
        for kind in ("train", "init", "construct")
    }

    def render() -> None:
        from rich.console import Console
        from rich.table import Table

        table = Table("command", "recipe", "what it is for")
        for kind, entries in found.items():
            for name, text in entries.items():
                table.add_row(f"moesaic {kind}", name, text)
        Console().print(table)

    emit(found, json=json, render=render)


@app.command()
def show(name: Name, json: JsonOption = False) -> None:
    """Print a recipe.

    Example: `moesaic recipe show llama-4m`
    """
    from moesaic.recipes import locate

    kind, path = locate(name)
    text = path.read_text(encoding="utf-8")
    emit({"kind": kind, "name": name, "yaml": text}, json=json, render=lambda: print(text, end=""))


@app.command()
def copy(name: Name, out: OutOption = Path(), json: JsonOption = False) -> None:
    """Copy a recipe into a directory, to be edited.

    Example: `moesaic recipe copy cpt-tiny -o my-recipes`
    """
    from moesaic.core.errors import UserError
    from moesaic.core.files import check_folder, write_text
    from moesaic.recipes import locate

    _, source = locate(name)
    target = check_folder(out) / source.name
    if target.exists():
        raise UserError(f"{target} exists. Choose another -o, or remove it.")
    write_text(target, source.read_text(encoding="utf-8"))
    emit({"path": str(target)}, json=json, path=target)
