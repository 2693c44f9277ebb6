"""`moesaic kernels`: which code runs the experts, and whether it is right for a model's shapes."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from moesaic.cli.output import JsonOption, SeedOption, emit

PANEL = "Study"

app = typer.Typer(
    help="The code that runs the experts: what there is, and whether it is right.",
    no_args_is_help=True,
)
_MOST_WEIGHTS = 2**26  # of the experts checked: a float64 copy of them is 0.5 GB


@app.command("list")
def list_(json: JsonOption = False) -> None:
    """List the experts implementations that transformers knows after `import moesaic.models`.

    Example: `moesaic kernels list`
    """
    from moesaic.kernels import implementations

    found = implementations()

    def render() -> None:
        from rich.console import Console
        from rich.table import Table

        table = Table("experts_implementation", "what it is")
        for name, text in found.items():
            table.add_row(name, text)
        Console().print(table)

    emit(found, json=json, render=render)


@app.command()
def check(
    model: Annotated[
        str, typer.Argument(help="A model directory, hub id or alias; config.json is enough.")
    ],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to route.")] = 63,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Where to run; auto prefers a GPU.")
    ] = "auto",
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """Compare our kernels with the plain reference at a model's own shapes: values and gradients.

    Random weights of the model's sizes are used, so the model is not loaded. Errors are relative,
    against float64. Large models are checked with fewer experts; the table says how many.

    Example: `moesaic kernels check runs/moe`
    """
    import torch

    from moesaic.core.errors import MoesaicError, UserError, check_seed
    from moesaic.kernels.check import check as run
    from moesaic.models.expert_shapes import expert_shapes

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU. Use --device cpu.")
    place = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    results, skipped = [], []
    for shape in expert_shapes(model):
        if shape.unusual is not None or shape.activation is None:
            skipped.append({"experts": shape.name, "reason": shape.unusual})
            continue
        fitting = _MOST_WEIGHTS // (3 * shape.hidden * shape.width)
        experts = min(shape.num_experts, max(2, fitting))
        for dtype in (torch.float32, torch.bfloat16):
            result = run(
                tokens=tokens,
                hidden=shape.hidden,
                width=shape.width,
                experts=experts,
                top_k=shape.top_k,
                dtype=dtype,
                device=place,
                activation=shape.activation,
                seed=check_seed(seed),
            )
            results.append({"experts": shape.name, **result.to_dict()})

    def render() -> None:
        from rich.console import Console
        from rich.table import Table

        table = Table("D x I, K of E", "dtype", "runs as", "values", "gradients", "")
        for row in results:
            sizes, errors = row["shape"], row["errors"]
            gradients = max(error for part, error in errors.items() if part != "out")
            table.add_row(
                f"{sizes['D']} x {sizes['I']}, {sizes['K']} of {sizes['E']}",
                row["dtype"],
                row["backend"],
                f"{errors['out']:.0e}",
                f"{gradients:.0e}",
                "ok" if row["passed"] else f"over {row['tolerance']:.0e}",
            )
        if results:
            Console().print(table)
        for row in skipped:
            print(f"{row['experts']}: left to transformers: {row['reason']}")
        if not results and not skipped:
            print("a dense model: no experts to check")

    passed = all(row["passed"] for row in results)
    emit(
        {"passed": passed, "device": place, "checks": results, "delegated": skipped},
        json=json,
        render=render,
    )
    if not passed:
        raise MoesaicError("a kernel's error is over its tolerance. Please report this table.")
