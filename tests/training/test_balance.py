"""What balances a model: observed losses, moved biases, and the models' own losses untouched."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

import moesaic
from moesaic.core.errors import UserError
from moesaic.models.balance import share_balance
from moesaic.training.balance import choose_balance, correction_biases
from moesaic.training.config import BalanceConfig, OptimizerConfig
from moesaic.training.loop import train
from moesaic.training.optimizer import Optimizer
from moesaic.training.setup import recompute_activations
from moesaic.training.step import accumulate, build_pass, run_update
from moesaic.training.telemetry import read_log_lines, spread
from tests.helpers import run_cli
from tests.routing.test_recording import SMALL
from tests.training import models

T = 12
OBSERVED = [models.deepseek_v2, models.deepseek_v3]
SCORES = {
    models.deepseek_v2: lambda logits: logits.softmax(-1),
    models.deepseek_v3: lambda logits: logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True),
}


def tokens(sequences: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 64, (sequences, T), generator=torch.Generator().manual_seed(seed))


def gradients(model, ids_ABT, balance=None, run_pass=None):
    model.zero_grad(set_to_none=True)
    result = accumulate(run_pass or build_pass(model, balance), ids_ABT)
    return result, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def choose(model, **settings):
    return choose_balance(model, BalanceConfig(**settings))


def plain_loss(model, ids_BT, scores):
    """DeepSeek-V3, equations 17 to 20, one sequence, layer and expert at a time."""
    heard = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _, args, output: heard.append(output))
        for layer in model.model.layers[1:]
    ]
    model(input_ids=ids_BT)
    for hook in hooks:
        hook.remove()
    total = 0.0
    for logits_TE, _, ids_TK in heard:
        experts, top_k = logits_TE.shape[1], ids_TK.shape[1]
        for b in range(len(ids_BT)):
            rows = slice(b * T, (b + 1) * T)
            p_TE = scores(logits_TE[rows])
            for e in range(experts):
                f = experts / (top_k * T) * int((ids_TK[rows] == e).sum())
                total = total + f * p_TE[:, e].mean() / len(ids_BT)
    return total


@pytest.mark.parametrize("build", OBSERVED)
def test_loss_and_gradient_are_the_plain_ones(build):
    model, ids = build(), tokens(3)
    result, got = gradients(model, ids[None], choose(model, coefficient=0.5))
    _, without = gradients(model, ids[None], choose(model, coefficient=0))
    model.zero_grad(set_to_none=True)
    loss = 0.5 * plain_loss(model, ids, SCORES[build])
    loss.backward()
    assert float(result.values["balance_loss"]) == pytest.approx(loss.item(), rel=1e-6)
    assert loss.item() > 0.5 * 2 * 1.01  # two layers, neither balanced
    for layer in (1, 2):
        name = f"model.layers.{layer}.mlp.gate.weight"
        expected = model.get_parameter(name).grad
        assert float(expected.norm()) > 1e-3
        torch.testing.assert_close(got[name] - without[name], expected, rtol=1e-3, atol=1e-6)
    for name, parameter in model.named_parameters():  # it reaches what is below the routers, too
        if parameter.grad is not None:
            torch.testing.assert_close(
                got[name] - without[name], parameter.grad, rtol=1e-3, atol=2e-6
            )


def test_gradient_equals_finite_differences():
    draw = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(12, 5, dtype=torch.float64, generator=draw, requires_grad=True)
    ids_TK = logits_TE.topk(2).indices

    def loss(logits_TE):
        scores_TE = logits_TE.sigmoid()
        return share_balance(scores_TE / scores_TE.sum(-1, keepdim=True), ids_TK, groups=3)

    assert torch.autograd.gradcheck(loss, (logits_TE,))


@pytest.mark.parametrize("build", OBSERVED)
@pytest.mark.parametrize("passes", [2, 4])
def test_accumulation_changes_neither_loss_nor_gradient(build, passes):
    model, ids = build(), tokens(4)
    balance = choose(model, coefficient=0.5)
    whole, expected = gradients(model, ids[None], balance)
    parts, got = gradients(model, ids.view(passes, 4 // passes, T), balance)
    for name in ("loss", "balance_loss"):
        assert float(parts.values[name]) == pytest.approx(float(whole.values[name]), rel=1e-6)
    assert torch.equal(parts.routing["load"], whole.routing["load"])
    assert expected.keys() == got.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)


def test_recomputed_layers_and_compiled_passes_give_the_same():
    ids = tokens(4).view(2, 2, T)
    model = models.deepseek_v3()
    expected, gradient = gradients(model, ids, choose(model, coefficient=0.5))
    for compiled in (False, True):
        model = models.deepseek_v3().train()
        if not compiled:
            recompute_activations(model)
        run_pass = build_pass(model, choose(model, coefficient=0.5))
        if compiled:
            torch._dynamo.reset()
            run_pass = torch.compile(run_pass, backend="eager")
        result, got = gradients(model, ids, run_pass=run_pass)
        assert torch.equal(result.routing["load"], expected.routing["load"])
        assert float(result.values["balance_loss"]) == pytest.approx(
            float(expected.values["balance_loss"]), rel=1e-6
        )
        for name in gradient:
            torch.testing.assert_close(got[name], gradient[name], rtol=1e-4, atol=1e-6)


def collapsed(rate: float, updates: int = 60) -> float:
    """Spread of load after updates of a model whose bias sends everything to two experts."""
    model = models.deepseek_v3()
    for bias_E in correction_biases(model):
        bias_E[:2] += 1.0
    balance = choose(model, coefficient=0, bias_rate=rate)
    optimizer = Optimizer(model, OptimizerConfig(lr=1e-9))  # nothing but the bias moves
    run_pass = build_pass(model, balance)
    if balance.observer is None:
        run_pass = build_pass(model, choose(model, coefficient=1e-9, bias_rate=0))
    for step in range(updates):
        ids = tokens(16, seed=step).view(2, 8, T)
        result = run_update(run_pass, optimizer, ids, balance=balance)
        if step == 0:
            assert spread("load", result.routing["load"])["load_cv"] > 1.5
    return spread("load", result.routing["load"])["load_cv"]


def test_moved_biases_balance_a_collapsed_router():
    assert collapsed(rate=0.02) < 0.3
    assert collapsed(rate=0.0) > 1.5


def test_a_bias_moves_by_the_sign_of_the_whole_updates_load():
    model = models.deepseek_v3()
    balance = choose(model, bias_rate=0.25)
    ids = tokens(4).view(2, 2, T)
    optimizer = Optimizer(model, OptimizerConfig())
    result = run_update(build_pass(model, balance), optimizer, ids, balance=balance)
    load_LE = result.routing["load"]
    assert load_LE.sum(-1).tolist() == [4 * T * 2] * 2
    expected_LE = 0.25 * torch.sign(load_LE.mean(-1, keepdim=True) - load_LE)
    assert torch.equal(torch.stack(correction_biases(model)), expected_LE)
    assert expected_LE.unique().numel() > 1


def test_small_steps_of_a_large_bias_are_not_lost_in_bfloat16():
    model = models.deepseek_v3().to(torch.bfloat16)
    for bias_E in correction_biases(model):
        bias_E += 1.0
    balance = choose(model)
    balance.move_biases(torch.tensor([[9.0, 1, 1, 1, 1, 1, 1, 1]] * 2))
    for bias_E in correction_biases(model):
        torch.testing.assert_close(bias_E, 1 + 1e-3 * torch.tensor([-1.0] + 7 * [1.0]))


def test_loads_are_added_up_over_ranks(monkeypatch):
    model = models.deepseek_v3()
    balance = choose(model)
    here, there = torch.tensor([[9.0, 1, 1, 1, 1, 1, 1, 1]] * 2), torch.zeros(2, 8)
    there[:, 1] = 30
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda load: load.add_(there))
    balance.move_biases(here)
    for bias_E in correction_biases(model):
        torch.testing.assert_close(bias_E, 1e-3 * torch.tensor([-1.0, -1, 1, 1, 1, 1, 1, 1]))
    assert here.sum() == 32  # what is reported stays this rank's


def test_a_model_with_its_own_loss_is_left_alone():
    model, ids = models.mixtral(), tokens(4).view(2, 2, T)
    other = copy.deepcopy(model)
    balance = choose_balance(model)
    assert (balance.kind, balance.observer, balance.rate) == ("native", None, 0.0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    optimizer, inner = (Optimizer(m, OptimizerConfig(lr=1e-2)) for m in (model, other))
    run_pass = build_pass(model, balance)
    for _ in range(3):
        run_update(run_pass, optimizer, ids, balance=balance)
        for ids_BT in ids:
            outputs = other(input_ids=ids_BT, use_cache=False, output_router_logits=True)
            logits = outputs.logits[:, :-1].flatten(0, 1).float()
            loss = torch.nn.functional.cross_entropy(
                logits, ids_BT[:, 1:].flatten(), reduction="sum"
            ) / (4 * (T - 1))
            (loss + outputs.aux_loss * 0.001 / 2).backward()
        inner.step()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


FAMILIES = {  # what computes the loss, score function, routers, of these with a bias
    "deepseek_v2": ({"n_routed_experts": 6}, "observed", "softmax", 2, 0),
    "deepseek_v3": ({"n_routed_experts": 6}, "observed", "sigmoid", 2, 2),
    "glm4_moe": ({"n_routed_experts": 6}, "observed", "sigmoid", 2, 2),
    "afmoe": ({"num_experts": 6}, "observed", "sigmoid", 2, 2),  # the bias is the block's
    "hunyuan_v1_moe": ({"num_experts": 6, "moe_topk": 2}, "observed", "softmax", 3, 0),
    "gemma4_text": ({"num_experts": 6}, "observed", "softmax", 3, 0),
    "ernie4_5_moe": ({}, "native", "softmax", 2, 2),  # [1, E], a parameter
    "minimax_m2": ({"num_local_experts": 6}, "native", "sigmoid", 3, 3),
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_families(model_type):
    extra, kind, score, routers, biased = FAMILIES[model_type]
    cls = CONFIG_MAPPING[model_type]
    fields = {name for c in cls.__mro__ for name in getattr(c, "__annotations__", {})}
    torch.manual_seed(0)
    config = cls(**{k: v for k, v in {**SMALL, **extra}.items() if k in fields})
    model = AutoModelForCausalLM.from_config(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.get_rng_state()
    balance = choose_balance(model)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert balance.kind == kind
    assert balance.observer.score == score
    assert balance.observer.widths == (6,) * routers
    assert sum(bias is not None for bias in balance.biases) == biased
    assert balance.rate == (1e-3 if biased else 0)
    assert balance.coefficient == (1e-3 if kind == "native" or not biased else 1e-4)
    assert ("own loss" in str(balance)) == (kind == "native")
    assert f"{score} scores observed in {routers} routers" in str(balance) or kind == "native"
    assert (f"bias of {biased} routers moves by 0.001" in str(balance)) == bool(biased)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and not parameter.any():  # routers that start at zero
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    with moesaic.recording(model) as rec:
        result, _ = gradients(model, tokens(2)[None], balance)
    counts = [torch.bincount(ids.flatten(), minlength=6) for ids in rec.experts.values()]
    assert torch.equal(result.routing["load"], torch.stack(counts).float())
    balance.observer.start()
    model(tokens(2))
    assert all(choice.logits.requires_grad for choice in balance.observer.stop())


def test_jetmoe_is_weighed_by_its_own_field():
    from transformers import JetMoeConfig, JetMoeForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 16}
    heads = {"num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 4}
    model = JetMoeForCausalLM(JetMoeConfig(**shape, **heads, num_experts_per_tok=2))
    assert str(choose_balance(model)) == "balance: the model's own loss, coefficient 0.01"
    balance = choose(model, coefficient=0.5)
    result, _ = gradients(model, tokens(2)[None], balance)
    expected = model(input_ids=tokens(2), output_router_logits=True).aux_loss
    assert float(result.values["balance_loss"]) == pytest.approx(0.5 * expected.item(), rel=1e-6)


def test_the_coefficient_that_a_config_names_is_the_default():
    model = models.deepseek_v3()
    model.config.aux_loss_alpha = 0.02
    assert choose_balance(model).coefficient == 0.02
    assert choose(model, coefficient=0.1).coefficient == 0.1
    # transformers' class does nothing with this field either
    model = models.deepseek_v2()
    model.config.router_aux_loss_coef = 0.03
    balance = choose_balance(model)
    assert (balance.kind, balance.coefficient) == ("observed", 0.03)


def test_a_family_of_another_package_on_our_classes_has_its_own_loss():
    from moesaic.models.families.xverse_moe import XverseConfig, XverseForCausalLM

    class Acme(XverseForCausalLM):
        __module__ = "acme"

    shape = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 16}
    config = XverseConfig(**shape, num_attention_heads=2, num_experts=4, num_experts_per_tok=2)
    assert choose_balance(Acme(config)).kind == "native"


def test_settings_without_effect_are_refused():
    with pytest.raises(UserError, match="MixtralForCausalLM have no correction bias"):
        choose(models.mixtral(), bias_rate=1e-3)
    with pytest.raises(UserError, match="no experts"):
        choose(models.dense(), bias_rate=1e-3)
    off = choose(models.deepseek_v3(), coefficient=0, bias_rate=0)
    assert off.observer is None
    assert "none, because the coefficient" in str(off)
    assert choose(models.deepseek_v3(), bias_rate=0).coefficient == 1e-3  # the loss alone
    unused = models.llama_moe(gate_use_balance=False)
    assert str(choose_balance(unused)) == "balance: none, because gate_use_balance is off"
    assert choose(models.mixtral(), bias_rate=0).rate == 0


def log(path):
    timed = ("seconds", "tokens_per_second", "mfu")
    lines = read_log_lines(path / "log.jsonl")
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_is_the_uninterrupted_one(precision, settings, tmp_path, monkeypatch):
    from moesaic.training import loop

    config = settings(models.deepseek_v3, steps=7, precision=precision, save_dtype="bfloat16")
    straight = train(config, out=tmp_path / "straight")
    done = []

    def limited(*args, **kwargs):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(1)
        return run_update(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "run_update", limited)
        with pytest.raises(KeyboardInterrupt):
            train(config, out=tmp_path / "run")
    resumed = train(config, out=tmp_path / "run")
    assert log(resumed) == log(straight)
    a, b = (load_file(path / "model.safetensors") for path in (resumed, straight))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    biases = [tensor for name, tensor in b.items() if "e_score_correction_bias" in name]
    assert len(biases) == 2
    for bias_E in biases:  # whole steps, not rounded to the type of the weights
        assert bias_E.dtype == torch.float32
        assert bool(bias_E.any())
        torch.testing.assert_close(bias_E, (bias_E * 1e3).round() / 1e3, rtol=0, atol=1e-7)


def test_the_command_says_which_balance(settings, tmp_path):
    from moesaic.core.config import parse, to_yaml
    from moesaic.training.config import TrainConfig

    config = settings(models.deepseek_v3, steps=3, log={"every": 3})
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(parse(TrainConfig, config, source="test")))
    done = run_cli("train", file, "-o", tmp_path / "run")
    assert done.exit_code == 0, done.stderr
    said = " ".join(done.stderr.split())
    assert (
        "balance: loss on the sigmoid scores observed in 2 routers, coefficient 0.0001 and bias of "
        "2 routers moves by 0.001 an update" in said
    )
    line = next(line for line in log(tmp_path / "run") if line["event"] == "train")
    assert line["balance_loss"] > 1e-4
    assert {"load_cv", "load_max", "importance_cv"} <= line.keys()
    planned = run_cli("train", file, "-o", tmp_path / "other", "--dry-run", "--json")
    assert "scores observed in 2 routers" in planned.json["balance"]
