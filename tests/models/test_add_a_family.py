"""docs/add-a-family.md: what it builds up is a family like any other."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moesaic
from moesaic.core.errors import UserError
from moesaic.models import families
from moesaic.models.load import model_class
from tests.helpers import run_cli

PAGE = (Path(__file__).parents[2] / "docs" / "add-a-family.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(json|python)\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def released() -> dict[str, torch.Tensor]:
    """Random weights of the published config under the published names."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens.weight": (96, 32), "lm_head.weight": (96, 32)}
    shapes["model.norm.weight"] = (32,)
    for layer in ("model.layers.0.", "model.layers.1."):
        for name, rows in (("q", 32), ("k", 16), ("v", 16), ("o", 32)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (rows, 32)
        shapes[f"{layer}input_layernorm.weight"] = (32,)
        shapes[f"{layer}post_attention_layernorm.weight"] = (32,)
        shapes[f"{layer}mlp.gate.weight"] = (8, 32)
        for expert in range(8):
            for name, shape in (("w1", (16, 32)), ("w3", (16, 32)), ("w2", (32, 16))):
                shapes[f"{layer}mlp.experts.{expert}.{name}.weight"] = shape
    return {key: torch.randn(shape, generator=generator) * 0.2 for key, shape in shapes.items()}


@pytest.fixture
def acme(tmp_path, monkeypatch):
    """The directory acme/ of the page, and its family registered for one test."""
    (_, config), (_, source), _ = BLOCKS
    (tmp_path / "acme").mkdir()
    (tmp_path / "acme" / "config.json").write_text(config)
    save_file(released(), tmp_path / "acme" / "model.safetensors", metadata={"format": "pt"})
    file = tmp_path / "acme.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location("moesaic_page_acme", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "moesaic_page_acme", module)
    spec.loader.exec_module(module)
    families.register(module.FAMILY)
    monkeypatch.chdir(tmp_path)
    yield module
    families._REGISTERED.pop("acme_moe")


def test_the_page_works_as_it_says(acme, capsys):
    space = {}
    exec(compile(BLOCKS[2][1], "page", "exec"), space)
    model, again, out = space["model"], space["again"], space["out"]
    assert type(model) is type(again) is acme.AcmeForCausalLM
    assert "2 mlp layers with 2 of 8 experts" in capsys.readouterr().out
    assert space["tokens"].shape == (1, 7)
    assert out.aux_loss > 0
    for name, parameter in model.named_parameters():
        if ".gate." in name:
            assert parameter.grad.abs().sum() > 0
    saved, original = load_file("saved/model.safetensors"), released()
    assert set(saved) == set(original)
    assert all(torch.equal(saved[key], tensor) for key, tensor in original.items())
    config = json.loads(Path("saved/config.json").read_text())
    assert config["model_type"] == "acme_moe"
    assert config["architectures"] == ["AcmeForCausalLM"]
    assert "auto_map" not in config


def test_the_family_computes_what_the_page_says(acme):
    """By hand: sigmoid, the two best, divided by their sum; gate rows first."""
    x_TD, weights = torch.randn(5, 32), released()
    prefix = "model.layers.1.mlp."
    scores_TE = (x_TD @ weights[f"{prefix}gate.weight"].T).sigmoid()
    wanted_TD = torch.zeros_like(x_TD)
    for token, scores_E in enumerate(scores_TE):
        best = scores_E.argsort(descending=True)[:2].tolist()
        for expert in best:
            w1, w3, w2 = (
                weights[f"{prefix}experts.{expert}.{name}.weight"] for name in ("w1", "w3", "w2")
            )
            y_D = (torch.nn.functional.silu(x_TD[token] @ w1.T) * (x_TD[token] @ w3.T)) @ w2.T
            wanted_TD[token] += y_D * scores_E[expert] / scores_E[best].sum()
    for implementation in ("eager", "grouped_mm", "moesaic"):
        model = moesaic.load("acme", dtype=torch.float32, experts_implementation=implementation)
        found = model.model.layers[1].mlp(x_TD[None])[0][0]
        torch.testing.assert_close(found, wanted_TD, atol=1e-5, rtol=1e-4)


def test_info_knows_it(acme):
    shown = run_cli("info", "acme").stdout
    assert "acme_moe" in shown or "AcmeForCausalLM" in shown
    assert "2 of 8" in shown


def test_without_its_file_the_repository_is_refused_by_name(acme):
    families._REGISTERED.pop("acme_moe")
    config = json.loads(Path("acme/config.json").read_text())
    Path("acme/config.json").write_text(json.dumps({**config, "model_type": "acme"}))
    with pytest.raises(UserError, match=r"models/families/acme\.py"):
        moesaic.load("acme")
    families.register(acme.FAMILY)


def test_released_class_names_find_ours(acme):
    """By the ending, where the name is another's; a head that we lack is an error."""
    for given, found in (
        ("MixtralForCausalLM", "AcmeForCausalLM"),
        ("ACMEMoeModel", "AcmeModel"),
        ("ACME-MoE", "AcmeForCausalLM"),
    ):
        config = {"model_type": "llama", "experts_per_layer": 8, "architectures": [given]}
        _, fields = families.recognise(config)
        assert fields["architectures"] == [found]
    for lacking in ("AcmeForTokenClassification", "SomeNet"):
        config = {"model_type": "llama", "experts_per_layer": 8, "architectures": [lacking]}
        with pytest.raises(UserError, match=f"there is no class {lacking}"):
            model_class(families.recognise(config)[1])
