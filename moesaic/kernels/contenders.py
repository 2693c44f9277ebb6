"""What `kernels bench` times: ours, transformers', peers that are installed, and two ceilings.

T tokens, D hidden size, E experts, I expert width, J = 2I, K experts a token, N = T*K routed rows.

A contender is made for one `Problem`: it holds a forward function that takes no argument, and the
tensors that its backward pass has gradients for. One that cannot run raises `Refused`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moesaic.kernels import grouped, select
from moesaic.kernels.matmul import why_not_grouped


class Refused(Exception):
    """A contender does not run this problem; the text says why."""


@dataclass(frozen=True)
class Problem:
    """One experts layer with its input: x_TD, ids_TK, weights_TK and the gradient of the output.

    `module` holds gate_up_proj [E, J, D] and down_proj [E, D, I] as transformers' decorator leaves
    an experts module.
    """

    module: Any
    x_TD: torch.Tensor
    ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    grad_TD: torch.Tensor
    free: int
    """Bytes that the device has left."""

    @property
    def inputs(self) -> list[torch.Tensor]:
        """The tensors with a gradient: x, both weights, routing weights."""
        return [self.x_TD, self.module.gate_up_proj, self.module.down_proj, self.weights_TK]


@dataclass(frozen=True)
class Contender:
    """`forward` computes the layer; `step` computes the layer and every gradient."""

    forward: Callable[[], Any]
    step: Callable[[], Any]


class ExpertsModule(nn.Module):
    """Experts with random weights, with the attributes that transformers' decorator sets."""

    has_gate = is_concatenated = True
    has_bias = is_transposed = has_post_expert_norm = _is_expert_parallel = False

    def __init__(self, gate_up_EJD: torch.Tensor, down_EDI: torch.Tensor) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(gate_up_EJD), nn.Parameter(down_EDI)
        self.num_experts, self.act_fn = gate_up_EJD.shape[0], nn.SiLU()

    def _default_apply_gate(self, h_NJ: torch.Tensor) -> torch.Tensor:
        gate_NI, up_NI = h_NJ.chunk(2, dim=-1)
        a_NI: torch.Tensor = self.act_fn(gate_NI) * up_NI
        return a_NI

    _apply_gate = _default_apply_gate


