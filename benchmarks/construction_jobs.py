"""What one job of benchmarks/construction.py does: prepare text, convert, measure, train on.

Everything is written once and shared: token blocks in the order of training, rows of held-out text,
and the model of every conversion, from which all its training runs start.
Notation: B sequences of an update, T tokens a sequence, N blocks.
"""

from __future__ import annotations

import fcntl
import json
import math
import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.nn import functional

from moesaic.training.balance import set_balance_coefficient
from moesaic.training.config import OptimizerConfig, ScheduleConfig
from moesaic.training.optimizer import Optimizer
from moesaic.training.schedule import Schedule
from moesaic.training.step import UpdateResult, build_pass, run_update

DOMAINS = ("arxiv", "books", "c4", "commoncrawl", "github")
DOMAINS += ("simple_english", "stackexchange", "wikipedia")
DENSE, SCRATCH = "dense", "random weights"
_WARM_UP = 3  # eager updates before a graph is captured: kernels are compiled and timed there
Rows = dict[str, list[list[int]]]


@dataclass(frozen=True)
class Settings:
    """What all runs of a table share; rows made under other settings are never mixed with them."""

    calibration: int = 256_000
    """Calibration tokens."""
    block: int = 512
    """Tokens of a sequence, and of a document that is scored."""
    sequences: int = 32
    """Sequences of an update."""
    warmup: float = 0.05
    """Share of the updates."""
    floor: float = 0.1
    """Lowest share of the peak rate."""
    documents: int | None = None
    """Held-out documents of a domain; None: all."""


class GraphFailed(RuntimeError):
    """An update could not be captured as a CUDA graph."""


