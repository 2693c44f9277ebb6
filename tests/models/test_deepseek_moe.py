"""DeepSeekMoE v1 against the original program's golden numbers."""

from __future__ import annotations

import pytest

from tests.models.parity import IMPLEMENTATIONS, Parity

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
