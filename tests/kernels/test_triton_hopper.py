"""The Hopper kernels: compiled ahead of time without a GPU; right and repeatable on one."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from moesaic.kernels import reference

triton = pytest.importorskip("triton")

BF16, I32, F32 = "*bf16", "*i32", "*fp32"
ROWS = {  # name: epilogue, gathered, weights K-major, ring stages, h brought by a loader
    "up": ("swiglu", True, True, 4, False),
    "down": ("plain", False, True, 3, False),
    "dx": ("plain", False, False, 3, False),
    "activation_gradient": ("dact", True, False, 3, False),
    "activation_gradient, loader": ("dact", True, False, 3, True),
    "activation_gradient, rows in order": ("dact", False, False, 3, False),
}
WARPS = ("PRODUCER_WARPS", "CONSUMER_REGS", "OTHER_REGS", "FINISHER_WARPS", "LOADER")


def _compile(kernel, given, constants, *, sixteen=True):
    """Compile for an H100; `sixteen`: whether sizes are multiples of sixteen, or of eight only."""
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    signature = {n: "constexpr" if n in constants else given[n] for n in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name in given and (given[name].startswith("*") or (sixteen and given[name] == "i32"))
    }
    source = GluonASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


def _descriptor(*block):
    from moesaic.kernels.triton.products import _SWIZZLED

    return f"tensordesc<bf16[{', '.join(map(str, block))}],{_SWIZZLED!r}>"


def _stack(compiled, tmp_path: Path) -> int:
    """Bytes of registers kept in memory, as the disassembler of Triton's own toolkit says."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True).stdout
    return int(re.search(r"STACK:(\d+)", text).group(1))


def _first_barrier(ptx: str) -> int:
    """Where in shared memory the first barrier lies: behind all tiles, or it shares their place.

    It would if nothing waited for it; a GPU that interrupted the kernel then put 32 bytes of
    barriers into its result.
    """
    names = re.findall(r"mbarrier\.init\.shared\S* \[(%r\d+)\]", ptx)
    places = [re.search(rf"add\.s32\s+{name}, %r\d+, (\d+);", ptx) for name in names]
    return min(int(place.group(1)) for place in places)


@pytest.mark.parametrize("sixteen", [True, False])
@pytest.mark.parametrize(
    ("name", "activation"),
    [*((name, "silu") for name in ROWS), ("up", "gelu_tanh"), ("activation_gradient", "gelu_tanh")],
)
def test_products_along_rows_compile_for_hopper(name, activation, sixteen, tmp_path):
    from moesaic.kernels.triton.hopper_rows import rows_kernel
    from moesaic.kernels.triton.products import _warps

    epilogue, gather, k_major, stages, loader = ROWS[name]
    found = _warps(gather=gather, finish=epilogue == "dact", loader=loader)
    warps = dict(zip(WARPS, found, strict=True))
    width = 128 if epilogue == "swiglu" else 256
    given = {
        "a_desc": _descriptor(128, 64),
        "b_desc": _descriptor(width, 64) if k_major else _descriptor(64, width),
        **dict.fromkeys(("out_desc", "out2_desc", "out3_desc"), _descriptor(64, 64)),
        "h_desc": _descriptor(32, 64),
        **dict.fromkeys(("a_ptr", "out_ptr", "out2_ptr", "out3_ptr"), BF16),
        **dict.fromkeys(("token_ptr", "tile_expert_ptr", "tile_row_ptr"), I32),
        **dict.fromkeys(("tile_left_ptr", "count_ptr"), I32),
        **dict.fromkeys(("weight_ptr", "partial_ptr"), F32),
        **dict.fromkeys(("N", "K", "b_rows", "second", "out_stride", "out3_stride"), "i32"),
        "group_m": "i32",
    }
    constants = {
        "EPILOGUE": epilogue, "GATHER": gather, "EVEN_K": sixteen, "B_KMAJOR": k_major,
        "KEEP_H": True, "BN": 256, "BK": 64, "STAGES": stages,
        "BUFFERS": 2 if epilogue == "swiglu" else 4, "ACTIVATION": activation, **warps,
    }  # fmt: skip
    if epilogue == "plain":
        absent = ("out2_desc", "out2_ptr", "out3_desc", "out3_ptr")
    else:
        absent = ("out_desc", "out2_desc", "out3_desc") if epilogue == "dact" else ()
    if gather:
        absent += ("a_desc",)
    if epilogue != "dact":
        absent += ("h_desc", "weight_ptr", "partial_ptr")
    compiled = _compile(rows_kernel, given, constants | dict.fromkeys(absent), sixteen=sixteen)
    ptx = compiled.asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert "cp.async.bulk.tensor" in ptx
    assert ("cp.async.cg" in ptx) == gather
    assert compiled.metadata.shared <= 227 * 1024
    tiles = 2 * 64 * ((128 + 256) * stages + 2 * 64 * constants["BUFFERS"])
    assert _first_barrier(ptx) >= tiles + (4 * 32 * 64 * 2 if epilogue == "dact" else 0)
    assert _stack(compiled, tmp_path) == 0


