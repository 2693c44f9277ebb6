"""LLaMA-MoE-v2 against its original program."""

from __future__ import annotations

import pytest

from tests.models.parity import IMPLEMENTATIONS, Parity

ORIGINAL_LOSS = {"balance_loss": "constant-original"}
BALANCE = {"router_aux_loss_coef": 0.1, "balance_loss": "switch"}
NAMES = ("llama_moe_v2", "llama_moe_v2_residual")
FIXTURES = [
    Parity(name, options=ORIGINAL_LOSS, balance=BALANCE)
    for name in (
        "llama_moe_v2",
        "llama_moe_v2_residual",
        "llama_moe_v2_attn",
        "llama_moe_v2_attn_split",
    )
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("fixture", FIXTURES, ids=str)
def test_parity(fixture, implementation):
    fixture.check_cases(implementation)
    fixture.check_generation(implementation)


@pytest.mark.parametrize("fixture", FIXTURES, ids=str)
def test_trains_and_saves(fixture, tmp_path):
    fixture.check_experts_interface()
    fixture.check_round_trip(tmp_path)
    fixture.check_training_step()
    fixture.check_gradient_checkpointing()
