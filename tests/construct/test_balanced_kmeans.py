"""Balanced k-means: exact sizes, quality against the reference's and brute force, memory, ties."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from moesaic.construct.balanced_kmeans import balanced_kmeans, rounds
from moesaic.construct.points import scale_to_unit
from moesaic.core.errors import UserError
from tests.helpers import GOLDEN

V1 = GOLDEN / "llama_moe_v1"
REFERENCE: dict[str, Any] = json.loads((V1 / "split_clustering.json").read_text())


def within_ss(rows: np.ndarray, labels: np.ndarray) -> float:
    """The meaning of the figure, one cluster at a time."""
    rows = rows.astype(np.float64)
    return sum(
        float(((rows[labels == c] - rows[labels == c].mean(0)) ** 2).sum())
        for c in np.unique(labels)
    )


def cosines(rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Cosine of every row to its cluster's mean, both about the mean of all rows."""
    rows = rows.astype(np.float64) - rows.mean(0, dtype=np.float64)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    means = np.stack([rows[labels == c].mean(0) for c in range(labels.max() + 1)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    return (unit * means[labels]).sum(1)


def unit_rows(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float32, copy=True)
    scale_to_unit(rows)
    return rows


@pytest.mark.parametrize("name", [name for name in REFERENCE if name != "planted_512x64_8"])
def test_no_worse_than_the_reference_on_real_layers(name: str) -> None:
    projection, metric, layer = name.split(".")
    weights = load_file(V1 / "dense" / "model.safetensors")
    rows = unit_rows(weights[f"model.layers.{layer[5:]}.mlp.{projection}.weight"])
    for seed in range(3):
        found = balanced_kmeans(rows, 4, metric=metric, seed=seed)  # type: ignore[arg-type]
        assert np.bincount(found.labels).tolist() == [16, 16, 16, 16]
        assert within_ss(rows, found.labels) <= REFERENCE[name]["within_ss_normalised_rows"]
        if metric == "cos":
            distance = ((1 - cosines(rows, found.labels)) ** 2).sum()
            assert distance <= REFERENCE[name]["inertia_reported"]


def test_finds_planted_clusters() -> None:
    planted = np.load(V1 / "split_clustering.npz")
    rows, truth = unit_rows(planted["planted.X"]), planted["planted.truth"]
    for metric in ("l2", "cos"):
        labels = balanced_kmeans(rows, 8, metric=metric, seed=5).labels  # type: ignore[arg-type]
        table = np.zeros((8, 8), int)
        np.add.at(table, (labels, truth), 1)
        assert (np.sort(table, axis=1)[:, -1] == 64).all(), metric
    best = REFERENCE["planted_512x64_8"]["within_ss_normalised_rows"]
    assert balanced_kmeans(rows, 8, seed=1).within_ss <= best * (1 + 1e-6)


def test_equals_brute_force_on_eight_rows() -> None:
    for seed in range(5):
        rows = np.random.default_rng(seed).standard_normal((8, 3)).astype(np.float32)
        best = min(
            within_ss(rows, np.isin(np.arange(8), half).astype(int))
            for half in itertools.combinations(range(8), 4)
        )
        assert balanced_kmeans(rows, 2, seed=seed).within_ss == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize(
    ("count", "clusters"), [(63, 7), (40, 5), (12, 12), (12, 1), (6, 3), (1, 1)]
)
@pytest.mark.parametrize("metric", ["l2", "cos"])
def test_sizes_and_figures_are_exact(count: int, clusters: int, metric: Any) -> None:
    rows = np.random.default_rng(count).standard_normal((count, 9)).astype(np.float32) + 3
    found = balanced_kmeans(rows, clusters, metric=metric, seed=2)
    assert np.bincount(found.labels, minlength=clusters).tolist() == [count // clusters] * clusters
    assert found.within_ss == pytest.approx(within_ss(rows, found.labels), rel=1e-4, abs=1e-3)
    assert found.total_ss == pytest.approx(
        within_ss(rows, np.zeros(count, int)), rel=1e-4, abs=1e-4
    )
    if 1 < clusters < count:
        assert found.mean_cosine == pytest.approx(cosines(rows, found.labels).mean(), abs=1e-4)


def test_seeds_repeat_and_large_common_mean_does_not_matter() -> None:
    rows = np.random.default_rng(0).standard_normal((240, 20)).astype(np.float32)
    first, again = balanced_kmeans(rows, 6, seed=3), balanced_kmeans(rows, 6, seed=3)
    assert (first.labels == again.labels).all()
    moved = balanced_kmeans(rows + 100, 6, seed=3)
    assert moved.within_ss == pytest.approx(first.within_ss, rel=0.02)


def test_annealing_goes_beyond_exchanges_and_these_beyond_lloyd() -> None:
    """Wide rows without structure, where a row's own part of its cluster's sum weighs most."""
    rows = unit_rows(np.random.default_rng(4).standard_normal((960, 512)))
    found = balanced_kmeans(rows, 8, seed=0)
    exchanged = balanced_kmeans(rows, 8, seed=0, steps=0)
    best, good = (1 - r.within_ss / r.total_ss for r in (found, exchanged))
    assert best > 1.02 * good
    assert good > 1.2 * lloyd_explains(rows, 8)


def lloyd_explains(rows: np.ndarray, clusters: int) -> float:
    """Share of variance that balanced Lloyd steps reach: each step one greedy sorted assignment."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(len(rows)) % clusters)
    room = len(rows) // clusters
    for _ in range(30):
        means = np.stack([rows[labels == c].mean(0) for c in range(clusters)])
        near = rows @ means.T
        left = [room] * clusters
        labels = np.full(len(rows), -1)
        for flat in np.argsort(-near, axis=None):
            row, cluster = divmod(int(flat), clusters)
            if labels[row] < 0 and left[cluster]:
                labels[row], left[cluster] = cluster, left[cluster] - 1
    return 1 - within_ss(rows, labels) / within_ss(rows, np.zeros(len(rows), int))


def test_equal_rows_and_rows_of_zeros_do_not_hang_or_give_nan() -> None:
    rows = np.zeros((32, 5), np.float32)
    rows[16:, 0] = 1
    for metric in ("l2", "cos"):
        found = balanced_kmeans(rows, 2, metric=metric)  # type: ignore[arg-type]
        assert found.within_ss == pytest.approx(0, abs=1e-5)
        assert np.isfinite(found.mean_cosine)
        same = balanced_kmeans(np.ones((12, 4), np.float32), 3, metric=metric)  # type: ignore[arg-type]
        assert np.bincount(same.labels).tolist() == [4, 4, 4]


@pytest.mark.parametrize("metric", ["l2", "cos"])
def test_the_matrix_is_neither_changed_nor_copied(metric: Any) -> None:
    rows = unit_rows(np.random.default_rng(1).standard_normal((3072, 2048)))
    before = rows.copy()
    tracemalloc.start()
    try:
        balanced_kmeans(rows, 8, metric=metric, steps=3)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (rows == before).all()
    assert peak < 0.7 * rows.nbytes


def test_refuses_sizes_that_do_not_divide_and_values_that_are_not_finite() -> None:
    rows = np.ones((10, 2), np.float32)
    with pytest.raises(UserError, match="10 rows cannot make 3 clusters"):
        balanced_kmeans(rows, 3)
    rows[3, 1] = np.nan
    with pytest.raises(UserError, match="NaN"):
        balanced_kmeans(rows, 2)


@pytest.mark.parametrize("clusters", [1, 2, 5, 8, 16])
def test_rounds_meet_every_pair_once(clusters: int) -> None:
    seen = []
    for a_P, b_P in rounds(clusters):
        assert len({*a_P.tolist(), *b_P.tolist()}) == 2 * len(a_P)
        seen += [tuple(sorted(pair)) for pair in zip(a_P.tolist(), b_P.tolist(), strict=True)]
    assert sorted(seen) == list(itertools.combinations(range(clusters), 2))
