"""The training loop: one process, thin, and resumable bit for bit.

Order of things at update s (1-based): train; every `log.every` write a line; every `evaluate.every`
measure held-out loss per domain and, if asked, move the domain weights; every `checkpoint.every`
save the state. A state therefore holds everything up to and including update s.

What a later multi-process step shards is kept in objects: the model, `Optimizer`, `Schedule`, the
data stream with its cursor, and `Window`.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moesaic.core.config import load, parse, to_yaml
from moesaic.core.console import note, progress
from moesaic.core.errors import MoesaicError, UserError
from moesaic.core.files import write_text
from moesaic.data.dynamic import reference_losses, update_weights
from moesaic.recipes import find
from moesaic.training import batches, export, setup, state
from moesaic.training.balance import choose_balance
from moesaic.training.config import TrainConfig
from moesaic.training.distill import empty_teacher, load_teacher
from moesaic.training.optimizer import Optimizer, router_lr
from moesaic.training.schedule import Schedule
from moesaic.training.step import PassOutput, build_pass, run_update
from moesaic.training.telemetry import LOG_NAME, Clock, Log, Window, peak_flops

CONFIG_NAME = "train.yaml"


def train(
    config: TrainConfig | Mapping[str, Any] | Path | str,
    *,
    model: Path | str | None = None,
    out: Path | str,
    resume: bool = True,
    overrides: Sequence[str] = (),
) -> Path:
    """Train `model` as `config` says and return `out`, a Hugging Face directory with the result.

    Args:
        config: a YAML file, a mapping of the same keys, or a `TrainConfig`.
        model: directory of the model to start from; wins over ``config.model``.
        out: receives the model, ``log.jsonl``, ``train.yaml`` and ``checkpoints/``.
        resume: go on from the newest state in `out`, if any; False: discard it and start again.
        overrides: ``section.key=value`` assignments on top of a YAML file.

    Raises UserError for a wrong config or input, for an `out` that holds something else, and when a
    resumed run would follow another course; MoesaicError when the loss is not finite or a save
    fails.
    """
    settings = read_config(config, model=model, overrides=overrides)
    with state.own_generators(settings.seed):
        run = Run.prepare(settings, Path(out).expanduser().absolute(), resume=resume)
        return run.path if run.finished else run.train()


def read_config(
    config: TrainConfig | Mapping[str, Any] | Path | str,
    *,
    model: Path | str | None = None,
    overrides: Sequence[str] = (),
) -> TrainConfig:
    """Return the typed config with `model` filled in. Raises UserError when no model is given."""
    if isinstance(config, TrainConfig):
        settings = config
    elif isinstance(config, Mapping):
        settings = parse(TrainConfig, config, source="config")
    else:
        settings = load(TrainConfig, find(config, kind="train"), overrides=overrides)
    if model is not None:
        settings = settings.model_copy(update={"model": str(model)})
    if settings.model is None:
        raise UserError("no model to train. Give --model DIR, or 'model' in the config.")
    return settings


def plan(config: TrainConfig) -> dict[str, Any]:
    """Check a config as far as is possible without loading weights; return what the run would do.

    Returns the resolved config, updates, tokens, parameters, and tokens, weight and passes per
    domain. Writes nothing but the token cache. Raises UserError for whatever `train` would refuse.
    """
    where = setup.device(config.device)
    precision = setup.precision(config.precision, where)
    model = setup.empty_model(config)
    setup.configure_kernels(config, model, where, precision)
    balance = choose_balance(model, config.balance)
    parameters, active = setup.count_parameters(model)
    tokenizer = setup.tokenizer(config)
    setup.check_vocabulary(tokenizer, model)
    teacher = empty_teacher(config, model, tokenizer)
    setup.routing_watch(config, model)
    stream = setup.open_data(config, tokenizer).stream
    tokens = config.total_steps * config.tokens_per_step
    return {
        "config": config.model_dump(mode="json"),
        "architecture": type(model).__name__,
        "parameters": parameters,
        "active_parameters": active,
        "balance": str(balance),
        **_taught(config, teacher),
        "device": str(where),
        "precision": precision,
        "updates": config.total_steps,
        "tokens_per_update": config.tokens_per_step,
        "tokens": tokens,
        "domains": {
            name: {
                "tokens": packed.epoch_tokens,
                "weight": round(stream.weights[name], 6),
                "epochs": round(stream.weights[name] * tokens / packed.epoch_tokens, 3),
            }
            for name, packed in stream.domains.items()
        },
    }


@dataclass
class Run:
    """A training run in progress: what a saved state restores, and what stays the same."""

    path: Path
    config: TrainConfig
    finished: bool
    start_again: bool = False
    step: int = 0
    weights: dict[str, float] = field(default_factory=dict)
    drawn: Counter[str] = field(default_factory=Counter)
    window: Window = field(default_factory=Window)
    seconds: float = 0.0
    held_out: dict[str, float] | None = None

    @classmethod
    def prepare(cls, config: TrainConfig, path: Path, *, resume: bool) -> Run:
        """Check the output directory and build everything, from the newest state if any."""
        folder = _newest(path) if resume else None
        _check_owned(path)
        run = cls(path, config, finished=False, start_again=not resume)
        if resume and export.is_written(path, config):
            note(f"{path} is finished already. --no-resume starts again.")
            run.finished = True
            return run
        if folder is not None:
            facts = state.read_facts(folder)
            _same_course(config, facts, folder)
        elif resume and export.is_model(path):
            raise UserError(
                f"{path} holds the model of a run with other settings. Choose another -o, or "
                "--no-resume to replace it."
            )
        run._build()
        if folder is not None:
            run._restore(folder, facts)
        return run

    def _build(self) -> None:
        config = self.config
        self.device = setup.device(config.device)
        self.precision = setup.precision(config.precision, self.device)
        self.model = setup.load_model(config, self.device, self.precision)
        self.source_dtype = setup.source_dtype(config)
        self.tokenizer = setup.tokenizer(config)
        setup.check_vocabulary(self.tokenizer, self.model)
        self.balance = choose_balance(self.model, config.balance)
        self.parameters, self.active = setup.count_parameters(self.model)
        self.teacher = load_teacher(config, self.model, self.tokenizer, self.device, self.precision)
        self.data = setup.open_data(config, self.tokenizer)
        if config.data.conversations:
            setup.check_apart(self.model)
        self.weights = dict(self.data.stream.weights)
        self.optimizer = Optimizer(self.model, config.optimizer)
        self.schedule = Schedule(
            config.schedule, peak=config.optimizer.lr, total=config.total_steps
        )
        run_pass = build_pass(self.model, self.balance, self.teacher)
        self.run_pass: Callable[..., PassOutput] = (
            torch.compile(run_pass) if config.compile else run_pass
        )
        self.peak = peak_flops(self.device, config.log.peak_tflops)
        self.watch = setup.routing_watch(config, self.model)

    def _restore(self, folder: Path, facts: Mapping[str, Any]) -> None:
        self.step = int(facts["step"])
        self.drawn = Counter(facts["drawn"])
        self.seconds = float(facts["seconds"])
        self.held_out = facts["held_out"]
        self.window.load(facts["window"], self.device)
        self.data.stream.load_state_dict(facts["cursor"])
        self.weights = dict(self.data.stream.weights)
        # Last, so that nothing above draws from the generators it sets.
        state.restore_state(folder, model=self.model, optimizer=self.optimizer, facts=facts)
        note(f"resumed from update {self.step} of {self.config.total_steps} ({folder})")

    def train(self) -> Path:
        """Run the remaining updates and write the final model; return its directory."""
        config = self.config
        # Not earlier: a run that is refused must neither leave a folder nor cost the run before it.
        if self.start_again:
            _discard(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / CONFIG_NAME, to_yaml(config))
        log = Log(self.path, resume_at=self.step, tensorboard=config.log.tensorboard)
        self._announce()
        try:
            self.clock = Clock()
            self.model.train()
            if self.step == 0 and config.evaluate.at_start:
                self._evaluate(log)
            with progress("training", total=config.total_steps) as bar:
                bar.advance(self.step)
                while self.step < config.total_steps:
                    self._stretch(log, bar)
        finally:
            log.close()
            if self.watch is not None:
                self.watch.close()
        export.write_model(self)
        if config.checkpoint.keep_last == 0:
            shutil.rmtree(self.path / state.FOLDER, ignore_errors=True)
        return self.path

    def _stretch(self, log: Log, bar: Any) -> None:
        """Run up to the next evaluation: data is never drawn ahead past a change of weights."""
        config = self.config
        every = config.evaluate.every or config.total_steps
        end = min(config.total_steps, (self.step // every + 1) * every)
        source = batches.prefetch(
            self.data.stream,
            updates=end - self.step,
            accumulation=config.batch.accumulation,
            size=config.batch.size,
            length=config.data.block_size,
            pin=self.device.type == "cuda",
        )
        shown: dict[str, Any] = {}
        with closing(source), _short_turns():
            for batch in source:
                self.cursor = batch.cursor
                shown |= self._update(batch, log)
                if self.step == end:
                    self._evaluate(log)
                if self.step == config.total_steps or self._due(config.checkpoint.every):
                    self._log_routing(log, wait=True)  # a resumed run does not do them again
                    self._save()
                bar.advance(1, **shown)

    def _update(self, batch: batches.Batch, log: Log) -> dict[str, Any]:
        rate = self.schedule.apply(self.optimizer.inner, self.step)
        ids_ABT = batch.ids_ABT.to(self.device, non_blocking=True)
        packed = {k: v.to(self.device, non_blocking=True) for k, v in batch.packed.items()}
        with self._watched():
            result = run_update(
                self.run_pass,
                self.optimizer,
                ids_ABT,
                **packed,
                autocast=self._autocast(),
                balance=self.balance,
            )
        self.step += 1
        self.drawn.update(batch.domains)
        self.window.add(self.step, result.values, result.routing)
        if self.device.type == "cpu":
            self._check_finite()  # free here; on a GPU it would wait for the device
        if self.step != self.config.total_steps and not self._due(self.config.log.every):
            return {}
        self._check_finite()
        shown = self._log(log, rate)
        self._log_routing(log, wait=False)
        return shown

    def _watched(self) -> AbstractContextManager[Any]:
        if self.watch is None:
            return nullcontext()
        return self.watch.update(self.step + 1, length=self.config.data.block_size)

    def _log_routing(self, log: Log, *, wait: bool) -> None:
        if self.watch is not None:
            for event, step, fields in self.watch.lines(wait=wait):
                log.write(event, step, **fields)

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _autocast(self) -> AbstractContextManager[Any] | None:
        if self.precision != "mixed":
            return None
        return torch.autocast(self.device.type, torch.bfloat16)

    def _check_finite(self) -> None:
        values = self.window.fetch()
        for what in ("loss", "distill_loss", "grad_norm"):
            for step, value in zip(self.window.steps, values.get(what, []), strict=False):
                if not math.isfinite(value):
                    raise MoesaicError(self._divergence(what, value, step))

    def _divergence(self, what: str, value: float, step: int) -> str:
        saved = list(state.states(self.path))
        kept = f"the state of update {saved[-1]} is kept" if saved else "no state was saved yet"
        return (
            f"{what} became {value} at update {step}; {kept}. Lower optimizer.lr, lengthen "
            "schedule.warmup or use precision fp32, and run again with --no-resume."
        )

    def _log(self, log: Log, rate: float) -> dict[str, Any]:
        config = self.config
        updates = len(self.window.steps)
        figures = self.window.flush()  # waits for the device, so the lap below is true
        seconds = self.clock.lap()
        self.seconds += seconds
        # After a resume the first window holds updates of the run before; count this run's only.
        speed = min(updates, self.step - self.resumed_at) * config.tokens_per_step / seconds
        mfu = None if self.peak is None else 6.0 * self.active * speed / self.peak
        log.write(
            "train",
            self.step,
            tokens=self.step * config.tokens_per_step,
            **figures,
            lr=rate,
            tokens_per_second=round(speed, 1),
            mfu=None if mfu is None else round(mfu, 4),
            weights={name: round(weight, 6) for name, weight in self.weights.items()},
            epochs=self.data.epochs(self.drawn),
            seconds=round(self.seconds, 3),
        )
        shown = {"loss": f"{figures['loss']:.4f}", "tok/s": _short(speed)}
        if mfu is not None:
            shown["mfu"] = f"{mfu:.1%}"
        return shown

    def _evaluate(self, log: Log) -> None:
        """Measure held-out loss per domain, and move the weights if the run is dynamic."""
        if self.data.valid is None:
            return
        self._check_finite()  # also waits for the device, so that the clock stops at the right time
        with self.clock:
            with self._autocast() or nullcontext():
                losses = setup.evaluate(self.config, self.model, self.tokenizer, self.data.valid)
            self.held_out = losses
            log.write(
                "evaluate", self.step, tokens=self.step * self.config.tokens_per_step, loss=losses
            )
            dynamic = self.config.data.dynamic
            if dynamic is not None and self.step > 0:
                reference = reference_losses(dynamic.reference, list(self.weights))
                weights = update_weights(
                    dynamic.rule, self.weights, losses, reference, **dynamic.options
                )
                self.data.stream.set_weights(weights)
                self.weights = dict(self.data.stream.weights)
                self.cursor = self.data.stream.state_dict()

    def _save(self) -> None:
        self._check_finite()
        with self.clock:
            facts = {
                "total": self.config.total_steps,
                "config": self.config.trajectory(),
                "model": self.config.model,
                "cursor": self.cursor,
                "drawn": dict(self.drawn),
                "window": self.window.state(),
                "seconds": self.seconds,
                "held_out": self.held_out,
            }
            export.guarded(
                self.path,
                lambda: state.save_state(
                    self.path,
                    step=self.step,
                    model=self.model,
                    optimizer=self.optimizer,
                    facts=facts,
                    keep_last=self.config.checkpoint.keep_last,
                ),
            )

    def _announce(self) -> None:
        config = self.config
        self.resumed_at = self.step
        where = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        note(
            f"{type(self.model).__name__}: {self.parameters:,} parameters, {self.active:,} active; "
            f"{config.total_steps} updates of {config.tokens_per_step:,} tokens; "
            f"{self.precision} on {where}"
        )
        if self.balance.kind is not None:
            note(str(self.balance))
        if self.teacher is not None:
            found, weight = _taught(config, self.teacher.model)["teacher"], self.teacher.weight
            note(
                f"teacher: {found['architecture']}, {found['parameters']:,} frozen parameters "
                f"({found['model']}); loss: {1 - weight:g} x cross-entropy + {weight:g} x KL"
            )
        factor = router_lr(self.model, config.optimizer)
        if factor != (config.optimizer.router_lr or 1.0):
            note(f"routers learn at {factor:g} of the rate: they were fitted (optimizer.router_lr)")


def _taught(config: TrainConfig, teacher: Any) -> dict[str, Any]:
    """What there is to say of a teacher, under one key; nothing where there is none."""
    if config.distill is None:
        return {}
    told = {
        "architecture": type(teacher).__name__,
        "parameters": setup.count_parameters(teacher)[0],
    }
    return {"teacher": {**config.distill.model_dump(mode="json"), **told}}


@contextmanager
def _short_turns() -> Iterator[None]:
    """Let the data thread hold the interpreter for 0.2 ms at a time.

    By default it is 5 ms, and the thread that launches kernels would wait that long each time.
    """
    interval = sys.getswitchinterval()
    sys.setswitchinterval(2e-4)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def _check_owned(path: Path) -> None:
    """Raise UserError unless `path` is free or holds a run."""
    if path.is_file():
        raise UserError(f"{path} is a file. Give a directory for the output.")
    ours = (path / CONFIG_NAME).is_file() or (path / state.FOLDER).is_dir()
    if path.is_dir() and any(path.iterdir()) and not ours:
        raise UserError(
            f"{path} exists and holds no training run. Choose another -o, or remove it."
        )


def _newest(path: Path) -> Path | None:
    found = list(state.states(path).values())
    return found[-1] if found else None


def _discard(path: Path) -> None:
    """Remove what a run wrote, and nothing else."""
    for name in (LOG_NAME, CONFIG_NAME, state.FOLDER, "tensorboard"):
        target = path / name
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
    export.remove_model(path)


def _same_course(config: TrainConfig, facts: Mapping[str, Any], folder: Path) -> None:
    """Refuse to go on with settings that change the losses: the result would match no config."""
    differing = _differences(
        {"model": config.model, **config.trajectory()}, {"model": facts["model"], **facts["config"]}
    )
    if differing:
        key, now, then = differing[0]
        raise UserError(
            f"{folder.parent.parent} was started with {key}={then!r}, now it is {now!r}. "
            "Give the same settings, another -o, or --no-resume to start again."
        )


def _differences(now: Any, then: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(now, Mapping) and isinstance(then, Mapping):
        found = []
        for key in dict.fromkeys([*now, *then]):
            found += _differences(now.get(key), then.get(key), f"{prefix}.{key}" if prefix else key)
        return found
    return [] if now == then else [(prefix, now, then)]


def _short(number: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:.0f}"
