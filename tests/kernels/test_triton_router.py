"""The router's kernel against its meaning: the same ids, weights and gradients."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("triton")

import triton

from moesaic.kernels import fuse_routers, router
from moesaic.kernels.router import Scheme, by_score, columns, reference
from moesaic.kernels.triton import router as fused
from tests.kernels.compiled import compile_for_hopper
from tests.kernels.conftest import INTERPRETED
from tests.kernels.families import tiny
from tests.kernels.test_families_step import _same, _step

compiled = pytest.mark.skipif(INTERPRETED, reason="compiles, so does not interpret")
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.interpreted),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
V3 = Scheme(
    8,
    "sigmoid",
    groups=8,
    kept_groups=4,
    group_rule="two highest",
    renormalise=True,
    epsilon=1e-20,
    scale=2.5,
)
CASES = {  # tokens, experts, scheme, biased
    "no tokens": (0, 8, Scheme(2), False),
    "one token": (1, 3, Scheme(1, renormalise=True), False),
    "mixtral": (63, 8, Scheme(2, renormalise=True), False),
    "olmoe": (63, 64, Scheme(8), False),
    "an odd number": (63, 60, Scheme(4, renormalise=True, epsilon=0.5), False),
    "qwen3": (17, 128, Scheme(8, renormalise=True), False),
    "gpt-oss": (63, 32, Scheme(4, "softmax of chosen"), False),
    "K = E": (9, 8, Scheme(8, "softmax of chosen"), False),
    "K = E, sigmoid": (9, 3, Scheme(3, "sigmoid", renormalise=True), False),
    "the most": (3, 512, Scheme(16, scale=0.5), False),
    "deepseek-v2": (17, 160, Scheme(6, groups=8, kept_groups=3, scale=16.0), False),
    "deepseek-v3": (17, 256, V3, True),
    "few groups": (33, 60, V3._replace(top_k=3, groups=3, kept_groups=2), True),
    "one group": (33, 32, V3._replace(top_k=4, groups=1, kept_groups=1), True),
    "groups without bias": (33, 12, V3._replace(top_k=3, groups=3, kept_groups=1), False),
    "softmax in groups": (
        33,
        128,
        Scheme(4, groups=4, kept_groups=2, group_rule="two highest", renormalise=True),
        False,
    ),
    "rounded": (33, 32, V3._replace(top_k=4, groups=1, kept_groups=1, rounded=True), True),
}


def _logits(tokens: int, experts: int, dtype: torch.dtype) -> torch.Tensor:
    """Distinct in each row, so that the choice is determined."""
    g = torch.Generator().manual_seed(tokens + experts)
    steps_TE = torch.rand(tokens, experts, generator=g).argsort(1) - experts // 2
    return (steps_TE * (8 / experts)).to(dtype)


def _both(logits_TE, scheme, bias_E, dtype, device):
    """Weights, ids and the gradient of the logits, by kernel and by meaning."""
    found = []
    for run in (fused.choose, reference):
        leaf = logits_TE.to(device).detach().requires_grad_()
        bias = None if bias_E is None else bias_E.to(device)
        weights_TK, ids_TK = run(leaf, scheme, bias_E=bias, dtype=dtype)
        g = torch.Generator().manual_seed(1)
        grad_TK = torch.randn(weights_TK.shape, generator=g).to(device, dtype)
        (d_logits,) = torch.autograd.grad(weights_TK, leaf, grad_TK)
        found.append([weights_TK.detach().cpu(), ids_TK.cpu(), d_logits.cpu()])
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_the_meanings(case, dtype, device):
    tokens, experts, scheme, biased = CASES[case]
    if scheme.rounded and dtype == torch.bfloat16 and device == "cpu":
        dtype = torch.float16  # the interpreter cuts bfloat16 off instead of rounding
    g = torch.Generator().manual_seed(2)
    # multiples of 1/64: no two scores that another rounding could bring into another order
    bias_E = torch.randint(-8, 8, (experts,), generator=g) / 64 if biased else None
    ours, exact = _both(_logits(tokens, experts, dtype), scheme, bias_E, torch.float32, device)
    assert [(t.shape, t.dtype) for t in ours] == [(t.shape, t.dtype) for t in exact]
    assert torch.equal(ours[1], exact[1])
    low = scheme.rounded and dtype != torch.float32  # one rounding of bfloat16
    close = {"rtol": 8e-3, "atol": 0} if low else {"rtol": 1e-6, "atol": 1e-6 * scheme.scale}
    torch.testing.assert_close(ours[0], exact[0], **close)
    tolerance = 2e-6 if dtype == torch.float32 else 1e-2
    error = (ours[2].float() - exact[2].float()).norm()
    assert error <= (3e-2 if low else tolerance) * exact[2].float().norm().clamp(min=1e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_of_equals_the_lowest_id_comes_first_and_nan_counts_most(dtype, device):
    few_TE = torch.randint(-2, 3, (63, 60), generator=torch.Generator().manual_seed(0)).to(dtype)
    few_TE[3, 10:] = -torch.inf
    few_TE[4, :57] = -torch.inf  # more are chosen than are finite
    few_TE[5] = 0.0
    few_TE[5, ::2] = -0.0
    nan_TE = few_TE.clone()
    nan_TE[7, [5, 40]] = torch.nan
    for scheme in (Scheme(5, renormalise=True), Scheme(5, "softmax of chosen")):
        ours, exact = _both(few_TE, scheme, None, torch.float32, device)
        assert torch.equal(ours[1], exact[1])
        assert ours[1][5].tolist() == [0, 1, 2, 3, 4]
        assert ours[1][4].tolist()[3:] == [0, 1]
        torch.testing.assert_close(ours[0], exact[0], rtol=1e-6, atol=1e-6)
        weights_TK, ids_TK = fused.choose(
            nan_TE.to(device), scheme, bias_E=None, dtype=torch.float32
        )
        assert ids_TK[7].tolist()[:2] == [5, 40]
        assert weights_TK[7].isnan().all()
    groups = Scheme(4, groups=6, kept_groups=2, group_rule="two highest")
    ours, exact = _both(torch.zeros(2, 60, dtype=dtype), groups, None, torch.float32, device)
    assert ours[1].tolist() == exact[1].tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("device", DEVICES)
def test_weights_in_another_dtype_from_logits_with_gaps(device):
    wide_TE = torch.randn(33, 16, generator=torch.Generator().manual_seed(3)).bfloat16()
    ours, exact = _both(wide_TE[:, ::2], Scheme(2), None, torch.bfloat16, device)
    assert torch.equal(ours[1], exact[1])
    assert ours[0].dtype == torch.bfloat16
    torch.testing.assert_close(ours[0], exact[0], rtol=8e-3, atol=0)
    torch.testing.assert_close(ours[2], exact[2], rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compile_", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "llama_moe"])
def test_loss_and_every_gradient_equal_the_models_own(family, compile_, device, monkeypatch):
    monkeypatch.setattr(router, "_why_not_on", lambda device: None)
    calls = []
    kernel = fused._start_choose
    monkeypatch.setattr(
        fused, "_start_choose", lambda *a, **k: (calls.append(1), kernel(*a, **k))[1]
    )
    own = tiny(family, output_router_logits=not compile_).to(device)
    own.set_experts_implementation("eager")
    ours = copy.deepcopy(own)
    assert len(fuse_routers(ours).routers) == 2
    if compile_:
        ours.set_experts_implementation("moesaic")
        ours.forward = torch.compile(ours.forward, fullgraph=True, backend="aot_eager")
    expected = _step(own, device)
    assert not calls
    _same(_step(ours, device), expected, 1e-5)
    assert len(calls) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_under_autocast_the_choice_is_the_models_own(family):
    own = tiny(family, layers=1, output_router_logits=False).cuda()
    own.set_experts_implementation("eager")
    for name, buffer in own.named_buffers():
        if "correction_bias" in name:  # no equals among bfloat16 scores
            buffer.copy_(torch.linspace(0.01, 0.02, len(buffer)))
    ours = copy.deepcopy(own)
    assert fuse_routers(ours).routers
    seen = []
    for model in (own, ours):
        for module in model.modules():
            if type(module).__name__.lower().endswith("topkrouter"):
                module.register_forward_hook(lambda m, i, o: seen.append(o))
        with torch.autocast("cuda", dtype=torch.bfloat16):
            model(input_ids=torch.arange(64, device="cuda")[None])
    (logits_TE, *theirs), (same_TE, *mine) = seen
    assert torch.equal(logits_TE, same_TE)
    assert [t.dtype for t in mine] == [t.dtype for t in theirs]
    # among equal logits the model's own choice is not determined
    differ_T = (logits_TE.float().sort(1).values.diff(dim=1) > 0).all(1)
    assert differ_T.sum() > 20
    weights, ids = ([a[differ_T], b[differ_T]] for a, b in zip(theirs, mine, strict=True))
    order = [i.argsort(1) for i in ids]
    assert torch.equal(*(i.gather(1, o) for i, o in zip(ids, order, strict=True)))
    weights = [w.gather(1, o) for w, o in zip(weights, order, strict=True)]
    torch.testing.assert_close(*weights, rtol=8e-3, atol=1e-6)


@pytest.mark.gpu
def test_on_a_gpu_two_runs_are_bit_identical_and_a_graph_replays():
    logits_TE = torch.randn(4096, 128, device="cuda", dtype=torch.bfloat16).requires_grad_()
    scheme = Scheme(8, renormalise=True)
    runs = []
    for _ in range(2):
        weights_TK, ids_TK = router.choose(logits_TE, scheme)
        grad = torch.linspace(-1, 1, 8, device="cuda").expand(4096, 8)
        runs.append([weights_TK, ids_TK, *torch.autograd.grad(weights_TK, logits_TE, grad)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        weights_TK, ids_TK = router.choose(logits_TE, scheme)
    graph.replay()
    assert torch.equal(ids_TK, runs[0][1])
    assert torch.equal(weights_TK, runs[0][0])


SIZES = {  # experts, scheme, biased, dtype
    "mixtral": (8, Scheme(2, renormalise=True), False, "bf16"),
    "qwen3": (128, Scheme(8, renormalise=True), False, "bf16"),
    "gpt-oss": (32, Scheme(4, "softmax of chosen"), False, "bf16"),
    "deepseek-v2": (160, Scheme(6, groups=8, kept_groups=3, scale=16.0), False, "fp32"),
    "deepseek-v3": (256, V3, True, "fp32"),
    "the most": (512, Scheme(16, renormalise=True), False, "fp32"),
}


@compiled
@pytest.mark.parametrize("name", SIZES)
def test_compiles_for_hopper_without_spills(name, tmp_path):
    experts, scheme, biased, dtype = SIZES[name]
    groups, width = columns(scheme, experts)
    ranked_by_score = by_score(scheme, biased=biased)
    block, warps = fused._tile(width)
    shared = {
        "EXPERTS": experts,
        "TOP_K": scheme.top_k,
        "SCORE": fused._SCORES[scheme.score],
        "RENORMALISE": scheme.renormalise,
        "EPSILON": scheme.epsilon,
        "SCALE": scheme.scale,
        "EXACT": True,
    }
    forward = compile_for_hopper(
        fused._choose,
        tmp_path,
        pointers={
            "logits_ptr": dtype,
            "bias_ptr": "fp32",
            "weights_ptr": "fp32",
            "ids_ptr": "i64",
        },
        warps=warps,
        stages=3,
        **shared,
        GROUPS=scheme.groups,
        KEPT_GROUPS=scheme.kept_groups,
        TWO_HIGHEST=scheme.group_rule == "two highest",
        BIASED=biased,
        BY_SCORE=ranked_by_score,
        SHORT=dtype == "bf16" and not ranked_by_score,
        ROUNDED=scheme.rounded,
        ROUNDED_RANK=False,
        FILLED=groups,
        WIDTH=width,
        BLOCK=block,
    )
    width = triton.next_power_of_2(experts)
    block, warps = fused._tile(width)
    backward = compile_for_hopper(
        fused._gradient,
        tmp_path,
        pointers={"logits_ptr": dtype, "ids_ptr": "i64", "grad_ptr": "fp32", "d_logits_ptr": dtype},
        warps=warps,
        stages=3,
        **shared,
        WIDTH=width,
        BLOCK=block,
    )
    for result in (forward, backward):
        assert result.spilled == 0
        assert result.count("atom.") == 0