class Bench:
    """One machine's folder of shared files, and the jobs done in it."""

    def __init__(
        self, work: Path, model: Path, corpus: Path, settings: Settings, device: str = "auto"
    ) -> None:
        self.work, self.model, self.corpus, self.settings = work, model, corpus, settings
        found = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(found if device == "auto" else device)
        self.graphs = self.device.type == "cuda"
        self._rows: Rows | None = None

    # Text, prepared once by the first process

    def prepare(self, seeds: list[int], tokens: int) -> None:
        """Tokenise the text and pack the blocks of every seed's longest run."""
        from moesaic.data import open_domains
        from moesaic.data.batches import document_rows
        from moesaic.data.mixture import MixtureStream
        from moesaic.data.tokens import open_tokens
        from moesaic.models.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(self.model)
        path = self.work / "valid.json"
        if not path.is_file():
            rows = {
                d: [
                    row
                    for row in document_rows(
                        source,
                        tokenizer,
                        context=self.settings.block,
                        max_documents=self.settings.documents,
                    )
                    if len(row) > 1
                ]
                for d, source in open_domains(self._text("valid")).items()
            }
            path.write_text(json.dumps(rows))
        blocks = tokens // self.settings.block
        missing = [seed for seed in seeds if blocks and self._blocks_of(seed) < blocks]
        for seed in missing:  # of a call with smaller budgets, before a run takes them
            self.blocks(seed).unlink(missing_ok=True)
        for seed in missing:
            path = self.blocks(seed)
            domains = open_tokens(self._text("train"), tokenizer, cache=self.work / "tokens")
            stream = MixtureStream(domains, block=self.settings.block, seed=seed)
            drawn = [stream.next_block()[1].astype(np.uint16) for _ in range(blocks)]
            partial = path.with_suffix(".partial.npy")
            np.save(partial, np.stack(drawn))
            partial.rename(path)

    def blocks(self, seed: int) -> Path:
        """The blocks of text that a seed's runs are trained on."""
        return self.work / f"blocks-{seed}.npy"

    def _blocks_of(self, seed: int) -> int:
        path = self.blocks(seed)
        return len(np.load(path, mmap_mode="r")) if path.is_file() else 0

    def _text(self, part: str) -> dict[str, str]:
        return {d: str(self.corpus / d / f"{part}.jsonl") for d in DOMAINS}

    # Conversion

    def start(self, job: Mapping[str, Any]) -> Path:
        """Folder of the model that a job's runs start from."""
        if job["method"] == DENSE:
            return self.model
        words = f"{job['method']} {job['experts']} {job['top_k']} {job['seed']}"
        slug = "".join(c if c.isalnum() else "-" for c in words)
        return self.work / "starts" / slug

    def convert(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Make a conversion and measure it on the held-out text; the model stays in the folder."""
        from moesaic.construct.pipeline import Recipe, results, run
        from moesaic.construct.recipe import stage_names
        from moesaic.models.load import load
        from moesaic.models.save import save

        started = time.monotonic()
        if job["method"] == DENSE:
            model: Any = load(self.model, dtype=torch.float32)
            return self._measured(model.to(self.device), started, {})
        recipe = Recipe(
            experts=job["experts"],
            top_k=job["top_k"],
            seed=job["seed"],
            data=self._text("train"),
            context=self.settings.block,
            device=str(self.device),
            **{"tokens": self.settings.calibration, **job["recipe"], **self._ready(job)},
        )
        out = self.start(job)
        partial = out.with_name(f"{out.name}.partial-{time.monotonic_ns()}")
        partial.mkdir(parents=True)
        figures = results(run(self.model, recipe, folder=partial, last_only=True))
        made = partial / stage_names(recipe)[-1]
        model = load(made, dtype=torch.float32)
        if job["method"] == SCRATCH:
            torch.manual_seed(job["seed"])
            model = type(model)(model.config)
            shutil.rmtree(made)
            made.mkdir()
            save(model, made)
        if not out.is_dir():
            made.rename(out)
        shutil.rmtree(partial)
        last = figures["stages"][-1]
        facts = {
            "construct_seconds": figures["seconds"]["construct"],
            "parts": figures["seconds"],
            **{key: figures["stages"][1].get(key) for key in ("captured", "oracle")},
            "load_entropy": last.get("load_entropy") or figures["stages"][1].get("load_entropy"),
            "output_error": last.get("output_error"),
        }
        return self._measured(model.to(self.device).eval(), started, facts)

    def _ready(self, job: Mapping[str, Any]) -> dict[str, str]:
        """The split of a job in a file, where it is slow to make and does not depend on top_k."""
        from moesaic.construct.split import make_split

        recipe = job["recipe"]
        split = recipe.get("split")
        method = split["method"] if isinstance(split, dict) else split
        if method not in ("gradient-plus", "cluster"):
            return {}
        shared = recipe.get("shared", 0)
        out = self.work / "splits" / f"{method}-{job['experts']}-{shared}-{job['seed']}"
        out.parent.mkdir(exist_ok=True)
        with out.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two jobs may want it at the same time
            if not out.is_dir():
                make_split(
                    self.model,
                    out=out,
                    method=split,
                    experts=job["experts"],
                    shared=shared,
                    data=self._text("train"),
                    seed=job["seed"],
                )
        gates = out / "router.safetensors"
        routed = recipe.get("router") == "hidden-clusters" and gates.is_file()
        return {"split": str(out)} | ({"router": str(gates)} if routed else {})

    def _measured(self, model: Any, started: float, facts: dict[str, Any]) -> dict[str, Any]:
        found = self.losses(model)
        return {**found, **facts, "seconds": round(time.monotonic() - started, 2)}

    def losses(self, model: Any) -> dict[str, Any]:
        """What `moesaic.measure.held_out_loss` gives, in float32, on rows tokenised before.

        `loss` is the mean of `losses` by domain; `halves` are the same means over every other
        document and over the rest: what one half chooses is scored on the other.
        """
        from moesaic.measure.loss import batch_loss
        from moesaic.measure.rows import by_length, evaluating

        if self._rows is None:
            self._rows = json.loads((self.work / "valid.json").read_text())
        assert self._rows is not None
        budget = (128 if self.device.type == "cuda" else 16) * self.settings.block
        whole: dict[str, float] = {}
        halves: tuple[list[float], list[float]] = ([], [])
        with evaluating(model), torch.inference_mode():
            for domain, rows in self._rows.items():
                sums = []
                for half, found in zip((rows[::2], rows[1::2]), halves, strict=True):
                    parts = [batch_loss(model, batch) for batch in by_length(half, budget)]
                    sums.append((sum(p[0] for p in parts), sum(p[1] for p in parts)))
                    found.append(sums[-1][0] / max(1, sums[-1][1]))
                whole[domain] = sum(s[0] for s in sums) / sum(s[1] for s in sums)
        means = [sum(found) / len(found) for found in halves]
        return {"loss": sum(whole.values()) / len(whole), "losses": whole, "halves": means}

    # Training on

    def train(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Train a start on for `job["budget"]` tokens at `job["lr"]`, and measure it."""
        from moesaic.models.load import load
        from moesaic.training.setup import count_parameters

        started = time.monotonic()
        settings = self.settings
        torch.manual_seed(job["seed"])
        model: Any = load(
            self.start(job), dtype=torch.float32, attn_implementation="sdpa", device_map=None
        )
        model = model.to(self.device).train()
        if job["method"].startswith("pruned"):
            _keep_static(model)
        parameters, active = count_parameters(model)
        updates = job["budget"] // (settings.sequences * settings.block)
        blocks = np.load(self.blocks(job["seed"]), mmap_mode="r")
        chosen = np.asarray(blocks[: updates * settings.sequences]).astype(np.int32)
        ids_NBT = torch.from_numpy(chosen).to(self.device)
        ids_NBT = ids_NBT.view(updates, settings.sequences, settings.block)
        schedule = Schedule(
            ScheduleConfig(warmup=round(settings.warmup * updates), floor=settings.floor),
            peak=job["lr"],
            total=updates,
        )
        ready = time.monotonic()
        with _full_blocks():
            update = Update(model, job["lr"], shape=ids_NBT.shape[1:], graph=self.graphs)
            for number, ids_BT in enumerate(ids_NBT):
                result = update(ids_BT, schedule.rate(number))
            train_loss = float(result.values["loss"])  # waits for the device
        spent = time.monotonic() - ready
        load_LE = result.routing.get("load")
        row = {
            "updates": updates,
            "train_loss": train_loss,
            "load_cv": None if load_LE is None else _variation(load_LE),
            "parameters": parameters,
            "active_parameters": active,
            "tokens_per_second": round(updates * settings.sequences * settings.block / spent),
            "graph": update.graph is not None,
        }
        del update, result
        model.zero_grad(set_to_none=True)
        found = self.losses(model)
        row["seconds"] = round(time.monotonic() - started, 2)
        if not math.isfinite(found["loss"]):
            found, row["train_loss"] = dict.fromkeys(found), None
        return {**found, **row}


class Update:
    """One optimizer update of `moesaic train`, on a GPU captured once and replayed.

    A graph takes the host out of the way: an update of a 14M model is two thousand small kernels,
    which one core starts in five times the time that they run.
    """

    def __init__(self, model: Any, lr: float, *, shape: torch.Size, graph: bool) -> None:
        self.device = next(model.parameters()).device
        self.optimizer = Optimizer(model, OptimizerConfig(lr=lr))
        self.run_pass = build_pass(model)
        self.wanted = graph
        self.graph: torch.cuda.CUDAGraph | None = None
        self.ids_ABT = torch.zeros(1, *shape, dtype=torch.int64, device=self.device)
        self.done = 0
        for group in self.optimizer.inner.param_groups if graph else ():
            group["capturable"] = True
            group["lr"] = torch.zeros((), device=self.device)

    def __call__(self, ids_BT: torch.Tensor, rate: float) -> UpdateResult:
        """Update on ids_BT; what is returned stays valid until the next update."""
        self.ids_ABT.copy_(ids_BT[None])
        for group in self.optimizer.inner.param_groups:
            value = rate * group.get("lr_scale", 1.0)
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(value)
            else:
                group["lr"] = value
        self.done += 1
        if not self.wanted:
            return self._update()
        if self.graph is not None:
            self.graph.replay()
        elif self.done <= _WARM_UP:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.result = self._update()
            torch.cuda.current_stream().wait_stream(stream)
        else:
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    self.result = self._update()
            except Exception as error:  # whatever refuses: the caller then starts anew without
                raise GraphFailed(f"{type(error).__name__}: {error}") from error
            self.graph = graph
            graph.replay()  # capturing computes nothing
        return self.result

    def _update(self) -> UpdateResult:
        mixed = self.device.type == "cuda"
        autocast = torch.autocast("cuda", torch.bfloat16) if mixed else nullcontext()
        return run_update(self.run_pass, self.optimizer, self.ids_ABT, autocast=autocast)


@contextmanager
def _full_blocks() -> Any:
    """Leave out what full blocks do not need: masks, and norms in a dozen kernels each.

    transformers builds a mask while a graph is captured, and with a mask attention is slower.
    """

    def norm(self: Any, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)

    with ExitStack() as stack:
        for name in ("moesaic.models.llama_moe", "transformers.models.llama.modeling_llama"):
            stack.enter_context(mock.patch(f"{name}.create_causal_mask", return_value=None))
        stack.enter_context(
            mock.patch("transformers.models.llama.modeling_llama.LlamaRMSNorm.forward", norm)
        )
        yield


def _keep_static(model: Any) -> None:
    """Keep a pruned model pruned: its gates are not trained and nothing balances them."""
    set_balance_coefficient(model, 0.0)
    for name, parameter in model.named_parameters():
        if ".gate." in name:
            parameter.requires_grad_(False)


def _variation(load_LE: torch.Tensor) -> float:
    """Mean over layers of the load's deviation over its mean."""
    return round(float((load_LE.std(1, correction=0) / load_LE.mean(1)).mean()), 4)


def work(channel: Any, bench: dict[str, Any], threads: int) -> None:
    """A worker process: do the jobs that come through `channel` until None comes."""
    import traceback

    torch.set_num_threads(threads)
    bench = dict(bench)
    bench["settings"] = Settings(**bench["settings"])
    graphs = bench.pop("graphs")
    mine = Bench(**bench)
    mine.graphs &= graphs
    channel.send("ready")
    while (job := channel.recv()) is not None:
        try:
            try:
                found = getattr(mine, job["kind"])(job)
            except GraphFailed as error:
                mine.graphs = False
                found = getattr(mine, job["kind"])(job) | {"graph_failed": str(error)[:300]}
            channel.send(found)
        except Exception as error:
            channel.send({"error": f"{type(error).__name__}: {error}", "where": _short(traceback)})
        if mine.device.type == "cuda":
            torch.cuda.empty_cache()


def _short(traceback: Any) -> str:
    return "".join(traceback.format_exc().splitlines(keepends=True)[-12:])


def as_dict(settings: Settings) -> dict[str, Any]:
    """The settings as a row holds them."""
    return asdict(settings)
