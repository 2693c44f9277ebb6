"""moesaic route: record how a model routes, and study what was recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from moesaic.cli.output import JsonOption, OutOption, SeedOption, emit
from moesaic.cli.route_cache import cache

PANEL = "Study"

app = typer.Typer(
    no_args_is_help=True,
    help="Record how a model routes, and study what was recorded.",
)


@app.command()
def record(
    model: Annotated[str, typer.Argument(help="A model directory, hub id or alias.")],
    data: Annotated[
        str,
        typer.Option(
            help="A .jsonl or .txt file, a folder (each file or sub-folder is a domain), a "
            "pattern, or the name of a Hugging Face dataset."
        ),
    ],
    tokens: Annotated[int, typer.Option(help="Tokens in all, the same number of each domain.")],
    out: OutOption,
    sample_length: Annotated[int, typer.Option(help="Tokens read together.")] = 512,
    batch: Annotated[
        int | None, typer.Option(help="Samples at once; by default about 8,192 tokens.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Shuffle the documents; by default they keep their order.")
    ] = None,
    logits: Annotated[bool, typer.Option("--logits", help="Keep the router logits too.")] = False,
    predictions: Annotated[
        bool, typer.Option(help="Keep the likeliest next token and the loss of every token.")
    ] = True,
    language: Annotated[
        str | None, typer.Option(help="NLLB: the code of the text's language, as in eng_Latn.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Take the tokenizer of another directory.")
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Where to run; auto prefers GPUs.")
    ] = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Number format; auto is the checkpoint's on a GPU, float32 on a CPU."),
    ] = "auto",
    json: JsonOption = False,
) -> None:
    """Run a model over text and keep which experts every token went to.

    The output directory is a trace: small raw files, opened in milliseconds. After an interruption
    the same command goes on where it was.

    Example: `moesaic route record runs/moe --data text.jsonl --tokens 100000 -o runs/trace`
    """
    from moesaic.routing.record import record as run

    trace = run(
        model,
        data=data,
        tokens=tokens,
        out=out,
        tokenizer=tokenizer,
        sample_length=sample_length,
        batch=batch,
        seed=seed,
        logits=logits,
        predictions=predictions,
        language=language,
        device=device,
        dtype=dtype,
    )
    samples = len(trace.samples()) - 1
    result = {
        "path": str(trace.directory),
        "rows": trace.rows,
        "samples": samples,
        "domains": list(trace.domains),
        "layers": list(trace.layers),
        "num_experts": trace.num_experts,
        "top_k": trace.top_k,
    }

    def show() -> None:
        print(
            f"{trace.rows:,} tokens in {samples:,} samples of {len(trace.domains)} domains; "
            f"{len(trace.layers)} layers, {trace.top_k} of {trace.num_experts} experts"
        )

    emit(result, json=json, render=show, path=trace.directory)


app.command()(cache)


@app.command()
def analyze(
    trace: Annotated[Path, typer.Argument(help="A trace, from `moesaic route record`.")],
    out: OutOption,
    segments: Annotated[
        str, typer.Option(help="Segment lengths of SRP and windows of SCH, in tokens.")
    ] = "4,16,64,256",
    bootstrap: Annotated[int, typer.Option(help="Replicates of intervals; 0 for none.")] = 1000,
    confidence: Annotated[float, typer.Option(help="Confidence of the intervals.")] = 0.95,
    intervals: Annotated[
        Literal["model", "layer"], typer.Option(help="Finest level of SRP that gets intervals.")
    ] = "layer",
    cache_samples: Annotated[
        int | None,
        typer.Option(help="Samples of each domain that cache simulations take; all by default."),
    ] = None,
    min_count: Annotated[
        int, typer.Option(help="Leave out words that occur less often: vocabulary.")
    ] = 20,
    case_tokens: Annotated[int, typer.Option(help="Tokens shown of each domain.")] = 256,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Take the tokenizer of another directory for words.")
    ] = None,
    report: Annotated[bool, typer.Option(help="Draw figures and report.html.")] = True,
    seed: SeedOption = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace an analysis with others.")] = False,
    json: JsonOption = False,
) -> None:
    """Measure everything about a trace: consistency, caches, load, specialisation; and show it.

    The output directory holds report.html (one page, no network needed), the figures, metrics.json
    and every figure in parquet tables. After an interruption the same command goes on.

    Example: `moesaic route analyze runs/trace -o runs/report`
    """
    from moesaic.routing.analyze import analyze as run

    analysis = run(
        trace,
        out=out,
        segments=_numbers("segments", segments),
        bootstrap=bootstrap,
        confidence=confidence,
        intervals=intervals,
        cache_samples=cache_samples,
        min_count=min_count,
        case_tokens=case_tokens,
        tokenizer=tokenizer,
        report=report,
        seed=seed,
        overwrite=overwrite,
    )
    result = {"path": str(analysis.directory), **analysis.metrics}

    def show() -> None:
        from moesaic.report.routing_text import overview

        print(overview(analysis))
        if report:
            print(f"report       {analysis.directory / 'report.html'}")

    emit(result, json=json, render=show, path=analysis.directory)


@app.command("report")
def redraw(
    analysis: Annotated[Path, typer.Argument(help="What `moesaic route analyze` wrote.")],
    json: JsonOption = False,
) -> None:
    """Draw the figures and the page of an analysis again, from its tables.

    Example: `moesaic route report runs/report`
    """
    from moesaic.report.analysis import Analysis
    from moesaic.report.routing_page import draw

    path = draw(Analysis(analysis))
    emit({"path": str(path)}, json=json, path=path)


@app.command()
def compare(
    analyses: Annotated[
        list[Path], typer.Argument(help="Analyses or traces; the first is the base.")
    ],
    out: OutOption,
    name: Annotated[
        list[str] | None, typer.Option(help="Name the models, in order: --name A --name B.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the output directory.")] = False,
    json: JsonOption = False,
) -> None:
    """Put models side by side: base and post-trained ones, and those of the routing study.

    Traces are analyzed first, beside the output directory.

    Example: `moesaic route compare runs/report-base runs/report-sft -o runs/comparison`
    """
    import json as json_module

    from moesaic.routing.compare import compare as run

    path = run(analyses, out=out, names=name, overwrite=overwrite)
    found = json_module.loads((path / "comparison.json").read_text(encoding="utf-8"))

    def show() -> None:
        from moesaic.report.compare_page import differences_table, likeness_table

        print(differences_table(found).text())
        print()
        print(likeness_table(found).text())
        for note in found["notes"]:
            print(f"note         {note}")
        print(f"report       {path / 'report.html'}")

    emit({"path": str(path), **found}, json=json, render=show, path=path)


@app.command()
def show(
    model: Annotated[str, typer.Argument(help="A model directory, hub id or alias.")],
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="The text to look at; `-` reads it from stdin.")
    ],
    layer: Annotated[
        str, typer.Option(help="A layer's number, `best` (the most consistent one) or `all`.")
    ] = "best",
    new_tokens: Annotated[int, typer.Option(help="Continue the text by so many tokens.")] = 32,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Take the tokenizer of another directory.")
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Where to run; auto prefers GPUs.")
    ] = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Number format; auto is the checkpoint's on a GPU, float32 on a CPU."),
    ] = "auto",
    json: JsonOption = False,
) -> None:
    """Show a prompt and its continuation with every token coloured by its first expert.

    What the model wrote is underlined. Without colours the expert's number stands behind each
    token.

    Example: `moesaic route show runs/moe -p "def main(" --layer all`
    """
    import sys

    from moesaic.cli.routed import places_of, print_routed
    from moesaic.routing.show import show as run

    text = sys.stdin.read() if prompt == "-" else prompt
    shown = run(model, text, new_tokens=new_tokens, tokenizer=tokenizer, device=device, dtype=dtype)
    places = places_of(shown.decoder, layer)

    def render() -> None:
        if shown.encoder is not None:
            print("encoder")
            print_routed(shown.encoder, places_of(shown.encoder, layer))
            print("decoder")
        print_routed(shown.decoder, places)

    emit(shown.to_dict(), json=json, render=render)


def _numbers(name: str, text: str) -> tuple[int, ...]:
    from moesaic.core.errors import UserError

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"--{name} {text}: give whole numbers with commas, as in 4,16,64,256."
        ) from None
