"""Mixtures made without training and trained on, beside the published constructions.

    python -m benchmarks.construction -o runs/construction            # everything, on a GPU
    python -m benchmarks.construction -o runs/construction --table    # benchmarks/construction.md

A dense model is converted by every method, and most conversions are trained on at equal budgets.
The learning rate of a method, a number of active experts and a budget is chosen on one half of the
held-out documents and once more on the other, by the first seed's runs: rates of `GRID` for the
first budget, further ones while the best lies at an end; for a longer budget the last one's
best and the next higher one, still higher ones while the highest is best. (Training text that is
kept back cannot choose: the dense model has seen it.)

One row a run is appended to OUT/rows.jsonl; rows that are there, or in `--rows`, are not run again
when they were made with the same recipe and settings. The runs that matter most come first;
`--deadline` ends the program by itself. Several workers share a GPU, each with one run; with
several GPUs they take turns.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from benchmarks.construction_jobs import DENSE, SCRATCH, Bench, Settings, as_dict, work

ROOT = Path("/work/shared")
OURS: dict[str, Any] = {"refit": {"method": "down", "blend": 0.75}, "attention": 1.0}
PLAIN: dict[str, Any] = {"refit": None, "attention": None}
AS_CMOE: dict[str, Any] = {"weighting": "one", **PLAIN}
GSP = {"method": "gradient-plus", "tokens": 32_768}
V2 = {"method": "softmax", "scale": "auto"}
METHODS: dict[str, dict[str, Any]] = {
    "v1 random": {"split": "random", "router": "random", "weighting": "softmax", **PLAIN},
    "v1 cluster": {"split": "cluster", "router": "random", "weighting": "softmax", **PLAIN},
    "v2 GSP": {"split": GSP, "router": "hidden-clusters", "weighting": V2, **PLAIN},
    "v2 residual": {
        "split": GSP,
        "router": "hidden-clusters",
        "weighting": {"method": "softmax", "scale": 1.0},
        "shared": 1,
        **PLAIN,
    },
    "cmoe": {"split": "cmoe", "router": "representative", "shared": "half", **AS_CMOE},
    "expertweaver": {"split": "expertweaver", "router": "mean-gate", "shared": "half", **AS_CMOE},
    "pruned": {"split": "static", "router": "first", **AS_CMOE},
    "pruned + refit": {"split": "static", "router": "first", "weighting": "one", **OURS},
    "cmoe + refit": {"split": "cmoe", "router": "representative", "shared": "half", **OURS},
    "v1 random + our router, refit": {"split": "random", **OURS},
    "energy, no refit": PLAIN,
    "energy, down refit, own target": {
        "refit": {"method": "down", "blend": 0.0},
        "attention": None,
        "maps": False,
    },
    "energy, down refit": {
        "refit": {"method": "down", "blend": 0.5},
        "attention": None,
        "maps": False,
    },
    "energy, no maps": {**OURS, "maps": False},
    "energy, no loop": {"split": {"method": "energy", "rounds": 0}, **OURS},
    "energy": OURS,
    "energy, shared": {"shared": 1, **OURS},
    "energy, allotted": {"experts_per_layer": "allotted", **OURS},
    "layerwise": {"refine": "layerwise", **OURS},
    "layerwise, shared": {"refine": "layerwise", "shared": 1, **OURS},
    "layerwise, allotted": {"refine": "layerwise", "experts_per_layer": "allotted", **OURS},
}
ABLATIONS = [
    "energy, down refit, own target",
    "energy, down refit",
    "energy, no maps",
    "energy, no loop",
]
"""Converted and measured, but neither trained on nor among the best."""
PUBLISHED = ["v1 random", "v1 cluster", "v2 GSP", "v2 residual", "cmoe", "expertweaver"]
GRID = (3e-4, 1e-3, 3e-3)
LADDER = (1e-5, 3e-5, 1e-4, *GRID, 1e-2, 3e-2)
"""Where the grid goes on while its best rate lies at an end."""
Job = dict[str, Any]
_KEY = ("kind", "method", "experts", "top_k", "seed", "budget", "lr")


def key(row: Job) -> tuple[Any, ...]:
    """What tells a run from others."""
    return tuple(row.get(name) for name in _KEY)


@dataclass
class Plan:
    """Which runs are wanted, given the rows that are there; asked again after every run."""

    methods: list[str]
    budgets: list[int]
    actives: list[int]
    seeds: list[int]
    best: int = 3
    """Methods that are also made with more experts and trained longest."""
    experts: int = 8
    finer: tuple[int, ...] = (16, 32)
    grid: tuple[float, ...] = GRID
    patient: bool = True
    """Whether a rate is known only when all that are wanted were tried; the page shows the rest."""
    rows: dict[tuple[Any, ...], Job] = field(default_factory=dict)
    dropped: set[tuple[str, int]] = field(default_factory=set)
    """Methods and numbers of active experts of which a run failed."""

    def __post_init__(self) -> None:
        self._tried: dict[tuple[str, int, int], dict[float, Job]] = {}

    def recipe(self, method: str, top_k: int, experts: int) -> dict[str, Any]:
        """The construction recipe of a method at a size."""
        if method == DENSE:
            return {}
        # From random weights only the shape matters: LLaMA-MoE's, and little text.
        given = METHODS["v1 random"] | {"tokens": 16_384} if method == SCRATCH else METHODS[method]
        recipe = dict(given)
        if recipe.get("shared") == "half":
            recipe["shared"] = top_k // 2
        elif "shared" in recipe:  # the same share of neurons
            recipe["shared"] *= experts // self.experts
        return recipe

    def job(self, kind: str, method: str, top_k: int, seed: int, experts: int = 0) -> Job:
        experts = experts or self.experts
        if method == DENSE:
            top_k, experts = self.experts, self.experts
            seed = 0 if kind == "convert" else seed
        recipe = self.recipe(method, top_k, experts)
        found = {"kind": kind, "method": method, "experts": experts, "top_k": top_k}
        return found | {"seed": seed, "recipe": recipe}

    def add(self, row: Job) -> None:
        self.rows[key(row)] = row
        if row["kind"] == "train" and row["seed"] == self.seeds[0]:
            group = self._tried.setdefault((row["method"], row["top_k"], row["budget"]), {})
            group[row["lr"]] = row

    def has(self, job: Job) -> bool:
        return key(job) in self.rows

    # Conversions

    def conversions(self) -> Iterator[Job]:
        """Every conversion of the table, the most wanted first."""
        first, rest = self.seeds[0], self.seeds[1:]
        main = [k for k in (2, 4) if k in self.actives]
        others = [k for k in self.actives if k not in main]
        yield self.job("convert", DENSE, 0, first)
        for top_k in main:
            yield from (self.job("convert", m, top_k, first) for m in self.methods)
        for seed in rest:
            for top_k in main:
                yield from (self.job("convert", m, top_k, seed) for m in self.methods)
        for seed in self.seeds:
            for top_k in others:
                yield from (self.job("convert", m, top_k, seed) for m in self.methods)
        best = self.ranked("convert")[: self.best]
        for seed in self.seeds:
            for top_k in main:
                for experts in self.finer:
                    wide = top_k * experts // self.experts
                    yield from (self.job("convert", m, wide, seed, experts) for m in best)

    # Training on

    def trainings(self) -> Iterator[Job]:
        """Every training run whose rate is known already, the most wanted first."""
        seed = self.seeds[0]
        starts = [*self.trained(), SCRATCH]
        sizes = [(DENSE, self.experts)]
        sizes += [(m, k) for k in self.actives if k in (2, 4) for m in starts]
        sizes = [size for size in sizes if size not in self.dropped]
        for place, budget in enumerate(self.budgets):
            if place == 2:
                best = self.ranked("train")[: self.best]
                if not best:
                    return
                always = {"v2 residual", "v1 random", DENSE, SCRATCH}
                sizes = [size for size in sizes if size[0] in {*best, *always}]
            for method, top_k in sizes:
                rates = self.wanted(method, top_k, budget) or []
                yield from (self.run(method, top_k, seed, budget, rate) for rate in rates)
        last = self.budgets[2] if len(self.budgets) > 2 else None
        for number in self.seeds[1:] if last else ():
            for method, top_k in sizes:
                if method == SCRATCH:  # a yardstick, whole nats away
                    continue
                if last and (rate := self.rate(method, top_k, last)) is not None:
                    yield self.run(method, top_k, number, last, rate)

    def trained(self) -> list[str]:
        lost = {method for method, _ in self.dropped}
        return [m for m in self.methods if m not in ABLATIONS and m not in lost]

    def run(self, method: str, top_k: int, seed: int, budget: int, lr: float) -> Job:
        return self.job("train", method, top_k, seed) | {"budget": budget, "lr": lr}

    def tried(self, method: str, top_k: int, budget: int) -> dict[float, Job]:
        """Runs of the first seed at a budget, by rate."""
        return self._tried.get((method, top_k, budget), {})

    def wanted(self, method: str, top_k: int, budget: int) -> list[float] | None:
        """Rates to try at a budget, as far as they are known; None before the budget before."""
        place, tried = self.budgets.index(budget), self.tried(method, top_k, budget)
        rates = list(self.grid)
        if place > 0:
            before = self.rate(method, top_k, self.budgets[place - 1])
            if before is None:
                return None
            at = LADDER.index(before)
            rates = list(LADDER[at : at + 2]) if len(self.grid) > 1 else [before]
        best = self.lowest(method, top_k, budget)
        if len(rates) < 2 or best is None or any(rate not in tried for rate in rates):
            return rates
        at = LADDER.index(best)
        beyond = LADDER[at if place else max(0, at - 1) : at + 2]  # new ones where it is an end
        return [*tried, *(rate for rate in beyond if rate not in tried)]

    def rate(self, method: str, top_k: int, budget: int) -> float | None:
        """The best rate at a budget; None while runs for it are missing."""
        known = not self.patient or self.sought(method, top_k, budget)
        return self.lowest(method, top_k, budget) if known else None

    def sought(self, method: str, top_k: int, budget: int) -> bool:
        """Whether all rates that are wanted were tried."""
        wanted, tried = self.wanted(method, top_k, budget), self.tried(method, top_k, budget)
        return wanted is not None and all(rate in tried for rate in wanted)

    def lowest(self, method: str, top_k: int, budget: int) -> float | None:
        """The rate of lowest loss so far, both halves; None when nothing was tried."""
        known = self._finite(method, top_k, budget)
        return min(known, key=lambda rate: sum(known[rate])) if known else None

    def scored(self, method: str, top_k: int, budget: int) -> float | None:
        """The first seed's loss; the mean of two where the halves of the text choose two rates."""
        known, tried = self._finite(method, top_k, budget), self.tried(method, top_k, budget)
        if not known:
            return None
        chosen = (min(known, key=lambda rate: known[rate][half]) for half in (0, 1))
        return sum(tried[rate]["loss"] for rate in chosen) / 2

    def _finite(self, method: str, top_k: int, budget: int) -> dict[float, list[float]]:
        """Losses on both halves by rate; a run that diverged has none."""
        tried = self.tried(method, top_k, budget)
        return {rate: row["halves"] for rate, row in tried.items() if row["halves"] is not None}

    def ranked(self, kind: str) -> list[str]:
        """Methods by mean loss at 2 and 4 of 8; none until every method has been measured."""
        sums: dict[str, float] = {}
        for method in self.trained():
            for top_k in (k for k in self.actives if k in (2, 4)):
                loss: float | None = None
                if kind == "convert":
                    row = self.rows.get(key(self.job(kind, method, top_k, self.seeds[0])))
                    loss = row["loss"] if row else None
                elif self.rate(method, top_k, self.budgets[1]) is not None:
                    loss = self.scored(method, top_k, self.budgets[1])
                if loss is None:
                    return []
                sums[method] = sums.get(method, 0.0) + loss
        return sorted(sums, key=sums.__getitem__)