def dense(problem: Problem) -> Contender:
    """Time six dense products with the FLOPs of the layer: the ceiling of any grouped matmul."""
    _, J, D = problem.module.gate_up_proj.shape
    N = problem.ids_TK.numel()
    new = problem.x_TD.new_empty
    x_ND, h_NJ, a_NI = (new(N, size).normal_() for size in (D, J, J // 2))
    w1_JD, w2_DI = (new(shape).normal_() for shape in ((J, D), (D, J // 2)))

    def forward() -> None:
        x_ND @ w1_JD.t()
        a_NI @ w2_DI.t()

    def step() -> None:
        forward()
        x_ND @ w2_DI
        x_ND.t() @ a_NI
        h_NJ @ w1_JD
        h_NJ.t() @ x_ND

    return Contender(forward, step)


def gemm_only(problem: Problem) -> Contender:
    """Time six bare grouped matmuls on rows that are sorted already."""
    gate_up_EJD, down_EDI = (w.detach() for w in problem.inputs[1:3])
    _need_grouped(problem)
    order_N, ends_E = grouped.sort_rows(problem.ids_TK, len(down_EDI))
    x_ND = problem.x_TD.detach().index_select(0, order_N // problem.ids_TK.shape[1])
    h_NJ = F.grouped_mm(x_ND, gate_up_EJD.transpose(1, 2), offs=ends_E)
    a_NI = h_NJ[:, : down_EDI.shape[2]].contiguous()

    def forward() -> None:
        F.grouped_mm(x_ND, gate_up_EJD.transpose(1, 2), offs=ends_E)
        F.grouped_mm(a_NI, down_EDI.transpose(1, 2), offs=ends_E)

    def step() -> None:
        forward()
        F.grouped_mm(x_ND, down_EDI, offs=ends_E)
        F.grouped_mm(x_ND.t(), a_NI, offs=ends_E)
        F.grouped_mm(h_NJ, gate_up_EJD, offs=ends_E)
        F.grouped_mm(h_NJ.t(), x_ND, offs=ends_E)

    return Contender(forward, step)


def _function(problem: Problem, experts: Callable[..., torch.Tensor]) -> Contender:
    """Make a contender of `experts(module, x_TD, ids_TK, weights_TK)`."""

    def run() -> torch.Tensor:
        return experts(problem.module, problem.x_TD, problem.ids_TK, problem.weights_TK)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return run()

    def step() -> Sequence[torch.Tensor]:
        return torch.autograd.grad(run(), problem.inputs, problem.grad_TD)

    return Contender(forward, step)


def _moesaic(problem: Problem) -> Contender:
    return _function(problem, select.experts_forward)


def _grouped(problem: Problem) -> Contender:
    if problem.x_TD.device.type == "cpu":
        raise Refused("on a CPU this is moesaic itself")
    return _function(
        problem, lambda m, x, ids, w: grouped.experts(x, m.gate_up_proj, m.down_proj, ids, w)
    )


def _eager(problem: Problem) -> Contender:
    def loop(
        module: Any, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """Loop over the experts with rows, as the model classes of transformers do."""
        out_TD = torch.zeros_like(x_TD)
        with torch.no_grad():
            mask_EKT = F.one_hot(ids_TK, num_classes=module.num_experts).permute(2, 1, 0)
            hit = mask_EKT.sum(dim=(-1, -2)).greater(0).nonzero()
        for expert in hit[:, 0]:
            slot, token = torch.where(mask_EKT[expert])
            h_RJ = F.linear(x_TD[token], module.gate_up_proj[expert])
            y_RD = F.linear(module._apply_gate(h_RJ), module.down_proj[expert])
            y_RD = y_RD * weights_TK[token, slot, None]
            out_TD.index_add_(0, token, y_RD.to(out_TD.dtype))
        return out_TD

    return _function(problem, loop)


def _transformers(problem: Problem, name: str) -> Contender:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if name not in ALL_EXPERTS_FUNCTIONS:
        raise Refused("this version of transformers lacks it")
    return _function(problem, ALL_EXPERTS_FUNCTIONS[name])


def _batched_mm(problem: Problem) -> Contender:
    _, J, D = problem.module.gate_up_proj.shape
    # A copy of the weights for every row, and in the backward pass a gradient of each copy.
    needed = 2 * problem.ids_TK.numel() * 3 * (J // 2) * D * problem.x_TD.element_size()
    if needed > problem.free // 2:
        raise Refused(f"needs {needed / 1e9:.0f} GB for weights copied to every row")
    return _transformers(problem, "batched_mm")


def _grouped_mm(problem: Problem) -> Contender:
    return _transformers(problem, "grouped_mm")


def _grouped_mm_compiled(problem: Problem) -> Contender:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    # In other dtypes it compiles its own loop; here the compiler would log pages about the sizes.
    if problem.x_TD.dtype == torch.bfloat16:
        _need_grouped(problem)
    return _function(problem, torch.compile(ALL_EXPERTS_FUNCTIONS["grouped_mm"], dynamic=False))


def _sonicmoe(problem: Problem) -> Contender:
    _need("kernels", "sonicmoe comes from the hub through the package kernels")
    return _transformers(problem, "sonicmoe")


def _scattermoe(problem: Problem) -> Contender:
    _need("scattermoe", "scattermoe is not installed")
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    def experts(
        module: Any, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        order = flatten_sort_count(ids_TK, num_experts=module.num_experts)
        top_k = ids_TK.shape[1]
        w1_EDJ, w2_EID = (w.transpose(1, 2) for w in (module.gate_up_proj, module.down_proj))
        h_NJ = parallel_linear(x_TD, w1_EDJ, top_k, *order, grouped_in=False, grouped_out=True)
        out_TD: torch.Tensor = parallel_linear(
            module._apply_gate(h_NJ), w2_EID, 1, *order, grouped_in=True, gates=weights_TK
        )
        return out_TD

    return _function(problem, experts)


def _liger(problem: Problem) -> Contender:
    _need("liger_kernel", "liger-kernel is not installed")
    try:
        from liger_kernel.ops import LigerFusedMoEFunction
    except ImportError as error:
        raise Refused(f"this version of liger-kernel lacks it: {error}") from None
    ids_TK = problem.ids_TK.to(torch.int32)
    return _function(
        problem,
        lambda m, x, ids, w: LigerFusedMoEFunction.apply(x, m.gate_up_proj, m.down_proj, ids_TK, w),
    )


def _need_grouped(problem: Problem) -> None:
    sizes = tuple(problem.module.down_proj.shape[1:])
    reason = why_not_grouped(problem.x_TD.dtype, problem.x_TD.device, sizes)
    if reason is not None:
        raise Refused(reason)


def _need(package: str, reason: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise Refused(reason)


CONTENDERS: dict[str, Callable[[Problem], Contender]] = {
    "moesaic": _moesaic,
    "moesaic grouped": _grouped,
    "eager": _eager,
    "batched_mm": _batched_mm,
    "grouped_mm": _grouped_mm,
    "grouped_mm compiled": _grouped_mm_compiled,
    "gemm only": gemm_only,
    "scattermoe": _scattermoe,
    "liger": _liger,
    "sonicmoe": _sonicmoe,
}
