"""Load, importance, co-activation and the relations between figures, against plain sums."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest

from moesaic.core.errors import UserError
from moesaic.routing import relations
from moesaic.routing.caches import CACHES
from moesaic.routing.metrics import METRICS
from moesaic.routing.metrics.coactivation import Coactivation
from moesaic.routing.metrics.importance import Importance
from moesaic.routing.metrics.load import Load
from moesaic.routing.samples import Space, choose, read_samples
from tests.routing.test_segments import chosen


def block(**more):
    ids = chosen((6, 15, 3), 5, 2)
    ids[1, 4:6] = -1
    ids[0, 3, 1, 1] = -1
    return ids, read_samples(ids, num_experts=5, domain=np.arange(6) % 2, **more)


def test_load_and_balance():
    ids, samples = block()
    metric = Load(Space(5, 3, ("a", "b")))
    metric.update(samples)
    result = metric.result()
    for name, rows in (("a", ids[::2]), ("b", ids[1::2]), ("all", ids)):
        found = result[name]
        counts = [[(rows[:, :, x] == e).sum() for e in range(5)] for x in range(3)]
        np.testing.assert_array_equal(found.counts_LE, counts)
        np.testing.assert_allclose(found.share_LE.sum(axis=1), 1)
        own = [[(row[:, 0] == e).sum() for e in range(5)] for row in rows]
        cv = np.mean([np.std(count) / np.mean(count) for count in own])
        assert found.local["cv"][0] == pytest.approx(cv)
        assert found.local["cv"][0] > found.balance["cv"][0]
        assert found.tokens == len(rows) * 15
        most = np.max(counts[0]) / np.mean(counts[0]) - 1
        assert found.balance["violation"][0] == pytest.approx(most)


def test_globally_even_and_locally_uneven():
    ids = np.repeat(np.arange(4), 25).reshape(4, 25, 1)  # one expert a sample
    metric = Load(Space(4))
    metric.update(read_samples(ids, num_experts=4))
    found = metric.result()["all"]
    assert found.balance["entropy"][0] == pytest.approx(1)
    assert found.local["entropy"][0] == pytest.approx(0)
    assert found.local["cv"][0] == pytest.approx(np.sqrt(3))


def test_importance():
    weights = np.random.default_rng(0).random((6, 15, 3, 2)).astype(np.float32)
    ids, samples = block(weights=weights)
    metric = Importance(Space(5, 3, ("a", "b")))
    metric.update(samples)
    found = metric.result()["all"]
    for expert in range(5):
        assert found.sum_LE[2, expert] == pytest.approx(
            weights[:, :, 2][ids[:, :, 2] == expert].sum()
        )
    both = (ids[:, :, 0] >= 0).all(axis=-1)
    share = weights[:, :, 0][both]
    share = share / share.sum(axis=1, keepdims=True)
    entropy = -(share * np.log(share)).sum(axis=1) / np.log(2)
    assert found.entropy_L[0] == pytest.approx(entropy.mean(), rel=1e-6)
    assert found.largest_L[0] == pytest.approx(share.max(axis=1).mean(), rel=1e-6)
    with pytest.raises(UserError, match="gate weights"):
        metric.update(block()[1])


def test_coactivation():
    ids, samples = block()
    metric = Coactivation(Space(5, 3, ("a", "b")))
    metric.update(samples)
    found = metric.result()["all"]
    active = (ids[..., None] == np.arange(5)).any(axis=3).reshape(-1, 3, 5).astype(int)
    together = np.einsum("tle,tlf->lef", active, active)
    np.testing.assert_array_equal(found.together_LEE, together)
    np.testing.assert_array_equal(
        found.next_LEE, np.einsum("tle,tlf->lef", active[:, :-1], active[:, 1:])
    )
    alone = together[0, 1, 1] + together[0, 2, 2] - together[0, 1, 2]
    assert found.overlap_LEE[0, 1, 2] == pytest.approx(together[0, 1, 2] / alone)
    tokens = active[:, 0].any(axis=-1).sum()
    lift = together[0, 1, 2] * tokens / (together[0, 1, 1] * together[0, 2, 2])
    assert found.lift_LEE[0, 1, 2] == pytest.approx(lift)
    kept = asked = 0
    for row in ids[:, :, 1]:
        for before, now in pairwise(row):
            asked += (now >= 0).sum()
            kept += np.isin(now[now >= 0], before).sum()
    assert found.kept_L[1] == pytest.approx(kept / asked)


def test_domain_specialisation_is_the_variation_over_domains():
    activation = np.array([[[0.1, 0.2, 0.0]], [[0.3, 0.2, 0.0]], [[0.2, 0.2, 0.4]]])
    found = relations.domain_specialisation(activation)
    values = activation[:, 0, 0]
    np.testing.assert_allclose(
        found.specialisation_LE[0, :2], [values.std(ddof=1) / values.mean(), 0], atol=1e-12
    )
    assert np.isnan(found.specialisation_LE[0, 2])  # active in one domain only
    assert found.mean == pytest.approx(np.nanmean(found.specialisation_LE))
    alone = relations.domain_specialisation(activation[:1])
    assert np.isnan(alone.mean)
    assert np.isnan(alone.specialisation_LE).all()


def test_relations():
    generator = np.random.default_rng(0)
    one, two = generator.random((2, 30))
    assert relations.correlation(one, two) == pytest.approx(np.corrcoef(one, two)[0, 1])
    one[3] = np.nan
    assert np.isfinite(relations.correlation(one, two))
    assert np.isnan(relations.correlation([1, 1], [1, 2]))
    values = generator.random((3, 2, 5))
    np.testing.assert_allclose(
        relations.domain_correlations(values), np.corrcoef(values.reshape(3, -1))
    )
    assert relations.relative_difference(3, 2) == pytest.approx(0.5)
    assert relations.spread_of_load([[1, 2], [3, 4]]) == pytest.approx(np.std([1, 2, 3, 4], ddof=1))


def test_choose_prefers_the_larger_id_among_equals():
    assert choose([1.0, 3.0, 3.0, 0.0], 3).tolist() == [2, 1, 0]
    with pytest.raises(UserError, match="top_k=5"):
        choose([1.0, 2.0], 5)


def test_metrics_and_policies_are_found_by_their_files():
    assert {"load", "importance", "coactivation", "vocabulary"} <= set(METRICS.names())
    assert {"segment-routing", "position-routing"} <= set(METRICS.names())
    assert CACHES.names() == ["belady", "fixed", "lfu", "lru", "sch"]
    assert all(text.endswith((".", ")")) for text in METRICS.describe().values())
    assert all(CACHES.describe().values())


def test_no_numba_is_said_clearly():
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "from moesaic.routing import metrics, caches\n"
        "from moesaic.core.errors import UserError\n"
        "for call in (metrics.srp, caches.hit_rates):\n"
        "    extra = {'segment': 1} if call is metrics.srp else {}\n"
        "    try:\n"
        "        call([[[0]]], num_experts=1, **extra)\n"
        "    except UserError as error:\n"
        "        assert \"pip install 'moesaic[routing]'\" in str(error), error\n"
        "    else:\n"
        "        raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
