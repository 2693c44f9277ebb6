"""The balance losses of our own decoders, and when they are part of the loss."""

from __future__ import annotations

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moesaic.core.errors import UserError
from moesaic.models.balance import layer_balance, pooled_balance
from moesaic.models.families.deepseek_moe import DeepseekConfig, DeepseekForCausalLM
from moesaic.models.families.xverse_moe import XverseConfig, XverseForCausalLM
from moesaic.training.balance import set_balance_coefficient
from moesaic.training.step import build_pass

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}


def deepseek(**fields) -> DeepseekForCausalLM:
    given = {
        "intermediate_size": 48,
        "moe_intermediate_size": 8,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "aux_loss_alpha": 0.5,
        **fields,
    }
    torch.manual_seed(0)
    return DeepseekForCausalLM(DeepseekConfig(**SMALL, **given)).train()


def xverse(**fields) -> XverseForCausalLM:
    given = {"intermediate_size": 8, "num_experts": 8, "moe_top_k": 3, **fields}
    torch.manual_seed(0)
    return XverseForCausalLM(XverseConfig(**SMALL, **given)).train()


def by_hand(logits_TE, ids_TK, valid_T, groups):
    """The definition, one group and expert at a time."""
    experts, k = logits_TE.shape[1], ids_TK.shape[1]
    losses = []
    for rows in torch.arange(len(logits_TE)).chunk(groups):
        rows = [row for row in rows.tolist() if valid_T[row]]
        loss = 0.0
        for expert in range(experts):
            share = sum((ids_TK[row] == expert).sum().item() for row in rows)
            prob = sum(logits_TE[row].softmax(0)[expert].item() for row in rows)
            if rows:
                loss += experts * share / (len(rows) * k) * prob / len(rows)
        losses.append(loss)
    return sum(losses) / groups


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("padding", [0, 4, 7])
def test_balance_of_a_layer(groups, padding):
    torch.manual_seed(groups + padding)
    logits = torch.randn(21, 5)
    ids = torch.rand(21, 5).argsort(-1)[:, :2]  # not the best ones: those really chosen count
    valid = torch.ones(3, 7, dtype=torch.bool)
    valid[1, :padding] = False
    found = layer_balance(logits, ids, valid.flatten(), groups=groups)
    assert found.item() == pytest.approx(by_hand(logits, ids, valid.flatten(), groups), rel=1e-5)
    if not padding:
        assert torch.equal(found, layer_balance(logits, ids, None, groups=groups))


def test_perfect_balance_is_one():
    ids = torch.arange(8).view(8, 1)
    assert layer_balance(torch.zeros(8, 8), ids, None).item() == pytest.approx(1.0)
    assert layer_balance(torch.zeros(8, 8), ids * 0, None).item() == pytest.approx(1.0)
    sure = torch.zeros(8, 8)
    sure[:, 0] = 50.0
    assert layer_balance(sure, ids * 0, None).item() == pytest.approx(8.0)


@pytest.mark.parametrize("padded", [False, True])
def test_balance_over_all_layers_is_the_one_of_transformers(padded):
    torch.manual_seed(0)
    logits = tuple(torch.randn(14, 6) for _ in range(3))
    ids = [layer.topk(2).indices for layer in logits]
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[0, 5:] = 0
    wanted = load_balancing_loss_func(logits, 6, 2, mask if padded else None)
    found = pooled_balance(logits, ids, mask.bool().flatten() if padded else None)
    torch.testing.assert_close(found, wanted)


def test_deepseek_adds_its_loss_in_training_and_only_there():
    model = deepseek()
    ids = torch.randint(3, 96, (3, 10))
    plain = torch.nn.functional.cross_entropy
    out = model(ids, labels=ids)
    lm = plain(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, lm + 0.5 * out.aux_loss)
    assert out.router_logits is None
    out = model.eval()(ids, labels=ids, output_router_logits=True)
    lm = plain(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, lm)  # reported, not added: as the original program
    assert out.aux_loss > 0
    assert model(ids).aux_loss is None


