"""moesaic init: a new model with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesaic.cli.output import JsonOption, OutOption, SetOption, emit

PANEL = "Make"


def command(
    preset: Annotated[
        str, typer.Argument(help="A shipped preset (see `moesaic recipe list`) or a YAML file.")
    ],
    out: OutOption,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder whose tokenizer is copied beside the model.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the weights; wins over the file's.")
    ] = None,
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Make a new model with random weights: any causal model type of transformers, or ours.

    The YAML names `model_type` and, under `config`, that type's fields. A field that the type does
    not have, or does not keep, is an error. The exact numbers of parameters are printed.

    Example: `moesaic init llama-4m -o runs/new --set config.num_hidden_layers=2`
    """
    from moesaic.construct.scratch import build

    built = build(preset, out=out, seed=seed, tokenizer=tokenizer, overrides=set_ or ())

    def render() -> None:
        print(f"{built.architecture}: {built.parameters:,} parameters, {built.active:,} active")

    emit(
        {
            "path": str(built.path),
            "architecture": built.architecture,
            "parameters": built.parameters,
            "active_parameters": built.active,
        },
        json=json,
        render=render,
        path=built.path,
    )
