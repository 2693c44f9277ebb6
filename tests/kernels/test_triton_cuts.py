"""Products in pieces: what memory they are for, and that pieces change no bit of the result."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")

from moesaic.kernels import reference
from moesaic.kernels.bench import PRESETS
from moesaic.kernels.triton import budget, layer, multiply
from moesaic.kernels.triton.budget import Cuts, Layer, cut, ranges, spans
from tests.kernels import emulated
from tests.kernels.conftest import INTERPRETED

MEASURED = {  # MB on an H200 before there were pieces: peak, bound
    "qwen3-30b-a3b": (1747, 1747),
    "olmoe-1b-7b": (1478, 1478),
    "mixtral-8x7b": (4967, 4967),
    "llama-moe-3.5b": (1077, 720),
    "deepseek-v3-1b": (370, 303),
    "qwen2-moe-1b": (240, 214),
    "mixtral-1b": (525, 483),
}


def _sizes(name, tokens=16384):
    shape = PRESETS[name]
    return Layer(tokens, shape.hidden, shape.width, shape.experts, shape.top_k)


def _whole(sizes):
    return Cuts(1, sizes.hidden, sizes.width, sizes.hidden, copy_up=False, copy_gradient=False)


@pytest.mark.parametrize("name", MEASURED)
def test_the_timeline_is_what_was_measured_and_pieces_bring_it_to_the_bound(name):
    sizes, (peak, bound) = _sizes(name), MEASURED[name]
    assert max(sizes.timeline(_whole(sizes)).values()) / 1e6 == pytest.approx(peak, abs=1)
    assert sizes.bound() / 1e6 == pytest.approx(bound, abs=1)
    cuts = cut(sizes)
    assert max(sizes.timeline(cuts).values()) <= sizes.bound()
    assert (replace(cuts, copy_up=False, copy_gradient=False) == _whole(sizes)) == (peak == bound)


def test_there_are_no_more_pieces_than_needed_and_the_most_when_none_do():
    assert cut(_sizes("llama-moe-3.5b")).dx == 1024
    assert cut(_sizes("qwen2-moe-1b")).y == 1024
    sizes = _sizes("deepseek-v3-1b", 10**6)
    cuts = cut(sizes)
    assert max(sizes.timeline(cuts).values()) > sizes.bound()
    assert cuts.dx == 512
    assert cut(Layer(0, 64, 32, 4, 2)) == _whole(Layer(0, 64, 32, 4, 2))


def test_ranges_are_the_whole_once():
    assert ranges(10, 4) == [(0, 4), (4, 8), (8, 10)]
    assert ranges(8, 8) == [(0, 8)]


@pytest.mark.parametrize("seed", range(20))
def test_spans_hold_the_rows_of_their_tiles(seed):
    draw = random.Random(seed)
    height = draw.choice([4, 16])
    counts = [draw.choice([0, 1, height, draw.randrange(90)]) for _ in range(draw.randint(1, 9))]
    nobody = draw.choice([0, 5])
    tiles, start = [], 0
    for count in counts:
        tiles += [
            (start + at, min(start + at + height, start + count)) for at in range(0, count, height)
        ]
        start += count
    for parts in (1, 2, 3, 4):
        found = (
            spans(start + nobody, len(counts), parts, tile_rows=height) if start + nobody else []
        )
        for span in found:
            for first, end in tiles[span.tile : span.tile + span.tiles]:
                assert span.first <= first
                assert end <= span.end
        if found:
            assert found[-1].tile + found[-1].tiles >= len(tiles)
            assert len(found) <= parts


def _problem(tokens, hidden, width, experts, top_k, *, device, dtype, outside=False):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    ids = torch.rand(tokens, experts, generator=generator).topk(top_k, 1).indices
    if outside:
        ids[::3, 0] = experts
        ids[tokens // 2 :] = experts
    weights = torch.rand(tokens, top_k, generator=generator).to(device)
    x, grad = normal(tokens, hidden), normal(tokens, hidden)
    gate_up = normal(experts, 2 * width, hidden, scale=hidden**-0.5)
    down = normal(experts, hidden, width, scale=width**-0.5)
    return [x, gate_up, down, weights], ids.to(device), grad


def _step(tensors, ids, grad, monkeypatch, cuts=None, *, sentinels=False):
    """Output and gradients, with `cuts` if given."""
    with monkeypatch.context() as patch:
        if cuts is not None:
            patch.setattr(multiply, "cut", lambda sizes: replace(_whole(sizes), **cuts))
        x, gate_up, down, weights = (t.detach().requires_grad_() for t in tensors)
        out = layer.compute(x, gate_up, down, ids, weights, activation="silu", sentinels=sentinels)
        return [out.detach(), *torch.autograd.grad(out, (x, gate_up, down, weights), grad)]


PIECES = {
    "columns of y": {"y": 16},
    "columns of dx, the last ones fewer": {"dx": 32},
    "two parts": {"parts": 2},
    "four parts": {"parts": 4, "dx": 16},
}


@pytest.mark.interpreted
@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("pieces", PIECES)
def test_pieces_change_no_bit(pieces, outside, monkeypatch):
    problem = _problem(61, 40, 24, 5, 2, device="cpu", dtype=torch.float32, outside=outside)
    whole = _step(*problem, monkeypatch, {}, sentinels=outside)
    found = _step(*problem, monkeypatch, PIECES[pieces], sentinels=outside)
    assert whole[0].any()
    assert all(torch.equal(a, b) for a, b in zip(whole, found, strict=True))


@pytest.mark.interpreted
@pytest.mark.parametrize("outside", [False, True])
def test_pieces_change_no_bit_of_what_hopper_kernels_are_told(outside, monkeypatch):
    from moesaic.kernels.triton import products, tune
    from moesaic.kernels.triton.hopper_outer import outer_kernel
    from moesaic.kernels.triton.hopper_rows import rows_kernel

    for module in (layer, multiply):
        monkeypatch.setattr(module, "hopper", lambda device: True)
    monkeypatch.setattr(products, "_processors", lambda device: 132)
    rows, outer = emulated.rows_kernel, emulated.outer_kernel
    monkeypatch.setattr(products, "_start_rows", emulated.Launcher(rows_kernel, rows))
    monkeypatch.setattr(products, "_start_outer", emulated.Launcher(outer_kernel, outer))
    fastest = lambda product, run, **about: tune.CANDIDATES[product][-1]  # noqa: E731 (it may copy)
    monkeypatch.setattr(tune, "fastest", fastest)
    problem = _problem(90, 320, 328, 5, 2, device="cpu", dtype=torch.bfloat16, outside=outside)
    whole = _step(*problem, monkeypatch, {}, sentinels=outside)
    if not outside:
        tensors, ids, grad = problem
        exact = [t.float().requires_grad_() for t in tensors]
        out = reference.experts(*exact[:3], ids, exact[3])
        for found, wanted in zip(
            whole, [out, *torch.autograd.grad(out, exact, grad.float())], strict=True
        ):
            assert (found.float() - wanted).norm() < 1e-2 * wanted.norm()
    for pieces in ({"y": 256, "dx": 128}, {"parts": 2, "wa": 256}, {"parts": 4, "copy_up": True}):
        found = _step(*problem, monkeypatch, pieces, sentinels=outside)
        assert all(torch.equal(a, b) for a, b in zip(whole, found, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="compiles, so does not interpret")
def test_pieces_of_each_experts_matrix_are_one_matrix_with_gaps():
    from moesaic.kernels.triton.products import _flat

    matrices = torch.arange(3 * 8 * 10).view(3, 8, 10)
    for piece in (matrices, matrices[:, 2:5], matrices[:, :, 4:9], matrices[:1, 3:]):
        flat, step = _flat(piece)
        assert flat.shape == ((len(piece) - 1) * step + piece.shape[1], piece.shape[2])
        for expert, matrix in enumerate(piece):
            start = expert * step
            assert torch.equal(flat[start : start + piece.shape[1]], matrix)


class _Held(TorchDispatchMode):
    """Bytes of the tensors made inside that are alive, at most; not of those `before`."""

    def __init__(self, *before):
        super().__init__()
        self.peak, self._made = 0, {StorageWeakRef(t.untyped_storage()): 0 for t in before}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = StorageWeakRef(tensor.untyped_storage())
                self._made.setdefault(storage, tensor.untyped_storage().nbytes())
        self._made = {storage: n for storage, n in self._made.items() if not storage.expired()}
        self.peak = max(self.peak, sum(self._made.values()))
        return result


@pytest.mark.skipif(INTERPRETED, reason="launches nothing")
@pytest.mark.parametrize("name", MEASURED)
def test_a_step_holds_what_the_timeline_says(name, monkeypatch):
    """All of the layer but its kernels, on tensors without numbers, as it runs on a Hopper."""
    from moesaic.kernels.triton import products, tune
    from moesaic.kernels.triton.launch import Launcher

    for module in (layer, multiply):
        monkeypatch.setattr(module, "hopper", lambda device: True)
    monkeypatch.setattr(products, "_processors", lambda device: 132)
    monkeypatch.setattr(Launcher, "__call__", lambda *args, **kwargs: None)
    fastest = lambda product, run, **about: tune.CANDIDATES[product][-1]  # noqa: E731 (it may copy)
    monkeypatch.setattr(tune, "fastest", fastest)
    sizes = _sizes(name)
    T, D, I, E, K = sizes.tokens, sizes.hidden, sizes.width, sizes.experts, sizes.top_k  # noqa: E741
    with torch.device("meta"):
        shapes = (T, D), (E, 2 * I, D), (E, D, I), (T, K)
        x, gate_up, down, weights = (
            torch.empty(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes
        )
        grad, ids = torch.empty(T, D, dtype=torch.bfloat16), torch.zeros(T, K, dtype=torch.int64)
        with _Held(x, gate_up, down, weights, grad, ids) as held:
            out = layer.compute(x, gate_up, down, ids, weights, activation="silu", sentinels=False)
            found = torch.autograd.grad(out, (x, gate_up, down, weights), grad)
    assert [g.shape for g in found] == list(shapes)
    assert held.peak == pytest.approx(max(sizes.timeline(cut(sizes)).values()), rel=1e-3)
    assert held.peak <= 1.001 * sizes.bound()


# ---- on a GPU ----

GPU_PIECES = [
    {"y": 512, "dx": 256},
    {"parts": 2, "wa": 512},
    {"parts": 4, "wa": 256, "y": 768, "dx": 512},
]


@pytest.mark.gpu
@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("pieces", GPU_PIECES)
@pytest.mark.parametrize(
    "sizes", [(700, 1088, 704, 6, 3), (1, 1024, 1032, 4, 2), (3000, 1536, 640, 16, 4)]
)
def test_pieces_change_no_bit_on_hopper(sizes, pieces, outside, monkeypatch):
    problem = _problem(
        *sizes, device="cuda", dtype=torch.bfloat16, outside=outside and sizes[0] > 1
    )
    whole = _step(*problem, monkeypatch, {}, sentinels=outside)
    found = _step(*problem, monkeypatch, pieces, sentinels=outside)
    assert all(torch.equal(a, b) for a, b in zip(whole, found, strict=True))


@pytest.mark.gpu
def test_all_tokens_on_one_expert_leave_parts_without_rows(monkeypatch):
    tensors, ids, grad = _problem(300, 1024, 512, 40, 1, device="cuda", dtype=torch.bfloat16)
    ids.zero_()
    whole = _step(tensors, ids, grad, monkeypatch, {})
    found = _step(tensors, ids, grad, monkeypatch, {"parts": 4, "wa": 256})
    assert all(torch.equal(a, b) for a, b in zip(whole, found, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", MEASURED)
def test_a_step_holds_no_more_than_what_it_keeps_and_returns(name, monkeypatch):
    sizes = _sizes(name, 4096 if name != "mixtral-8x7b" else 2048)
    sizes = replace(sizes, experts=max(sizes.top_k, sizes.experts // 4))  # as many rows an expert
    problem = _problem(
        sizes.tokens, sizes.hidden, sizes.width, sizes.experts, sizes.top_k,
        device="cuda", dtype=torch.bfloat16,
    )  # fmt: skip
    _step(*problem, monkeypatch)  # compiles and measures
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = _step(*problem, monkeypatch)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del found
    timeline = sizes.timeline(budget.cut(sizes))
    assert peak <= 1.02 * max(sizes.bound(), *timeline.values())
    if max(timeline.values()) <= sizes.bound():
        assert peak <= 1.02 * sizes.bound()
