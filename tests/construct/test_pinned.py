"""Shared experts whose number differs by layer, as ExpertWeaver has them."""

import numpy as np
import pytest
import torch
from torch.nn.functional import linear, silu

import moesaic
from moesaic.construct.free.view import LayerView
from moesaic.construct.pinned import pin
from moesaic.construct.pipeline import Recipe, run
from moesaic.construct.split import split
from moesaic.construct.splits.expertweaver import Expertweaver
from moesaic.core.errors import UserError
from tests.construct.dense_family_models import write_family
from tests.construct.dense_models import changed_dense, write_text_tokenizer

TEXTS, CONTEXT, WIDTH, EXPERTS = 8, 4, 80, 10
RUNS = [("llama", 0.6, None), ("llama", 0.6, "down"), ("qwen3", 0.8, None)]


def _view(specialised, top_k=10, shared=0):
    """Neurons that open in one text each, and behind them those that open in all alike."""
    x_TD = torch.cat([torch.ones(TEXTS, 1), torch.eye(TEXTS)], 1).repeat_interleave(CONTEXT, 0)
    gate_FD = torch.zeros(WIDTH, TEXTS + 1)
    gate_FD[torch.arange(specialised), 1 + torch.arange(specialised) % TEXTS] = 6.0
    gate_FD[specialised:, 0] = 3.0
    rest = (torch.zeros(len(x_TD), WIDTH), gate_FD, gate_FD, gate_FD.T)
    return LayerView(0, x_TD, *rest, EXPERTS, shared, top_k, CONTEXT, 0)


