"""LLaMA-MoE-v2 against its original program, and what holds for any of its models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, StaticCache

import moesaic
from moesaic.core.errors import UserError
from moesaic.models.families.llama_moe_v2 import (
    LlamaMoEV2Config,
    LlamaMoEV2ForCausalLM,
    LlamaMoEV2ForQuestionAnswering,
    LlamaMoEV2ForSequenceClassification,
    balance_loss,
    recognises,
)
from moesaic.training.step import build_pass
from tests.helpers import GOLDEN
from tests.models.golden import FAMILIES
from tests.models.parity import IMPLEMENTATIONS, Parity, tensors_of
from tests.models.tiny import SHAPE, build, ids

V2 = GOLDEN / "llama_moe_v2"
ORIGINAL_LOSS = {"balance_loss": "constant-original"}
BALANCE = {"router_aux_loss_coef": 0.1, "balance_loss": "switch"}


def parity(name: str, **fields: Any) -> Parity:
    return Parity(f"llama_moe_v2{name}", options=ORIGINAL_LOSS, balance=BALANCE, **fields)


FIXTURES = [
    parity(""),
    parity("_residual"),
    # aux_loss is that of the MLPs' routers; attention's has a field and a test of its own
    parity("_attn", balance_of=None),
    parity("_attn_split", balance_of=None),
]


def config(**fields: Any) -> LlamaMoEV2Config:
    """Four experts of width 16, two a token, two layers, 8 heads of 4 and 2 key/value heads."""
    given = {
        **SHAPE,
        "num_attention_heads": 8,
        "intermediate_size": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": None,
        "pad_token_id": 0,
        **fields,
    }
    return LlamaMoEV2Config(**given)


def attention_config(**fields: Any) -> LlamaMoEV2Config:
    """As `config`, with four attention experts, two a token."""
    given = {"use_attn_moe": True, "attn_experts": 4, "top_k_attn": 2, "scale_factor_attn": 2.0}
    return config(**{**given, **fields})


def tiny(fields: LlamaMoEV2Config, *, seed: int = 0) -> LlamaMoEV2ForCausalLM:
    return build(LlamaMoEV2ForCausalLM, fields, seed=seed)


# ---------------------------------------------------------------- the original program


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


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["attn_moe", "vanilla_gsp_aligned"])
def test_converted_models_of_the_original(name, attention):
    model = moesaic.load(V2 / name, attn_implementation=attention, **ORIGINAL_LOSS)
    with np.load(V2 / "outputs.npz") as file:
        golden = {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}
    close = {"atol": 1e-4, "rtol": 0}
    with torch.no_grad():
        out = model(
            golden["input_ids"],
            labels=golden["labels"],
            output_hidden_states=True,
            output_router_logits=True,
        )
    torch.testing.assert_close(out.logits, golden[f"{name}.logits"], **close)
    torch.testing.assert_close(out.loss, golden[f"{name}.loss"].float(), **close)
    torch.testing.assert_close(out.aux_loss, golden[f"{name}.aux_loss"].float(), **close)
    hidden = torch.stack(out.hidden_states)
    torch.testing.assert_close(hidden, golden[f"{name}.hidden_states"], **close)
    for layer, logits in enumerate(out.router_logits):
        torch.testing.assert_close(logits, golden[f"{name}.router_logits.{layer}"], **close)
    for layer, logits in enumerate(out.attn_router_logits or ()):
        torch.testing.assert_close(logits, golden[f"{name}.attn_router_logits.{layer}"], **close)
    for side in ("right", "left"):
        mask = golden[f"mask_{side}"].long()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(golden["input_ids"], attention_mask=mask, position_ids=positions).logits
        wanted = golden[f"{name}.logits_mask_{side}"]
        torch.testing.assert_close(logits[mask.bool()], wanted[mask.bool()], **close)
    if name == "attn_moe":
        prompt = golden["input_ids"][:1, :8]
        for cache in (False, True):
            tokens = greedy(model, prompt, 12, use_cache=cache)
            assert torch.equal(tokens, golden["attn_moe.greedy_cache"])


def greedy(model: Any, prompt: torch.Tensor, steps: int, **options: Any) -> torch.Tensor:
    given = {"attention_mask": torch.ones_like(prompt), "eos_token_id": None, **options}
    return model.generate(prompt, max_new_tokens=steps, do_sample=False, **given)


# ---------------------------------------------------------------- files


def test_original_configs_that_say_mixtral_are_recognised(tmp_path):
    for name in ("llama_moe_v2", "llama_moe_v2_attn_split"):
        assert recognises(json.loads((FAMILIES / name / "config.json").read_text()))
    assert not recognises(MixtralConfig().to_dict())
    model = moesaic.load(FAMILIES / "llama_moe_v2")
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "llama_moe_v2"
    assert saved["scale_factor"] == 4.0


def test_what_the_original_ignores_is_ignored_in_its_configs(tmp_path):
    fields = json.loads((FAMILIES / "llama_moe_v2" / "config.json").read_text())
    fields |= {"rope_scaling": {"type": "linear", "factor": 4.0}, "attention_bias": True}
    changed = tmp_path / "changed"
    copy_weights("llama_moe_v2", changed, fields)
    plain, scaled = moesaic.load(FAMILIES / "llama_moe_v2"), moesaic.load(changed)
    with torch.no_grad():
        assert torch.equal(plain(ids()).logits, scaled(ids()).logits)


def copy_weights(name: str, out: Path, fields: dict[str, Any], tensors: Any = None) -> None:
    out.mkdir()
    (out / "config.json").write_text(json.dumps(fields))
    if tensors is None:
        tensors = tensors_of(FAMILIES / name)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def megablocks(experts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    w1, w2, w3 = (experts[name] for name in ("w1", "w2", "w3"))
    return {
        "mlp.w1": w1.flatten(0, 1),
        "mlp.v1": w3.flatten(0, 1),
        "mlp.w2": w2.transpose(1, 2).flatten(0, 1),
    }


def scattermoe(experts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        "experts.weight": torch.cat([experts["w3"], experts["w1"]], dim=1),
        "output_experts.weight": experts["w2"],
    }


@pytest.mark.parametrize("layout", [megablocks, scattermoe])
def test_other_layouts_are_read_without_scale_factor_and_written_as_modulelist(layout, tmp_path):
    """Those branches of the original ignore scale_factor, whatever config.json says."""
    name = "llama_moe_v2"
    original = tensors_of(FAMILIES / name)
    fields = json.loads((FAMILIES / name / "config.json").read_text())
    other = {key: tensor for key, tensor in original.items() if ".experts." not in key}
    for layer in range(fields["num_hidden_layers"]):
        block = f"model.layers.{layer}.block_sparse_moe.experts."
        experts = {
            part: torch.stack([original[f"{block}{e}.{part}.weight"] for e in range(8)])
            for part in ("w1", "w2", "w3")
        }
        other |= {block + key: t.contiguous() for key, t in layout(experts).items()}
    copy_weights(name, tmp_path / "other", {**fields, "moe_type": layout.__name__}, other)
    model = moesaic.load(tmp_path / "other")
    expected = moesaic.load(FAMILIES / name, scale_factor=1.0)
    with torch.no_grad():
        wanted = expected(ids()).logits
        assert torch.equal(model(ids()).logits, wanted)
    model.save_pretrained(tmp_path / "saved")
    saved = tensors_of(tmp_path / "saved")
    assert set(saved) == set(original)
    assert all(torch.equal(saved[key], tensor) for key, tensor in original.items())
    with torch.no_grad():
        assert torch.equal(moesaic.load(tmp_path / "saved")(ids()).logits, wanted)


def test_contract_layers_load_under_the_names_that_the_original_converter_writes(tmp_path):
    """The original's own model leaves them at random weights."""
    name = "llama_moe_v2_attn_split"
    names = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    tensors = {}
    for key, tensor in tensors_of(FAMILIES / name).items():
        for ours, llama in names.items():
            key = key.replace(f"block_sparse_moe.{ours}.", f"mlp.{llama}.")
        tensors[key] = tensor
    assert "model.layers.0.mlp.gate_proj.weight" in tensors
    fields = json.loads((FAMILIES / name / "config.json").read_text())
    copy_weights(name, tmp_path / "converted", fields, tensors)
    converted, right = moesaic.load(tmp_path / "converted"), moesaic.load(FAMILIES / name)
    with torch.no_grad():
        assert torch.equal(converted(ids()).logits, right(ids()).logits)
    converted.save_pretrained(tmp_path / "saved")
    assert set(tensors_of(tmp_path / "saved")) == set(tensors_of(FAMILIES / name))


