"""`moesaic kernels`: which code runs the experts, whether it is right, and how fast it is."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from moesaic.cli.output import DeviceOption, JsonOption, SeedOption, emit

PANEL = "Study"

app = typer.Typer(
    help="The code that runs the experts: what there is, whether it is right, how fast it is.",
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
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """Compare our kernels with the plain reference at a model's own shapes: values and gradients.

    Every path that runs on the device is checked; the fastest is the one that models take.
    Random weights of the model's sizes are used, so the model is not loaded. Errors are relative,
    against float64. Large models are checked with fewer experts; the table says how many.

    Example: `moesaic kernels check runs/moe`
    """
    import torch

    from moesaic.core.errors import MoesaicError, check_seed
    from moesaic.kernels.check import check_path as run
    from moesaic.kernels.select import PATHS
    from moesaic.models.expert_shapes import expert_shapes

    place = _place(device)
    results: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    refused: dict[str, str] = {}
    for shape in expert_shapes(model):
        if shape.unusual is not None or shape.activation is None:
            skipped.append({"experts": shape.name, "reason": shape.unusual})
            continue
        fitting = _MOST_WEIGHTS // (3 * shape.hidden * shape.width)
        experts = min(shape.num_experts, max(2, fitting))
        start = len(results)
        for dtype in (torch.float32, torch.bfloat16):
            sizes = {
                "tokens": tokens,
                "hidden": shape.hidden,
                "width": shape.width,
                "experts": experts,
                "top_k": shape.top_k,
            }
            for path in PATHS:
                found = run(
                    **sizes,
                    dtype=dtype,
                    device=place,
                    activation=shape.activation,
                    seed=check_seed(seed),
                    path=path,
                )
                if isinstance(found, str):
                    name = str(dtype).removeprefix("torch.")
                    refused.setdefault(f"{shape.name}, {name}: {path}", found)
                    continue
                row = {"experts": shape.name, **found.to_dict()}
                taken = not any(r["dtype"] == row["dtype"] for r in results[start:])
                (results if taken else others).append(row)

    def render() -> None:
        from rich.console import Console
        from rich.table import Table

        table = Table("D x I, K of E", "dtype", "path", "values", "gradients", "")
        for row in [*results, *others]:
            sizes, errors = row["shape"], row["errors"]
            gradients = max(error for part, error in errors.items() if part != "out")
            table.add_row(
                f"{sizes['D']} x {sizes['I']}, {sizes['K']} of {sizes['E']}",
                row["dtype"],
                row["backend"] + (" (taken)" if row in results else ""),
                f"{errors['out']:.0e}",
                f"{gradients:.0e}",
                "ok" if row["passed"] else f"over {row['tolerance']:.0e}",
            )
        if results:
            Console().print(table)
        for name, reason in refused.items():
            print(f"{name} does not run here: {reason}")
        for row in skipped:
            print(f"{row['experts']}: left to transformers: {row['reason']}")
        if not results and not skipped:
            print("a dense model: no experts to check")

    passed = all(row["passed"] for row in [*results, *others])
    emit(
        {
            "passed": passed,
            "device": place,
            "checks": results,
            "others": others,
            "refused": refused,
            "delegated": skipped,
        },
        json=json,
        render=render,
    )
    if not passed:
        raise MoesaicError("a kernel's error is over its tolerance. Please report this table.")


@app.command()
def bench(
    shape: Annotated[
        list[str] | None,
        typer.Option(help="hidden,width,experts,top_k, as in 2048,768,128,8; again for more."),
    ] = None,
    preset: Annotated[
        list[str] | None,
        typer.Option(help="The shape of a known model, as qwen3-30b-a3b; again for more; or all."),
    ] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Tokens in a call; up to 64 is decoding. Again for more."),
    ] = None,
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], typer.Option()] = "bfloat16",
    routing: Annotated[
        Literal["uniform", "zipf"], typer.Option(help="How tokens spread over the experts.")
    ] = "uniform",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; the median counts.")] = 11,
    only: Annotated[
        list[str] | None, typer.Option(help="Time only this contender; again for more.")
    ] = None,
    device: DeviceOption = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The output directory, for bench.json.")
    ] = None,
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """Time the experts layer: ours, transformers', installed peers, and the dense ceiling.

    Every round times each contender right after six dense products with the same FLOPs; shares are
    of that ceiling. Without --tokens: 16384 on a GPU, 512 on a CPU.

    Example: `moesaic kernels bench --preset qwen3-30b-a3b --preset olmoe-1b-7b -o runs/bench`
    """
    import platform

    import torch
    import transformers

    from moesaic.core.errors import UserError, check_seed
    from moesaic.core.files import output_directory, write_text
    from moesaic.kernels import bench as room

    place = _place(device)
    presets = list(room.PRESETS) if "all" in (preset or []) else preset or []
    unknown = [name for name in presets if name.lower() not in room.PRESETS]
    if unknown:
        room.parse_shape(unknown[0])
    shapes = [room.parse_shape(text) for text in [*presets, *(shape or [])]]
    if not shapes:
        raise UserError(
            f"nothing to time. Give --shape D,I,E,K or --preset: {', '.join(room.PRESETS)}, all."
        )
    results = [
        room.bench(
            sizes,
            tokens=count,
            dtype=getattr(torch, dtype),
            routing=routing,
            repeats=repeats,
            device=place,
            only=only,
            seed=check_seed(seed),
        )
        for sizes in shapes
        for count in tokens or [16384 if place == "cuda" else 512]
    ]
    report = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": torch.cuda.get_device_name() if place == "cuda" else platform.processor(),
        "threads": torch.get_num_threads(),
        "results": [result.to_dict() for result in results],
    }
    if out is not None:
        with output_directory(out) as folder:
            write_text(folder / "bench.json", json_module.dumps(report, indent=2) + "\n")

    def render() -> None:
        from rich.console import Console
        from rich.table import Table

        for result in results:
            head, *rows = room.table(result)
            print(
                f"T {result.tokens}, D,I,E,K {result.shape}, {result.dtype}, {result.routing} "
                f"routing, {result.device}"
            )
            table = Table(*head)
            for row in rows:
                table.add_row(*row)
            Console().print(table)
            for timing in result.timings:
                if timing.refused is not None:
                    print(f"{timing.contender}: not run: {timing.refused}")
                if timing.graph_refused is not None:
                    print(f"{timing.contender}: no CUDA graph: {timing.graph_refused}")
            print()

    emit(report, json=json, render=render, path=out)


@app.command("bench-router")
def bench_router(
    preset: Annotated[
        list[str] | None,
        typer.Option(help="The router of a known model, as qwen3-30b-a3b; again for more."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens in a call.")] = 16384,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; the median counts.")] = 11,
    device: DeviceOption = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The output directory, for bench.json.")
    ] = None,
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """Time a router's choice: one kernel against plain torch, eager and compiled.

    The choice is scores, top-k and weights from given logits; f+b is with their gradient. Without
    --preset: all of them.

    Example: `moesaic kernels bench-router --preset olmoe-1b-7b -o runs/bench-router`
    """
    import torch

    from moesaic.core.errors import check_seed
    from moesaic.core.files import output_directory, write_text
    from moesaic.kernels import router_bench as room

    place = _place(device)
    results = [
        room.bench(name, tokens=tokens, repeats=repeats, device=place, seed=check_seed(seed))
        for name in preset or room.PRESETS
    ]
    report = {
        "torch": torch.__version__,
        "results": [result.to_dict() for result in results],
    }
    if out is not None:
        with output_directory(out) as folder:
            write_text(folder / "bench.json", json_module.dumps(report, indent=2) + "\n")

    def render() -> None:
        from rich.console import Console
        from rich.table import Table

        head, *rows = room.table(results)
        table = Table(*head)
        for row in rows:
            table.add_row(*row)
        print(f"T {tokens}, {results[0].device}")
        Console().print(table)

    emit(report, json=json, render=render, path=out)


def _place(device: str) -> str:
    import torch

    from moesaic.core.errors import UserError

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU. Use --device cpu.")
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
