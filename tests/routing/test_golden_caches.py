"""Cache simulations against the original programs: hit rates exactly, intervals with its draws."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from moesaic.routing import caches
from moesaic.routing.hits import CacheHits
from moesaic.routing.samples import Space, read_samples
from tests.routing.golden import CASES, EVERY, OWN, SEGMENTS, arrays, stacks, table

POLICIES = {
    "sch": [("sch", m) for m in SEGMENTS],
    "chr": [("lru", None), ("lfu", None), ("belady", None)],
}


@pytest.mark.parametrize("name", EVERY)
def test_hit_rates_of_samples(name):
    expected = arrays(name, "expected")
    compared = 0
    for stack in stacks(name):
        for domain, ids in stack.ids.items():
            for kind, policies in POLICIES.items():
                for place, (policy, window) in enumerate(policies):
                    settings = {"num_experts": CASES[name]["E"], "policy": policy, "window": window}
                    pooled = expected[f"{kind}_sample_{stack.side}_{domain}"][:, place]
                    rates = caches.hit_rates(ids[: len(pooled)], scope="model", **settings)
                    np.testing.assert_array_equal(rates, pooled)
                    rates = caches.hit_rates(ids[:32], **settings)
                    for number, layer in enumerate(stack.layers):
                        own = expected[f"{kind}_sample_{layer:02d}_{domain}"][:, place]
                        np.testing.assert_array_equal(rates[: len(own), number], own)
                        compared += 1
    assert compared


@pytest.mark.parametrize("name", EVERY)
def test_means_and_intervals(name):
    """The original draws anew for each layer and domain, then for each pooled cache."""
    expected, case = arrays(name, "expected"), CASES[name]
    caches_of = [
        ("layer", stack, number) for stack in stacks(name) for number in range(len(stack.layers))
    ]
    caches_of += [
        ("model", stack, None) for stack in sorted(stacks(name), key=lambda s: s.side, reverse=True)
    ]
    for kind, policies in POLICIES.items():
        generator = torch.Generator().manual_seed(case["stable_hash"])
        for scope, stack, number in caches_of:
            for domain, ids in stack.ids.items():
                ids = ids[::16] if kind == "sch" else ids
                ids = ids if number is None else ids[:, :, number : number + 1]
                weights = drawn(len(ids), generator)
                metric = CacheHits(
                    Space(case["E"], ids.shape[2]),
                    policies={str(own): own for own in policies},
                    scope=scope,
                    bootstrap=weights,
                )
                for part in np.array_split(ids, 2 if len(ids) > 1 else 1):
                    metric.update(read_samples(part, num_experts=case["E"]))
                layer = stack.side if number is None else f"{stack.layers[number]:02d}"
                for own, wanted in zip(
                    policies, expected[f"{kind}_ci_{layer}_{domain}"], strict=True
                ):
                    found = metric.at(str(own), domain="all")
                    got = [found.low[0], found.rate[0], found.high[0]]
                    np.testing.assert_allclose(got, wanted, atol=1e-6, rtol=0)


def drawn(samples, generator):
    which = torch.randint(samples, (1000 * samples,), generator=generator).numpy()
    which = which.reshape(1000, samples)
    return np.stack([np.bincount(row, minlength=samples) for row in which], axis=1)


@pytest.mark.parametrize("kind", ["sch", "chr"])
def test_tables(kind):
    """`cache_m` of the study's tables is the size over the experts a token uses."""
    compared = 0
    for scope in ("m", "l"):
        rows = table(OWN / f"{kind}_{scope}_table.csv.gz")
        kept: dict = {}
        for row in rows:
            name, column = row["model"], "seg_len" if kind == "sch" else "method"
            stack = next(s for s in stacks(name) if s.decoder == row["is_decoder"])
            policy = ("sch", int(row[column])) if kind == "sch" else (row[column].lower(), None)
            policy = ("belady", None) if policy[0].startswith("belad") else policy
            key = (name, stack.side, row["dataset"], *policy)
            if key not in kept:
                ids = stack.ids[row["dataset"]][:: 16 if kind == "sch" else 1]
                kept[key] = caches.hit_rates(
                    ids,
                    num_experts=CASES[name]["E"],
                    policy=policy[0],
                    window=policy[1],
                    scope="model" if scope == "m" else "layer",
                ).mean(axis=0, dtype=np.float64)
            rates = kept[key]
            base = CASES[name]["k"]
            if scope == "l":
                rates = rates[stack.names.index(int(row["layer_idx"]))]
            else:
                base *= len(stack.layers)
            size = float(row["cache_m"]) * base
            assert size == pytest.approx(round(size))
            assert rates[round(size) - 1] == pytest.approx(float(row["recall"]), abs=1e-6)
            compared += 1
    assert compared > 500


def test_by_hand():
    for case in json.loads((OWN / "micro.json").read_text())["cache"]:
        ids = np.array([case["tokens"]])
        for key, hits in case["hits_by_size"].items():
            policy = key.rstrip("0123456789")
            window = int(key[3:]) if policy == "sch" else None
            rates = caches.hit_rates(ids, num_experts=case["E"], policy=policy, window=window)
            assert (rates[0] * ids.size).tolist() == pytest.approx(hits), (case["name"], key)
