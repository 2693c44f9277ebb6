import json

import pytest

from moesaic.core.errors import UserError
from moesaic.train.weights import (
    LLAMA2_7B_REFERENCE,
    PORTIONS,
    domain_weights,
    reference_losses,
    update_weights,
)
from tests.helpers import GOLDEN

RULES = {"sheared_llama": "sheared", "sheared_llama_paper": "sheared-paper"}
SEQUENCES = json.loads((GOLDEN / "llama_moe_v1" / "dynamic_weights.json").read_text())


@pytest.mark.parametrize("sequence", SEQUENCES, ids=lambda s: f"{s['update']}-{s['initial_name']}")
def test_updates_follow_the_original_over_a_whole_sequence(sequence):
    weights = sequence["initial"]
    for step in sequence["steps"]:
        weights = update_weights(
            weights,
            step["current_loss"],
            sequence["reference_loss"],
            rule=RULES[sequence["update"]],
        )
        assert weights == pytest.approx(step["new_weights"], abs=2e-6)
        assert sum(weights.values()) == pytest.approx(1.0)


def test_portions_and_reference_are_the_originals_under_its_names():
    by_name = {s["initial_name"]: s["initial"] for s in SEQUENCES}
    for preset, name in (("llama", "LLAMA_DATA_PORTION"), ("sheared", "SHEAREDLLAMA_DATA_PORTION")):
        assert domain_weights(preset, list(by_name[name])) == pytest.approx(by_name[name])
    assert reference_losses("llama2-7b", list(SEQUENCES[0]["reference_loss"])) == pytest.approx(
        SEQUENCES[0]["reference_loss"]
    )
    assert PORTIONS["llama"].keys() == PORTIONS["sheared"].keys() == LLAMA2_7B_REFERENCE.keys()


def test_a_preset_keeps_its_ratios_on_fewer_domains():
    got = domain_weights("sheared", ["c4", "books"])
    assert got["c4"] / got["books"] == pytest.approx(0.492 / 0.091)
    assert sum(got.values()) == pytest.approx(1.0)
    assert domain_weights("uniform", ["x", "y"]) == {"x": 0.5, "y": 0.5}
    assert domain_weights({"x": 3, "y": 1}, ["x", "y"]) == {"x": 0.75, "y": 0.25}


@pytest.mark.parametrize("rate", [0.5, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_smoothed_rule_is_its_formula(rate, smoothing):
    import math

    weights, losses, reference = {"a": 0.2, "b": 0.8}, {"a": 2.0, "b": 1.0}, {"a": 1.5, "b": 1.75}
    raw = {n: weights[n] * math.exp(rate * (losses[n] - reference[n])) for n in weights}
    total = sum(raw.values())
    expected = {n: (1 - smoothing) * raw[n] / total + smoothing / 2 for n in raw}
    got = update_weights(
        weights, losses, reference, rule="sheared", rate=rate, smoothing=smoothing
    )
    assert got == pytest.approx(expected)


@pytest.mark.parametrize(
    ("portions", "domains", "words"),
    [
        ("sheared", ["c4", "cooking"], "cooking"),
        ({"a": 1.0}, ["a", "b"], "weights.b"),
        ({"a": 1.0, "bok": 1.0, "book": 1.0}, ["a", "book"], "did you mean 'book'"),
        ({"a": -1.0, "b": 2.0}, ["a", "b"], "weights.a is -1.0"),
        ({"a": 0.0, "b": 0.0}, ["a", "b"], "every domain weight is 0"),
        ({"a": float("nan"), "b": 1.0}, ["a", "b"], "weights.a is nan"),
    ],
)
def test_wrong_weights_are_named(portions, domains, words):
    with pytest.raises(UserError, match="(?i)" + words.replace("(", r"\(")):
        domain_weights(portions, domains)
