"""Corrections of transformers' classes: needed, made by `load` alone, and only where needed."""

from __future__ import annotations

import copy
import json
import pickle
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersSparseMLP,
)

import moesaic
from moesaic.core.errors import MoesaicError
from moesaic.models import overrides
from moesaic.models.catalog import find
from tests.models.golden import FAMILIES, family
from tests.models.parity import Parity

EVERY = (
    "deepseek_v2_norm_topk_prob",
    "granitemoe_router_logits",
    "jetmoe_chat_names",
    "jetmoe_router_logits",
    "nllb_moe_class",
    "nllb_moe_dispatch",
    "phimoe_long_rope",
    "phimoe_window",
    "switch_transformers_overflow",
)
LATER_RIGHT = {"granitemoe_router_logits"}  # wrong in transformers 5.17, right in 5.23


def test_every_correction_is_known_and_says_whether_it_is_needed():
    assert tuple(overrides._names()) == EVERY
    old = tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 20)
    for name in EVERY:
        assert overrides.needed(name) is (old or name not in LATER_RIGHT), name


@pytest.mark.parametrize(
    ("fixture", "name"),
    [
        ("nllb_moe", "NllbMoeForConditionalGeneration"),
        ("switch_transformers_lowcap", "SwitchTransformersForConditionalGeneration"),
        ("phimoe_long", "PhimoeForCausalLM"),
    ],
)
def test_transformers_alone_gives_other_numbers_and_keeps_them(fixture, name):
    """Were it not so, the correction could go; and nothing of transformers is changed by `load`."""
    cls = getattr(transformers, name)
    corrected = moesaic.load(FAMILIES / fixture, dtype=torch.float32)
    assert type(corrected) is cls
    plain = cls.from_pretrained(FAMILIES / fixture, dtype=torch.float32)
    given, wanted = Parity(fixture).inputs(), family(fixture)[1]["plain/logits"]
    with torch.no_grad():
        assert (corrected(**given).logits - wanted).abs().max() < 1e-4
        assert (plain(**given).logits - wanted).abs().max() > 0.1


def test_a_correction_that_is_not_needed_is_not_made(monkeypatch):
    monkeypatch.setattr(overrides, "needed", lambda name: False)
    assert find(FAMILIES / "nllb_moe").overrides == {}
    experts = moesaic.load(FAMILIES / "switch_transformers").encoder.block[1].layer[1].mlp
    assert type(experts) is SwitchTransformersSparseMLP


def test_a_correction_that_does_not_fit_is_an_error(monkeypatch):
    overrides.needed.cache_clear()
    override = overrides._override("nllb_moe_dispatch")
    broken = copy.copy(override)
    object.__setattr__(broken, "probe", lambda: None.gone)
    monkeypatch.setattr(overrides, "_override", lambda name: broken)
    with pytest.raises(MoesaicError, match=r"nllb_moe_dispatch does not fit transformers \d"):
        overrides.needed("nllb_moe_dispatch")
    overrides.needed.cache_clear()


def test_corrected_models_can_be_copied_and_pickled():
    model = moesaic.load(FAMILIES / "switch_transformers_lowcap", dtype=torch.float32)
    given = Parity("switch_transformers_lowcap").inputs()
    with torch.no_grad():
        wanted = model(**given).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(**given).logits, wanted)


def changed(tmp_path, fixture, **fields):
    """A copy of a fixture with other values in config.json."""
    directory = tmp_path / "changed"
    shutil.copytree(FAMILIES / fixture, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **fields}))
    return directory


@pytest.mark.parametrize("cached", [False, True])
def test_phimoe_windows_show_one_key_more(tmp_path, cached):
    """GRIN's weights and window are Phi-3.5-MoE's but for the name, so its numbers hold for it."""
    directory = changed(
        tmp_path, "grin_moe_sliding", model_type="phimoe", architectures=["PhimoeForCausalLM"]
    )
    window = json.loads((directory / "config.json").read_text())["sliding_window"]
    model = moesaic.load(directory, dtype=torch.float32)
    _, expected = family("grin_moe_sliding")
    ids = Parity("grin_moe_sliding").inputs()["input_ids"]
    with torch.no_grad():
        if cached:
            past, steps = None, []
            for position in range(ids.shape[1]):
                out = model(ids[:, position : position + 1], past_key_values=past, use_cache=True)
                past = out.past_key_values
                steps.append(out.logits)
            logits = torch.cat(steps, dim=1)
        else:
            logits = model(ids).logits
    torch.testing.assert_close(logits, expected["plain/logits"], atol=1e-4, rtol=0)
    assert model.config.sliding_window == window + 1
    for _ in range(2):  # what is written is the window, however often it is read and written
        model.save_pretrained(tmp_path / "saved")
        saved = json.loads((tmp_path / "saved" / "config.json").read_text())
        assert (saved["sliding_window"], saved["model_type"]) == (window, "phimoe")
        model = moesaic.load(tmp_path / "saved")
    assert copy.deepcopy(model.config).sliding_window == window + 1


