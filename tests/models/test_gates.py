"""Gates: the original's golden numbers, and the properties a right gate must have."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moesaic.core.errors import UserError
from moesaic.models.gates import (
    GATES,
    Gate,
    RandomLearnableGate,
    RandomPlainGate,
    SwitchBalancedGate,
    TopKBalancedNoisyGate,
    UniformLearnableGate,
    UniformPlainGate,
    squared_variation,
)
from tests.models.golden import Fixed, arrays

NETWORKS = ("mlp", "linear")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return arrays("gates")


def gate_of(kind: type[Gate], golden: dict[str, torch.Tensor], k: int, network: str, **settings):
    gate = kind(32, 4, k, network=network, **settings)
    weights = {"mlp": ("0.weight", "2.weight"), "linear": ("weight",)}[network]
    values = {"mlp": ("mlp_w0", "mlp_w2"), "linear": ("linear_w",)}[network]
    state = {f"gate_network.{w}": golden[v] for w, v in zip(weights, values, strict=True)}
    if hasattr(gate, "weight_noise"):
        state["weight_noise.weight"] = golden["noise_w"]
    gate.load_state_dict(state)
    gate.randomness = Fixed(
        normal=golden["noise"], uniform=golden["uniform"], gumbel=golden["gumbel"]
    )
    return gate


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_topk_gate_equals_the_original(golden, network, k, softmax, noise, mode):
    kind = "softmax" if softmax else "raw"
    name = f"topk.{network}.k{k}.{kind}.{'noise' if noise else 'nonoise'}.{mode}"
    gate = gate_of(
        TopKBalancedNoisyGate,
        golden,
        k,
        network,
        use_softmax=softmax,
        add_noise=noise,
        load_rule="original",
    ).train(mode == "train")
    out = gate(golden["x"])
    assert torch.equal(out.ids, golden[f"{name}.topK_indices"])
    torch.testing.assert_close(out.weights, golden[f"{name}.topK_scores"], **CLOSE)
    torch.testing.assert_close(out.load, golden[f"{name}.load"].float(), **CLOSE)
    torch.testing.assert_close(out.importance, golden[f"{name}.importance"], **CLOSE)
    torch.testing.assert_close(out.balance_loss, golden[f"{name}.balance_loss"], **CLOSE)
    gradients = [key for key in golden if key.startswith(f"{name}.grad.")]
    assert len(gradients) == (
        {"mlp": 2, "linear": 1}[network] + noise if (k, softmax, mode) == (2, True, "train") else 0
    )
    if gradients:
        out.balance_loss.backward()
        parameters = dict(gate.named_parameters())
        for key in gradients:
            found = parameters[key.split(".grad.")[1]].grad
            torch.testing.assert_close(found, golden[key], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("network", NETWORKS)
def test_topk_scores_over_all_experts_as_the_original(golden, network):
    name = f"topk_return_scores.{network}.k2.eval"
    gate = gate_of(TopKBalancedNoisyGate, golden, 2, network).eval()
    out = gate(golden["x"])
    torch.testing.assert_close(out.logits.softmax(-1), golden[f"{name}.scores"], **CLOSE)
    torch.testing.assert_close(out.load, golden[f"{name}.load"].float())
    torch.testing.assert_close(out.importance, golden[f"{name}.importance"], **CLOSE)
    torch.testing.assert_close(out.balance_loss, golden[f"{name}.balance_loss"], **CLOSE)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_switch_gate_equals_the_original(golden, network, softmax, noise, training):
    kind = "softmax" if softmax else "raw"
    name = f"switch.{network}.{kind}.{'noise' if noise else 'nonoise'}"
    gate = gate_of(
        SwitchBalancedGate,
        golden,
        1,
        network,
        use_softmax=softmax,
        add_noise=noise,
        score_rule="original",
    ).train(training)
    out = gate(golden["x"])
    assert torch.equal(out.ids[:, 0], golden[f"{name}.topK_indices"])
    torch.testing.assert_close(out.weights[:, 0], golden[f"{name}.topK_scores"], **CLOSE)
    torch.testing.assert_close(out.load, golden[f"{name}.load"], **CLOSE)
    torch.testing.assert_close((out.load * 20).round().long(), golden[f"{name}.expert_batch_size"])
    torch.testing.assert_close(out.importance, golden[f"{name}.importance"], **CLOSE)
    torch.testing.assert_close(out.balance_loss, golden[f"{name}.balance_loss"], **CLOSE)


def test_switch_gate_scores_are_probabilities_and_evaluation_is_not_noisy(golden):
    gate = gate_of(SwitchBalancedGate, golden, 1, "mlp").eval()
    out = gate(golden["x"])
    probs = out.logits.softmax(-1)
    assert torch.equal(out.ids[:, 0], probs.argmax(-1))
    torch.testing.assert_close(out.weights[:, 0], probs.amax(-1))
    noisy = gate.train()(golden["x"])
    assert torch.equal(noisy.ids[:, 0], golden["switch.mlp.softmax.noise.topK_indices"])
    torch.testing.assert_close(noisy.weights, probs.gather(1, noisy.ids))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("softmax", [True, False])
def test_uniform_and_random_gates_equal_the_original(golden, network, softmax):
    kind = "softmax" if softmax else "raw"
    for name, gate_class, k in (
        (f"uniform_learnable.{network}.{kind}", UniformLearnableGate, 4),
        (f"random_learnable.{network}.k2.{kind}", RandomLearnableGate, 2),
    ):
        out = gate_of(gate_class, golden, k, network, use_softmax=softmax, add_noise=False)(
            golden["x"]
        )
        assert torch.equal(out.ids, golden[f"{name}.topK_indices"])
        torch.testing.assert_close(out.weights, golden[f"{name}.topK_scores"], **CLOSE)
        assert out.balance_loss == golden[f"{name}.balance_loss"] == 0
        # the original reports -1, "not measured"; here both are measured
        assert golden[f"{name}.load"] == golden[f"{name}.importance"] == -1
        assert torch.equal(out.load, torch.bincount(out.ids.flatten(), minlength=4).float())

    for name, gate_class, k in (
        (f"uniform_plain.{kind}", UniformPlainGate, 4),
        (f"random_plain.k2.{kind}", RandomPlainGate, 2),
    ):
        gate = gate_class(32, 4, k, use_softmax=softmax, score_rule="original")
        gate.randomness = Fixed(uniform=golden["uniform"])
        out = gate(golden["x"])
        assert list(gate.parameters()) == []
        assert torch.equal(out.ids, golden[f"{name}.topK_indices"])
        # the original's random gate returns a score for every expert, all the same
        torch.testing.assert_close(out.weights, golden[f"{name}.topK_scores"][:, :k])
        torch.testing.assert_close(out.importance, out.load * out.weights[0, 0])


def test_random_plain_weights_sum_to_one():
    out = RandomPlainGate(8, 6, 3)(torch.randn(10, 8))
    torch.testing.assert_close(out.weights.sum(-1), torch.ones(10))


def test_noisy_load_is_the_chance_of_being_chosen_again(golden):
    """Shazeer et al., eq. 9: redraw one expert's noise, count how often it is chosen."""
    gate = gate_of(TopKBalancedNoisyGate, golden, 2, "mlp").train()
    x = golden["x"]
    out = gate(x)
    clean = out.logits
    sigma = F.softplus(gate.weight_noise(x)) + gate.noise_epsilon
    noisy = clean + sigma * golden["noise"]
    torch.manual_seed(0)
    expected = torch.zeros(4)
    for expert in range(4):
        others = torch.cat((noisy[:, :expert], noisy[:, expert + 1 :]), dim=1)
        second_T1 = others.topk(2, dim=-1).values[:, 1:]
        draws = clean[:, expert, None] + sigma[:, expert, None] * torch.randn(20, 20000)
        expected[expert] = (draws > second_T1).float().mean(-1).sum()
    torch.testing.assert_close(out.load, expected, atol=0.05, rtol=0)
    assert (out.load - golden["topk.mlp.k2.softmax.noise.train.load"]).abs().max() > 1


