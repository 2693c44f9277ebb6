"""The co-activation graph: the original's METIS files, equal parts, links that mean something."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from moesaic.construct.graph import (
    Graph,
    co_activation,
    equalise,
    metis_text,
    partition,
    percentile_graph,
    strongest_graph,
)
from moesaic.core.errors import UserError
from tests.helpers import GOLDEN

V1 = GOLDEN / "llama_moe_v1"


@pytest.fixture(scope="module")
def features() -> np.ndarray:
    return np.asarray(np.load(V1 / "graph_inputs.npz")["features"])


def planted(groups: int, size: int, tokens: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Values [tokens, neurons] of groups active on different tokens, and each neuron's group."""
    rng = np.random.default_rng(seed)
    truth = rng.permutation(np.arange(groups * size) % groups)
    topic = rng.integers(groups, size=tokens)
    loud = np.where(truth[None] == topic[:, None], 1.0, 0.1)
    return (rng.standard_normal((tokens, len(truth))) * loud).astype(np.float32), truth


@pytest.mark.parametrize(
    ("kernel", "name", "threshold"),
    [("l1", "l1_norm", 1), ("l2", "l2_norm", 4), ("plain", "plain", 1), ("plain", "plain", 4)],
)
def test_graph_files_are_the_originals(
    kernel: Any, name: str, threshold: int, features: np.ndarray
) -> None:
    together = co_activation(features, kernel=kernel, threshold=threshold)
    text = metis_text(percentile_graph(together, sign="original"))
    assert text == (V1 / f"graph_{name}_thr{threshold}.metis").read_text()


def test_plain_graphs_link_neurons_that_agree(features: np.ndarray) -> None:
    together = co_activation(features, kernel="plain")
    assert np.percentile(together, 10) < 0
    graph = percentile_graph(together)
    rows = np.repeat(np.arange(graph.nodes), np.diff(graph.starts))
    assert (together[rows, graph.links] > 0).all()
    assert len(graph.links)


def test_blocks_and_shards_change_nothing(
    features: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined = features.reshape(-1, 64).astype(np.float32)
    whole = co_activation([joined])
    texts = [metis_text(g) for g in (percentile_graph(whole), strongest_graph(whole, neighbours=9))]
    monkeypatch.setattr("moesaic.construct.graph._BLOCK", 17)
    parts = co_activation(np.array_split(joined, 5))
    assert parts == pytest.approx(whole, rel=1e-5)
    again = [metis_text(g) for g in (percentile_graph(whole), strongest_graph(whole, neighbours=9))]
    assert texts == again


def test_strongest_links_are_symmetric_cosines(features: np.ndarray) -> None:
    together = co_activation(features)
    graph = strongest_graph(together, neighbours=5)
    table = np.zeros((64, 64), int)
    table[np.repeat(np.arange(64), np.diff(graph.starts)), graph.links] = graph.weights
    assert (table == table.T).all()
    assert (table.diagonal() == 0).all()
    own = np.sqrt(together.diagonal())
    cosine = together / own / own[:, None]
    np.fill_diagonal(cosine, -1)
    for row in range(64):
        strongest = np.argsort(-cosine[row])[:5]
        assert table[row, strongest] == pytest.approx(1000 * cosine[row, strongest], abs=1)
    silent = together.copy()
    silent[3] = silent[:, 3] = 0
    graph = strongest_graph(silent, neighbours=5)
    assert graph.starts[3] == graph.starts[4]


@pytest.mark.parametrize("edges", ["strongest", "percentile"])
def test_planted_groups_are_found(edges: str) -> None:
    values, truth = planted(groups=4, size=24, tokens=400, seed=1)
    together = co_activation(np.array_split(values, 3))
    graph = (
        strongest_graph(together, neighbours=12) if edges == "strongest"
        else percentile_graph(together)
    )  # fmt: skip
    labels = equalise(partition(graph, 4, seed=0), graph, 4, seed=0)
    table = np.zeros((4, 4), int)
    np.add.at(table, (labels, truth), 1)
    assert sorted(table.max(1).tolist()) == [24] * 4
    assert (partition(graph, 4, seed=0) == partition(graph, 4, seed=0)).all()


def test_equalising_moves_the_surplus_only(features: np.ndarray) -> None:
    golden = json.loads((V1 / "graph_rebalance.json").read_text())
    rough, reference = np.array(golden["partition"]), np.array(golden["rebalanced"])
    graph = strongest_graph(co_activation(features), neighbours=16)
    for seed in range(3):
        labels = equalise(rough, graph, 4, seed=seed)
        assert np.bincount(labels).tolist() == [16] * 4
        surplus = np.maximum(np.bincount(rough, minlength=4) - 16, 0)
        moved = labels != rough
        assert np.bincount(rough[moved], minlength=4).tolist() == surplus.tolist()
        assert moved.sum() == (reference != rough).sum()
    assert (equalise(labels, graph, 4, seed=9) == labels).all()


def test_equalising_follows_the_links() -> None:
    # 0 and 1 are linked, 2 and 3 are linked; 4 and 5 hang on 3. All but 0 start in part 1.
    pairs = {(0, 1): 9, (2, 3): 9, (3, 4): 5, (3, 5): 5}
    both = sorted((*p, w) for (a, b), w in pairs.items() for p in ((a, b), (b, a)))
    rows, links, weights = (np.array(column) for column in zip(*both, strict=True))
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=6))])
    graph = Graph(starts, links, weights)
    labels = equalise(np.array([0, 1, 1, 1, 1, 1]), graph, 2, seed=0)
    assert labels[:4].tolist() == [0, 0, 1, 1]
    assert np.bincount(labels).tolist() == [3, 3]


def test_graphs_without_links_are_cut_all_the_same() -> None:
    nothing = strongest_graph(np.zeros((12, 12), np.float32), neighbours=3)
    assert np.bincount(partition(nothing, 3, seed=0)).tolist() == [4, 4, 4]
    with pytest.raises(UserError, match="never active together"):
        percentile_graph(np.zeros((12, 12), np.float32))
    with pytest.raises(UserError, match="no text"):
        co_activation([])
