"""A number of active experts for each layer: what it changes, and that one number changes nothing.

`UNEQUAL` are the numbers of two layers of four experts; 24 tokens are run.
"""

import json
from collections import Counter

import pytest
import torch
from transformers import LlamaConfig

import moesaic
from moesaic.construct.layouts import LAYOUTS, supports
from moesaic.core.errors import UserError
from moesaic.models.anatomy import anatomy
from moesaic.models.families.moesaic_moe import MoesaicMoeConfig, MoesaicMoeForCausalLM
from moesaic.models.llama_moe import LlamaMoEForCausalLM
from moesaic.models.llama_moe_residual import LlamaMoEResidualForCausalLM
from moesaic.training.step import _native_counts
from tests.helpers import run_cli
from tests.models import tiny

UNEQUAL = [3, 1]
LINEAR = {"gate_network": "linear", "size_experts": [[16] * 4] * 2}


def llama_moe(selects=UNEQUAL, **fields):
    return tiny.build(LlamaMoEForCausalLM, tiny.config(num_selects=selects, **fields))


def residual(selects=UNEQUAL):
    config = tiny.residual_config(num_selects=selects)
    return tiny.build(LlamaMoEResidualForCausalLM, config)


def moesaic_moe(selects=UNEQUAL, **fields):
    text = LlamaConfig(**tiny.SHAPE).to_dict()
    config = MoesaicMoeConfig(
        text_config=text, num_experts=4, num_experts_per_tok=selects, **fields
    )
    return tiny.build(MoesaicMoeForCausalLM, config)


FAMILIES = [llama_moe, residual, moesaic_moe]


@pytest.mark.parametrize("make", FAMILIES)
def test_every_layer_chooses_its_own_number(make):
    model = make()
    with torch.no_grad(), moesaic.recording(model) as recorded:
        model(tiny.ids())
    assert [recorded.experts[layer].shape for layer in (0, 1)] == [(24, 3), (24, 1)]
    assert [layer.top_k for layer in anatomy(model).layers] == UNEQUAL
    assert [layer.top_k for layer in anatomy(model.config).layers] == UNEQUAL


@pytest.mark.parametrize("make", FAMILIES)
def test_a_layer_counts_only_the_experts_it_uses(make):
    whole = anatomy(make([3, 3]))
    found = anatomy(make())
    expert = 3 * 32 * 16
    assert whole.params_total == found.params_total
    assert whole.params_active - found.params_active == 2 * expert


@pytest.mark.parametrize("make", FAMILIES)
def test_equal_numbers_are_one_number(make):
    one, many = make(2).eval(), make([2, 2]).eval()
    assert torch.equal(one(tiny.ids()).logits, many(tiny.ids()).logits)
    assert not torch.equal(one(tiny.ids()).logits, make()(tiny.ids()).logits)


@pytest.mark.parametrize("make", FAMILIES)
def test_saved_loaded_and_generating(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "model")
    stored = json.loads((tmp_path / "model" / "config.json").read_text())
    name = "num_experts_per_tok" if make is moesaic_moe else "num_selects"
    assert stored[name] == UNEQUAL
    again = moesaic.load(tmp_path / "model", dtype=torch.float32)
    assert torch.equal(again(tiny.ids()).logits, model(tiny.ids()).logits)
    cached = again.generate(tiny.ids(), max_new_tokens=5, do_sample=False)
    plain = again.generate(tiny.ids(), max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)
    make(2).save_pretrained(tmp_path / "one")
    assert json.loads((tmp_path / "one" / "config.json").read_text())[name] == 2
    with pytest.raises(UserError, match=rf"{name}\[1\]=7 but the model has"):
        moesaic.load(tmp_path / "one", **{name: [2, 7]})


def test_all_experts_on_are_the_dense_model():
    dense = tiny.dense()
    model = tiny.split_of(dense, tiny.RAGGED, num_selects=UNEQUAL)
    wanted = dense(tiny.ids()).logits
    assert not torch.allclose(model(tiny.ids()).logits, wanted, atol=1e-3)
    model.set_moe_num_selects([4, 4])
    torch.testing.assert_close(model(tiny.ids()).logits, wanted, atol=1e-5, rtol=1e-5)


def test_setting_the_numbers():
    model = llama_moe(2)
    model.set_moe_num_selects(UNEQUAL)
    assert model.config.num_selects == UNEQUAL
    assert torch.equal(model(tiny.ids()).logits, llama_moe()(tiny.ids()).logits)
    model.update_config()
    assert model.config.num_selects == UNEQUAL
    for block in model.moe_blocks():
        block.gate.num_selects = 3
    model.update_config()
    assert model.config.num_selects == 3
    model.set_moe_num_selects(1)
    assert [block.gate.num_selects for block in model.moe_blocks()] == [1, 1]
    for wrong, message in (([1], "1 numbers but the model has 2"), ([1, 5], r"\[1\]=5 but")):
        with pytest.raises(UserError, match=message):
            model.set_moe_num_selects(wrong)


