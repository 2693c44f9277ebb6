"""LLaMA-MoE models: what they are equal to, how they are used, and what their settings do."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import moesaic.models as families
from moesaic.core.errors import UserError
from moesaic.models.gates import Gate
from tests.models import tiny

LANGUAGE = (
    (families.LlamaMoEForCausalLM, tiny.config),
    (families.LlamaMoEResidualForCausalLM, tiny.residual_config),
)
EVERY = (
    (families.LlamaMoEModel, tiny.config),
    (families.LlamaMoEForCausalLM, tiny.config),
    (families.LlamaMoEForSequenceClassification, tiny.config),
    (families.LlamaMoEForQuestionAnswering, tiny.config),
    (families.LlamaMoEResidualModel, tiny.residual_config),
    (families.LlamaMoEResidualForCausalLM, tiny.residual_config),
    (families.LlamaMoEResidualForSequenceClassification, tiny.residual_config),
    (families.LlamaMoEResidualForQuestionAnswering, tiny.residual_config),
)
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm", "moesaic")
ROPE = {
    "default": {"rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0, 1.5, 2.0, 3.0],
        "long_factor": [2.0, 3.0, 5.0, 8.0],
        "original_max_position_embeddings": 16,
    },
}


# Equal to the dense model -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        *({"rope_parameters": {"rope_theta": 1e4, **rope}} for rope in ROPE.values()),
        {"tie_word_embeddings": True},
        {"head_dim": 16},
        {"attention_bias": True, "mlp_bias": True},
        {"hidden_act": "gelu", "num_key_value_heads": 4},
        {"pad_token_id": None},
    ],
    ids=[*ROPE, "tied", "head_dim", "biases", "gelu", "no_padding_id"],
)
def test_all_experts_on_equal_the_dense_model(fields):
    dense = tiny.dense(**fields)
    moe = tiny.split_of(dense, tiny.RAGGED)
    ids = tiny.ids(length=20)
    with torch.no_grad():
        torch.testing.assert_close(moe(ids).logits, dense(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_experts_implementation_gives_the_same_numbers(implementation):
    model = tiny.build(families.LlamaMoEForCausalLM, tiny.config(size_experts=tiny.RAGGED))
    ids = tiny.ids()
    model.set_experts_implementation("eager")
    expected = model(ids, labels=ids)
    expected.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model.set_experts_implementation(implementation)
    out = model(ids, labels=ids)
    out.loss.backward()
    torch.testing.assert_close(out.logits, expected.logits, atol=1e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("model_class", "make"), EVERY)
def test_the_implementation_asked_for_is_called_after_a_dense_llama(model_class, make):
    dense = tiny.dense()
    dense(tiny.ids())
    assert not dense._can_set_experts_implementation()
    calls = []

    def spy(module, hidden_states, top_k_index, top_k_weights):
        calls.append(type(module).__name__)
        return ALL_EXPERTS_FUNCTIONS["moesaic"](module, hidden_states, top_k_index, top_k_weights)

    ALL_EXPERTS_FUNCTIONS.register("spy", spy)
    model = tiny.build(model_class, make())
    assert model.config._experts_implementation == "moesaic"
    model(tiny.ids())
    assert calls == []
    model.set_experts_implementation("spy")
    model(tiny.ids())
    assert len(calls) == (4 if "Residual" in model_class.__name__ else 2)


def test_a_width_that_the_grouped_matmul_refuses_works_out_of_the_box():
    config = tiny.config(intermediate_size=172)  # four experts of 43
    model = tiny.build(families.LlamaMoEForCausalLM, config)
    ids = tiny.ids()
    found = model(ids).logits
    model.set_experts_implementation("eager")
    torch.testing.assert_close(found, model(ids).logits, atol=1e-5, rtol=1e-5)


# Use --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model_class", "make"), LANGUAGE)
def test_cached_generation_equals_recomputing_greedy_beam_and_sampled(model_class, make):
    model = tiny.build(model_class, make())
    for settings in (
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "top_k": 20},
    ):
        runs = []
        for cache in (True, False):
            torch.manual_seed(3)
            tokens = model.generate(
                tiny.ids(), max_new_tokens=8, eos_token_id=None, use_cache=cache, **settings
            )
            assert tokens.shape == (2, 20)
            runs.append(tokens)
        assert torch.equal(*runs)


@pytest.mark.parametrize(("model_class", "make"), LANGUAGE)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_neither_logits_nor_statistics(model_class, make, attention, side):
    model = tiny.build(model_class, make())
    model.set_attn_implementation(attention)
    short, long = tiny.ids(1, 7), tiny.ids(1, 12, seed=1)
    pad, zeros = torch.zeros(1, 5, dtype=torch.long), torch.zeros(1, 5)
    ones = torch.ones(1, 7)
    left = side == "left"
    ids = torch.cat((torch.cat((pad, short) if left else (short, pad), 1), long))
    mask = torch.cat((torch.cat((zeros, ones) if left else (ones, zeros), 1), torch.ones(1, 12)))
    real = mask.bool()
    with torch.no_grad():
        out = model(ids, attention_mask=mask)
        alone = [model(x) for x in (short, long)]
    joined = torch.cat([single.logits[0] for single in alone])
    torch.testing.assert_close(out.logits[real], joined, atol=1e-4, rtol=1e-4)
    for layer in range(2):
        for field in ("gate_load", "gate_importance"):
            expected = sum(getattr(single, field)[layer] for single in alone)
            torch.testing.assert_close(getattr(out, field)[layer], expected, atol=1e-4, rtol=1e-4)
    model.config.count_padding = True
    assert model(ids, attention_mask=mask).gate_load[0].sum() == 24 * model.config.num_selects


def test_left_padded_batches_generate_what_each_prompt_generates_alone():
    model = tiny.build(families.LlamaMoEForCausalLM, tiny.config())
    short, long = tiny.ids(1, 7), tiny.ids(1, 12, seed=1)
    ids = torch.cat((torch.cat((torch.zeros(1, 5, dtype=torch.long), short), 1), long))
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    together = model.generate(ids, attention_mask=(ids != 0).long(), **settings)[:, 12:]
    alone = [model.generate(x, **settings)[0, x.shape[1] :] for x in (short, long)]
    assert torch.equal(together, torch.stack(alone))


def test_generation_skips_statistics_and_forward_can():
    model = tiny.build(families.LlamaMoEForCausalLM, tiny.config())
    seen = []
    model.register_forward_hook(lambda *args: seen.append(args[2].gate_load))
    model.generate(tiny.ids(), max_new_tokens=3, do_sample=False)
    assert seen == [None] * len(seen) != []
    out = model(tiny.ids(), output_gate_stats=False)
    assert out.balance_loss is out.gate_load is out.gate_importance is None
    assert model(tiny.ids(), labels=tiny.ids(), output_gate_stats=False).balance_loss > 0


@pytest.mark.parametrize(("model_class", "make"), LANGUAGE)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_number(model_class, make, reentrant):
    model = tiny.build(model_class, make()).train()
    with torch.no_grad():
        for block in model.moe_blocks():
            block.gate.weight_noise.weight.normal_()
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_enable({"use_reentrant": reentrant})
    twin.enable_input_require_grads()
    ids, outs = tiny.ids(), []
    for one in (model, twin):
        torch.manual_seed(5)  # noise in training: the recomputed layers must draw it again
        out = one(ids, labels=ids, output_router_logits=True, output_hidden_states=True)
        z_loss = sum(logits.logsumexp(-1).square().mean() for logits in out.router_logits)
        (out.loss + 5 * out.balance_loss + z_loss).backward()
        outs.append(out)
    assert torch.equal(outs[0].loss, outs[1].loss)
    assert len(outs[1].gate_load) == len(outs[1].router_logits) == 2
    assert len(outs[1].hidden_states) == 3
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-5, msg=name)
        assert a.grad.any(), name


def test_outputs_as_a_tuple_have_the_same_values():
    ids = tiny.ids()
    for model_class, make in EVERY:
        model = tiny.build(model_class, make())
        full = model(ids, output_hidden_states=True)
        plain = model(ids, output_hidden_states=True, return_dict=False)
        assert isinstance(plain, tuple)
        assert len(plain) == len(full.to_tuple())
        first = next(iter(full.values()))
        assert torch.equal(plain[0], first)
        assert len(full.hidden_states) == 3
        model.config.return_dict = False
        assert isinstance(model(ids), tuple)


def test_attention_weights_and_hidden_states_are_the_models_own():
    model = tiny.build(families.LlamaMoEForCausalLM, tiny.config())
    model.set_attn_implementation("eager")
    out = model.model(tiny.ids(), output_hidden_states=True, output_attentions=True)
    assert [tuple(a.shape) for a in out.attentions] == [(2, 4, 12, 12)] * 2
    assert torch.equal(out.hidden_states[0], model.model.embed_tokens(tiny.ids()))
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)


def test_input_embeddings_take_the_place_of_ids():
    model = tiny.build(families.LlamaMoEForCausalLM, tiny.config())
    ids = tiny.ids()
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids))
    assert torch.equal(embedded.logits, model(ids).logits)
    with pytest.raises(UserError, match="exactly one"):
        model(ids, inputs_embeds=model.get_input_embeddings()(ids))


def test_runs_in_bfloat16_and_under_autocast():
    model = tiny.build(families.LlamaMoEForCausalLM, tiny.config())
    ids = tiny.ids()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    half = copy.deepcopy(model).to(torch.bfloat16)
    out = half(ids, labels=ids)
    assert out.logits.dtype == torch.bfloat16
    assert out.balance_loss.dtype == torch.float32
    torch.testing.assert_close(out.loss.float(), model(ids, labels=ids).loss, atol=0.1, rtol=0)


# Losses -----------------------------------------------------------------------------------------


def test_loss_is_cross_entropy_plus_balance_loss():
    model = tiny.build(families.LlamaMoEForCausalLM, tiny.config())
    ids = tiny.ids()
    out = model(ids, labels=ids)
    predicted = out.logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(predicted, ids[:, 1:].flatten())
    torch.testing.assert_close(out.lm_loss, expected)
    torch.testing.assert_close(out.loss, expected + out.balance_loss)
    assert out.balance_loss > 0
    model.set_moe_gate_use_balance(False)
    out = model(ids, labels=ids)
    assert out.balance_loss == 0
    assert torch.equal(out.loss, out.lm_loss)


def test_gradient_of_equal_micro_batches_does_not_grow_with_their_number():
    """With num_items_in_batch, two identical micro-batches give the gradient of one."""
    model = tiny.build(families.LlamaMoEForCausalLM, tiny.config(gate_balance_loss_weight=1.0))
    ids = tiny.ids()
    gradients = []
    for parts in (1, 3):
        model.zero_grad()
        items = torch.tensor(parts * 22)
        for _ in range(parts):
            model(ids, labels=ids, num_items_in_batch=items).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, three in zip(*gradients, strict=True):
        torch.testing.assert_close(one, three, atol=1e-6, rtol=1e-4)


def test_question_answering_loss_and_ignored_positions():
    model = tiny.build(families.LlamaMoEForQuestionAnswering, tiny.config())
    ids, start, end = tiny.ids(), torch.tensor([2, 12]), torch.tensor([5, 3])
    out = model(ids, start_positions=start, end_positions=end)
    assert out.start_logits.shape == out.end_logits.shape == (2, 12)
    first = torch.nn.functional.cross_entropy(out.start_logits[:1], start[:1])  # 12 is outside
    second = torch.nn.functional.cross_entropy(out.end_logits, end)
    torch.testing.assert_close(out.loss, (first + second) / 2 + out.balance_loss)
    assert model(ids).loss is None


# from ids alone, padding in front would be read as text
@pytest.mark.parametrize(("side", "hint"), [("left", "mask"), ("right", "mask"), ("right", "ids")])
def test_classifier_reads_the_last_token_on_either_side_of_the_padding(side, hint):
    config = tiny.config(num_labels=3)
    model = tiny.build(families.LlamaMoEForSequenceClassification, config)
    short = tiny.ids(1, 7)
    pad = torch.zeros(1, 5, dtype=torch.long)
    ids = torch.cat((pad, short) if side == "left" else (short, pad), dim=1)
    ids = torch.cat((ids, tiny.ids(1, 12, seed=1)))
    mask = (ids != 0).long() if hint == "mask" else None
    alone = model(short).logits[0]
    torch.testing.assert_close(
        model(ids, attention_mask=mask).logits[0], alone, atol=1e-5, rtol=1e-5
    )


def test_classifier_without_padding_id_and_its_losses():
    config = tiny.config(num_labels=3, pad_token_id=None)
    model = tiny.build(families.LlamaMoEForSequenceClassification, config)
    ids = tiny.ids()
    with pytest.raises(UserError, match="an attention_mask or"):
        model(ids)
    mask = torch.ones_like(ids)
    out = model(ids, attention_mask=mask, labels=torch.tensor([0, 2]))
    expected = torch.nn.functional.cross_entropy(out.logits, torch.tensor([0, 2]))
    torch.testing.assert_close(out.loss, expected + out.balance_loss)
    several = tiny.config(num_labels=3, problem_type="multi_label_classification")
    model = tiny.build(families.LlamaMoEForSequenceClassification, several)
    labels = torch.tensor([[1.0, 0, 1], [0, 0, 1]])
    out = model(ids, labels=labels)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(out.logits, labels)
    torch.testing.assert_close(out.loss, expected + out.balance_loss)
    model = tiny.build(families.LlamaMoEForSequenceClassification, tiny.config(num_labels=1))
    out = model(ids, labels=torch.tensor([0.5, 2.0]))
    expected = (out.logits[:, 0] - torch.tensor([0.5, 2.0])).square().mean()
    torch.testing.assert_close(out.loss, expected + out.balance_loss)


# Gates and calculators in a model ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("gate", "calculator", "k"),
    [
        ("TopKBalancedNoisyGate", "UniversalCalculator", 2),
        ("TopKBalancedNoisyGate", "SwitchDropTokenCalculator", 1),
        ("SwitchBalancedGate", "UniversalCalculator", 1),
        ("SwitchBalancedGate", "SwitchDropTokenCalculator", 1),
        ("UniformPlainGate", "UniformCalculator", 4),
        ("UniformLearnableGate", "UniversalCalculator", 4),
        ("RandomPlainGate", "UniversalCalculator", 2),
        ("RandomLearnableGate", "UniversalCalculator", 2),
    ],
)
@pytest.mark.parametrize("network", ["mlp", "linear"])
def test_every_gate_trains_in_a_model_and_survives_saving(tmp_path, gate, calculator, k, network):
    config = tiny.config(
        gate_type=gate, calculator_type=calculator, num_selects=k, gate_network=network
    )
    model = tiny.build(families.LlamaMoEForCausalLM, config).train()
    ids = tiny.ids()
    out = model(ids, labels=ids)
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert (out.balance_loss > 0) == ("Balanced" in gate)
    dropped = [int(n) for n in out.num_dropped_tokens]
    assert all(n >= 0 for n in dropped) if "Drop" in calculator else dropped == [-1, -1]
    model.eval().save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    torch.manual_seed(1)
    expected = model(ids).logits
    torch.manual_seed(1)
    assert torch.equal(loaded(ids).logits, expected)


def test_dropped_tokens_are_counted_without_padding():
    config = tiny.config(
        gate_type="SwitchBalancedGate",
        calculator_type="SwitchDropTokenCalculator",
        num_selects=1,
        capacity_factor=0.5,
    )
    model = tiny.build(families.LlamaMoEForCausalLM, config)
    ids = tiny.ids()
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    out = model(ids, attention_mask=mask)
    for load, dropped in zip(out.gate_load, out.num_dropped_tokens, strict=True):
        counts = (load * 16).round()
        assert counts.sum() == 16
        assert dropped == (counts - 2).clamp(min=0).sum()  # int(0.5 * 16 / 4)


# Settings ---------------------------------------------------------------------------------------


def test_setters_change_layers_and_config_and_survive_saving(tmp_path):
    model = tiny.build(families.LlamaMoEForCausalLM, tiny.config())
    model.set_moe_num_selects(1)
    model.set_moe_gate_use_softmax(False)
    model.set_moe_gate_use_balance(False)
    model.set_moe_gate_balance_loss_weight(0.5)
    model.set_moe_gate_add_noise(False)
    model.set_moe_gate_noise_epsilon(0.25)
    model.set_moe_calculator_multiply_gate_scores(False)
    model.set_moe_calculator_score_scale_factor(2.0)
    model.set_moe_calculator_score_scale_factor(3.0, layer_index=1)
    model.set_moe_calculator_drop_tokens(False)
    model.set_moe_calculator_dropped_padding("input")
    model.set_moe_calculator_capacity_factor(2.0)
    model.set_moe_gate_load_rule("original")
    model.set_moe_gate_score_rule("original")
    expected = {
        "load_rule": "original",
        "score_rule": "original",
        "num_selects": 1,
        "gate_use_softmax": False,
        "gate_use_balance": False,
        "gate_balance_loss_weight": 0.5,
        "gate_add_noise": False,
        "gate_noise_epsilon": 0.25,
        "multiply_gate_scores": False,
        "score_scale_factor": [2.0, 3.0],
        "drop_tokens": False,
        "dropped_padding": "input",
        "capacity_factor": 2.0,
    }
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for one in (model, loaded):
        assert {name: getattr(one.config, name) for name in expected} == expected
        for layer, block in enumerate(one.moe_blocks()):
            gate, calculator = block.gate, block.calculator
            assert (gate.num_selects, gate.use_softmax, gate.use_balance) == (1, False, False)
            assert (gate.balance_loss_weight, gate.add_noise) == (0.5, False)
            assert gate.noise_epsilon == 0.25
            assert gate.load_rule == gate.score_rule == "original"
            assert calculator.score_scale_factor == [2.0, 3.0][layer]
            assert not calculator.multiply_gate_scores
            assert (calculator.drop_tokens, calculator.dropped_padding) == (False, "input")
            assert calculator.capacity_factor == 2.0
    assert torch.equal(model(tiny.ids()).logits, loaded(tiny.ids()).logits)
    for bad in (0, 5):
        with pytest.raises(UserError, match=f"num_selects={bad} but the model has 4"):
            model.set_moe_num_selects(bad)
    with pytest.raises(UserError, match="3 scale factors for 2 layers"):
        model.set_moe_calculator_score_scale_factor([1.0, 2.0, 3.0])


def test_update_config_reads_the_layers():
    model = tiny.build(families.LlamaMoEForCausalLM, tiny.config())
    for block in model.moe_blocks():
        block.gate.num_selects = 3
        block.gate.noise_epsilon = 0.5
        block.calculator.score_scale_factor = 4.0
    model.update_config()
    assert (model.config.num_selects, model.config.gate_noise_epsilon) == (3, 0.5)
    assert model.config.score_scale_factor == 4.0


def test_noise_can_be_turned_on_where_the_model_had_none():
    model = tiny.build(families.LlamaMoEForCausalLM, tiny.config(gate_add_noise=False)).train()
    assert not any("weight_noise" in name for name, _ in model.named_parameters())
    torch.manual_seed(0)
    quiet = model(tiny.ids()).logits
    model.set_moe_gate_add_noise(True)
    weights = [p for name, p in model.named_parameters() if "weight_noise" in name]
    assert len(weights) == 2
    assert not any(w.any() for w in weights)
    assert not torch.equal(model(tiny.ids()).logits, quiet)
    assert torch.equal(model.eval()(tiny.ids()).logits, quiet)


@pytest.mark.parametrize(("model_class", "make"), LANGUAGE)
def test_new_models_start_sane_and_resets_draw_anew(model_class, make):
    model = tiny.build(model_class, make(size_experts=None, initializer_range=0.02))
    for name, parameter in model.named_parameters():
        if "weight_noise" in name:
            assert not parameter.any()
        elif "norm" in name:
            assert (parameter == 1).all()
        elif parameter.numel() >= 64:
            real = parameter[1:] if "embed_tokens" in name else parameter
            assert abs(real.std().item() - 0.02) < 0.006, name
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.reset_gate_network()
    model.reset_experts()
    routed = "moe_layer." if "Residual" in model_class.__name__ else "mlp."
    for name, parameter in model.named_parameters():
        redrawn = (f"{routed}gate.gate" in name) or (f"{routed}calculator.experts" in name)
        assert torch.equal(parameter, before[name]) != redrawn, name


def test_ragged_padding_is_zero_in_new_models_and_stays_zero_in_training():
    model = tiny.build(families.LlamaMoEForCausalLM, tiny.config(size_experts=tiny.RAGGED)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    ids = tiny.ids()
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    for block, sizes in zip(model.moe_blocks(), tiny.RAGGED, strict=True):
        experts = block.calculator.experts
        width = experts.intermediate_dim
        for e, size in enumerate(sizes):
            gate_up, down = experts.gate_up_proj[e], experts.down_proj[e]
            assert not gate_up[size:width].any()
            assert not gate_up[width + size :].any()
            assert not down[:, size:].any()
            assert gate_up[:size].all()


def test_freezing_the_gates_leaves_the_experts_gate_matrices_alone():
    model = tiny.build(families.LlamaMoEForCausalLM, tiny.config())
    model.freeze_gate()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in model.gate_parameters()}
    assert len(frozen) == 6
    assert not any("experts" in name for name in frozen)
    model.freeze_gate(False)
    assert all(p.requires_grad for p in model.parameters())


def test_routers_look_like_transformers_own():
    """(logits, weights, ids) from a forward hook, as for every native family."""
    model = tiny.build(families.LlamaMoEForCausalLM, tiny.config())
    seen = []
    for module in model.modules():
        if isinstance(module, Gate):
            module.register_forward_hook(lambda *args: seen.append(args[2]))
    out = model(tiny.ids(), output_router_logits=True)
    for report, logits in zip(seen, out.router_logits, strict=True):
        assert torch.equal(report[0], logits)
        chosen, ids = logits.topk(2)
        torch.testing.assert_close(report[1], chosen.softmax(-1))
        assert torch.equal(report[2], ids)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_selects": 5}, "num_selects=5 but the model has 4 experts"),
        ({"num_selects": 0}, "num_selects=0"),
        ({"num_experts": 3}, "3 experts do not divide a width of 64"),
        ({"size_experts": [[16] * 4]}, "Give 2 rows of 4 sizes"),
        ({"size_experts": [[16] * 4, [16] * 3]}, "Give 2 rows of 4 sizes"),
        ({"size_experts": [[16] * 4, [16, 16, 16, 15]]}, r"size_experts\[1\].* sums to 63"),
        ({"size_experts": [[16] * 4, [0, 32, 16, 16]]}, "must be positive"),
        ({"score_scale_factor": [1.0, 2.0, 3.0]}, "3 values but the model has 2 layers"),
        ({"gate_type": "TopKBalancedGate"}, "Did you mean 'TopKBalancedNoisyGate'"),
        ({"calculator_type": "Universal"}, "Available: SwitchDropTokenCalculator"),
        ({"gate_network": "lnear"}, "Did you mean 'linear'"),
        ({"load_rule": "new"}, "Unknown load_rule"),
        ({"dropped_padding": "one"}, "Unknown dropped_padding"),
        ({"calculator_type": "UniformCalculator"}, "takes 4 .* TopKBalancedNoisyGate chooses 2"),
        ({"calculator_type": "SwitchDropTokenCalculator"}, "takes 1 expert"),
    ],
)
def test_configs_that_cannot_be(fields, message):
    with pytest.raises(UserError, match=message):
        tiny.config(**fields)


def test_residual_configs_that_cannot_be():
    with pytest.raises(UserError, match="num_experts_residual=0"):
        tiny.residual_config(num_experts_residual=0)
    with pytest.raises(UserError, match="Give size_experts_residual"):
        tiny.residual_config(num_experts_residual=3)


def test_original_defaults():
    config = families.LlamaMoEConfig()
    assert (config.num_experts, config.num_selects, config.hidden_size) == (16, 4, 4096)
    assert (config.gate_type, config.gate_network) == ("TopKBalancedNoisyGate", "mlp")
    assert (config.score_scale_factor, config.capacity_factor) == (1.0, 1.25)
    assert config.rope_parameters == {"rope_theta": 10000.0, "rope_type": "default"}
    assert config.num_experts_per_tok == 4
    residual = families.LlamaMoEResidualConfig()
    assert (residual.num_experts, residual.num_selects) == (14, 2)
    assert (residual.intermediate_size_moe, residual.intermediate_size_residual) == (9632, 1376)


# The residual family ----------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", [False, True])
def test_residual_block_is_the_sum_of_its_parts(weighting):
    model = tiny.build(
        families.LlamaMoEResidualForCausalLM, tiny.residual_config(use_weighting=weighting)
    )
    block = model.model.layers[0].mlp
    x = torch.randn(2, 5, 32)
    routed, residual = block.moe_layer(x).hidden_states, block.residual_block(x)
    if weighting:
        share = block.weighting_network(x)
        torch.testing.assert_close(share.sum(-1), torch.ones(2, 5))
        routed, residual = routed * share[..., :1], residual * share[..., 1:]
    torch.testing.assert_close(block(x).hidden_states, routed + residual)
    gate = block.residual_block.gate.gate_network.weight
    weights = (x.flatten(0, 1) @ gate.T).softmax(-1)
    experts = block.residual_block.calculator.experts
    ids = torch.arange(2).expand(10, 2)
    torch.testing.assert_close(
        block.residual_block(x).flatten(0, 1), experts(x.flatten(0, 1), ids, weights)
    )


def test_the_auto_classes_know_all():
    autos = itertools.cycle(
        (
            AutoModel,
            AutoModelForCausalLM,
            AutoModelForSequenceClassification,
            AutoModelForQuestionAnswering,
        )
    )
    for (model_class, make), auto in zip(EVERY, autos, strict=False):
        assert type(auto.from_config(make())) is model_class
    assert isinstance(tiny.dense(), LlamaForCausalLM)
