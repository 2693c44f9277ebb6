"""`moesaic kernels bench-router`: right contenders, plain data."""

from __future__ import annotations

import json

import pytest
import torch

from moesaic.kernels import bench, router_bench
from moesaic.kernels.router import Scheme, reference
from tests.helpers import run_cli


@pytest.mark.parametrize("preset", router_bench.PRESETS)
def test_the_plain_contender_computes_the_reference(preset):
    experts, scheme = router_bench.PRESETS[preset]
    torch.manual_seed(0)
    logits_TE = torch.randn(40, experts)
    bias_E = torch.randn(experts) / 9 if scheme.score == "sigmoid" else None
    weights_TK, ids_TK = router_bench._as_transformers(logits_TE, scheme, bias_E)
    exact_TK, exact_ids_TK = reference(logits_TE, scheme, bias_E=bias_E)
    assert torch.equal(ids_TK.sort(1).values, exact_ids_TK.sort(1).values)
    torch.testing.assert_close(weights_TK.sort(1).values, exact_TK.sort(1).values)


def test_every_shape_of_the_experts_bench_has_a_router():
    for name, shape in bench.PRESETS.items():
        experts, scheme = router_bench.PRESETS[name]
        assert (experts, scheme.top_k) == (shape.experts, shape.top_k)


def test_the_command_says_what_ran_and_what_did_not(tmp_path, monkeypatch):
    tiny = {"a": (8, Scheme(2)), "b": (6, Scheme(2, "softmax of chosen"))}
    monkeypatch.setattr(router_bench, "PRESETS", tiny)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    out = tmp_path / "out"
    arguments = ["kernels", "bench-router", "--device", "cpu", "--tokens", "9", "--repeats", "1"]
    report = json.loads(run_cli(*arguments, "-o", str(out), "--json").stdout)
    saved = json.loads((out / "bench.json").read_text())
    assert [result["preset"] for result in report["results"]] == ["a", "b"]
    assert saved["results"][1]["scheme"]["score"] == "softmax of chosen"
    fused, plain, compiled = saved["results"][0]["timings"]
    assert "needs a GPU" in fused["refused"]
    assert min(plain["forward"], plain["step"], compiled["host"]) > 0
    text = run_cli(*arguments).stdout
    assert "needs a GPU" in text
    bad = run_cli(*arguments, "--preset", "c")
    assert bad.exit_code == 2
