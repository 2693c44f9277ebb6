from __future__ import annotations

import json
from pathlib import Path

import pytest

from moesaic.core.errors import UserError
from moesaic.data.dynamic import reference_losses, update_weights
from moesaic.data.portions import PORTIONS, domain_weights
from tests.helpers import GOLDEN

CASES = json.loads((GOLDEN / "llama_moe_v1" / "dynamic_weights.json").read_text())
SEVEN = list(PORTIONS["llama"])


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['update']}-{c['initial_name']}")
def test_rules_match_the_original(case: dict) -> None:
    weights = case["initial"]
    for step in case["steps"]:
        new = update_weights(case["update"], weights, step["current_loss"], case["reference_loss"])
        assert new == pytest.approx(step["new_weights"], abs=1e-6)
        assert sum(new.values()) == pytest.approx(1)
        weights = step["new_weights"]


def test_presets_and_reference_are_those_of_the_original() -> None:
    """The original's own names, read through our aliases, give the original's own numbers."""
    for case in CASES:
        names = list(case["initial"])
        preset = {"LLAMA": "llama", "SHEARED": "sheared", "AVERAGE": "uniform"}[
            case["initial_name"].split("_")[0].replace("SHEAREDLLAMA", "SHEARED")
        ]
        assert domain_weights(preset, names) == pytest.approx(case["initial"], abs=1e-6)
        assert reference_losses("llama2-7b", names) == pytest.approx(case["reference_loss"])


def test_a_preset_is_cut_down_to_the_domains_present() -> None:
    weights = domain_weights("sheared", ["github", "books"])
    assert weights == pytest.approx({"github": 0.008 / 0.099, "books": 0.091 / 0.099})
    assert domain_weights("uniform", ["x", "y"]) == {"x": 0.5, "y": 0.5}


def test_weights_keep_the_order_of_the_domains() -> None:
    weights = domain_weights({"b": 3, "a": 1}, ["a", "b"])
    assert list(weights.items()) == [("a", 0.25), ("b", 0.75)]


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("shearde", "Did you mean 'sheared'?"),
        ("sheared", "not 'x'"),
        ({"books": 1, "x": 1, "y": 2}, "weights.y: there is no such domain"),
        ({"book": 1, "x": 1}, "Did you mean 'books'?"),
        ({"books": 1}, "no value for the domain 'x'"),
        ({"books": 0, "x": 1}, "weights.books is 0.0"),
        ({"books": -1, "x": 1}, "weights.books is -1.0"),
        ({"books": float("nan"), "x": 1}, "weights.books is nan"),
    ],
)
def test_wrong_weights(weights: object, words: str) -> None:
    with pytest.raises(UserError) as caught:
        domain_weights(weights, ["books", "x"])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_own_reference_losses(tmp_path: Path) -> None:
    own = {"a": 1.0, "b": 2.0}
    assert reference_losses(own, ["b", "a"]) == {"b": 2.0, "a": 1.0}
    (tmp_path / "r.json").write_text(json.dumps({"mean": 1.5, **own}))
    assert reference_losses(tmp_path / "r.json", ["a", "b"]) == own
    for reference, words in [
        ("llama2-70b", "neither 'llama2-7b' nor a file"),
        ({"a": 1.0}, "no value for the domain 'b'"),
        ({"a": 1.0, "b": float("inf")}, "reference.b is inf"),
    ]:
        with pytest.raises(UserError, match=words):
            reference_losses(reference, ["a", "b"])
    with pytest.raises(UserError, match="know the domains"):
        reference_losses("llama2-7b", ["a"])


def test_the_two_rules_differ_as_described() -> None:
    weights = {"behind": 0.5, "ahead": 0.5}
    losses, reference = {"behind": 3.0, "ahead": 1.0}, {"behind": 2.0, "ahead": 2.0}
    full = update_weights("sheared_llama", weights, losses, reference, smoothing=0.0)
    assert full["behind"] / full["ahead"] == pytest.approx(2.718281828**2)
    clipped = update_weights("sheared_llama_paper", weights, losses, reference)
    assert clipped["behind"] / clipped["ahead"] == pytest.approx(2.718281828)
    smooth = update_weights("sheared_llama", weights, losses, reference, rate=50, smoothing=0.1)
    assert smooth["ahead"] == pytest.approx(0.05)
    with pytest.raises(UserError, match="Did you mean 'sheared_llama'"):
        update_weights("sheared_lama", weights, losses, reference)
    with pytest.raises(UserError, match="'ahead' has no loss"):
        update_weights("sheared_llama", weights, {"behind": 1.0}, reference)
    with pytest.raises(UserError, match="the loss of 'ahead' is nan"):
        update_weights("sheared_llama", weights, {"behind": 1, "ahead": float("nan")}, reference)