def test_deepseek_balances_within_sequences_or_over_the_batch():
    ids = torch.randint(3, 96, (3, 10))
    within, over = (deepseek(seq_aux=seq)(ids) for seq in (True, False))
    assert within.aux_loss > over.aux_loss  # every sequence is less balanced than the batch
    one = ids[:1]
    torch.testing.assert_close(
        deepseek(seq_aux=True)(one).aux_loss, deepseek(seq_aux=False)(one).aux_loss
    )


@pytest.mark.parametrize("build", [deepseek, xverse])
def test_padding_does_not_count(build):
    """A batch padded on the right has the balance loss of its tokens alone."""
    model = build()
    ids = torch.randint(3, 96, (1, 10))
    padded = torch.cat([ids, torch.full((1, 6), 7)], dim=1)
    mask = (torch.arange(16) < 10).long()[None]
    alone = model(ids, output_router_logits=True).aux_loss
    found = model(padded, attention_mask=mask, output_router_logits=True).aux_loss
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)


def test_accumulation_does_not_change_the_balance_gradient():
    """Two calls with num_items_in_batch add up to one with all of it, for equal balance losses."""
    model, ids = xverse(router_aux_loss_coef=1.0), torch.randint(3, 96, (1, 9))
    whole = model(ids, labels=ids, output_router_logits=True).loss
    part = model(ids, labels=ids, output_router_logits=True, num_items_in_batch=16).loss
    torch.testing.assert_close(2 * part, whole)


def test_balance_loss_balances():
    """Trained on alone, it evens out the load of a router that prefers one expert."""
    model = xverse()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.router.weight[0] += 0.05 * layer.mlp.router.weight.sum(0).sign()
    ids = torch.randint(3, 96, (4, 16))
    losses = []
    routers = [layer.mlp.router.weight for layer in model.model.layers]
    optimizer = torch.optim.SGD(routers, lr=0.05)
    for _ in range(30):
        loss = model(ids, output_router_logits=True).aux_loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1
    assert losses[-1] >= 2.9  # about K


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (DeepseekConfig, {"n_routed_experts": 4, "num_experts_per_tok": 5}, "4 routed experts"),
        (DeepseekConfig, {"n_routed_experts": 4}, "num_experts_per_tok=None"),
        (DeepseekConfig, {"scoring_func": "sigmoid"}, "softmax"),
        (XverseConfig, {"num_experts": 4, "moe_top_k": 5}, "moe_top_k=5"),
    ],
)
def test_sizes_that_do_not_fit(config, fields, message):
    with pytest.raises(UserError, match=message):
        config(**fields)


def test_ids_or_embeddings():
    with pytest.raises(UserError, match="exactly one"):
        xverse()()


@pytest.mark.parametrize("build", [deepseek, xverse])
def test_training_loop_weighs_the_balance_loss(build):
    """`moesaic train` finds the coefficient under the family's own name, and can set it."""
    model, ids = build(), torch.randint(3, 96, (2, 9))
    assert set_balance_coefficient(model, None) == {deepseek: 0.5, xverse: 0.01}[build]
    assert set_balance_coefficient(model, 0.25) == 0.25
    found = build_pass(model)(ids)
    wanted = model(ids, output_router_logits=True)
    torch.testing.assert_close(found.balance, 0.25 * wanted.aux_loss)
    assert found.load_LE.shape == (2, 8)
    torch.testing.assert_close(
        model(ids, labels=ids, output_router_logits=True).loss,
        found.cross_entropy / 16 + 0.25 * wanted.aux_loss,
    )


@pytest.mark.parametrize("build", [deepseek, xverse])
def test_hidden_states_attentions_and_embeddings(build):
    model, ids = build().eval(), torch.randint(3, 96, (2, 9))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(ids, output_hidden_states=True, output_attentions=True)
        assert [h.shape for h in out.hidden_states] == [(2, 9, 32)] * 3
        assert [a.shape for a in out.attentions] == [(2, 4, 9, 9)] * 2
        again = model(inputs_embeds=model.get_input_embeddings()(ids), logits_to_keep=2)
    torch.testing.assert_close(again.logits, out.logits[:, -2:])
    assert out.router_logits is None
    assert out.aux_loss is None
