"""Launch the Hopper kernels: the six products of an experts layer on sorted rows.

N routed rows, D hidden size, I expert width, J = 2I, E experts. Descriptors of tensor-memory copies
are made on the host; everything that depends on the routing is read on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from moesaic.kernels.reference import Activation
from moesaic.kernels.triton.hopper_outer import outer_kernel
from moesaic.kernels.triton.hopper_rows import rows_kernel
from moesaic.kernels.triton.metadata import Routing

BK = 64
TILE_ROWS = 128
_SWIZZLED = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


@dataclass(frozen=True)
class Launch:
    """How one product is launched."""

    width: int = 256
    """Columns of a tile; for `up`, of gate and up together."""
    stages: int = 4
    """Steps of 64 that the ring of shared memory holds."""
    group_m: int = 8
    """Row tiles that walk over the same columns before the next columns are read."""
    persistent: bool = True
    """One program a multiprocessor that walks over tiles, or one program a tile."""


def _descriptor(tensor: torch.Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor(
        tensor, list(tensor.shape), list(tensor.stride()), list(block), _SWIZZLED
    )


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _programs(device: torch.device, tiles: int, launch: Launch) -> int:
    return max(1, min(tiles, _processors(device)) if launch.persistent else tiles)


def _warps(*, gather: bool) -> dict[str, int]:
    """Warps and registers of the partitions; a gathering producer computes addresses."""
    if not gather:
        return {"PRODUCER_WARPS": 1, "CONSUMER_REGS": 232, "PRODUCER_REGS": 40, "num_warps": 4}
    return {"PRODUCER_WARPS": 4, "CONSUMER_REGS": 224, "PRODUCER_REGS": 56, "num_warps": 4}


def _cut(n: int, by: int) -> int:
    return -(-n // by)


def _rows(
    a: torch.Tensor,
    b: torch.Tensor,
    routing: Routing,
    launch: Launch,
    *,
    epilogue: str,
    gather: bool,
    k_major: bool,
    columns: int,
    second: int = 0,
    keep_h: bool = False,
    activation: Activation = "silu",
    **outputs: Any,
) -> None:
    """Multiply a [rows, K] by b (one matrix an expert); `outputs` have the kernel's names."""
    pair = epilogue == "swiglu"
    width = launch.width // 2 if pair else launch.width
    flat = b.view(-1, b.shape[-1])
    names = ("h", "h2") if epilogue == "dact" else ("out", "out2", "out3")
    descriptors = dict.fromkeys(("out_desc", "out2_desc", "out3_desc", "h_desc", "h2_desc"))
    descriptors |= {
        f"{name}_desc": _descriptor(outputs[name], 64, 64) for name in names if name in outputs
    }
    pointers = {
        f"{name}_ptr": outputs.get(name) for name in ("out", "out2", "out3", "weight", "partial")
    }
    tiles = routing.most_tiles * _cut(columns, width)
    rows_kernel[(_programs(a.device, tiles, launch),)](
        a_desc=_descriptor(a, 64, BK),
        a_ptr=a,
        token_ptr=routing.token_N,
        b_desc=_descriptor(flat, width, BK) if k_major else _descriptor(flat, BK, width),
        **descriptors,
        **pointers,
        tile_expert_ptr=routing.tile_expert,
        tile_row_ptr=routing.tile_row,
        tile_left_ptr=routing.tile_left,
        count_ptr=routing.tiles,
        N=columns,
        K=a.shape[1],
        b_rows=b.shape[1],
        second=second,
        out_stride=outputs["out"].stride(0),
        out3_stride=outputs["out3"].stride(0) if "out3" in outputs else 0,
        EPILOGUE=epilogue,
        GATHER=gather,
        EVEN_K=a.shape[1] % BK == 0,
        B_KMAJOR=k_major,
        KEEP_H=keep_h,
        ACTIVATION=activation,
        BN=launch.width,
        BK=BK,
        STAGES=launch.stages,
        group_m=launch.group_m,
        **_warps(gather=gather),
    )


