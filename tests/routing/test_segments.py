"""Segment routing: what it means, on inputs that are not golden."""

from __future__ import annotations

import numpy as np
import pytest

from moesaic.core.errors import UserError
from moesaic.routing import metrics
from moesaic.routing.bootstrap import draw_weights, interval, weigh
from moesaic.routing.metrics.segment_routing import SegmentRouting, best_threshold
from moesaic.routing.samples import Space, read_samples


def chosen(shape, experts, top_k, seed=0):
    """Random distinct experts, int16 [*shape, top_k]."""
    scores = np.random.default_rng(seed).random((*shape, experts))
    return np.argsort(scores, axis=-1)[..., :top_k].astype(np.int16)


def plain(ids_NTLK, lengths_N, experts, segment):
    """Windows by number of active tokens, [L, E, m + 1], token by token."""
    counts = np.zeros((ids_NTLK.shape[2], experts, segment + 1), dtype=np.int64)
    for ids_TLK, length in zip(ids_NTLK, lengths_N, strict=True):
        for start in range(length - segment + 1):
            for layer in range(ids_NTLK.shape[2]):
                window = ids_TLK[start : start + segment, layer]
                for expert in range(experts):
                    counts[layer, expert, (window == expert).any(axis=-1).sum()] += 1
    return counts


@pytest.mark.parametrize("segment", [1, 2, 3, 7, 63, 64, 65, 100])
def test_any_segment_length_and_ragged_samples(segment):
    ids = chosen((4, 130, 2), 5, 2, seed=segment)
    ids[np.random.default_rng(1).random(ids.shape) < 0.2] = -1  # dropped choices
    lengths = np.array([130, 129, 64, 3])
    samples = read_samples(ids, num_experts=5, lengths=lengths)
    metric = SegmentRouting(Space(5, 2), segments=(segment,))
    metric.update(samples)
    wanted = plain(ids, lengths, 5, segment)
    np.testing.assert_array_equal(metric.sums["counts"][0], wanted)
    layers = metrics.srp(ids, num_experts=5, segment=segment, level="layer", lengths=lengths)
    np.testing.assert_array_equal(layers.srp, best_threshold(wanted.sum(axis=1)).srp)
    listed = [row[:length] for row, length in zip(ids, lengths, strict=True)]
    again = metrics.srp(listed, num_experts=5, segment=segment, level="layer")
    np.testing.assert_array_equal(again.srp, layers.srp)


def test_masked_tokens_are_as_if_they_had_not_been_there():
    ids = chosen((3, 40, 2), 6, 2)
    mask = np.random.default_rng(0).random((3, 40)) < 0.7
    masked = metrics.srp(ids, num_experts=6, segment=5, level="expert", mask=mask)
    kept = metrics.srp(
        [row[own] for row, own in zip(ids, mask, strict=True)],
        num_experts=6, segment=5, level="expert",
    )  # fmt: skip
    np.testing.assert_array_equal(masked.srp, kept.srp)
    np.testing.assert_array_equal(masked.windows, kept.windows)
    assert (masked.windows < 3 * 36).all()


def test_padding_at_the_end_is_no_token_but_a_dropped_choice_inside_is_one():
    ids = chosen((2, 20), 4, 2)
    padded = np.concatenate([ids, np.full((2, 7, 2), -1)], axis=1)
    whole = metrics.srp(ids, num_experts=4, segment=6)
    assert metrics.srp(padded, num_experts=4, segment=6).srp == whole.srp
    ids[0, 10] = -1
    assert metrics.srp(ids, num_experts=4, segment=6).windows == whole.windows
    assert metrics.srp(ids, num_experts=4, segment=6).activation < whole.activation


def test_relabelled_experts_change_nothing_and_srp_beats_predicting_all():
    ids = chosen((5, 64, 3), 8, 2)
    for segment in (4, 9):
        found = metrics.srp(ids, num_experts=8, segment=segment)
        other = metrics.srp(7 - ids, num_experts=8, segment=segment)
        assert (found.srp, found.rho) == (other.srp, other.rho)
        assert found.activation == pytest.approx(2 / 8)
        assert found.srp >= 2 * 0.25 / 1.25
    full = metrics.srp(chosen((2, 30), 4, 4), num_experts=4, segment=4)
    assert (full.srp, full.rho, full.activation) == (1, 1, 1)


