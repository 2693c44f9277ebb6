"""Which row goes where: routed rows sorted by expert, without a sort and without asking the GPU.

T tokens, K experts a token, N = T*K routed rows, E experts. Rows keep their order within an expert
(a stable counting sort), so two runs give the same bits. An id outside [0, E) is a row that belongs
to nobody here (expert parallelism marks such rows with E): it gets position -1 and enters no
product. Three launches: histograms of blocks, a prefix sum for each expert, positions and tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from moesaic.kernels.triton.launch import Launcher

BLOCK = 256
"""Routed rows that one program counts and places."""
TILE_ROWS = 128
"""Rows of a tile of the Hopper kernels."""
_CHUNK = 32
_SCAN = 1024


@dataclass(frozen=True)
class Routing:
    """Where every routed row lies; all tensors stay on the device and are views of two."""

    ints: torch.Tensor
    """All of the integers below."""
    weight_N: torch.Tensor
    """Routing weight of each sorted row, float32."""
    token_N: torch.Tensor
    """Token of each sorted row, int32; undefined past the last expert's end."""
    inverse_N: torch.Tensor
    """Sorted position of flat row t*K + k, int32; -1 for a row of nobody here."""
    tile_expert: torch.Tensor
    """Expert of each row tile, int32 [tiles]; only the first `tiles[0]` count."""
    tile_row: torch.Tensor
    """First sorted row of each row tile, int32 [tiles]."""
    tile_left: torch.Tensor
    """Rows from there to the expert's end, int32 [tiles]; more than `tile_rows` if tiles follow."""
    ends_E: torch.Tensor
    """Where each expert's rows end, int32."""
    totals_E: torch.Tensor
    """Rows of each expert, int32."""
    tiles: torch.Tensor
    """Number of row tiles, int32 [1]."""
    tile_rows: int
    """Rows of a tile."""

    @classmethod
    def of(
        cls, ints: torch.Tensor, weight_N: torch.Tensor, *, experts: int, tile_rows: int
    ) -> Routing:
        """Cut `ints` into its parts."""
        parts: list[torch.Tensor] = list(ints.split(_sizes(weight_N.shape[0], experts, tile_rows)))
        token_N, inverse_N, expert, row, left, ends_E, totals_E, tiles = parts
        return cls(
            ints,
            weight_N,
            token_N,
            inverse_N,
            expert,
            row,
            left,
            ends_E,
            totals_E,
            tiles,
            tile_rows,
        )

    @property
    def most_tiles(self) -> int:
        """Upper bound of the number of row tiles, known without asking the device."""
        return int(self.tile_expert.shape[0])