@dataclass
class Worker:
    """A process that does one job at a time."""

    process: Any
    channel: Any
    job: Job | None = None
    since: float = 0.0
    ready: bool = False


class Master:
    """Hands the plan's jobs to workers, writes rows, stops in time."""

    def __init__(self, options: argparse.Namespace, plan: Plan, bench: dict[str, Any]) -> None:
        self.options, self.plan, self.bench = options, plan, bench
        self.end = time.monotonic() + options.deadline
        self.rows = options.out / "rows.jsonl"
        self.place = Bench(**{**bench, "settings": Settings(**bench["settings"])})
        self.failed: set[tuple[Any, ...]] = set()
        self.deaths = 0
        self.convert_seconds: dict[str, float] = {}
        self.overhead, self.rate = 8.0, options.speed
        self.workers = [self._spawn(i) for i in range(options.workers)]

    def _spawn(self, index: int) -> Worker:
        context = multiprocessing.get_context("spawn")
        mine, theirs = context.Pipe()
        before = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = before.split(",") if before else list(map(str, range(self.options.gpus)))
        if len(gpus) > 1:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]
        bench = {**self.bench, "graphs": self.options.graphs}
        process = context.Process(
            target=work, args=(theirs, bench, self.options.threads), daemon=True
        )
        process.start()
        theirs.close()
        if len(gpus) > 1:
            os.environ.pop("CUDA_VISIBLE_DEVICES")
            if before is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = before
        return Worker(process, mine)

    def run(self) -> None:
        """Work until nothing is left or the time is up."""
        self.place.prepare([], 0)
        # what is trained on can come while conversions run
        wanted = (self.options.seeds, max(self.options.budgets, default=0))
        text = threading.Thread(target=self.place.prepare, args=wanted, daemon=True)
        text.start()
        try:
            while True:
                waiting = text.is_alive()
                for worker in self.workers:
                    if worker.ready and worker.job is None and (job := self._next()) is not None:
                        worker.job, worker.since = job, time.monotonic()
                        worker.channel.send(job)
                busy = [w for w in self.workers if w.job is not None or not w.ready]
                if all(w.job is None for w in self.workers) and (
                    (not busy and not waiting) or time.monotonic() > self.end
                ):
                    break
                if time.monotonic() > self.end + 5:
                    break
                self._receive(busy)
        finally:
            for worker in self.workers:
                worker.process.kill()
        left = [j for j in (*self.plan.conversions(), *self.plan.trainings()) if self._missing(j)]
        self._say(f"{len(self.plan.rows)} rows; {len(left)} known runs left")

    def _receive(self, busy: list[Worker]) -> None:
        for channel in wait([w.channel for w in busy], timeout=1.0):
            worker = next(w for w in busy if w.channel is channel)
            try:
                message = channel.recv()
            except (EOFError, OSError):
                message = {"error": "the worker died"}
                index = self.workers.index(worker)
                self.deaths += 1
                if self.deaths > 2 * len(self.workers):
                    raise SystemExit("The workers die one after another.") from None
                self.workers[index] = self._spawn(index)
            if message == "ready":
                worker.ready = True
                continue
            job, worker.job = worker.job, None
            if job is not None:
                self._finish(job, message, time.monotonic() - worker.since)

    def _finish(self, job: Job, found: dict[str, Any], seconds: float) -> None:
        name = " ".join(str(job[k]) for k in _KEY[1:] if job.get(k) is not None)
        if "error" in found:
            self.failed.add(key(job))
            if job["seed"] == self.plan.seeds[0] and job["experts"] == self.plan.experts:
                self.plan.dropped.add((job["method"], job["top_k"]))
            self._say(f"FAILED {job['kind']} {name}: {found['error']}\n{found.get('where', '')}")
            return
        if job["kind"] == "convert":
            slow = self.convert_seconds.get(job["method"], 0.0)
            self.convert_seconds[job["method"]] = max(slow, seconds)
        elif found["tokens_per_second"]:
            self.rate += 0.2 * (found["tokens_per_second"] - self.rate)
            spent = job["budget"] / found["tokens_per_second"]
            self.overhead += 0.2 * (seconds - spent - self.overhead)
        if not self.plan.has(job):
            row = {**job, **found, "settings": self.bench["settings"], "workers": len(self.workers)}
            self.plan.add(row)
            with self.rows.open("a") as file:
                file.write(json.dumps(row) + "\n")
        speed = f", {found['tokens_per_second']:,} tokens/s" if job["kind"] == "train" else ""
        loss = "diverged" if found["loss"] is None else f"{found['loss']:.4f}"
        self._say(f"{job['kind']} {name}: {loss} ({seconds:.1f} s{speed})")

    def _next(self) -> Job | None:
        """The job that an idle worker should do, if any fits into the time that is left."""
        left = self.end - time.monotonic()
        running = [w.job for w in self.workers if w.job is not None]
        training = sum(job["kind"] == "train" for job in running)
        trainings = [j for j in self.plan.trainings() if self._missing(j)]
        ready = [j for j in trainings if self.place.start(j).is_dir()]
        ready = [j for j in ready if self.place.blocks(j["seed"]).is_file()]
        taken = {key(job) for job in running}
        ready = [j for j in ready if key(j) not in taken and self._seconds(j) < left]
        if ready and training < self.options.trainings:
            return ready[0]
        converting = len(running) - training
        most = self.options.conversions
        if ready:
            most = min(most, max(1, self.options.workers - self.options.trainings))
        if converting >= most:
            return None
        # Starts of the next runs, then the table; a start may be lost with the machine it was on.
        starts = [self.plan.job("convert", j["method"], j["top_k"], j["seed"]) for j in trainings]
        starts = [j for j in starts if not self.place.start(j).is_dir()]
        table = [j for j in self.plan.conversions() if not self.plan.has(j)]
        for job in (*starts, *table):
            if key(job) not in taken | self.failed and self._seconds(job) < left:
                return job
        return None

    def _missing(self, job: Job) -> bool:
        return not self.plan.has(job) and key(job) not in self.failed

    def _seconds(self, job: Job) -> float:
        if job["kind"] == "convert":
            return 1.2 * self.convert_seconds.get(job["method"], 15.0)
        return 1.15 * (self.overhead + job["budget"] / self.rate)

    def _say(self, text: str) -> None:
        left = self.end - time.monotonic()
        print(f"[{left:5.0f} s left] {text}", file=sys.stderr, flush=True)


