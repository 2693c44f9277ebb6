"""moesaic_moe: any dense family's own layers with experts for its MLP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import moesaic
from moesaic.core.errors import UserError
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.families.moesaic_moe import MoesaicMoeConfig, MoesaicMoeForCausalLM
from tests.construct.dense_family_models import FAMILIES, family_config, write_family

IDS = torch.arange(1, 49).view(2, 24) % 61


def make(kind: str, **fields: Any) -> Any:
    """A tiny mixture with random weights: 4 experts of width 12, 2 a token, one shared part."""
    torch.manual_seed(0)
    settings = {"num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 8}
    config = MoesaicMoeConfig(text_config=family_config(kind), **{**settings, **fields})
    return MoesaicMoeForCausalLM(config).eval()


def meaning(mlp: Any, x_TD: torch.Tensor) -> torch.Tensor:
    """The block, a token and an expert at a time, from its weights alone."""
    gate = mlp.gate
    y_TD = torch.zeros_like(x_TD)
    for token, x_D in enumerate(x_TD):
        logits_E = gate.weight @ x_D + (0 if gate.bias is None else gate.bias)
        probs_E = logits_E.softmax(0)
        scale_E = torch.zeros(()) if gate.scale is None else gate.scale
        scale_E = scale_E.expand(len(probs_E))
        chosen = logits_E.topk(gate.top_k).indices.tolist()
        total = sum(float(probs_E[e]) for e in chosen)
        for e in chosen:
            weight = {
                "softmax": probs_E[e],
                "renormalised": probs_E[e] / total,
                "sigmoid": logits_E[e].sigmoid(),
                "one": torch.ones(()),
                "learned": 1 + scale_E[e] * probs_E[e],
                "tempered": _tempered(10 * scale_E[0], logits_E, chosen, e),
            }[gate.weighting]
            rows_ID, up_ID = mlp.experts.gate_up_proj[e].chunk(2)
            h_I = mlp.act_fn(rows_ID @ x_D) * (up_ID @ x_D)
            y_TD[token] += weight * mlp.scaling * (mlp.experts.down_proj[e] @ h_I)
    return y_TD + mlp.shared_experts(x_TD)


def _tempered(
    power: torch.Tensor, logits_E: torch.Tensor, chosen: list[int], e: int
) -> torch.Tensor:
    """K p_e^power / sum_k p_k^power, p the chosen experts' softmax."""
    powers_K = logits_E[torch.tensor(chosen)].softmax(0) ** power
    return len(chosen) * powers_K[chosen.index(e)] / powers_K.sum()


