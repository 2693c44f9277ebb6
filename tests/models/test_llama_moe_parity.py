"""LLaMA-MoE against the original program's golden numbers."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import moesaic.models  # noqa: F401
from tests.models.golden import FAMILIES, V1, Fixed, arrays, family

ORIGINAL = {"load_rule": "original", "count_padding": True}
CLOSE = {"atol": 1e-4, "rtol": 0}


@pytest.mark.parametrize("name", ["llama_moe", "llama_moe_uneven"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_family_fixture(name, attention):
    inputs, expected = family(name)
    model = AutoModelForCausalLM.from_pretrained(
        FAMILIES / name, attn_implementation=attention, **ORIGINAL
    ).eval()
    k = model.config.num_selects
    for case in ("plain", "right", "left"):
        given = "" if case == "plain" else f"{case}_"
        ids, mask = inputs[f"{given}input_ids"], inputs.get(f"{given}attention_mask")
        with torch.no_grad():
            out = model(ids, attention_mask=mask, labels=ids, output_router_logits=True)
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        torch.testing.assert_close(out.logits[real], expected[f"{case}/logits"][real], **CLOSE)
        for layer in range(2):
            logits = out.router_logits[layer]
            chosen, ids_TK = logits.topk(k)
            rows = real.flatten()
            assert torch.equal(ids_TK[rows], expected[f"{case}/topk_idx/{layer}"][rows])
            weights = expected[f"{case}/topk_weight/{layer}"]
            torch.testing.assert_close(chosen.softmax(-1)[rows], weights[rows], **CLOSE)
            wanted = expected[f"{case}/router_logits/{layer}"]
            torch.testing.assert_close(logits[rows], wanted[rows], **CLOSE)
            if case != "left":  # there the padding's own output is whatever attention leaves in it
                load, importance = (expected[f"{case}/{x}/{layer}"] for x in ("load", "importance"))
                assert torch.equal(out.gate_load[layer], load.float())
                torch.testing.assert_close(out.gate_importance[layer], importance, **CLOSE)
        if case != "left":
            torch.testing.assert_close(
                out.balance_loss, expected[f"{case}/balance_loss"][0], atol=1e-6, rtol=0
            )
        if case == "plain":
            torch.testing.assert_close(out.loss, expected["plain/loss"][0], **CLOSE)
    for cache in (True, False):
        prompt = inputs["input_ids"][:, :8]
        tokens = model.generate(
            prompt, max_new_tokens=8, do_sample=False, eos_token_id=None, use_cache=cache
        )
        assert torch.equal(tokens[:, 8:], expected["generate/tokens"])


def test_sequence_classification_fixture():
    inputs, expected = family("llama_moe_seqcls")
    model = AutoModelForSequenceClassification.from_pretrained(
        FAMILIES / "llama_moe_seqcls", **ORIGINAL
    ).eval()
    assert type(model).__name__ == "LlamaMoEForSequenceClassification"
    for case in ("plain", "right"):
        given = "" if case == "plain" else f"{case}_"
        out = model(
            inputs[f"{given}input_ids"],
            attention_mask=inputs.get(f"{given}attention_mask"),
            labels=inputs["labels"],
        )
        torch.testing.assert_close(out.logits, expected[f"{case}/logits"], **CLOSE)
        torch.testing.assert_close(out.loss, expected[f"{case}/loss"][0], **CLOSE)
        balance = expected[f"{case}/balance_loss"][0]
        torch.testing.assert_close(out.balance_loss, balance, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["moe_random", "moe_sharing_inner", "moe_sharing_inter"])
def test_converted_model(name):
    expected = arrays(f"{name}_io")
    model = AutoModelForCausalLM.from_pretrained(V1 / name, dtype=torch.float32).eval()
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(
            lambda _, args, out, index=index: seen.update({index: (args[0], out.hidden_states)})
        )
    ids = expected["input_ids"]
    with torch.no_grad():
        out = model(ids, labels=ids)
    torch.testing.assert_close(out.logits, expected["logits"], **CLOSE)
    torch.testing.assert_close(out.loss, expected["loss"], **CLOSE)
    torch.testing.assert_close(out.balance_loss, expected["balance_loss"], atol=1e-6, rtol=0)
    assert torch.equal(torch.stack(out.gate_load), expected["gate_load"])
    torch.testing.assert_close(torch.stack(out.gate_importance), expected["gate_importance"])
    assert torch.equal(torch.stack(out.num_dropped_tokens).float(), expected["num_dropped_tokens"])
    for layer in range(2):
        torch.testing.assert_close(seen[layer][0], expected["mlp_inputs"][layer], **CLOSE)
        torch.testing.assert_close(seen[layer][1], expected["mlp_outputs"][layer], **CLOSE)
    tokens = model.generate(
        expected["greedy"][:, :5], max_new_tokens=8, do_sample=False, eos_token_id=None
    )
    assert torch.equal(tokens, expected["greedy"])


@pytest.mark.parametrize("checkpointing", [None, True, False])
@pytest.mark.parametrize("implementation", ["eager", "moesaic"])
def test_training_step_with_noise(checkpointing, implementation):
    """Loss, noisy load and gradients; `checkpointing` is use_reentrant, or None for none."""
    expected = arrays("moe_random_train_io")
    model = AutoModelForCausalLM.from_pretrained(
        V1 / "moe_random",
        dtype=torch.float32,
        load_rule="original",
        experts_implementation=implementation,
    ).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    for block in model.moe_blocks():
        block.gate.weight_noise.weight.data.copy_(expected["noise_w"])
    model.set_randomness(Fixed(normal=expected["noise"]))
    ids = arrays("moe_random_io")["input_ids"]
    out = model(ids, labels=ids)
    torch.testing.assert_close(out.logits, expected["logits"], **CLOSE)
    torch.testing.assert_close(out.loss, expected["loss"], **CLOSE)
    torch.testing.assert_close(out.balance_loss, expected["balance_loss"], atol=1e-6, rtol=0)
    load, importance = torch.stack(out.gate_load), torch.stack(out.gate_importance)
    torch.testing.assert_close(load, expected["gate_load"], **CLOSE)
    torch.testing.assert_close(importance, expected["gate_importance"], **CLOSE)

    out.loss.backward()
    compared = 0
    for key, wanted in expected.items():
        if not key.startswith("grad."):
            continue
        name = key.removeprefix("grad.")
        if ".experts.weight_" in name:
            module, _, rest = name.partition(".weight_")
            kind, expert = rest.split(".")
            experts = model.get_submodule(module)
            if kind == "down":
                found = experts.down_proj.grad[int(expert)]
            else:
                found = experts.gate_up_proj.grad[int(expert)].chunk(2)[kind == "up"]
        else:
            found = model.get_parameter(name).grad
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-3)
        compared += 1
    assert compared == 22


def test_select_gate_without_scores():
    expected, gates = arrays("moe_selgate_io"), arrays("gates")
    model = AutoModelForCausalLM.from_pretrained(
        V1 / "moe_random",
        dtype=torch.float32,
        gate_use_softmax=False,
        multiply_gate_scores=False,
        score_scale_factor=1.0,
        load_rule="original",
    ).eval()
    for layer, block in enumerate(model.moe_blocks()):  # the original stored them in float16
        block.gate.gate_network[0].weight.data.copy_((gates["mlp_w0"] + layer).half())
        block.gate.gate_network[2].weight.data.copy_((gates["mlp_w2"] - layer).half())
    ids = expected["input_ids"]
    out = model(ids, labels=ids)
    torch.testing.assert_close(out.logits, expected["logits"], **CLOSE)
    torch.testing.assert_close(out.loss, expected["loss"], **CLOSE)
    torch.testing.assert_close(out.balance_loss, expected["balance_loss"], atol=1e-5, rtol=0)
    assert torch.equal(torch.stack(out.gate_load), expected["gate_load"])
    torch.testing.assert_close(
        torch.stack(out.gate_importance), expected["gate_importance"], atol=1e-3, rtol=1e-4
    )


def test_converted_classifier():
    expected = arrays("moe_seqcls_io")
    model = AutoModelForSequenceClassification.from_pretrained(
        V1 / "moe_seqcls", dtype=torch.float32
    ).eval()
    logits = model(expected["input_ids"]).logits
    torch.testing.assert_close(logits, expected["logits"], **CLOSE)
