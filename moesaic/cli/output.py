"""Options that commands share, and the one way results reach standard output."""

from __future__ import annotations

import json as json_module
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="The output directory.")]
DeviceOption = Annotated[
    Literal["auto", "cpu", "cuda"], typer.Option(help="Where to run; auto prefers a GPU.")
]
SeedOption = Annotated[int, typer.Option(help="Seed of everything random.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a YAML key: --set section.key=value."
    ),
]


def emit(
    result: Mapping[str, Any],
    *,
    json: bool,
    render: Callable[[], None] | None = None,
    path: Path | str | None = None,
) -> None:
    """Print `result` as one JSON object, or call `render` and print the output path last."""
    if json:
        print(json_module.dumps(dict(result), default=str))
        return
    if render is not None:
        render()
    if path is not None:
        print(path)
