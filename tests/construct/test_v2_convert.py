"""LLaMA-MoE-v2 made of small models: exactness, routers from text, alignment, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from moesaic.construct.align import align
from moesaic.construct.attention import attention
from moesaic.construct.convert import convert
from moesaic.construct.dense import open_dense
from moesaic.construct.hidden import HiddenSettings, hidden_gates
from moesaic.construct.router import RouterInit
from moesaic.construct.sized_kmeans import size_bounds, sized_kmeans
from moesaic.construct.split import NeuronSplit, split
from moesaic.core.errors import UserError
from moesaic.models.load import load
from tests.construct.dense_models import edit_config, write_dense, write_text_tokenizer
from tests.helpers import assert_user_error, run_cli


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    path = write_dense(tmp_path_factory.mktemp("dense") / "m", num_hidden_layers=3)
    write_text_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    letters = np.random.default_rng(0).choice(list("abcdefghij .xyz"), (60, 80))
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": "".join(row)}) for row in letters))
    return path


def lineage(path: Path) -> dict:
    return json.loads((path / "moesaic.json").read_text())


def logits(path: Path, ids: torch.Tensor, **overrides) -> torch.Tensor:
    model = load(path, **overrides)
    if "top_k_attn" in overrides:
        for module in model.modules():
            if getattr(module, "routes", None) == "attention":
                module.weight.data.zero_()
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize(
    ("experts", "shared", "contract_layers"), [(4, 0, 0), (4, 1, 0), (6, 2, 1), (3, 0, 1)]
)
@pytest.mark.parametrize("method", ["sequential", "random"])
def test_all_experts_on_is_the_dense_model(
    dense, tmp_path, method, experts, shared, contract_layers
):
    made = convert(
        dense,
        out=tmp_path / "out",
        preset="llama-moe-v2",
        split=method,
        experts=experts,
        shared=shared,
        top_k=1 + shared,
        contract_layers=contract_layers,
    )
    record = lineage(made)
    assert record["exact"]
    assert record["difference"] < 1e-4
    assert record["config"]["scale"] == (1.0 if shared else experts)
    model = load(made)
    assert [layer.is_moe for layer in model.model.layers] == (
        [False, True, False] if contract_layers else [True] * 3
    )
    total = sum(p.numel() for p in model.parameters())
    assert record["parameters_total"] == total


def test_rope_scaling_is_kept_and_no_window_injected(tmp_path):
    scaling = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}
    path = write_dense(tmp_path / "m", rope_parameters=scaling)
    made = convert(path, out=tmp_path / "o", preset="llama-moe-v2", experts=4, top_k=2)
    config = load(made).config
    assert config.rope_parameters["rope_type"] == "linear"
    assert config.rope_parameters["rope_theta"] == 5e5
    assert config.sliding_window is None
    assert lineage(made)["exact"]  # by logits, which know positions


@pytest.mark.parametrize("source", ["dense", "mixture"])
@pytest.mark.parametrize("experts", [2, 4])
def test_attention_experts_all_on_are_the_model_and_cached_decoding_is_the_full(
    dense, tmp_path, source, experts
):
    start = dense
    if source == "mixture":
        options = {"experts": 4, "top_k": 2, "shared": 1, "contract_layers": 1}
        start = convert(dense, out=tmp_path / "mlp", preset="llama-moe-v2", **options)
    made = attention(start, out=tmp_path / "out", top_k=1, experts=experts)
    assert lineage(made)["exact"]
    assert lineage(made)["config"]["scale"] == experts
    ids = torch.randint(1, 29, (2, 20), generator=torch.Generator().manual_seed(0))
    everything = {"top_k_attn": experts, "scale_factor_attn": float(experts)}
    torch.testing.assert_close(
        logits(made, ids, **everything), logits(start, ids), atol=1e-4, rtol=0
    )
    model = load(made)
    with torch.no_grad():
        full = model(ids).logits
        cache, steps = None, []
        for step in range(ids.shape[1]):
            out = model(ids[:, step : step + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), full, atol=1e-4, rtol=0)
    # and what is routed for real is another function
    assert float((full - logits(start, ids)).abs().max()) > 1e-2


@pytest.mark.parametrize("shared", [0, 1])
def test_gradient_plus_routes_by_the_gates_it_scored_with(dense, text, tmp_path, shared):
    settings = {"method": "gradient-plus", "tokens": 2048, "context": 32}
    options = {"experts": 4, "shared": shared, "data": text, "seed": 3}
    made = convert(
        dense,
        out=tmp_path / "one",
        preset="llama-moe-v2",
        split=settings,
        top_k=1 + shared,
        **options,
    )
    assert lineage(made)["exact"]
    # in steps: the split's directory brings its router
    result = run_cli(
        *("split", dense, "-o", tmp_path / "s", "--method", "gradient-plus", "--experts", 4),
        *("--shared", shared, "--data", text, "--seed", 3),
        *("--set", "tokens=2048", "--set", "context=32"),
    )
    assert result.exit_code == 0, result.stderr
    gates = RouterInit.load(tmp_path / "s")
    assert gates.num_experts == 4 - shared
    steps = run_cli(
        *("convert", dense, "-o", tmp_path / "two", "--preset", "llama-moe-v2"),
        *("--split", tmp_path / "s", "--top-k", 1 + shared, "--json"),
    )
    assert steps.exit_code == 0, steps.stderr
    one, two = load(made).state_dict(), load(tmp_path / "two").state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)
    for layer in range(3):
        weight = one[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        torch.testing.assert_close(weight, gates.layers[layer]["weight"])


def test_gates_of_a_sample_are_settled_by_all_tokens(dense):
    ids_BC = torch.randint(1, 29, (64, 32), generator=torch.Generator().manual_seed(0))
    model = open_dense(dense)
    whole, _ = hidden_gates(model, ids_BC, 4, settings=HiddenSettings(jitter=0.9))
    part, wins = hidden_gates(model, ids_BC, 4, settings=HiddenSettings(jitter=0.9, sample=512))
    assert {sum(layer) for layer in wins} == {64 * 32}
    assert not torch.equal(whole, part)
    # a token's cost under either set of centers is nearly the same
    from moesaic.construct.hidden import hidden_layers

    for seen in hidden_layers(model, ids_BC):
        x_TD = torch.cat(list(seen.features()))
        one, two = (torch.cdist(x_TD, g[seen.layer]).min(1).values.mean() for g in (whole, part))
        assert float(two) < 1.05 * float(one)


def test_hidden_states_in_a_file_are_those_in_memory(dense, monkeypatch):
    ids_BC = torch.randint(1, 29, (12, 32), generator=torch.Generator().manual_seed(0))
    wanted, _ = hidden_gates(open_dense(dense), ids_BC, 3)
    monkeypatch.setattr("moesaic.construct.hidden.IN_MEMORY", 1)
    found, _ = hidden_gates(open_dense(dense), ids_BC, 3)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("metric", ["l2", "cos"])
@pytest.mark.parametrize(
    ("points", "clusters", "jitter"), [(240, 8, 0.0), (241, 7, 0.1), (90, 1, 0)]
)
def test_cluster_sizes_keep_their_bounds(points, clusters, jitter, metric):
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(points, 5, generator=generator) + (torch.arange(points) < 9)[:, None] * 8
    smallest, largest = size_bounds(points, clusters, jitter)
    options = {"smallest": smallest, "largest": largest, "metric": metric}
    found = sized_kmeans(x_ND, clusters, **options)
    sizes = found.labels_N.bincount(minlength=clusters)
    assert smallest <= int(sizes.min())
    assert int(sizes.max()) <= largest
    assert found.inertia <= sized_kmeans(x_ND, clusters, starts=1, steps=1, **options).inertia


@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("with_attention", [False, True])
def test_alignment_gives_the_dense_moments(dense, text, tmp_path, shared, with_attention):
    from moesaic.construct.activations import text_sample

    made = convert(
        dense,
        out=tmp_path / "moe",
        preset="llama-moe-v2",
        experts=4,
        top_k=2 + shared,
        shared=shared,
        scale=1.7,  # not 1: the original's bias is wrong then
    )
    if with_attention:
        made = attention(made, out=tmp_path / "attn", top_k=1)
    aligned = align(made, reference=dense, out=tmp_path / "out", data=text, tokens=1024, context=32)
    ids_BC = text_sample(dense, text, tokens=1024, context=32)
    wanted = outputs(load(dense), ids_BC, "mlp", "self_attn")
    found = outputs(load(aligned), ids_BC, "block_sparse_moe", "self_attn", "mlp_residual")
    before = outputs(load(made), ids_BC, "block_sparse_moe", "self_attn", "mlp_residual")
    for layer in range(3):
        parts = ("mlp", "attn") if with_attention else ("mlp",)
        for part in parts:
            one, two = wanted[part][layer], found[part][layer]
            torch.testing.assert_close(two.mean(0), one.mean(0), atol=1e-3, rtol=0)
            torch.testing.assert_close(two.std(0), one.std(0), atol=0, rtol=1e-2)
            assert float((before[part][layer].mean(0) - one.mean(0)).abs().max()) > 1e-2


def outputs(model, ids_BC: torch.Tensor, *names: str) -> dict[str, list[torch.Tensor]]:
    """Outputs [T, D] of every layer's MLP (both parts added) and attention."""
    found: dict[str, list[torch.Tensor]] = {"mlp": [], "attn": []}

    def keep(name):
        def hook(module, inputs, output):
            y_TD = (output[0] if isinstance(output, tuple) else output).flatten(0, 1)
            if name == "mlp_residual":
                found["mlp"][-1] = found["mlp"][-1] + y_TD
            else:
                found["attn" if name == "self_attn" else "mlp"].append(y_TD)

        return hook

    for layer in model.model.layers:
        for name in names:
            if getattr(layer, name, None) is not None:
                getattr(layer, name).register_forward_hook(keep(name))
    with torch.no_grad():
        model(ids_BC)
    return found