def test_contract_layers_of_another_width_round_trip(tmp_path):
    model = tiny(config(num_moe_contract_layers=1, num_hidden_layers=3, intermediate_size_dense=80))
    assert model.model.layers[0].block_sparse_moe.w1.weight.shape == (80, 32)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(moesaic.load(tmp_path)(ids()).logits, model(ids()).logits)


def test_a_missing_expert_is_an_error(tmp_path):
    tensors = tensors_of(FAMILIES / "llama_moe_v2")
    del tensors["model.layers.1.block_sparse_moe.experts.3.w3.weight"]
    fields = json.loads((FAMILIES / "llama_moe_v2" / "config.json").read_text())
    copy_weights("llama_moe_v2", tmp_path / "broken", fields, tensors)
    with pytest.raises(UserError, match=r"experts.3.w3|gate_up_proj"):
        moesaic.load(tmp_path / "broken")


# ---------------------------------------------------------------- all experts on is the dense model


LIKE_V2 = {"num_attention_heads": 8, "rope_theta": 1e6, "rms_norm_eps": 1e-5}


def dense(**fields: Any) -> LlamaForCausalLM:
    return build(LlamaForCausalLM, LlamaConfig(**{**SHAPE, **LIKE_V2, **fields}), seed=3)


def converted(
    source: LlamaForCausalLM, fields: LlamaMoEV2Config, *, residual: int = 0
) -> LlamaMoEV2ForCausalLM:
    """The dense model's neurons and heads dealt to experts in order, with gates of zeros."""
    model = tiny(fields)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in (known := dict(source.named_parameters())):
                parameter.copy_(known[name])
        for old, new in zip(source.model.layers, model.model.layers, strict=True):
            gate, up, down = (
                getattr(old.mlp, f"{name}_proj").weight for name in ("gate", "up", "down")
            )
            if residual:
                shared = new.mlp_residual
                shared.w1.weight.copy_(gate[:residual])
                shared.w3.weight.copy_(up[:residual])
                shared.w2.weight.copy_(down[:, :residual])
            experts, count = new.block_sparse_moe.experts, fields.num_local_experts
            gates, ups = (rows[residual:].chunk(count) for rows in (gate, up))
            for e, columns in enumerate(down[:, residual:].chunk(count, dim=1)):
                experts.gate_up_proj[e] = torch.cat([gates[e], ups[e]])
                experts.down_proj[e] = columns
            new.block_sparse_moe.gate.weight.zero_()
            if fields.use_attn_moe:
                deal_heads(old.self_attn, new.self_attn, fields)
    return model


