"""Cache simulations: every size at once equals one cache after another, played in plain Python."""

from __future__ import annotations

import numpy as np
import pytest

from moesaic.core.errors import UserError
from moesaic.routing import caches
from moesaic.routing.hits import CacheHits
from moesaic.routing.policy import PriorityPolicy
from moesaic.routing.samples import Space, read_samples
from tests.routing.test_segments import chosen


class LeastRecent(PriorityPolicy):
    def priority(self, expert, history):
        return history.last[expert]


class LeastFrequent(PriorityPolicy):
    def priority(self, expert, history):
        return history.uses[expert], history.last[expert]


class Latest(PriorityPolicy):
    def priority(self, expert, history):
        again = history.next(expert)
        return (0, -expert) if again is None else (1, -again)


class LeastAhead(PriorityPolicy):
    def __init__(self, window):
        self.window = window

    def priority(self, expert, history):
        return history.ahead(expert, self.window), history.last[expert]


def plain(policy, window):
    return {
        "lru": LeastRecent(),
        "lfu": LeastFrequent(),
        "belady": Latest(),
        "sch": LeastAhead(window),
    }[policy]


@pytest.mark.parametrize("policy", ["lru", "lfu", "belady", "sch"])
@pytest.mark.parametrize("seed", range(12))
def test_every_size_at_once_is_one_cache_after_another(policy, seed):
    generator = np.random.default_rng(seed)
    experts, tokens, samples = (int(generator.integers(1, top)) for top in (12, 30, 5))
    top_k, window = (int(generator.integers(1, top + 1)) for top in (experts, tokens + 2))
    scores = generator.standard_normal((samples, tokens, 2, experts)).cumsum(axis=1)  # sticky
    ids = np.argsort(scores, axis=-1)[..., :top_k]
    if seed % 2:
        ids[generator.random(ids.shape) < 0.2] = -1
    lengths = generator.integers(0, tokens + 1, samples)
    lengths[0] = tokens
    ids[0, 0, 0, 0] = 0
    settings = {"num_experts": experts, "lengths": lengths}
    for scope in ("layer", "model"):
        fast = caches.hit_rates(ids, policy=policy, window=window, scope=scope, **settings)
        slow = caches.hit_rates(ids, policy=plain(policy, window), scope=scope, **settings)
        np.testing.assert_array_equal(fast, slow)


def test_keys_of_16_32_and_64_bits_mean_the_same(monkeypatch):
    from moesaic.routing import stacks

    ids = chosen((3, 40), 9, 3)
    room = stacks._list
    found, kinds = [], []
    for more in (0, 2**15, 2**31):

        def wider(experts, above, more=more):
            list_ES, empty = room(experts, above + more)
            kinds.append(list_ES.itemsize)
            return list_ES, empty

        monkeypatch.setattr(stacks, "_list", wider)
        for policy in ("belady", "sch"):
            found.append(caches.hit_rates(ids, num_experts=9, window=5, policy=policy))
    assert kinds == [2, 2, 4, 4, 8, 8]
    np.testing.assert_array_equal(found[:2], found[2:4])
    np.testing.assert_array_equal(found[:2], found[4:])


def test_lists_of_several_tiers_are_one_cache_after_another(monkeypatch):
    from moesaic.routing import stacks

    ids = chosen((18, 12, 3), 50, 20)  # more samples than LANES
    ids[1::2, :, 1:] = -1  # lanes with fewer requests
    assert len(ids) > stacks.LANES
    assert 2 * stacks.TIER < 3 * 50
    settings = {"num_experts": 50, "scope": "model"}
    for policy in ("lfu", "belady", "sch"):
        fast = caches.hit_rates(ids, policy=policy, window=6, **settings)
        slow = caches.hit_rates(ids[16:], policy=plain(policy, 6), **settings)
        np.testing.assert_array_equal(fast[16:], slow)


def test_more_sequences_than_lanes_and_threads_change_nothing(monkeypatch):
    ids = chosen((70, 20, 3), 7, 2)
    for policy in ("lru", "lfu", "belady", "sch", "fixed"):
        settings = {"num_experts": 7, "policy": policy, "window": 4}
        found = []
        for threads in (1, 3):
            monkeypatch.setattr("moesaic.routing.compiled.threads", lambda n=threads: n)
            found.append(caches.hit_rates(ids, **settings))
        np.testing.assert_array_equal(*found)
        assert found[0].dtype == np.float32
        assert found[0].shape == (70, 3, 7)
        if policy != "fixed":  # its content depends on all samples
            alone = caches.hit_rates(ids[41:42, :, 1], **settings)
            np.testing.assert_array_equal(alone[0], found[0][41, 1])