def test_training_balances_every_layer_by_its_own_number():
    model = llama_moe(gate_add_noise=False).train()
    out = model(tiny.ids(), labels=tiny.ids())
    assert [load.sum() for load in out.gate_load] == [24 * 3, 24]
    parts = []
    for layer, selects in enumerate(UNEQUAL):
        alone = llama_moe(selects, gate_add_noise=False).train()
        # the first layer's input is the same, the second's follows the first one's number
        if layer:
            alone.set_moe_num_selects(UNEQUAL)
        with torch.no_grad():
            hidden = alone(tiny.ids(), output_hidden_states=True).hidden_states[layer]
        block = alone.model.layers[layer]
        attended = alone.model.layers[layer].self_attn(
            hidden_states=block.input_layernorm(hidden),
            position_embeddings=alone.model.rotary_emb(hidden, torch.arange(12)[None]),
            attention_mask=None,
        )[0]
        x_TD = block.post_attention_layernorm(hidden + attended).flatten(0, 1)
        top_TK, ids_TK = block.mlp.gate.logits(x_TD).topk(selects)
        importance_E = torch.zeros(24, 4).scatter(1, ids_TK, top_TK.softmax(-1)).sum(0)
        load_E = torch.zeros(24, 4).scatter(1, ids_TK, 1.0).sum(0)
        squares = [v.var() / v.mean() ** 2 for v in (importance_E, load_E)]
        parts.append(1e-2 * sum(squares))
    torch.testing.assert_close(out.balance_loss, sum(parts), rtol=1e-4, atol=1e-6)
    out.balance_loss.backward()
    for block in model.moe_blocks():
        # one chosen expert has the score 1, whatever the router says
        moved = any(p.grad is not None and p.grad.abs().sum() > 0 for p in block.gate.parameters())
        assert moved == (block.gate.num_selects > 1)
    noisy = llama_moe().train()
    noisy(tiny.ids(), labels=tiny.ids()).balance_loss.backward()
    for block in noisy.moe_blocks():  # a noisy load depends on the router whatever the number
        assert block.gate.gate_network[0].weight.grad.abs().sum() > 0


def test_training_a_moesaic_moe_counts_by_layer():
    model = moesaic_moe().train()
    out = model(tiny.ids(), labels=tiny.ids(), output_router_logits=True)
    loads, _ = _native_counts(out.router_logits, model.config)
    assert loads.sum(1).tolist() == [24 * 3, 24]
    out.aux_loss.backward()
    assert all(layer.mlp.gate.weight.grad.abs().sum() > 0 for layer in model.model.layers)


def test_offloading_keeps_slots_by_layer():
    model = llama_moe()
    with torch.no_grad():
        wanted = model(tiny.ids()).logits
        with moesaic.offload(model, cache=1.0) as off:
            given = model(tiny.ids()).logits
    assert off.slots == (3, 1)
    torch.testing.assert_close(given, wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stock_layouts_have_one_number(layout):
    reason = "its layers use 1 to 3 experts a token"
    for model in (llama_moe(**LINEAR), moesaic_moe(weighting="renormalised")):
        assert reason in supports(model.config.to_dict(), layout, explain=True)
    equal = llama_moe([3, 3], **LINEAR).config.to_dict()
    assert not any("experts a token" in why for why in supports(equal, layout, explain=True))
    assert supports(equal, "mixtral")


def test_info_tells_the_number_of_every_layer(tmp_path):
    config = tiny.config(num_selects=[3, 1, 2, 2, 1], num_hidden_layers=5)
    tiny.build(LlamaMoEForCausalLM, config).save_pretrained(tmp_path)
    shown = run_cli("info", tmp_path).stdout
    for line in ("3 of 4 in 1 (layer 0)", "1 of 4 in 2 (layers 1, 4)", "2 of 4 in 2 (layers 2 to"):
        assert line in shown, shown
    layers = run_cli("info", tmp_path, "--json").json["anatomy"]["layers"]
    assert Counter(layer["top_k"] for layer in layers) == {3: 1, 1: 2, 2: 2}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_selects": [2]}, "num_selects has 1 numbers but the model has 2 layers"),
        ({"num_selects": [2, 5]}, r"num_selects\[1\]=5 but the model has 4 experts"),
        ({"num_selects": [0, 2]}, r"num_selects\[0\]=0 but the model has 4 experts"),
        (
            {"num_selects": [4, 3], "calculator_type": "UniformCalculator"},
            "takes 4 .* TopKBalancedNoisyGate chooses 3",
        ),
        (
            {"num_selects": [1, 2], "calculator_type": "SwitchDropTokenCalculator"},
            "takes 1 .* chooses 2",
        ),
    ],
)
def test_numbers_that_cannot_be(fields, message):
    with pytest.raises(UserError, match=message):
        tiny.config(**fields)


def test_numbers_that_a_moesaic_moe_cannot_have():
    with pytest.raises(UserError, match=r"num_experts_per_tok\[1\]=5"):
        moesaic_moe([1, 5])
    with pytest.raises(UserError, match="3 numbers but the model has 2 layers"):
        moesaic_moe([1, 2, 3])