@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
@pytest.mark.parametrize(
    "weighting", ["softmax", "renormalised", "sigmoid", "one", "learned", "tempered"]
)
@torch.no_grad()
def test_a_block_is_its_formula(kind: str, weighting: str) -> None:
    model = make(kind, weighting=weighting, routed_scaling_factor=[1.0, 2.5, 1.0], router_bias=True)
    mlp = model.model.layers[1].mlp
    for parameter in mlp.gate.parameters():
        parameter.copy_(0.3 * torch.randn_like(parameter))
    x_BSD = torch.randn(2, 5, 32)
    wanted = meaning(mlp, x_BSD.flatten(0, 1)).view_as(x_BSD)
    for implementation in ("eager", "grouped_mm", "moesaic"):
        model.set_experts_implementation(implementation)
        torch.testing.assert_close(mlp(x_BSD), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", FAMILIES)
def test_one_expert_of_everything_is_the_dense_model(kind: str, tmp_path: Path) -> None:
    dense = moesaic.load(write_family(tmp_path / "dense", kind))
    config = MoesaicMoeConfig(
        text_config=dense.config, num_experts=1, num_experts_per_tok=1, weighting="one"
    )
    model: Any = MoesaicMoeForCausalLM(config).eval()
    state = dense.state_dict()
    for layer in range(3):
        start = f"model.layers.{layer}.mlp."
        fused = state.pop(f"{start}gate_up_proj.weight", None)
        if fused is None:
            fused = torch.cat([state.pop(f"{start}{part}_proj.weight") for part in ("gate", "up")])
        state[f"{start}experts.gate_up_proj"] = fused[None]
        state[f"{start}experts.down_proj"] = state.pop(f"{start}down_proj.weight")[None]
        state[f"{start}gate.weight"] = torch.zeros(1, 32)
    model.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, atol=1e-4, rtol=0)
        mask = torch.ones_like(IDS)
        mask[0, :7] = 0
        kept = mask.bool()
        given, wanted = (m(IDS, attention_mask=mask).logits[kept] for m in (model, dense))
    torch.testing.assert_close(given, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", FAMILIES)
def test_saved_loaded_and_generating(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    model.save_pretrained(tmp_path / "moe")
    stored = Checkpoint(tmp_path / "moe")
    assert stored.config["model_type"] == "moesaic_moe"
    assert stored.config["architectures"] == ["MoesaicMoeForCausalLM"]
    names = stored.keys()
    assert "model.layers.2.mlp.experts.3.gate_proj.weight" in names
    assert "model.layers.0.mlp.shared_experts.down_proj.weight" in names
    assert "model.layers.1.mlp.gate.weight" in names
    loaded: Any = moesaic.load(tmp_path / "moe")
    assert loaded.config.text_config.model_type == kind
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    loaded.save_pretrained(tmp_path / "again")
    again = Checkpoint(tmp_path / "again")
    assert again.keys() == names
    assert all(torch.equal(again.read(name), stored.read(name)) for name in names)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(IDS)
    mask[1, :5] = 0
    cached = loaded.generate(IDS, attention_mask=mask, **options)
    plain = loaded.generate(IDS, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(cached, plain)
    anatomy = moesaic.anatomy(loaded)
    assert [(m.num_experts, m.top_k, m.num_shared) for m in anatomy.layers] == [(4, 2, 1)] * 3


def test_long_positions_switch_in_the_middle_of_a_text() -> None:
    """Phi-3's longrope has other positions beyond 16 tokens here: the cache must not stay."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 3.0, 5.0, 9.0],
    }
    text = family_config(
        "phi3",
        partial_rotary_factor=1.0,
        original_max_position_embeddings=16,
        rope_parameters={**rope, "original_max_position_embeddings": 16},
    )
    torch.manual_seed(0)
    model: Any = MoesaicMoeForCausalLM(MoesaicMoeConfig(text_config=text, num_experts=4)).eval()
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    cached = model.generate(IDS[:, :12], **options)
    plain = model.generate(IDS[:, :12], use_cache=False, **options)
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("kind", ["phi3", "gemma3_text", "deepseek_v3"])
@pytest.mark.parametrize("form", ["pooled", "layer"])
def test_training_moves_every_router_and_expert_that_was_used(kind: str, form: str) -> None:
    from moesaic.models.balance import layer_balance

    model = make(kind, balance_form=form, router_aux_loss_coef=0.5, output_router_logits=True)
    model.train()
    out = model(IDS, labels=IDS)
    plain = model(IDS, labels=IDS, output_router_logits=False)
    assert plain.aux_loss is None
    assert plain.router_logits is None
    torch.testing.assert_close(out.loss, plain.loss + 0.5 * out.aux_loss)
    assert len(out.router_logits) == 3
    assert out.router_logits[0].shape == (48, 4)
    if form == "layer":
        wanted = [layer_balance(z, z.topk(2).indices, None) for z in out.router_logits]
        torch.testing.assert_close(out.aux_loss, torch.stack(wanted).mean())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    out.loss.backward()
    first = {name: p.grad.clone() for name, p in model.named_parameters() if ".mlp." in name}
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    for name, gradient in first.items():
        found = model.get_parameter(name).grad
        torch.testing.assert_close(found, gradient, atol=1e-6, rtol=1e-4)
    for layer, logits_TE in enumerate(out.router_logits):
        start = f"model.layers.{layer}.mlp."
        assert bool(first[f"{start}gate.weight"].any())
        used = set(logits_TE.topk(2).indices.flatten().tolist())
        moved = first[f"{start}experts.down_proj"].flatten(1).any(1)
        assert {e for e in range(4) if moved[e]} == used


def test_padding_does_not_count_in_the_balance_loss() -> None:
    model = make("qwen3")
    row = IDS[:1]
    padded = torch.cat([torch.full((1, 6), 3), row], dim=1)
    mask = torch.cat([torch.zeros(1, 6), torch.ones(1, 24)], dim=1).long()
    with torch.no_grad():
        alone = model(row, output_router_logits=True).aux_loss
        beside = model(padded, attention_mask=mask, output_router_logits=True).aux_loss
        counted = model(padded, output_router_logits=True).aux_loss
    torch.testing.assert_close(beside, alone, atol=1e-5, rtol=1e-4)
    assert abs(float(counted - alone)) > 1e-4


@pytest.mark.parametrize("weighting", ["learned", "tempered"])
def test_learned_weights_start_at_one_and_give_the_router_a_gradient(weighting: str) -> None:
    model = make("olmo2", weighting=weighting)
    one = make("olmo2", weighting="one")
    missing = one.load_state_dict(model.state_dict(), strict=False)
    assert all(name.endswith("gate.scale") for name in missing.unexpected_keys)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, one(IDS).logits)
    model.train()
    gate = model.model.layers[0].mlp.gate
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    before = gate.weight.detach().clone()
    for _ in range(2):  # without a balance loss; the scale moves first
        model(IDS, labels=IDS).loss.backward()
        optimiser.step()
    assert bool(gate.scale.any())
    assert not torch.equal(gate.weight, before)


def test_reentrant_checkpointing_is_refused_where_it_would_lose_the_gradient() -> None:
    model = make("qwen2", output_router_logits=True)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(UserError, match="use_reentrant"):
        model(IDS, labels=IDS)


def test_routers_are_found_and_switches_reach_the_layers() -> None:
    model = make("gemma2")
    routers = [m for m in model.modules() if getattr(m, "is_moe_router", False)]
    assert len(routers) == 3
    logits_TE, weights_TK, ids_TK = routers[0](torch.randn(7, 32))
    assert (logits_TE.shape, weights_TK.shape, ids_TK.shape) == ((7, 4), (7, 2), (7, 2))
    from transformers import AutoModelForCausalLM

    # unless one is asked for, the family's own choice: soft-capping of scores is eager's alone
    dense = AutoModelForCausalLM.from_config(family_config("gemma2"))
    assert model.model.config._attn_implementation == dense.config._attn_implementation
    model = make("qwen3")
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        attention = model.model.layers[0].self_attn
        assert attention.config._attn_implementation == implementation


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_experts_per_tok": 5}, "num_experts_per_tok=5"),
        ({"weighting": "maximum"}, "maximum"),
        ({"routed_scaling_factor": [1.0, 2.0]}, "2 numbers for 3"),
        ({"text_config": {"model_type": "qwenn"}}, "qwenn"),
    ],
)
def test_wrong_configs_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        MoesaicMoeConfig(
            **{"text_config": family_config("qwen2"), "num_experts": 4, **fields}  # type: ignore[arg-type]
        )
