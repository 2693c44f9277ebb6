"""`moesaic route cache`: which expert cache a device needs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moesaic.cli.output import JsonOption, emit
from moesaic.core.errors import UserError

if TYPE_CHECKING:
    from moesaic.routing.sizing import CacheSize, Sizing

_PREFIX = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_PREFIX |= {f"{name}i": 1024.0**power for power, name in enumerate("kmgt", start=1)}
_TIMES = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6}
_SHOWN = 12  # sizes in the table


def cache(
    trace: Annotated[Path, typer.Argument(help="A trace, from `moesaic route record`.")],
    expert_bytes: Annotated[
        str, typer.Option(help="Size of one expert: 352MB, 336MiB, or a number of bytes.")
    ],
    bandwidth: Annotated[
        str, typer.Option(help="From the host to the device: 25GB/s, or bytes a second.")
    ],
    compute: Annotated[
        str,
        typer.Option(help="What a token takes when nothing is fetched: 20ms, seconds, or 50tok/s."),
    ],
    scope: Annotated[
        Literal["layer", "model"], typer.Option(help="A cache for each layer, or one for all.")
    ] = "layer",
    window: Annotated[int, typer.Option(help="Tokens that the policy sch looks ahead.")] = 16,
    memory: Annotated[
        str | None, typer.Option(help="Device memory for experts: advise the fastest that fits.")
    ] = None,
    target: Annotated[
        float | None, typer.Option(help="Tokens/s wanted: advise the smallest cache that does.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write cache.json and the curves, PNG and SVG, here."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Say which cache size and policy a device needs to run a model with offloaded experts.

    Hit rates of the recorded routing give the experts that a token has to fetch, and so tokens/s of
    one sequence: transfers and computing one after the other, and side by side. lru, lfu and fixed
    can run (`moesaic.offload`); sch and belady know the future and are bounds.

    Example: `moesaic route cache runs/trace --expert-bytes 352MB --bandwidth 25GB/s --compute 20ms`
    """
    from moesaic.routing.sizing import size_caches

    found = size_caches(
        trace,
        expert_bytes=_bytes("--expert-bytes", expert_bytes),
        bandwidth=_bytes("--bandwidth", bandwidth),
        compute=_seconds(compute),
        scope=scope,
        window=window,
        memory=None if memory is None else _bytes("--memory", memory),
        target=target,
    )
    result = found.to_dict()
    if out is not None:
        _write(found, out)
        result["path"] = str(out)
    emit(result, json=json, render=lambda: _render(found), path=out)


def _bytes(option: str, text: str) -> float:
    match = re.fullmatch(r"([\d.]+(?:e[+-]?\d+)?) ?([kmgt]i?)?b?(/s)?", text.strip().lower())
    number = None if match is None else _number(match[1])
    if match is None or number is None or (match[3] and option != "--bandwidth"):
        raise UserError(f"{option}={text} was given. Give a size such as 352MB, 336MiB or 3.5e8.")
    return number * _PREFIX[match[2] or ""]


def _seconds(text: str) -> float:
    match = re.fullmatch(r"([\d.]+(?:e[+-]?\d+)?) ?(s|ms|us|tok/s|)", text.strip().lower())
    number = None if match is None else _number(match[1])
    if match is None or not number:
        raise UserError(f"--compute={text} was given. Give a time such as 20ms, or 50tok/s.")
    return 1 / number if match[2] == "tok/s" else number * _TIMES[match[2]]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _render(found: Sizing) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    policies = list(dict.fromkeys(size.policy for size in found.sizes))
    console.print(
        f"tokens/s (hit rate) with a cache for {_whom(found)}; all on the device: {found.full:.4g}",
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False)
    for heading in ("cache", "memory"):
        table.add_column(heading, justify="right")
    for policy in policies:
        runs = found.of(policy)[0].runs
        table.add_column(policy if runs else f"{policy}*", justify="right")
    for row in _shown(found, policies):
        table.add_row(
            f"{row[0].cache:.3g}",
            _size(row[0].bytes),
            *(f"{size.predicted.serial:.4g} ({size.hit_rate:.1%})" for size in row),
        )
    console.print(table)
    console.print("* knows the future: a bound for the others")
    best = found.advice
    if best is None:
        console.print(f"no advice: {found.reason}.")
        return
    console.print(
        f"take cache={best.cache:.3g}, policy={best.policy}: {_size(best.bytes)} on the device, "
        f"{best.hit_rate:.1%} hits, {best.predicted.serial:.4g} tokens/s "
        f"({best.predicted.overlapped:.4g} if transfers hide) - {found.reason}.",
        soft_wrap=True,
    )


def _whom(found: Sizing) -> str:
    layers = f"{found.layers} layers of {found.top_k} of {found.num_experts} experts"
    return f"each of {layers}" if found.scope == "layer" else f"all {layers} together"


def _shown(found: Sizing, policies: list[str]) -> list[list[CacheSize]]:
    """A few sizes, the first and the last among them: [sizes][policies]."""
    rows = list(zip(*(found.of(policy) for policy in policies), strict=True))
    step = max(1, -(-len(rows) // _SHOWN))
    places = sorted({*range(0, len(rows), step), len(rows) - 1})
    return [list(rows[place]) for place in places]


def _size(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def _write(found: Sizing, out: Path) -> None:
    import json as json_module

    from moesaic.core.files import write_text
    from moesaic.report.plots import curves, save

    policies = dict.fromkeys(size.policy for size in found.sizes)
    figure = curves(
        {
            policy: [(size.cache, size.predicted.serial) for size in found.of(policy)]
            for policy in policies
        },
        x_label="cache: slots of a layer / top_k",
        y_label="predicted tokens/s",
        levels={"all on the device": found.full},
    )
    if out.exists() and not out.is_dir():
        raise UserError(f"-o {out} is a file. Give a directory.")
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "cache.json", json_module.dumps(found.to_dict(), indent=1) + "\n")
    for ending in ("png", "svg"):
        save(figure, out / f"cache.{ending}")