def test_rates_rise_to_one_with_the_size_and_no_window_beats_belady_here():
    scores = np.random.default_rng(0).standard_normal((8, 100, 10)).cumsum(axis=1)
    ids = np.argsort(scores, axis=-1)[..., :2]
    rates = {
        policy: caches.hit_rates(ids, num_experts=10, policy=policy, window=16)
        for policy in ("lru", "lfu", "belady", "sch", "fixed")
    }
    for found in rates.values():
        assert (np.diff(found, axis=1) >= 0).all()
        assert (found[:, -1] == 1).all()
    assert (rates["belady"].mean(0) >= rates["lru"].mean(0)).all()
    assert (rates["belady"].mean(0) >= rates["sch"].mean(0)).all()


def test_fixed_holds_what_all_samples_ask_for_most():
    ids = np.array([[[0], [1], [1], [2]], [[1], [2], [2], [2]]])
    # asked for: 0 once, 1 three times, 2 four times
    rates = caches.hit_rates(ids, num_experts=4, policy="fixed")
    np.testing.assert_allclose(rates, [[0.25, 0.75, 1, 1], [0.75, 1, 1, 1]])
    metric = CacheHits(
        Space(4, 1, ("a", "b")), policies={"fixed": ("fixed", None)},
        bootstrap=np.ones((1, 50)),
    )  # fmt: skip
    metric.update(read_samples(ids, num_experts=4, domain=[0, 1]))
    found = metric.at("fixed", domain="b")
    np.testing.assert_allclose(found.rate, [[0.75, 1, 1, 1]])
    np.testing.assert_allclose([found.low, found.high], [found.rate] * 2)


def test_expert_named_twice_by_a_token_counts_once():
    ids = np.array([[[0, 1], [1, 1], [2, 0]]])
    once = np.array([[[0, 1], [1, -1], [2, 0]]])
    for policy in ("lru", "lfu", "belady", "sch"):
        np.testing.assert_array_equal(
            caches.hit_rates(ids, num_experts=3, policy=policy, window=2),
            caches.hit_rates(once, num_experts=3, policy=policy, window=2),
        )


def test_means_of_a_stream_are_those_of_the_samples():
    ids = chosen((9, 30, 2), 6, 2)
    lengths = np.array([30, 30, 0, 17, 30, 1, 30, 30, 8])
    metric = CacheHits(
        Space(6, 2),
        policies={"sch-4": ("sch", 4), "lru": ("lru", None)},
        scope="model",
        bootstrap=200,
        samples=[9],
    )
    halves = [CacheHits(Space(6, 2), policies={"lru": ("lru", None)}) for _ in range(2)]
    for half, rows in zip(halves, (slice(0, 4), slice(4, 9)), strict=True):
        block = read_samples(ids[rows], num_experts=6, lengths=lengths[rows])
        metric.update(block)
        half.update(block)
    rates = caches.hit_rates(
        ids, num_experts=6, policy="sch", window=4, scope="model", lengths=lengths
    )
    assert np.isnan(rates[2]).all()
    found = metric.at("sch-4", domain="all")
    np.testing.assert_allclose(found.rate[0], np.nanmean(rates, axis=0), atol=1e-7)
    assert found.samples.tolist() == [8]
    assert (found.low <= found.rate + 1e-12).all()
    assert (found.high >= found.rate - 1e-12).all()
    assert (found.low[0, :4] < found.high[0, :4]).all()
    halves[0].merge(halves[1])
    layers = caches.hit_rates(ids, num_experts=6, policy="lru", lengths=lengths)
    np.testing.assert_allclose(
        halves[0].at("lru", domain="all").rate, np.nanmean(layers, axis=0), atol=1e-7
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"policy": "lur"}, "Did you mean 'lru'"),
        ({"policy": "sch"}, "no window was given"),
        ({"policy": "sch", "window": 0}, "window=0"),
        ({"scope": "expert"}, "scope='expert'"),
        ({"num_experts": 2}, "holds the id 3"),
    ],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        caches.hit_rates([[[3], [1]]], **{"num_experts": 4} | settings)
