"""moesaic data: look at text, count it, tokenise it, train a tokenizer on it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from moesaic.cli.output import JsonOption, OutOption, emit

PANEL = "Train"

app = typer.Typer(
    no_args_is_help=True,
    help="Look at text, count it, tokenise it, train a tokenizer on it.",
)

_HEADINGS = {
    "bytes_per_token": "bytes/token",
    "median_tokens": "median",
    "longest_tokens": "longest",
}

DataArgument = Annotated[
    str,
    typer.Argument(
        help="A .jsonl or .txt file, a folder, a pattern such as 'corpus/*/train.jsonl', the name "
        "of a Hugging Face dataset, or stdlib."
    ),
]
TokenizerOption = Annotated[
    Path, typer.Option("--tokenizer", "-t", help="A tokenizer or model directory.")
]


@app.command("inspect")
def inspect_(
    data: DataArgument,
    tokenizer: TokenizerOption,
    domain: Annotated[str | None, typer.Option(help="Show one domain only.")] = None,
    documents: Annotated[int, typer.Option(min=1, help="Documents of each domain.")] = 2,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each document.")] = 200,
    json: JsonOption = False,
) -> None:
    """Show documents as a model sees them: decoded, with the borders between tokens.

    Neighbouring tokens alternate in colour; where colours are off, a bar stands between them.

    Example: `moesaic data inspect text.jsonl --tokenizer ckpt/dense --documents 1`
    """
    from moesaic.data.statistics import inspect
    from moesaic.models.tokenizer import load_tokenizer

    found = inspect(
        data, load_tokenizer(tokenizer), documents=documents, tokens=tokens, domain=domain
    )
    if json:
        emit({"documents": [asdict(document) for document in found]}, json=True)
        return
    for document in found:
        _show(document)


@app.command()
def stats(
    data: DataArgument,
    tokenizer: Annotated[
        Path | None,
        typer.Option("--tokenizer", "-t", help="Also count tokens: a tokenizer directory."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Count documents, bytes and tokens of each domain.

    Example: `moesaic data stats 'corpus/*/train.jsonl' --tokenizer ckpt/dense`
    """
    from moesaic.data.statistics import statistics
    from moesaic.models.tokenizer import load_tokenizer

    found = statistics(data, None if tokenizer is None else load_tokenizer(tokenizer))
    rows = {name: asdict(domain) for name, domain in found.items()}
    emit({"domains": rows}, json=json, render=lambda: _table(rows))


@app.command()
def tokenize(
    data: DataArgument,
    tokenizer: TokenizerOption,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The cache; by default the one `moesaic train` looks in."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Tokenise text ahead of time; a training run with the same cache then starts at once.

    What is in the cache already is not done again.

    Example: `moesaic data tokenize 'corpus/*/train.jsonl' --tokenizer ckpt/dense`
    """
    from moesaic.data.tokens import cache_directory, open_tokens
    from moesaic.models.tokenizer import load_tokenizer

    cache = cache_directory() if out is None else out
    domains = open_tokens(data, load_tokenizer(tokenizer), cache=cache)
    rows = {
        name: {"documents": len(domain), "tokens": domain.tokens}
        for name, domain in domains.items()
    }
    emit({"path": str(cache), "domains": rows}, json=json, render=lambda: _table(rows), path=cache)


@app.command()
def tokenizer(
    data: DataArgument,
    out: OutOption,
    vocabulary: Annotated[int, typer.Option(help="Tokens in all; 259 or more.")] = 4096,
    max_bytes: Annotated[
        int | None, typer.Option(help="Read at most so many bytes of each domain.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Train a byte-level BPE tokenizer; the same text gives the same tokenizer.

    The directory loads with AutoTokenizer. Ids 0, 1, 2 are end of text, BOS and padding.

    Example: `moesaic data tokenizer stdlib@train -o runs/tokenizer --vocabulary 4096`
    """
    from moesaic.data.tokenizer import train_tokenizer
    from moesaic.models.tokenizer import load_tokenizer

    path = train_tokenizer(data, out=out, vocabulary=vocabulary, max_bytes=max_bytes)
    size = len(load_tokenizer(path))
    emit(
        {"path": str(path), "vocabulary": size},
        json=json,
        render=lambda: print(f"{size} tokens"),
        path=path,
    )


def _show(document: Any) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console()
    shown = len(document.ids)
    of = f"{shown} of {document.tokens}" if shown < document.tokens else str(shown)
    console.print(Text(f"── {document.domain}, document {document.index}: {of} tokens", "bold"))
    text = Text()
    for index, piece in enumerate(document.pieces):
        if console.color_system is None:
            text.append("|" if index else "").append(piece)
        else:
            text.append(piece, "black on cyan" if index % 2 else "black on white")
    console.print(text, soft_wrap=True)


def _table(rows: dict[str, dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Column, Table

    columns = [key for key in next(iter(rows.values())) if _known(rows, key)]
    table = Table(Column("domain", no_wrap=True), box=box.SIMPLE)
    for column in columns:
        table.add_column(_HEADINGS.get(column, column), justify="right", no_wrap=True)
    for name, row in rows.items():
        table.add_row(name, *(_number(row[column]) for column in columns))
    totals = [sum(row[c] for row in rows.values()) if _adds_up(c) else None for c in columns]
    if len(rows) > 1:
        table.add_section()
        table.add_row("all", *(_number(total) for total in totals))
    Console().print(table)


def _known(rows: dict[str, dict[str, Any]], key: str) -> bool:
    return any(row[key] is not None for row in rows.values())


def _adds_up(column: str) -> bool:
    return column in ("documents", "bytes", "tokens")


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else f"{value:,}"