def deal_heads(old: nn.Module, new: nn.Module, fields: LlamaMoEV2Config) -> None:
    experts, split = new.experts, fields.attn_experts // fields.num_key_value_heads
    for e, (rows, columns) in enumerate(
        zip(
            old.q_proj.weight.chunk(fields.attn_experts),
            old.o_proj.weight.chunk(fields.attn_experts, dim=1),
            strict=True,
        )
    ):
        experts.q_proj[e], experts.o_proj[e] = rows, columns
        for name in ("k_proj", "v_proj"):
            heads = getattr(old, name).weight.chunk(fields.num_key_value_heads)
            getattr(experts, name)[e] = heads[e // split]  # each part has the same one
    new.gate.weight.zero_()


def test_all_mlp_experts_on_equals_dense():
    source = dense()
    for fields, residual in (
        (config(num_experts_per_tok=4, scale_factor=4.0), 0),
        (
            config(
                num_local_experts=3,
                num_experts_per_tok=3,
                scale_factor=3.0,
                intermediate_size_residual=16,
            ),
            16,
        ),
    ):
        model = converted(source, fields, residual=residual)
        with torch.no_grad():
            wanted = source(ids()).logits
            torch.testing.assert_close(model(ids()).logits, wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("experts", [2, 4, 8])
def test_all_attention_experts_on_equals_dense(experts):
    """Split 1, 2 and 4: query heads of a group apart, each with a copy of the key/value head."""
    source = dense()
    fields = attention_config(
        num_experts_per_tok=4,
        scale_factor=4.0,
        attn_experts=experts,
        top_k_attn=experts,
        scale_factor_attn=float(experts),
    )
    model = converted(source, fields)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    with torch.no_grad():
        wanted = source(ids(), attention_mask=mask).logits[mask.bool()]
        found = model(ids(), attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)
    assert torch.equal(greedy(model, ids(), 6), greedy(source, ids(), 6))


def test_with_all_experts_on_a_window_means_the_same_to_both_attentions():
    source, on = dense(), {"num_experts_per_tok": 4, "scale_factor": 4.0, "sliding_window": 3}
    plain = converted(source, config(**on))
    experts = converted(source, attention_config(**on, top_k_attn=4, scale_factor_attn=4.0))
    with torch.no_grad():
        wanted = plain(ids()).logits
        torch.testing.assert_close(experts(ids()).logits, wanted, atol=2e-5, rtol=1e-5)
        assert not torch.allclose(source(ids()).logits, wanted, atol=1e-2)


# ---------------------------------------------------------------- attention experts


def naive_attention(
    layer: Any,
    x_BSD: torch.Tensor,
    cos_sin: Any,
    valid_BS: torch.Tensor,
    document_BS: torch.Tensor | None = None,
) -> torch.Tensor:
    """Its meaning: every expert, sequence and query by itself."""
    out, window = [], layer.config.sliding_window
    size, scale = layer.experts.head_dim, layer.config.scale_factor_attn
    for b, x_SD in enumerate(x_BSD):
        _, weights, chosen = layer.gate(x_SD)
        rows = [torch.zeros(x_SD.shape[1])] * len(x_SD)
        for e in range(layer.experts.num_experts):
            members = [
                s for s in range(len(x_SD)) if e in chosen[s].tolist() and valid_BS[b, s].item()
            ]

            def rotated(head: torch.Tensor, s: int, b: int = b) -> torch.Tensor:
                first, second = head.chunk(2, dim=-1)
                turned = torch.cat([-second, first], dim=-1)
                return head * cos_sin[0][b, s] + turned * cos_sin[1][b, s]

            parts = layer.experts
            keys = {s: rotated(parts.k_proj[e] @ x_SD[s], s) for s in members}
            for place, s in enumerate(members):
                visible = members[: place + 1]
                if document_BS is not None:
                    visible = [t for t in visible if document_BS[b, t] == document_BS[b, s]]
                if window is not None:
                    visible = [t for t in visible if members.index(t) > place - window]
                q_Hd = rotated((parts.q_proj[e] @ x_SD[s]).view(-1, size), s)
                scores = q_Hd @ torch.stack([keys[t] for t in visible]).T / size**0.5
                values = torch.stack([parts.v_proj[e] @ x_SD[t] for t in visible])
                y_D = parts.o_proj[e] @ (scores.softmax(-1) @ values).flatten()
                if layer.output_bias is not None:
                    y_D = y_D + layer.output_bias.weight[e]
                weight = weights[s, chosen[s].tolist().index(e)]
                rows[s] = rows[s] + weight * scale * y_D
        out.append(torch.stack(rows))
    return torch.stack(out)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("padding", ["none", "left", "right", "holes", "documents"])
def test_attention_experts_are_what_they_mean(padding, window, attention):
    fields = attention_config(
        sliding_window=window, add_rescale_bias=True, attn_implementation=attention
    )
    model = tiny(fields).double()
    layer = model.model.layers[0].self_attn
    nn.init.normal_(layer.output_bias.weight)
    batch, length = 3, 9
    torch.manual_seed(1)
    x = torch.randn(batch, length, 32, dtype=torch.float64, requires_grad=True)
    valid = torch.ones(batch, length, dtype=torch.bool)
    document = None
    if padding == "left":
        valid[1, :7], valid[2, :2] = False, False
    elif padding == "right":
        valid[1, 4:], valid[2, :] = False, False  # a row of padding alone, too
    elif padding == "holes":
        valid = torch.rand(batch, length) > 0.4
    elif padding == "documents":
        document = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2]).expand(batch, -1)
    cos_sin = model.model.rotary_emb(x, torch.arange(length)[None].expand(batch, -1))
    found, *_ = layer(x, cos_sin, valid_T=valid.flatten(), document_BS=document)
    wanted = naive_attention(layer, x, cos_sin, valid, document)
    close = {"atol": 1e-5, "rtol": 1e-4}  # router and eager attention take softmax in float32
    torch.testing.assert_close(found, wanted, **close)
    weights = [x, *layer.parameters()]
    upstream = torch.randn_like(wanted)
    for one, other in zip(
        torch.autograd.grad((found * upstream).sum(), weights),
        torch.autograd.grad((wanted * upstream).sum(), weights),
        strict=True,
    ):
        torch.testing.assert_close(one, other, **close)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("window", [None, 4])
