"""What recording costs: a forward pass with and without, and `route record` against bare passes.

    python -m benchmarks.recording --out DIR [--preset mixtral-1b]

A model of the preset's shape with random weights (bf16 on a GPU) and random token ids. Bare and
recorded passes alternate, every other pair the recorded one first; each is timed alone with the
device idle before and after and Python's garbage collector off, the start and end of the recording
included, tensors left where they are. Reported: medians, and the median over pairs of
recorded / bare - 1.

Then `moesaic.record` over the standard library's text against bare passes over batches of the same
shape: tokens/s of the whole call (the model is loaded, and two batches were run before), of the
recording loop alone, and of the bare passes; beside them how fast the text alone is read. Each part
is printed as it is done, and all of them are written to DIR/recording.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

import moesaic
from moesaic.construct.scratch import model_config, read_preset
from moesaic.data.sources import open_domains
from moesaic.kernels import NAME
from moesaic.models.tokenizer import load_tokenizer
from moesaic.routing import record as recorder
from moesaic.routing.blocks import delimiters
from moesaic.routing.reader import Text, ahead

TOKENIZER = Path(moesaic.__file__).parent / "assets" / "demo-llama"


def keep(result: dict[str, Any], path: Path, name: str, value: Any) -> None:
    """Add one figure to the results, print it and write all that there are."""
    result[name] = value
    print(json.dumps({name: value}, indent=1), flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def build(preset: str, overrides: list[str], device: torch.device) -> Any:
    """Make the preset's model on the device, in eval mode."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    wanted = read_preset(preset, overrides=overrides)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            model_config(wanted), dtype=dtype, experts_implementation=NAME
        )
    return model.eval()


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds, from an idle device to an idle device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def compare(
    model: Any, ids: torch.Tensor, recording: Callable[[], AbstractContextManager[Any]], pairs: int
) -> dict[str, float]:
    """Alternate bare and recorded passes."""

    def run(context: Callable[[], AbstractContextManager[Any]]) -> None:
        with context():
            model(ids, use_cache=False)

    contexts = (nullcontext, recording)
    times: tuple[list[float], list[float]] = ([], [])
    gc.collect()
    gc.disable()  # as timeit does: whose turn it comes in is chance
    try:
        with torch.no_grad():
            for which in (0, 1) * 10:  # warm up
                timed(partial(run, contexts[which]), ids.device)
            for pair in range(pairs):
                for which in (0, 1) if pair % 2 == 0 else (1, 0):
                    times[which].append(timed(partial(run, contexts[which]), ids.device))
    finally:
        gc.enable()
    bare, recorded = times
    ratios = [b / a - 1 for a, b in zip(bare, recorded, strict=True)]
    return {
        "bare_ms": 1e3 * statistics.median(bare),
        "recorded_ms": 1e3 * statistics.median(recorded),
        "cost_percent": 100 * statistics.median(ratios),
        "cost_percent_of_medians": 100
        * (statistics.median(recorded) / statistics.median(bare) - 1),
        "cost_percent_of_quickest": 100 * (min(recorded) / min(bare) - 1),
    }


def reading(tokens: int, length: int) -> dict[str, float]:
    """Tokens/s of the text alone, in another process and in a thread."""
    tokenizer, sources = load_tokenizer(TOKENIZER), open_domains("stdlib")
    text = Text(sources, tokenizer, delimiters(tokenizer), tokens, length)
    found = {}
    for name, apart in (("in a process", True), ("in a thread", False)):
        start = time.perf_counter()
        with ahead(text, skip=0, apart=apart) as stream:
            count = len(next(stream))
            found[f"{name}, first_s"] = time.perf_counter() - start
            count += sum(map(len, stream))
        found[f"{name}, tokens_per_s"] = count / (time.perf_counter() - start)
    return found


def throughput(model: Any, tokens: int, length: int, batch: int) -> dict[str, Any]:
    """Tokens/s of `route record`, and of bare passes over batches of its shape."""
    device = model.device
    vocabulary = model.config.vocab_size
    ids = torch.randint(0, vocabulary, (batch, length), device=device)
    passes = max(1, tokens // ids.numel())

    def bare() -> None:
        for _ in range(passes):
            model(ids, use_cache=False)

    tokenizer = load_tokenizer(TOKENIZER)
    loops: list[float] = []
    go = recorder._Run.go

    def timed_go(self: Any, *args: Any, **kwargs: Any) -> None:
        loops.append(timed(lambda: go(self, *args, **kwargs), device))

    recorder._Run.go = timed_go  # type: ignore[method-assign]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for predictions in (True, False):

            def record(name: str, count: int, predictions: bool = predictions) -> Any:
                return moesaic.record(
                    model,
                    data="stdlib",
                    tokens=count,
                    out=Path(folder) / name,
                    tokenizer=tokenizer,
                    sample_length=length,
                    batch=batch,
                    predictions=predictions,
                )

            record(f"warm-{predictions}", 2 * ids.numel())
            timed(bare, device)
            before = timed(bare, device)
            name = f"trace-{predictions}"
            whole = timed(partial(record, name, tokens), device)
            after = timed(bare, device)
            trace = moesaic.Trace(Path(folder) / name)
            rate = passes * ids.numel() / ((before + after) / 2)
            found["with predictions" if predictions else "routing only"] = {
                "rows": trace.rows,
                "bare_tokens_per_s": rate,
                "record_tokens_per_s": trace.rows / whole,
                "record_loop_tokens_per_s": trace.rows / loops[-1],
                "share_percent": 100 * trace.rows / whole / rate,
                "share_of_loop_percent": 100 * trace.rows / loops[-1] / rate,
            }
    recorder._Run.go = go  # type: ignore[method-assign]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", default="mixtral-1b")
    parser.add_argument("--set", action="append", default=[], help="config.x=y of the preset")
    parser.add_argument("--only", choices=["pairs", "record"], help="both parts by default")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=2_000_000, help="of the recorded text")
    parser.add_argument("--sample-length", type=int, default=512)
    parser.add_argument("--sample-batch", type=int, default=16)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(options.preset, options.set, device)
    ids = torch.randint(0, model.config.vocab_size, (options.batch, options.length), device=device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    result: dict[str, Any] = {
        "device": name,
        "torch": torch.__version__,
        "parameters": model.num_parameters(),
        "shape": list(ids.shape),
        "pairs": options.pairs,
    }
    save = partial(keep, result, options.out / "recording.json")
    recordings: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "experts and weights": lambda: moesaic.recording(model, logits=False),
        "with logits": lambda: moesaic.recording(model),
        "nothing": nullcontext,  # nothing is recorded: what the clock itself says
    }
    if options.only != "record":
        for what, recording in recordings.items():
            save(what, compare(model, ids, recording, options.pairs))
    if options.only != "pairs":
        of_text = options.tokens, options.sample_length
        save("route record", throughput(model, *of_text, options.sample_batch))
        save("reading", reading(*of_text))


if __name__ == "__main__":
    main()