@pytest.mark.parametrize(("specialised", "shared"), [(0, 7), (32, 5), (80, 2)])
def test_the_more_neurons_are_specialised_the_fewer_experts_are_shared(specialised, shared):
    view = _view(specialised)  # 0.7 - 0.5 * share of the neurons, in experts of a tenth
    parts = Expertweaver(layerwise=True).divide_layer(view)
    assert (parts.always, parts.shared, len(parts.experts)) == (shared, [], EXPERTS)
    assert sorted(np.concatenate(parts.experts)) == list(range(WIDTH))
    assert {len(ids) for ids in parts.experts} == {WIDTH // EXPERTS}
    assert view.facts["specialised"] == specialised / WIDTH
    if specialised == 32:  # those that open everywhere come first
        assert min(map(min, parts.experts[:shared])) >= specialised
    strict = Expertweaver(layerwise=True, specialised=2.7)  # above sqrt(8 - 1)
    assert strict.divide_layer(_view(specialised)).always == 7
    wide = Expertweaver(layerwise=True, least=0.1, most=0.3)
    assert wide.divide_layer(_view(specialised)).always == round(3 - 2 * specialised / WIDTH)


def test_a_token_has_at_least_one_routed_expert():
    view = _view(0, top_k=3)
    assert Expertweaver(layerwise=True).divide_layer(view).always == 2
    assert view.facts["wanted"] == 7
    with pytest.raises(UserError, match="shared=0"):
        Expertweaver(layerwise=True).divide_layer(_view(0, shared=1))
    with pytest.raises(UserError, match="least"):
        Expertweaver(layerwise=True, least=0.8).divide_layer(_view(0))


@pytest.mark.parametrize("always", [0, 1, 3])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_pinned_experts_are_chosen_and_the_others_as_before(always, size):
    draw = torch.Generator().manual_seed(always)
    x_TD = torch.nn.functional.normalize(torch.randn(500, 16, generator=draw), dim=1) * 4
    weight_ED, bias_E = torch.randn(8, 16, generator=draw) * size, torch.randn(8, generator=draw)
    router = {"weight": weight_ED, "bias": bias_E * size}
    logits_TE = linear(x_TD, weight_ED, bias_E * size)
    made = pin(router, x_TD[:100], always, weighting="one")
    torch.testing.assert_close(router["weight"], weight_ED)  # what was given stays
    top_k = always + 2
    for longer in (1, 2):
        scores_TE = linear(longer * x_TD, made["weight"], made["bias"])
        ids_TK = scores_TE.softmax(1).topk(top_k, dim=1).indices
        chosen_TE = torch.zeros_like(scores_TE).scatter(1, ids_TK, 1.0)
        assert bool((chosen_TE[:, :always] == 1).all())
        if longer == 1:
            wanted = logits_TE[:, always:].topk(2, dim=1).indices
            assert torch.equal(chosen_TE[:, always:].gather(1, wanted), torch.ones(500, 2))


def test_what_cannot_be_pinned_is_said(dense):
    one = {"weight": torch.ones(2, 3)}
    with pytest.raises(UserError, match="mean-gate"):
        pin({"gate.weight": one["weight"]}, torch.ones(4, 3), 1, weighting="one")
    with pytest.raises(UserError, match="tempered"):
        pin(one, torch.ones(4, 3), 1, weighting="scores")
    method = {"method": "expertweaver", "layerwise": True, "context": 32}
    with pytest.raises(UserError, match="moesaic construct"):
        split(dense["llama"], method=method, experts=8, data=str(dense["text"]))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")

    def open_alike(model):  # the last layer's gates: open whatever the text
        model.model.layers[-1].mlp.gate_proj.weight *= 1e-3

    text = folder / "text.txt"
    draw = np.random.default_rng(0)
    topics = [draw.choice(list("abcdefghijklmnopqrstuvwxyz"), 4) for _ in range(40)]
    text.write_text("\n\n".join("".join(draw.choice(topic, 64)) for topic in topics))
    changed_dense(folder / "llama", open_alike)
    write_family(folder / "qwen3", "qwen3")
    for kind in ("llama", "qwen3"):
        write_text_tokenizer(folder / kind)
    return {"llama": folder / "llama", "qwen3": folder / "qwen3", "text": text}


@pytest.mark.parametrize(("kind", "varies", "refit"), RUNS)
def test_layers_add_their_shared_experts_and_the_best_of_the_rest(
    kind, varies, refit, dense, tmp_path
):
    method = {"method": "expertweaver", "layerwise": True, "specialised": varies}
    method |= {"least": 0.1, "most": 0.8}
    fields = {"experts": 8, "top_k": 6, "tokens": 1024, "context": 32, "data": str(dense["text"])}
    fields |= {"router": "mean-gate", "weighting": "one", "attention": None, "maps": False}
    made = run(dense[kind], Recipe(split=method, refit=refit, **fields), folder=tmp_path)
    shared = [layer.facts["split"]["always_on"] for layer in made.layers]
    assert len(set(shared)) > 1
    for layer, always in zip(made.layers, shared, strict=True):
        assert layer.facts["load"][:always] == [pytest.approx(1 / 6, abs=1e-4)] * always
        assert max(layer.facts["load"][always:]) < 1 / 6
    model = moesaic.load(tmp_path / ("refit" if refit else "split"), dtype=torch.float32).eval()
    before = moesaic.load(dense[kind], dtype=torch.float32).eval()
    ids = torch.randint(1, 29, (2, 24), generator=torch.Generator().manual_seed(1))
    wanted = before(ids).logits
    assert not torch.allclose(model(ids).logits, wanted, atol=1e-3)
    if refit:
        return  # the experts are no longer the dense model's
    x_TD = torch.randn(50, 32, generator=torch.Generator().manual_seed(2))
    x_TD = before.model.layers[0].post_attention_layernorm(x_TD)
    torch.testing.assert_close(
        _given(model.model.layers[0].mlp(x_TD[None]))[0],
        _by_hand(before.model.layers[0].mlp, made.layers[0].parts.experts, shared[0], x_TD),
        atol=1e-5,
        rtol=1e-4,
    )
    if kind == "llama":
        model.set_moe_num_selects(8)
        torch.testing.assert_close(model(ids).logits, wanted, atol=1e-4, rtol=0)


def _given(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def _by_hand(mlp, experts, always, x_TD):
    """Shared experts and the top K - n routed ones by mean gate rows, plainly added."""
    h_TF = silu(mlp.gate_proj(x_TD)) * mlp.up_proj(x_TD)
    parts_ETD = torch.stack([h_TF[:, ids] @ mlp.down_proj.weight[:, ids].T for ids in experts])
    rows_ED = torch.stack([mlp.gate_proj.weight[ids].mean(0) for ids in experts[always:]])
    chosen_TK = always + (x_TD @ rows_ED.T).topk(6 - always, dim=1).indices
    out_TD = parts_ETD[:always].sum(0)
    for token, row in enumerate(chosen_TK):
        out_TD[token] += parts_ETD[row, token].sum(0)
    return out_TD