def up(
    x_TD: torch.Tensor,
    gate_up_EJD: torch.Tensor,
    routing: Routing,
    launch: Launch,
    *,
    keep_h: bool = True,
    activation: Activation = "silu",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return a = act(gate) * up of the gathered rows, and h = [gate, up] if kept."""
    rows, width = routing.token_N.shape[0], gate_up_EJD.shape[1] // 2
    a_NI = x_TD.new_empty(rows, width)
    h_NJ = x_TD.new_empty(rows, 2 * width) if keep_h else None
    halves = (a_NI, a_NI) if h_NJ is None else (h_NJ[:, :width], h_NJ[:, width:])
    _rows(
        x_TD, gate_up_EJD, routing, launch,
        epilogue="swiglu", gather=True, k_major=True, columns=width, second=width, keep_h=keep_h,
        activation=activation, out=halves[0], out2=halves[1], out3=a_NI,
    )  # fmt: skip
    return a_NI, h_NJ


def rows(
    a_NK: torch.Tensor,
    weight: torch.Tensor,
    routing: Routing,
    launch: Launch,
    *,
    transposed: bool,
) -> torch.Tensor:
    """Return a @ weight[e] (weight [E, K, M]), or a @ weight[e].T if `transposed` ([E, M, K])."""
    columns = weight.shape[1] if transposed else weight.shape[2]
    out = a_NK.new_empty(a_NK.shape[0], columns)
    _rows(
        a_NK, weight, routing, launch,
        epilogue="plain", gather=False, k_major=transposed, columns=columns, out=out,
    )  # fmt: skip
    return out


def activation_gradient(
    grad_TD: torch.Tensor,
    down_EDI: torch.Tensor,
    h_NJ: torch.Tensor,
    routing: Routing,
    launch: Launch,
    *,
    activation: Activation = "silu",
    clear: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dh, weight * a, and partial sums [N, tiles] of the routing weights' gradient.

    `clear`: rows of nobody are zeros; `outer` reads up to 63 rows past an expert's end and
    multiplies them by zero, which unwritten memory need not survive.
    """
    width = down_EDI.shape[2]
    empty = torch.zeros if clear else torch.empty
    dh_NJ, wa_NI = (
        empty(h_NJ.shape[0], columns, dtype=h_NJ.dtype, device=h_NJ.device)
        for columns in (2 * width, width)
    )
    partial = torch.empty(
        h_NJ.shape[0], _cut(width, launch.width), dtype=torch.float32, device=h_NJ.device
    )
    _rows(
        grad_TD, down_EDI, routing, launch,
        epilogue="dact", gather=True, k_major=False, columns=width, activation=activation,
        out=dh_NJ[:, :width], out2=dh_NJ[:, width:], out3=wa_NI,
        h=h_NJ[:, :width], h2=h_NJ[:, width:], weight=routing.weight_N, partial=partial,
    )  # fmt: skip
    return dh_NJ, wa_NI, partial


def outer(
    a_TM: torch.Tensor,
    b_NC: torch.Tensor,
    routing: Routing,
    launch: Launch,
    *,
    transposed: bool = False,
) -> torch.Tensor:
    """Return [E, M, C], the sum over an expert's rows s of a[token of s] (x) b[s].

    `transposed`: [E, C, M] instead.
    """
    experts, m, n = routing.ends_E.shape[0], a_TM.shape[1], b_NC.shape[1]
    out = a_TM.new_empty((experts, n, m) if transposed else (experts, m, n))
    tiles = experts * _cut(m, TILE_ROWS) * _cut(n, launch.width)
    outer_kernel[(_programs(a_TM.device, tiles, launch),)](
        a_desc=_descriptor(a_TM, BK, 64),
        a_ptr=a_TM,
        token_ptr=routing.token_N,
        b_desc=_descriptor(b_NC, BK, launch.width),
        ends_ptr=routing.ends_E,
        out_desc=_descriptor(out.view(-1, out.shape[2]), 64, 64),
        out_ptr=out,
        experts=experts,
        M=m,
        N=n,
        EVEN_M=m % TILE_ROWS == 0,
        TRANSPOSED=transposed,
        BM=TILE_ROWS,
        BN=launch.width,
        BK=BK,
        STAGES=launch.stages,
        group_m=launch.group_m,
        **_warps(gather=True),
    )
    return out
