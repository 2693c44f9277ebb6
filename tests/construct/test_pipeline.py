"""Construction without training on tiny models: what must hold whatever the methods."""

import json

import numpy as np
import pytest
import torch

import moesaic
from moesaic.construct import layer_maker
from moesaic.construct.calibration import calibration_rows
from moesaic.construct.input_maps import fit_map, fold, fold_experts
from moesaic.construct.pipeline import Recipe, construct, results, run
from moesaic.construct.router import RouterInit, make_router
from moesaic.construct.split import NeuronSplit
from moesaic.core.errors import UserError
from moesaic.models.tokenizer import load_tokenizer
from tests.construct.dense_family_models import write_family
from tests.construct.dense_models import write_dense, write_text_tokenizer
from tests.helpers import assert_user_error, run_cli

SPLITS = ["energy", "cmoe", "expertweaver", "static", "random", "cluster"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    write_dense(folder / "model", mlp_bias=True)
    write_text_tokenizer(folder / "model")
    text = "the quick brown fox jumps over a lazy dog then sleeps under some old tree."
    words = text.split(" ")
    order = np.random.default_rng(0).integers(0, len(words), 3000)
    (folder / "text.txt").write_text(" ".join(words[i] for i in order))
    return folder


def recipe(dense, **fields):
    given = {"experts": 4, "top_k": 2, "data": str(dense / "text.txt"), "context": 32}
    return Recipe(**{**given, "tokens": 2048, **fields})


@pytest.mark.parametrize("split", SPLITS)
def test_any_split_goes_with_any_other_choice(dense, split):
    routers = {"cmoe": "representative", "expertweaver": "mean-gate", "static": "first"}
    shared = 1 if split in ("energy", "cmoe", "expertweaver", "static") else 0
    made = run(
        dense / "model",
        recipe(dense, split=split, router=routers.get(split, "energy"), shared=shared),
    )
    figures = results(made)
    before, after = figures["stages"][1:]
    assert before["all_on_difference"] < 1e-4  # exact before the refit, and only then
    assert after["all_on_difference"] > 1e-3
    assert after["output_error"] < before["output_error"]
    for layer in figures["layers"]:
        assert layer["captured"] <= layer["oracle"] + 1e-6
        assert layer["refit"]["missed_after"] <= layer["refit"]["missed_before"]
        assert sum(layer["load"]) == pytest.approx(1, abs=1e-3)
        assert 0 <= layer["load_entropy"] <= 1 + 1e-6
    assert made.split().exact


def stage(folder, name):
    return moesaic.load(folder / name, dtype=torch.float32)


def test_all_experts_on_are_the_dense_model(dense, tmp_path):
    run(dense / "model", recipe(dense), folder=tmp_path)
    model = stage(tmp_path, "split")
    ids = torch.randint(0, 29, (2, 24), generator=torch.Generator().manual_seed(1))
    wanted = moesaic.load(dense / "model", dtype=torch.float32)(ids).logits
    assert not torch.allclose(model(ids).logits, wanted, atol=1e-2)
    model.set_moe_num_selects(4)  # weight 1 each: nothing is renormalised
    torch.testing.assert_close(model(ids).logits, wanted, atol=1e-4, rtol=0)


def test_the_checkpoint_is_the_model_that_was_measured(dense, tmp_path):
    settings = recipe(
        dense, split="cmoe", router="representative", shared=1, held_out=str(dense / "text.txt")
    )
    path = construct(dense / "model", out=tmp_path / "moe", recipe=settings)
    figures = json.loads((path / "construct.json").read_text())
    model = moesaic.load(path, dtype=torch.float32)
    again = run(dense / "model", settings, folder=tmp_path / "again")
    ids = torch.randint(0, 29, (2, 24), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(ids).logits, stage(tmp_path / "again", "refit")(ids).logits)
    assert [row["stage"] for row in figures["stages"]] == ["dense", "split", "refit"]
    assert figures["stages"] == again.stages  # the same seed gives the same model
    assert all(row["loss"] > 0 for row in figures["stages"])


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_router_learns_without_a_balance_loss(top_k, dense, tmp_path):
    run(dense / "model", recipe(dense, top_k=top_k), folder=tmp_path)
    model = stage(tmp_path, "refit").train()
    model.set_moe_gate_use_balance(False)
    routers = {n: p.detach().clone() for n, p in model.gate_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    ids = torch.randint(0, 29, (4, 24), generator=torch.Generator().manual_seed(1))
    for step in range(2):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        for name, parameter in model.gate_parameters():
            moves = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
            assert moves == (name.endswith("correction") or step == 1), (name, step)
        optimizer.step()
    for name, parameter in model.gate_parameters():
        assert not torch.equal(parameter, routers[name]), name


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "olmo2", "qwen3"])
def test_a_norm_behind_the_mlp_takes_the_loss_from_a_lone_expert_s_router(
    kind, dense, tmp_path, caplog
):
    path = write_family(tmp_path / "dense", kind)
    write_text_tokenizer(path)
    ids = torch.randint(0, 29, (4, 24), generator=torch.Generator().manual_seed(1))
    for name, fields in {
        "lone": {"top_k": 1},
        "two": {"top_k": 2},
        "shared": {"top_k": 2, "shared": 1},
        "one": {"top_k": 1, "weighting": "one"},
    }.items():
        caplog.clear()
        with caplog.at_level("INFO", logger="moesaic"):
            run(path, recipe(dense, refit=None, attention=None, **fields), folder=tmp_path / name)
        model = stage(tmp_path / name, "split").train()
        routers = {n: p for n, p in model.named_parameters() if ".mlp.gate." in n}
        with torch.no_grad():
            for parameter in (p for n, p in routers.items() if not n.endswith("weight")):
                parameter.fill_(0.1)  # weights other than the 1 of the conversion
        model(ids, labels=ids, output_router_logits=False).loss.backward()
        largest = max(float(p.grad.norm()) for n, p in routers.items() if n.endswith("weight"))
        undone = kind != "qwen3" and fields["top_k"] == 1
        assert largest < 1e-4 if undone else largest > 5e-3, (name, largest)
        assert ("a lone expert" in caplog.text) == undone


