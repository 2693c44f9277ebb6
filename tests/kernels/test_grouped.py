"""The fast experts against their meaning: values, gradients, memory, determinism."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from moesaic.kernels import grouped, reference
from moesaic.kernels.check import PARTS, check, relative_error

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = ["cpu", GPU]


def _problem(tokens=37, hidden=64, width=32, experts=6, top_k=2, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=g).to(dtype)
    gate_up = (torch.randn(experts, 2 * width, hidden, generator=g) / 8).to(dtype)
    down = (torch.randn(experts, hidden, width, generator=g) / 6).to(dtype)
    ids = torch.rand(tokens, experts, generator=g).argsort(dim=1)[:, :top_k]
    weights = torch.rand(tokens, top_k, generator=g)
    return x, gate_up, down, ids, weights


def _with_grad(problem):
    return [t.clone().requires_grad_() if t.is_floating_point() else t for t in problem]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("routing", ["uniform", "one-expert", "some-empty"])
@pytest.mark.parametrize(
    ("sizes", "backend"),
    [
        ({"tokens": 63, "hidden": 60, "width": 43, "experts": 7, "top_k": 2}, "loop"),
        ({"tokens": 63, "hidden": 64, "width": 40, "experts": 7, "top_k": 3}, "grouped"),
        ({"tokens": 1, "hidden": 64, "width": 40, "experts": 8, "top_k": 2}, "grouped"),
        ({"tokens": 1, "hidden": 60, "width": 43, "experts": 8, "top_k": 1}, "loop"),
        ({"tokens": 5, "hidden": 64, "width": 8, "experts": 4, "top_k": 4}, "grouped"),
    ],
    ids=lambda v: v if isinstance(v, str) else "x".join(map(str, v.values())),
)
def test_values_and_gradients(sizes, backend, routing, dtype, device):
    result = check(**sizes, dtype=dtype, device=device, routing=routing, path=backend)
    for part, error in result.errors.items():
        # one or two dot products that may cancel have no meaningful relative error in bf16
        few = part == "d_weights" and sizes["tokens"] == 1
        assert error <= result.tolerance * (4 if few else 1), (part, error)
    assert result.backend == backend
    assert ("grouped matmul takes" in (result.reason or "")) == (backend == "loop")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("width", [40, 43])
def test_activations(activation, width, device):
    result = check(hidden=64, width=width, activation=activation, device=device)
    assert result.passed, result.errors


def test_float64_is_exact_through_the_loop():
    result = check(dtype=torch.float64)
    assert result.passed, result.errors
    assert result.backend == "loop"


def test_the_check_can_fail(monkeypatch):
    right = grouped.experts
    monkeypatch.setattr(grouped, "experts", lambda *a, **k: right(*a, **k) * 1.01)
    result = check()
    assert not result.passed
    assert min(result.errors[part] for part in PARTS) > 0.005


@settings(max_examples=15, deadline=None)
@given(
    tokens=st.integers(1, 40),
    hidden=st.integers(1, 40),
    width=st.integers(1, 40),
    experts=st.integers(1, 9),
    seed=st.integers(0, 10),
    data=st.data(),
)
def test_any_size(tokens, hidden, width, experts, seed, data):
    top_k = data.draw(st.integers(1, experts))
    result = check(
        tokens=tokens, hidden=hidden, width=width, experts=experts, top_k=top_k, seed=seed
    )
    assert result.passed, result


@pytest.mark.parametrize("backend", ["grouped", "loop"])
def test_permuting_experts_changes_nothing(backend):
    x, gate_up, down, ids, weights = _problem()
    order = torch.tensor([3, 5, 0, 4, 2, 1])
    place = order.argsort()
    plain = grouped.experts(x, gate_up, down, ids, weights, backend=backend)
    moved = grouped.experts(x, gate_up[order], down[order], place[ids], weights, backend=backend)
    assert relative_error(moved, plain) < 1e-6


def test_one_expert_named_twice_counts_twice():
    x, gate_up, down, ids, weights = _problem()
    ids = ids[:, :1].expand(-1, 2)
    once = grouped.experts(x, gate_up, down, ids[:, :1], weights.sum(1, keepdim=True))
    assert relative_error(grouped.experts(x, gate_up, down, ids, weights), once) < 1e-6


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32, torch.uint8])
def test_ids_of_any_integer_dtype(ids_dtype):
    x, gate_up, down, ids, weights = _problem()
    expected = grouped.experts(x, gate_up, down, ids, weights)
    got = grouped.experts(x, gate_up, down, ids.to(ids_dtype), weights)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["grouped", "loop"])
def test_two_runs_are_bit_equal(backend, device):
    def run():
        problem = [t.to(device) for t in _problem(tokens=200, top_k=4, dtype=torch.bfloat16)]
        inputs = _with_grad(problem)
        out = grouped.experts(*inputs, backend=backend)
        out.backward(torch.ones_like(out))
        return [out.detach()] + [t.grad for t in inputs if t.is_floating_point()]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_no_tokens():
    problem = _problem(tokens=0)
    inputs = _with_grad(problem)
    out = grouped.experts(*inputs)
    out.sum().backward()
    assert out.shape == (0, 64)
    assert inputs[1].grad.shape == inputs[1].shape
    assert not inputs[1].grad.any()


def _saved_bytes(function) -> int:
    sizes: dict[int, int] = {}
    alive = []

    def pack(tensor):
        alive.append(tensor)  # or its address could be given to another
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return sum(sizes.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keeps_only_x_and_h(dtype):
    from transformers.integrations.moe import grouped_mm_experts_forward

    from tests.kernels.test_select import PlainExperts

    tokens, hidden, width, experts, top_k = 256, 64, 48, 6, 3
    x, gate_up, down, ids, weights = _with_grad(
        _problem(tokens, hidden, width, experts, top_k, dtype)
    )
    parameters = gate_up.nbytes + down.nbytes
    ours = _saved_bytes(lambda: grouped.experts(x, gate_up, down, ids, weights)) - parameters
    rows = tokens * top_k
    x_and_h = x.nbytes + rows * 2 * width * dtype.itemsize
    assert x_and_h <= ours <= x_and_h + rows * (8 + 4) + 4 * experts  # order, weights, ends

    module = PlainExperts(gate_up, down)
    stock = _saved_bytes(lambda: grouped_mm_experts_forward(module, x, ids, weights)) - parameters
    assert ours < 0.6 * stock


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (4,), (1, 2), (0, 1), (0, 1, 2)])
def test_frozen_inputs_get_no_gradient_and_change_no_other(frozen):
    every = _with_grad(_problem())
    grouped.experts(*every).square().sum().backward()
    some = _with_grad(_problem())
    for index in frozen:
        some[index].requires_grad_(False)
    grouped.experts(*some).square().sum().backward()
    for index in (0, 1, 2, 4):
        if index in frozen:
            assert some[index].grad is None
        else:
            assert torch.equal(some[index].grad, every[index].grad)


def test_gradient_checkpointing_gives_the_same_gradients():
    plain, recomputed = _with_grad(_problem()), _with_grad(_problem())
    grouped.experts(*plain).square().sum().backward()
    checkpoint(grouped.experts, *recomputed, use_reentrant=False).square().sum().backward()
    for index in (0, 1, 2, 4):
        assert torch.equal(plain[index].grad, recomputed[index].grad)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_computes_in_its_dtype_and_keeps_ours(device):
    inputs = _with_grad([t.to(device) for t in _problem()])
    exact = grouped.experts(*inputs)
    exact_grads = torch.autograd.grad(exact.sum(), [inputs[i] for i in (0, 1, 2, 4)])
    with torch.autocast(device, dtype=torch.bfloat16):
        out = grouped.experts(*inputs)
    grads = torch.autograd.grad(out.sum(), [inputs[i] for i in (0, 1, 2, 4)])
    assert out.dtype == torch.float32
    assert 1e-4 < relative_error(out, exact) < 2e-2  # bf16 was used, and rightly
    for grad, expected in zip(grads, exact_grads, strict=True):
        assert grad.dtype == torch.float32
        assert relative_error(grad, expected) < 3e-2


def test_float32_routing_weights_are_not_rounded_to_bf16():
    x, gate_up, down, ids, _ = _problem(dtype=torch.bfloat16, top_k=1)
    exact_as_bf16 = torch.full((37, 1), 1 + 2**-8)  # rounds to 1 in bf16
    wide = grouped.experts(x, gate_up, down, ids, exact_as_bf16)
    rounded = grouped.experts(x, gate_up, down, ids, exact_as_bf16.bfloat16().float())
    assert not torch.equal(wide, rounded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cpu_takes_weights_at_any_address(dtype):
    """As those of a file in memory, which transformers does not copy for GraniteMoE or GPT-OSS."""
    x, gate_up, down, ids, weights = _problem(dtype=dtype)
    shifted = [
        torch.empty(w.numel() + 1, dtype=dtype)[1:].view_as(w).copy_(w) for w in (gate_up, down)
    ]
    assert all(w.data_ptr() % 16 for w in shifted)
    assert grouped.choose_backend(x, *shifted) == ("grouped", None)
    wanted = [x.requires_grad_(), gate_up.requires_grad_(), down.requires_grad_()]
    found = [x, *(w.requires_grad_() for w in shifted)]
    results = []
    for leaves in (wanted, found):
        out = grouped.experts(*leaves, ids, weights)
        results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_unaligned_and_strided_weights_take_the_loop(monkeypatch):
    monkeypatch.setattr(grouped, "_NEW_TORCH", False)
    x, gate_up, down, ids, weights = _problem()
    shifted = torch.empty(gate_up.numel() + 1)[1:].view_as(gate_up).copy_(gate_up)
    strided = down.repeat_interleave(2, dim=2)[:, :, ::2]
    expected = grouped.experts(x, gate_up, down, ids, weights)
    for a, b in ((shifted, down), (gate_up, strided)):
        backend, reason = grouped.choose_backend(x, a, b)
        assert backend == "loop"
        assert "aligned" in reason
        assert relative_error(grouped.experts(x, a, b, ids, weights), expected) < 1e-6


@pytest.mark.parametrize("width", [32, 43])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transposed_weights_cost_no_copy(width, dtype):
    """[E, D, 2I] and [E, I, D], as Aria stores them: views of them are taken as they are."""
    plain = _with_grad(_problem(width=width, dtype=dtype))
    x, gate_up, down, ids, weights = _problem(width=width, dtype=dtype)
    stored = _with_grad([x, gate_up.mT.contiguous(), down.mT.contiguous(), ids, weights])
    backend, _ = grouped.choose_backend(stored[0], stored[1].mT, stored[2].mT)
    assert backend == ("grouped" if width == 32 else "loop")
    expected = grouped.experts(*plain)
    out = grouped.experts(stored[0], stored[1].mT, stored[2].mT, *stored[3:])
    for o in (expected, out):
        o.float().square().sum().backward()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    assert relative_error(out, expected) < tolerance
    assert relative_error(stored[1].grad.mT, plain[1].grad) < tolerance
    assert relative_error(stored[2].grad.mT, plain[2].grad) < tolerance
    for index in (0, 4):
        assert relative_error(stored[index].grad, plain[index].grad) < tolerance


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["some", "all", "none"])
@pytest.mark.parametrize("width", [32, 43])
def test_experts_of_another_rank_stay_out(width, kind, device):
    """An id of num_experts adds zero, moves no gradient, and its rows may hold anything."""
    x, gate_up, down, ids, weights = _problem(width=width)
    away = {"some": torch.rand(ids.shape) < 0.5, "all": ids >= 0, "none": ids < 0}[kind]
    kept = _with_grad([t.to(device) for t in (x, gate_up, down, ids, weights)])
    masked = _with_grad([t.to(device) for t in (x, gate_up, down, ids, weights)])
    away = away.to(device)
    # the meaning: the same experts with a routing weight of zero
    expected = reference.experts(*kept[:4], kept[4] * ~away)
    dirty = [torch.full((4096, 128), float("nan"), device=device) for _ in range(4)]
    del dirty  # uninitialised rows now tend to be NaN
    out = grouped.experts(*masked[:3], masked[3].masked_fill(away, 6), masked[4], sentinels=True)
    for o in (expected, out):
        o.square().sum().backward()
    assert torch.allclose(out, expected, atol=1e-5)
    for index in (0, 1, 2, 4):
        assert torch.allclose(masked[index].grad, kept[index].grad, atol=1e-4), index


@pytest.mark.parametrize("width", [32, 43])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_traces_into_one_graph(width, dtype):
    plain, compiled = (_with_grad(_problem(width=width, dtype=dtype)) for _ in range(2))
    grouped.experts(*plain).float().square().sum().backward()
    traced = torch.compile(grouped.experts, fullgraph=True, backend="aot_eager")
    traced(*compiled).float().square().sum().backward()
    for index in (0, 1, 2, 4):
        assert relative_error(compiled[index].grad, plain[index].grad) < (
            1e-6 if dtype == torch.float32 else 1e-2
        )


@pytest.mark.gpu
def test_grouped_backend_never_waits_for_the_gpu():
    inputs = _with_grad([t.cuda() for t in _problem(dtype=torch.bfloat16)])
    grouped.experts(*inputs).sum().backward()  # first calls may allocate
    torch.cuda.set_sync_debug_mode("error")
    try:
        grouped.experts(*inputs).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_empty_experts_get_zero_gradients_from_dirty_memory():
    x, gate_up, down, ids, weights = (t.cuda() for t in _problem(dtype=torch.bfloat16))
    inputs = _with_grad([x, gate_up, down, ids % 2, weights])
    dirty = [torch.full_like(gate_up, float("nan")) for _ in range(8)]
    dirty += [torch.full_like(down, float("nan")) for _ in range(8)]
    del dirty
    grouped.experts(*inputs).sum().backward()
    assert not inputs[1].grad[2:].any()
    assert not inputs[2].grad[2:].any()


@pytest.mark.gpu
@pytest.mark.parametrize("width", [32, 43])
def test_compiled_on_a_gpu(width):
    plain, compiled = (
        _with_grad([t.cuda() for t in _problem(width=width, dtype=torch.bfloat16)])
        for _ in range(2)
    )
    grouped.experts(*plain).float().square().sum().backward()
    torch.compile(grouped.experts, fullgraph=True)(*compiled).float().square().sum().backward()
    for index in (0, 1, 2, 4):
        assert relative_error(compiled[index].grad, plain[index].grad) < 2e-2