def test_cache_in_pieces_equals_the_full_forward(window, attention):
    for fields in (attention_config, config):
        model = tiny(fields(sliding_window=window, attn_implementation=attention))
        tokens, mask = ids(3, 17), torch.ones(3, 17, dtype=torch.long)
        mask[1, :6] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            full = model(tokens, attention_mask=mask, position_ids=positions).logits
            cache, pieces = None, []
            for start, end in ((0, 7), (7, 8), (8, 12), (12, 13), (13, 17)):
                out = model(
                    tokens[:, start:end],
                    attention_mask=mask[:, :end],
                    position_ids=positions[:, start:end],
                    past_key_values=cache,
                    use_cache=True,
                )
                cache = out.past_key_values
                assert cache.get_seq_length() == end
                pieces.append(out.logits)
        real = mask.bool()
        torch.testing.assert_close(torch.cat(pieces, 1)[real], full[real], atol=1e-5, rtol=1e-5)


def test_the_cache_holds_only_the_tokens_of_each_expert():
    model = tiny(attention_config(attn_experts=8, top_k_attn=1))
    with torch.no_grad():
        out = model(ids(2, 12), use_cache=True, output_router_logits=True)
    for layer, logits in zip(out.past_key_values.layers, out.attn_router_logits, strict=True):
        counts = nn.functional.one_hot(logits.argmax(-1).view(2, 12), 8).sum(1)
        assert torch.equal(layer.count_BE, counts)
        assert layer.keys.shape == (2, 8, counts.max(), 4)


