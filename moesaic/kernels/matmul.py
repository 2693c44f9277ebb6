"""The two matrix products of routed experts, by torch's grouped matmul or by a loop over experts.

N routed rows sorted by expert; `ends_E[e]` (int32) is one past the last row of expert e, so that
`ends_E[-1] <= N`. E experts, P and Q the two sizes of a product.

`rows` multiplies each expert's rows by its matrix (forward, gradient of the input); `outer` sums
the outer products of each expert's rows (gradient of the weights; zero for an expert without rows).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

Backend = Literal["grouped", "loop"]
GROUPED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
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


def rows(
    a_NP: torch.Tensor, w_EPQ: torch.Tensor, ends_E: torch.Tensor, *, backend: Backend
) -> torch.Tensor:
    """Return out_NQ: the rows of expert e times `w_EPQ[e]`; `w_EPQ` may be a transposed view.

    Rows from `ends_E[-1]` on belong to no expert: they cost nothing and hold anything.
    """
    if backend == "grouped":
        return F.grouped_mm(a_NP, w_EPQ, offs=ends_E)
    out_NQ = a_NP.new_empty(a_NP.shape[0], w_EPQ.shape[2])
    start = 0
    for expert, end in enumerate(ends_E.tolist()):  # on a GPU, the one wait for the device
        if start < end:
            torch.mm(a_NP[start:end], w_EPQ[expert], out=out_NQ[start:end])
        start = end
    return out_NQ


def outer(
    a_NP: torch.Tensor, b_NQ: torch.Tensor, ends_E: torch.Tensor, *, backend: Backend
) -> torch.Tensor:
    """Return out_EPQ: for expert e the sum of the outer products of a[n] and b[n] of its rows n."""
    if backend == "grouped":
        return F.grouped_mm(a_NP.t(), b_NQ, offs=ends_E)
    out_EPQ = a_NP.new_empty(ends_E.shape[0], a_NP.shape[1], b_NQ.shape[1])
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        if start < end:
            torch.mm(a_NP[start:end].t(), b_NQ[start:end], out=out_EPQ[expert])
        else:
            out_EPQ[expert].zero_()
        start = end
    return out_EPQ


def clear_tail(a_NP: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """Write zeros into the rows that belong to no expert, in place, without a wait for a GPU."""
    row_N = torch.arange(a_NP.shape[0], dtype=ends_E.dtype, device=a_NP.device)
    return a_NP.masked_fill_((row_N >= ends_E[-1]).unsqueeze(1), 0)