def read_rows(paths: list[Path], plan: Plan, settings: dict[str, Any]) -> list[Job]:
    """Rows of these files that belong to the plan: same settings, same recipe; the last counts."""
    found: dict[tuple[Any, ...], Job] = {}
    for path in paths:
        for line in path.read_text().splitlines() if path.is_file() else []:
            row = json.loads(line)
            if row["method"] not in (*METHODS, DENSE, SCRATCH) or row["settings"] != settings:
                continue
            if row["recipe"] == plan.recipe(row["method"], row["top_k"], row["experts"]):
                found[key(row)] = row
    return list(found.values())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/construction"))
    parser.add_argument("--work", type=Path, help="shared files; default OUT/work")
    parser.add_argument("--rows", type=Path, nargs="*", default=[], help="rows of earlier calls")
    parser.add_argument("--deadline", type=float, default=1e9, help="seconds")
    parser.add_argument("--model", type=Path, default=ROOT / "ckpt/dense-14m")
    parser.add_argument("--corpus", type=Path, default=ROOT / "data/corpus")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--budgets", type=int, nargs="*", default=[10**6, 4 * 10**6, 16 * 10**6])
    parser.add_argument("--top-k", type=int, nargs="*", default=[2, 4, 6])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--finer", type=int, nargs="*", default=[16, 32])
    parser.add_argument("--grid", type=float, nargs="*", default=list(GRID), choices=LADDER)
    parser.add_argument("--best", type=int, default=3)
    parser.add_argument("--calibration", type=int, default=Settings.calibration)
    parser.add_argument("--sequences", type=int, default=Settings.sequences)
    parser.add_argument("--documents", type=int, help="held-out documents a domain; default all")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--trainings", type=int, default=8, help="of them training at a time")
    parser.add_argument("--conversions", type=int, default=8, help="at a time, some GB each")
    parser.add_argument("--threads", type=int, default=2, help="of a worker, on the CPU")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--speed", type=float, default=100_000, help="first guess, tokens/s a run")
    parser.add_argument("--no-graphs", dest="graphs", action="store_false")
    parser.add_argument("--table", action="store_true", help="write the page, run nothing")
    parser.add_argument("--page", type=Path, default=Path(__file__).with_suffix(".md"))
    return parser.parse_args()


def main() -> None:
    options = parse()
    started = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    settings = as_dict(
        Settings(
            calibration=options.calibration,
            sequences=options.sequences,
            documents=options.documents,
        )
    )
    plan = Plan(
        methods=options.methods,
        budgets=sorted(options.budgets),
        actives=options.top_k,
        seeds=options.seeds,
        best=options.best,
        finer=tuple(options.finer),
        grid=tuple(options.grid),
        patient=not options.table,
    )
    known = read_rows([*options.rows, options.out / "rows.jsonl"], plan, settings)
    for row in known:
        plan.add(row)
    if options.table:
        from benchmarks.construction_report import write

        write(plan, settings, options.page)
        return
    bench = {
        "work": options.work or options.out / "work",
        "model": options.model,
        "corpus": options.corpus,
        "settings": settings,
        "device": options.device,
    }
    bench["work"].mkdir(parents=True, exist_ok=True)
    if options.rows:  # OUT/rows.jsonl is to hold everything
        text = "".join(json.dumps(row) + "\n" for row in known)
        (options.out / "rows.jsonl").write_text(text)
    options.deadline -= time.monotonic() - started
    Master(options, plan, bench).run()


if __name__ == "__main__":
    main()