@pytest.mark.parametrize("sixteen", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
def test_weight_gradients_compile_for_hopper(transposed, sixteen, tmp_path):
    from moesaic.kernels.triton.hopper_outer import outer_kernel
    from moesaic.kernels.triton.products import _warps

    warps = dict(zip(WARPS[:3], _warps(gather=True)[:3], strict=True))
    given = {
        "b_desc": _descriptor(64, 256),
        "out_desc": _descriptor(64, 64), "a_ptr": BF16, "out_ptr": BF16, "token_ptr": I32,
        **dict.fromkeys(("by_size_ptr", "tickets_ptr"), I32),
        **dict.fromkeys(("experts", "M", "N", "group_m"), "i32"),
    }  # fmt: skip
    constants = {
        "EVEN_M": sixteen, "TRANSPOSED": transposed, "BM": 128, "BN": 256, "BK": 64, "STAGES": 3,
        "BUFFERS": 4, **warps,
    }  # fmt: skip
    compiled = _compile(outer_kernel, given, constants, sixteen=sixteen)
    ptx = compiled.asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert "cp.async.cg" in ptx
    assert _first_barrier(ptx) >= 2 * 64 * ((128 + 256) * 3 + 2 * 64 * 4)
    assert _stack(compiled, tmp_path) == 0


def test_choices_among_other_candidates_are_not_read(tmp_path, monkeypatch):
    from moesaic.kernels.triton import tune

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    name = tune._file.__wrapped__
    before = name(0)
    assert name(0) == before
    more = (*tune.CANDIDATES["down"], tune.CANDIDATES["up"][0])
    monkeypatch.setitem(tune.CANDIDATES, "down", more)
    assert name(0) != before
    assert name(0).parent == before.parent == tmp_path / "moesaic"


def test_a_launch_that_is_no_candidate_is_forgotten(tmp_path):
    from moesaic.kernels.triton import tune

    known = dict(zip(tune.CANDIDATES, (c[-1] for c in tune.CANDIDATES.values()), strict=True))
    rows = {f"{name} bfloat16 64x64x8 rows<=64": asdict(launch) for name, launch in known.items()}
    old = {"activation_gradient float16 1": {"width": 256, "stages": 4}, "gone bfloat16 1": {}}
    path = tmp_path / "launches.json"
    path.write_text(json.dumps(rows | old))
    assert tune._read(path) == dict(zip(rows, known.values(), strict=True))


# ---- on a GPU ----


def _problem(tokens, hidden, width, experts, top_k, *, seed=0, sentinels=False, routing="uniform"):
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, device="cuda", generator=generator)

    score = torch.rand(tokens, experts, device="cuda", generator=generator)
    if routing == "zipf":
        score = score.clamp_min(1e-9).log() * torch.arange(1, experts + 1, device="cuda")
    if routing == "one":  # all tokens choose the first experts, the last ones get none
        score = torch.arange(experts, 0, -1, device="cuda").float().expand(tokens, experts)
    ids = score.topk(top_k, dim=1).indices
    if sentinels:
        ids[::3, 0] = experts
        ids[-1] = experts
    weights = torch.rand(tokens, top_k, device="cuda", generator=generator)
    x = normal(tokens, hidden).bfloat16()
    gate_up = (normal(experts, 2 * width, hidden) / hidden**0.5).bfloat16()
    down = (normal(experts, hidden, width) / width**0.5).bfloat16()
    return [x, gate_up, down, weights], ids, normal(tokens, hidden).bfloat16()


