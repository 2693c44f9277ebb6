"""Anatomy: where the experts are, and total and active parameters, from the architecture."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import moesaic
from moesaic.core.errors import UserError
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.llama_moe import LlamaMoEForCausalLM
from moesaic.models.llama_moe_residual import LlamaMoEResidualForCausalLM
from tests.models import tiny
from tests.models.golden import FAMILIES, V1

MIXTRAL_8X7B = (
    "mixtral",
    {"intermediate_size": 14336, "num_key_value_heads": 8, "num_local_experts": 8},
)
QWEN3_30B = (
    "qwen3_moe",
    {
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    },
)
OLMOE = (
    "olmoe",
    {
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "vocab_size": 50304,
        "num_experts": 64,
        "num_experts_per_tok": 8,
    },
)


@pytest.mark.parametrize(
    ("model_type", "fields", "total", "active", "layers", "experts", "top_k", "shared"),
    [
        # published: Mixtral 46.7/12.9 B, Qwen3-30B-A3B 30.5/3.3, OLMoE 6.9/1.3, DeepSeek-V3 671/37
        (*MIXTRAL_8X7B, 46.70, 12.88, 32, 8, 2, 0),
        (*QWEN3_30B, 30.53, 3.35, 48, 128, 8, 0),
        (*OLMOE, 6.92, 1.28, 16, 64, 8, 0),
        ("deepseek_v3", {}, 671.03, 37.55, 58, 256, 8, 1),
        # the paper's and the original program's estimates for LLaMA-MoE
        ("llama_moe", {"num_experts": 16, "num_selects": 4}, 6.743, 3.494, 32, 16, 4, 0),
        ("llama_moe", {"num_experts": 16, "num_selects": 2}, 6.743, 2.953, 32, 16, 2, 0),
        ("llama_moe", {"num_experts": 8, "num_selects": 2}, 6.741, 3.493, 32, 8, 2, 0),
        ("llama_moe_residual", {}, 6.742, 3.494, 32, 14, 2, 2),
        ("llama", {"intermediate_size": 11008}, 6.738, 6.738, 0, 0, 0, 0),
        # embeddings tied: counted once
        (
            "llama",
            {"intermediate_size": 11008, "tie_word_embeddings": True},
            6.607,
            6.607,
            0,
            0,
            0,
            0,
        ),
    ],
)
def test_published_sizes(model_type, fields, total, active, layers, experts, top_k, shared):
    config = CONFIG_MAPPING[model_type](**{"tie_word_embeddings": False, **fields})
    anatomy = moesaic.anatomy(config)
    places = 3 if total < 10 and round(total, 2) != total else 2
    assert round(anatomy.params_total / 1e9, places) == total
    assert round(anatomy.params_active / 1e9, places) == active
    assert len(anatomy.layers) == layers
    for layer in anatomy.layers:
        assert (layer.num_experts, layer.top_k, layer.num_shared) == (experts, top_k, shared)
        assert layer.kind == "mlp"
    assert anatomy.num_layers == config.num_hidden_layers


@pytest.mark.parametrize(
    "directory",
    [
        FAMILIES / "llama_moe",
        FAMILIES / "llama_moe_uneven",
        FAMILIES / "llama_moe_seqcls",
        V1 / "moe_random",
        V1 / "moe_sharing_inter",
        V1 / "dense",
    ],
    ids=lambda d: d.name,
)
def test_total_is_what_the_files_hold(directory):
    from_config = moesaic.anatomy(directory)
    assert from_config.params_total == Checkpoint(directory).parameters
    assert moesaic.anatomy(moesaic.load(directory)) == from_config  # loaded or not, the same


@pytest.mark.parametrize("index", [0, 1])
def test_paths_lead_to_modules_that_route(index):
    model = tiny.build(LlamaMoEForCausalLM, tiny.config())
    layer = moesaic.anatomy(model).layers[index]
    assert layer.index == index
    seen = {}

    def watch(name):
        def hook(_module, inputs, _output):
            seen[name] = inputs

        return hook

    model.get_submodule(layer.router).register_forward_hook(watch("router"))
    model.get_submodule(layer.experts).register_forward_hook(watch("experts"))
    model(input_ids=tiny.ids())
    assert seen["router"][0].shape == (24, 32)
    _, ids, _ = seen["experts"]
    assert ids.shape == (24, layer.top_k)
    assert int(ids.max()) < layer.num_experts


def test_active_is_measured_by_what_a_token_touches():
    """Gradients of one token's output: nothing but the inactive experts and noise is untouched."""
    model = tiny.build(LlamaMoEForCausalLM, tiny.config())
    anatomy = moesaic.anatomy(model)
    model(input_ids=torch.tensor([[5]])).logits.square().sum().backward()
    idle = 0
    for name, parameter in model.named_parameters():
        if "weight_noise" in name:
            idle += parameter.numel()
        elif parameter.dim() == 3:
            quiet = parameter.grad.flatten(1).abs().sum(1) == 0
            idle += int(quiet.sum()) * parameter[0].numel()
    assert idle > 0
    assert anatomy.params_active == anatomy.params_total - idle