def test_text_too_short_says_how_much_is_needed(dense, tmp_path):
    data = tmp_path / "short.txt"
    data.write_text("abc " * 30)
    for command in (("--split", "gradient-plus"), ("--router", "hidden-clusters")):
        file = tmp_path / "s.yaml"
        file.write_text(f"method: {command[1]}\ncontext: 16\n")
        result = run_cli(
            *("convert", dense, "-o", tmp_path / "o", "--preset", "llama-moe-v2"),
            *("--experts", 8, "--top-k", 2, command[0], file, "--data", data),
        )
        assert_user_error(result, "too few for 8 experts", "256")
        assert not (tmp_path / "o").exists()


def test_experts_that_never_win_are_all_named(dense, text, tmp_path):
    gates = [torch.zeros(3, 32) for _ in range(3)]
    for gate in gates:
        gate[0] = torch.randn(32, generator=torch.Generator().manual_seed(0))
        gate[1] = -gate[0]
    gates[1][1:] = 2 * gates[1][0]  # of experts 1 and 2, equal there, only one can win
    gates[2][2] = 0.5 * gates[2][0]
    RouterInit.from_gates(gates, {}).save(tmp_path / "g.safetensors")
    settings = {"method": "gradient-plus", "gates": tmp_path / "g.safetensors", "tokens": 512}
    with pytest.raises(UserError, match=r"layer 0 expert 2, layer 1 expert 2, layer 2 expert 2"):
        split(dense, method={**settings, "context": 32}, experts=3, data=text)


