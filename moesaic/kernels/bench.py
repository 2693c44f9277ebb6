"""Time the experts layer against everything else that computes it, and against the hardware.

T tokens, D hidden size, E experts, I expert width, K experts a token, N = T*K routed rows.

Every round times each contender once, right after the dense ceiling (six dense products with the
same FLOPs), so that clocks and neighbours treat both alike; `share` is the ceiling's time over the
contender's, median of the rounds. On a GPU: CUDA events; before each measurement the device is kept
busy and the L2 cache is overwritten, so that launches run ahead, as they do in training, and only
the device's time counts; what the host needs is reported apart, as `host`. On a CPU: the wall
clock.

`saved` is what a forward pass keeps for the backward pass, the input included and the weights not;
`peak` is the most that a forward and backward pass holds beyond weights and input, gradients
included.

Up to 64 tokens is decoding: only forward, launched one by one and from a CUDA graph, beside the
time to read the weights of the distinct experts once (`floor`).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Literal

import torch

from moesaic.core.console import track
from moesaic.core.errors import UserError, nearest
from moesaic.kernels import select
from moesaic.kernels.contenders import (
    CONTENDERS,
    Contender,
    ExpertsModule,
    Problem,
    Refused,
    dense,
)

Routing = Literal["uniform", "zipf"]
DECODE = 64  # tokens
_FLUSH = 512 * 2**20  # bytes: several times any L2 cache
_BANDWIDTH = {"H200": 4.3e12}  # bytes a second that a read reaches (measured)
_WARM_UP = 3
_BUSY = 8_000_000  # clock ticks, about 4 ms: longer than any contender takes to launch


@dataclass(frozen=True)
class Shape:
    """Sizes of an experts layer."""

    hidden: int
    width: int
    experts: int
    top_k: int

    def __str__(self) -> str:
        return f"{self.hidden},{self.width},{self.experts},{self.top_k}"


PRESETS = {
    "qwen3-30b-a3b": Shape(2048, 768, 128, 8),
    "olmoe-1b-7b": Shape(2048, 1024, 64, 8),
    "mixtral-8x7b": Shape(4096, 14336, 8, 2),
    "llama-moe-3.5b": Shape(4096, 688, 16, 4),
    "deepseek-v3-1b": Shape(1024, 512, 32, 4),
    "qwen2-moe-1b": Shape(1024, 640, 16, 2),
    "mixtral-1b": Shape(1024, 2304, 8, 2),
}


@dataclass(frozen=True)
class Timing:
    """Times in milliseconds (medians), `share` of the dense ceiling, memory in bytes.

    `refused` says why a contender did not run; then nothing else is known of it.
    """

    contender: str
    refused: str | None = None
    forward: float | None = None
    forward_share: float | None = None
    step: float | None = None
    step_share: float | None = None
    graph: float | None = None
    graph_refused: str | None = None
    saved: int | None = None
    peak: int | None = None
    host: float | None = None
    """Until a forward and backward pass is launched, with a device that has nothing else to do."""


@dataclass(frozen=True)
class Result:
    """All timings of one shape; `dense_*` and `floor` in milliseconds."""

    shape: Shape
    tokens: int
    dtype: str
    routing: Routing
    device: str
    repeats: int
    distinct_experts: int
    dense_forward: float
    dense_step: float | None
    floor: float | None
    paths: list[str] = field(default_factory=list)
    """What `select` said of the path that ours took."""
    timings: list[Timing] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def parse_shape(text: str) -> Shape:
    """Read `D,I,E,K` or the name of a preset. Raises UserError for anything else."""
    if text.lower() in PRESETS:
        return PRESETS[text.lower()]
    try:
        hidden, width, experts, top_k = (int(part) for part in text.split(","))
    except ValueError:
        hint = nearest(text.lower(), list(PRESETS))
        raise UserError(
            f"shape '{text}': write hidden,width,experts,top_k as in 2048,768,128,8, or a preset: "
            f"{', '.join(PRESETS)}.{hint}"
        ) from None
    if min(hidden, width, experts, top_k) < 1 or top_k > experts:
        raise UserError(
            f"shape '{text}': sizes are at least 1 and top_k at most the number of experts."
        )
    return Shape(hidden, width, experts, top_k)


def bench(
    shape: Shape,
    *,
    tokens: int = 16384,
    dtype: torch.dtype = torch.bfloat16,
    routing: Routing = "uniform",
    repeats: int = 11,
    device: str | torch.device = "cpu",
    only: Iterable[str] | None = None,
    seed: int = 0,
) -> Result:
    """Time every contender on one shape, or those named in `only`.

    Raises UserError for an unknown contender. One that fails is reported as refused.
    """
    names = list(only) if only is not None else list(CONTENDERS)
    for name in names:
        if name not in CONTENDERS:
            raise UserError(
                f"no contender '{name}'.{nearest(name, list(CONTENDERS))} "
                f"Known: {', '.join(CONTENDERS)}."
            )
    device = torch.device(device)
    decode = tokens <= DECODE
    problem = _problem(shape, tokens, dtype, routing, device, seed)
    clock = _Clock(device)
    select.forget()
    ceiling = dense(problem)
    made: dict[str, Contender] = {}
    timings: dict[str, Timing] = {}
    for name in track(names, "preparing"):
        try:
            made[name] = CONTENDERS[name](problem)
            for _ in range(_WARM_UP):  # compiles and tunes
                made[name].forward()
                if not decode:
                    made[name].step()
            clock.wait()
        except Exception as error:  # a peer may fail in any way
            made.pop(name, None)
            timings[name] = Timing(name, refused=_reason(error))
        _clean(device)
    ceiling.forward(), ceiling.step()

    forward, forward_dense = _rounds(
        {name: c.forward for name, c in made.items()}, ceiling.forward, clock, repeats
    )
    step: dict[str, list[float]] = {}
    step_dense: dict[str, list[float]] = {}
    if not decode:
        step, step_dense = _rounds(
            {name: c.step for name, c in made.items()}, ceiling.step, clock, repeats
        )
    for name, contender in made.items():
        graph, graph_refused = None, None
        saved = peak = host = None
        if decode and device.type == "cuda":
            graph, graph_refused = _graph(contender.forward, clock, repeats)
        if not decode and name != "gemm only":
            saved, peak = _memory(contender, problem)
            if device.type == "cuda":
                host = median(clock.host(contender.step) for _ in range(repeats))
        timings[name] = Timing(
            name,
            forward=median(forward[name]),
            forward_share=_share(forward_dense[name], forward[name]),
            step=median(step[name]) if step else None,
            step_share=_share(step_dense[name], step[name]) if step else None,
            graph=graph,
            graph_refused=graph_refused,
            saved=saved,
            peak=peak,
            host=host,
        )
    distinct = int(problem.ids_TK.unique().numel())
    every = [t for times in step_dense.values() for t in times]
    return Result(
        shape=shape,
        tokens=tokens,
        dtype=str(dtype).removeprefix("torch."),
        routing=routing,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        repeats=repeats,
        distinct_experts=distinct,
        dense_forward=median([t for times in forward_dense.values() for t in times] or [0.0]),
        dense_step=median(every) if every else None,
        floor=_floor(shape, distinct, dtype, device) if decode else None,
        paths=list(select.said()),
        timings=[timings[name] for name in names],
    )


def _problem(
    shape: Shape,
    tokens: int,
    dtype: torch.dtype,
    routing: Routing,
    device: torch.device,
    seed: int,
) -> Problem:
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> torch.Tensor:
        # In the type itself: the float32 copy of Mixtral's experts would be 5 GB.
        return torch.empty(size, dtype=dtype, device=device).normal_(0, scale, generator=generator)

    D, I, E, K = shape.hidden, shape.width, shape.experts, shape.top_k  # noqa: E741
    module = ExpertsModule(normal(E, 2 * I, D, scale=D**-0.5), normal(E, D, I, scale=I**-0.5))
    # The K largest of log p + Gumbel noise are K draws without replacement.
    popularity_E = torch.ones(E, device=device)
    if routing == "zipf":
        rank_E = torch.randperm(E, generator=generator, device=device) + 1
        popularity_E = 1.0 / rank_E
    noise_TE = torch.rand(tokens, E, generator=generator, device=device).clamp_min_(1e-9)
    ids_TK = (popularity_E.log() - (-noise_TE.log()).log()).topk(K, dim=1).indices
    weights_TK = torch.rand(tokens, K, generator=generator, device=device).to(dtype)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 4 * 2**30
    return Problem(
        module=module,
        x_TD=normal(tokens, D).requires_grad_(),
        ids_TK=ids_TK,
        weights_TK=weights_TK.requires_grad_(),
        grad_TD=normal(tokens, D),
        free=free,
    )


class _Clock:
    """Milliseconds of one call, with a cold L2 cache on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        cuda = device.type == "cuda"
        self.flush = torch.empty(_FLUSH, dtype=torch.int8, device=device) if cuda else None

    def __call__(self, run: Callable[[], Any]) -> float:
        if self.flush is None:
            started = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - started)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_BUSY)
        self.flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def host(self, run: Callable[[], Any]) -> float:
        """Milliseconds until `run` returns on a GPU that was idle."""
        self.wait()
        started = time.perf_counter()
        run()
        took = 1e3 * (time.perf_counter() - started)
        self.wait()
        return took

    def wait(self) -> None:
        if self.flush is not None:
            torch.cuda.synchronize(self.device)


