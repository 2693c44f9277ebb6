"""Splits from importance scores: golden selections, tie rules, the meaning written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from moesaic.construct.scored import assign_once, best_neurons, rank_neurons, take_common
from moesaic.construct.split import split
from moesaic.core.errors import UserError
from tests.helpers import GOLDEN

V1 = GOLDEN / "llama_moe_v1"
NONE = np.empty(0, np.int64)


@pytest.fixture(scope="module")
def golden() -> Any:
    return np.load(V1 / "split_gradient.npz")


def through_the_library(
    tmp_path: Path, scores: np.ndarray, settings: dict[str, Any], experts: int, shared: int
) -> Any:
    """A split of the golden dense model (2 layers of 64 neurons) from ready scores."""
    file = tmp_path / "scores.safetensors"
    save_file({"scores": np.stack([scores, scores[:, ::-1].copy()])}, file)
    settings = {**settings, "scores": str(file)}
    return split(V1 / "dense", method=settings, experts=experts, shared=shared)


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("criterion", ["max", "min"])
def test_gradient_and_sharing_inner_are_the_originals(
    golden: Any, name: str, criterion: str, tmp_path: Path
) -> None:
    scores = golden[f"scores_{name}"]
    settings = {"method": "gradient", "criterion": criterion}
    made = through_the_library(tmp_path, scores, settings, 4, 0)
    assert (made.labels(0) == golden[f"{name}.{criterion}.independent.labels"]).all()
    assert made.exact
    for size in (16, 24):
        settings = {"method": "sharing-inner", "criterion": criterion, "expert_size": size}
        made = through_the_library(tmp_path, scores, settings, 4, 0)
        wanted = golden[f"{name}.{criterion}.sharing_inner.size{size}"]
        assert (np.stack(made.experts[0]) == wanted).all()


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("criterion", ["max", "min"])
@pytest.mark.parametrize(("routed", "shared"), [(3, 1), (2, 2)])
@pytest.mark.parametrize("share", [True, False])
def test_sharing_inter_is_the_originals(
    golden: Any, name: str, criterion: str, routed: int, shared: int, share: bool, tmp_path: Path
) -> None:
    settings = {"method": "sharing-inter", "criterion": criterion, "share": share}
    made = through_the_library(
        tmp_path, golden[f"scores_{name}"], settings, routed + shared, shared
    )
    key = f"{name}.{criterion}.sharing_inter.moe{routed}.res{shared}.{'' if share else 'no'}share"
    assert (np.stack([*made.shared[0], *made.experts[0]]) == golden[key]).all()
    assert share or made.exact


def deal(scores: np.ndarray, sign: int, size: int, without: set[int]) -> list[list[int]]:
    """The meaning of `assign_once`: one neuron at a time."""
    experts, width = scores.shape
    dealt: list[list[int]] = [[] for _ in range(experts)]
    free = set(range(width)) - without
    while any(len(ids) < size for ids in dealt):
        best: tuple[float, int, int] | None = None
        for expert in range(experts):
            if len(dealt[expert]) == size:
                continue
            neuron = max(sorted(free), key=lambda j, e=expert: sign * scores[e, j])  # type: ignore[misc]
            value = sign * scores[expert, neuron]
            if best is None or value >= best[0]:
                best = value, expert, neuron
        assert best is not None
        dealt[best[1]].append(best[2])
        free.remove(best[2])
    return dealt


@pytest.mark.parametrize("seed", range(4))
def test_dealing_follows_the_rule_among_many_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(-3, 3, size=(5, 35)).astype(np.float32)
    without = rng.permutation(35)[: 5 * (seed % 2)]
    size = (35 - len(without)) // 5
    for criterion, sign in (("max", 1), ("min", -1)):
        dealt = assign_once(scores, criterion, size, without)  # type: ignore[arg-type]
        wanted = deal(scores, sign, size, set(without.tolist()))
        assert [ids.tolist() for ids in dealt] == wanted


def test_common_neurons_are_those_most_rankings_agree_on() -> None:
    order = np.array([[3, 1, 0, 2, 4, 5], [1, 5, 3, 0, 2, 4], [1, 0, 2, 3, 4, 5]])
    # Among the first two: 1 is in three lists. Then 3, 0; 5, 3; 0, 2: 0 and 3 are in two.
    assert take_common(order, 2, 1).tolist() == [1]
    assert take_common(order, 2, 2).tolist() == [1, 0]
    assert take_common(order, 2, 3).tolist() == [1, 0, 3]
    left = best_neurons(order, 2, np.array([1, 0]))
    assert [ids.tolist() for ids in left] == [[3, 2], [5, 3], [2, 3]]


def test_ranking_puts_the_lower_number_first_among_equals() -> None:
    scores = np.array([[1, 2, 2, 0]], np.float32)
    assert rank_neurons(scores, "max").tolist() == [[1, 2, 0, 3]]
    assert rank_neurons(scores, "min").tolist() == [[3, 0, 1, 2]]


def test_scores_that_do_not_fit_are_refused(golden: Any, tmp_path: Path) -> None:
    scores = golden["scores_a"]
    with pytest.raises(UserError, match="needs 8 score vectors, but there are 4"):
        through_the_library(tmp_path, scores, {"method": "gradient"}, 8, 0)
    with pytest.raises(UserError, match=r"shape \[2, 4, 60\], but the model has 2 layers of 64"):
        through_the_library(tmp_path, scores[:, :60], {"method": "gradient"}, 4, 0)
    with pytest.raises(UserError, match="not finite"):
        through_the_library(tmp_path, scores * np.inf, {"method": "gradient"}, 4, 0)
    with pytest.raises(UserError, match="expert_size=65"):
        through_the_library(tmp_path, scores, {"method": "sharing-inner", "expert_size": 65}, 4, 0)
    with pytest.raises(UserError, match="not readable as scores"):
        split(
            V1 / "dense",
            method={"method": "gradient", "scores": str(tmp_path / "none.safetensors")},
            experts=4,
        )
