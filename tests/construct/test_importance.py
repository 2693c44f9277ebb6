"""Neuron importance: the original's figures, what a score means, batches, clusters of text."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moesaic.construct.importance import Scoring, cluster_scores, neuron_importance, similar_rows
from moesaic.construct.splits.gradient import Gradient
from moesaic.core.errors import UserError
from moesaic.models.load import load
from tests.construct.dense_models import write_dense, write_text_tokenizer
from tests.helpers import GOLDEN

V1 = GOLDEN / "llama_moe_v1"
KERNELS = {"plain": "plain", "l1": "l1_norm", "l2": "l2_norm"}


def largest(values: np.ndarray) -> float:
    return float(np.abs(values).max())


@pytest.fixture(scope="module")
def model() -> Any:
    return load(V1 / "dense")


@pytest.fixture(scope="module")
def batches() -> list[torch.Tensor]:
    return list(torch.from_numpy(np.load(V1 / "neuron_importance.npz")["batches"]))


@pytest.mark.parametrize(
    ("level", "kernel", "kind", "hook"),
    itertools.product(
        ["sample", "total"], KERNELS, ["feature_grad", "feature_change"], ["up", "gate"]
    ),
)
def test_scores_are_the_originals(
    level: Any, kernel: Any, kind: Any, hook: Any, model: Any, batches: list[torch.Tensor]
) -> None:
    golden = np.load(V1 / "neuron_importance.npz")
    scores = neuron_importance(model, batches, Scoring(hook, kind, level, kernel, "original"))
    wanted = golden[f"{level}.{KERNELS[kernel]}.{kind}.{hook}_proj"]
    assert scores == pytest.approx(wanted, rel=1e-4, abs=1e-5 * largest(wanted))


@pytest.mark.parametrize("level", ["sample", "total"])
@pytest.mark.parametrize("kernel", list(KERNELS))
@pytest.mark.parametrize("hook", ["up", "gate"])
def test_the_batch_size_does_not_matter(
    level: Any, kernel: Any, hook: Any, model: Any, batches: list[torch.Tensor]
) -> None:
    scoring = Scoring(hook, "feature_change", level, kernel)
    one_by_one = neuron_importance(model, batches, scoring)
    together = neuron_importance(model, [torch.cat(batches)], scoring)
    assert together == pytest.approx(one_by_one, rel=1e-3, abs=1e-5 * largest(one_by_one))


@pytest.mark.parametrize("layer", [0, 1])
def test_total_change_is_the_slope_of_the_loss_in_a_neurons_scale(
    layer: int, model: Any, batches: list[torch.Tensor]
) -> None:
    scoring = Scoring("up", "feature_change", "total", "plain")
    scores = neuron_importance(model, batches, scoring)
    ids = torch.cat(batches)
    for neuron in (3, 40):
        losses = []
        for factor in (1.01, 0.99):
            changed = copy.deepcopy(model).double()
            changed.model.layers[layer].mlp.down_proj.weight.data[:, neuron] *= factor
            with torch.no_grad():
                logits = changed(input_ids=ids).logits[:, :-1].flatten(0, 1)
                losses.append(torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()))
        slope = float(losses[0] - losses[1]) / 0.02
        assert scores[layer, neuron] == pytest.approx(slope, rel=5e-3)


def test_the_model_is_left_as_it_was(model: Any, batches: list[torch.Tensor]) -> None:
    frozen = model.model.norm.weight
    frozen.requires_grad_(False)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    needed = [weight.requires_grad for weight in model.parameters()]
    neuron_importance(model, batches[:1])
    assert [weight.requires_grad for weight in model.parameters()] == needed
    assert all(weight.grad is None for weight in model.parameters())
    assert all((before[name] == weight).all() for name, weight in model.named_parameters())
    hooks = [m._forward_hooks or m._forward_pre_hooks for m in model.modules()]
    assert not any(hooks)
    frozen.requires_grad_(True)


def test_no_text_and_too_short_rows_are_refused(model: Any) -> None:
    with pytest.raises(UserError, match="no text"):
        neuron_importance(model, [])
    with pytest.raises(UserError, match="at least 2 tokens"):
        neuron_importance(model, [torch.zeros(3, 1, dtype=torch.long)])


def test_similar_rows_are_found_and_clusters_are_equal() -> None:
    rng = np.random.default_rng(0)
    topics = rng.permutation(np.arange(60) % 3)
    common = rng.integers(0, 20, size=(60, 40))
    own = 20 + 15 * topics[:, None] + rng.integers(0, 15, size=(60, 24))
    labels = similar_rows(np.concatenate([common, own], axis=1), 3, seed=1)
    table = np.zeros((3, 3), int)
    np.add.at(table, (labels, topics), 1)
    assert sorted(table.max(1).tolist()) == [20, 20, 20]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense")
    write_text_tokenizer(path)
    return write_dense(path)


def test_one_score_vector_per_cluster(dense: Path) -> None:
    folder = dense / "text"
    folder.mkdir()
    (folder / "cats.txt").write_text("cat sat on a mat. " * 40)
    (folder / "songs.txt").write_text("we sing all day long, you hum. " * 40)
    method = Gradient(tokens=512, context=32, clusters="domains")
    by_domain = cluster_scores(dense, folder, method, 2, seed=0)
    assert by_domain.shape == (2, 2, 48)
    alone = cluster_scores(
        dense, folder / "songs.txt", Gradient(tokens=256, context=32, clusters="domains"), 1, seed=0
    )
    assert by_domain[:, 1] == pytest.approx(alone[:, 0], rel=1e-4)
    by_text = cluster_scores(dense, folder, Gradient(tokens=512, context=32), 2, seed=0)
    assert by_text.shape == (2, 2, 48)
    # Two topics of equal length: clusters of similar text are the domains, in either order.
    flipped = by_text[:, ::-1]
    assert any(np.allclose(found, by_domain, rtol=1e-3) for found in (by_text, flipped))
    with pytest.raises(UserError, match="clusters=domains needs 3 domains"):
        cluster_scores(dense, folder, method, 3, seed=0)
    with pytest.raises(UserError, match="too few for 40 clusters"):
        cluster_scores(dense, folder, Gradient(tokens=512, context=32), 40, seed=0)