def test_a_dead_expert_has_nothing_and_an_eager_one_everything():
    ids = np.zeros((2, 30, 1), dtype=np.int64)
    found = metrics.srp(ids, num_experts=2, segment=8, level="expert")
    assert found.srp.tolist() == [1, 0]
    assert found.rho.tolist() == [1, 0]
    assert found.activation.tolist() == [1, 0]


def test_counts_do_not_overflow_32_bits():
    """The original's table eg is -1330642944 for an expert that is always active."""
    metric = SegmentRouting(Space(1, 1), segments=(256,))
    metric.update(read_samples(np.zeros((1, 512, 1), dtype=np.uint8), num_experts=1))
    metric.sums["counts"] *= 11 * 2048
    found = metric.at(256, "expert")
    assert 2 * metric.sums["counts"].sum() * 256 > 2**31
    assert found.srp == 1
    assert found.rho == 1


def test_segments_longer_than_samples_have_no_window():
    found = metrics.srp(chosen((3, 5), 4, 1), num_experts=4, segment=6, bootstrap=100)
    assert (found.srp, found.rho, found.windows) == (0, 0, 0)
    assert np.isnan(found.activation)
    assert metrics.position_srp(chosen((3, 5), 4, 1), num_experts=4, segment=6).srp.shape == (0,)
    one = metrics.srp([[[2]]], num_experts=4, segment=1, level="expert")
    assert one.srp.tolist() == [0, 0, 1, 0]


def test_shapes_follow_the_level_and_the_axis_of_layers():
    four, three = chosen((2, 20, 3), 6, 2), chosen((2, 20), 6, 2)
    for level, shape in (("model", ()), ("layer", (3,)), ("expert", (3, 6))):
        found = metrics.srp(four, num_experts=6, segment=4, level=level, bootstrap=50)
        assert found.srp.shape == found.low.shape == found.high.shape == shape
        found = metrics.srp(three, num_experts=6, segment=4, level=level, bootstrap=50)
        assert found.srp.shape == found.low.shape == shape[1:]