def test_load_counts_every_choice_by_default_even_of_negative_scores():
    gate = TopKBalancedNoisyGate(8, 5, 3, network="linear", use_softmax=False).eval()
    out = gate(torch.randn(30, 8))
    assert (out.weights < 0).any()
    assert out.load.sum() == 90
    gate.load_rule = "original"
    assert gate(torch.randn(30, 8)).load.sum() < 90


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("training", [True, False])
def test_rows_that_are_not_valid_change_no_statistic(name, training):
    torch.manual_seed(0)
    k = 1 if name == "SwitchBalancedGate" else 2
    gate = GATES[name](16, 5, k, network="mlp").train(training)
    x, noise = torch.randn(12, 16), torch.randn(12, 5)
    valid = torch.tensor([True, False, True] * 4)
    x[1] = float("nan")
    gate.randomness = Fixed(normal=noise, uniform=noise, gumbel=noise)
    masked = gate(x, valid)
    gate.randomness = Fixed(normal=noise[valid], uniform=noise[valid], gumbel=noise[valid])
    alone = gate(x[valid])
    torch.testing.assert_close(masked.load, alone.load)
    torch.testing.assert_close(masked.importance, alone.importance)
    torch.testing.assert_close(masked.balance_loss, alone.balance_loss)
    assert torch.equal(masked.ids[valid], alone.ids)


