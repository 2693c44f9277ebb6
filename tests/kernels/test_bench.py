"""The benchmark measures what it says, on sizes where a mistake shows."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

from moesaic.core.errors import UserError
from moesaic.kernels import bench as room
from moesaic.kernels import contenders
from moesaic.kernels.bench import PRESETS, Shape, bench, parse_shape, table
from moesaic.kernels.check import relative_error
from tests.helpers import assert_user_error, run_cli

SMALL = Shape(64, 48, 8, 2)
RUN_ON_A_CPU = ["moesaic", "eager", "batched_mm", "grouped_mm", "grouped_mm compiled"]


def _problem(tokens=100, routing="uniform", dtype=torch.float32):
    return room._problem(SMALL, tokens, dtype, routing, torch.device("cpu"), 0)


@pytest.mark.parametrize("name", RUN_ON_A_CPU)
def test_contenders_compute_the_same(name):
    problem = _problem()
    own = contenders.CONTENDERS["eager"](problem)
    other = contenders.CONTENDERS[name](problem)
    assert relative_error(other.forward(), own.forward()) < 1e-5
    for a, b in zip(other.step(), own.step(), strict=True):
        assert relative_error(a, b) < 1e-5


def test_ceilings_have_the_flops_of_the_layer():
    """6SDI forward and 18SDI with the backward pass, for six products."""
    from torch.utils.flop_counter import FlopCounterMode

    problem = _problem()
    rows = problem.ids_TK.numel()
    made = contenders.dense(problem)
    for run, factor in ((made.forward, 6), (made.step, 18)):
        with FlopCounterMode(display=False) as counter:
            run()
        assert counter.get_total_flops() == factor * rows * SMALL.hidden * SMALL.width
    calls = []
    grouped_mm = torch.nn.functional.grouped_mm

    def counted(*arguments, **options):
        calls.append(1)
        return grouped_mm(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "grouped_mm", counted)
        bare = contenders.gemm_only(_problem())
        calls.clear()
        bare.step()
    assert len(calls) == 6


def test_routing():
    for routing in ("uniform", "zipf"):
        ids = _problem(tokens=2000, routing=routing).ids_TK
        assert ids.shape == (2000, 2)
        assert (ids[:, 0] != ids[:, 1]).all()
        load = sorted(Counter(ids.flatten().tolist()).values())
        assert (load[-1] > 3 * load[0]) == (routing == "zipf")


def test_a_result_has_every_figure():
    result = bench(SMALL, tokens=100, dtype=torch.float32, repeats=3, only=["eager", "moesaic"])
    eager, ours = result.timings
    for timing in (eager, ours):
        assert timing.refused is None
        assert timing.forward > 0
        assert timing.step > 0
        assert timing.step_share > 0
    x, rows = 100 * 64 * 4, 200
    assert x + rows * 96 * 4 <= ours.saved <= x + rows * (96 * 4 + 16) + 64  # x, h, weights, order
    assert eager.saved > 1.5 * ours.saved
    assert any("grouped matmul" in line for line in result.paths)
    assert result.distinct_experts == 8
    json.dumps(result.to_dict())
    head, ceiling, *rest = table(result)
    assert head == ["ms", "forward", "share", "f+b", "share", "saved MB"]
    assert ceiling[0] == "dense ceiling"
    assert [row[0] for row in rest] == ["eager", "moesaic"]


def test_decoding_runs_forward_only():
    result = bench(SMALL, tokens=1, repeats=2, only=["moesaic"])
    assert result.timings[0].forward > 0
    assert result.timings[0].step is None
    assert result.dense_step is None
    assert result.distinct_experts == 2


def test_what_does_not_fit_or_is_not_there_is_said(monkeypatch):
    monkeypatch.setattr(contenders.importlib.util, "find_spec", lambda name: None)
    problem = _problem()
    with pytest.raises(contenders.Refused, match="not installed"):
        contenders.CONTENDERS["scattermoe"](problem)
    poor = contenders.Problem(**{**vars(problem), "free": 1000})
    with pytest.raises(contenders.Refused, match="copied to every row"):
        contenders.CONTENDERS["batched_mm"](poor)
    result = bench(SMALL, tokens=100, repeats=1, only=["liger", "moesaic"])
    assert result.timings[0].refused == "liger-kernel is not installed"
    assert result.timings[1].step is not None


@pytest.mark.parametrize("name", ["grouped_mm compiled", "gemm only"])
def test_sizes_that_torch_refuses_are_refused_before_anything_runs(name):
    odd = Shape(64, 27, 5, 2)
    problem = room._problem(odd, 9, torch.bfloat16, "uniform", torch.device("cpu"), 0)
    with pytest.raises(contenders.Refused, match="multiples of 8 in bfloat16, not 27"):
        contenders.CONTENDERS[name](problem)


def test_presets_are_the_shapes_of_the_table():
    assert PRESETS["qwen3-30b-a3b"] == Shape(2048, 768, 128, 8)
    assert parse_shape("Mixtral-8x7B") == Shape(4096, 14336, 8, 2)
    assert parse_shape("64,48,8,2") == SMALL
    for wrong in ("64,48,8", "64,48,8,9", "a,b,c,d", "mixtral-8x8b", "0,1,1,1"):
        with pytest.raises(UserError, match="shape"):
            parse_shape(wrong)


def test_the_command(tmp_path):
    arguments = ("--shape", "64,48,8,2", "--tokens", "100", "--repeats", "1", "--only", "moesaic")
    out = tmp_path / "out"
    result = run_cli("kernels", "bench", *arguments, "--device", "cpu", "-o", out)
    assert result.exit_code == 0
    assert "dense ceiling" in result.stdout
    assert result.stdout.strip().endswith(str(out))
    saved = json.loads((out / "bench.json").read_text())
    assert saved["results"][0]["timings"][0]["contender"] == "moesaic"
    assert saved["results"][0]["shape"] == vars(SMALL)
    shown = run_cli("kernels", "bench", *arguments, "--json").json
    assert shown["results"][0]["tokens"] == 100
    assert_user_error(run_cli("kernels", "bench"), "nothing to time")
    assert_user_error(run_cli("kernels", "bench", "--preset", "olmo"), "olmoe-1b-7b")
    wrong = run_cli("kernels", "bench", "--shape", "64,48,8,2", "--only", "moesaik")
    assert_user_error(wrong, "no contender 'moesaik'")


@pytest.mark.gpu
def test_on_a_gpu_decoding_is_timed_from_a_graph():
    result = bench(Shape(512, 256, 8, 2), tokens=1, device="cuda", only=["moesaic", "batched_mm"])
    for timing in result.timings:
        assert timing.refused is None
        assert timing.graph is not None, timing.graph_refused


@pytest.mark.gpu
def test_on_a_gpu_peak_memory_holds_the_gradients():
    shape = Shape(512, 256, 8, 2)
    result = bench(shape, tokens=1024, device="cuda", repeats=2, only=["moesaic", "grouped_mm"])
    gradients = 2 * (3 * 512 * 256 * 8 + 1024 * 512)
    for timing in result.timings:
        assert timing.peak > gradients