def test_merged_and_restored_sums_are_those_of_one_pass():
    ids = chosen((12, 50, 2), 6, 2)
    domain = np.arange(12) % 2
    space = Space(6, 2, ("a", "b"))
    settings = {"segments": (4, 11), "bootstrap": 60, "samples": (6, 6)}
    once, first, second = (SegmentRouting(space, **settings) for _ in range(3))
    once.update(read_samples(ids, num_experts=6, domain=domain))
    first.update(read_samples(ids[:5], num_experts=6, domain=domain[:5]))
    second.update(
        read_samples(ids[5:], num_experts=6, domain=domain[5:], index=np.arange(5, 12) // 2)
    )
    restored = SegmentRouting(space, **settings)
    restored.restore(first.state())
    restored.merge(second)
    assert restored.seen_D.tolist() == [6, 6]
    for domain_name in (None, "a"):
        one, two = (m.at(11, "layer", domain=domain_name) for m in (once, restored))
        np.testing.assert_array_equal(one.srp, two.srp)
        np.testing.assert_array_equal(one.low, two.low)
    with pytest.raises(UserError, match="same settings"):
        once.merge(SegmentRouting(space, segments=(4,)))


def test_tables_hold_every_population():
    metric = SegmentRouting(Space(6, 2, ("a", "b")), segments=(4, 9), bootstrap=50, samples=(3, 2))
    metric.update(read_samples(chosen((5, 30, 2), 6, 2), num_experts=6, domain=[0, 0, 0, 1, 1]))
    table = metric.tables("layer", by_domain=True)
    assert list(table) == [
        "domain", "layer", "segment", "activation", "srp", "rho", "low", "high", "threshold",
    ]  # fmt: skip
    assert {len(column) for column in table.values()} == {2 * 2 * 2}
    row = np.flatnonzero(
        (table["domain"] == "b") & (table["layer"] == 1) & (table["segment"] == 9)
    ).item()
    assert table["srp"][row] == metric.at(9, "layer", domain="b").srp[1]
    assert table["high"][row] == metric.at(9, "layer", domain="b").high[1]
    experts = metric.tables("expert")
    assert "domain" not in experts
    assert "low" not in experts
    assert len(experts["expert"]) == 2 * 2 * 6


def test_threads_change_nothing(monkeypatch):
    ids = chosen((9, 60, 2), 6, 2)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr("moesaic.routing.compiled.threads", lambda n=threads: n)
        figures = metrics.srp(ids, num_experts=6, segment=7, level="expert", bootstrap=80)
        found.append(np.stack([figures.srp, figures.low, figures.high]))
    np.testing.assert_array_equal(*found)


def test_intervals_are_basic_ones_and_cover_the_truth():
    weights = draw_weights(40, 200, seed=3)
    assert (weights.sum(axis=0) == 40).all()
    low, high = interval(0.5, np.arange(200) / 200)
    assert (low, high) == (pytest.approx(1 - 0.975), pytest.approx(1 - 0.025))
    counts = np.random.default_rng(0).integers(0, 2**30, (40, 3))
    exact = counts.T.astype(object) @ weights.astype(object)
    np.testing.assert_array_equal(weigh(counts, weights), exact.astype(np.float64))
    covered = 0
    truth = metrics.srp(chosen((4000, 16), 6, 2, seed=99), num_experts=6, segment=4).srp
    for seed in range(40):
        found = metrics.srp(
            chosen((60, 16), 6, 2, seed=seed), num_experts=6, segment=4, bootstrap=200, seed=seed
        )
        covered += bool(found.low <= truth <= found.high)
    assert covered >= 32


@pytest.mark.parametrize(
    ("experts", "settings", "words"),
    [
        (np.zeros((0, 4, 1), dtype=int), {}, "empty"),
        ([], {}, "empty"),
        (np.zeros((1, 4, 1)), {}, "float64"),
        (np.zeros((1, 4, 1), dtype=bool), {}, "bool"),
        (np.zeros((1, 4), dtype=int), {}, "shape"),
        (np.full((1, 4, 1), 9), {}, "holds the id 9"),
        (np.full((1, 4, 1), -1), {}, "no token counts"),
        (np.zeros((1, 4, 1), dtype=int), {"mask": np.zeros((1, 4))}, "no token counts"),
        (np.zeros((1, 4, 1), dtype=int), {"mask": np.ones((4, 1))}, "mask has the shape"),
        (np.zeros((1, 4, 1), dtype=int), {"lengths": [5]}, "5"),
        (np.zeros((1, 4, 1), dtype=int), {"segment": 0}, "segments"),
        (np.zeros((1, 4, 1), dtype=int), {"segment": 2.5}, "segments"),
        (np.zeros((1, 4, 1), dtype=int), {"num_experts": 0}, "num_experts=0"),
        (np.zeros((1, 4, 1), dtype=int), {"level": "token"}, "token"),
        (np.zeros((1, 4, 1), dtype=int), {"bootstrap": 10}, "10 replicates"),
        (np.zeros((3, 4, 1), dtype=int), {"bootstrap": np.ones((2, 50))}, "weights for 2"),
        ([np.zeros((4, 1), dtype=int), np.zeros((3, 2), dtype=int)], {}, "differ in length"),
    ],
)
def test_bad_input_is_refused(experts, settings, words):
    with pytest.raises(UserError, match=words):
        metrics.srp(experts, **{"num_experts": 4, "segment": 2} | settings)


def test_samples_of_another_model_are_refused():
    metric = SegmentRouting(Space(4, 2))
    with pytest.raises(UserError, match="1 layers with 4 experts"):
        metric.update(read_samples(chosen((1, 9), 4, 1), num_experts=4))
