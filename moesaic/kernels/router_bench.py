"""Time a router's choice: one kernel each way, against the same in plain torch, eager and compiled.

T tokens, E experts, K chosen experts of a token. Timed is what follows the router's small product:
logits [T, E] in, weights and ids [T, K] out, and the gradient of the logits. Plain torch is written
as transformers writes it. Each round times every contender once, with a cold L2 cache on a GPU; the
median counts. `host` is the time that the CPU takes to start one forward pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch

from moesaic.core.errors import unknown
from moesaic.kernels import router
from moesaic.kernels.router import Scheme

_DEEPSEEK = Scheme(
    4, "sigmoid", group_rule="two highest", renormalise=True, epsilon=1e-20, rounded=True
)
PRESETS: dict[str, tuple[int, Scheme]] = {
    "qwen3-30b-a3b": (128, Scheme(8, renormalise=True)),
    "olmoe-1b-7b": (64, Scheme(8)),
    "mixtral-8x7b": (8, Scheme(2, renormalise=True)),
    "llama-moe-3.5b": (16, Scheme(4, "softmax of chosen")),
    "deepseek-v3-1b": (32, _DEEPSEEK),
    "qwen2-moe-1b": (16, Scheme(2, renormalise=True)),
    "mixtral-1b": (8, Scheme(2, renormalise=True)),
    "deepseek-v3": (
        256,
        _DEEPSEEK._replace(top_k=8, groups=8, kept_groups=4, scale=2.5),
    ),
}
"""Experts and scheme of known models; DeepSeek's logits are float32 and have a bias."""
_FLUSH = 512 * 2**20  # bytes: several times any L2 cache
_WARM_UP = 3
Choice = Callable[[torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Timing:
    """Medians in milliseconds; `refused` says why a contender did not run."""

    contender: str
    forward: float | None = None
    step: float | None = None
    host: float | None = None
    refused: str | None = None


@dataclass(frozen=True)
class Result:
    """All timings of one preset."""

    preset: str
    experts: int
    scheme: dict[str, Any]
    tokens: int
    dtype: str
    device: str
    timings: list[Timing] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def bench(
    preset: str,
    *,
    tokens: int = 16384,
    repeats: int = 11,
    device: str | torch.device = "cpu",
    only: Iterable[str] = ("fused", "torch", "torch, compiled"),
    seed: int = 0,
) -> Result:
    """Time the contenders `only` on one of `PRESETS`. One that fails is reported as refused.

    Raises UserError for a preset that does not exist.
    """
    if preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    device = torch.device(device)
    experts, scheme = PRESETS[preset]
    biased = scheme.score == "sigmoid"
    dtype = torch.float32 if biased else torch.bfloat16
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device)

    logits_TE = normal(tokens, experts).to(dtype).requires_grad_()
    bias_E = normal(experts) * 0.01 if biased else None
    grad_TK = normal(tokens, scheme.top_k)
    flush = torch.empty(_FLUSH if device.type == "cuda" else 0, dtype=torch.int8, device=device)
    contenders = _contenders(scheme, experts, device)
    made: dict[str, Choice] = {}
    timings: dict[str, Timing] = {}

    def step(choose: Choice) -> None:
        weights_TK, _ = choose(logits_TE, bias_E)
        torch.autograd.grad(weights_TK, logits_TE, grad_TK)

    def forward(choose: Choice) -> None:
        with torch.no_grad():
            choose(logits_TE, bias_E)

    for name in only:
        choose = contenders[name]
        try:
            if isinstance(choose, str):
                raise RuntimeError(choose)
            for _ in range(_WARM_UP):
                forward(choose)
                step(choose)
            made[name] = choose
        except Exception as error:  # a compiler may fail in any way
            timings[name] = Timing(name, refused=(str(error).splitlines() or ["?"])[0][:160])
    times: dict[str, tuple[list[float], ...]] = {name: ([], [], []) for name in made}
    for _ in range(repeats):
        for name, choose in made.items():
            times[name][0].append(_time(lambda c=choose: forward(c), flush))  # type: ignore[misc]
            times[name][1].append(_time(lambda c=choose: step(c), flush))  # type: ignore[misc]
            times[name][2].append(_host(lambda c=choose: forward(c), device))  # type: ignore[misc]
    for name, lists in times.items():
        forward_ms, step_ms, host_ms = (median(values) for values in lists)
        timings[name] = Timing(name, forward=forward_ms, step=step_ms, host=host_ms)
    return Result(
        preset=preset,
        experts=experts,
        scheme=scheme._asdict(),
        tokens=tokens,
        dtype=str(dtype).removeprefix("torch."),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        timings=[timings[name] for name in only],
    )


def _contenders(scheme: Scheme, experts: int, device: torch.device) -> dict[str, Choice | str]:
    refused = router.why_not(scheme, experts, device)

    def fused(
        logits_TE: torch.Tensor, bias_E: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return router.choose(logits_TE, scheme, bias_E=bias_E)

    def stock(
        logits_TE: torch.Tensor, bias_E: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _as_transformers(logits_TE, scheme, bias_E)

    return {
        "fused": refused or fused,
        "torch": stock,
        "torch, compiled": torch.compile(stock),
    }


def _as_transformers(
    logits_TE: torch.Tensor, scheme: Scheme, bias_E: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if scheme.score == "softmax of chosen":
        kept_TK, ids_TK = logits_TE.float().topk(scheme.top_k, dim=-1)
        return kept_TK.softmax(-1), ids_TK
    if scheme.score == "softmax":
        weights_TK, ids_TK = logits_TE.softmax(-1, dtype=torch.float32).topk(scheme.top_k, dim=-1)
    else:
        scores_TE = ranked_TE = logits_TE.sigmoid()
        if bias_E is not None:
            ranked_TE = scores_TE + bias_E
        # DeepSeek-V3's code takes this way with a single group, too
        of_group_TGS = ranked_TE.unflatten(1, (scheme.groups, -1))
        best_TG = of_group_TGS.topk(2, dim=-1)[0].sum(-1)
        kept_TG = best_TG.topk(scheme.kept_groups, dim=-1, sorted=False)[1]
        mask_TG = torch.zeros_like(best_TG).scatter_(1, kept_TG, 1)
        mask_TE = mask_TG[:, :, None].expand_as(of_group_TGS).flatten(1)
        ranked_TE = ranked_TE.masked_fill(~mask_TE.bool(), -torch.inf)
        ids_TK = ranked_TE.topk(scheme.top_k, dim=-1, sorted=False)[1]
        weights_TK = scores_TE.gather(1, ids_TK)
    if scheme.renormalise:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + scheme.epsilon)
    return weights_TK * scheme.scale if scheme.scale != 1 else weights_TK, ids_TK


def _time(run: Callable[[], Any], flush: torch.Tensor) -> float:
    """Milliseconds of one call; on a GPU the flush also lets the launches run ahead."""
    if flush.device.type != "cuda":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize(flush.device)
    return begin.elapsed_time(end)


def _host(run: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    spent = 1e3 * (time.perf_counter() - start)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return spent


def table(results: Iterable[Result]) -> list[list[str]]:
    """Return rows of text, the first being the head: microseconds, and how often `fused` wins."""
    rows = [["us", "E, K", "contender", "forward", "f+b", "host", "fused is x faster"]]
    for result in results:
        base = next((t for t in result.timings if t.contender == "fused"), None)
        for t in result.timings:
            sizes = f"{result.experts}, {result.scheme['top_k']}"
            if t.refused is not None:
                rows.append([result.preset, sizes, t.contender, t.refused, "", "", ""])
                continue
            gain = ""
            if base is not None and base.step and base.forward and t.step and t.forward:
                gain = f"{t.forward / base.forward:.2f} / {t.step / base.step:.2f}"
            numbers = [f"{1e3 * (value or 0):.1f}" for value in (t.forward, t.step, t.host)]
            rows.append([result.preset, sizes, t.contender, *numbers, gain])
    return rows
