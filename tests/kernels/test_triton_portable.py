"""The plain Triton products: a layer made of them against its meaning, and what they compile to."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from moesaic.kernels import reference
from moesaic.kernels.triton import portable
from moesaic.kernels.triton.combine import combine, weight_gradient
from moesaic.kernels.triton.metadata import route
from tests.kernels.compiled import compile_for_hopper
from tests.kernels.conftest import INTERPRETED

compiled = pytest.mark.skipif(INTERPRETED, reason="compiles, so does not interpret")
PARTS = ("out", "dx", "d_gate_up", "d_down", "d_weights")
CPU = pytest.param("cpu", torch.float32, marks=pytest.mark.interpreted)
GPUS = [
    pytest.param("cuda", dtype, marks=pytest.mark.gpu, id=f"cuda-{str(dtype)[6:]}")
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
]
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def _problem(tokens, hidden, width, experts, top_k, *, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(tokens, hidden, generator=g)
    gate_up_EJD = torch.randn(experts, 2 * width, hidden, generator=g) / hidden**0.5
    down_EDI = torch.randn(experts, hidden, width, generator=g) / width**0.5
    ids_TK = torch.rand(tokens, experts, generator=g).topk(top_k, 1).indices
    weights_TK = torch.rand(tokens, top_k, generator=g)
    grad_TD = torch.randn(tokens, hidden, generator=g)
    return (
        *(t.to(dtype) for t in (x_TD, gate_up_EJD, down_EDI)),
        ids_TK,
        weights_TK,
        grad_TD.to(dtype),
    )


def _exact(x_TD, gate_up_EJD, down_EDI, ids_TK, weights_TK, grad_TD, activation):
    """Output and gradients of the meaning, in float32; ids outside are pairs of weight zero."""
    inside_TK = (ids_TK >= 0) & (ids_TK < len(down_EDI))
    inputs = [t.float().requires_grad_() for t in (x_TD, gate_up_EJD, down_EDI, weights_TK)]
    x, gate_up, down, weights = inputs
    out_TD = reference.experts(
        x, gate_up, down, ids_TK * inside_TK, weights * inside_TK, activation=activation
    )
    return out_TD.detach(), *torch.autograd.grad(out_TD, inputs, grad_TD.float())


def _layer(problem, *, tile_rows=16, activation="silu", device="cpu"):
    """Output and gradients by the products, on sorted rows."""
    x_TD, gate_up_EJD, down_EDI, ids_TK, weights_TK, grad_TD = (t.to(device) for t in problem)
    routing = route(ids_TK, weights_TK, experts=len(down_EDI), tile_rows=tile_rows)
    weights_TK, like_TD = weights_TK.contiguous(), grad_TD.contiguous()
    inverse_N, act = routing.inverse_N, {"activation": activation}
    a_NI, h_NJ = portable.up(x_TD, gate_up_EJD, routing, keep_h=True, **act)
    y_ND = portable.rows(a_NI, down_EDI, routing, transposed=True)
    out_TD = combine(y_ND, inverse_N, torch.empty_like(like_TD), weights_TK=weights_TK)
    dh_NJ, wa_NI, partial = portable.activation_gradient(grad_TD, down_EDI, h_NJ, routing, **act)
    dx_ND = portable.rows(dh_NJ, gate_up_EJD, routing, transposed=False)
    results = (
        out_TD,
        combine(dx_ND, inverse_N, torch.empty_like(like_TD)),
        portable.outer(x_TD, dh_NJ, routing, transposed=True),
        portable.outer(grad_TD, wa_NI, routing),
        weight_gradient(partial, inverse_N, torch.empty_like(weights_TK)),
    )
    return dict(zip(PARTS, results, strict=True))


def _assert_close(results, exact, tolerance):
    for (part, result), value in zip(results.items(), exact, strict=True):
        assert result.shape == value.shape, part
        error = (result.cpu().float() - value).norm() / value.norm().clamp(min=1e-9)
        assert error <= tolerance, (part, float(error))


CASES = {  # sizes (T, D, I, E, K), tile rows, activation
    "no tokens": ((0, 16, 8, 3, 2), 16, "silu"),
    "one token, odd widths, K = E": ((1, 33, 13, 4, 4), 16, "gelu"),
    "63 tokens, several tiles an expert": ((63, 40, 24, 5, 2), 16, "silu"),
    "width 688": ((20, 72, 688, 2, 1), 32, "gelu_tanh"),
    "tiles of 128 rows": ((70, 80, 48, 3, 2), 128, "silu"),
    "tiles of 256 rows": ((40, 48, 80, 2, 1), 256, "silu"),
}


@pytest.mark.parametrize(("device", "dtype"), [CPU, *GPUS])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, device, dtype):
    sizes, tile_rows, activation = CASES[case]
    problem = _problem(*sizes, dtype=dtype)
    results = _layer(problem, tile_rows=tile_rows, activation=activation, device=device)
    # One token's d_weights are few products that may cancel.
    tolerance = TOLERANCE[dtype] * (4 if sizes[0] == 1 else 1)
    _assert_close(results, _exact(*problem, activation), tolerance)
    assert all(value.dtype == dtype for part, value in results.items() if part != "d_weights")


@pytest.mark.parametrize(("device", "dtype"), [CPU, *GPUS])
@pytest.mark.parametrize("routing", ["one-expert", "outside", "all-outside"])
def test_uneven_routing(routing, device, dtype):
    problem = list(_problem(37, 40, 24, 5, 2, dtype=dtype))
    ids_TK = problem[3]
    if routing == "one-expert":
        ids_TK[:] = 3
    elif routing == "outside":  # expert 0 left without rows, too
        ids_TK[ids_TK == 0] = 5
        ids_TK[::4, 1] = -1
    else:
        ids_TK[:] = 5
    results = _layer(problem, device=device)
    _assert_close(results, _exact(*problem, "silu"), TOLERANCE[dtype])
    idle = torch.bincount(ids_TK[(ids_TK >= 0) & (ids_TK < 5)], minlength=5) == 0
    for part in ("d_gate_up", "d_down"):
        assert (results[part].cpu()[idle] == 0).all()


@pytest.mark.parametrize(("device", "dtype"), [CPU, *GPUS])
def test_any_strides(device, dtype):
    problem = _problem(21, 40, 24, 3, 2, dtype=dtype)
    exact = _exact(*problem, "silu")
    scattered = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in problem]
    assert not any(t.is_contiguous() for t in scattered)
    _assert_close(_layer(scattered, device=device), exact, TOLERANCE[dtype])


@pytest.mark.parametrize(("device", "dtype"), [CPU, *GPUS])
def test_an_expert_that_overflows_spoils_only_itself(device, dtype):
    x_TD, gate_up_EJD, down_EDI, ids_TK, weights_TK, grad_TD = _problem(
        21, 40, 24, 3, 1, dtype=dtype
    )
    problem = (x_TD, gate_up_EJD, down_EDI, ids_TK, weights_TK, grad_TD)
    _, _, exact_gate_up, exact_down, _ = _exact(*problem, "silu")
    down_EDI = down_EDI.clone()
    down_EDI[1] = torch.inf
    gate_up_EJD = gate_up_EJD.clone()
    gate_up_EJD[1] = torch.nan
    results = _layer((x_TD, gate_up_EJD, down_EDI, ids_TK, weights_TK, grad_TD), device=device)
    assert not results["d_gate_up"][1].isfinite().any()
    for part, exact in (("d_gate_up", exact_gate_up), ("d_down", exact_down)):
        difference = results[part].cpu().float()[[0, 2]] - exact[[0, 2]]
        assert difference.norm() <= TOLERANCE[dtype] * exact.norm()


@pytest.mark.interpreted
def test_h_is_left_out_on_request():
    x_TD, gate_up_EJD, _, ids_TK, weights_TK, _ = _problem(9, 16, 8, 3, 2)
    routing = route(ids_TK, weights_TK, experts=3, tile_rows=16)
    a_NI, h_NJ = portable.up(x_TD, gate_up_EJD, routing, keep_h=True)
    alone_NI, none = portable.up(x_TD, gate_up_EJD, routing, keep_h=False)
    assert none is None
    assert torch.equal(a_NI, alone_NI)
    gate_NI, up_NI = h_NJ.chunk(2, 1)
    torch.testing.assert_close(a_NI, torch.nn.functional.silu(gate_NI) * up_NI)


@pytest.mark.gpu
def test_two_runs_give_the_same_bits():
    problem = _problem(777, 512, 688, 16, 4, dtype=torch.bfloat16)
    first, second = (_layer(problem, tile_rows=64, device="cuda") for _ in range(2))
    assert all(torch.equal(first[part], second[part]) for part in PARTS)


PLACES = dict.fromkeys(["tile_expert_ptr", "tile_row_ptr", "tile_left_ptr", "tiles_ptr"], "i32")
UP = dict.fromkeys(["x_ptr", "w_ptr", "h_ptr", "out_ptr"], "bf16") | {"token_ptr": "i32"} | PLACES
ROWS = dict.fromkeys(["a_ptr", "w_ptr", "out_ptr"], "bf16") | PLACES
GRADIENT = dict.fromkeys(["grad_ptr", "w_ptr", "h_ptr", "dh_ptr", "wa_ptr"], "bf16") | {
    "token_ptr": "i32", "weight_ptr": "fp32", "partial_ptr": "fp32"
} | PLACES  # fmt: skip
OUTER = dict.fromkeys(["left_ptr", "right_ptr", "out_ptr"], "bf16") | {
    "token_ptr": "i32", "ends_ptr": "i32"
}  # fmt: skip
ACTIVATED = {"ACTIVATION": "silu", "GROUP": 8}
KERNELS = {  # pointers, constants, most columns, stages more than the tile's
    "_up": (UP, ACTIVATED | {"w_stride_d": 1}, 1536, 0),
    "_rows": (ROWS, {"w_stride_n": 1, "GROUP": 8}, 2048, 0),
    "_rows transposed": (ROWS, {"w_stride_k": 1, "GROUP": 8}, 2048, 0),
    "_activation_gradient": (GRADIENT, ACTIVATED | {"w_stride_i": 1}, 128, 0),
    "_outer": (OUTER, {"LEFT": True, "GROUP": 8}, 2048, 1),
    "_outer transposed": (OUTER, {"LEFT": False, "GROUP": 8}, 2048, 1),
}


@compiled
@pytest.mark.parametrize(
    ("name", "tile_rows"),
    [(n, r) for n in KERNELS for r in (16, 64, 128) if r == 128 or "outer" not in n],
)
def test_compiles_for_hopper_without_spills(name, tile_rows, tmp_path):
    pointers, constants, columns, more = KERNELS[name]
    shared = 227 * 1024
    tile = portable.tile_for(tile_rows, columns, 2048, itemsize=2, shared=shared)
    result = compile_for_hopper(
        getattr(portable, name.split()[0]), tmp_path, pointers=pointers,
        warps=tile.warps, stages=tile.stages + more,
        BM=tile_rows, BN=tile.columns, BK=tile.depth, **constants,
    )  # fmt: skip
    assert result.spilled == 0
    assert result.shared <= shared
    assert result.count("cp.async.cg") > 0  # loads run ahead of the products
    assert (result.count("wgmma.mma_async") > 0) == (tile_rows >= 64)
    assert "atom." not in result.ptx


@compiled
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("tile_rows", [64, 128, 256])
@pytest.mark.parametrize("name", ["_up", "_activation_gradient"])
def test_activations_leave_no_spills_in_the_tile_that_is_launched(
    name, tile_rows, activation, tmp_path, monkeypatch
):
    tiles, shared = [], 227 * 1024
    monkeypatch.setattr(portable, "_shared", lambda device: shared)
    monkeypatch.setattr(portable, "_launch", lambda *given, **sizes: tiles.append(given[3]))
    x_TD, gate_up_EJD, down_EDI, *_ = _problem(40, 256, 688, 1, 1, dtype=torch.bfloat16)
    none_N = torch.zeros(40, dtype=torch.int32)
    empty = dict.fromkeys(["tile_expert", "tile_row", "tile_left", "tiles"], none_N)
    routing = SimpleNamespace(
        token_N=none_N, weight_N=none_N, tile_rows=tile_rows, most_tiles=1, **empty
    )
    if name == "_up":
        portable.up(x_TD, gate_up_EJD, routing, activation=activation)
    else:
        h_NJ = x_TD.new_empty(40, 2 * 688)
        portable.activation_gradient(x_TD, down_EDI, h_NJ, routing, activation=activation)
    (tile,) = tiles
    pointers, constants, *_ = KERNELS[name]
    result = compile_for_hopper(
        getattr(portable, name), tmp_path, pointers=pointers, warps=tile.warps, stages=tile.stages,
        BM=tile_rows, BN=tile.columns, BK=tile.depth, **constants | {"ACTIVATION": activation},
    )  # fmt: skip
    assert result.spilled == 0
    assert result.shared <= shared
