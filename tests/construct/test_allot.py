"""Active experts of each layer under one total: the programme, the prices, what the file holds."""

import itertools
import json

import numpy as np
import pytest
import torch

import moesaic
from moesaic.construct.allot import cheapest
from moesaic.construct.calibration import calibration_rows
from moesaic.construct.export import export
from moesaic.construct.export_layout import export_layout
from moesaic.construct.pipeline import Recipe, construct, results, run
from moesaic.core.errors import UserError
from moesaic.models.anatomy import anatomy
from tests.construct.dense_family_models import write_family
from tests.construct.dense_models import write_dense, write_text_tokenizer
from tests.helpers import assert_user_error, run_cli


@pytest.mark.parametrize("total", [3, 5, 8, 12])
def test_no_other_numbers_are_cheaper(total):
    prices_LK = np.random.default_rng(total).random((3, 4)).tolist()
    found = cheapest(prices_LK, total=total)
    every = [n for n in itertools.product(range(1, 5), repeat=3) if sum(n) == total]

    def price(numbers):
        return sum(row[number - 1] for row, number in zip(prices_LK, numbers, strict=True))

    assert tuple(found) in every
    assert price(found) == pytest.approx(min(map(price, every)))


def test_equal_prices_give_equal_sums():
    assert sum(cheapest([[1.0, 1.0, 1.0]] * 4, total=8)) == 8
    falling = [[4.0, 1.0, 0.0]] * 4
    assert cheapest(falling, total=8) == [2, 2, 2, 2]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Four layers, of which the third matters most: what it adds is twenty times the others'."""
    folder = tmp_path_factory.mktemp("dense")
    path = write_dense(folder / "model", num_hidden_layers=4)
    write_text_tokenizer(path)
    model = moesaic.load(path, dtype=torch.float32)
    for index, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.weight.data *= 2.0 if index == 2 else 0.1
    model.save_pretrained(path)
    order = np.random.default_rng(0).integers(0, 27, 20_000)
    (folder / "text.txt").write_text("".join("abcdefghijklmnopqrstuvwxyz "[i] for i in order))
    return folder


def recipe(folder, **fields):
    given = {"experts": 4, "top_k": 2, "data": str(folder / "text.txt"), "context": 32}
    return Recipe(
        **{"tokens": 2048, "experts_per_layer": "allotted", "device": "cpu", **given, **fields}
    )


def tokens():
    return torch.randint(0, 29, (2, 24), generator=torch.Generator().manual_seed(1))


def test_the_layer_that_matters_gets_more(dense, tmp_path):
    path = construct(dense / "model", out=tmp_path / "moe", recipe=recipe(dense))
    figures = json.loads((path / "construct.json").read_text())
    found = figures["experts_per_layer"]
    assert sum(found["routed"]) == 8
    assert found["routed"][2] == 3  # the most that is allowed
    assert min(found["routed"]) == 1
    for row in found["price"]:
        assert row == sorted(row, reverse=True)  # one expert more costs less
    assert json.loads((path / "config.json").read_text())["num_selects"] == found["routed"]
    model = moesaic.load(path, dtype=torch.float32)
    assert [layer.top_k for layer in anatomy(model).layers] == found["routed"]
    with torch.no_grad(), moesaic.recording(model) as recorded:
        model(tokens())
    assert [recorded.experts[i].shape[1] for i in range(4)] == found["routed"]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "olmo2"])
def test_a_price_is_the_divergence_of_the_model_with_that_layer(kind, dense, tmp_path):
    """Of the split's own model: one layer with few experts, all the others with all of theirs."""
    path = dense / "model"
    if kind != "llama":  # another head, or norms behind the feed-forward part
        path = write_family(tmp_path / "dense", kind)
        write_text_tokenizer(path)
    plain = {"split": "random", "attention": None, "refit": None}
    router = run(path, recipe(dense, **plain, experts_per_layer="equal")).router()
    router.save(tmp_path / "router.safetensors")
    plain["router"] = str(tmp_path / "router.safetensors")
    made = run(path, recipe(dense, **plain), folder=tmp_path)
    given = made.recipe
    rows = calibration_rows(path, given.data, tokens=2048, context=32, experts=4, seed=given.seed)
    measured = rows[7::8]
    # eager: the only attention of transformers that caps its scores
    exact = {"dtype": torch.float32, "attn_implementation": "eager"}
    with torch.no_grad():
        wanted = moesaic.load(path, **exact)(measured).logits.log_softmax(-1)
        for number in (1, 2, 3):
            numbers = [number, *[4] * (len(made.layers) - 1)]
            name = "num_selects" if kind == "llama" else "num_experts_per_tok"
            model = moesaic.load(tmp_path / "split", **exact, **{name: numbers})
            given = model(measured).logits.log_softmax(-1)
            price = (wanted.exp() * (wanted - given)).sum(-1).mean()
            assert float(price) > 1e-4
            assert float(price) == pytest.approx(made.allotment.prices_LK[0][number - 1], rel=1e-3)


