"""Vocabulary specialisation against the original programs."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moesaic.routing.metrics.vocabulary import Vocabulary, frequent
from moesaic.routing.samples import Space, read_samples
from tests.routing.golden import CASES, OWN, arrays, folder, stacks, table

NAMES = {"in": "input", "pred": "predicted", "out": "target"}


def counted(name, domains, words=None):
    (stack,) = stacks(name)
    given = arrays(name, "input")
    metric = Vocabulary(Space(CASES[name]["E"], len(stack.layers)), vocabulary=97, words=words)
    for domain in domains or stack.ids:
        metric.update(
            read_samples(
                stack.ids[domain],
                num_experts=CASES[name]["E"],
                tokens=given[f"tokens_{domain}"],
                predicted=given[f"preds_{domain}"],
            )
        )
    return metric


@pytest.mark.parametrize("name", ["uni8", "tie8", "topone16", "mk16"])
def test_words_and_counts(name):
    expected = arrays(name, "expected")
    (stack,) = stacks(name)
    for domains in ([], *([domain] for domain in stack.ids)):
        result = counted(name, domains).result()
        label = domains[0] if domains else "gen"
        for short, word in NAMES.items():
            found = result[word]
            np.testing.assert_array_equal(found.words_V, expected[f"vocab_map_{label}_{short}"])
            for number, layer in enumerate(stack.layers):
                key = f"vocab_cnt_gen_{layer:02d}_{short}"
                key = f"vocab_cnt_{layer:02d}_{label}_{short}" if domains else key
                if key in expected:
                    np.testing.assert_array_equal(found.counts_LEV[number], expected[key])


@pytest.mark.parametrize("name", ["uni8", "tie8", "topone16", "mk16"])
def test_specialisation_and_owned_words(name):
    (stack,) = stacks(name)
    result = counted(name, []).result()
    rows = table(folder(name) / "vocab_gen.csv")
    seen = set()
    for row in rows:
        found = result[NAMES[row["token_type"]]]
        layer, expert = stack.names.index(int(row["layer_idx"])), int(row["expert_idx"])
        seen.add((row["token_type"], layer, expert))
        assert found.specialisation_LE[layer, expert] == pytest.approx(float(row["freq"]), abs=1e-6)
        owned = found.owned(layer, expert)
        wanted = [float(value) for value in row["hifreq"].split()]
        assert [frequency for _, frequency, _ in owned] == pytest.approx(wanted, abs=1e-6)
        if len(set(wanted)) == len(wanted):  # the order among ties is open
            assert [f"w{word}" for word, _, _ in owned] == row["hitoken"].split()
    for short, word in NAMES.items():
        for layer, expert in np.argwhere(np.isnan(result[word].specialisation_LE)):
            assert (short, layer, expert) not in seen
    assert len(seen) == len(rows)


def test_only_the_words_asked_for():
    given = arrays("uni8", "input")
    every = np.concatenate([given["tokens_arxiv"], given["tokens_c4"]])
    words = frequent(every, vocabulary=97)[::3]
    everything = counted("uni8", []).result()["input"]
    some = counted("uni8", [], words={"input": words}).result()["input"]
    np.testing.assert_array_equal(some.words_V, words)
    np.testing.assert_array_equal(some.counts_LEV, everything.counts_LEV[:, :, words])


def test_by_hand():
    hand = json.loads((OWN / "micro.json").read_text())["vocab"]
    metric = Vocabulary(Space(2), vocabulary=3, min_count=1)
    metric.update(
        read_samples(
            np.array(hand["top1_expert"])[None, :, None],
            num_experts=2,
            tokens=np.array([hand["tokens"]]),
            predicted=np.array([hand["preds"]]),
        )
    )
    result = metric.result()
    for short, word in NAMES.items():
        special_E = result[word].specialisation_LE[0]
        for expert in (0, 1):
            wanted = hand["spec"][short].get(str(expert), np.nan)
            assert special_E[expert] == pytest.approx(wanted, nan_ok=True)
