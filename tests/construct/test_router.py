"""Router inits: their law, the golden targets of the trained gate, files, the command."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moesaic.construct.convert import convert
from moesaic.construct.router import RouterInit, RouterInputs, init_router
from moesaic.construct.routers.centroids import Centroids, centroids
from moesaic.construct.routers.random import Random
from moesaic.construct.routers.select import (
    Select,
    expert_activity,
    router_logits,
    router_loss,
    targets,
)
from moesaic.construct.split import NeuronSplit, split
from moesaic.core.errors import UserError
from moesaic.models.checkpoint import Checkpoint
from tests.construct.dense_models import write_dense, write_text_tokenizer
from tests.helpers import GOLDEN, assert_user_error, run_cli

V1 = GOLDEN / "llama_moe_v1"
WORDS = ["the cat sat on a mat. ", "one dog ran to the red barn. ", "we sing all day. "]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense")
    write_text_tokenizer(path)
    return write_dense(path)


@pytest.fixture(scope="module")
def division(dense: Path) -> NeuronSplit:
    return split(dense, method="random", experts=4, seed=1)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("".join(WORDS[i % 3][i % 7 :] for i in range(200)))
    return path


def test_random_routers_follow_the_initializer_range_and_the_seed(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 64, "num_hidden_layers": 1}
    model = write_dense(tmp_path / "wide", **sizes, initializer_range=0.05)
    division = split(model, method="random", experts=64)
    made = init_router(model, split=division, seed=3)
    weights = made.layers[0]
    assert {name: tuple(w.shape) for name, w in weights.items()} == {
        "0.weight": (64, 512),
        "2.weight": (64, 64),
    }
    for weight in weights.values():
        assert abs(float(weight.mean())) < 3e-3
        assert float(weight.std()) == pytest.approx(0.05, rel=0.05)
        normal = torch.distributions.Normal(0.0, 0.05).cdf(weight).sort().values
        even = torch.arange(0.5, normal.numel()) / normal.numel()
        assert float((normal.flatten().sort().values - even).abs().max()) < 0.03
    again = init_router(model, split=division, seed=3).layers[0]
    other = init_router(model, split=division, seed=4).layers[0]
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert not any(torch.equal(weights[name], other[name]) for name in weights)
    wide = init_router(model, split=division, method=Random(std=1.0), gate="linear").layers[0]
    assert float(wide["weight"].std()) == pytest.approx(1.0, rel=0.05)


def golden_labels() -> list[np.ndarray]:
    labels = np.load(V1 / "router_targets.npz")["expert_indices"]
    return [np.flatnonzero(labels == expert) for expert in range(4)]


def test_centroids_are_the_original_first_layer() -> None:
    rows = Checkpoint(V1 / "dense").read("model.layers.0.mlp.up_proj.weight")
    wanted = np.load(V1 / "router_targets.npz")["init_first_layer"]
    np.testing.assert_allclose(centroids(rows, golden_labels()).numpy(), wanted, atol=1e-6)


@pytest.mark.parametrize("criterion", ["plain", "positive", "l1_norm", "l2_norm"])
@pytest.mark.parametrize("target", ["softmax", "topk"])
def test_targets_of_the_trained_gate_are_the_original_ones(criterion, target) -> None:
    golden = np.load(V1 / "router_targets.npz")
    hidden_TF = torch.from_numpy(golden["hidden_outputs"])
    activity_TE = expert_activity(hidden_TF, golden_labels(), criterion)
    made = targets(activity_TE, target=target, top_k=2)
    np.testing.assert_allclose(made.numpy(), golden[f"{criterion}.{target}"], atol=1e-5)


def test_router_losses_against_the_formulas() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(5, 3), torch.randn(5, 3).softmax(1)
    wanted = (target * (target.log() - logits.log_softmax(1))).sum() / 15
    torch.testing.assert_close(router_loss(logits, target, target="softmax"), wanted)
    labels = targets(target, target="topk", top_k=2)
    probs = logits.sigmoid()
    wanted = -(labels * probs.log() + (1 - labels) * (1 - probs).log()).mean()
    torch.testing.assert_close(router_loss(logits, labels, target="topk"), wanted)


@pytest.mark.parametrize("gate", ["mlp", "linear"])
def test_the_trained_gate_finds_the_most_active_experts(
    dense: Path, division: NeuronSplit, text: Path, gate
) -> None:
    """Against activities of the real dense model, collected by hooks, on the training text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = Select(tokens=1024, context=32, epochs=30, batch=128)
    inputs: list[torch.Tensor] = []
    model = AutoModelForCausalLM.from_pretrained(dense)
    down = model.model.layers[1].mlp
    down.register_forward_hook(lambda _, args, __: inputs.append(args[0].flatten(0, 1)))
    ids = AutoTokenizer.from_pretrained(dense)(text.read_text())["input_ids"][:1024]
    with torch.inference_mode():
        model(torch.tensor(ids).view(-1, 32))
        x_TD = inputs[0]
        neurons_TF = down.act_fn(down.gate_proj(x_TD)) * down.up_proj(x_TD)
    activity_TE = expert_activity(neurons_TF, division.experts[1], "l2_norm")
    wanted_TE = targets(activity_TE, target="topk", top_k=2)

    def found(router: RouterInit) -> float:
        weights = [w for _, w in sorted(router.layers[1].items())]
        chosen = router_logits(x_TD, weights).topk(2, dim=1).indices
        return float(wanted_TE.gather(1, chosen).mean())

    trained = init_router(
        dense, split=division, method=settings, gate=gate, top_k=2, data=str(text)
    )
    assert found(trained) > 0.75
    assert found(trained) > found(init_router(dense, split=division, gate=gate)) + 0.1
    shares = trained.meta["held_out_top_k_found"]
    assert len(shares) == 2
    assert min(shares) > 0.6


