"""The model page: every example runs, every field and setter of the code is on it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedConfig

import moesaic.models as families

PAGE = (Path(__file__).parents[2] / "docs" / "models" / "llama_moe.md").read_text("utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_runs(number, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(EXAMPLES[number], f"example {number}", "exec"), {})


def test_page_has_the_sections_of_a_model_page():
    sections = re.findall(r"^## (.*)$", PAGE, flags=re.MULTILINE)
    assert sections[:8] == [
        "Overview",
        "Provenance",
        "Usage",
        "LlamaMoEConfig",
        "LlamaMoEModel",
        "LlamaMoEForCausalLM",
        "LlamaMoEForSequenceClassification",
        "LlamaMoEForQuestionAnswering",
    ]
    assert len(EXAMPLES) >= 8


def test_page_names_every_field_output_and_setter():
    common = {*PreTrainedConfig().to_dict(), *families.LlamaMoEConfig().to_dict()}
    own = {
        field
        for field in common | set(families.LlamaMoEResidualConfig().to_dict())
        if re.match(
            r"(gate_|num_(experts|selects)|size_experts|calculator|multiply|score|add_weight|drop"
            r"|capacity|load_rule|count_padding|mlp_bias|use_weighting|intermediate_size_)",
            field,
        )
    }
    assert len(own) > 25
    outputs = families.LlamaMoEModel(
        families.LlamaMoEConfig(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_experts=2,
            num_selects=1,
        )
    )(input_ids=torch.tensor([[1, 2]]), output_router_logits=True)
    setters = {
        name
        for name in vars(families.LlamaMoEForCausalLM.__mro__[1])
        if name.startswith(("set_moe", "reset_", "update_config", "freeze"))
    }
    assert len(setters) == 17
    for name in own | set(outputs) | setters:
        shortened = name.replace("set_moe_calculator", "...")
        assert f"`{name}" in PAGE or f"`{shortened}" in PAGE, name