def test_generation_with_padding_beams_and_sampling_of_several():
    model = tiny(attention_config())
    prompt, mask = ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    prompt[0, :4] = 0
    together = greedy(model, prompt, 7, attention_mask=mask)
    alone = greedy(model, prompt[:1, 4:], 7)
    assert torch.equal(together[0, 4:], alone[0])
    for options in ({"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        found = [
            greedy(model, prompt, 7, attention_mask=mask, use_cache=cache, **options)
            for cache in (True, False)
        ]
        assert torch.equal(*found)


def test_caches_that_are_not_of_experts_are_refused():
    model = tiny(attention_config())
    with pytest.raises(UserError, match="StaticCache"):
        model(ids(), past_key_values=StaticCache(config=model.config, max_cache_len=16))
    with torch.no_grad():
        cache = model(ids(), use_cache=True).past_key_values
    with pytest.raises(UserError, match="assist"):
        cache.layers[0].crop(-1)
    with pytest.raises(UserError, match="attention_mask"):
        model(ids(), attention_mask=torch.ones(2, 1, 12, 12))


@pytest.mark.parametrize("fields", [config, attention_config])
def test_documents_packed_into_a_row_do_not_see_each_other(fields):
    model, tokens = tiny(fields()), ids(1, 12)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    with torch.no_grad():
        packed = model(tokens, position_ids=positions).logits
        first, second = (model(part).logits for part in (tokens[:, :5], tokens[:, 5:]))
    torch.testing.assert_close(packed, torch.cat([first, second], 1), atol=1e-5, rtol=1e-5)


def test_weights_kept_off_the_device_until_they_are_used():
    """accelerate brings a module's weights when its forward is called, and takes them away."""
    model = tiny(attention_config(add_rescale_bias=True, intermediate_size_residual=8))
    with torch.no_grad():
        wanted = model(ids()).logits
        cpu_offload(model, execution_device=torch.device("cpu"))
        assert next(model.parameters()).is_meta
        assert torch.equal(model(ids()).logits, wanted)


def test_bf16_and_autocast_stay_near_float32():
    for fields in (attention_config(add_rescale_bias=True), config(add_rescale_bias=True)):
        model = tiny(fields)
        with torch.no_grad():
            wanted = model(ids()).logits
            with torch.autocast("cpu", dtype=torch.bfloat16):
                mixed = model(ids()).logits
            low = model.bfloat16()(ids()).logits
        for found in (mixed, low):
            # the median: a token that flips to another expert is far off, and right
            assert (found.float() - wanted).abs().median() < 0.01


@pytest.mark.gpu
@pytest.mark.parametrize("fields", [config, attention_config])
def test_on_a_gpu_it_computes_the_same(fields):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    model, tokens = tiny(fields(add_rescale_bias=True)), ids(2, 24)
    mask = torch.ones_like(tokens)
    mask[1, :7] = 0
    real = mask.bool()
    model(tokens, attention_mask=mask, labels=tokens).loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        wanted = model(tokens, attention_mask=mask).logits[real]
    model.zero_grad()
    model.cuda()
    on_gpu = {"input_ids": tokens.cuda(), "attention_mask": mask.cuda()}
    model(**on_gpu, labels=tokens.cuda()).loss.backward()
    for name, parameter in model.named_parameters():
        if name in grads:
            torch.testing.assert_close(parameter.grad.cpu(), grads[name], atol=1e-3, rtol=1e-2)
    with torch.no_grad():
        found = model(**on_gpu).logits.cpu()[real]
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)
        low = model.bfloat16()(**on_gpu).logits.float().cpu()[real]
    assert (low - wanted).abs().median() < 0.02
    cached, recomputed = (
        greedy(model, tokens[:1].cuda(), 8, use_cache=cache, attention_mask=None)
        for cache in (True, False)
    )
    assert cached.shape == recomputed.shape == (1, 32)


