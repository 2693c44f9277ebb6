"""The two matrix products of routed experts: torch's grouped matmul, padded slices, or a loop.

N routed rows sorted by expert; `ends_E[e]` (int32) is one past the last row of expert e, so that
`ends_E[-1] <= N`. E experts, P and Q the two sizes of a product.

`rows` multiplies each expert's rows by its matrix (forward, gradient of the input); `outer` sums
the outer products of each expert's rows (gradient of the weights; zero for an expert without rows).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

Backend = Literal["grouped", "loop"]
GROUPED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_FEW_ROWS = 32  # of one expert: two AMX tiles
ALIGNMENT = 16  # bytes; torch's grouped matmul refuses other row strides


def why_not_grouped(dtype: torch.dtype, device: torch.device, sizes: tuple[int, ...]) -> str | None:
    """Say in a few words why torch's grouped matmul cannot take these products, or return None.

    `sizes` are the lengths of all rows that take part: hidden size and expert width.
    """
    name = str(dtype).removeprefix("torch.")
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped matmul"
    if dtype not in GROUPED_DTYPES:
        return f"torch's grouped matmul does not take {name}"
    if device.type not in ("cpu", "cuda"):
        return f"torch's grouped matmul is not used on {device.type}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "torch's grouped matmul needs a GPU of compute capability 8.0 or newer"
    multiple = ALIGNMENT // dtype.itemsize
    odd = [size for size in sizes if size % multiple]
    if odd:
        return f"torch's grouped matmul takes multiples of {multiple} in {name}, not {odd[0]}"
    return None


@dataclass(frozen=True)
class Layout:
    """Where each expert's rows lie, and how they are multiplied.

    `segments` holds expert, first row and number of rows of every expert with rows, for the loop.
    `slot_N` is the place of each row when every expert has room for `longest` rows, or None where
    padding does not pay.
    """

    ends_E: torch.Tensor
    backend: Backend
    segments: Sequence[tuple[int, int, int]] = ()
    longest: int = 0
    slot_N: torch.Tensor | None = None


def layout(ends_E: torch.Tensor, count: int, dtype: torch.dtype, *, backend: Backend) -> Layout:
    """Choose how `count` rows are multiplied, without asking a GPU anything.

    On a CPU torch's grouped matmul calls a product for each expert, with rows or without: where
    most have none, a loop over the others is faster. A half-precision product of a few rows costs
    25 us before it starts (packing in oneDNN); one batched product of padded rows costs that once.
    Measured on bf16 with AMX, 32 experts of (256, 128): 8 tokens 2 to 4 times faster, 512 even.
    """
    if backend == "grouped" and ends_E.device.type != "cpu":
        return Layout(ends_E, backend)
    ends = ends_E.tolist()  # on a GPU, the loop's one wait for the device
    bounds = enumerate(zip([0, *ends], ends, strict=False))
    segments = [(expert, start, end - start) for expert, (start, end) in bounds if end > start]
    # A turn of the loop costs what four products of no rows cost.
    if len(ends) > 5 * len(segments) or ends_E.device.type != "cpu":
        return Layout(ends_E, "loop", segments)
    longest = max(rows for _, _, rows in segments)
    few = longest <= _FEW_ROWS and dtype in (torch.bfloat16, torch.float16)
    if not few or 2 * len(segments) < len(ends) or ends[-1] < count:
        return Layout(ends_E, backend, segments)
    slots = [expert * longest + row for expert, _, rows in segments for row in range(rows)]
    return Layout(ends_E, backend, segments, longest, torch.tensor(slots))


def rows(a_NP: torch.Tensor, w_EPQ: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Return out_NQ: the rows of expert e times `w_EPQ[e]`; `w_EPQ` may be a transposed view.

    Rows from `ends_E[-1]` on belong to no expert: they cost nothing and hold anything.
    """
    if layout.slot_N is not None:
        out_MQ = torch.bmm(_pad(a_NP, layout), w_EPQ).flatten(0, 1)
        return out_MQ.index_select(0, layout.slot_N)
    if layout.backend == "grouped":
        return F.grouped_mm(a_NP, w_EPQ, offs=layout.ends_E)
    out_NQ = a_NP.new_empty(a_NP.shape[0], w_EPQ.shape[2])
    for expert, start, length in layout.segments:
        out = out_NQ.narrow(0, start, length)
        torch.mm(a_NP.narrow(0, start, length), w_EPQ.select(0, expert), out=out)
    return out_NQ


def outer(a_NP: torch.Tensor, b_NQ: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Return out_EPQ: for expert e the sum of the outer products of a[n] and b[n] of its rows n."""
    if layout.slot_N is not None:
        return torch.bmm(_pad(a_NP, layout).transpose(1, 2), _pad(b_NQ, layout))
    if layout.backend == "grouped":
        return F.grouped_mm(a_NP.t(), b_NQ, offs=layout.ends_E)
    out_EPQ = a_NP.new_empty(len(layout.ends_E), a_NP.shape[1], b_NQ.shape[1])
    written = 0
    for expert, start, length in layout.segments:
        out_EPQ[written:expert].zero_()
        a, b = (t.narrow(0, start, length) for t in (a_NP, b_NQ))
        torch.mm(a.t(), b, out=out_EPQ.select(0, expert))
        written = expert + 1
    out_EPQ[written:].zero_()
    return out_EPQ


def _pad(a_NP: torch.Tensor, layout: Layout) -> torch.Tensor:
    experts = len(layout.ends_E)
    padded_MP = a_NP.new_zeros(experts * layout.longest, a_NP.shape[1])
    padded_MP[layout.slot_N] = a_NP
    return padded_MP.view(experts, layout.longest, -1)


def clear_tail(a_NP: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """Write zeros into the rows that belong to no expert, in place, without a wait for a GPU."""
    row_N = torch.arange(a_NP.shape[0], dtype=ends_E.dtype, device=a_NP.device)
    return a_NP.masked_fill_((row_N >= ends_E[-1]).unsqueeze(1), 0)
