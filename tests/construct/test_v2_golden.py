"""LLaMA-MoE-v2's own numbers: gates, scores, splits, conversions (tests/golden/llama_moe_v2)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moesaic.construct.align import align, corrections
from moesaic.construct.attention import attention, open_v2
from moesaic.construct.cluster_importance import TokenBatch, cluster_importance
from moesaic.construct.convert import convert
from moesaic.construct.dense import open_dense
from moesaic.construct.hidden import hidden_layers
from moesaic.construct.legacy_v2 import read_gates, read_indices, read_scores
from moesaic.construct.sized_kmeans import nearest, size_bounds, sized_kmeans
from moesaic.construct.split import NeuronSplit, split
from moesaic.core.errors import UserError
from tests.helpers import GOLDEN

V2 = GOLDEN / "llama_moe_v2"
DENSE = V2 / "dense"
# Conversations in the order of the original's shuffled loader; found by matching kmeans/layer0's X.
ORDER = [50, 46, 4, 8, 37, 20, 47, 36, 17, 26, 29, 54, 38, 32, 52, 16]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        found |= load_file(file)
    return found


def same(made: NeuronSplit, wanted: NeuronSplit) -> None:
    for name in ("experts", "shared"):
        for layer, other in zip(getattr(made, name), getattr(wanted, name), strict=True):
            for ids, others in zip(layer, other, strict=True):
                np.testing.assert_array_equal(ids, others)


def calibration() -> tuple[torch.Tensor, torch.Tensor]:
    """The 567 tokens behind gates and distributions: ids [16, C], real [16, C]."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DENSE)
    lines = (V2 / "data.jsonl").read_text().splitlines()
    rows = []
    for number in ORDER:
        user, assistant = (turn["value"] for turn in json.loads(lines[number])["conversations"])
        text = (
            f"<|start_header_id|>user<|end_header_id|>\n\n{user}<|eot_id|><|start_header_id|>"
            f"assistant<|end_header_id|>\n\n{assistant}<|eot_id|>"
        )
        rows.append(torch.tensor(tokenizer(text).input_ids))
    ids_BC = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths_B = torch.tensor([len(row) for row in rows])
    return ids_BC, torch.arange(ids_BC.shape[1]) < lengths_B[:, None]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vanilla", {"experts": 4, "top_k": 2, "scale": 2.0}),
        (
            "vanilla_gsp",
            {
                "top_k": 2,
                "split": V2 / "split/e4_shareFalse/neuron_indices.pt",
                "router": V2 / "gates/e4/gate_weights.pt",
            },
        ),
        (
            "residual",
            {
                "top_k": 2,  # the shared one and one of three
                "scale": 1.5,
                "split": V2 / "split/r1e3_shareFalse/neuron_indices.pt",
                "router": V2 / "gates/e3/gate_weights.pt",
            },
        ),
        ("vanilla_contract1", {"experts": 4, "top_k": 2, "contract_layers": 1}),
    ],
)
def test_conversions_are_the_originals_bit_for_bit(tmp_path, name, options):
    made = convert(DENSE, out=tmp_path / "out", preset="llama-moe-v2", **options)
    found, wanted = tensors(made), tensors(V2 / name)
    for llama, ours in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
        # The original leaves contract layers names that its own model does not read.
        wanted = {
            key.replace(f".mlp.{llama}.", f".block_sparse_moe.{ours}."): tensor
            for key, tensor in wanted.items()
        }
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor), key  # kaiming gates too: seed 0
    config, original = (json.loads((p / "config.json").read_text()) for p in (made, V2 / name))
    for field in (
        "intermediate_size",
        "intermediate_size_residual",
        "num_local_experts",
        "num_experts_per_tok",
        "scale_factor",
        "num_moe_contract_layers",
    ):
        assert config[field] == original[field], field
    assert config["model_type"] == "llama_moe_v2"
    assert config["sliding_window"] is None  # the original's 4096 is a defect
    record = json.loads((made / "moesaic.json").read_text())
    assert record["exact"]
    assert record["difference"] < 1e-4


