"""The two matrix products of a mixture of experts, on torch's grouped matmul or as a loop over the experts.

N routed rows sorted by expert; `ends_E[e]` (int32) is one past the last row of expert e, so `ends_E[-1] == N`.
E experts, P and Q the two sizes of a product.

`rows` multiplies each expert's rows by its matrix (forward, gradient of the input), `outer` sums the outer products
of each expert's rows (gradient of the weights; zero for an expert without rows).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

Backend = Literal["grouped", "loop"]
GROUPED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ALIGNMENT = 16  # bytes; torch's grouped matmul refuses other row strides and addresses


def why_not_grouped(dtype: torch.dtype, device: torch.device, sizes: tuple[int, ...]) -> str | None:
    """Say in a few words why torch's grouped matmul cannot take these products, or None when it can.

    `sizes` are the lengths of all rows that take part (hidden size, expert width).
    """
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped matmul"
    if dtype not in GROUPED_DTYPES:
        return f"torch's grouped matmul does not take {str(dtype).removeprefix('torch.')}"
    if device.type not in ("cpu", "cuda"):
        return f"torch's grouped matmul is not used on {device.type}"
    if (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) < (8, 0)
    ):
        return "torch's grouped matmul needs a GPU of compute capability 8.0 or newer"
    multiple = ALIGNMENT // dtype.itemsize
    odd = [size for size in sizes if size % multiple]
    if odd:
        name = str(dtype).removeprefix("torch.")
        return f"torch's grouped matmul takes {name} sizes that are multiples of {multiple}, not {odd[0]}"
    return None


def rows(
    a_NP: torch.Tensor, w_EPQ: torch.Tensor, ends_E: torch.Tensor, *, backend: Backend
) -> torch.Tensor:
    """Return out_NQ: the rows of expert e times `w_EPQ[e]`. `w_EPQ` may be a transposed view."""
    if backend == "grouped":
        return F.grouped_mm(a_NP, w_EPQ, offs=ends_E)
    if torch.compiler.is_compiling():
        out: torch.Tensor = torch.ops.moesaic.loop_rows(a_NP, w_EPQ, ends_E)
        return out
    return _loop_rows(a_NP, w_EPQ, ends_E)


def outer(
    a_NP: torch.Tensor, b_NQ: torch.Tensor, ends_E: torch.Tensor, *, backend: Backend
) -> torch.Tensor:
    """Return out_EPQ: for expert e the sum over its rows n of the outer product of a[n] and b[n]."""
    if backend == "grouped":
        return F.grouped_mm(a_NP.t(), b_NQ, offs=ends_E)
    if torch.compiler.is_compiling():
        out: torch.Tensor = torch.ops.moesaic.loop_outer(a_NP, b_NQ, ends_E)
        return out
    return _loop_outer(a_NP, b_NQ, ends_E)


def _loop_rows(a_NP: torch.Tensor, w_EPQ: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    out_NQ = a_NP.new_empty(a_NP.shape[0], w_EPQ.shape[2])
    start = 0
    for expert, end in enumerate(
        ends_E.tolist()
    ):  # the one host synchronisation of this path on a GPU
        if start < end:
            torch.mm(a_NP[start:end], w_EPQ[expert], out=out_NQ[start:end])
        start = end
    return out_NQ


def _loop_outer(a_NP: torch.Tensor, b_NQ: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    out_EPQ = a_NP.new_empty(ends_E.shape[0], a_NP.shape[1], b_NQ.shape[1])
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        if start < end:
            torch.mm(a_NP[start:end].t(), b_NQ[start:end], out=out_EPQ[expert])
        else:
            out_EPQ[expert].zero_()
        start = end
    return out_EPQ


# Under torch.compile the loop's lengths are data, which no graph can hold: there the loop is one opaque operator.
# Schemas are written out because annotations are strings in this file.
_rows_op = torch.library.custom_op(
    "moesaic::loop_rows",
    _loop_rows,
    mutates_args=(),
    schema="(Tensor a, Tensor w, Tensor ends) -> Tensor",
)
_outer_op = torch.library.custom_op(
    "moesaic::loop_outer",
    _loop_outer,
    mutates_args=(),
    schema="(Tensor a, Tensor b, Tensor ends) -> Tensor",
)


@_rows_op.register_fake
def _rows_shape(a: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return a.new_empty(a.shape[0], w.shape[2])


@_outer_op.register_fake
def _outer_shape(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return a.new_empty(ends.shape[0], a.shape[1], b.shape[1])
