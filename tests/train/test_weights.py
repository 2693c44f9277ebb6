import json

import pytest

from moesaic.core.errors import UserError
from moesaic.train.weights import (
    LLAMA2_7B_REFERENCE,
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


def test_the_reference_losses_are_the_originals_under_its_names():
    assert reference_losses("llama2-7b", list(SEQUENCES[0]["reference_loss"])) == pytest.approx(
        SEQUENCES[0]["reference_loss"]
    )
    assert len(LLAMA2_7B_REFERENCE) == 7


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


def test_a_missing_or_unknown_reference_is_named():
    with pytest.raises(UserError, match="no value for the domain 'b'"):
        reference_losses({"a": 1.0}, ["a", "b"])
    with pytest.raises(UserError, match="not 'cooking'"):
        reference_losses("llama2-7b", ["c4", "cooking"])


def test_a_loss_that_is_not_finite_moves_no_weight():
    with pytest.raises(UserError, match="not a finite number"):
        update_weights({"a": 1.0}, {"a": float("nan")}, {"a": 1.0}, rule="sheared")