def test_attention_experts_are_the_originals(tmp_path):
    made = attention(V2 / "vanilla", out=tmp_path / "out", top_k=1, scale=2.0)
    found, wanted = tensors(made), tensors(V2 / "attn_moe")
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        if key.endswith("self_attn.gate.weight"):  # drawn without a seed
            assert found[key].shape == tensor.shape
            assert float(found[key].abs().max()) <= 32**-0.5
        else:
            assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("tokens_at_once", [16_384, 50])
@pytest.mark.parametrize("gates", ["e3", "e4"])
def test_importance_scores_are_the_originals(gates, tokens_at_once):
    batches = [
        TokenBatch(one["input_ids"], one["labels"], one["attention_mask"].bool())
        for one in torch.load(V2 / f"scores/{gates}/batches.pt", weights_only=True)
    ]
    gates_LED = torch.from_numpy(np.stack(read_gates(V2 / f"gates/{gates}/gate_weights.pt")))
    found, counts = cluster_importance(
        open_dense(DENSE), gates_LED, batches, tokens_at_once=tokens_at_once
    )
    wanted = read_scores(V2 / f"scores/{gates}/importance_scores.pt")
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-7)
    assert counts.sum(1).tolist() == [264] * 4


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(("name", "gates", "shared"), [("e4", "e4", 0), ("r1e3", "e3", 1)])
def test_neuron_indices_are_the_originals(name, gates, shared, share):
    settings = {
        "method": "gradient-plus",
        "share": share,
        "scores": V2 / f"scores/{gates}/importance_scores.pt",
    }
    made = split(DENSE, method=settings, experts=4, shared=shared)
    same(made, read_indices(V2 / f"split/{name}_share{share}/neuron_indices.pt", width=64))
    assert made.exact is not share


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("gates", ["e3", "e4"])
def test_clusters_keep_the_bounds_and_are_as_tight_as_the_originals(gates, layer):
    golden = np.load(V2 / f"gates/{gates}/kmeans/layer{layer}.npz")
    x_ND, experts = torch.from_numpy(golden["X"]).float(), len(golden["centers"])
    smallest, largest = size_bounds(len(x_ND), experts, 0.4)
    assert (smallest, largest) == (int(golden["size_min"]), int(golden["size_max"]))
    found = sized_kmeans(x_ND, experts, smallest=smallest, largest=largest, starts=8)
    sizes = found.labels_N.bincount(minlength=experts)
    assert smallest <= int(sizes.min())
    assert int(sizes.max()) <= largest
    assert found.inertia <= 1.002 * float(golden["inertia"])
    # The prices alone place nearly every point where the bounded assignment has it.
    again_N = nearest(x_ND, found.centers_ED, found.prices_E, "l2")
    assert float((again_N == found.labels_N).float().mean()) > 0.98
    # and the golden gates are the means of their clusters, unscaled
    means = torch.stack(
        [x_ND[torch.from_numpy(golden["labels"] == e)].mean(0) for e in range(experts)]
    )
    gate = torch.from_numpy(read_gates(V2 / f"gates/{gates}/gate_weights.pt")[layer])
    torch.testing.assert_close(gate, means, rtol=0, atol=1e-2)


def test_hidden_features_are_the_originals():
    ids_BC, real_BC = calibration()
    for seen in hidden_layers(open_dense(DENSE), ids_BC, real_BC):
        if seen.layer in (0, 2):
            wanted = np.load(V2 / f"gates/e4/kmeans/layer{seen.layer}.npz")["X"]
            features_TD = torch.cat(list(seen.features()))
            np.testing.assert_allclose(features_TD.numpy(), wanted, rtol=0, atol=1e-4)