# ---------------------------------------------------------------- balance loss


def test_balance_loss_is_the_formula_without_padding():
    torch.manual_seed(0)
    logits = [torch.randn(10, 4, requires_grad=True) for _ in range(2)]
    chosen = [layer.topk(2).indices for layer in logits]
    valid = torch.tensor([1, 1, 0, 1, 1, 1, 0, 1, 1, 1]).bool()
    shares = torch.stack(
        [nn.functional.one_hot(c[valid], 4).float().sum((0, 1)) / 16 for c in chosen]
    )
    probs = torch.stack([layer.softmax(-1)[valid].mean(0) for layer in logits])
    each, pooled = 4 * (shares * probs).sum(-1).mean(), 4 * (shares.mean(0) * probs.mean(0)).sum()
    for layer_wise, wanted in ((True, each), (False, pooled)):
        fields = config(use_layer_wise_balance=layer_wise)
        found = balance_loss(fields, [None, *logits], [None, *chosen], valid)
        torch.testing.assert_close(found, wanted)
        for grad in torch.autograd.grad(found, logits):
            assert grad[valid].abs().max() > 0
            assert grad[~valid].abs().max() == 0
    original = balance_loss(config(balance_loss="constant-original"), logits, chosen)
    assert original == 2.0
    assert not original.requires_grad


def test_attention_routers_have_a_balance_loss_that_training_uses():
    model = tiny(attention_config(router_aux_loss_coef=0.1)).train()
    out = model(ids(), labels=ids(), output_router_logits=True)
    cross_entropy = model(ids(), labels=ids()).loss
    expected = cross_entropy + 0.1 * (out.aux_loss + out.attn_aux_loss)
    torch.testing.assert_close(out.loss, expected)
    routers = [layer.self_attn.gate.weight for layer in model.model.layers]
    for grad in torch.autograd.grad(out.attn_aux_loss, routers, retain_graph=True):
        assert grad.abs().max() > 0
    in_training = build_pass(model)(ids()).balance
    torch.testing.assert_close(in_training, 0.1 * (out.aux_loss + out.attn_aux_loss))
    dense_ends = tiny(attention_config(num_hidden_layers=3, num_moe_contract_layers=1))
    assert len(build_pass(dense_ends)(ids()).load_LE) == 1


def test_a_step_moves_the_attention_experts_that_got_a_token():
    model = tiny(attention_config(attn_experts=8, top_k_attn=1, num_hidden_layers=1)).train()
    tokens = ids(1, 5)
    attention = model.model.layers[0].self_attn
    before = {name: p.detach().clone() for name, p in attention.named_parameters()}
    out = model(tokens, labels=tokens, output_router_logits=True)
    out.loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    chosen = out.attn_router_logits[0].argmax(-1).tolist()
    for name, parameter in attention.named_parameters():
        moved = (parameter.detach() - before[name]).flatten(1).abs().amax(1).nonzero().flatten()
        if name == "gate.weight":
            assert len(moved) == 8
        elif name in ("experts.v_proj", "experts.o_proj"):
            assert set(moved.tolist()) == set(chosen)
        else:  # a query that sees one key alone says nothing about either
            assert {e for e in chosen if chosen.count(e) > 1} <= set(moved.tolist()) <= set(chosen)


