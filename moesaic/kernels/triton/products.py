"""Launch the Hopper kernels: the six products of an experts layer on sorted rows.

N routed rows, D hidden size, I expert width, J = 2I, E experts. Descriptors of tensor-memory copies
are made on the host; everything that depends on the routing is read on the device.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import torch
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from moesaic.kernels.reference import Activation
from moesaic.kernels.triton.combine import take
from moesaic.kernels.triton.hopper_outer import outer_kernel
from moesaic.kernels.triton.hopper_rows import rows_kernel
from moesaic.kernels.triton.launch import Launcher
from moesaic.kernels.triton.metadata import TILE_ROWS, Routing

BK = 64
_SWIZZLED = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


_ROUNDS = any(field.name == "round_f32_to_tf32" for field in fields(TensorDescriptor))
_start_rows, _start_outer = Launcher(rows_kernel), Launcher(outer_kernel)


@dataclass(frozen=True)
class Launch:
    """How one product is launched."""

    width: int = 256
    """Columns of a tile; for `up`, of gate and up together."""
    stages: int = 4
    """Steps of 64 that the ring of shared memory holds."""
    group_m: int = 8
    """Row tiles that walk over the same columns before the next columns are read."""
    buffers: int = 4
    """Chunks of 64 columns that a warpgroup gives away at once; `up` takes two."""
    copy: bool = False
    """Bring the rows of the per-token matrix into order first, instead of gathering them."""
    loader: bool = False
    """Of the activation gradient, gathered: a warp of its own brings h (see `hopper_finish`)."""
    persistent: bool = True
    """One program a multiprocessor that walks over tiles, or one program a tile."""


def _descriptor(tensor: torch.Tensor, *block: int) -> TensorDescriptor:
    """Describe a matrix for tensor-memory copies of `block`; its checks are `why_not`'s."""
    descriptor = object.__new__(TensorDescriptor)
    descriptor.base = tensor
    descriptor.shape = list(tensor.shape)
    descriptor.strides = list(tensor.stride())
    descriptor.block_shape = list(block)
    descriptor.layout = _SWIZZLED
    descriptor.padding = "zero"
    if _ROUNDS:
        descriptor.round_f32_to_tf32 = False
    return descriptor


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _programs(device: torch.device, tiles: int, launch: Launch) -> int:
    return max(1, min(tiles, _processors(device)) if launch.persistent else tiles)


def _warps(
    *, gather: bool, finish: bool = False, loader: bool = False
) -> tuple[int, int, int, int, bool]:
    """Producer warps, registers of a consumer's and of any other thread, finishing warps, loader.

    A producer that gathers computes addresses. A loader makes room in time for four finishing
    warps; but with more than 12 warps a program, a consumer multiplies its columns in two halves,
    which reads a's half of the tile twice. That pays only where the product waits for its gather.
    """
    if not finish:
        return (4, 224, 56, 0, False) if gather else (1, 232, 40, 0, False)
    return (2, 160, 96, 4, True) if loader else (2, 168, 168, 2, False)


def _cut(n: int, by: int) -> int:
    return -(-n // by)


def _flat(matrices: torch.Tensor) -> tuple[torch.Tensor, int]:
    """See one matrix an expert as one matrix; return how many rows on the next expert's begin.

    Of contiguous matrices, or of some rows or columns of each.
    """
    experts, rows, columns = matrices.shape
    if matrices.is_contiguous():
        return matrices.view(-1, columns), rows
    step = matrices.stride(0) // matrices.stride(1)
    shape = ((experts - 1) * step + rows, columns)
    return matrices.as_strided(shape, matrices.stride()[1:]), step


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
    out: torch.Tensor,
    out2: torch.Tensor | None = None,
    out3: torch.Tensor | None = None,
    h: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    partial: torch.Tensor | None = None,
) -> None:
    """Multiply a [rows, K] by b (one matrix an expert); the rest has the kernel's names."""
    width = launch.width // 2 if epilogue == "swiglu" else launch.width
    flat, b_rows = _flat(b)
    dact = epilogue == "dact"  # whose results do not leave by tensor memory
    outputs: list[Any] = []
    for tensor in (out, out2, out3):
        outputs += [tensor, None if tensor is None or dact else _descriptor(tensor, 64, 64)]
    _start_rows(
        (_programs(a.device, routing.most_tiles * _cut(columns, width), launch),),
        None if gather else _descriptor(a, TILE_ROWS, BK),
        a,
        routing.token_N,
        _descriptor(flat, width, BK) if k_major else _descriptor(flat, BK, width),
        *outputs,
        None if h is None else _descriptor(h, 32, 64),
        weight,
        partial,
        routing.tile_expert,
        routing.tile_row,
        routing.tile_left,
        routing.tiles,
        columns,
        a.shape[1],
        b_rows,
        second,
        out.stride(0),
        0 if out3 is None else out3.stride(0),
        launch.group_m,
        epilogue,
        gather,
        a.shape[1] % BK == 0,
        k_major,
        keep_h,
        launch.width,
        BK,
        launch.stages,
        2 if epilogue == "swiglu" else launch.buffers,
        activation,
        *_warps(gather=gather, finish=dact, loader=launch.loader),
    )