def test_randomly_selected_gates_are_features():
    gates = read_gates(V2 / "gates/e4_random/gate_weights.pt")
    ids_BC, real_BC = calibration()
    for seen in hidden_layers(open_dense(DENSE), ids_BC, real_BC):
        features_TD = torch.cat(list(seen.features()))
        far = torch.cdist(torch.from_numpy(gates[seen.layer]), features_TD).min(1).values
        assert float(far.max()) < 1e-2


def test_distributions_and_the_first_alignment_are_the_originals():
    from moesaic.models.families.llama_moe_v2 import LlamaMoEV2Config

    ids_BC, real_BC = calibration()
    checkpoint, fields = open_v2(V2 / "vanilla_gsp")
    assert fields is not None
    config = LlamaMoEV2Config(**{k: v for k, v in fields.items() if k != "model_type"})
    golden = torch.load(V2 / "align/distribution.pt", weights_only=True)
    scales = torch.load(V2 / "align/vanilla_gsp_aligned/scale_factors.pt", weights_only=True)
    found = corrections(open_dense(DENSE), checkpoint, config, ids_BC, real_BC, original=True)
    for layer, (wanted, corrected) in enumerate(found):
        for part, values in wanted.items():
            assert values.number == 567
            close = {"rtol": 0, "atol": 1e-6, "check_dtype": False}
            torch.testing.assert_close(values.mean_D, golden[layer][part]["mean"], **close)
            # The original adds up variances of batches, each divided by its tokens less one.
            close = {"rtol": 8e-3, "atol": 0, "check_dtype": False}
            torch.testing.assert_close(values.variance_D, golden[layer][part]["variance"], **close)
        if layer == 0:  # later layers seem to have seen other text (a loader that shuffles anew)
            wanted_scale = scales[0]["mlp"]["scale_magnitude"]
            torch.testing.assert_close(corrected["mlp"].scale_D, wanted_scale, rtol=0, atol=2e-4)
            wanted_bias = scales[0]["mlp"]["scale_bias"]
            torch.testing.assert_close(corrected["mlp"].bias_D, wanted_bias, rtol=0, atol=2e-4)


def test_the_original_s_distribution_takes_the_place_of_measuring(tmp_path):
    file = V2 / "align/distribution.pt"
    golden = torch.load(file, weights_only=True)
    settings = {"reference": DENSE, "data": tmp_path / "text.txt", "tokens": 512, "context": 64}
    words = (f"w{number % 90}" for number in np.random.default_rng(3).integers(0, 90, 2000))
    settings["data"].write_text(" ".join(words))
    out = align(V2 / "vanilla_gsp", out=tmp_path / "out", distribution=file, **settings)
    kept = load_file(out / "distribution.safetensors")
    for layer, parts in golden.items():
        for part, held in parts.items():
            for name in ("mean", "variance"):
                found = kept[f"layers.{layer}.{part}.{name}"]
                torch.testing.assert_close(found, held[name].float(), rtol=1e-6, atol=0)
    measured = load_file(
        align(V2 / "vanilla_gsp", out=tmp_path / "own", **settings) / "distribution.safetensors"
    )
    scale = "layers.1.mlp.scale_magnitude"
    # the same mixture on the same text: what is wanted of it alone makes the difference
    ratio = (kept["layers.0.mlp.variance"] / measured["layers.0.mlp.variance"]).sqrt()
    first = scale.replace(".1.", ".0.")
    torch.testing.assert_close(kept[first] / measured[first], ratio, rtol=1e-4, atol=0)
    assert not torch.allclose(kept[scale], measured[scale], rtol=1e-2)
    torch.save({layer: golden[layer] for layer in range(3)}, tmp_path / "distribution.pt")
    for bad, message in (
        ("distribution.pt", "3 layers of 32 channels.*has 4 of 32"),
        ("gates/e4/gate_weights.pt", "no number, mean, variance of attn"),
    ):
        path = V2 / bad if "gates" in bad else tmp_path / bad
        with pytest.raises(UserError, match=message):
            align(V2 / "vanilla_gsp", out=tmp_path / "no", distribution=path, **settings)
