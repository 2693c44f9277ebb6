"""Segment routing against the original programs: counts, figures, intervals, positions."""

from __future__ import annotations

import json
from functools import cache, partial

import numpy as np
import pytest

from moesaic.routing import metrics
from moesaic.routing.metrics.position_routing import PositionRouting
from moesaic.routing.metrics.segment_routing import SegmentRouting
from moesaic.routing.samples import Space, choose, read_samples
from tests.routing.golden import CASES, EVERY, OWN, SEGMENTS, arrays, folder, scores, stacks, table

TABLES = {
    "mg": ("model", False), "lg": ("layer", False), "eg": ("expert", False),
    "md": ("model", True), "ld": ("layer", True), "ed": ("expert", True),
}  # fmt: skip


def assert_figures(found, row):
    expected = [float(row[column] or "nan") for column in ("act_r", "best_f1", "best_m")]
    # the tables hold float32: rho may be 36
    np.testing.assert_allclose(
        [found.activation, found.srp, found.rho], expected, atol=1e-6, rtol=1e-7
    )


def counted(name, stack, kind, **settings):
    experts = CASES[name]["E"]
    metric = kind(Space(experts, len(stack.layers), tuple(stack.ids)), **settings)
    for number, ids in enumerate(stack.ids.values()):
        for part in np.array_split(ids, 3):  # a stream
            block = read_samples(part, num_experts=experts, domain=np.full(len(part), number))
            metric.update(block)
    return metric


@pytest.mark.parametrize("name", EVERY)
def test_figures_and_intervals(name):
    weights = arrays(name, "expected").get("srp_bootstrap_weight")
    compared = 0
    for stack in stacks(name):
        metric = counted(
            name, stack, SegmentRouting, segments=SEGMENTS, bootstrap=weights, intervals="expert"
        )
        for key, (level, by_domain) in TABLES.items():
            path = folder(name) / f"srp_{key}.csv.gz"
            if not path.exists():
                continue
            rows = [row for row in table(path) if row["is_decoder"] == stack.decoder]
            at = cache(partial(metric.at, level=level))
            for row in rows:
                found = at(int(row["seg_len"]), domain=row["dataset"] if by_domain else None)
                if level != "model":
                    found = found[stack.names.index(int(row["layer_idx"]))]
                if level == "expert":
                    found = found[int(row["expert_idx"])]
                assert_figures(found, row)
                if weights is not None:
                    limits = [float(row["ci_lb"]), float(row["ci_ub"])]
                    np.testing.assert_allclose([found.low, found.high], limits, atol=1e-6, rtol=0)
                compared += 1
    assert compared >= 2 * 4


@pytest.mark.parametrize("name", EVERY)
def test_counts_of_predictions_and_matches(name):
    expected = arrays(name, "expected")
    for stack in stacks(name):
        for place, layer in enumerate(stack.layers):
            for domain, ids in stack.ids.items():
                for segment in SEGMENTS:
                    key = f"srp_raw_{layer:02d}_{domain}_{segment:03d}"
                    if f"{key}_m" not in expected:
                        continue
                    metric = SegmentRouting(Space(CASES[name]["E"]), segments=[segment])
                    samples = read_samples(ids[:, :, place], num_experts=CASES[name]["E"])
                    metric.update(samples)
                    counts_EC = metric.sums["counts"][0, 0]
                    windows_EC = counts_EC[:, ::-1].cumsum(1)[:, ::-1]
                    matches_EC = (counts_EC * np.arange(segment + 1))[:, ::-1].cumsum(1)[:, ::-1]
                    np.testing.assert_array_equal(segment * windows_EC, expected[f"{key}_p"])
                    np.testing.assert_array_equal(matches_EC, expected[f"{key}_m"])
                    np.testing.assert_array_equal(matches_EC[:, :1], expected[f"{key}_a"])


@pytest.mark.parametrize("name", EVERY)
def test_positions(name):
    for key, level in (("mg", "model"), ("ld", "layer")):
        path = folder(name) / f"srp_pos_{key}.csv.gz"
        if not path.exists():
            continue
        rows = table(path)
        for stack in stacks(name):
            tokens = next(iter(stack.ids.values())).shape[1]
            metric = counted(name, stack, PositionRouting, tokens=tokens, level=level)
            compared = 0
            at = cache(metric.at)
            for row in rows:
                if row["is_decoder"] != stack.decoder:
                    continue
                found = at(int(row["seg_len"]), domain=row.get("dataset"))
                if level == "layer":
                    found = found[stack.names.index(int(row["layer_idx"]))]
                found = found[int(row["start_pos"])]
                assert_figures(found, row)
                compared += 1
            assert compared


@pytest.mark.parametrize("name", ["tie8", "const8", "short8", "sseq16"])
def test_choices_from_scores(name):
    given, expected = arrays(name, "input"), arrays(name, "expected")
    compared = 0
    for key, ranks in expected.items():
        if not key.startswith("rank_"):
            continue
        values = scores(given[key.replace("rank", "logits_bf16")])
        everyone = choose(values, values.shape[-1])
        own = np.empty(ranks.shape, dtype=np.int64)
        np.put_along_axis(own, everyone, np.arange(values.shape[-1])[::-1].copy(), axis=-1)
        np.testing.assert_array_equal(own, ranks)
        chosen = choose(values, CASES[name]["k"])
        np.testing.assert_array_equal(chosen, given[key.replace("rank", "topk")])
        compared += 1
    assert compared


def test_case_study():
    given = dict(np.load(OWN / "cases" / "input.npz"))
    for row in table(OWN / "cases" / "srp.csv"):
        key = f"{row['model']}_{int(row['layer_idx']):02d}_{row['dataset']}_logits_bf16"
        case = CASES[row["model"]]
        ids = choose(scores(given[key])[:256], case["k"])[None]
        found = metrics.srp(
            ids, num_experts=case["E"], segment=int(row["seg_len"]), level="expert"
        )[int(row["expert_idx"])]
        assert_figures(found, row)


def test_by_hand():
    hand = json.loads((OWN / "micro.json").read_text())["srp"]
    ids = np.array(hand["expert_per_token"])[None, :, None].repeat(hand["n_samples"], axis=0)
    model = metrics.srp(ids, num_experts=2, segment=4)
    assert (model.activation, model.srp, model.rho) == pytest.approx(
        (hand["model"]["act_r"], hand["model"]["srp"], hand["model"]["rho_hat"])
    )
    assert model.threshold == hand["model"]["threshold"]
    experts = metrics.srp(ids, num_experts=2, segment=4, level="expert")
    for expert in (0, 1):
        expected = hand[f"expert{expert}"]
        found = experts[expert]
        assert (found.activation, found.srp, found.rho) == pytest.approx(
            (expected["act_r"], expected["srp"], expected["rho_hat"])
        )
    positions = metrics.position_srp(ids, num_experts=2, segment=4)
    assert positions.srp == pytest.approx([p["srp"] for p in hand["position"]])
    assert positions.rho == pytest.approx([p["rho_hat"] for p in hand["position"]])