def _source(x_TD: torch.Tensor, routing: Routing, launch: Launch) -> tuple[torch.Tensor, bool]:
    """Return the matrix that a product reads, and whether through the tokens of its rows."""
    return (take(x_TD, routing.token_N), False) if launch.copy else (x_TD, True)


def up(
    x_TD: torch.Tensor,
    gate_up_EJD: torch.Tensor,
    routing: Routing,
    launch: Launch,
    *,
    keep_h: bool = True,
    activation: Activation = "silu",
    h_NJ: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return a = act(gate) * up of the gathered rows, and h = [gate, up] if kept; in `h_NJ`."""
    rows, width = routing.token_N.shape[0], gate_up_EJD.shape[1] // 2
    a_NI = x_TD.new_empty(rows, width)
    if h_NJ is None and keep_h:
        h_NJ = x_TD.new_empty(rows, 2 * width)
    halves = (a_NI, a_NI) if h_NJ is None else (h_NJ[:, :width], h_NJ[:, width:])
    source, gather = _source(x_TD, routing, launch)
    _rows(
        source, gate_up_EJD, routing, launch,
        epilogue="swiglu", gather=gather, k_major=True, columns=width, second=width, keep_h=keep_h,
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
    out_NM: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return a @ weight[e] (weight [E, K, M]), or a @ weight[e].T if `transposed` ([E, M, K]).

    The weight may be some of each expert's M. In `out_NM`, if given.
    """
    columns = weight.shape[1] if transposed else weight.shape[2]
    if out_NM is None:
        out_NM = a_NK.new_empty(a_NK.shape[0], columns)
    _rows(
        a_NK, weight, routing, launch,
        epilogue="plain", gather=False, k_major=transposed, columns=columns, out=out_NM,
    )  # fmt: skip
    return out_NM


def activation_gradient(
    grad_TD: torch.Tensor,
    down_EDI: torch.Tensor,
    h_NJ: torch.Tensor,
    routing: Routing,
    launch: Launch,
    *,
    activation: Activation = "silu",
    clear: bool = False,
    columns: tuple[int, int] | None = None,
    dh_NJ: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dh, weight * a, and partial sums [N, tiles] of the routing weights' gradient.

    `columns`: only those from the first to before the second, of I; dh has its place for all.

    `dh_NJ`: where dh is written; may be h, of which each chunk is read before.

    `clear`: rows of nobody are zeros in what is made here; `outer` reads up to 63 rows past an
    expert's end and multiplies them by zero, which unwritten memory need not survive.
    """
    width = down_EDI.shape[2]
    start, end, h_from = 0, width, h_NJ
    if columns is not None:
        start, end = columns
        down_EDI, h_from = down_EDI[:, :, start:end], h_NJ[:, start:]
    new = h_NJ.new_zeros if clear else h_NJ.new_empty
    if dh_NJ is None:
        dh_NJ = new(h_NJ.shape)
    wa_NI = new(h_NJ.shape[0], end - start)
    partial = torch.empty(
        h_NJ.shape[0], _cut(end - start, launch.width), dtype=torch.float32, device=h_NJ.device
    )
    source, gather = _source(grad_TD, routing, launch)
    _rows(
        source, down_EDI, routing, launch,
        epilogue="dact", gather=gather, k_major=False, columns=end - start, second=width,
        activation=activation,
        out=dh_NJ[:, start:end], out2=dh_NJ[:, width + start : width + end], out3=wa_NI,
        h=h_from, weight=routing.weight_N, partial=partial,
    )  # fmt: skip
    return dh_NJ, wa_NI, partial


def outer(
    a_TM: torch.Tensor,
    b_NC: torch.Tensor,
    routing: Routing,
    launch: Launch,
    *,
    transposed: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return [E, M, C], the sum over an expert's rows s of a[token of s] (x) b[s].

    `transposed`: [E, C, M] instead. In `out`, if given: if M is a multiple of 64, these may be some
    columns of contiguous matrices.
    """
    experts, m, n = routing.ends_E.shape[0], a_TM.shape[1], b_NC.shape[1]
    if out is None:
        out = a_TM.new_empty((experts, n, m) if transposed else (experts, m, n))
    tiles = experts * _cut(m, TILE_ROWS) * _cut(n, launch.width)
    _start_outer(
        (_programs(a_TM.device, tiles, launch),),
        a_TM,
        routing.token_N,
        _descriptor(b_NC, BK, launch.width),
        routing.by_size,
        routing.tickets,
        _descriptor(_flat(out)[0], 64, 64),
        out,
        experts,
        m,
        n,
        launch.group_m,
        m % TILE_ROWS == 0,
        transposed,
        TILE_ROWS,
        launch.width,
        BK,
        launch.stages,
        launch.buffers,
        *_warps(gather=True)[:3],
    )
    return out
