"""Compare the fast experts with their meaning: values and every gradient, at any shape.

T tokens, D hidden size, E experts, I expert width, K experts a token.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch

from moesaic.core.errors import UserError
from moesaic.kernels import reference, select
from moesaic.kernels.select import PATHS, Path

Routing = Literal["uniform", "one-expert", "some-empty"]
_MOST_IN_FLOAT64 = 2**26
PARTS = ("out", "d_x", "d_gate_up", "d_down", "d_weights")
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 3e-3,
    torch.bfloat16: 2e-2,  # a few roundings of 2^-9 each
}


class PathRefused(UserError):
    """A path does not run on these sizes here; the text says why."""


@dataclass(frozen=True)
class Check:
    """Relative errors (2-norm of the difference over the norm) of the output and the gradients."""

    shape: dict[str, int]
    dtype: str
    device: str
    routing: Routing
    backend: Path
    reason: str | None
    """Why the faster paths were not taken."""
    errors: dict[str, float]
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether every error is finite and within the tolerance."""
        return all(error <= self.tolerance for error in self.errors.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "passed": self.passed}


def check(
    *,
    tokens: int = 63,
    hidden: int = 60,
    width: int = 43,
    experts: int = 7,
    top_k: int = 2,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    activation: reference.Activation = "silu",
    routing: Routing = "uniform",
    path: Path | None = None,
    seed: int = 0,
) -> Check:
    """Run one path in `dtype` and `reference.experts` in float64 on the same numbers.

    `path=None` takes the path that `select` takes. Experts of more than 2^26 weights are compared
    with float32 instead, to halve the memory. Raises PathRefused where `path` does not run.
    """
    inputs = _inputs(tokens, hidden, width, experts, top_k, dtype, device, routing, seed)
    reasons = {name: select.why_not(name, *inputs[:4]) for name in PATHS}
    taken = next(name for name in PATHS if reasons[name] is None) if path is None else path
    refusal = reasons[taken]
    if refusal is not None:
        raise PathRefused(refusal)
    faster = [text for name in PATHS[: PATHS.index(taken)] if (text := reasons[name])]
    got = _run(partial(select.run, taken), inputs, activation)
    wide = torch.float64 if 3 * experts * width * hidden <= _MOST_IN_FLOAT64 else torch.float32
    exact = _run(reference.experts, [_widen(tensor, wide) for tensor in inputs], activation)
    return Check(
        shape={"T": tokens, "D": hidden, "I": width, "E": experts, "K": top_k},
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        routing=routing,
        backend=taken,
        reason="; ".join(faster) or None,
        errors={part: relative_error(a, b) for part, a, b in zip(PARTS, got, exact, strict=True)},
        tolerance=TOLERANCE[dtype],
    )


def check_path(*, path: Path, **options: Any) -> Check | str:
    """Run `check` on one path, or return the reason why that path does not run."""
    try:
        return check(path=path, **options)
    except PathRefused as refusal:
        return str(refusal)


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """2-norm of the difference over the norm of `exact` (over 1 where `exact` is all zeros)."""
    wide = torch.promote_types(exact.dtype, torch.float32)
    got, exact = got.detach().to(wide), exact.detach().to(wide)
    scale = exact.norm()
    return float((got - exact).norm() / (scale if scale > 0 else 1.0))


def _widen(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _inputs(
    tokens: int,
    hidden: int,
    width: int,
    experts: int,
    top_k: int,
    dtype: torch.dtype,
    device: str | torch.device,
    routing: Routing,
    seed: int,
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    used = {"uniform": experts, "some-empty": max(top_k, experts // 2), "one-expert": 1}[routing]
    if used >= top_k:
        ids_TK = torch.rand(tokens, used, generator=generator).argsort(dim=1)[:, :top_k]
    else:
        ids_TK = torch.zeros(tokens, top_k, dtype=torch.int64)
    ids_TK = ids_TK + (experts - used)  # the empty experts come first
    wide = torch.promote_types(dtype, torch.float32)  # routers give float32 weights to bf16 experts
    weights_TK = torch.rand(tokens, top_k, generator=generator).to(device, wide)
    return [
        normal(tokens, hidden),
        normal(experts, 2 * width, hidden, scale=hidden**-0.5),
        normal(experts, hidden, width, scale=width**-0.5),
        ids_TK.to(device),
        weights_TK,
        normal(tokens, hidden),
    ]


def _run(function: Any, inputs: list[torch.Tensor], activation: str) -> list[torch.Tensor]:
    *arguments, grad_TD = (tensor.detach().clone() for tensor in inputs)
    wanted = [tensor.requires_grad_() for tensor in arguments if tensor.is_floating_point()]
    out_TD = function(*arguments, activation=activation)
    return [out_TD.detach(), *torch.autograd.grad(out_TD, wanted, grad_TD)]