def _rounds(
    runs: dict[str, Callable[[], Any]], ceiling: Callable[[], Any], clock: _Clock, repeats: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Time every run `repeats` times, round-robin; return times and those of the ceiling beside."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    beside: dict[str, list[float]] = {name: [] for name in runs}
    for _ in track(range(repeats), "timing"):
        for name, run in runs.items():
            beside[name].append(clock(ceiling))
            times[name].append(clock(run))
    return times, beside


def _share(ceiling: list[float], times: list[float]) -> float:
    return median(c / t for c, t in zip(ceiling, times, strict=True))


def _graph(run: Callable[[], Any], clock: _Clock, repeats: int) -> tuple[float | None, str | None]:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
        graph.replay()
        return median(clock(graph.replay) for _ in range(repeats)), None
    except Exception as error:  # a wait for the device, in whatever words
        return None, _reason(error)
    finally:
        clock.wait()
        del graph


def _memory(contender: Contender, problem: Problem) -> tuple[int, int | None]:
    """Return the bytes kept for the backward pass, and the peak of both passes on a GPU."""
    weights = {w.untyped_storage().data_ptr() for w in problem.module.parameters()}
    sizes: dict[int, int] = {}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)  # or its address could be given to another
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        contender.step()
    saved = sum(sizes.values())
    kept.clear()
    device = problem.x_TD.device
    if device.type != "cuda":
        return saved, None
    _clean(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    contender.step()
    torch.cuda.synchronize(device)
    return saved, torch.cuda.max_memory_allocated(device) - before


def _floor(shape: Shape, distinct: int, dtype: torch.dtype, device: torch.device) -> float | None:
    """Return the milliseconds to read the weights of the distinct experts, where known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    speed = next((speed for key, speed in _BANDWIDTH.items() if key in name), None)
    if speed is None:
        return None
    return 1e3 * 3 * shape.hidden * shape.width * distinct * dtype.itemsize / speed


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    if isinstance(error, Refused):
        return str(error)
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"


def _clean(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def table(result: Result) -> list[list[str]]:
    """Return rows of text, the first being the head; contenders that were refused are left out."""
    head = ["ms", "forward", "share", "f+b", "share", "graph", "host", "saved MB", "peak MB"]
    rows = [["dense ceiling", _number(result.dense_forward), "", _number(result.dense_step)]]
    if result.floor is not None:
        rows.append([f"floor: {result.distinct_experts} experts read", _number(result.floor)])
    for t in result.timings:
        if t.refused is None:
            times = _number(t.forward), _percent(t.forward_share)
            steps = _number(t.step), _percent(t.step_share)
            rest = _number(t.graph), _number(t.host), _mega(t.saved), _mega(t.peak)
            rows.append([t.contender, *times, *steps, *rest])
    rows = [row + [""] * (len(head) - len(row)) for row in [head, *rows]]
    used = [column for column in range(len(head)) if any(row[column] for row in rows[1:])]
    return [[row[column] for column in used] for row in rows]


def _mega(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:.1f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