def test_balance_loss_does_not_grow_with_micro_batches():
    model = tiny(attention_config(router_aux_loss_coef=0.1)).train()
    tokens = ids(4, 12)
    parts = [
        model(part, labels=part, output_router_logits=True, num_items_in_batch=44)
        for part in tokens.chunk(2)
    ]
    whole = [model(part, labels=part, output_router_logits=True) for part in tokens.chunk(2)]
    torch.testing.assert_close(sum(p.loss for p in parts), sum(w.loss for w in whole) / 2)


# ---------------------------------------------------------------- heads, errors


@pytest.mark.parametrize("fields", [config, attention_config])
def test_classification_reads_the_last_token_whichever_side_is_padded(fields):
    model = build(LlamaMoEV2ForSequenceClassification, fields(num_labels=3))
    tokens = ids(1, 7)
    pad, real = torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 7, dtype=torch.long)
    with torch.no_grad():
        alone = model(tokens).logits
        right = model(torch.cat([tokens, pad], 1), attention_mask=torch.cat([real, pad], 1)).logits
        left = model(torch.cat([pad, tokens], 1), attention_mask=torch.cat([pad, real], 1)).logits
    assert alone.shape == (1, 3)
    torch.testing.assert_close(right, alone)
    torch.testing.assert_close(left, alone, atol=1e-5, rtol=1e-5)
    labels = torch.tensor([2])
    plain = model(tokens, labels=labels).loss
    out = model(tokens, labels=labels, output_router_logits=True)
    balance = out.aux_loss + (0 if out.attn_aux_loss is None else out.attn_aux_loss)
    torch.testing.assert_close(out.loss, plain + 0.001 * balance)


def test_question_answering_finds_spans(tmp_path):
    model = build(LlamaMoEV2ForQuestionAnswering, attention_config())
    where = {"start_positions": torch.tensor([1, 3]), "end_positions": torch.tensor([2, 99])}
    out = model(ids(), **where)
    start, end = out.start_logits, out.end_logits
    entropy = nn.functional.cross_entropy
    wanted = (entropy(start, where["start_positions"]) + entropy(end[:1], torch.tensor([2]))) / 2
    torch.testing.assert_close(out.loss, wanted)
    model.save_pretrained(tmp_path)
    again = moesaic.load(tmp_path)
    assert type(again) is LlamaMoEV2ForQuestionAnswering
    with torch.no_grad():
        assert torch.equal(again(ids()).start_logits, start)


def test_anatomy_tells_attention_experts_from_mlp_experts():
    found = moesaic.anatomy(FAMILIES / "llama_moe_v2_attn_split").layers
    told = [(m.index, m.kind, m.num_experts, m.top_k) for m in found]
    assert sorted(told) == [
        (0, "attention", 4, 2),
        (1, "attention", 4, 2),
        (1, "mlp", 4, 2),
        (2, "attention", 4, 2),
    ]
    residual = moesaic.anatomy(FAMILIES / "llama_moe_v2_residual").layers
    assert [(m.num_experts, m.top_k, m.num_shared) for m in residual] == [(7, 1, 1)] * 2


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_experts_per_tok": 5}, "num_experts_per_tok=5 but the model has 4 experts"),
        ({"num_moe_contract_layers": 3}, "num_moe_contract_layers=3"),
        ({"moe_type": "modulelst"}, "modulelist"),
        ({"balance_loss": "swich"}, "switch"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"sliding_window": 0}, "sliding_window=0"),
        ({"use_attn_moe": True}, "top_k_attn"),
        ({"use_attn_moe": True, "attn_experts": 3, "top_k_attn": 1}, "attn_experts=3"),
        ({"use_attn_moe": True, "attn_experts": 16, "top_k_attn": 1}, "attn_experts=16"),
        ({"use_attn_moe": True, "attn_experts": 4, "top_k_attn": 5}, "top_k_attn=5"),
    ],
)
def test_configs_that_do_not_fit_are_refused(fields, words):
    with pytest.raises(UserError, match=words):
        config(**fields)


def test_number_of_attention_experts_defaults_to_the_key_value_heads():
    """The older program, of the residual release, has no field for it."""
    assert config(use_attn_moe=True, top_k_attn=1).attn_experts == 2
