"""Calculators and experts: golden numbers, unequal widths, every experts implementation."""

from __future__ import annotations

import pytest
import torch

import moesaic.models  # noqa: F401  (registers the "moesaic" experts implementation)
from moesaic.core.errors import UserError
from moesaic.models.calculators import (
    SwitchDropTokenCalculator,
    UniformCalculator,
    UniversalCalculator,
)
from moesaic.models.llama_moe import LlamaMoEConfig, make_experts
from moesaic.models.randomness import Randomness
from tests.models.golden import Fixed, arrays

SIZES = (8, 16, 16, 24)
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm", "moesaic")


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return arrays("calculators")


def tiny(**fields) -> LlamaMoEConfig:
    config = LlamaMoEConfig(
        **{
            "hidden_size": 32,
            "intermediate_size": sum(SIZES),
            "num_attention_heads": 4,
            "num_hidden_layers": 1,
            "num_experts": 4,
            "num_selects": 2,
            **fields,
        }
    )
    config._experts_implementation = "eager"
    return config


def experts_of(golden, implementation="eager"):
    config = tiny()
    config._experts_implementation = implementation
    experts = make_experts(config, SIZES)
    with torch.no_grad():
        experts.gate_up_proj.fill_(float("nan"))  # whatever is not set must come from zero_padding
        experts.down_proj.fill_(float("nan"))
        experts.zero_padding()
        for e, size in enumerate(SIZES):
            experts.gate_up_proj[e, :size] = golden[f"expert{e}.gate"]
            experts.gate_up_proj[e, 24 : 24 + size] = golden[f"expert{e}.up"]
            experts.down_proj[e, :, :size] = golden[f"expert{e}.down"]
    return experts


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("scale1", {}),
        ("scale4", {"score_scale_factor": 4.0}),
        ("noscores", {"multiply_gate_scores": False, "score_scale_factor": 4.0}),
        ("weightnorm4", {"score_scale_factor": 4.0, "add_weight_norm": True}),
    ],
)
def test_universal_calculator_equals_the_original(golden, implementation, name, settings):
    calculator = UniversalCalculator(experts_of(golden, implementation), **settings)
    out, dropped = calculator(golden["x"], golden["indices"], golden["scores"])
    torch.testing.assert_close(out, golden[f"universal.{name}"], atol=1e-5, rtol=1e-5)
    assert dropped == -1
    assert (calculator.mlp_norm is not None) == ("add_weight_norm" in settings)


def test_uniform_calculator_equals_the_original(golden):
    everyone = torch.arange(4).expand(20, 4)
    for name, settings in (
        ("scale2", {"score_scale_factor": 2.0}),
        ("noscores", {"multiply_gate_scores": False}),
    ):
        calculator = UniformCalculator(experts_of(golden), **settings)
        out, _ = calculator(golden["x"], everyone, golden["uniform_scores"])
        torch.testing.assert_close(out, golden[f"uniform.{name}"], atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="2 of 4 experts a token"):
        calculator(golden["x"], golden["indices"], golden["scores"])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("drop.zero", {"capacity_factor": 1.25}),
        ("drop.input", {"capacity_factor": 1.25, "dropped_padding": "input"}),
        ("nodrop", {"drop_tokens": False}),
    ],
)
def test_capacity_calculator_equals_the_original(golden, name, settings):
    calculator = SwitchDropTokenCalculator(experts_of(golden), **settings)
    calculator.randomness = Fixed()
    out, dropped = calculator(
        golden["x"], golden["switch_indices"][:, None], golden["switch_scores"][:, None]
    )
    torch.testing.assert_close(out, golden[f"switch.{name}"], atol=1e-5, rtol=1e-5)
    if name == "nodrop":
        assert dropped == golden[f"switch.{name}.num_dropped"] == -1
        return
    over = (torch.bincount(golden["switch_indices"], minlength=4) - 6).clamp(min=0)  # 1.25 * 20 / 4
    assert dropped == over.sum()
    # the original reports the last over-full expert alone
    assert golden[f"switch.{name}.num_dropped"] == over[over > 0][-1]


