"""NeuronSplit, the split function, and the methods that look at weights or nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moesaic.construct.balanced_kmeans import balanced_kmeans
from moesaic.construct.points import scale_to_unit
from moesaic.construct.split import NeuronSplit, make_split, split
from moesaic.construct.splits import SPLITS
from moesaic.construct.splits.cluster import Cluster
from moesaic.core.errors import UserError
from moesaic.core.lineage import read_lineage
from tests.construct.dense_models import write_dense, write_text_tokenizer
from tests.helpers import GOLDEN, assert_user_error, run_cli

V1 = GOLDEN / "llama_moe_v1"
DENSE = V1 / "dense"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense")
    write_text_tokenizer(path)
    return write_dense(path)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    words = ["the cat sat on a mat. ", "one dog ran to the red barn. ", "we sing all day. "]
    path.write_text("".join(words[i % 3][i % 7 :] for i in range(400)))
    return path


def test_random_repeats_the_original_under_its_seed() -> None:
    golden = np.load(V1 / "split_random.npz")
    made = split(DENSE, method="random", experts=4, seed=int(golden["python_random_seed"]))
    assert all((made.labels(i) == golden["labels"][i]).all() for i in range(2))
    assert made.exact
    assert made.coverage() == [1.0, 1.0]
    assert made.sizes() == [[16] * 4] * 2


def test_random_needs_the_config_only_and_differs_by_seed_and_layer(tmp_path: Path) -> None:
    config = {
        "model_type": "llama",
        "num_hidden_layers": 3,
        "intermediate_size": 60,
        "hidden_size": 8,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    first, second = (split(tmp_path, method="random", experts=5, seed=s) for s in (0, 1))
    labels = [first.labels(0), first.labels(1), second.labels(0)]
    assert not any((a == b).all() for a, b in [labels[:2], labels[::2], labels[1:]])
    shared = split(tmp_path, method="random", experts=5, shared=2, seed=0)
    assert shared.num_experts == 3
    assert shared.num_shared == 2
    assert shared.exact


@pytest.mark.parametrize("method", [name for name in SPLITS.names() if name != "imported"])
@pytest.mark.parametrize("experts", [2, 4])
def test_every_method_gives_what_it_promises(
    method: str, experts: int, dense: Path, text: Path
) -> None:
    shared = int(method == "sharing-inter")
    settings: dict[str, Any] = {"method": method}
    if SPLITS.get(method).needs_data:
        settings |= {"tokens": 1024, "context": 32}
    made, again = (
        split(dense, method=settings, experts=experts, shared=shared, data=text, seed=4)
        for _ in range(2)
    )
    assert made.layers == 2
    assert made.num_experts == experts - shared
    assert made.num_shared == shared
    assert made.sizes() == [[48 // experts] * (experts - shared)] * 2
    for layer in range(2):
        for a, b in zip(made.experts[layer], again.experts[layer], strict=True):
            assert (a == b).all()
    if not method.startswith("sharing"):
        assert made.exact
        ids = made.experts[1][0]
        assert (np.diff(ids) > 0).all()
    json.dumps(made.meta)


@pytest.mark.parametrize("projection", ["up", "gate"])
@pytest.mark.parametrize("metric", ["l2", "cos"])
def test_cluster_reads_the_right_rows(projection: Any, metric: Any) -> None:
    made = split(DENSE, method=Cluster(metric=metric, projection=projection), experts=4, seed=7)
    weights = load_file(DENSE / "model.safetensors")
    for layer in range(2):
        rows = weights[f"model.layers.{layer}.mlp.{projection}_proj.weight"].astype(np.float32)
        scale_to_unit(rows)
        labels = balanced_kmeans(rows, 4, metric=metric, seed=7 + layer).labels
        assert (made.labels(layer) == labels).all()


def test_cluster_leaves_the_checkpoint_alone(dense: Path) -> None:
    before = (dense / "model.safetensors").read_bytes()
    split(dense, method="cluster", experts=4)
    assert (dense / "model.safetensors").read_bytes() == before


def test_save_and_load_keep_everything(tmp_path: Path) -> None:
    uneven = NeuronSplit(
        [[np.array([5, 1]), np.array([0, 2, 3])], [np.array([4]), np.array([5, 0])]],
        [[np.array([4])], [np.array([1, 2, 4])]],
        6,
        {"method": "by hand", "seed": 3},
    )
    path = uneven.save(tmp_path / "a.safetensors")
    back = NeuronSplit.load(path)
    assert back.meta == uneven.meta
    assert back.width == 6
    for name in ("experts", "shared"):
        for layer, loaded in zip(getattr(uneven, name), getattr(back, name), strict=True):
            assert [ids.tolist() for ids in layer] == [ids.tolist() for ids in loaded]
            assert all(ids.dtype == np.int64 for ids in loaded)
    assert not uneven.exact
    assert uneven.coverage() == [1.0, pytest.approx(5 / 6)]
    assert uneven.copies(1).tolist() == [1, 1, 1, 0, 2, 1]
    assert uneven.labels(0).tolist() == [1, 0, 1, 1, 2, 0]
    with pytest.raises(UserError, match="Layer 1 of this split repeats or drops"):
        uneven.labels(1)


@pytest.mark.parametrize(
    ("experts", "shared", "message"),
    [
        ([[[0, 1], [2, 6]]], [[]], "holds neuron 6, but neurons run from 0 to 5"),
        ([[[0, -1]]], [[]], "holds neuron -1"),
        ([[[0, 0]]], [[]], "layer 0, expert 0 of the split holds a neuron twice"),
        ([[[0], []]], [[]], "expert 1 of the split holds no neuron"),
        ([[[0], [1]], [[0]]], [[], []], r"Layers with \[1, 2\] experts"),
        ([[[0]], [[0]]], [[]], "2 layers of experts but 1 of shared"),
        ([[]], [[]], "without routed experts"),
        ([], [], "0 layers"),
        ([[[0.5]]], [[]], "type float64"),
        ([[[[0], [1]]]], [[]], "shape"),
    ],
)
def test_impossible_splits_are_refused(experts: Any, shared: Any, message: str) -> None:
    layers = [[np.array(ids) for ids in layer] for layer in experts]
    layers = [[ids.astype(int) if not ids.size else ids for ids in layer] for layer in layers]
    with pytest.raises(UserError, match=message):
        NeuronSplit(layers, [[np.array(i) for i in layer] for layer in shared], 6)


def test_files_that_are_no_split_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no split at"):
        NeuronSplit.load(tmp_path)
    save_file({"a": np.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="format 'unknown'"):
        NeuronSplit.load(tmp_path / "other.safetensors")
    path = split(DENSE, experts=4).save(tmp_path / "split.safetensors")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match="may be truncated"):
        NeuronSplit.load(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"experts": 5}, "experts=5 does not divide the 64 neurons .* such as 4 or 8."),
        ({"experts": 65}, "such as 64."),
        ({"experts": 0}, "experts=0"),
        ({"experts": 4, "shared": 4}, "fewer shared than experts"),
        ({"experts": 4, "method": "clustr"}, "Did you mean 'cluster'"),
        ({"experts": 4, "method": "cluster", "shared": 1}, "makes no shared experts"),
        ({"experts": 4, "method": "gradient"}, "no data was given"),
        ({"experts": 4, "method": "sharing-inter"}, "needs shared experts"),
        ({"experts": 4, "method": {"method": "cluster", "metrc": "cos"}}, "Did you mean 'metric'"),
        ({"experts": 4, "method": {"metric": "cos"}}, "name no method"),
        ({"experts": 4, "method": {"method": "coactivation", "tokens": 0}}, "'tokens' is 0"),
        ({"experts": 4, "method": {"method": "gradient", "context": 1}}, "'context' is 1"),
        ({"experts": 4, "seed": -1}, "seed=-1"),
        ({"experts": 4, "data": "nowhere.jsonl"}, "no such file"),
    ],
)
def test_wrong_requests_name_the_cure(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        split(DENSE, **arguments)


def test_other_models_and_nan_are_refused(tmp_path: Path, dense: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        split(tmp_path, experts=4)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="type 'gpt2'"):
        split(tmp_path, experts=4)
    (tmp_path / "config.json").write_bytes((dense / "config.json").read_bytes())
    weights = load_file(dense / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 2] = np.nan
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"):
        split(tmp_path, method="cluster", experts=4)


def test_command_writes_a_directory_that_others_read(tmp_path: Path, dense: Path) -> None:
    out = tmp_path / "split"
    result = run_cli(
        "split", dense, "-o", out, "--method", "cluster", "--experts", 4,
        "--set", "metric=cos", "--seed", 3, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert result.json["exact"] is True
    assert result.json["expert_width"] == [12, 12]
    made = NeuronSplit.load(out)
    assert made.meta["settings"] == {"metric": "cos", "projection": "up"}
    assert json.loads((out / "split.json").read_text())["seed"] == 3
    lineage = read_lineage(out)
    assert lineage is not None
    assert lineage["step"] == "split"
    assert lineage["parent"] == str(dense)
    again = run_cli("split", dense, "-o", out, "--experts", 4)
    assert_user_error(again, "not empty")
    text = run_cli("split", dense, "-o", out, "--experts", 4, "--overwrite")
    assert text.stdout.splitlines()[-1] == str(out)
    assert "every neuron once" in text.stdout


def test_command_says_when_neurons_repeat_or_vanish(
    tmp_path: Path, dense: Path, text: Path
) -> None:
    (tmp_path / "inner.yaml").write_text("method: sharing-inner\ntokens: 1024\ncontext: 32\n")
    out = tmp_path / "out"
    arguments = ["split", dense, "-o", out, "--method", tmp_path / "inner.yaml", "--experts", 4]
    result = run_cli(*arguments, "--data", text)
    assert result.exit_code == 0, result.stderr
    assert "neurons repeat or vanish" in result.stdout
    assert "neurons repeat or vanish" in result.stderr
    scores = load_file(out / "scores.safetensors")["scores"]
    assert scores.shape == (2, 4, 48)
    # Scores can be used again: no data, the same split.
    again = make_split(
        dense,
        out=tmp_path / "again",
        method={"method": "sharing-inner", "scores": str(out)},
        experts=4,
    )
    first, second = NeuronSplit.load(out), NeuronSplit.load(again)
    for a, b in zip(first.experts[1], second.experts[1], strict=True):
        assert (a == b).all()


def test_nothing_is_written_when_a_split_fails(tmp_path: Path, dense: Path) -> None:
    out = tmp_path / "out"
    assert_user_error(run_cli("split", dense, "-o", out, "--experts", 5), "does not divide")
    assert_user_error(
        run_cli("split", dense, "-o", out, "--experts", 4, "--method", "gradient"), "no data"
    )
    assert list(tmp_path.iterdir()) == []
