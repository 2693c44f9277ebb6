"""`moesaic route cache`: hit rates of a trace become tokens/s and advice."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moesaic.routing import caches
from moesaic.routing.sizing import size_caches
from moesaic.routing.trace import Shape, Trace, TraceWriter
from tests.helpers import assert_user_error, run_cli

LAYERS, EXPERTS, TOP_K, SAMPLES, TOKENS = 3, 8, 2, 5, 40
GIVEN = {"expert_bytes": 1e8, "bandwidth": 2e10, "compute": 0.01}
OPTIONS = ("--expert-bytes", "100MB", "--bandwidth", "20GB/s", "--compute", "10ms")


def routing() -> np.ndarray:
    """Ids [samples, tokens, layers, k] that stay for a while."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(SAMPLES, TOKENS, LAYERS, EXPERTS)).cumsum(axis=1)
    return np.argsort(-scores, axis=-1)[..., :TOP_K]


@pytest.fixture
def trace(tmp_path):
    shape = Shape((0, 1, 2), (EXPERTS,) * LAYERS, (TOP_K,) * LAYERS, predictions=False)
    rows = SAMPLES * TOKENS
    writer = TraceWriter(tmp_path / "trace", shape, {"domains": ["a", "b"]})
    writer.append(
        {
            "experts": routing().reshape(rows, LAYERS, TOP_K),
            "weights": np.full((rows, LAYERS, TOP_K), 0.5),
            "token_ids": np.zeros(rows),
            "document": np.zeros(rows),
            "position": np.tile(np.arange(TOKENS), SAMPLES),
            "domain": np.repeat([0, 0, 0, 1, 1], TOKENS),
        }
    )
    writer.finish()
    return tmp_path / "trace"


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_speed_follows_from_hit_rates(trace, scope):
    found = size_caches(trace, scope=scope, **GIVEN)
    assert {size.policy for size in found.sizes} == {"lru", "lfu", "fixed", "sch", "belady"}
    for policy in ("lru", "lfu", "fixed", "sch", "belady"):
        rates = caches.hit_rates(
            routing(), num_experts=EXPERTS, policy=policy, window=16, scope=scope
        )
        sizes = found.of(policy)
        assert [size.cache for size in sizes] == [c / 2 for c in range(2, 9)]
        for slots, size in zip(range(2, 9), sizes, strict=True):
            rate = rates.mean(axis=0)[..., slots * (1 if scope == "layer" else LAYERS) - 1].mean()
            misses = LAYERS * TOP_K * (1 - rate)
            assert size.hit_rate == pytest.approx(rate, abs=1e-6)
            assert size.misses == pytest.approx(misses, abs=1e-5)
            seconds = 0.01 + misses * 1e8 / 2e10
            assert size.predicted.serial == pytest.approx(1 / seconds, rel=1e-5)
            fetching = max(0.01, misses * 1e8 / 2e10)
            assert size.predicted.overlapped == pytest.approx(1 / fetching, rel=1e-5)
            spare = 2 if slots < EXPERTS else 0
            assert size.bytes == (slots * LAYERS + spare) * 1e8
            assert size.runs == (policy in ("lru", "lfu", "fixed"))
    assert found.full == 100
    assert found.of("lru")[-1].predicted.serial == pytest.approx(100)


def test_advice(trace):
    def advice(**limits):
        return size_caches(trace, **GIVEN, **limits).advice

    every = size_caches(trace, **GIVEN).sizes
    able = [size for size in every if size.runs]
    fits = advice(memory=1.5e9)
    assert fits.bytes <= 1.5e9
    assert fits.predicted.serial == max(
        size.predicted.serial for size in able if size.bytes <= 1.5e9
    )
    reaches = advice(target=50)
    assert reaches.predicted.serial >= 50
    assert reaches.bytes == min(s.bytes for s in able if s.predicted.serial >= 50)
    assert advice().predicted.serial >= 90
    assert advice(memory=1e8) is None
    assert advice(target=1e6).cache == 4  # none does: the fastest


def test_command(trace, tmp_path):
    result = run_cli("route", "cache", trace, *OPTIONS)
    assert result.exit_code == 0, result
    for word in ("lru", "belady*", "tokens/s", "take cache="):
        assert word in result.stdout
    result = run_cli("route", "cache", trace, *OPTIONS, "--json", "-o", tmp_path / "out")
    wanted = size_caches(trace, **GIVEN)
    assert result.json["advice"] == json.loads(json.dumps(wanted.advice.to_dict()))
    assert len(result.json["sizes"]) == len(wanted.sizes)
    assert result.json["path"] == str(tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "cache.json").read_text())
    assert saved == json.loads(json.dumps(wanted.to_dict()))
    assert (tmp_path / "out" / "cache.png").read_bytes()[1:4] == b"PNG"
    assert "<svg" in (tmp_path / "out" / "cache.svg").read_text()


def test_numbers_in_any_unit(trace):
    units = ("--expert-bytes", "97.65625 MiB", "--bandwidth", "2.048e10", "--compute", "100tok/s")
    first = run_cli("route", "cache", trace, *units, "--json").json
    assert first["full"] == 100
    plain = ("--expert-bytes", "102400000", "--bandwidth", "20.48GB/s", "--compute", "0.01")
    assert run_cli("route", "cache", trace, *plain, "--json").json == first


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (("--expert-bytes", "big"), ("--expert-bytes=big", "352MB")),
        (("--expert-bytes", "0"), ("expert_bytes=0",)),
        (("--bandwidth", "1.2.3"), ("--bandwidth",)),
        (("--compute", "0ms"), ("--compute=0ms",)),
        (("--memory", "-1GB"), ("--memory",)),
        (("--window", "0"), ("window=0",)),
    ],
)
def test_bad_numbers(trace, changed, words):
    assert_user_error(run_cli("route", "cache", trace, *OPTIONS, *changed), *words)


def test_no_trace_and_an_empty_one(tmp_path):
    assert_user_error(run_cli("route", "cache", tmp_path, *OPTIONS), "no trace")
    shape = Shape((0,), (4,), (1,), predictions=False)
    TraceWriter(tmp_path / "empty", shape, {"domains": ["a"]}).finish()
    assert len(Trace(tmp_path / "empty")) == 0
    assert_user_error(run_cli("route", "cache", tmp_path / "empty", *OPTIONS), "no token")