def test_files_that_do_not_fit_are_refused(dense, text, tmp_path):
    def converted(**options):
        return convert(
            dense, out=tmp_path / "o", preset="llama-moe-v2", top_k=2, verify="off", **options
        )

    index = tmp_path / "neuron_indices.pt"
    blocks = [list(range(e * 12, e * 12 + 12)) for e in range(4)]
    good = dict.fromkeys(range(3), blocks)
    torch.save(good, index)
    assert converted(split=index).exists()
    for bad, words in (
        ({0: blocks, 1: blocks}, "2 layers of 48 neurons"),
        ({**good, 2: [*blocks[:3], [48, *range(37, 48)]]}, "neuron 48"),
        ({**good, 1: "text"}, "layer 1 holds no experts"),
        ({**good, 1: [*blocks[:3], blocks[3][:-1]]}, "11 to 12|35 to 36|47 to 48"),
        ({**good, 1: {"residual": blocks[0], 1: blocks[1], 2: blocks[2]}}, "are not 0, 1"),
        ([blocks] * 3, "holds a list"),
    ):
        torch.save(bad, index)
        with pytest.raises(UserError, match=words):
            convert(
                dense, out=tmp_path / "p", preset="llama-moe-v2", top_k=2, split=index, verify="off"
            )
    gate = tmp_path / "gate_weights.pt"
    torch.save({layer: torch.randn(3, 32) for layer in range(3)}, gate)
    with pytest.raises(UserError, match="3 experts"):
        convert(dense, out=tmp_path / "p", preset="llama-moe-v2", top_k=2, experts=4, router=gate)
    settings = {"method": "gradient-plus", "gates": gate, "context": 32}
    with pytest.raises(UserError, match="does not fit"):
        split(dense, method=settings, experts=4, data=text)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--contract-layers", 2], ["contract_layers=2", "1."]),
        (["--gate", "mlp"], ["gate", "linear"]),
        (["--scale", "layerwise"], ["scale", "one number"]),
        (["--shared-scale", "2"], ["shared_scale"]),
        (["--preset", "llama-moe-v1", "--contract-layers", 1], ["contract_layers=1", "v2"]),
        (["--preset", "mixtral"], ["preset='mixtral'", "llama-moe-v2"]),
    ],
)
def test_what_v2_has_not_is_refused(dense, tmp_path, options, words):
    start = ["convert", dense, "-o", tmp_path / "o", "--experts", 4, "--top-k", 2]
    assert_user_error(run_cli(*start, "--preset", "llama-moe-v2", *options), *words)


