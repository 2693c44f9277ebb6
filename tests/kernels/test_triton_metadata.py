"""Routing metadata and the two combining kernels, against a sort and plain sums."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from moesaic.kernels.triton import combine, metadata
from tests.kernels.compiled import compile_for_hopper
from tests.kernels.conftest import INTERPRETED

compiled = pytest.mark.skipif(INTERPRETED, reason="compiles, so does not interpret")
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.interpreted),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
CASES = {  # tokens, experts, top_k, tile_rows, ids outside
    "no tokens": (0, 3, 2, 16, False),
    "one token": (1, 4, 2, 128, False),
    "several blocks, rows of nobody": (300, 7, 3, 128, True),
    "K = E": (63, 8, 8, 64, False),
    "top-1": (257, 3, 1, 16, False),
    "many experts, most of them idle": (9, 70, 2, 16, True),
}


def _ids(tokens: int, experts: int, top_k: int, outside: bool) -> torch.Tensor:
    g = torch.Generator().manual_seed(tokens)
    ids_TK = torch.rand(tokens, experts, generator=g).topk(top_k, 1).indices
    if outside:
        ids_TK[5:9, 1] = experts
        ids_TK[2:4, 0] = -1
    return ids_TK


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_rows_lie_as_a_stable_sort_lays_them(case, device):
    tokens, experts, top_k, tile_rows, outside = CASES[case]
    ids_TK = _ids(tokens, experts, top_k, outside)
    weights_TK = torch.rand(tokens, top_k)
    routing = metadata.route(
        ids_TK.to(device), weights_TK.to(device), experts=experts, tile_rows=tile_rows
    )
    flat = ids_TK.flatten()
    order = torch.argsort(flat, stable=True)
    order = order[(flat[order] >= 0) & (flat[order] < experts)]
    count = torch.bincount(flat[order], minlength=experts)

    inverse = routing.inverse_N.cpu()
    assert torch.equal(inverse[order], torch.arange(len(order), dtype=torch.int32))
    assert (inverse[(flat < 0) | (flat >= experts)] == -1).all()
    assert torch.equal(routing.token_N.cpu()[: len(order)], (order // top_k).int())
    assert torch.equal(routing.weight_N.cpu()[: len(order)], weights_TK.flatten()[order])
    assert torch.equal(routing.ends_E.cpu(), count.cumsum(0).int())
    by_size = torch.argsort(count, descending=True, stable=True)
    ends = count.cumsum(0)[by_size]
    expected_sizes = torch.stack([ends - count[by_size], ends, by_size]).int()
    assert torch.equal(routing.by_size.cpu().view(3, experts), expected_sizes)
    assert not routing.tickets.any()

    expected = [
        (expert, int(end - size) + start, int(size) - start)
        for expert, (size, end) in enumerate(zip(count, count.cumsum(0), strict=True))
        for start in range(0, int(size), tile_rows)
    ]
    tiles = int(routing.tiles)
    assert tiles == len(expected) <= routing.most_tiles
    places = (routing.tile_expert, routing.tile_row, routing.tile_left)
    assert list(zip(*(p[:tiles].tolist() for p in places), strict=True)) == expected


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("case", "weighted"), [*((c, True) for c in CASES), ("K = E", False)])
def test_rows_of_a_token_come_together(case, weighted, device):
    tokens, experts, top_k, tile_rows, outside = CASES[case]
    ids_TK = _ids(tokens, experts, top_k, outside)
    g = torch.Generator().manual_seed(1)
    weights_TK = torch.rand(tokens, top_k, generator=g)
    routing = metadata.route(
        ids_TK.to(device), weights_TK.to(device), experts=experts, tile_rows=tile_rows
    )
    y_ND = torch.randn(tokens * top_k, 40, generator=g)
    partial_NP = torch.randn(tokens * top_k, 3, generator=g)
    inside_TK = (ids_TK >= 0) & (ids_TK < experts)
    row_TK = routing.inverse_N.cpu().view(tokens, top_k).long().clamp(min=0)
    scale_TK = inside_TK * (weights_TK if weighted else 1)
    # Rows of nobody are never written: whatever lies there must not count.
    nobody = torch.ones(tokens * top_k, dtype=torch.bool)
    nobody[row_TK[inside_TK]] = False
    exact = (scale_TK[:, :, None] * y_ND[row_TK]).sum(1)
    exact_parts = partial_NP.sum(1)[row_TK] * inside_TK
    y_ND[nobody], partial_NP[nobody] = torch.nan, torch.nan

    out_TD = combine.combine(
        y_ND.to(device),
        routing.inverse_N,
        torch.empty(tokens, 40, device=device),
        weights_TK=weights_TK.to(device) if weighted else None,
    )
    torch.testing.assert_close(out_TD.cpu(), exact, rtol=1e-5, atol=1e-5)
    out_TK = combine.weight_gradient(
        partial_NP.to(device), routing.inverse_N, torch.empty(tokens, top_k, device=device)
    )
    torch.testing.assert_close(out_TK.cpu(), exact_parts, rtol=1e-5, atol=1e-5)


SIZES = {"BINS": 256, "BLOCK": metadata.BLOCK}
KERNELS = {
    "_count": ({"ids_ptr": "i64", "counts_ptr": "i32"}, SIZES),
    "_scan": ({"counts_ptr": "i32", "totals_ptr": "i32"}, {"SCAN": 1024}),
    "_place": (
        {"ids_ptr": "i64", "weights_ptr": "fp32", "weight_ptr": "fp32"}
        | dict.fromkeys(["before_ptr", "totals_ptr", "token_ptr", "inverse_ptr"], "i32")
        | dict.fromkeys(["ends_ptr", "tile_expert_ptr", "tile_row_ptr"], "i32")
        | dict.fromkeys(["tile_left_ptr", "tiles_ptr", "by_size_ptr", "tickets_ptr"], "i32"),
        SIZES | {"TOP_K": 8, "TILE": 128},
    ),
    "_combine": (
        {"y_ptr": "bf16", "inverse_ptr": "i32", "weights_ptr": "fp32", "out_ptr": "bf16"},
        {"TOP_K": 8, "BLOCK": 1024, "WEIGHTED": True},
    ),
    "_weight_gradient": (
        {"partial_ptr": "fp32", "inverse_ptr": "i32", "out_ptr": "fp32"},
        {"PARTS": 8, "BLOCK": 64},
    ),
}


@compiled
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_for_hopper_without_spills(name, tmp_path):
    pointers, constants = KERNELS[name]
    kernel = getattr(metadata, name, None) or getattr(combine, name)
    result = compile_for_hopper(kernel, tmp_path, pointers=pointers, warps=4, stages=3, **constants)
    assert result.spilled == 0
    assert result.count("atom.global.add.f32") == 0
