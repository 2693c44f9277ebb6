"""DeepSeekMoE v1 against the original program's golden numbers."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM

from moesaic.models.families.deepseek_moe import DeepseekConfig, DeepseekForCausalLM
from tests.models.parity import IMPLEMENTATIONS, Parity, check_full_size

ON = {"aux_loss_alpha": 0.1}
FIXTURES = [
    Parity("deepseek_moe", balance=ON, ordered=False),
    Parity("deepseek_moe_norm_freq", balance=ON, ordered=False),
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


def test_original_config_loads_without_remote_code():
    model = AutoModelForCausalLM.from_pretrained(FIXTURES[0].directory)
    assert type(model) is DeepseekForCausalLM
    for attention in ("eager", "sdpa"):
        FIXTURES[1].check_cases("moesaic", attn_implementation=attention)
    FIXTURES[0].check_generation(cache_implementation="static", recomputed=False)


def test_full_size():
    config = DeepseekConfig(
        vocab_size=102400,
        hidden_size=2048,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=16,
        n_shared_experts=2,
        n_routed_experts=64,
        num_experts_per_tok=6,
        first_k_dense_replace=1,
    )
    check_full_size(config, total=16.376, active=2.8, top_k=6, layers=27)