def test_distillation_brings_layers_nearer(dense, tmp_path):
    settings = {"method": "layerwise", "passes": 6, "batch": 128}
    made = run(dense / "model", recipe(dense, refine=settings), folder=tmp_path)
    for layer in made.layers:
        assert layer.facts["refine"]["loss_after"] < layer.facts["refine"]["loss_before"]
    ids = torch.randint(0, 29, (2, 24), generator=torch.Generator().manual_seed(1))
    last, refit = (stage(tmp_path, name)(ids).logits for name in ("refine", "refit"))
    assert not torch.allclose(last, refit)


def test_attention_is_refitted_where_its_input_has_changed(dense, tmp_path):
    run(dense / "model", recipe(dense, attention=1.0), folder=tmp_path)
    layers = moesaic.load(dense / "model", dtype=torch.float32).model.layers
    first, second = (layer.self_attn.o_proj.weight for layer in layers)
    made = [layer.self_attn.o_proj.weight for layer in stage(tmp_path, "refit").model.layers]
    torch.testing.assert_close(made[0], first, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(made[1], second, atol=1e-3)
    before = stage(tmp_path, "split").model.layers[1].self_attn.o_proj.weight
    torch.testing.assert_close(before, second)


def test_maps_repair_what_is_read(dense, tmp_path):
    for maps in (False, True):
        mapped = run(dense / "model", recipe(dense, maps=maps), folder=tmp_path / str(maps))
    models = {maps: stage(tmp_path / str(maps), "refit").model.layers for maps in (False, True)}
    for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        for index, changed in ((0, False), (1, True)):  # nothing lies before the first layer
            weights = [models[maps][index].get_submodule(part).weight for maps in (False, True)]
            assert torch.equal(*weights) != changed, (part, index)
    made = [models[maps][1].mlp.calculator.experts.gate_up_proj for maps in (False, True)]
    assert not torch.equal(*made)
    # what the layer reads does not change the neurons of the stage before
    assert mapped.layers[1].facts["all_on"] < 1e-4


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_last_norm_is_scaled_towards_the_dense_stream(kind, dense, tmp_path):
    path = dense / "model"
    if kind != "llama":  # its norms add one to their weight
        path = write_family(tmp_path / "dense", kind)
        write_text_tokenizer(path)
    made = run(path, recipe(dense, top_k=1), folder=tmp_path)
    assert 0 < made.last_norm < 1  # a stream that has lost something predicts too surely
    assert results(made)["last_norm"] == made.last_norm
    x = torch.randn(3, 5, made.dense.hidden)
    norms = {}
    for name in ("dense", "split", "refit"):
        place = path if name == "dense" else tmp_path / name
        norms[name] = moesaic.load(place, dtype=torch.float32).model.norm(x)
    torch.testing.assert_close(norms["split"], norms["dense"])
    torch.testing.assert_close(
        norms["refit"], made.last_norm * norms["dense"], rtol=1e-3, atol=1e-4
    )
    assert run(path, recipe(dense, maps=False)).last_norm == 1.0


def test_a_map_is_folded_into_what_reads_it():
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(4096, 6, generator=generator)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    given = wanted @ turn  # the map is its inverse
    weight = torch.randn(5, 6, generator=generator)
    held = torch.arange(4096) % 8 == 7
    folded = fold(weight, fit_map(given, wanted, held), torch.float32)
    torch.testing.assert_close(given @ folded.T, wanted @ weight.T, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(fit_map(wanted, wanted, held), torch.eye(6), atol=1e-4, rtol=0)
    # two experts with streams of their own: each is mapped by its own tokens
    used = torch.stack([torch.arange(4096) < 2048, torch.arange(4096) >= 2048], 1).float()
    mixed = torch.where(used[:, :1] > 0, given, wanted)
    gate, up = fold_experts(
        weight, weight, mixed, wanted, used, sizes=[2, 3], held_T=held, dtype=torch.float32
    )
    torch.testing.assert_close(gate[:2], folded[:2], atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(up[2:], weight[2:], atol=1e-3, rtol=1e-3)


def test_an_imported_split_takes_our_router_and_refit(dense, tmp_path):
    labels = [np.arange(48) % 4, np.arange(48) // 12]
    file = NeuronSplit.from_labels(labels, experts=4).save(tmp_path / "split.safetensors")
    made = run(dense / "model", recipe(dense, split=str(file)))
    assert made.layers[1].parts.experts[0].tolist() == list(range(12))
    wrong = NeuronSplit.from_labels([np.arange(48) % 6] * 2, experts=6).save(file)
    with pytest.raises(UserError, match="6 experts"):
        run(dense / "model", recipe(dense, split=str(wrong)))


@pytest.mark.parametrize("shared", [0, 1])
def test_the_original_s_files_go_with_our_router_weighting_and_refit(dense, tmp_path, shared):
    draw = np.random.default_rng(5)
    layers = {}
    for layer in range(2):
        parts = draw.permutation(48).reshape(4, 12).tolist()
        names = ["residual", *range(3)] if shared else range(4)
        layers[layer] = dict(zip(names, parts, strict=True)) if shared else parts
    torch.save(layers, tmp_path / "neuron_indices.pt")
    gates = {layer: torch.randn(4 - shared, 32) for layer in range(2)}
    torch.save(gates, tmp_path / "gate_weights.pt")
    split, routers = str(tmp_path / "neuron_indices.pt"), str(tmp_path / "gate_weights.pt")
    for router in ("energy", routers):
        fields = {"split": split, "router": router, "experts": 4, "shared": shared}
        made = run(dense / "model", recipe(dense, **fields))
        for layer, found in enumerate(made.layers):
            first = layers[layer][0]
            assert found.parts.experts[0].tolist() == first
            assert [part.tolist() for part in found.parts.shared] == (
                [layers[layer]["residual"]] if shared else []
            )
            assert found.facts["output_error"]["refit"] < found.facts["output_error"]["split"]
            same = torch.equal(found.router["weight"], gates[layer])
            assert same == (router == routers)
    init = make_router(
        dense / "model", out=tmp_path / "router", split=split, method="centroids", gate="linear"
    )
    assert RouterInit.load(init).num_experts == 4 - shared
    with pytest.raises(UserError, match="experts=8 but the split has 4"):
        run(dense / "model", recipe(dense, split=split, experts=8))


@pytest.mark.parametrize("router", ["random", "kaiming", "centroids"])
def test_routers_of_either_network_are_one_matrix_where_only_that_goes(dense, tmp_path, router):
    model = write_family(tmp_path / "model", "qwen3")
    write_text_tokenizer(model)
    made = run(model, recipe(dense, split="cluster", router=router), folder=tmp_path)
    assert made.layers[1].router["weight"].shape == (4, 32)
    found = moesaic.load(tmp_path / "split").get_decoder().layers[1].mlp.gate.weight
    torch.testing.assert_close(found.detach(), made.layers[1].router["weight"])
    with pytest.raises(UserError, match="routes by one matrix; the router is of network glu"):
        run(model, recipe(dense, split="cmoe", router="representative"))
    # a LLaMA-MoE's router may be a network, but distillation trains one matrix
    made = run(dense / "model", recipe(dense, split="cluster", router=router, refine="layerwise"))
    assert list(made.layers[1].router) == ["weight"]


def test_routers_that_do_not_go_are_refused_before_text_is_read(dense, tmp_path):
    networks = {"representative": "glu"}
    split = NeuronSplit.from_labels([np.arange(48) % 4] * 2, experts=4)
    for gate in ("mlp", "linear"):
        path = tmp_path / gate
        make_router(dense / "model", split=split, out=path, gate=gate)
        networks[str(path / "router.safetensors")] = gate
    family = write_family(tmp_path / "family", "qwen3", num_hidden_layers=2, hidden_size=32)
    for router, network in networks.items():
        for model, refine, reason in (
            (dense / "model", "layerwise", "refine: layerwise distils a router of one matrix"),
            (family, None, "routes by one matrix"),
        ):
            asked = recipe(dense, router=router, refine=refine, data=None)
            found = "No calibration text" if network == "linear" else f"{reason}.* {network}"
            with pytest.raises(UserError, match=found):
                run(model, asked)


def test_text_is_read_from_the_beginnings_of_documents(dense, tmp_path):
    words = (dense / "text.txt").read_text().split()
    documents = ["fox " + " ".join(words[i : i + 40]) for i in range(0, len(words), 40)]
    lines = (json.dumps({"text": document}) + "\n" for document in documents)
    (tmp_path / "many.jsonl").write_text("".join(lines))
    sizes = {"tokens": 256, "context": 16, "experts": 4, "seed": 0}
    rows = calibration_rows(dense / "model", str(tmp_path / "many.jsonl"), **sizes)
    first = load_tokenizer(dense / "model")("fox")["input_ids"][0]
    assert rows.shape == (16, 16)
    assert set(rows[:, 0].tolist()) == {first}
    # one document cannot give sixteen beginnings: it is read from end to end
    rows = calibration_rows(dense / "model", str(dense / "text.txt"), **sizes)
    assert rows.shape == (16, 16)
    assert set(rows[:, 0].tolist()) != {first}


def test_what_is_missing_is_said(dense, caplog):
    for fields, message in (
        ({"data": None}, "No calibration text"),
        ({"tokens": 64, "experts": 12}, "12 experts: at least 192 are needed"),
        ({"top_k": 5}, "top_k=5"),
        ({"shared": 2}, "at least 3"),
        ({"experts": 5}, "does not divide the 48 .* such as 4 or 6."),
        ({"refine": "endtoend"}, "Use layerwise"),
        ({"refine": "layerwise", "weighting": "softmax"}, "weighting: tempered or one"),
        ({"split": "enrgy"}, "Did you mean 'energy'"),
        ({"weighting": "two"}, "weighting"),
    ):
        with pytest.raises(UserError, match=message):
            run(dense / "model", recipe(dense, **fields))
    with caplog.at_level("INFO", logger="moesaic"):
        run(dense / "model", recipe(dense, tokens=512, split="static", router="first"))
    said = caplog.text
    assert "Give more text or tokens" in said
    assert "layer 0 experts 2, 3; layer 1 experts 2, 3" in said  # never chosen, by name


def test_refining_trains_nothing_but_its_block(dense, monkeypatch):
    fixed = []
    block = layer_maker.RoutedBlock
    monkeypatch.setattr(
        layer_maker, "RoutedBlock", lambda *a, **more: fixed.append(a[2]) or block(*a, **more)
    )
    run(dense / "model", recipe(dense, refine={"method": "layerwise", "passes": 1, "ahead": 0}))
    biases = [b for f in fixed for b in (f.gate_bias_P, f.up_bias_P, f.down_bias_D)]
    assert len(biases) == 6
    # a gradient that goes elsewhere, on the stream of the layer's beginning, no CUDA graph can hold
    assert not any(bias.requires_grad for bias in biases)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "refine", [None, {"method": "layerwise", "passes": 2, "ahead": 1, "batch": 256}]
)
def test_a_gpu_makes_the_same_layers(dense, refine):
    made = [
        run(dense / "model", recipe(dense, device=device, refine=refine))
        for device in ("cpu", "cuda")
    ]
    for one, other in zip(*(m.layers for m in made), strict=True):
        errors = [layer.facts["output_error"] for layer in (one, other)]
        assert errors[1] == pytest.approx(errors[0], rel=0.1)
        assert other.facts["captured"] == pytest.approx(one.facts["captured"], abs=0.02)
        assert other.router["weight"].device.type == "cpu"


def test_the_command_prints_every_stage(dense, tmp_path):
    text = str(dense / "text.txt")
    sizes = ("--set", "experts=4", "--set", "tokens=1024", "--set", "context=32")
    given = ("construct", "energy", "--model", dense / "model", "--data", text, *sizes)
    done = run_cli(*given, "-o", tmp_path / "moe", "--held-out", text)
    assert done.exit_code == 0, done.stderr
    for word in ("Held-out loss", "Captured energy", "refit", "Oracle", "Load entropy"):
        assert word in done.stdout
    assert "A mixture of experts without training" in (tmp_path / "moe/report.html").read_text()
    assert_user_error(run_cli(*given, "-o", tmp_path / "moe"), "exists")
    assert_user_error(run_cli("construct", "enrgy", "-o", tmp_path / "x"), "energy")
