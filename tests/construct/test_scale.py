"""Layer-wise score scale factors against whole models run with hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.construct.convert import convert
from moesaic.core.errors import UserError
from moesaic.models.checkpoint import Checkpoint
from tests.construct.dense_models import write_dense, write_text_tokenizer


def ratios(model: Any, ids: torch.Tensor) -> list[float]:
    """mean |residual| / mean |feed-forward output| of every layer."""
    residual: list[float] = []
    output: list[float] = []
    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_hook(
            lambda _, args, __: residual.append(float(args[0].abs().mean()))
        )
        layer.mlp.register_forward_hook(
            lambda _, __, out: output.append(
                float((out if isinstance(out, torch.Tensor) else out[0]).abs().mean())
            )
        )
    with torch.inference_mode():
        model(ids)
    return [r / o for r, o in zip(residual, output, strict=True)]


def test_the_mixture_has_the_ratios_of_the_dense_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import moesaic.models  # noqa: F401

    dense = tmp_path / "dense"
    write_text_tokenizer(dense)
    write_dense(dense, num_hidden_layers=3)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over a lazy dog. " * 300)
    path = convert(
        dense, out=tmp_path / "moe", experts=4, top_k=2, scale="layerwise", data=str(text)
    )
    factors = Checkpoint(path).config["score_scale_factor"]
    assert len(factors) == 3
    assert len(set(factors)) == 3
    ids = torch.tensor(AutoTokenizer.from_pretrained(dense)(text.read_text())["input_ids"][:8192])
    ids = ids.view(-1, 256)
    wanted = ratios(AutoModelForCausalLM.from_pretrained(dense), ids)
    made = ratios(AutoModelForCausalLM.from_pretrained(path), ids)
    plain = ratios(AutoModelForCausalLM.from_pretrained(path, score_scale_factor=1.0), ids)
    assert made == pytest.approx(wanted, rel=1e-4)
    assert plain != pytest.approx(wanted, rel=1e-1)


def test_shared_experts_have_no_layerwise_rule(tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "dense")
    with pytest.raises(UserError, match="shared experts"):
        convert(
            dense, out=tmp_path / "moe", experts=4, shared=1, top_k=2, scale="layerwise", data="x"
        )