def test_the_same_seed_gives_the_same_numbers(dense):
    first, again = (run(dense / "model", recipe(dense)) for _ in range(2))
    assert results(first)["experts_per_layer"] == results(again)["experts_per_layer"]
    assert first.stages == again.stages
    other = run(dense / "model", recipe(dense, seed=1))
    assert other.allotment.prices_LK != first.allotment.prices_LK


def test_all_experts_on_are_the_dense_model(dense, tmp_path):
    run(dense / "model", recipe(dense), folder=tmp_path)
    model = moesaic.load(tmp_path / "split", dtype=torch.float32)
    wanted = moesaic.load(dense / "model", dtype=torch.float32)(tokens()).logits
    model.set_moe_num_selects(4)
    torch.testing.assert_close(model(tokens()).logits, wanted, atol=1e-4, rtol=0)


def test_stock_layouts_are_refused_and_the_dense_model_comes_back(dense, tmp_path):
    run(dense / "model", recipe(dense), folder=tmp_path)
    with pytest.raises(UserError, match="its layers use 1 to 3 experts a token"):
        export_layout(tmp_path / "split", out=tmp_path / "mixtral", layout="mixtral")
    assert not (tmp_path / "mixtral").exists()
    export(tmp_path / "split", out=tmp_path / "dense")
    wanted, given = (
        moesaic.load(path, dtype=torch.float32)(tokens()).logits
        for path in (dense / "model", tmp_path / "dense")
    )
    torch.testing.assert_close(given, wanted, atol=1e-4, rtol=0)
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert not {"num_selects", "num_experts_per_tok"} & config.keys()


def test_refining_and_other_choices_take_the_numbers(dense, tmp_path):
    settings = {"method": "layerwise", "passes": 1, "batch": 128}
    made = run(dense / "model", recipe(dense, refine=settings), folder=tmp_path)
    model = moesaic.load(tmp_path / "refine", dtype=torch.float32)
    assert model.config.num_selects == made.allotment.selects
    shared = recipe(dense, split="cmoe", router="representative", shared=1, weighting="softmax")
    found = run(dense / "model", shared, folder=tmp_path / "shared")
    assert sum(found.allotment.selects) == 4  # of three routed experts one a layer
    model = moesaic.load(tmp_path / "shared" / "refit", dtype=torch.float32)
    chosen, scales = model.config.num_selects, model.config.score_scale_factor
    assert scales == ([3 / number for number in chosen] if isinstance(chosen, list) else 3.0)


def test_layers_that_use_all_experts_have_no_choice(dense):
    made = run(dense / "model", recipe(dense, top_k=4))
    assert made.allotment.selects == [4] * 4


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
def test_other_families_have_numbers_too(kind, tmp_path, dense):
    path = write_family(tmp_path / "dense", kind)
    write_text_tokenizer(path)
    settings = recipe(dense, tokens=1024)
    made = run(path, settings, folder=tmp_path / "made")
    model = moesaic.load(tmp_path / "made" / "refit", dtype=torch.float32)
    found = [layer.top_k for layer in anatomy(model).layers]
    assert found == made.allotment.selects
    assert sum(found) == 2 * len(found)


def test_the_command_prints_the_numbers(dense, tmp_path):
    (tmp_path / "recipe.yaml").write_text("experts: 4\ntop_k: 2\ncontext: 32\ntokens: 2048\n")
    shown = run_cli(
        "construct",
        tmp_path / "recipe.yaml",
        *("-o", tmp_path / "moe", "--model", dense / "model", "--data", dense / "text.txt"),
        *("--set", "experts_per_layer=allotted", "--set", "device=cpu"),
    )
    assert shown.exit_code == 0, shown.stdout
    found = json.loads((tmp_path / "moe" / "construct.json").read_text())["experts_per_layer"]
    words = " ".join(map(str, found["routed"]))
    assert f"experts of a token by layer: {words}" in shown.stdout
    assert words in (tmp_path / "moe" / "report.html").read_text()
    wrong = run_cli(
        "construct",
        tmp_path / "recipe.yaml",
        *("-o", tmp_path / "other", "--model", dense / "model", "--data", dense / "text.txt"),
        *("--set", "experts_per_layer=some"),
    )
    assert_user_error(wrong, "should be 'equal' or 'allotted'")