def test_ragged_experts_count_without_their_padding():
    even = moesaic.anatomy(tiny.config())
    ragged = moesaic.anatomy(tiny.config(size_experts=tiny.RAGGED))
    assert ragged.params_total == even.params_total
    assert ragged.params_active == even.params_active  # half of the experts on average
    model = tiny.build(LlamaMoEForCausalLM, tiny.config(size_experts=tiny.RAGGED))
    assert sum(p.numel() for p in model.parameters()) > ragged.params_total


def test_biased_and_ragged_experts(tmp_path):
    model = tiny.build(LlamaMoEForCausalLM, tiny.config(size_experts=tiny.RAGGED, mlp_bias=True))
    model.save_pretrained(tmp_path)
    assert moesaic.anatomy(model).params_total == Checkpoint(tmp_path).parameters


def test_a_setter_changes_what_is_active():
    model = tiny.build(LlamaMoEForCausalLM, tiny.config())
    before = moesaic.anatomy(model)
    model.set_moe_num_selects(1)
    after = moesaic.anatomy(model)
    assert {m.top_k for m in after.layers} == {1}
    experts = 3 * 32 * 64 * 2
    assert before.params_active - after.params_active == experts // 4


def test_residual_experts_are_shared_and_always_active():
    anatomy = moesaic.anatomy(tiny.build(LlamaMoEResidualForCausalLM, tiny.residual_config()))
    for layer in anatomy.layers:
        assert (layer.num_experts, layer.top_k, layer.num_shared) == (3, 1, 2)
        assert "residual" not in layer.experts + layer.router


@pytest.mark.parametrize(
    ("model_type", "fields", "expected"),
    [
        ("qwen2_moe", {"num_hidden_layers": 3}, [(i, "mlp", 60, 4, 1) for i in range(3)]),
        ("olmoe", {"num_hidden_layers": 1}, [(0, "mlp", 64, 8, 0)]),
        (
            "jetmoe",
            {"num_hidden_layers": 2},
            [(i, k, 8, 2, 0) for i in (0, 1) for k in ("attention", "mlp")],
        ),
        ("gpt_oss", {"num_hidden_layers": 2}, [(i, "mlp", 128, 4, 0) for i in range(2)]),
        ("qwen3_next", {"num_hidden_layers": 4}, [(i, "mlp", 512, 10, 1) for i in range(4)]),
        ("phimoe", {"num_hidden_layers": 1}, [(0, "mlp", 16, 2, 0)]),
        # 12 encoder and 12 decoder blocks, every second (fourth) one sparse
        (
            "switch_transformers",
            {},
            [(i, "mlp", 8, 1, 0) for i in (1, 5, 9, 13, 17, 21)],
        ),
        ("nllb-moe", {"encoder_layers": 4, "decoder_layers": 4, "num_experts": 8}, None),
    ],
)
def test_other_families(model_type, fields, expected):
    anatomy = moesaic.anatomy(CONFIG_MAPPING[model_type](**fields))
    found = [(m.index, m.kind, m.num_experts, m.top_k, m.num_shared) for m in anatomy.layers]
    if expected is None:
        expected = [(3, "mlp", 8, 2, 0), (7, "mlp", 8, 2, 0)]
    assert sorted(found) == sorted(expected)
    for layer in anatomy.layers:
        assert layer.router.rpartition(".")[2] in ("gate", "router")


def test_experts_that_are_not_recognised_are_an_error(monkeypatch):
    from moesaic.models import anatomy as module

    monkeypatch.setattr(module, "_count_experts", lambda *_: 0)
    with pytest.raises(UserError, match="form that moesaic does not know"):
        moesaic.anatomy(tiny.config())


def test_prints_as_one_line():
    text = str(moesaic.anatomy(CONFIG_MAPPING["mixtral"](**MIXTRAL_8X7B[1])))
    assert "2 of 8 experts" in text
    assert "46.7 B" in text
    assert "12.9 B active" in text
    assert "\n" not in text
    dense = str(moesaic.anatomy(CONFIG_MAPPING["llama"](num_hidden_layers=1)))
    assert "dense" in dense


def test_plain_data_keeps_everything():
    anatomy = moesaic.anatomy(tiny.config())
    data = anatomy.to_dict()
    assert data["layers"][0] == dataclasses.asdict(anatomy.layers[0])
    assert data["params_total"] == anatomy.params_total