def test_capacity_keeps_a_random_subset_of_each_expert_and_counts_all_drops(golden):
    calculator = SwitchDropTokenCalculator(experts_of(golden), capacity_factor=0.5)
    ids = torch.tensor([0] * 10 + [1] * 8 + [2] * 2)[:, None]  # capacity int(0.5 * 20 / 4) = 2
    weights = torch.ones(20, 1)
    kept = []
    for seed in range(40):
        calculator.randomness = Randomness(torch.Generator().manual_seed(seed))
        out, dropped = calculator(golden["x"], ids, weights)
        alive = out.abs().sum(-1) > 0
        assert dropped == 14
        assert [int(alive[a:b].sum()) for a, b in ((0, 10), (10, 18), (18, 20))] == [2, 2, 2]
        kept.append(alive)
    assert torch.stack(kept).any(0).all()  # no token is dropped always
    padding = torch.arange(20) % 2 == 1
    out, dropped = calculator(golden["x"], ids, weights, ~padding)
    # 10 valid tokens: capacity 1 each for 5, 4, 1 of them; padding is neither kept back nor counted
    assert dropped == 4 + 3
    with pytest.raises(UserError, match="takes 1"):
        calculator(golden["x"], golden["indices"], golden["scores"])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_of_narrow_experts_is_exact_in_value_and_gradient(golden, implementation):
    """Against the experts one by one at their true widths; padding has gradient exactly zero."""
    experts = experts_of(golden, implementation)
    x = golden["x"].clone().requires_grad_()
    weights = golden["scores"].clone().requires_grad_()
    torch.manual_seed(1)
    towards = torch.randn(20, 32)
    (experts(x, golden["indices"], weights) * towards).sum().backward()

    plain = {
        f"{e}.{kind}": golden[f"expert{e}.{kind}"].clone().requires_grad_()
        for e in range(4)
        for kind in ("gate", "up", "down")
    }
    x2 = golden["x"].clone().requires_grad_()
    weights2 = golden["scores"].clone().requires_grad_()
    total = torch.zeros(())
    for t in range(20):
        for k in range(2):
            e = int(golden["indices"][t, k])
            hidden = torch.nn.functional.silu(plain[f"{e}.gate"] @ x2[t]) * (
                plain[f"{e}.up"] @ x2[t]
            )
            total = total + weights2[t, k] * (plain[f"{e}.down"] @ hidden) @ towards[t]
    total.backward()
    close = {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(x.grad, x2.grad, **close)
    torch.testing.assert_close(weights.grad, weights2.grad, **close)
    for e, size in enumerate(SIZES):
        gate_up, down = experts.gate_up_proj.grad[e], experts.down_proj.grad[e]
        torch.testing.assert_close(gate_up[:size], plain[f"{e}.gate"].grad, **close)
        torch.testing.assert_close(gate_up[24 : 24 + size], plain[f"{e}.up"].grad, **close)
        torch.testing.assert_close(down[:, :size], plain[f"{e}.down"].grad, **close)
        assert not gate_up[size:24].any()
        assert not gate_up[24 + size :].any()
        assert not down[:, size:].any()


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm", "moesaic"])
def test_biased_experts_agree(implementation):
    torch.manual_seed(0)
    config = tiny(mlp_bias=True)
    experts = make_experts(config, SIZES)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(0, 0.3)
        experts.zero_padding()
    x, ids = torch.randn(9, 32), torch.randint(0, 4, (9, 2))
    weights = torch.rand(9, 2)
    expected = experts(x, ids, weights)
    config._experts_implementation = implementation
    torch.testing.assert_close(experts(x, ids, weights), expected, atol=1e-5, rtol=1e-4)
