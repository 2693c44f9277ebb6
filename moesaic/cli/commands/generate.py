"""`moesaic generate`: continue a prompt in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from moesaic.cli.output import DeviceOption, JsonOption, SeedOption, emit

PANEL = "Run"


def command(
    model: Annotated[str, typer.Argument(help="A model directory, hub id or alias.")],
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="The text to continue; `-` reads it from stdin.")
    ],
    max_new_tokens: Annotated[int, typer.Option(help="Write at most so many tokens.")] = 100,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token; above 0 samples.")
    ] = 0.0,
    top_k: Annotated[
        int | None, typer.Option(help="Sample from the K likeliest tokens only.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample from the smallest set with this probability.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Take the tokenizer of another directory.")
    ] = None,
    device: DeviceOption = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Number format; auto is the checkpoint's on a GPU, float32 on a CPU."),
    ] = "auto",
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """Continue a prompt, writing to the terminal as the model goes.

    Greedy unless a temperature is given. With --json nothing is streamed; the object holds the
    text, the token counts and the speed.

    Example: `moesaic generate runs/moe -p "def main(" --temperature 0.8 --top-p 0.95`
    """
    import sys

    from moesaic.core.console import note
    from moesaic.generation import generate

    if prompt == "-":
        prompt = sys.stdin.read()

    opening = [prompt]  # shown once the model is there, so that an error leaves stdout empty

    def stream(piece: str) -> None:
        print(opening.pop() if opening else "", piece, sep="", end="", flush=True)

    result = generate(
        model,
        prompt,
        tokenizer=tokenizer,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        device=device,
        dtype=dtype,
        stream=None if json else stream,
    )
    if not json:
        print(*opening)
        note(
            f"{result.new_tokens} tokens in {result.seconds:.1f} s "
            f"({result.tokens_per_second:.0f} tokens/s)"
        )
    emit(result.to_dict(), json=json)