def _both(run, tensors, grad):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = run(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def _exact(tensors, ids, grad, activation="silu"):
    wide = [t.float() for t in tensors]
    mine = (ids < tensors[1].shape[0]).float()

    def run(x, gate_up, down, weights):
        clamped = ids.clamp(max=gate_up.shape[0] - 1)
        return reference.experts(x, gate_up, down, clamped, weights * mine, activation=activation)

    return _both(run, wide, grad)


def _error(found, wanted):
    return ((found.float() - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


def _fused(ids, **how):
    from moesaic.kernels import triton as fused

    return lambda x, gate_up, down, weights: fused.experts(x, gate_up, down, ids, weights, **how)


SHAPES = [(1, 256, 64, 4, 2), (63, 128, 688, 8, 8), (300, 520, 96, 5, 2)]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_odd_sizes(shape):
    tensors, ids, grad = _problem(*shape)
    exact = _exact(tensors, ids, grad)
    found = _both(_fused(ids), tensors, grad)
    assert all(_error(a, b) < 1e-2 for a, b in zip(found, exact, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_values_and_gradients_are_as_exact_as_grouped_mm(activation):
    from torch import nn
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    from moesaic.kernels.contenders import ExpertsModule

    tensors, ids, grad = _problem(2048, 1024, 640, 16, 2)
    acts = {"silu": nn.SiLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh")}

    def stock(x, gate_up, down, weights):
        module = ExpertsModule(gate_up.detach(), down.detach())
        del module.gate_up_proj, module.down_proj
        module.gate_up_proj, module.down_proj = gate_up, down
        module.act_fn = acts[activation]
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, x, ids, weights)

    exact = _exact(tensors, ids, grad, activation)
    ours = _both(_fused(ids, activation=activation), tensors, grad)
    theirs = _both(stock, tensors, grad)
    for name, mine, other, wanted in zip(
        ("out", "dx", "d_gate_up", "d_down", "dw"), ours, theirs, exact, strict=True
    ):
        assert _error(mine, wanted) <= 1.2 * _error(other, wanted), name


@pytest.mark.gpu
@pytest.mark.parametrize("routing", ["uniform", "zipf", "one"])
def test_two_runs_give_the_same_bits(routing):
    tensors, ids, grad = _problem(3000, 512, 704, 8, 2, routing=routing)
    first, second = (_both(_fused(ids), tensors, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    exact = _exact(tensors, ids, grad)
    assert all(_error(a, b) < 1e-2 for a, b in zip(first, exact, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("routing", ["uniform", "zipf", "one"])
def test_weight_gradients_do_not_depend_on_who_draws_a_tile(routing):
    from moesaic.kernels.triton import metadata, products

    (x, _, _, weights), ids, _ = _problem(6000, 1024, 640, 16, 2, routing=routing)
    rows = torch.randn(ids.numel(), 640, device="cuda").bfloat16()
    routed = metadata.route(ids, weights, experts=16, tile_rows=128)
    tickets = routed.tickets.clone()
    launch = products.Launch(256, 3)
    found = [products.outer(x, rows, routed, launch) for _ in range(9)]
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert torch.equal(routed.tickets, tickets)
    ends = [0, *routed.ends_E.tolist()]
    for expert, (begin, end) in enumerate(itertools.pairwise(ends)):
        tokens = routed.token_N[begin:end].long()
        exact = x[tokens].float().T @ rows[begin:end].float()
        assert _error(found[0][expert], exact) < 1e-2


@pytest.mark.gpu
def test_rows_of_other_ranks_add_nothing():
    tensors, ids, grad = _problem(500, 256, 128, 6, 3, sentinels=True)
    found = _both(_fused(ids, sentinels=True), tensors, grad)
    exact = _exact(tensors, ids, grad)
    assert all(_error(a, b) < 1e-2 for a, b in zip(found, exact, strict=True))
    nobody = torch.full_like(ids, 6)
    out = _fused(nobody, sentinels=True)(*tensors)
    assert not out.any()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [16, 64, 128])
def test_every_tile_height_is_right(rows):
    from moesaic.kernels import options

    tensors, ids, grad = _problem(700, 256, 128, 6, 3)
    with options.using(options.Launch(block_m=rows)):
        found = _both(_fused(ids), tensors, grad)
    with options.using(options.Launch(persistent=False)):
        again = _both(_fused(ids), tensors, grad)
    exact = _exact(tensors, ids, grad)
    for result in (found, again):
        assert all(_error(a, b) < 1e-2 for a, b in zip(result, exact, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 8, 64])
def test_decoding_in_a_graph(tokens):
    tensors, ids, _ = _problem(tokens, 1024, 512, 32, 4)
    run = _fused(ids)
    with torch.no_grad():
        expected = run(*tensors)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run(*tensors)
        out.zero_()
        graph.replay()
    assert torch.equal(out, expected)
    wide = [t.float() for t in tensors]
    exact = reference.experts(*wide[:3], ids, wide[3])
    assert _error(expected, exact) < 1e-2


@pytest.mark.gpu
def test_nothing_waits_and_nothing_is_compiled_again():
    from triton import knobs

    first = _problem(4096, 512, 256, 16, 4, seed=1)
    _both(_fused(first[1]), first[0], first[2])
    compiled = []
    knobs.runtime.jit_post_compile_hook = lambda *args, **kwargs: compiled.append(1)
    other = _problem(4096, 512, 256, 16, 4, seed=2, routing="one")
    try:
        torch.cuda.set_sync_debug_mode("error")
        _both(_fused(other[1]), other[0], other[2])
    finally:
        torch.cuda.set_sync_debug_mode("default")
        knobs.runtime.jit_post_compile_hook = None
    assert not compiled


@pytest.mark.gpu
def test_compiled_models_see_one_operator():
    tensors, ids, grad = _problem(1000, 256, 128, 8, 2)
    eager = _both(_fused(ids), tensors, grad)
    compiled = _both(torch.compile(_fused(ids), fullgraph=True), tensors, grad)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


@pytest.mark.gpu
def test_launches_are_remembered(tmp_path, monkeypatch):
    from moesaic.kernels.triton import tune

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tune, "_known", {})
    tune._file.cache_clear()
    tensors, ids, grad = _problem(2048, 256, 128, 8, 2)
    _both(_fused(ids), tensors, grad)
    (file,) = tmp_path.rglob("*.json")
    known = dict(tune._launches(torch.device("cuda", 0)))
    assert len(known) == 6
    monkeypatch.setattr(tune, "_known", {})
    assert tune._launches(torch.device("cuda", 0)) == known
    file.write_text("{not json")
    monkeypatch.setattr(tune, "_known", {})
    assert tune._launches(torch.device("cuda", 0)) == {}
    tune._file.cache_clear()


@pytest.mark.gpu
def test_every_launch_gives_the_same_bits(tmp_path, monkeypatch):
    from moesaic.kernels.triton import tune

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tensors, ids, grad = _problem(700, 576, 704, 6, 3)
    found = []
    for turn in range(max(map(len, tune.CANDIDATES.values()))):
        one = {name: (known[turn % len(known)],) for name, known in tune.CANDIDATES.items()}
        tune._file.cache_clear()
        monkeypatch.setattr(tune, "_known", {})
        monkeypatch.setattr(tune, "CANDIDATES", one)
        found.append(_both(_fused(ids), tensors, grad))
        (tmp_path / "moesaic").rename(tmp_path / f"moesaic-{turn}")
        monkeypatch.undo()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tune._file.cache_clear()
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.gpu
def test_a_retained_graph_gives_the_same_gradients_again():
    tensors, ids, grad = _problem(700, 256, 192, 6, 3)
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = _fused(ids)(*leaves)
    first = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    for _ in range(2):
        again = torch.autograd.grad(out, leaves, grad, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