def test_deepseek_v2_renormalises_and_then_does_not_scale(tmp_path):
    """families.md section 6: with norm_topk_prob the k weights sum to 1, whatever the factor."""
    directory = changed(tmp_path, "deepseek_v2_grouped_scaled", norm_topk_prob=True)
    seen = {}

    def run(directory):
        model = moesaic.load(directory, dtype=torch.float32, attn_implementation="eager")
        for module in model.modules():
            if isinstance(module, DeepseekV2Moe):
                module.gate.register_forward_hook(lambda m, _, out: seen.update({m: out}))
                break
        with torch.no_grad():
            return model(**Parity("deepseek_v2").inputs()).logits, seen.popitem()[1]

    plain, (logits, scaled, ids) = run(FAMILIES / "deepseek_v2_grouped_scaled")
    normed, (same_logits, weights, same_ids) = run(directory)
    assert torch.equal(logits, same_logits)  # the first routed layer: same input
    assert torch.equal(ids, same_ids)
    torch.testing.assert_close(weights.sum(-1), torch.ones(len(weights)))
    torch.testing.assert_close(weights, scaled / scaled.sum(-1, keepdim=True))
    assert (plain - normed).abs().max() > 0.1


def test_deepseek_v2_with_one_expert_a_token_is_scaled(tmp_path):
    directory = changed(
        tmp_path, "deepseek_v2_grouped_scaled", norm_topk_prob=True, num_experts_per_tok=1
    )
    plain = changed(
        tmp_path / "plain",
        "deepseek_v2_grouped_scaled",
        norm_topk_prob=False,
        num_experts_per_tok=1,
    )
    given = Parity("deepseek_v2").inputs()
    with torch.no_grad():
        one, other = (moesaic.load(d, dtype=torch.float32)(**given) for d in (directory, plain))
    assert torch.equal(one.logits, other.logits)


def test_jetmoe_counts_each_router_once():
    """Two a layer, attention first; the balance loss is that of the four."""
    _, expected = family("jetmoe")
    out = moesaic.load(FAMILIES / "jetmoe", dtype=torch.float32)(
        **Parity("jetmoe").inputs(), output_router_logits=True
    )
    names = [f"plain/{kind}router_logits/{layer}" for layer in (0, 1) for kind in ("attn_", "")]
    assert len(out.router_logits) == 4
    for name, logits in zip(names, out.router_logits, strict=True):
        torch.testing.assert_close(logits, expected[name], atol=1e-4, rtol=0)
    logits = torch.cat([expected[name] for name in names])
    chosen = torch.zeros_like(logits).scatter(1, logits.topk(2, dim=-1).indices, 1.0)
    loss = logits.shape[-1] * (chosen.mean(0) * logits.softmax(-1).mean(0)).sum()
    torch.testing.assert_close(out.aux_loss, loss, atol=1e-4, rtol=0)


def test_jetmoe_with_both_kinds_of_names_reads_its_own(tmp_path):
    directory = changed(tmp_path, "jetmoe", n_embd=999, hidden_size=32)
    assert moesaic.load(directory).config.hidden_size == 32


def test_switch_capacity_is_counted_in_each_sequence():
    """Two sequences of equal tokens overflow alike, each at its own fourth token."""
    model = moesaic.load(FAMILIES / "switch_transformers_lowcap", dtype=torch.float32)
    layer = model.encoder.block[1].layer[1].mlp
    with torch.no_grad():
        out = layer(torch.ones(2, 5, 32))
        kept, prob, _ = layer.router(torch.ones(2, 5, 32))
    assert kept.sum((-1, -2)).tolist() == [3, 3]
    torch.testing.assert_close(out[:, 3:], (prob * torch.ones(2, 5, 32))[:, 3:])
    assert not torch.allclose(out[:, 2], out[:, 3])


def test_nllb_of_old_bare_files_is_a_translator(tmp_path):
    """The published config.json names NllbMoeModel; the output matrix is the embedding."""
    model = moesaic.load(FAMILIES / "nllb_moe")
    assert type(model).__name__ == "NllbMoeForConditionalGeneration"
    assert model.lm_head.weight is model.model.shared.weight
    directory = changed(tmp_path, "nllb_moe")
    tensors = load_file(directory / "model.safetensors")
    shared = tensors["model.shared.weight"]
    more = {"lm_head.weight": shared.clone(), "model.decoder.embed_tokens.weight": shared.clone()}
    more["model.encoder.embed_positions.weights"] = torch.zeros(3, 32)  # computed, in old files
    save_file({**tensors, **more}, directory / "model.safetensors", metadata={"format": "pt"})
    assert moesaic.load(directory).lm_head.weight.shape == (96, 32)
