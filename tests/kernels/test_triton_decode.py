"""Decoding: the layer for a few tokens against its meaning, and what its kernels compile to."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from moesaic.kernels import reference
from moesaic.kernels.triton import decode
from tests.kernels.compiled import compile_for_hopper
from tests.kernels.conftest import INTERPRETED

compiled = pytest.mark.skipif(INTERPRETED, reason="compiles, so does not interpret")
CPU = pytest.param("cpu", torch.float32, marks=pytest.mark.interpreted)
GPUS = [
    pytest.param("cuda", dtype, marks=pytest.mark.gpu, id=f"cuda-{str(dtype)[6:]}")
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
]
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def _problem(tokens, hidden, width, experts, top_k, *, dtype=torch.float32):
    g = torch.Generator().manual_seed(tokens + experts)
    x_TD = torch.randn(tokens, hidden, generator=g)
    gate_up_EJD = torch.randn(experts, 2 * width, hidden, generator=g) / hidden**0.5
    down_EDI = torch.randn(experts, hidden, width, generator=g) / width**0.5
    ids_TK = torch.rand(tokens, experts, generator=g).topk(top_k, 1).indices
    weights_TK = torch.rand(tokens, top_k, generator=g)
    return [*(t.to(dtype) for t in (x_TD, gate_up_EJD, down_EDI)), ids_TK, weights_TK]


def _assert_close(problem, device, *, activation="silu", config=None):
    """Compare with the meaning in float32, where ids outside are pairs of weight zero."""
    x_TD, gate_up_EJD, down_EDI, ids_TK, weights_TK = problem
    inside_TK = (ids_TK >= 0) & (ids_TK < len(down_EDI))
    wide = (t.float() for t in (x_TD, gate_up_EJD, down_EDI))
    exact_TD = reference.experts(
        *wide, ids_TK * inside_TK, weights_TK * inside_TK, activation=activation
    )
    out_TD = decode.decode(*(t.to(device) for t in problem), activation=activation, config=config)
    assert (out_TD.dtype, out_TD.shape) == (x_TD.dtype, exact_TD.shape)
    error = (out_TD.cpu().float() - exact_TD).norm() / exact_TD.norm().clamp(min=1e-9)
    assert error <= TOLERANCE[x_TD.dtype], float(error)
    return out_TD


CASES = {  # T, D, I, E, K, activation
    "no tokens": (0, 16, 8, 3, 2, "silu"),
    "one token": (1, 40, 24, 5, 2, "silu"),
    "one token, odd widths, K = E": (1, 33, 13, 4, 4, "gelu"),
    "width 688": (1, 16, 688, 5, 1, "gelu_tanh"),
    "more experts than pairs, some shared": (5, 40, 24, 20, 3, "silu"),
    "as many experts as pairs": (4, 40, 24, 8, 2, "silu"),
    "63 tokens": (63, 40, 24, 4, 3, "silu"),
    "512 pairs": (64, 16, 8, 12, 8, "silu"),
}


@pytest.mark.parametrize(("device", "dtype"), [CPU, *GPUS])
@pytest.mark.parametrize("case", CASES)
def test_values(case, device, dtype):
    *sizes, activation = CASES[case]
    _assert_close(_problem(*sizes, dtype=dtype), device, activation=activation)


@pytest.mark.parametrize(("device", "dtype"), [CPU, *GPUS])
@pytest.mark.parametrize("experts", [4, 40])
@pytest.mark.parametrize("routing", ["one-expert", "twice", "outside", "all-outside"])
def test_uneven_routing(routing, experts, device, dtype):
    tokens = 17 if routing == "one-expert" else 6
    problem = _problem(tokens, 16, 8, experts, 2, dtype=dtype)
    ids_TK = problem[3]
    if routing == "one-expert":  # more rows than one tile holds
        ids_TK[:] = 3
    elif routing == "twice":  # a token may name an expert twice
        ids_TK[::2, 1] = ids_TK[::2, 0]
    elif routing == "outside":
        ids_TK[::3, 0] = experts
        ids_TK[1::4, 1] = -1
        ids_TK[2] = experts
    else:
        ids_TK[:] = experts
    out_TD = _assert_close(problem, device)
    outside_T = ((ids_TK < 0) | (ids_TK >= experts)).all(1)
    assert (out_TD.cpu()[outside_T] == 0).all()


@pytest.mark.parametrize(("device", "dtype"), [CPU, *GPUS])
def test_any_strides_and_int32_ids(device, dtype):
    problem = _problem(9, 40, 24, 5, 2, dtype=dtype)
    scattered = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in problem]
    scattered[3] = scattered[3].to(torch.int32)
    assert not any(t.is_contiguous() for t in scattered)
    _assert_close(scattered, device)


@pytest.mark.parametrize(("device", "dtype"), [CPU, *GPUS])
@pytest.mark.parametrize("tokens", [1, 9])
def test_every_config(tokens, device, dtype):
    problem = _problem(tokens, 70, 12, 2, 2, dtype=dtype)
    # On the CPU the configs of bfloat16, too: a cut is no matter of dtype.
    for itemsize in {2, dtype.itemsize} if device == "cpu" else {dtype.itemsize}:
        sizes = {"tokens": tokens, "hidden": 70, "width": 12, "experts": 2, "top_k": 2}
        for config in decode.configs(**sizes, itemsize=itemsize).values():
            _assert_close(problem, device, config=config)


def test_configs_suit_the_size():
    def columns(**sizes):
        chosen = decode.configs(**{"width": 768, "hidden": 2048} | sizes)["chosen"]
        return chosen.up.columns, chosen.down.columns, chosen.tile_rows

    few = columns(tokens=1, experts=128, top_k=2)
    many = columns(tokens=64, experts=128, top_k=8)
    assert few[0] < many[0]
    assert few[1] < many[1]
    assert few[2] == many[2] == 16  # four rows an expert
    assert columns(tokens=64, experts=8, top_k=2)[2] == 32  # sixteen
    assert columns(tokens=64, experts=4, top_k=4)[2] == 64


def test_too_many_pairs_are_refused():
    problem = _problem(65, 16, 8, 8, 8)
    with pytest.raises(ValueError, match="at most 512 pairs of a token and an expert, not 520"):
        decode.decode(*problem, activation="silu")


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [False, True])
def test_a_graph_follows_its_inputs(overlap):
    problem = [t.cuda() for t in _problem(8, 1024, 640, 16, 2, dtype=torch.bfloat16)]
    config = decode.configs(tokens=8, hidden=1024, width=640, experts=16, top_k=2)["chosen"]
    config = decode.Config(config.up, config.down, config.tile_rows, overlap=overlap)
    decode.decode(*problem, activation="silu", config=config)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_TD = decode.decode(*problem, activation="silu", config=config)
    for seed in range(3):
        torch.manual_seed(seed)
        problem[0].normal_()
        problem[3].copy_(torch.rand(8, 16, device="cuda").topk(2, 1).indices)
        graph.replay()
        again_TD = decode.decode(*problem, activation="silu", config=config)
        assert torch.equal(out_TD, again_TD)
        _assert_close([t.cpu() for t in problem], "cuda", config=config)


UP = {"x_ptr": "bf16", "w_ptr": "bf16", "a_ptr": "bf16", "ids_ptr": "i64"}
DOWN = {"a_ptr": "bf16", "w_ptr": "bf16", "y_ptr": "fp32", "ids_ptr": "i64"}


@compiled
@pytest.mark.parametrize(("experts", "overlap"), [(128, True), (8, False)])
@pytest.mark.parametrize("product", ["up", "down"])
def test_compiles_for_hopper_without_spills(product, experts, overlap, tmp_path):
    configs = decode.configs(tokens=64, hidden=2048, width=768, experts=experts, top_k=8)
    del configs["chosen"]  # one of the others
    for config in configs.values():
        cut = getattr(config, product)
        constants = (
            {"ACTIVATION": "silu", "w_stride_d": 1} if product == "up" else {"w_stride_i": 1}
        )
        result = compile_for_hopper(
            getattr(decode, f"_{product}"), tmp_path, pointers=UP if product == "up" else DOWN,
            warps=cut.warps, stages=cut.stages, BN=cut.columns, BK=cut.depth, BM=config.tile_rows,
            BY_EXPERT=True, PAIRS=512, OVERLAP=overlap, **constants,
        )  # fmt: skip
        assert result.spilled == 0
        assert result.count("cp.async.cg") > 0  # weights run ahead of the products
        assert result.shared <= 227 * 1024 // 2  # two programs on a processor
        assert result.registers <= 65536 // (2 * 32 * cut.warps)
        assert (result.count("griddepcontrol.wait") > 0) == (overlap and product == "down")
        assert (result.count("wgmma.mma_async") > 0) == (config.tile_rows >= 64)
        assert "atom." not in result.ptx


@compiled
def test_the_weighted_sum_compiles(tmp_path):
    pointers = {"y_ptr": "fp32", "ids_ptr": "i64", "weights_ptr": "fp32", "out_ptr": "bf16"}
    result = compile_for_hopper(
        decode._weigh, tmp_path, pointers=pointers, warps=2, stages=3,
        TOP_K=8, BLOCK=256, OVERLAP=True,
    )  # fmt: skip
    assert result.spilled == 0
    assert result.count("griddepcontrol.wait") == 1
