"""Routing watched in training: every update's load, samples' SRP and hit rates, no other course."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import moesaic
from moesaic.core.errors import UserError
from moesaic.measure.load import entropy
from moesaic.routing import caches, metrics
from moesaic.routing.online import RoutingWatch
from moesaic.training.config import OptimizerConfig
from moesaic.training.loop import plan, read_config, train
from moesaic.training.optimizer import Optimizer
from moesaic.training.setup import recompute_activations
from moesaic.training.step import build_pass, run_update
from moesaic.training.telemetry import read_log_lines
from tests.training import models
from tests.training.test_loop import Stop, course, log, stop_after

LENGTH = 16


def updates(model, watch, count, *, passes=2, batch=3):
    """Train steps under the watch; return what `recording` hears of each: ids [L, rows, K]."""
    generator = torch.Generator().manual_seed(0)
    heard = []
    for step in range(1, count + 1):
        with moesaic.recording(model, logits=False) as rec, watch.update(step, length=LENGTH):
            for _ in range(passes):
                ids = torch.randint(3, 64, (batch, LENGTH), generator=generator)
                model(
                    input_ids=ids, use_cache=False, output_router_logits=False
                ).logits.sum().backward()
        heard.append(np.stack([rec.experts[layer].numpy() for layer in sorted(rec.experts)]))
    return heard


@pytest.mark.parametrize("build", [models.mixtral, models.llama_moe])
@pytest.mark.parametrize("recomputed", [False, True])
def test_figures_are_those_of_what_was_routed(build, recomputed):
    model = build().train()
    if recomputed:
        recompute_activations(model)
    watch = RoutingWatch(
        model,
        every=2,
        sequences=4,
        segments=(4, 100),
        caches=(0.5, 1, 1.5),
        policies=("lru", "lfu"),
    )
    heard = updates(model, watch, 5)
    lines = watch.lines(wait=True)
    loads = [(step, fields) for event, step, fields in lines if event == "routing"]
    assert [step for step, _ in loads] == [1, 2, 3, 4, 5]
    for (_, fields), ids_LRK in zip(loads, heard, strict=True):
        assert ids_LRK.shape[1] == 2 * 3 * LENGTH
        counts = np.stack([np.bincount(ids.ravel(), minlength=4) for ids in ids_LRK])
        assert fields["layers"]["entropy"] == pytest.approx(entropy(counts).tolist(), abs=1e-6)
        assert fields["load_max"] == pytest.approx((counts.max(1) / counts.mean(1)).max(), abs=1e-6)
        assert fields["load_cv"] == pytest.approx((counts.std(1) / counts.mean(1)).mean(), abs=1e-6)
        assert fields["dead"] == (counts == 0).sum(1).max()
    samples = {step: fields for event, step, fields in lines if event == "routing_sample"}
    assert list(samples) == [2, 4]
    for step, fields in samples.items():
        ids = heard[step - 1][:, : 4 * LENGTH].reshape(2, 4, LENGTH, 2).transpose(1, 2, 0, 3)
        figures = metrics.srp(ids, num_experts=4, segment=4)
        assert fields["srp"] == {"4": pytest.approx(float(figures.srp), abs=1e-6)}
        assert fields["rho"] == {"4": pytest.approx(float(figures.rho), abs=1e-6)}
        for policy in ("lru", "lfu"):
            rates = caches.hit_rates(ids, num_experts=4, policy=policy).mean(axis=(0, 1))
            assert fields["hit_rate"][policy] == {
                size: pytest.approx(float(rates[slots - 1]), abs=1e-6)
                for size, slots in (("0.5", 1), ("1", 2), ("1.5", 3))
            }
    assert watch.lines(wait=True) == []
    watch.close()


@pytest.mark.parametrize("build", [models.mixtral, models.llama_moe])
def test_a_run_takes_the_same_course_and_tells_its_routing(build, settings, tmp_path):
    given = settings(build, log={"every": 4})
    plain = train(given, out=tmp_path / "plain")
    routing = {"every": 5, "segments": [8], "caches": [1.0, 1.5]}
    watched = train({**given, "routing": routing}, out=tmp_path / "watched")

    def others(path):
        return [line for line in course(path) if not line["event"].startswith("routing")]

    assert others(watched) == others(plain)
    lines = log(watched, "routing")
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert all(0 < line["entropy"] <= 1 for line in lines)
    samples = log(watched, "routing_sample")
    assert [line["step"] for line in samples] == [5, 10]
    for line in samples:
        assert 0 < line["srp"]["8"] <= 1
        assert 0 < line["hit_rate"]["lru"]["1"] <= line["hit_rate"]["lru"]["1.5"] <= 1
    if build is models.mixtral:  # whose log counts choices; LLaMA-MoE's expects them under noise
        window = [line["load_max"] for line in lines[:4]]
        assert log(plain)[0]["load_max"] <= max(window)


def test_a_resumed_run_tells_every_update_once(settings, tmp_path, monkeypatch):
    given = {**settings(models.mixtral, log={"every": 5}), "routing": {"every": 4}}
    whole = train(given, out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 8)
        with pytest.raises(Stop):
            train(given, out=tmp_path / "part")
    resumed = train(given, out=tmp_path / "part")

    def told(path):
        lines = [x for x in read_log_lines(path / "log.jsonl") if x["event"].startswith("routing")]
        return sorted(lines, key=lambda line: (line["event"], line["step"]))

    assert told(resumed) == told(whole)


def test_what_cannot_be_watched(settings, tmp_path):
    with pytest.raises(UserError, match="dense model"):
        plan(read_config({**settings(models.dense), "routing": {}}))
    with pytest.raises(UserError, match="dense model"):
        train({**settings(models.dense), "routing": {}}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for wrong, message in (
        ({"routing": {}, "compile": True}, "compiled code"),
        ({"routing": {"every": 0}}, "every"),
        ({"routing": {"segments": [0]}}, "segments"),
        ({"routing": {"policies": ["lrv"]}}, "policies"),
        ({"routing": {"interval": 5}}, "interval"),
    ):
        with pytest.raises(UserError, match=message):
            read_config({**settings(models.mixtral), **wrong})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_watched_update_does_not_wait_for_the_device():
    model = models.llama_moe().cuda().train()
    optimizer, run_pass = Optimizer(model, OptimizerConfig()), build_pass(model)
    ids = torch.randint(0, 64, (2, 2, LENGTH), device="cuda")
    watch = RoutingWatch(model, every=1)
    # In float32 torch's own grouped matmul waits.
    autocast = torch.autocast("cuda", torch.bfloat16)

    def update(step):
        with watch.update(step, length=LENGTH):
            run_update(run_pass, optimizer, ids, autocast=autocast)

    update(1)
    update(2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        update(3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(watch.lines(wait=True)) == 6
