"""What the Hopper kernels do with their arguments, in plain torch: their host code runs on a CPU.

Products are taken in float64, so that cutting them changes no bit of what is rounded.
"""

from __future__ import annotations

from typing import Any

import torch

TILE = 128


class Launcher:
    """Stands in for the launcher of `kernel`, a Gluon function that is not run."""

    def __init__(self, kernel: Any, meaning: Any) -> None:
        self._names, self._meaning = kernel.arg_names, meaning

    def __call__(self, grid: tuple[int, ...], *arguments: Any) -> None:
        self._meaning(**dict(zip(self._names, arguments, strict=True)))


def rows_kernel(
    *, a_desc, a_ptr, token_ptr, b_desc, tile_expert_ptr, tile_row_ptr, tile_left_ptr, count_ptr,
    N, K, b_rows, second, out_stride, EPILOGUE, GATHER, B_KMAJOR, KEEP_H, **rest,
):  # fmt: skip
    """out[s] = a[s] @ B of the expert of s, and what follows; nothing outside is touched."""

    def put(name, value):
        out = rest[name]
        assert out.shape[1] >= N
        out.data[row:end, :N] = value.to(out.dtype)

    b = b_desc.base.double()
    assert out_stride == rest["out_ptr"].stride(0)
    for m in range(int(count_ptr)):
        expert, row, left = (int(t[m]) for t in (tile_expert_ptr, tile_row_ptr, tile_left_ptr))
        end, first = row + min(left, TILE), expert * b_rows
        a = a_ptr[token_ptr[row:end].long()] if GATHER else a_desc.base[row:end]
        assert a.shape == (end - row, K)
        matrix = b[first : first + N].T if B_KMAJOR else b[first : first + K]
        assert matrix.shape == (K, N)
        product = (a.double() @ matrix).to(a.dtype)
        if EPILOGUE == "plain":
            put("out_ptr", product)
        elif EPILOGUE == "swiglu":
            up = (a.double() @ b[first + second : first + second + N].T).to(a.dtype)
            if KEEP_H:
                put("out_ptr", product)
                put("out2_ptr", up)
            put("out3_ptr", torch.nn.functional.silu(product.double()) * up)
        else:
            h = rest["h_desc"].base[row:end].double()
            gate, up, da = h[:, :N], h[:, second : second + N], product.double()
            assert gate.shape == up.shape == da.shape
            act, sigmoid = torch.nn.functional.silu(gate), torch.sigmoid(gate)
            weight = rest["weight_ptr"][row:end, None]
            sums = [part.sum(1) for part in (da * act * up).split(rest["BN"], dim=1)]
            rest["partial_ptr"][row:end] = torch.stack(sums, 1).float()
            put("out3_ptr", weight * act * up)
            put("out_ptr", weight * da * up * (sigmoid + act - act * sigmoid))
            put("out2_ptr", weight * da * act)


def outer_kernel(
    *, a_ptr, token_ptr, b_desc, by_size_ptr, out_desc, experts, M, N, TRANSPOSED, **rest
):
    """out[e] = sum of a[token of s] (x) b[s] over the rows s of e."""
    for begin, end, expert in by_size_ptr.view(3, experts).T.tolist():
        a = a_ptr[token_ptr[begin:end].long()].double()
        total = a.T @ b_desc.base[begin:end].double()
        total = total.T if TRANSPOSED else total
        rows = slice(expert * len(total), (expert + 1) * len(total))
        assert out_desc.base[rows].shape == total.shape
        out_desc.base[rows] = total.to(out_desc.base.dtype)
