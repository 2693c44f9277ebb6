"""The experts layer for a few tokens: three launches, each touched weight read exactly once.

Decoding is a matter of bytes: the weights of the experts that the tokens chose go through the GPU
once, and everything else must hide behind that. So nothing is sorted. Every program reads all the
ids, finds the rows of its own expert among them, and streams its columns of that expert's weight
through the tensor cores against those rows. Forward only; nothing depends on the host but sizes, so
that a CUDA graph can hold it. Deterministic: no atomics.

T tokens, D hidden size, I expert width, J = 2I, E experts, K experts a token, N = T*K pairs of a
token and an expert, numbered t*K + k. A pair whose id lies outside [0, E) adds nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from moesaic.kernels.reference import Activation
from moesaic.kernels.triton.activations import activate
from moesaic.kernels.triton.launch import Launcher

MOST_PAIRS = 512
"""Pairs N that `decode` takes; beyond, reading all ids in each program costs too much."""
_PROGRAMS = 384  # that keep a large GPU busy: three for each of 132 processors

_WEIGHED = 256  # columns that one program brings together


@dataclass(frozen=True)
class Cut:
    """How one product is cut: columns of a tile (rows of the weight), its depth, steps ahead."""

    columns: int
    depth: int
    stages: int
    warps: int = 4


@dataclass(frozen=True)
class Config:
    """How a layer is cut.

    `tile_rows` rows of one expert are multiplied at once; if it has more, its weights are read
    again. `overlap` lets a kernel prepare while the one before it still runs (compute capability
    9.0 and up).
    """

    up: Cut
    down: Cut
    tile_rows: int
    overlap: bool = False


def configs(
    *, tokens: int, hidden: int, width: int, experts: int, top_k: int, itemsize: int = 2
) -> dict[str, Config]:
    """Return the ways to cut a problem by name; "chosen" is the one that `decode` takes.

    The others cut both products alike. narrow makes the most programs, for a few small experts;
    wide reads the rows of x least often, for many large ones; deep takes longer steps.
    """
    pairs = tokens * top_k
    touched = max(1, min(pairs, experts))
    mean = pairs / touched
    tile_rows = 16 if mean <= 8 else 32 if mean <= 20 else 64
    cuts = _cuts(tile_rows, itemsize)
    up, down = (_choose(cuts, touched * columns) for columns in (2 * width, hidden))
    return {"chosen": Config(up, down, tile_rows)} | {
        name: Config(cut, cut, tile_rows) for name, cut in cuts.items()
    }


def _cuts(tile_rows: int, itemsize: int) -> dict[str, Cut]:
    """Return cuts from narrow to wide. A step of all their tiles together is 16 to 32 KiB."""
    if itemsize > 2:
        return {"narrow": Cut(16, 32, 4), "wide": Cut(32, 32, 4)}
    if tile_rows == 64:
        return {"narrow": Cut(32, 64, 5), "wide": Cut(64, 64, 4)}
    return {
        "narrow": Cut(16, 256, 5),
        "deep": Cut(32, 256, 4),
        "middle": Cut(32, 128, 5),
        "wide": Cut(64, 128, 4),
    }


def _choose(cuts: dict[str, Cut], columns: int) -> Cut:
    """Return the widest cut that still makes enough programs for so many rows of weights."""
    enough = [cut for cut in cuts.values() if columns >= _PROGRAMS * cut.columns]
    return enough[-1] if enough else next(iter(cuts.values()))


def decode(
    x_TD: torch.Tensor,
    gate_up_EJD: torch.Tensor,
    down_EDI: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    *,
    activation: Activation = "silu",
    config: Config | None = None,
) -> torch.Tensor:
    """Return out_TD[t] = sum_k weights[t, k] * expert_{ids[t, k]}(x[t]); see `kernels.reference`.

    x and both weights have one dtype, float32, bfloat16 or float16. Raises ValueError above
    `MOST_PAIRS` pairs.
    """
    tokens, hidden = x_TD.shape
    experts, width, top_k = down_EDI.shape[0], down_EDI.shape[2], ids_TK.shape[1]
    pairs = tokens * top_k
    if pairs > MOST_PAIRS:
        raise ValueError(
            f"decode takes at most {MOST_PAIRS} pairs of a token and an expert, not {pairs}. "
            "Use the layer for more tokens."
        )
    if pairs == 0:
        return torch.zeros_like(x_TD)
    if config is None:
        config = configs(
            tokens=tokens, hidden=hidden, width=width, experts=experts, top_k=top_k,
            itemsize=x_TD.itemsize,
        )["chosen"]  # fmt: skip
    up, down, overlap = config.up, config.down, config.overlap
    x_TD, ids_TK, weights_TK = (t.contiguous() for t in (x_TD, ids_TK, weights_TK))
    a_NI, y_ND = x_TD.new_empty(pairs, width), x_TD.new_empty(pairs, hidden, dtype=torch.float32)
    out_TD = torch.empty_like(x_TD)
    by_expert = pairs > experts
    slots = experts if by_expert else pairs
    common = {
        "BM": config.tile_rows,
        "BY_EXPERT": by_expert,
        "PAIRS": max(16, triton.next_power_of_2(pairs)),
        "OVERLAP": overlap,
    }
    _start_up(
        (triton.cdiv(2 * width, up.columns), slots),
        x_TD, ids_TK, gate_up_EJD, *gate_up_EJD.stride(), a_NI, pairs, experts, top_k,
        width, hidden, ACTIVATION=activation, BN=up.columns, BK=up.depth, **common,
        num_warps=up.warps, num_stages=up.stages,
    )  # fmt: skip
    _start_down(
        (triton.cdiv(hidden, down.columns), slots),
        a_NI, ids_TK, down_EDI, *down_EDI.stride(), y_ND, pairs, experts, hidden, width,
        BN=down.columns, BK=down.depth, **common,
        num_warps=down.warps, num_stages=down.stages, launch_pdl=overlap,
    )  # fmt: skip
    _start_weigh(
        (tokens, triton.cdiv(hidden, _WEIGHED)),
        y_ND, ids_TK, weights_TK, out_TD, experts, hidden,
        TOP_K=top_k, BLOCK=_WEIGHED, OVERLAP=overlap, num_warps=2, launch_pdl=overlap,
    )  # fmt: skip
    return out_TD


@triton.jit
def _mine(ids_ptr, pairs, experts, BY_EXPERT: tl.constexpr, PAIRS: tl.constexpr):
    """A program's expert, and how many pairs are its own.

    With more pairs than experts, a program's slot is its expert. Else it is a pair, and the first
    pair of an expert works for all of them: the others have none of their own.
    """
    slot = tl.program_id(1)
    pair = tl.arange(0, PAIRS)
    ids = tl.load(ids_ptr + pair, mask=pair < pairs, other=-1).to(tl.int32)
    if BY_EXPERT:
        expert = slot
        count = tl.sum((ids == expert).to(tl.int32), 0)
    else:
        expert = tl.load(ids_ptr + slot).to(tl.int32)
        own = (ids == expert).to(tl.int32)
        earlier = tl.sum(tl.where(pair < slot, own, 0), 0)
        works = (earlier == 0) & (expert >= 0) & (expert < experts)
        count = tl.where(works, tl.sum(own, 0), 0)
    return expert, count


@triton.jit
def _pairs_of(ids_ptr, pairs, expert, first, BM: tl.constexpr, PAIRS: tl.constexpr):
    """An expert's pairs [BM] from its pair number `first` on; 0 past the last.

    The ids are read again: what is kept from before takes registers while the weights stream.
    """
    pair = tl.arange(0, PAIRS)
    ids = tl.load(ids_ptr + pair, mask=pair < pairs, other=-1).to(tl.int32)
    own = (ids == expert).to(tl.int32)
    # Rank and pair in one number, since it goes from every thread to every other.
    ranked = tl.where(own == 1, (tl.cumsum(own, 0) - 1 - first) * PAIRS + pair, -1)
    each = ranked[None, :] - (tl.arange(0, BM) * PAIRS)[:, None]
    return tl.sum(tl.where((each >= 0) & (each < PAIRS), each, 0), 1)


@triton.jit
def _product(
    a_row_ptr, valid, b_ptr, b_stride_k, column, offset, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Valid rows [BM], each at its pointer, times columns of a weight that is read only once."""
    k = tl.arange(0, BK)
    a_ptr = a_row_ptr[:, None] + k[None, :]
    b_ptr = b_ptr + k.to(tl.int64)[:, None] * b_stride_k + offset[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        inside = start + k < K
        a = tl.load(a_ptr, mask=valid[:, None] & inside[None, :], other=0.0)
        b_mask = inside[:, None] & (column < N)[None, :]
        b = tl.load(b_ptr, mask=b_mask, other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        a_ptr += BK
        b_ptr += BK * b_stride_k
    return total


@triton.jit(do_not_specialize=["pairs", "experts", "top_k"])
def _up(
    x_ptr, ids_ptr, w_ptr, w_stride_e, w_stride_j, w_stride_d, a_ptr, pairs, experts, top_k,
    width, hidden, ACTIVATION: tl.constexpr, BY_EXPERT: tl.constexpr, PAIRS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """a[pair] = act(gate) * up; columns alternate between gate and up, as in `portable`."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    expert, count = _mine(ids_ptr, pairs, experts, BY_EXPERT, PAIRS)
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    offset = (column // 2 + (column % 2) * width).to(tl.int64) * w_stride_j
    at = tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2)
    for first in range(0, count, BM):
        pair = _pairs_of(ids_ptr, pairs, expert, first, BM, PAIRS)
        valid = first + tl.arange(0, BM) < count
        total = _product(
            x_ptr + (pair // top_k) * hidden, valid,
            w_ptr + expert.to(tl.int64) * w_stride_e, w_stride_d, column, offset, 2 * width, hidden,
            BM, BN, BK,
        )  # fmt: skip
        dtype = a_ptr.dtype.element_ty
        gate, up_ = tl.split(tl.reshape(total, (BM, BN // 2, 2)))
        # Rounded, as the layer for many tokens does.
        gate, up_ = gate.to(dtype).to(tl.float32), up_.to(dtype).to(tl.float32)
        act, _ = activate(gate, ACTIVATION)
        where = a_ptr + pair[:, None] * width + at[None, :]
        tl.store(where, (act * up_).to(dtype), mask=valid[:, None] & (at < width)[None, :])


@triton.jit(do_not_specialize=["pairs", "experts"])
def _down(
    a_ptr, ids_ptr, w_ptr, w_stride_e, w_stride_d, w_stride_i, y_ptr, pairs, experts, hidden, width,
    BY_EXPERT: tl.constexpr, PAIRS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """y[pair] = down(a[pair]), without the routing weight."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    expert, count = _mine(ids_ptr, pairs, experts, BY_EXPERT, PAIRS)
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()  # every program: the next kernel takes our end for that of `_up`
    for first in range(0, count, BM):
        pair = _pairs_of(ids_ptr, pairs, expert, first, BM, PAIRS)
        valid = first + tl.arange(0, BM) < count
        total = _product(
            a_ptr + pair * width, valid, w_ptr + expert.to(tl.int64) * w_stride_e, w_stride_i,
            column, column.to(tl.int64) * w_stride_d, hidden, width, BM, BN, BK,
        )  # fmt: skip
        where = y_ptr + pair[:, None] * hidden + column[None, :]
        tl.store(where, total, mask=valid[:, None] & (column < hidden)[None, :])


@triton.jit(do_not_specialize=["experts"])
def _weigh(
    y_ptr, ids_ptr, weights_ptr, out_ptr, experts, hidden,
    TOP_K: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """out[token] = sum over k of weight * y, in float32."""
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    for k in tl.static_range(TOP_K):
        pair = token * TOP_K + k
        expert = tl.load(ids_ptr + pair).to(tl.int32)
        # A width, not a truth value: the interpreter makes bytes of a scalar's.
        inside = tl.where((expert >= 0) & (expert < experts), hidden, 0)
        y = tl.load(y_ptr + pair * hidden + column, mask=column < inside, other=0.0)
        total += tl.load(weights_ptr + pair).to(tl.float32) * y
    out = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * hidden + column, out, mask=column < hidden)


_start_up, _start_down, _start_weigh = (Launcher(kernel) for kernel in (_up, _down, _weigh))
