"""The demo's work: split three ways, check, measure, train the best, measure again, write a report.

Results are plain data (results.json), which the page is made from:

    dense        {"model", "loss": {"mean", domain...}}              nats a token, held-out
    methods      one per split: {"split", "why", "experts", "top_k", "exact", "dense_check",
                 "loss_converted", "loss_trained", "domains", "seconds"}
    training     {"log": [{"tokens", "loss"}], "held_out": [{"tokens", "loss": {...}}]}
    load         {"converted" | "trained": {domain: load_LE}}         each row sums to 1
    samples      [{"prompt", "texts": {model: text}}]
    parameters   {"total", "active"}; configs {title: yaml}; versions; machine; seconds
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.core.config import to_yaml
from moesaic.core.console import Bar, Reporter, current, note, progress, reporting
from moesaic.core.errors import UserError
from moesaic.core.files import check_output, output_directory, write_text
from moesaic.core.lineage import FILE_NAME as LINEAGE
from moesaic.core.lineage import read_lineage, versions
from moesaic.demo import page

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DENSE = Path(__file__).parents[1] / "assets" / "demo-llama"
SPLITS: Mapping[str, str] = {
    "random": "dealt out by chance",
    "cluster": "similar weights together (balanced k-means)",
    "gradient": "what matters for the same kind of text together",
}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "gradient": {"tokens": 16_384, "context": 256},  # seconds, where the default takes a minute
}
TRAIN, VALID = "stdlib@train", "stdlib@valid"
PROMPTS = (
    "def main(",
    "class Reader:\n    def __init__(self",
    "Return the number of",
    "The value of the expression is",
)
OUTPUTS = {"report.html", "results.json", "moe", "converted"}
CONTEXT = 256
DOCUMENTS = 32
"""Held-out documents a domain; the first CONTEXT tokens of each are scored."""
SEQUENCES = 4
MOST_TOKENS = 400_000
"""What a fast machine trains on; a slower one stops after its seconds."""
SECONDS = 75.0
NEW_TOKENS = 64
SAMPLING: Mapping[str, Any] = {"temperature": 0.7, "top_p": 0.95, "seed": 1}
"""Greedy text of models this small goes round in circles."""

# Expected shares of the time, for the bar over everything.
_DENSE, _SPLIT, _TRAIN, _REST = 5, 9, 55, 13


def demo(
    out: Path,
    *,
    model: Path = DENSE,
    experts: int = 8,
    top_k: int = 2,
    tokens: int | None = None,
    seconds: float | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Run the whole demo and return its results, which are also in `out`/results.json.

    `out` receives report.html, results.json, the trained checkpoint in moe/ and the conversions it
    was chosen from in converted/, all at the end or not at all. Training takes `tokens`, or as
    many as this machine manages in `seconds`, which is measured first; by default the smaller of
    MOST_TOKENS and SECONDS' worth.

    Raises UserError for an `out` that is taken (with `overwrite`: by anything but an earlier demo),
    a model that cannot be split as asked, or both `tokens` and `seconds`.
    """
    started = time.monotonic()
    overwrite = overwrite and _is_demo(out)
    out = check_output(out, overwrite=overwrite)
    _check(model, experts, top_k, tokens, seconds)
    total = _DENSE + _SPLIT * len(SPLITS) + _TRAIN + _REST
    with (
        output_directory(out, overwrite=overwrite) as partial,
        progress("demo", total=total) as bar,
        _fitting_threads(model),
    ):
        run = _Run(model, partial, out, experts=experts, top_k=top_k, seed=seed, bar=bar)
        run.measure_dense()
        for name, why in SPLITS.items():
            run.convert(name, why)
        best = run.best()
        run.train(best, tokens=tokens, seconds=seconds)
        run.compare(best)
        results = run.results | {
            "report": str(out / "report.html"),
            "checkpoint": str(out / "moe"),
            "versions": versions(),
            "machine": _machine(),
            "seconds": round(time.monotonic() - started, 1),
        }
        run.name_final_place()
        page.write(results, partial / "report.html")
        write_text(partial / "results.json", json.dumps(results, indent=1) + "\n")
    return results