def test_no_valid_row_gives_no_nan():
    for name in GATES:
        gate = GATES[name](8, 4, 1, network="linear")
        out = gate(torch.randn(3, 8), torch.zeros(3, dtype=torch.bool))
        assert out.balance_loss == 0
        assert torch.isfinite(out.load).all()


@pytest.mark.parametrize("name", ["TopKBalancedNoisyGate", "SwitchBalancedGate"])
def test_balance_can_be_turned_off_and_statistics_skipped(name):
    gate = GATES[name](8, 4, 1, network="mlp", use_balance=False)
    assert gate(torch.randn(9, 8)).balance_loss == 0
    gate.use_balance = True
    assert gate(torch.randn(9, 8)).balance_loss > 0
    out = gate(torch.randn(9, 8), statistics=False)
    assert out.balance_loss is out.load is out.importance is None
    assert out.weights.shape == (9, 1)


@pytest.mark.parametrize(
    ("chosen", "settings"),
    [
        (1, {}),
        (1, {"add_noise": False, "weighting": "one"}),
        (2, {"add_noise": False, "weighting": "one"}),
        (1, {"add_noise": False, "weighting": "tempered"}),
        (2, {"add_noise": False, "weighting": "tempered"}),
    ],
)
def test_balance_loss_pushes_towards_balance(chosen, settings):
    """A gate that sends all to one expert: descending its balance loss spreads the tokens."""
    torch.manual_seed(0)
    gate = TopKBalancedNoisyGate(
        8, 4, chosen, network="linear", balance_loss_weight=1.0, **settings
    ).train()
    x = torch.randn(256, 8)
    x[:, 0] = 1.0
    with torch.no_grad():
        gate.gate_network.weight.normal_(0, 0.02)
        gate.gate_network.weight[2, 0] = 2.0
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.05)
    before = squared_variation(gate.eval()(x).load)
    gate.train()
    for _ in range(100):
        optimizer.zero_grad()
        gate(x).balance_loss.backward()
        optimizer.step()
    assert squared_variation(gate.eval()(x).load) < 0.1 * before


@pytest.mark.parametrize("chosen", [1, 3])
def test_tempered_weights_are_one_then_a_softmax_then_the_best_alone(chosen):
    torch.manual_seed(0)
    gate = TopKBalancedNoisyGate(
        8, 5, chosen, network="linear", add_noise=False, weighting="tempered"
    )
    x_TD = 3 * torch.randn(40, 8)
    assert torch.equal(gate(x_TD).weights, torch.ones(40, chosen))
    compared = max(2, chosen)  # one chosen expert is weighed beside the next best
    kept_TK = gate.logits(x_TD).topk(compared).values
    for exponent in (1.0, 100.0):  # whatever is learned, no weight is larger than their number
        gate.correction.data.fill_(exponent / 10)
        wanted_TK = compared * (exponent * kept_TK).softmax(-1)[:, :chosen]
        torch.testing.assert_close(gate(x_TD).weights, wanted_TK)
    assert gate.correction.shape == (1,)
    gate.correction.data.fill_(-0.2)
    gate(x_TD).weights[:, 0].square().sum().backward()
    assert all(bool(p.grad.any()) for p in (gate.correction, gate.gate_network.weight))


def test_choice_in_bfloat16_follows_float32_scores_of_the_same_logits():
    torch.manual_seed(0)
    gate = TopKBalancedNoisyGate(32, 8, 3, network="mlp").bfloat16().eval()
    out = gate(torch.randn(64, 32, dtype=torch.bfloat16))
    assert out.logits.dtype == torch.float32
    assert out.weights.dtype == torch.bfloat16
    assert out.importance.dtype == torch.float32
    torch.testing.assert_close(out.importance.sum(), torch.tensor(64.0))


def test_bad_arguments_are_user_errors():
    with pytest.raises(UserError, match="Did you mean 'linear'"):
        TopKBalancedNoisyGate(8, 4, 2, network="liner")
    with pytest.raises(UserError, match="num_selects=3 with SwitchBalancedGate"):
        SwitchBalancedGate(8, 4, 3, network="mlp")