def test_layer_stream_is_the_dense_model(dense: Path) -> None:
    from transformers import AutoModelForCausalLM

    from moesaic.construct.activations import LayerStream
    from moesaic.construct.dense import open_dense

    ids = torch.arange(60).view(2, 30)
    model = AutoModelForCausalLM.from_pretrained(dense)
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    with torch.inference_mode():
        model(ids)
        for inputs in LayerStream(open_dense(dense), context=30).layers(ids):
            wanted = seen[inputs.layer].flatten(0, 1)
            torch.testing.assert_close(inputs.neurons(), wanted, atol=1e-5, rtol=1e-5)


def test_centroid_routers_of_both_networks_agree(dense: Path, division: NeuronSplit) -> None:
    mlp = init_router(dense, split=division, method="centroids", gate="mlp")
    linear = init_router(dense, split=division, method="centroids", gate="linear")
    for layer in range(2):
        first = mlp.layers[layer]["0.weight"]
        assert torch.equal(first, linear.layers[layer]["weight"])
        assert torch.equal(mlp.layers[layer]["2.weight"], torch.eye(4))
    gate = Checkpoint(dense).read("model.layers.1.mlp.gate_proj.weight")
    assert torch.equal(mlp.layers[1]["0.weight"], centroids(gate, division.experts[1]))
    by_up = init_router(dense, split=division, method=Centroids(projection="up"))
    assert not torch.equal(by_up.layers[1]["0.weight"], mlp.layers[1]["0.weight"])


def test_a_router_init_survives_its_file(tmp_path: Path) -> None:
    layers = [{"0.weight": torch.randn(3, 5), "2.weight": torch.randn(3, 3)} for _ in range(11)]
    shared = [torch.randn(2, 5) for _ in range(11)]
    made = RouterInit(layers, list(shared), {"method": "x", "seed": 1})
    read = RouterInit.load(made.save(tmp_path / "router.safetensors"))
    assert read.meta == made.meta
    assert (read.gate, read.num_experts, read.hidden) == ("mlp", 3, 5)
    for index in range(11):
        assert all(torch.equal(read.layers[index][n], w) for n, w in layers[index].items())
        assert torch.equal(read.shared[index], shared[index])
    assert RouterInit.load(tmp_path).meta == made.meta
    file = tmp_path / "router.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match="truncated"):
        RouterInit.load(file)
    NeuronSplit([[np.arange(4)]], [[]], 4).save(file)
    with pytest.raises(UserError, match="neuron_split"):
        RouterInit.load(file)
    for wrong in ({"bias": torch.zeros(2)}, {"0.weight": torch.zeros(2, 3)},
                  {"0.weight": torch.zeros(2, 3), "2.weight": torch.zeros(3, 3)}):  # fmt: skip
        with pytest.raises(UserError, match=r"\[E, D\]"):
            RouterInit([wrong], [None])


def test_steps_one_by_one_give_what_convert_gives_at_once(
    dense: Path, division: NeuronSplit, tmp_path: Path
) -> None:
    division.save(tmp_path / "split.safetensors")
    result = run_cli("router", dense, "-o", tmp_path / "router", "--split", tmp_path, "--seed", 1,
                     "--method", "random", "--gate", "linear", "--json")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert result.json["experts"] == 4
    steps = convert(dense, out=tmp_path / "a", split=tmp_path, router=tmp_path / "router", top_k=2)
    once = convert(dense, out=tmp_path / "b", experts=4, top_k=2, gate="linear", seed=1)
    a, b = Checkpoint(steps), Checkpoint(once)
    assert a.config == b.config
    assert all(torch.equal(a.read(key), b.read(key)) for key in b.keys())  # noqa: SIM118


def test_settings_come_from_yaml_and_wrong_ones_are_named(
    dense: Path, division: NeuronSplit, text: Path, tmp_path: Path
) -> None:
    division.save(tmp_path / "split.safetensors")
    settings = tmp_path / "select.yaml"
    settings.write_text("method: select\nepochs: 2\ntokens: 256\ncontext: 32\ntarget: softmax\n")
    command = ("router", dense, "--split", tmp_path, "--data", text, "--method")
    result = run_cli(*command, settings, "-o", tmp_path / "router", "--top-k", 2)
    assert result.exit_code == 0, result.stderr
    assert RouterInit.load(tmp_path / "router").meta["settings"]["target"] == "softmax"
    settings.write_text("method: select\nepoch: 2\n")
    assert_user_error(run_cli(*command, settings, "-o", tmp_path / "x"), "epoch", "'epochs'")
    assert_user_error(run_cli(*command, "selekt", "-o", tmp_path / "x"), "did you mean 'select'")
    for wrong in (0, 1 + division.num_experts):
        result = run_cli(*command, "random", "-o", tmp_path / "x", "--top-k", wrong)
        assert_user_error(result, f"top_k={wrong}", "routed experts")
    assert not (tmp_path / "x").exists()


def test_inputs_draw_all_layers_from_one_stream(dense: Path, division: NeuronSplit) -> None:
    layers = list(Random().build(RouterInputs(dense, division, "linear", 1, None, 7)))
    assert not torch.equal(layers[0]["weight"], layers[1]["weight"])