def _sizes(rows: int, experts: int, tile_rows: int) -> list[int]:
    tiles = -(-rows // tile_rows) + experts
    return [rows, rows, tiles, tiles, tiles, experts, experts, 1]


def count_ints(rows: int, experts: int, tile_rows: int) -> int:
    """Return the number of integers of a `Routing`."""
    return sum(_sizes(rows, experts, tile_rows))


def route(
    ids_TK: torch.Tensor, weights_TK: torch.Tensor, *, experts: int, tile_rows: int
) -> Routing:
    """Sort routed rows by expert and cut each expert's rows into tiles of `tile_rows`."""
    rows, device = ids_TK.numel(), ids_TK.device
    blocks = -(-rows // BLOCK)
    bins = triton.next_power_of_2(experts + 1)
    ids_TK, weights_TK = ids_TK.contiguous(), weights_TK.contiguous()
    ints = torch.empty(count_ints(rows, experts, tile_rows), dtype=torch.int32, device=device)
    weight_N = torch.empty(rows, dtype=torch.float32, device=device)
    routing = Routing.of(ints, weight_N, experts=experts, tile_rows=tile_rows)
    counts = torch.empty(blocks, experts, dtype=torch.int32, device=device)
    _start_count((blocks,), ids_TK, counts, rows, experts, bins, BLOCK)
    _start_scan((experts,), counts, routing.totals_E, blocks, experts, _SCAN)
    _start_place(
        (blocks + experts,),
        ids_TK, weights_TK, counts, routing.totals_E, routing.token_N, weight_N,
        routing.inverse_N, routing.ends_E, routing.tile_expert, routing.tile_row,
        routing.tile_left, routing.tiles, rows, experts, blocks,
        ids_TK.shape[1], bins, BLOCK, _CHUNK, tile_rows,
    )  # fmt: skip
    return routing


@triton.jit
def _count(ids_ptr, counts_ptr, rows, experts, BINS: tl.constexpr, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    row = pid * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + row, mask=row < rows, other=-1).to(tl.int32)
    ids = tl.where((ids >= 0) & (ids < experts), ids, experts)
    counts = tl.histogram(ids, BINS)
    expert = tl.arange(0, BINS)
    tl.store(counts_ptr + pid * experts + expert, counts, mask=expert < experts)


@triton.jit
def _scan(counts_ptr, totals_ptr, blocks, experts, SCAN: tl.constexpr):
    expert = tl.program_id(0)
    total = 0
    for start in range(0, blocks, SCAN):
        block = start + tl.arange(0, SCAN)
        where = counts_ptr + block * experts + expert
        counts = tl.load(where, mask=block < blocks, other=0)
        tl.store(where, total + tl.cumsum(counts, 0) - counts, mask=block < blocks)
        total += tl.sum(counts, 0)
    tl.store(totals_ptr + expert, total)


@triton.jit
def _place(
    ids_ptr, weights_ptr, before_ptr, totals_ptr, token_ptr, weight_ptr, inverse_ptr, ends_ptr,
    tile_expert_ptr, tile_row_ptr, tile_left_ptr, tiles_ptr, rows, experts, blocks,
    TOP_K: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    bin_ = tl.arange(0, BINS)
    totals = tl.load(totals_ptr + bin_, mask=bin_ < experts, other=0)
    if pid < blocks:
        row = pid * BLOCK + tl.arange(0, BLOCK)
        ids = tl.load(ids_ptr + row, mask=row < rows, other=-1).to(tl.int32)
        mine = (ids >= 0) & (ids < experts)
        rank = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, BLOCK, CHUNK):
            other = pid * BLOCK + start + tl.arange(0, CHUNK)
            other_id = tl.load(ids_ptr + other, mask=other < rows, other=-1).to(tl.int32)
            earlier = (ids[:, None] == other_id[None, :]) & (other[None, :] < row[:, None])
            rank += tl.sum(earlier.to(tl.int32), 1)
        # Each row's expert begins where the ones before it end.
        begin = tl.gather(tl.cumsum(totals, 0) - totals, tl.where(mine, ids, 0), 0)
        before = tl.load(before_ptr + pid * experts + ids, mask=mine, other=0)
        position = begin + before + rank
        weight = tl.load(weights_ptr + row, mask=mine, other=0).to(tl.float32)
        tl.store(token_ptr + position, row // TOP_K, mask=mine)
        tl.store(weight_ptr + position, weight, mask=mine)
        tl.store(inverse_ptr + row, tl.where(mine, position, -1), mask=row < rows)
    else:
        expert = pid - blocks
        tiles = (totals + TILE - 1) // TILE
        first = tl.sum(tl.where(bin_ < expert, tiles, 0), 0)
        start = tl.sum(tl.where(bin_ < expert, totals, 0), 0)
        owned = tl.sum(tl.where(bin_ == expert, tiles, 0), 0)
        size = tl.sum(tl.where(bin_ == expert, totals, 0), 0)
        # Here, not with the rows: without a single row there are ends, too.
        tl.store(ends_ptr + expert, start + size)
        for tile in range(owned):
            tl.store(tile_expert_ptr + first + tile, expert)
            tl.store(tile_row_ptr + first + tile, start + tile * TILE)
            tl.store(tile_left_ptr + first + tile, size - tile * TILE)
        if expert == experts - 1:
            tl.store(tiles_ptr, first + owned)
            if first + owned == 0:  # no row at all: a place that may be read, though not used
                tl.store(tile_expert_ptr, 0)
                tl.store(tile_row_ptr, 0)
                tl.store(tile_left_ptr, 1)
                if rows > 0:
                    tl.store(token_ptr, 0)


_start_count, _start_scan, _start_place = (Launcher(k) for k in (_count, _scan, _place))