def test_attention_refuses_what_does_not_fit(dense, tmp_path):
    for options, words in (
        (["--top-k", 3], ["top_k=3", "1 to 2"]),
        (["--top-k", 1, "--experts", 3], ["experts=3", "2, 4"]),
        (["--top-k", 1, "--scale", 0], ["scale=0"]),
    ):
        assert_user_error(run_cli("attention", dense, "-o", tmp_path / "o", *options), *words)
    made = attention(dense, out=tmp_path / "a", top_k=1)
    assert_user_error(
        run_cli("attention", made, "-o", tmp_path / "b", "--top-k", 1), "has attention experts"
    )
    other = write_dense(tmp_path / "other", hidden_size=64, num_hidden_layers=3)
    write_text_tokenizer(other)
    with pytest.raises(UserError, match="hidden_size=64"):
        align(made, reference=other, out=tmp_path / "c", data="none")
    biased = write_dense(tmp_path / "biased", attention_bias=True)
    assert_user_error(
        run_cli("attention", biased, "-o", tmp_path / "d", "--top-k", 1), "attention_bias"
    )


def test_sequential_is_the_default_split_and_kaiming_the_router(dense, tmp_path):
    made = convert(dense, out=tmp_path / "o", preset="llama-moe-v2", experts=4, top_k=2)
    record = lineage(made)["config"]
    assert (record["split"]["method"], record["router"]["method"]) == ("sequential", "kaiming")
    blocks = NeuronSplit.load(made / "split.safetensors").experts[2]
    assert [ids.tolist() for ids in blocks] == np.arange(48).reshape(4, 12).tolist()
    edit_config(made, model_type="mixtral")  # what the original's loader would be told
    assert load(made).config.model_type == "llama_moe_v2"


def test_gates_need_no_split_but_centroids_do(dense, text, tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("method: hidden-random\ntokens: 1024\ncontext: 32\n")
    start = ["router", dense, "--gate", "linear", "--data", text, "--experts", 5]
    result = run_cli(*start, "-o", tmp_path / "r", "--method", file)  # 5 does not divide 48
    assert result.exit_code == 0, result.stderr
    assert RouterInit.load(tmp_path / "r").num_experts == 5
    refused = run_cli(*start, "-o", tmp_path / "q", "--method", "centroids")
    assert_user_error(refused, "centroids", "split")
    assert_user_error(run_cli("router", dense, "-o", tmp_path / "q"), "split", "experts")