@dataclass
class _Run:
    """A demo under way: settings, the directory it fills, what that will be called, results."""

    model: Path
    folder: Path
    final: Path
    experts: int
    top_k: int
    seed: int
    bar: Bar
    results: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, list[str]] = field(default_factory=dict)

    def converted(self, split: str) -> Path:
        """Where the conversion with a split is."""
        return self.folder / "converted" / split

    @property
    def trained(self) -> Path:
        """Where the trained mixture is."""
        return self.folder / "moe"

    def renamed(self, text: str) -> str:
        """`text` with the name that the directory will have at the end."""
        return text.replace(str(self.folder), str(self.final))

    def measure_dense(self) -> None:
        from moesaic.models.tokenizer import load_tokenizer

        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self.model)
        dense = _load(self.model)
        loss = self._loss(dense)
        self.samples["dense"] = self._write(dense)
        self.results |= {
            "experts": self.experts,
            "top_k": self.top_k,
            "dense": {"model": str(self.model), "loss": loss},
            "methods": [],
            "configs": {},
        }
        note(f"dense model: held-out loss {_losses(loss)}")
        self.bar.advance(_DENSE)

    def convert(self, name: str, why: str) -> None:
        """Split, convert (which checks against the dense model) and measure."""
        from moesaic.construct.convert import convert

        start = time.monotonic()
        path = convert(
            self.model,
            out=self.converted(name),
            split={"method": name, **SETTINGS.get(name, {})},
            experts=self.experts,
            top_k=self.top_k,
            data=TRAIN,
            seed=self.seed,
            verify="full",
        )
        seconds = time.monotonic() - start
        lineage = read_lineage(path) or {}
        loss = self._loss(_load(path))
        self.results["methods"].append(
            {
                "split": name,
                "why": why,
                "experts": self.experts,
                "top_k": self.top_k,
                "exact": lineage["exact"],
                "dense_check": lineage["difference"],
                "loss_converted": loss["mean"],
                "loss_trained": None,
                "domains": {"converted": loss},
                "seconds": round(seconds, 2),
            }
        )
        self.results["configs"][f"convert, {name} split"] = to_yaml(lineage["config"])
        note(
            f"{name} split: all experts on differ from dense by {lineage['difference']:.1e}; "
            f"top {self.top_k} of {self.experts}: held-out loss {_losses(loss)}"
        )
        self.bar.advance(_SPLIT)

    def best(self) -> dict[str, Any]:
        method: dict[str, Any] = min(self.results["methods"], key=lambda m: m["loss_converted"])
        return method

    def train(self, best: dict[str, Any], *, tokens: int | None, seconds: float | None) -> None:
        """Train the best conversion on, and read the curve off the run's log."""
        from moesaic.training.loop import train
        from moesaic.training.telemetry import LOG_NAME, read_log_lines

        source, out = self.converted(best["split"]), self.trained
        tokens = tokens or self._affordable(source, seconds)
        config = self._training_config(tokens)
        note(f"training the {best['split']} split on, {tokens:,} tokens")
        with reporting(_Forward(current(), self.renamed, self.bar, "training", _TRAIN)):
            train(config, model=source, out=out)
        shutil.rmtree(out / "cache", ignore_errors=True)  # tokens: quickly made again
        lines = read_log_lines(out / LOG_NAME)
        held_out = [
            {"tokens": line["tokens"], "loss": line["loss"]}
            for line in lines
            if line["event"] == "evaluate"
        ]
        self.results["training"] = {
            "log": [
                {"tokens": line["tokens"], "loss": line["loss"]}
                for line in lines
                if line["event"] == "train"
            ],
            "held_out": [{"tokens": 0, "loss": best["domains"]["converted"]}, *held_out],
        }
        self.results["trained_tokens"] = held_out[-1]["tokens"]
        self.results["configs"]["train"] = self.renamed((out / "train.yaml").read_text("utf-8"))

    def compare(self, best: dict[str, Any]) -> None:
        """Measure the checkpoint that was written, and let every model write and show its load."""
        from moesaic.measure.load import measure_load
        from moesaic.models.anatomy import anatomy

        converted, moe = _load(self.converted(best["split"])), _load(self.trained)
        loss = self._loss(moe)
        best["loss_trained"] = loss["mean"]
        best["domains"]["trained"] = loss
        note(f"after training: held-out loss {_losses(loss)}")
        sizes = anatomy(moe)
        self.results["parameters"] = {"total": sizes.params_total, "active": sizes.params_active}
        self.results["load"] = {}
        for stage, each in (("converted", converted), ("trained", moe)):
            self.samples[f"MoE, {stage}"] = self._write(each)
            load = measure_load(
                each, self.tokenizer, VALID, context=CONTEXT, max_documents=DOCUMENTS
            )
            tables = load.share_DLE.tolist()
            self.results["load"][stage] = dict(zip(load.domains, tables, strict=True))
        self.results["samples"] = [
            {"prompt": prompt, "texts": {who: texts[i] for who, texts in self.samples.items()}}
            for i, prompt in enumerate(PROMPTS)
        ]
        self.bar.advance(_REST)

    def name_final_place(self) -> None:
        """Write the final directory's name where files made on the way name this one."""
        for file in [*self.folder.rglob(LINEAGE), self.trained / "train.yaml"]:
            write_text(file, self.renamed(file.read_text("utf-8")))

    def _loss(self, model: PreTrainedModel) -> dict[str, float]:
        from moesaic.measure.loss import held_out_loss

        return held_out_loss(model, self.tokenizer, VALID, context=CONTEXT, max_documents=DOCUMENTS)

    def _write(self, model: PreTrainedModel) -> list[str]:
        from moesaic.generation import generate

        return [
            generate(
                model, prompt, tokenizer=self.tokenizer, max_new_tokens=NEW_TOKENS, **SAMPLING
            ).text
            for prompt in PROMPTS
        ]

    def _affordable(self, source: Path, seconds: float | None) -> int:
        """Whole updates that fit the time, at the speed of a few trial updates."""
        speed = _training_speed(_load(source))
        wanted = int(speed * (SECONDS if seconds is None else seconds))
        if seconds is None:
            wanted = min(wanted, MOST_TOKENS)
        update = SEQUENCES * CONTEXT
        return max(1, wanted // update) * update

    def _training_config(self, tokens: int) -> dict[str, Any]:
        updates = max(1, tokens // (SEQUENCES * CONTEXT))
        return {
            "data": {
                "train": TRAIN,
                "valid": VALID,
                "block_size": CONTEXT,
            },
            "tokens": tokens,
            "batch": {"sequences": SEQUENCES},
            # A hundred-odd updates: routers must learn faster than the rest, or the noise that is
            # added to them decides the choice (held-out loss 4.22 at 1, 4.05 at 15, 65,536 tokens).
            "optimizer": {"lr": 2e-3, "router_lr": 10.0},
            "schedule": {"warmup": min(10, updates // 4), "floor": 0.1},
            "device": "cpu",
            "seed": self.seed,
            "log": {"every": max(1, updates // 100)},
            "evaluate": {
                "every": -(-updates // 3),
                "documents": DOCUMENTS,
                "at_start": False,
            },
            "checkpoint": {"keep_last": 0},
        }


def _check(
    model: Path, experts: int, top_k: int, tokens: int | None, seconds: float | None
) -> None:
    from moesaic.construct.method import SplitInputs, read_model_config

    if tokens is not None and seconds is not None:
        raise UserError("both tokens and seconds were given. Give one of them.")
    if tokens is not None and tokens < SEQUENCES * CONTEXT:
        raise UserError(
            f"tokens={tokens} is less than one update. Give at least {SEQUENCES * CONTEXT}."
        )
    if seconds is not None and not 0 < seconds < float("inf"):
        raise UserError(f"seconds={seconds}: give a positive number.")
    if not 1 <= top_k <= experts:
        raise UserError(f"top_k={top_k} with {experts} experts. Give 1 to {experts}.")
    # Convert would find this too, but only after the dense model was measured.
    SplitInputs(model, read_model_config(model), experts, 0, TRAIN, 0).check_division()


def _is_demo(path: Path) -> bool:
    """Whether a directory holds an earlier demo and nothing of anybody else's."""
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    return "results.json" in names and names <= OUTPUTS


def _load(path: Path) -> PreTrainedModel:
    import torch

    from moesaic.models.load import load

    model: PreTrainedModel = load(path, dtype=torch.float32).eval()
    return model


@contextmanager
def _fitting_threads(path: Path) -> Iterator[None]:
    """Use one thread or all, whichever is faster: on a busy machine threads wait for each other."""
    import torch

    every = torch.get_num_threads()
    model = _load(path)
    speeds = {}
    for threads in {1, every}:
        torch.set_num_threads(threads)
        speeds[threads] = _training_speed(model)
    best = max(speeds, key=lambda threads: speeds[threads])
    if every > 1:
        found = ", ".join(f"{n}: {speed:,.0f}" for n, speed in sorted(speeds.items()))
        note(f"CPU threads: {best} (dense training tokens/s with {found})")
    torch.set_num_threads(best)
    try:
        yield
    finally:
        torch.set_num_threads(every)


def _training_speed(model: PreTrainedModel) -> float:
    """Tokens a second of forward and backward passes here and now, on random ids."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (SEQUENCES, CONTEXT)
    ids_BT = torch.randint(0, model.config.vocab_size, shape, generator=generator)
    model.train()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()
        times.append(time.perf_counter() - start)
    return ids_BT.numel() / min(times[1:])  # the first one also warms up


@dataclass(frozen=True)
class _Forward:
    """A reporter that passes everything on, and moves `bar` with the progress called `what`."""

    reporter: Reporter
    rewrite: Callable[[str], str]
    bar: Bar
    what: str
    share: float
    """How far `bar` moves in all."""

    def note(self, text: str) -> None:
        self.reporter.note(self.rewrite(text))

    @contextmanager
    def progress(self, what: str, total: float | None) -> Iterator[Bar]:
        with self.reporter.progress(what, total) as inner:
            mine = what == self.what and total
            yield _Both(inner, self.bar, self.share / total) if mine and total else inner


@dataclass
class _Both:
    """An inner bar that moves an outer one with it, in whole points."""

    inner: Bar
    outer: Bar
    scale: float
    owed: float = 0.0

    def advance(self, steps: float = 1, **fields: object) -> None:
        self.inner.advance(steps, **fields)
        self.owed += steps * self.scale
        points = int(self.owed + 1e-9)
        if points:
            self.outer.advance(points)
            self.owed -= points


def _machine() -> str:
    return f"{os.cpu_count()} CPU cores, {platform.machine()}"


def _losses(loss: Mapping[str, float]) -> str:
    domains = ", ".join(f"{name} {value:.3f}" for name, value in loss.items() if name != "mean")
    return f"{loss['mean']:.3f} ({domains})"
