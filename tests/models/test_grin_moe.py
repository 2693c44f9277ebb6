"""GRIN-MoE against the original program's golden numbers."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.phimoe.modeling_phimoe import sparsemixer as phimoe_sparsemixer

from moesaic.core.errors import UserError
from moesaic.models.families.grin_moe import (
    GRINMoEBlock,
    GRINMoEConfig,
    GRINMoEForCausalLM,
    GRINMoEModel,
    sparsemixer,
)
from tests.models.parity import IMPLEMENTATIONS, Parity, check_full_size

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "initializer_range": 0.2,
}

ON = {"router_aux_loss_coef": 0.1}
FIXTURES = [
    Parity("grin_moe", balance=ON),
    Parity("grin_moe_sliding", balance=ON),
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("fixture", FIXTURES, ids=str)
def test_parity(fixture, implementation):
    fixture.check_cases(implementation)
    fixture.check_generation(implementation)
    fixture.check_training_step(implementation)


@pytest.mark.parametrize("fixture", FIXTURES, ids=str)
def test_saving_and_training(fixture, tmp_path):
    fixture.check_round_trip(tmp_path)
    fixture.check_experts_interface()
    fixture.check_gradient_checkpointing()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("fixture", FIXTURES, ids=str)
def test_attention_and_static_cache(fixture, attention):
    fixture.check_cases("moesaic", attn_implementation=attention)
    fixture.check_generation(cache_implementation="static", recomputed=False)


def test_window_is_one_key_wider_than_the_config_says():
    """A token that w + 1 positions back changes counts nothing for one layer; w back, it does."""
    config = GRINMoEConfig(**SMALL, sliding_window=5)
    torch.manual_seed(0)
    model = GRINMoEModel(config).eval()
    ids = torch.arange(3, 15)[None]
    other = ids.clone()
    other[0, 2] = 50
    with torch.no_grad():
        change = model(ids).last_hidden_state - model(other).last_hidden_state
    changed = (change.abs() > 1e-5).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [2, 3, 4, 5, 6, 7]


def test_sparsemixer_in_training_is_the_one_of_transformers():
    """Values and gradients under one seed. Transformers writes a third as 0.3333, and draws the
    second choice's cut twice, so that there ours and theirs may differ by a factor of three."""
    torch.manual_seed(0)
    logits = torch.randn(400, 8)
    weight = torch.randn(400, 2)
    results = []
    for mix in (
        lambda x: sparsemixer(x, jitter=0.3, training=True),
        lambda x: phimoe_sparsemixer(x, jitter_eps=0.3, training=True),
    ):
        torch.manual_seed(1)
        given = logits.clone().requires_grad_()
        weights, ids = mix(given)
        (weights * weight).sum().backward()
        results.append((weights.detach(), ids, given.grad))
    (ours, our_ids, our_grad), (theirs, their_ids, their_grad) = results
    assert torch.equal(our_ids, their_ids)
    torch.testing.assert_close(ours[:, 0], theirs[:, 0], atol=1e-4, rtol=0)
    ratio = (ours / theirs)[:, 1]
    assert all(min(abs(r - x) for x in (1 / 3, 1, 3)) < 1e-3 for r in ratio.tolist())
    torch.testing.assert_close(our_grad, their_grad, atol=1e-6, rtol=0)
    likeliest = sparsemixer(logits, jitter=0.3, training=False)[1]
    assert 0.02 < (our_ids[:, 0] != likeliest[:, 0]).float().mean() < 0.9  # it draws


def test_training_draws_and_jitters_and_eval_does_not():
    torch.manual_seed(0)
    block = GRINMoEBlock(GRINMoEConfig(**SMALL, input_jitter_noise=0.1, router_jitter_noise=0.3))
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    block.experts.config._experts_implementation = "eager"
    x = torch.randn(2, 6, 32)
    assert torch.equal(block.eval()(x)[0], block(x)[0])
    before = x.clone()
    assert not torch.equal(block.train()(x)[1], block(x)[1])
    assert torch.equal(x, before)  # transformers' and the original's write into their input


def test_only_two_experts():
    with pytest.raises(UserError, match="num_experts_per_tok=3: SparseMixer chooses 2 experts"):
        GRINMoEConfig(num_experts_per_tok=3)


def test_full_size():
    config = GRINMoEConfig(
        num_local_experts=16,
        attention_bias=True,
        lm_head_bias=True,
        sliding_window=2047,
        input_jitter_noise=0.01,
    )
    check_full_size(config, total=41.873, active=6.6, top_k=2, layers=32)


def test_original_config_loads_without_remote_code():
    model = AutoModelForCausalLM.from_pretrained(FIXTURES[0].directory)
    assert type(model) is GRINMoEForCausalLM
    assert model.config.visible_keys == 2048
